"""Next token over chat rows, pre-training and fine-tuning alike (paper 2.5, section 3): a batch to its weighted loss.

What learns is trainable.py's, batches are data's; logits exist only where the next label is learned.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from internvl.batch import ChatBatch
from internvl.data.images import normalise
from internvl.data.loader import Loader
from internvl.load import load_checkpoint
from internvl.models.chat import ChatModel
from internvl.parallel import collectives
from internvl.tokens import SPECIAL_TOKENS, token_id
from internvl.train import cost, features, losses, trainable
from internvl.train.cells import moved
from internvl.train.chat_records import open_loader
from internvl.train.export import export_chat
from internvl.train.run import RunConfig
from internvl.train.told import Said, Told

LOSS = "next_token"
HEAD_CHUNK = 2048
"""Positions whose logits exist at a time: at 49,161 words in fp32 that is 0.4 GB."""


@dataclass(frozen=True)
class Prepared:
    """A batch with the places of its learned tokens found on the host, so that the device never waits for a count."""

    batch: ChatBatch
    positions: Int[Tensor, " learned"]
    targets: Int[Tensor, " learned"]
    weights: Float[Tensor, " learned"]
    num_image_tokens: int
    digests: tuple[bytes, ...] = ()
    """Content of each tile, where features are kept."""
    said: Said | None = None
    """What is told of tiles, where data.told says so."""

    def pin_memory(self) -> Prepared:
        return self._moved(lambda value: value.pin_memory())

    def to(self, device: torch.device, non_blocking: bool = False) -> Prepared:
        there = self._moved(lambda value: value.to(device, non_blocking=non_blocking))
        # bounds of segments stay on the host, which reads them
        return replace(there, batch=replace(there.batch, segments=self.batch.segments))

    def _moved(self, move: Any) -> Prepared:
        said = None if self.said is None else moved(self.said, move)
        return replace(moved(self, move), batch=move(self.batch), said=said)


class Sft:
    """Supervised next-token training of a chat model."""

    coefficients: Mapping[str, float] = {LOSS: 1.0}
    joint = False

    def __init__(
        self, run: RunConfig, model: ChatModel, tokenizer: Any, loader: Loader, held_out: Loader | None
    ) -> None:
        self.run, self.model, self.tokenizer = run, model, tokenizer
        self.loader, self.held_out = loader, held_out
        self.store: features.MemoryStore | None = None
        self.image_token_id = token_id(tokenizer, SPECIAL_TOKENS[2])
        self.told: Told | None = None

    def begin(self, run: RunConfig, device: torch.device) -> trainable.Learner:
        self.model.to(device)
        share = run.data.told
        self.told = Told(self.model, self.tokenizer, self.loader.sets, share) if share else None
        rows = [token_id(self.tokenizer, token) for token in SPECIAL_TOKENS] if run.tokens.learn else []
        learner = trainable.choose(self.model, run, rows)
        if run.grad_checkpoint:
            self.model.checkpoint()
        if run.compile:
            for block in (*self.model.vision.layers, *self.model.language.model.model.layers):
                block.compile()
        self.store = features.open_store(run, self.model.config, self.model.eyes, self._features, device)
        return learner

    def batches(self) -> Generator[ChatBatch | None, None, None]:
        several = collectives.num_ranks() > 1
        yield from self.loader.dealt(collectives.rank(), collectives.num_ranks()) if several else self.loader

    def cursor(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def seek(self, cursor: Mapping[str, Any]) -> None:
        self.loader.load_state_dict(dict(cursor))

    def batches_per_epoch(self) -> int:
        return len(self.loader)

    def worst(self) -> ChatBatch:
        """The micro-batch of the epoch that takes the most memory, by cost.py's estimate."""
        sizes = self.loader.sizes()
        return self.loader.make(cost.heaviest(self.run, self.model.config, sizes))

    def prepare(self, batch: ChatBatch) -> Prepared:
        prepared = self._found(batch)
        return prepared if self.told is None else replace(prepared, said=self.told.said(batch))

    def _found(self, batch: ChatBatch) -> Prepared:
        positions, targets, weights = losses.shift(batch.labels, batch.loss_weights)
        return Prepared(
            _without_mask(batch),
            positions,
            targets,
            weights,
            int((batch.input_ids == self.image_token_id).sum()),
            tuple(features.digests(batch.tiles)) if self.store is not None else (),
        )

    def weights(self, batch: ChatBatch) -> dict[str, float]:
        return {LOSS: float(losses.shift(batch.labels, batch.loss_weights)[2].double().sum())}

    def losses(self, prepared: Prepared) -> dict[str, Float[Tensor, ""]]:
        return {LOSS: self._summed(self._learned(prepared), prepared.targets, prepared.weights)}

    def sizes(self, batch: ChatBatch) -> dict[str, int]:
        seen = batch.input_ids.numel() if batch.attention_mask is None else int(batch.attention_mask.sum())
        sizes = {"samples": batch.num_samples, "tokens": seen, "learned": batch.num_learned, "tiles": batch.num_tiles}
        if not batch.room:
            return sizes
        together = batch.company
        return {
            **sizes,
            "rows": 1,
            "room": batch.room,
            "company_tokens": together.tokens,
            "company_tiles": together.tiles,
            "longest": together.longest * together.ranks,
            "most_tiles": together.most_tiles * together.ranks,
        }

    def describe(self, batch: ChatBatch) -> str:
        return self.loader.describe(batch)

    def lost(self) -> tuple[int, Mapping[str, str]]:
        return self.loader.num_cut, self.loader.skipped

    def evaluate(self, device: torch.device) -> dict[str, float]:
        """Mean loss over the held-out records, weighted as in training; and over each set, where there are several."""
        if self.held_out is None:
            return {}
        known: set[str] = set()
        totals: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        for batch, counts in collectives.deal_once(_noting(self.held_out.once(), known)):
            prepared = self._found(batch)
            sets = by_set(batch, prepared.positions)
            moved = prepared.to(device)
            hidden = self._learned(moved)
            for name, places in sets.items() if counts else ():
                at = places.to(device)
                loss = self._summed(hidden[at], moved.targets[at], moved.weights[at]).double()
                totals[name] = totals.get(name, 0.0) + loss
                weights[name] = weights.get(name, 0.0) + float(prepared.weights[places].double().sum())
        names = sorted(known)
        sums = [float(totals.get(name, 0.0)) for name in names] + [weights.get(name, 0.0) for name in names]
        summed = collectives.total_on_host(sums)
        losses_of, weights_of = summed[: len(names)], summed[len(names) :]
        line = {"held_out_loss": sum(losses_of) / sum(weights_of)}
        if len(names) > 1:
            pairs = zip(names, losses_of, weights_of, strict=True)
            line |= {f"held_out_loss/{name}": loss / weight for name, loss, weight in pairs if weight}
        return line

    def export(self, learner: trainable.Learner, out: Path) -> None:
        export_chat(learner, self.tokenizer, out)

    def _learned(self, prepared: Prepared) -> Float[Tensor, "learned width"]:
        """Hidden states of the positions whose next label is learned."""
        batch = prepared.batch
        hidden = self.model.hidden(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            segments=batch.segments,
            visual=self._visual(prepared) if batch.num_tiles or collectives.num_ranks() > 1 else None,
            num_image_tokens=prepared.num_image_tokens,
        )
        return hidden.flatten(0, 1).index_select(0, prepared.positions)

    def _summed(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Float[Tensor, ""]:
        return losses.chunked_sum(hidden, self.model.language.output, targets, weights, HEAD_CHUNK)

    def _visual(self, prepared: Prepared) -> Float[Tensor, "tiles tokens width"]:
        said = prepared.said
        if said is None or self.told is None:
            return self._shown(prepared.batch.tiles, prepared.digests)
        told = self.told.tokens(said)
        if not len(said.looked) and collectives.num_ranks() == 1:
            return told  # of several ranks none leaves the encoder out, even if it looks at nothing
        digests = tuple(prepared.digests[int(k)] for k in said.looked) if prepared.digests else ()
        seen = self._shown(prepared.batch.tiles[said.looked], digests)
        out = seen.new_zeros(prepared.batch.num_tiles, *seen.shape[1:])
        return out.index_copy(0, said.looked, seen).index_copy(0, said.tiles, told.to(seen))

    def _shown(self, tiles: Tensor, digests: Sequence[bytes]) -> Float[Tensor, "tiles tokens width"]:
        if self.store is None:
            return self.see(tiles)
        out: Tensor = self.model.connector(self.store.gather(tiles, digests, self._features))
        return out

    def see(self, tiles: Tensor) -> Float[Tensor, "tiles tokens width"]:
        """Visual tokens. Without a tile a blank one runs, of which nothing is taken: no rank leaves a part out."""
        shown = tiles if len(tiles) else tiles.new_zeros(1, *tiles.shape[1:])
        out: Tensor = self.model.connector(self._features(shown))
        return out[: len(tiles)]

    def _features(self, tiles: Tensor) -> Float[Tensor, "tiles patches width"]:
        """What the connector reads."""
        return self.model.look(normalise(tiles, self.model.config.normalize))


def by_set(batch: ChatBatch, positions: Int[Tensor, " learned"]) -> dict[str, Int[Tensor, " some"]]:
    """Name of a set -> which learned positions of the batch are its; one nameless set where sources are unknown."""
    if not batch.sources:
        return {"": torch.arange(len(positions))}
    row = positions // batch.input_ids.shape[1]
    if batch.segments is not None:
        row = torch.searchsorted(batch.segments, positions, right=True) - 1
    owners = [set_name(source) for source in batch.sources]
    numbers = {name: index for index, name in enumerate(dict.fromkeys(owners))}
    owner = torch.tensor([numbers[name] for name in owners])[row]
    return {name: torch.nonzero(owner == index).flatten() for name, index in numbers.items()}


def set_name(source: str) -> str:
    """data/val/docs.jsonl:12 -> docs."""
    return Path(source.rsplit(":", 1)[0]).stem


def _noting(batches: Iterable[ChatBatch], known: set[str]) -> Iterator[ChatBatch]:
    """The batches; the sets that they come from are put into `known`, those of other ranks too."""
    for batch in batches:
        known.update(map(set_name, batch.sources) if batch.sources else [""])
        yield batch


def _without_mask(batch: ChatBatch) -> ChatBatch:
    """Rows padded on the right need no mask: causal attention never looks at what comes after a learned token."""
    mask = batch.attention_mask
    if mask is None or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        return batch
    return replace(batch, attention_mask=None)


def open_sft(run: RunConfig) -> Sft:
    """The model of a run with its tokenizer, and its records."""
    loaded = load_checkpoint(run.model)
    if loaded.tokenizer is None:
        raise ValueError(f"{run.model} has no tokenizer; put its tokenizer.json beside the weights")
    tokenizer, config = loaded.tokenizer, loaded.config
    held_out = open_loader(run, tokenizer, config, run.data.held_out, learning=False) if run.data.held_out else None
    return Sft(
        run, loaded.model, tokenizer, open_loader(run, tokenizer, config, run.data.meta, learning=True), held_out
    )
