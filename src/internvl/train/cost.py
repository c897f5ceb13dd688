"""What a micro-batch costs, from its counts alone: operations, and an order by memory. No tensors.

Operations are two a number of a matrix and position forward, as many again for the gradient of the input where anything
before it learns, and again for that of the matrix where it learns; attention and head likewise; twice the forward ones
where blocks are recomputed. Memory itself is rehearsed (rehearse.py); here it is only compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from internvl.config import ChatConfig, DualConfig, VisionConfig
from internvl.data.loader import BatchSize
from internvl.train.run import RunConfig


def operations(run: RunConfig, config: ChatConfig, size: BatchSize, learned: int) -> float:
    """Of one forward and backward pass over a micro-batch in which `learned` positions have a label."""
    language = config.language
    behind_vision = run.vision.learn != "frozen"
    behind_language = behind_vision or run.connector.learn != "frozen" or run.tokens.learn
    seen = run.data.features == "none" and tile_operations(run, config, size.tiles)
    read = 2 * size.positions * language.depth * language.matrix_parameters
    read += 2 * language.depth * language.heads * language.head_width * size.squares  # half of the square: causal
    full = run.language.learn == "full"
    read *= _passes(run, behind_language or run.language.learn != "frozen", full)
    of_queries = 0 if config.queries is None else config.mlp_parameters(config.queries.language.width)
    of_patches = config.connector_parameters - of_queries
    connected = 2 * size.tiles * (of_patches * config.patch_tokens + of_queries * config.num_queries)
    connected *= 3 if run.connector.learn == "full" else 2 if behind_vision else 1
    scored = 2 * learned * language.embedding_parameters * (3 if full else 2)
    return float(seen + read + connected + scored)


def tile_operations(run: RunConfig, config: ChatConfig, tiles: int) -> float:
    """Of the vision part over so many tiles, and back where it learns; of the queries that look too."""
    patches = (config.tile_size // config.vision.patch_size) ** 2 + 1
    asked = 0.0 if config.queries is None else tiles * _asked(config.queries, patches)
    return vision_operations(run, config.vision, tiles, patches, patches) + asked


def vision_operations(run: RunConfig, vision: VisionConfig, pictures: int, embedded: int, seen: int) -> float:
    """Of an encoder that embeds so many positions a picture and sees so many of them, and back where it learns."""
    behind = run.vision.learn != "frozen"
    first = vision.depth + run.vision.layers_from if run.vision.layers_from < 0 else run.vision.layers_from
    share = (vision.depth - first) / vision.depth if behind else 0.0
    found: float = forward_operations(vision, pictures, seen)
    found *= (_passes(run, behind, run.vision.learn == "full") - 1) * share + 1
    return found + 2 * 3 * vision.patch_size**2 * vision.width * pictures * embedded


def forward_operations(vision: VisionConfig, pictures: int, seen: int) -> float:
    """Of the blocks of an encoder, one way."""
    matrix = 4 * vision.width**2 + 2 * vision.width * vision.mlp_width
    return float(2 * pictures * seen * vision.depth * (matrix + 2 * seen * vision.width))


class PairSize(NamedTuple):
    """What a batch of pairs holds; texts as padded positions in all."""

    pairs: int
    embedded: int
    """Positions of a picture, the class token among them."""
    seen: int
    """Those that the encoder sees."""
    contrast: int
    match: int = 0
    caption: int = 0
    learned: int = 0
    """Caption tokens that are scored."""


def text_operations(run: RunConfig, config: DualConfig, positions: int, rows: int, among: int) -> float:
    """Of a step of stage text over a rank's `rows` texts, padded to so many positions, beside `among` of all ranks."""
    width, embed = config.language.width, config.embed_width
    recomputed = run.pairs.micro_batch is not None and rows > run.pairs.micro_batch
    learns, projects = run.language.learn != "frozen", run.connector.learn == "full"
    projected = 2 * rows * width * embed * (1 + learns + projects + recomputed)
    compared = 2 * rows * among * embed * 3  # the teacher's place, the text's, and back
    return read_operations(run, config, positions, learns, recomputed) + projected + compared


def read_operations(run: RunConfig, config: DualConfig, positions: int, behind: bool, recomputed: bool) -> float:
    """Of the LLaMA of a dual model over so many positions; `behind`: something learns behind it, or in it."""
    passes = _passes(run, behind, run.language.learn == "full") + (behind and recomputed)
    return float(2 * positions * config.language.depth * config.language.matrix_parameters * passes)


def pair_operations(run: RunConfig, config: DualConfig, size: PairSize, rows: int) -> float:
    """Of a step of the stages on pairs, of which a rank has `rows`; attention among text tokens is left out."""
    language, width = config.language, config.language.width
    recomputed = run.pairs.micro_batch is not None and rows > run.pairs.micro_batch
    learns = run.language.learn != "frozen"

    def read(positions: int, behind: bool) -> float:
        return read_operations(run, config, positions, behind, recomputed)

    looks = run.data.features == "none"
    found = looks * vision_operations(run, config.vision, size.pairs, size.embedded, size.seen)
    again = looks and recomputed and run.vision.learn != "frozen"
    found += again * forward_operations(config.vision, size.pairs, size.seen)
    retrieval = run.pairs.losses == "retrieval"
    if run.stage == "contrastive" or retrieval:
        pooled = 2 * size.pairs * config.vision.width * (2 * size.seen * config.vision.width)
        found += pooled * (3 + recomputed)
    found += read(size.contrast, learns)
    if run.stage == "contrastive":
        return found
    queries = config.num_queries * size.pairs
    times = 3 if run.pairs.negatives == "hard" else 2 if retrieval else 1
    match_rows = times * size.pairs
    found += read(queries, True) * (1 + (recomputed and not retrieval)) + read(size.caption, True)
    found += read(times * size.match + config.num_queries * match_rows, True)
    inner = language.heads * language.head_width
    asked = config.num_queries * (match_rows + size.pairs)
    shown = size.pairs + (match_rows if recomputed else size.pairs)
    cross = 2 * asked * 2 * inner * width + 4 * asked * size.seen * inner
    cross += 2 * shown * size.seen * 2 * inner * config.vision.width
    found += cross * sum(map(config.crosses, range(language.depth))) * (3 + recomputed)
    return found + 2 * size.learned * language.embedding_parameters * 2


def _asked(queries: DualConfig, positions: int) -> float:
    """Operations of QLLaMA's look at one tile of so many positions: forward alone, it is frozen."""
    language, width = queries.language, queries.language.heads * queries.language.head_width
    crosses = sum(map(queries.crosses, range(language.depth)))
    layers = language.depth * (language.matrix_parameters + 2 * queries.num_queries * width) * queries.num_queries
    asks = 2 * width * language.width + 2 * positions * width
    reads = 2 * width * queries.vision.width
    return float(2 * (layers + crosses * (queries.num_queries * asks + positions * reads)))


def heaviest(run: RunConfig, config: ChatConfig, sizes: Sequence[BatchSize]) -> int:
    """Number of the micro-batch that takes the most memory."""
    return max(range(len(sizes)), key=lambda number: weight(run, config, sizes[number]))


def weight(run: RunConfig, config: ChatConfig, size: BatchSize) -> float:
    """Numbers that a backward pass keeps, roughly: block inputs where blocks are recomputed, else all between."""
    language, vision = config.language, config.vision
    patches = (config.tile_size // vision.patch_size) ** 2 + 1
    of_vision = _kept(run, vision.width, vision.mlp_width, vision.depth) if run.vision.learn != "frozen" else 0
    of_vision = max(of_vision, 3 * vision.width + 2 * vision.mlp_width) if run.data.features == "none" else 0
    of_language = _kept(run, language.width, language.mlp_width, language.depth)
    return size.tiles * patches * of_vision + size.positions * of_language


def _kept(run: RunConfig, width: int, mlp_width: int, depth: int) -> int:
    return depth * width if run.grad_checkpoint else depth * (9 * width + 3 * mlp_width)


def _passes(run: RunConfig, behind: bool, learns: bool) -> int:
    """Forward passes' worth of work: 1, 1 for inputs' gradients, 1 for matrices', 1 for computing blocks again."""
    return 1 + behind + (behind and learns) + (behind and run.grad_checkpoint)
