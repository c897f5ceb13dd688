"""The nearest of many vectors to a text or a picture: exact in blocks, by faiss where it is there, by hnswlib if asked.

Scores that are shown are always computed here, so every index gives the same numbers for the same hit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from internvl.data.labelled import PICTURES
from internvl.generate.dual import Dual, Fit
from internvl.generate.embedded import Embedded
from internvl.models.contrastive import Head

BLOCK = 1 << 16
"""Vectors whose scores exist together: 200 MB of float32 at a width of 768."""
Index = Literal["auto", "exact", "faiss", "hnswlib"]
HNSW_LINKS, HNSW_BUILD, HNSW_LOOK = 32, 200, 256
"""Links of a vector, and how many candidates are kept while the graph is built and searched."""
NEAR = 1e-5
"""Of a score: what float32 sums of the same vectors may part by in an index and here."""


@dataclass(frozen=True)
class Hit:
    name: str
    score: float
    """Cosine, -1 to 1."""
    place: int
    """Row of the file."""


@dataclass(frozen=True)
class Found:
    """The hits of one query, best first."""

    query: str
    kind: Literal["text", "picture"]
    hits: tuple[Hit, ...]


def search(
    dual: Dual, embedded: Embedded, queries: Sequence[str], top: int, *, index: Index = "auto", text: bool = False
) -> list[Found]:
    """Hits of each query. A query that is a picture file is looked at, unless `text`; everything else is read."""
    if not queries:
        raise ValueError("no query; give a text or the path of a picture")
    kinds: list[Literal["text", "picture"]] = [
        "picture" if not text and is_picture(query) else "text" for query in queries
    ]
    vectors = torch.cat([query_vector(dual, embedded, *pair) for pair in zip(queries, kinds, strict=True)])
    scores, places = nearest(vectors, embedded.vectors, top, index=index)
    return [
        Found(
            query,
            kind,
            tuple(Hit(embedded.names[n], s, n) for s, n in zip(row_scores.tolist(), row.tolist(), strict=True)),
        )
        for query, kind, row_scores, row in zip(queries, kinds, scores, places, strict=True)
    ]


def is_picture(query: str) -> bool:
    """Whether a query names a picture file; ValueError where it looks like one that is not there."""
    path = Path(query)
    if path.suffix.lower() not in PICTURES:
        return False
    try:
        there = path.is_file()
    except OSError:  # a text too long for a name
        return False
    if not there:
        raise ValueError(f"{query}: no such picture; check the path, or say --text if these are words")
    return True


def query_vector(
    dual: Dual, embedded: Embedded, query: str, kind: Literal["text", "picture"]
) -> Float[Tensor, "1 dim"]:
    """Of a text, or of a picture by the head and fit of the file."""
    if kind == "text":
        if not query.strip():
            raise ValueError("an empty query; write what to look for")
        return dual.encode_text([query]).cpu()
    head: Head = "g" if embedded.facts.head == "g" else "c"
    fit: Fit = "crop" if embedded.facts.fit == "crop" else "squash"
    return dual.encode_image(Path(query), head, fit).cpu()


def nearest(
    queries: Float[Tensor, "queries dim"],
    vectors: Float[Tensor, "rows dim"],
    top: int,
    *,
    index: Index = "auto",
    block: int = BLOCK,
) -> tuple[Float[Tensor, "queries best"], Int[Tensor, "queries best"]]:
    """Products and rows of the `top` best, best first, of equal ones the earlier row; min(top, rows) columns.

    "auto" is faiss' exact index where it is installed, else blocks. "hnswlib" is approximate: it may miss hits, equal
    ones above all. ValueError where its graph reaches fewer than `top` vectors.
    """
    if top < 1 or block < 1:
        raise ValueError(f"the best {top} in blocks of {block}; both must be at least 1")
    if queries.shape[1] != vectors.shape[1]:
        raise ValueError(f"queries of {queries.shape[1]} numbers, vectors of {vectors.shape[1]}; use the same model")
    top = min(top, len(vectors))
    if index == "auto":
        index = "faiss" if find_spec("faiss") is not None else "exact"
    if index == "exact":
        return _exact(queries.float(), vectors, top, block)
    candidates = _faiss(queries, vectors, top) if index == "faiss" else _hnsw(queries, vectors, top)
    by_row = candidates.sort(dim=1).values
    # Rounded before they are ordered: the last bits of a sum depend on its place, and equal vectors are equal here.
    scores = torch.einsum("qd,qkd->qk", queries.double(), vectors[by_row].double()).float()
    ordered = scores.sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :top], by_row.gather(1, ordered.indices[:, :top])


def _exact(queries: Tensor, vectors: Tensor, top: int, block: int) -> tuple[Tensor, Tensor]:
    values, places = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    for start in range(0, len(vectors), block):
        part = vectors[start : start + block].float()
        rows = torch.arange(start, start + len(part)).expand(len(queries), -1)
        values, places = torch.cat([values, queries @ part.T], 1), torch.cat([places, rows], 1)
        ordered = values.sort(dim=1, descending=True, stable=True)  # earlier rows stand before equal later ones
        values, places = ordered.values[:, :top], places.gather(1, ordered.indices[:, :top])
    return values, places


def _faiss(queries: Tensor, vectors: Tensor, top: int) -> Tensor:
    """Rows of the `top` best, and all that equal the last of them: of equal ones faiss gives any."""
    try:
        import faiss
    except ImportError as error:
        raise ValueError("this index needs: pip install 'internvl[faiss]'") from error
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors.float().contiguous().numpy())
    asked, count = queries.float().contiguous().numpy(), top
    while True:
        count = min(2 * count, len(vectors))
        scores, places = (torch.from_numpy(found) for found in flat.search(asked, count))
        last = scores[:, top - 1]
        if count == len(vectors) or bool((scores[:, -1] < last - NEAR * last.abs().clamp(min=1)).all()):
            return places.long()


def _hnsw(queries: Tensor, vectors: Tensor, top: int) -> Tensor:
    try:
        import hnswlib
    except ImportError as error:
        raise ValueError("this index needs: pip install 'internvl[hnswlib]'") from error
    graph = hnswlib.Index(space="ip", dim=vectors.shape[1])
    graph.init_index(max_elements=len(vectors), ef_construction=HNSW_BUILD, M=HNSW_LINKS, random_seed=0)
    graph.add_items(vectors.float().numpy())
    graph.set_ef(max(HNSW_LOOK, top))
    try:
        places, _ = graph.knn_query(queries.float().numpy(), k=top)
    except RuntimeError as error:
        raise ValueError(
            f"hnswlib reaches fewer than {top} of {len(vectors)} vectors, as where many are equal; use --index exact"
        ) from error
    return torch.from_numpy(places.astype("int64"))
