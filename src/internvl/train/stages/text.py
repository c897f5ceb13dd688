"""From an English sentence encoder to the text side of InternVL-C, in all languages at once (arXiv 2004.09813).

A text in any language is pulled to what the teacher says about the English text that means the same, so that it has
meaning before pictures and texts come into one space. No picture is opened. The paper takes squared distances; here the
main loss is where a text lies among the batch's English ones, which is what retrieval asks (docs/parity.md).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from internvl.batch import TextBatch
from internvl.data.dual_texts import DualTokeniser
from internvl.data.mixture import read_sets
from internvl.data.translations import TextLoader
from internvl.load_dual import LoadedDual, load_dual
from internvl.models.contrastive import DualModel
from internvl.parallel import collectives
from internvl.train import dual
from internvl.train.losses import neighbours_sum
from internvl.train.pieces import texts_in_pieces
from internvl.train.run import RunConfig
from internvl.train.sentences import SentenceEncoder, kept_vectors, open_sentences
from internvl.train.stages.pairs import with_tokenizer
from internvl.train.trainable import Learner

NEIGHBOURS, COSINE = "neighbours", "cosine"
KEPT = "teacher.safetensors"
"""In the run's folder: what the teacher says about each English text."""


class TextStage:
    """The LLaMA, or its adapters, and `text_projection` learn."""

    joint = False

    def __init__(self, run: RunConfig, loaded: LoadedDual, teacher: SentenceEncoder) -> None:
        _check(run)
        if teacher.width != loaded.config.embed_width:
            raise ValueError(
                f"text.teacher {teacher.name} is {teacher.width} wide, the embeddings of {run.model} "
                f"{loaded.config.embed_width}; give a teacher of that width"
            )
        weight = run.text.cosine
        self.coefficients: Mapping[str, float] = {NEIGHBOURS: 1.0} | ({COSINE: weight} if weight else {})
        self.run, self.model, self.tokenizer, self.teacher = run, loaded.model, loaded.tokenizer, teacher
        self.loader = self._loader(loaded, run.data.meta, learning=True)
        held_out = run.data.held_out
        self.held_out = self._loader(loaded, held_out, learning=False) if held_out else None
        self.targets = self.held_out_targets = torch.empty(0, teacher.width)

    def wanted(self, name: str) -> bool:
        """Whether a parameter can learn in this stage."""
        return name == "text_projection" or (dual.part_of(name) == "language" and name != "qllama.head.weight")

    def begin(self, run: RunConfig, device: torch.device) -> dual.DualLearner:
        """The teacher speaks once, before training."""
        self.teacher.module.to(device)
        self.targets = kept_vectors(
            self.teacher, self.loader.english, Path(run.out) / KEPT, write=collectives.is_lead()
        ).to(device)
        if self.held_out is not None:
            self.held_out_targets = self.teacher.encode(self.held_out.english)
        self.teacher.module.to("cpu")
        self.model.to(device)
        learner = dual.choose(self.model, run, self.wanted)
        self.model.checkpoint(run.grad_checkpoint)
        if run.compile:
            for block in self.model.qllama.layers:
                block.compile()
        return learner

    def batches(self) -> Generator[TextBatch, None, None]:
        yield from self.loader

    def cursor(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def seek(self, cursor: Mapping[str, Any]) -> None:
        self.loader.load_state_dict(cursor)

    def batches_per_epoch(self) -> int:
        return len(self.loader)

    def prepare(self, batch: TextBatch) -> TextBatch:
        return batch

    def weights(self, batch: TextBatch) -> dict[str, float]:
        return {name: float(batch.num_texts) for name in self.coefficients}

    def losses(self, prepared: TextBatch) -> dict[str, Float[Tensor, ""]]:
        if self.targets.device != prepared.english.device:  # on several ranks `begin` saw the host
            self.targets = self.targets.to(prepared.english.device)
        return self._losses(self.vectors(prepared), self.targets[prepared.english])

    def vectors(self, batch: TextBatch) -> Float[Tensor, "texts embed"]:
        """Unit vectors of the texts, as retrieval takes them."""
        texts = batch.texts
        return texts_in_pieces(self.model.encode_text, texts.ids, texts.mask, self.run.pairs.micro_batch)

    def sizes(self, batch: TextBatch) -> dict[str, int]:
        tokens = int(batch.texts.mask.sum())
        return {"samples": batch.num_texts, "tokens": tokens, "learned": tokens, "tiles": 0}

    def describe(self, batch: TextBatch) -> str:
        return ", ".join(batch.sources)

    def lost(self) -> tuple[int, Mapping[str, str]]:
        return self.loader.num_cut, self.loader.skipped

    def evaluate(self, device: torch.device) -> dict[str, float]:
        """Loss, cosine, how often the nearest held-out English text is the right one; of translations apart too."""
        if self.held_out is None:
            return {}
        targets = self.held_out_targets.to(device)
        found, numbers, translated = [], [], []
        for batch in self.held_out.once():
            found.append(self.vectors(batch.to(device)).float())
            numbers.append(batch.english)
            translated.append(batch.translated)
        said, own = torch.cat(found), torch.cat(numbers).to(device)
        sums = self._losses(said, targets[own])
        loss = sum(self.coefficients[name] * float(value) for name, value in sums.items()) / len(own)
        return {"held_out_loss": loss, **nearness(said, targets, own, torch.cat(translated).to(device))}

    def export(self, learner: Learner[DualModel], out: Path) -> None:
        dual.export(learner, self.tokenizer, out)

    def _losses(
        self, said: Float[Tensor, "texts embed"], target: Float[Tensor, "texts embed"]
    ) -> dict[str, Float[Tensor, ""]]:
        with torch.autocast(said.device.type, enabled=False):
            said, target = said.float(), target.float()
            sums = {NEIGHBOURS: neighbours_sum(said, target, self.run.text.temperature)}
            if COSINE in self.coefficients:
                sums[COSINE] = (1 - torch.cosine_similarity(said, target)).sum()
        return sums

    def _loader(self, loaded: LoadedDual, meta: str, learning: bool) -> TextLoader:
        """Held-out texts come in order; a line of them without English ends the run."""
        data = self.run.data
        return TextLoader(
            read_sets(meta),
            DualTokeniser(loaded.tokenizer, loaded.config.language),
            data.batch_samples or 16,
            seed=self.run.seed,
            shuffle=learning,
            on_error="skip" if learning and data.on_error == "skip" else "error",
        )


def nearness(
    said: Float[Tensor, "texts embed"],
    english: Float[Tensor, "sentences embed"],
    own: Int[Tensor, " texts"],
    translated: Bool[Tensor, " texts"],
) -> dict[str, float]:
    """Mean cosine to the own sentence and share of texts whose nearest sentence it is; the same of translations."""
    with torch.autocast(said.device.type, enabled=False):
        cosines = said @ english.float().T
    right = (cosines.argmax(1) == own).float()
    apart = cosines.gather(1, own[:, None])[:, 0]
    found = {"held_out_cosine": float(apart.mean()), "held_out_nearest": float(right.mean())}
    if bool(translated.any()):
        found["held_out_cosine_translated"] = float(apart[translated].mean())
        found["held_out_nearest_translated"] = float(right[translated].mean())
    return found


def _check(run: RunConfig) -> None:
    data = run.data
    if not data.meta:
        raise ValueError("data.meta is not given; set --data.meta to a meta JSON or a JSONL file of texts")
    if run.vision.learn != "frozen":
        raise ValueError(f"vision.learn is {run.vision.learn!r}; stage text opens no picture: set it to frozen")
    if data.features != "none":
        raise ValueError(f"data.features is {data.features!r}; stage text opens no picture: set it to none")
    if data.batch_tokens is not None or data.batch_tiles is not None:
        raise ValueError("data.batch_tokens and data.batch_tiles have no meaning for texts; set data.batch_samples")
    if run.tokens.learn:
        raise ValueError("tokens.learn is on; dual models have no added tokens: use --tokens.no-learn")
    if data.on_error == "quarantine":
        raise ValueError("data.on_error is 'quarantine'; stage text knows error, and skip, which names each line")
    if data.held_out_samples is not None:
        raise ValueError(
            f"data.held_out_samples is {data.held_out_samples}; stage text takes repeat_time of the held-out meta JSON"
        )


def open_text(run: RunConfig) -> TextStage:
    """The model of a run with its tokenizer, its texts, and the teacher."""
    teacher = open_sentences(run.text.teacher)
    return TextStage(run, with_tokenizer(run, load_dual(run.model)), teacher)
