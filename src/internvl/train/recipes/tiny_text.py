"""Stage `text` in seconds on random weights: a tiny dual model and a tiny teacher, made on the spot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from internvl.train.recipes.tiny import COLOURS, byte_tokenizer, missing
from internvl.train.recipes.v1_0 import TINY, tiny_contrastive, write_tiny_model
from internvl.train.run import RunConfig
from internvl.train.settings import Data, Optimiser, Pairs, Part, Text

GERMAN = {
    "red": "rot",
    "green": "grün",
    "blue": "blau",
    "yellow": "gelb",
    "black": "schwarz",
    "white": "weiß",
}


def tiny_text() -> RunConfig:
    """A random text side learns what a random teacher says about 30 English texts, and their German ones.

    Rates found by trying. Command: internvl train tiny_text
    """
    run = tiny_contrastive()
    return replace(
        run,
        out="runs/tiny_text",
        stage="text",
        vision=Part(),
        data=Data(meta=f"{TINY}/texts.jsonl", held_out=f"{TINY}/texts_held_out.jsonl", batch_samples=15),
        optimiser=Optimiser(peak_lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
        pairs=Pairs(),
        text=Text(teacher=f"{TINY}/teacher"),
    )


def prepare(run: RunConfig) -> None:
    """The random model, the random teacher and the texts, where they are missing."""
    from internvl.train.recipes.pocket import prepare as earlier

    if run.model == f"{TINY}/model" and not Path(run.model).is_dir():
        write_tiny_model(Path(run.model))
    earlier(run)
    if run.text.teacher == f"{TINY}/teacher" and not Path(run.text.teacher).is_dir():
        write_tiny_teacher(Path(run.text.teacher))
    for path, is_held_out in missing(run, tiny_text()):
        write_tiny_texts(path, "under" if is_held_out else "beside")


def write_tiny_teacher(folder: Path, seed: int = 0) -> None:
    """A random BERT of one layer with a tokenizer of bytes, as wide as the embeddings of `tiny-dual`."""
    import torch
    from transformers import BertConfig, BertModel

    from internvl.zoo import DUAL

    tokenizer, width = byte_tokenizer(), DUAL["tiny-dual"].embed_width
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": width}
    config = BertConfig(vocab_size=len(tokenizer), **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config)
        torch.nn.init.normal_(model.embeddings.word_embeddings.weight)  # so that words matter more than places
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def write_tiny_texts(path: Path, word: str = "beside") -> None:
    """Every two colours in English and in German, as lines of one picture, which is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for first in COLOURS:
        for second in COLOURS:
            if first == second:
                continue
            line = {"image": f"{word}-{first}-{second}.png", "caption": f"{first} {word} {second}", "language": "en"}
            lines += [line, {**line, "caption": f"{GERMAN[first]} {word} {GERMAN[second]}", "language": "de"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
