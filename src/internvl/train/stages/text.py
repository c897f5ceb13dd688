"""From an English sentence encoder to the text side of InternVL-C, in all languages at once (arXiv 2004.09813).

A text in any language is pulled to what the teacher says about the English text that means the same, so that it has
meaning before pictures and texts come into one space. No picture is opened. The paper takes squared distances; here the
main loss is where a text lies among the English ones of the joint batch, which is what retrieval asks (docs/parity.md).
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from internvl.batch import TextBatch
from internvl.data.dual_texts import DualTokeniser
from internvl.data.translations import TextLoader
from internvl.load_dual import LoadedDual, load_dual
from internvl.parallel import collectives
from internvl.train.dual import DualLearner, part_of
from internvl.train.losses import neighbours_sum
from internvl.train.pieces import texts_in_pieces
from internvl.train.run import RunConfig
from internvl.train.sentences import SentenceEncoder, kept_vectors, open_sentences
from internvl.train.stages.dual import DualStage, check_dual, sets_of, with_tokenizer

NEIGHBOURS, COSINE = "neighbours", "cosine"
KEPT = "teacher.safetensors"
"""In the run's folder: what the teacher says about each English text."""


class TextStage(DualStage[TextBatch]):
    """The LLaMA, or its adapters, and `text_projection` learn."""

    loader: TextLoader

    def __init__(self, run: RunConfig, loaded: LoadedDual, teacher: SentenceEncoder) -> None:
        check(run)
        if teacher.width != loaded.config.embed_width:
            raise ValueError(
                f"text.teacher {teacher.name} is {teacher.width} wide, the embeddings of {run.model} "
                f"{loaded.config.embed_width}; give a teacher of that width"
            )
        super().__init__(run, loaded)
        self.coefficients = factors(run)
        self.teacher = teacher
        words = DualTokeniser(loaded.tokenizer, loaded.config.language)
        self.loader = open_texts(run, words)
        self.held_out = open_texts(run, words, learning=False) if run.data.held_out else None
        self.targets = self.held_out_targets = torch.empty(0, teacher.width)

    def wanted(self, name: str) -> bool:
        return name == "text_projection" or (part_of(name) == "language" and name != "qllama.head.weight")

    def begin(self, run: RunConfig, device: torch.device) -> DualLearner:
        self._listen(device)
        return super().begin(run, device)

    def losses(self, prepared: TextBatch) -> dict[str, Float[Tensor, ""]]:
        own = prepared.english
        if self.targets.device != own.device:  # on several ranks `begin` saw the host
            self.targets = self.targets.to(own.device)
        return self._losses(self.vectors(prepared), self.targets[own], self.targets[collectives.gather(own)])

    def vectors(self, batch: TextBatch) -> Float[Tensor, "texts embed"]:
        """Unit vectors of the texts, as retrieval takes them."""
        texts = batch.texts
        return texts_in_pieces(self.model.encode_text, texts.ids, texts.mask, self.run.pairs.micro_batch)

    def sizes(self, batch: TextBatch) -> dict[str, int]:
        tokens = int(batch.texts.mask.sum())
        return {"samples": batch.num_texts, "tokens": tokens, "learned": tokens, "tiles": 0}

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
        sums = self._losses(said, targets[own], targets[own])
        loss = sum(self.coefficients[name] * float(value) for name, value in sums.items()) / len(own)
        return {"held_out_loss": loss, **nearness(said, targets, own, torch.cat(translated).to(device))}

    def _listen(self, device: torch.device) -> None:
        """The teacher speaks once, before training."""
        self.teacher.module.to(device)
        path = Path(self.run.out) / KEPT
        self.targets = kept_vectors(self.teacher, self.loader.english, path, write=collectives.is_lead()).to(device)
        if self.held_out is not None:
            self.held_out_targets = self.teacher.encode(self.held_out.english)
        self.teacher.module.to("cpu")

    def _losses(
        self,
        said: Float[Tensor, "texts embed"],
        target: Float[Tensor, "texts embed"],
        among: Float[Tensor, "all_texts embed"],
    ) -> dict[str, Float[Tensor, ""]]:
        with torch.autocast(said.device.type, enabled=False):
            said, target = said.float(), target.float()
            sums = {NEIGHBOURS: neighbours_sum(said, target, among.float(), self.run.text.temperature)}
            if COSINE in self.coefficients:
                sums[COSINE] = (1 - torch.cosine_similarity(said, target)).sum()
        return sums


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


def factors(run: RunConfig) -> dict[str, float]:
    """Of the losses that a run has."""
    weight = run.text.cosine
    return {NEIGHBOURS: 1.0} | ({COSINE: weight} if weight else {})


def open_texts(run: RunConfig, words: DualTokeniser, learning: bool = True) -> TextLoader:
    """The texts of a run. Held-out ones are shown whole, in order, on every rank; one without English ends the run."""
    data = run.data
    return TextLoader(
        sets_of(run, learning),
        words,
        data.batch_samples or 16,
        seed=run.seed,
        shuffle=learning,
        on_error="skip" if learning and data.on_error == "skip" else "error",
        rank=collectives.rank() if learning else 0,
        ranks=collectives.num_ranks() if learning else 1,
        changed=data.changed,
    )


def check(run: RunConfig) -> None:
    """ValueError for settings that have no meaning for texts."""
    check_dual(run, "texts")
    data = run.data
    if run.vision.learn != "frozen":
        raise ValueError(f"vision.learn is {run.vision.learn!r}; stage text opens no picture: set it to frozen")
    if data.features != "none":
        raise ValueError(f"data.features is {data.features!r}; stage text opens no picture: set it to none")
    if data.held_out_samples is not None:
        raise ValueError(
            f"data.held_out_samples is {data.held_out_samples}; stage text takes repeat_time of the held-out meta JSON"
        )


def open_text(run: RunConfig) -> TextStage:
    """The model of a run with its tokenizer, its texts, and the teacher."""
    teacher = open_sentences(run.text.teacher)
    return TextStage(run, with_tokenizer(run, load_dual(run.model)), teacher)
