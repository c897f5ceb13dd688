"""Weights on disk: safetensors, whole or in shards, read one tensor at a time; a crash while writing leaves no half.

Knows nothing of models: keys are whatever the files say. Pickle files are refused.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 1000**3
SCRATCH_BYTES = 4 * 1000**2
NUMBER_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Weights:
    """What a folder holds: file, shape and number type of every key; tensors are read when asked for."""

    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    """As safetensors spells them: F32, BF16, ..."""

    @property
    def widest(self) -> torch.dtype:
        """The number type that loses nothing of any tensor."""
        found = set(self.types.values())
        if found == {"BF16"} or found == {"F16"}:
            return NUMBER_TYPES[found.pop()]
        return torch.float32

    def get(
        self,
        key: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        mapped: bool = False,
    ) -> Tensor:
        """One tensor in memory of its own, read into it: mapped pages of all tensors would add up beside the copies.

        With `mapped` a tensor that is kept as stored stays in the file, whose pages come when touched; changing it
        changes no file.
        """
        path, kind = self.files[key], NUMBER_TYPES[self.types[key]]
        size = torch.Size(self.shapes[key]).numel() * kind.itemsize
        kept = dtype in (None, kind) and torch.device(device).type == "cpu"
        first = self._places(path)[key][0]
        if mapped and kept and size and first % kind.itemsize == 0:
            return torch.tensor([], dtype=kind).set_(self._map(path)[first : first + size]).view(self.shapes[key])
        raw = torch.empty(size, dtype=torch.uint8) if kept else self._scratch(size)
        room = memoryview(raw.numpy().data) if size else memoryview(b"")
        with path.open("rb", buffering=0) as file:
            file.seek(first)
            while room:  # a system call reads 2 GB at most
                read = file.readinto(room)
                if not read:
                    raise OSError(f"{path}: cannot read {key!r} (the file ends before it); download the file again")
                room = room[read:]
        tensor = raw.view(kind).view(self.shapes[key])
        return tensor if kept else tensor.to(device=device, dtype=dtype, copy=True)

    def _map(self, path: Path) -> torch.UntypedStorage:
        """A whole file as private memory, once."""
        if path not in self._maps:
            storage: Any = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
            self._maps[path] = storage
        return self._maps[path]

    @cached_property
    def _maps(self) -> dict[Path, torch.UntypedStorage]:
        return {}

    def _scratch(self, size: int) -> UInt8[Tensor, " size"]:
        """The same memory for every tensor that is converted: freed pieces between kept ones would stay with us."""
        held = len(self._buffer[0]) if self._buffer else 0
        if held < size or held > max(SCRATCH_BYTES, 8 * size):  # the embedding's room is not kept for small matrices
            self._buffer.clear()
            self._buffer.append(torch.empty(max(size, SCRATCH_BYTES), dtype=torch.uint8))
        return self._buffer[0][:size]

    @cached_property
    def _buffer(self) -> list[Tensor]:
        return []

    def _places(self, path: Path) -> Mapping[str, tuple[int, int]]:
        """First and last byte of each tensor of a file whose header safetensors has checked."""
        if path not in self._headers_read:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            begin = 8 + length
            self._headers_read[path] = {
                key: (begin + entry["data_offsets"][0], begin + entry["data_offsets"][1])
                for key, entry in header.items()
                if key != "__metadata__"
            }
        return self._headers_read[path]

    @cached_property
    def _headers_read(self) -> dict[Path, dict[str, tuple[int, int]]]:
        return {}


def open_weights(folder: Path) -> Weights:
    """Headers of all weight files of a folder."""
    index, single = folder / INDEX, folder / SINGLE
    if index.exists():
        return _open_shards(folder, index)
    if single.exists():
        return open_file(single)
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            f"{folder}: holds {', '.join(pickles[:3])} but no safetensors. Such files can run code when opened and "
            f"are refused; save the model as safetensors where you trust it, or get its safetensors files"
        )
    raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX}; is this the folder of a checkpoint?")


def open_file(path: Path) -> Weights:
    """Header of one safetensors file; a pickle file beside it is not a substitute."""
    if not path.exists():
        pickles = [path.with_suffix(suffix).name for suffix in PICKLE_SUFFIXES if path.with_suffix(suffix).exists()]
        if pickles:
            raise ValueError(f"{path.parent / pickles[0]}: can run code when opened and is refused; save {path.name}")
    shapes, types = _headers(path)
    return Weights(dict.fromkeys(shapes, path), shapes, types)


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write every key of `shapes`, asking `read` for one tensor at a time; several shards get an index."""
    shards = _split(shapes, max_shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(n, len(shards)) for n in range(1, len(shards) + 1)]
    for name, keys in zip(names, shards, strict=True):
        save_tensors(folder / name, {key: read(key) for key in keys})
    stale = {path.name for path in folder.glob("model*.safetensors")} - set(names)
    (folder / INDEX).unlink(missing_ok=True)
    if len(shards) > 1:
        places = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(_bytes(*shapes[key]) for key in places)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
    for name in stale:
        (folder / name).unlink()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, complete or not there at all. Tensors that share memory are written twice."""
    seen: set[int] = set()
    whole: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        partial = tensor.untyped_storage().nbytes() != tensor.nbytes
        whole[key] = tensor.clone() if partial or address in seen else tensor
        seen.add(address)
    scratch = path.with_name(f".{path.name}.part")
    save_file(whole, scratch, metadata={"format": "pt"})
    os.replace(scratch, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, with the file named in every error."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found; a checkpoint folder needs it") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, must be an object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def _open_shards(folder: Path, index: Path) -> Weights:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index}: no weight_map from keys to file names; download the file again")
    shapes: dict[str, tuple[int, ...]] = {}
    types: dict[str, str] = {}
    files: dict[str, Path] = {}
    for name in sorted(set(places.values())):
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: shard {name!r} must be a .safetensors file in the same folder")
        found, found_types = _headers(folder / name)
        twice = sorted(found.keys() & shapes.keys())
        if twice:
            raise ValueError(f"{index}: {some(twice)} in both {files[twice[0]].name} and {name}; which one is meant?")
        shapes, types = shapes | found, types | found_types
        files |= dict.fromkeys(found, folder / name)
    wrong = sorted(key for key, name in places.items() if key not in files or files[key].name != name)
    if wrong:
        raise ValueError(f"{index}: {some(wrong)} not in the shard that it names; download the shards again")
    unnamed = sorted(files.keys() - places.keys())
    if unnamed:
        raise ValueError(
            f"{index}: does not name {some(unnamed)}, which {files[unnamed[0]].name} holds; "
            f"download the index and the shards again"
        )
    return Weights(files, shapes, types)


def _headers(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in list(file.keys())}
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            types = {key: str(part.get_dtype()) for key, part in slices.items()}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: shard not found; download it again") from None
    except SafetensorError as error:
        raise OSError(f"{path}: not a whole safetensors file ({error}); download it again") from error
    strange = sorted(key for key, kind in types.items() if kind not in NUMBER_TYPES)
    if strange:
        raise ValueError(
            f"{path}: {some(strange)} stored as {types[strange[0]]}; readable are {', '.join(NUMBER_TYPES)}: "
            f"quantised weights must be turned back first"
        )
    return shapes, types


def _split(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for key, (shape, dtype) in shapes.items():
        size += _bytes(shape, dtype)
        if shards[-1] and size > limit:
            shards.append([])
            size = _bytes(shape, dtype)
        shards[-1].append(key)
    return shards


def _bytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    return torch.Size(tuple(shape)).numel() * dtype.itemsize


def _shard_name(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
