"""Stage 2 of InternVL 1.0: contrast, matching and captions of one batch (paper 1.0, section 3.3; BLIP-2, section 3.2).

In contrast and in captions the queries see only each other and the picture, so one pass over the queries serves both,
and only matching needs queries and text together. The official code runs all three as one row of 3 B; the numbers are
the same. What learns, and the weights of the three, is a stage's affair.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from internvl.batch import Texts
from internvl.models.contrastive import DualModel
from internvl.models.qllama import Cache
from internvl.parallel import collectives
from internvl.tokens import IGNORE_INDEX
from internvl.train.contrast import contrast, share
from internvl.train.joint import all_texts, brought, first_row
from internvl.train.losses import chunked_sum, shift
from internvl.train.pieces import by_length, in_pieces, texts_in_pieces

Negatives = Literal["given", "hard"]

EMPTY_CONTRAST, EMPTY_MATCH = 5, 2
"""Tokens of an empty text: BOS, three of `summarize:`, EOS; and BOS, EOS. Such texts are in no loss (official code)."""

CAPTION_CHUNK = 1024
"""Caption tokens whose logits are held at once."""


@dataclass(frozen=True)
class AlignmentBatch:
    """One batch of stage 2: each picture with its text in three forms."""

    pixel_values: Float[Tensor, "pairs 3 height width"] | None
    """None where features are handed in."""
    contrast: Texts
    """`summarize:` and the text."""
    match: Texts
    """The text alone."""
    caption: Texts
    """The prompt and the text."""
    labels: Int[Tensor, "pairs length"]
    """Of the captions, unshifted; IGNORE_INDEX where nothing is learned."""
    negatives: Texts | None = None
    """A text of another picture for each pair, drawn by the data: what the official code matches against."""
    same: Int[Tensor, " pairs"] | None = None
    """Number of each pair's picture, on any rank: pairs of one picture are no negatives of each other."""
    valid: Bool[Tensor, " pairs"] | None = None
    """False for pairs that count in no loss; all count where not given."""


def alignment_losses(
    model: DualModel,
    batch: AlignmentBatch,
    *,
    negatives: Negatives = "given",
    generator: torch.Generator | None = None,
    features: Float[Tensor, "pairs positions dim"] | None = None,
    piece: int | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """ "itc", "itm" and "itg", each a mean over all ranks' pairs or tokens as `contrast` returns it.

    `negatives` "given" matches the first half of all ranks' pictures with `batch.negatives` and the second with their
    own texts (official); "hard" draws them among all ranks' pairs by similarity (BLIP-2), 3 rows a pair, from
    `generator`: in the same state on every rank, it draws what one process would. `features` replaces the pass through
    a frozen vision encoder. With `piece`, so many rows are in a graph at a time: the same losses and gradients from
    less memory, for a second look at the pictures and a second pass (`pieces.py`).
    """
    if features is None:
        if batch.pixel_values is None:
            raise ValueError("the batch has no pictures; give pixel_values, or the features of them")
        features = model.vision(batch.pixel_values)
    seen = Cache() if piece is None else None
    images = in_pieces(lambda some: model.pool_queries(model.qllama.look(some, seen)), [features], piece)
    texts = texts_in_pieces(model.encode_text, batch.contrast.ids, batch.contrast.mask, piece)
    counted = batch.valid if batch.valid is not None else torch.ones_like(batch.contrast.ids[:, 0], dtype=torch.bool)
    scale, valid = model.logit_scale.exp(), batch.contrast.longer_than(EMPTY_CONTRAST) & counted
    itc = contrast(images, texts, scale, valid=valid, same=batch.same, smoothing=model.config.label_smoothing)
    if negatives == "hard":
        rows = mined_rows(batch, images, texts, scale, counted, generator)
        shown, places = brought(features, rows.image_of_row)
        rows = replace(rows, image_of_row=places)
    elif negatives == "given":
        rows, shown = given_rows(batch), features
        rows = replace(rows, labels=rows.labels.masked_fill(~counted, IGNORE_INDEX))
    else:
        raise ValueError(f"negatives {negatives!r}; they are 'given' or 'hard'")
    itg = captions(model, caption_states(model, features, seen, batch.caption, piece), batch)
    return {"itc": itc, "itm": matching(model, shown, rows, piece), "itg": itg}


@dataclass(frozen=True)
class MatchRows:
    """Texts, the picture each is asked about, and whether it fits: 1, 0, or IGNORE_INDEX."""

    texts: Texts
    image_of_row: Int[Tensor, " rows"]
    """By its number among those of this rank; of hard rows, of all ranks."""
    labels: Int[Tensor, " rows"]


def given_rows(batch: AlignmentBatch) -> MatchRows:
    """The first B - B // 2 pictures of all ranks against a foreign text, the last B // 2 with their own.

    Official forward, where B counts the pairs of a rank.
    """
    if batch.negatives is None:
        raise ValueError("the batch has no negatives; draw one text of another picture for each pair, or use 'hard'")
    num_pairs = len(batch.match.ids)
    num_all = num_pairs * collectives.num_ranks()
    images = torch.arange(num_pairs, device=batch.match.ids.device)
    labels = (images + first_row(num_pairs) >= num_all - num_all // 2).long()
    own, foreign = padded(batch.match, batch.negatives)
    chosen = labels.bool()[:, None]
    texts = Texts(torch.where(chosen, own.ids, foreign.ids), torch.where(chosen, own.mask, foreign.mask))
    return MatchRows(texts, images, labels.masked_fill(~texts.longer_than(EMPTY_MATCH), IGNORE_INDEX))


@torch.no_grad()
def mined_rows(
    batch: AlignmentBatch,
    images: Float[Tensor, "pairs embed"],
    texts: Float[Tensor, "pairs embed"],
    scale: Float[Tensor, ""],
    counted: Bool[Tensor, " pairs"],
    generator: torch.Generator | None,
) -> MatchRows:
    """`hard_rows` by the vectors of all ranks."""
    usable = (batch.match.longer_than(EMPTY_MATCH) & counted).long()
    others = [collectives.gather(x) for x in (texts, images)]
    logits = torch.stack([(scale * own @ all_.T).float() for own, all_ in zip((images, texts), others, strict=True)])
    same = None if batch.same is None else collectives.gather(batch.same)
    return hard_rows(all_texts(batch.match), logits, collectives.gather(usable).bool(), same, generator)


def hard_rows(
    texts: Texts,
    logits: Float[Tensor, "2 pairs all_pairs"],
    usable: Bool[Tensor, " all_pairs"],
    same: Int[Tensor, " all_pairs"] | None,
    generator: torch.Generator | None,
) -> MatchRows:
    """Each pair as it is; its text with a foreign picture; its picture with a foreign text (LAVIS blip2_qformer.py).

    `logits`: this rank's pictures against the texts of all ranks, and its texts against their pictures. Foreign ones
    are drawn with the probability that these give them. A pair without a possible negative, or with an empty text, is
    left out; a text that reads the same is no negative.
    """
    num_pairs, num_all = logits.shape[1:]
    everyone = torch.arange(num_all, device=logits.device)
    own = everyone[first_row(num_pairs) :][:num_pairs]
    numbers = everyone if same is None else same
    reading = texts.ids.unique(dim=0, return_inverse=True)[1]
    allowed = usable[own, None] & usable
    for x in (numbers, reading):
        allowed &= x[own, None] != x
    device = logits.device if generator is None else generator.device
    chances = torch.rand(2, num_all, generator=generator, device=device).to(logits.device)[:, own]
    text_of_image, image_of_text = (draw(x, allowed, chance) for x, chance in zip(logits, chances, strict=True))
    labels = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
    some = allowed.any(1)
    fits = torch.cat([usable[own], some, some])
    chosen = texts.rows(torch.cat([own, own, text_of_image]))
    return MatchRows(chosen, torch.cat([own, image_of_text, own]), labels.masked_fill(~fits, IGNORE_INDEX))


def draw(
    logits: Float[Tensor, "rows columns"], allowed: Bool[Tensor, "rows columns"], chance: Float[Tensor, " rows"]
) -> Int[Tensor, " rows"]:
    """One allowed column for each row, by softmax: where its `chance` in [0, 1) falls. Column 0 where there is none."""
    nothing = ~allowed.any(1, keepdim=True)
    upto = logits.double().masked_fill(~allowed & ~nothing, -torch.inf).softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(upto, upto[:, -1:] * chance[:, None].double(), right=True)[:, 0]
    return drawn.masked_fill(nothing[:, 0], 0)


def matching(model: DualModel, features: Tensor, rows: MatchRows, piece: int | None = None) -> Float[Tensor, ""]:
    """Two-way cross-entropy, of all ranks' rows with a label."""
    ids, mask, places = rows.texts.ids, rows.texts.mask, rows.image_of_row
    if piece is None:

        def fits(ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
            shown, places = places.unique(return_inverse=True)
            return model.match_logits(features[shown], ids, mask, places)

        logits = by_length(fits, ids, mask, places)
    else:
        logits = in_pieces(lambda i, m, at: model.match_logits(features[at], i, m), [ids, mask, places], piece)
    losses = F.cross_entropy(logits.float(), rows.labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return losses * share((rows.labels != IGNORE_INDEX).sum().float())


def caption_states(
    model: DualModel, features: Tensor, seen: Cache | None, texts: Texts, piece: int | None
) -> Float[Tensor, "rows length width"]:
    """After the queries in `seen`; without it the pictures are looked at again, some at a time."""
    if seen is not None:
        rows, length = texts.ids.shape

        def said(ids: Tensor, mask: Tensor, some: Tensor) -> Tensor:
            states = model.caption_states(seen.pick(some), ids, mask)
            return F.pad(states, (0, 0, 0, length - ids.shape[1]))

        return by_length(said, texts.ids, texts.mask, torch.arange(rows, device=texts.ids.device))

    def looked(some: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        again = Cache()
        model.qllama.look(some, again)
        return model.caption_states(again, ids, mask)

    return in_pieces(looked, [features, texts.ids, texts.mask], piece)


def captions(model: DualModel, states: Float[Tensor, "rows length width"], batch: AlignmentBatch) -> Float[Tensor, ""]:
    """Next-token cross-entropy of all ranks' learned tokens, never more than some logits at a time."""
    weights = (batch.labels != IGNORE_INDEX).float()
    if batch.valid is not None:
        weights = weights * batch.valid[:, None]
    positions, labels, learned = shift(batch.labels, weights)
    summed = chunked_sum(states.flatten(0, 1)[positions], model.qllama.head, labels, learned, CAPTION_CHUNK)
    return summed * share(learned.sum())


def padded(a: Texts, b: Texts) -> tuple[Texts, Texts]:
    """Both as long as the longer one."""
    longest = max(a.ids.shape[1], b.ids.shape[1])

    def fit(texts: Texts) -> Texts:
        more = (0, longest - texts.ids.shape[1])
        return Texts(F.pad(texts.ids, more), F.pad(texts.mask, more))

    return fit(a), fit(b)
