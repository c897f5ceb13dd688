"""Weights in `.pth` and `.bin` files, read by torch's restricted unpickler: it builds tensors and nothing else.

Asked for by name only: `files.py` refuses such files in a folder, since safetensors cannot carry code at all.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from internvl.convert.files import NUMBER_TYPES, Weights, read_json, some

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"
TYPE_NAMES = {dtype: name for name, dtype in NUMBER_TYPES.items()}


@dataclass(frozen=True)
class PickledWeights(Weights):
    """Tensors mapped from the files; their pages are read when asked for."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def get(
        self,
        key: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        mapped: bool = False,
    ) -> Tensor:
        return self.tensors[key].to(device=device, dtype=dtype, copy=True)


def open_pickled(path: Path) -> PickledWeights:
    """A `.pth` or `.bin` file, or a folder of `pytorch_model*.bin` with or without index."""
    if path.is_dir() and (path / INDEX).exists():
        places = read_json(path / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(
            isinstance(name, str) and name == Path(name).name for name in places.values()
        ):
            raise ValueError(f"{path / INDEX}: no weight_map from keys to names of files beside it; download it again")
        paths = [path / name for name in sorted(set(places.values()))]
    else:
        paths = [path / SINGLE if path.is_dir() else path]
    tensors: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    for file in paths:
        found = _tensors(file)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise ValueError(f"{file}: {some(twice)} also in {files[twice[0]].name}; which one is meant?")
        tensors |= found
        files |= dict.fromkeys(found, file)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return PickledWeights(files, shapes, {key: TYPE_NAMES[x.dtype] for key, x in tensors.items()}, tensors)


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        # Files older than torch 1.6 are no zip archives and cannot be mapped: they are read whole.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path}: not plain tensors that torch reads with weights_only ({reason}); nothing of it was run. "
            f"Save the state dict alone where you trust the file, or download it again"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("module"), Mapping):
        content = content["module"]  # the outer key of the original files
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path}: holds {type(content).__name__}, must be a mapping from keys to tensors")
    odd = [str(key) for key, value in content.items() if not isinstance(value, Tensor) or value.dtype not in TYPE_NAMES]
    if odd:
        raise ValueError(f"{path}: {some(odd)} not tensors of {', '.join(NUMBER_TYPES)}; save the state dict alone")
    return {str(key): value for key, value in content.items()}
