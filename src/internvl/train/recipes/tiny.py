"""A run of seconds on random weights: what the tests and the docs train. Its inputs are made on the spot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from internvl.tokens import SPECIAL_TOKENS
from internvl.train.run import RunConfig
from internvl.train.settings import Data, Optimiser, Part, Schedule
from internvl.zoo import CHAT

INPUTS = "runs/tiny-inputs"

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}


def tiny_sft() -> RunConfig:
    """A random model learns six colours: everything trains, 60 steps, about ten seconds.

    Hyper-parameters were found by trying; the held-out loss falls from about 5.6 to below 0.5.
    Command: internvl train tiny_sft
    """
    return RunConfig(
        out="runs/tiny_sft",
        model=f"{INPUTS}/model",
        vision=Part("full"),
        connector=Part("full"),
        language=Part("full"),
        data=Data(
            meta=f"{INPUTS}/records.jsonl",
            held_out=f"{INPUTS}/held_out.jsonl",
            batch_samples=8,
            max_length=256,
            max_tiles=1,
            weighting="token",
        ),
        optimiser=Optimiser(peak_lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
        schedule=Schedule(steps=60, warmup_share=0.1),
        log_every=10,
        save_every=20,
        eval_every=20,
    )


def prepare(run: RunConfig, own: RunConfig | None = None) -> None:
    """The model and the records of the recipe `own` (`tiny_sft`), where `run` names them and they are missing."""
    own = own or tiny_sft()
    if run.model == own.model and not Path(run.model).is_dir():
        write_model(Path(run.model))
    for path, is_held_out in missing(run, own):
        write_records(path, 7 * is_held_out)


def missing(run: RunConfig, own: RunConfig) -> Iterator[tuple[Path, bool]]:
    """Files that a recipe makes for itself and are not there, and whether they are held out.

    None at a path that somebody gave: what is spelled wrong there must be an error, not a run on something else.
    """
    for path, mine, is_held_out in (
        (run.data.meta, own.data.meta, False),
        (run.data.held_out, own.data.held_out, True),
    ):
        if path and path == mine and not Path(path).is_file():
            yield Path(path), is_held_out


def write_model(folder: Path, name: str = "tiny-llama", seed: int = 0) -> None:
    """A random model of the zoo with a byte-level tokenizer, in the official layout."""
    from internvl.load import save_checkpoint
    from internvl.models.build import build

    tokenizer = byte_tokenizer()
    config = CHAT[name]
    settings = {**config.language.settings, "vocab_size": len(tokenizer)}
    config = replace(config, language=replace(config.language, settings=settings), system_message="Look.", max_tiles=1)
    model = build(config, seed=seed)
    save_checkpoint(model, tokenizer, folder)


def byte_tokenizer() -> Any:
    """256 bytes, six control tokens, the special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    control = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({piece: index for index, piece in enumerate([*control, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_tokens([*control[4:], *SPECIAL_TOKENS], special_tokens=True)
    return tokenizer


def write_records(path: Path, shift: int = 0, per_colour: int = 6) -> None:
    """One-colour pictures, each a little different, and their questions."""
    from PIL import Image

    folder = path.parent / f"{path.stem}_pictures"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, (red, green, blue) in COLOURS.items():
        for index in range(per_colour):
            change = 4 * index - 10 + shift
            colour = tuple(min(255, max(0, value + change)) for value in (red, green, blue))
            picture = folder / f"{name}-{index}.png"
            Image.new("RGB", (56, 56), colour).save(picture)
            turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": name}]
            lines.append({"id": picture.stem, "image": str(picture.resolve()), "conversations": turns})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
