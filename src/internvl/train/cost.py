"""What a micro-batch costs, from its counts alone: operations, and an order by memory. No tensors.

Operations are two a number of a matrix and position forward, as many again for the gradient of the input where anything
before it learns, and again for that of the matrix where it learns; attention and head likewise; twice the forward ones
where blocks are recomputed. Memory itself is rehearsed (rehearse.py); here it is only compared.
"""

from __future__ import annotations

from collections.abc import Sequence

from internvl.config import ChatConfig
from internvl.data.loader import BatchSize
from internvl.train.run import RunConfig


def operations(run: RunConfig, config: ChatConfig, size: BatchSize, learned: int) -> float:
    """Of one forward and backward pass over a micro-batch in which `learned` positions have a label."""
    language, vision = config.language, config.vision
    behind_vision = run.vision.learn != "frozen"
    behind_language = behind_vision or run.connector.learn != "frozen" or run.tokens.learn
    patches = (config.tile_size // vision.patch_size) ** 2 + 1
    vision_matrix = 4 * vision.width**2 + 2 * vision.width * vision.mlp_width
    vision_runs = run.data.features == "none"
    first = vision.depth + run.vision.layers_from if run.vision.layers_from < 0 else run.vision.layers_from
    share = (vision.depth - first) / vision.depth if behind_vision else 0.0
    seen: float = 2 * size.tiles * patches * vision.depth * (vision_matrix + 2 * patches * vision.width)
    seen *= (_passes(run, behind_vision, run.vision.learn == "full") - 1) * share + 1
    seen += 2 * 3 * vision.patch_size**2 * vision.width * size.tiles * patches
    read = 2 * size.positions * language.depth * language.matrix_parameters
    read += 2 * language.depth * language.heads * language.head_width * size.squares  # half of the square: causal
    full = run.language.learn == "full"
    read *= _passes(run, behind_language or run.language.learn != "frozen", full)
    connected = 2 * config.connector_parameters * size.tiles * config.tokens_per_tile
    connected *= 3 if run.connector.learn == "full" else 2 if behind_vision else 1
    scored = 2 * learned * language.embedding_parameters * (3 if full else 2)
    return float(seen * vision_runs + read + connected + scored)


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
