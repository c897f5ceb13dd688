"""Captions by InternVL-G: greedy or beam search over QLLaMA's own cache, batched.

The picture is looked at once: what its queries gathered is the beginning of every caption (official generate of
modeling_internvl.py, evaluate_caption.py). Chat models are engine.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from internvl.models.contrastive import DualModel
from internvl.models.qllama import Cache


@dataclass(frozen=True)
class CaptionSearch:
    """How a caption is looked for; the defaults are those of the published scores (official evaluate_caption.py)."""

    beams: int = 5
    """1 is greedy."""
    min_new_tokens: int = 8
    """No caption ends before."""
    max_new_tokens: int = 30
    length_penalty: float = 1.0
    """Log-probabilities are divided by length to this power when finished captions are compared."""

    def __post_init__(self) -> None:
        if self.beams < 1 or not 0 <= self.min_new_tokens <= self.max_new_tokens or self.max_new_tokens < 1:
            raise ValueError(
                f"{self.beams} beams, {self.min_new_tokens} to {self.max_new_tokens} new tokens; "
                f"at least 1 beam, 1 token at most, and not more at least than at most"
            )


@torch.inference_mode()
def caption(
    model: DualModel,
    pixel_values: Float[Tensor, "images 3 height width"],
    prompt_ids: Int[Tensor, " length"] | Int[Tensor, "images length"],
    end_id: int,
    search: CaptionSearch | None = None,
) -> list[list[int]]:
    """Ids of a caption for each picture, without prompt and end. Prompts have one length and no padding."""
    search = search or CaptionSearch()
    prompts = prompt_ids.expand(len(pixel_values), -1) if prompt_ids.ndim == 1 else prompt_ids
    if len(prompts) != len(pixel_values) or not prompts.shape[1]:
        raise ValueError(
            f"prompts {tuple(prompts.shape)} for {len(pixel_values)} pictures; give one each, or one for all"
        )
    cache = Cache()
    model.qllama.look(model.vision(pixel_values), cache)
    logits = model.qllama.head(model.qllama.read(prompts, cache=cache)[:, -1])
    if search.beams == 1:
        return _greedy(model, cache, logits, end_id, search)
    return _beam_search(model, cache, logits, end_id, search)


def _next(model: DualModel, cache: Cache, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
    out: Tensor = model.qllama.head(model.qllama.read(tokens[:, None], cache=cache)[:, -1])
    return out


def _greedy(model: DualModel, cache: Cache, logits: Tensor, end_id: int, search: CaptionSearch) -> list[list[int]]:
    """Finished rows go on until all are done; what they write after their end is cut off."""
    written: list[Tensor] = []
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    while len(written) < search.max_new_tokens:
        if len(written) < search.min_new_tokens:
            logits[:, end_id] = -torch.inf
        tokens = logits.argmax(-1)
        written.append(tokens)
        ended |= tokens == end_id
        if bool(ended.all()) or len(written) == search.max_new_tokens:
            break
        logits = _next(model, cache, tokens)
    rows: list[list[int]] = torch.stack(written, dim=1).tolist()
    return [row[: row.index(end_id)] if end_id in row else row for row in rows]


@dataclass
class _Finished:
    """The best finished captions of one picture, as transformers' beam search keeps them."""

    search: CaptionSearch
    captions: list[tuple[float, list[int]]] = field(default_factory=list)
    done: bool = False

    def add(self, total: float, tokens: list[int], length: int) -> None:
        """`length` counts the end of the caption, where it has one."""
        self.captions.append((total / length**self.search.length_penalty, tokens))
        self.captions.sort(key=lambda found: found[0], reverse=True)
        del self.captions[self.search.beams :]

    def settle(self, best_open: float, length: int) -> None:
        """Done once no caption of this length is better than the worst of enough finished ones."""
        full = len(self.captions) == self.search.beams
        self.done |= full and self.captions[-1][0] >= best_open / length**self.search.length_penalty


def _beam_search(model: DualModel, cache: Cache, logits: Tensor, end_id: int, search: CaptionSearch) -> list[list[int]]:
    """Beam search of transformers 4.37, which the official code runs: no sampling, no early stopping."""
    num_images, num_beams, device = len(logits), search.beams, logits.device
    cache.pairs = cache.pick(torch.arange(num_images, device=device).repeat_interleave(num_beams)).pairs
    logits = logits.repeat_interleave(num_beams, 0)
    totals = torch.full((num_images, num_beams), -torch.inf, device=device)
    totals[:, 0] = 0.0  # all beams begin alike: only one may branch first
    written: list[list[list[int]]] = [[[] for _ in range(num_beams)] for _ in range(num_images)]
    finished = [_Finished(search) for _ in range(num_images)]
    for length in range(1, search.max_new_tokens + 1):
        scores = logits.float().log_softmax(-1)
        if length <= search.min_new_tokens:
            scores[:, end_id] = -torch.inf
        vocab = scores.shape[-1]
        best = (scores.view(num_images, num_beams, vocab) + totals[:, :, None]).flatten(1).topk(2 * num_beams)
        rows, tokens = _advance(best.values.tolist(), best.indices.tolist(), vocab, end_id, written, totals, finished)
        for image, state in enumerate(finished):
            state.settle(best.values[image, 0].item(), length)
        if all(state.done for state in finished) or length == search.max_new_tokens:
            break
        cache.pairs = cache.pick(torch.tensor(rows, device=device)).pairs
        logits = _next(model, cache, torch.tensor(tokens, device=device))
    for image, state in enumerate(finished):
        for total, tokens_of in zip(totals[image].tolist(), written[image], strict=True):
            if not state.done:
                state.add(total, tokens_of, len(tokens_of))
    return [state.captions[0][1] for state in finished]


def _advance(
    values: list[list[float]],
    indices: list[list[int]],
    vocab: int,
    end_id: int,
    written: list[list[list[int]]],
    totals: Tensor,
    finished: list[_Finished],
) -> tuple[list[int], list[int]]:
    """Continue the best beams of every picture in place; the rows of the cache they come from, and their tokens."""
    num_beams = totals.shape[1]
    rows: list[int] = []
    tokens: list[int] = []
    for image, state in enumerate(finished):
        chosen: list[tuple[float, int, int]] = []
        for place, (value, index) in enumerate(zip(values[image], indices[image], strict=True)):
            beam, token = divmod(index, vocab)
            if token != end_id:
                chosen.append((value, beam, token))
            elif place < num_beams and not state.done:
                state.add(value, written[image][beam], len(written[image][beam]) + 1)
        chosen = chosen[:num_beams]
        written[image] = [[*written[image][beam], token] for _, beam, token in chosen]
        totals[image] = totals.new_tensor([value for value, _, _ in chosen])
        rows += [image * num_beams + beam for _, beam, _ in chosen]
        tokens += [token for _, _, token in chosen]
    return rows, tokens
