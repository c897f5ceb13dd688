"""Named tensors to a checkpoint folder and back, as safetensors: whole from one process, each its share from ranks.

One process writes `learned.safetensors` and so on; ranks write `shards/`, through torch.distributed.checkpoint in its
safetensors form (its own form is pickle). Any number of ranks reads either.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from internvl.parallel import collectives
from internvl.parallel.shard import local, share_of

SHARDS = "shards"
Groups = Mapping[str, Mapping[str, Tensor]]
"""File name without its ending -> tensor name -> tensor."""


class Writer:
    """Writes groups of tensors, at once or behind the steps that follow."""

    def __init__(self) -> None:
        several = collectives.num_ranks() > 1
        # its own group: what is said beside training must not mix with what training says
        self._group: Any = dist.new_group(backend="gloo") if several else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")

    def write(self, folder: Path, groups: Groups, behind: bool) -> Future[Any]:
        """Begin to write. With `behind` this returns once the tensors are copied; else the result is there."""
        if collectives.num_ranks() > 1:
            return self._write_shards(folder, groups, behind)
        kept = {name: _on_host(tensors, copy=behind) for name, tensors in groups.items()}
        future = self._thread.submit(_write_whole, folder, kept)
        if not behind:
            future.result()
        return future

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _write_shards(self, folder: Path, groups: Groups, behind: bool) -> Future[Any]:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save, save

        flat = {f"{group}/{name}": _at_least_1d(x) for group, tensors in groups.items() for name, x in tensors.items()}
        options: dict[str, Any] = {
            "storage_writer": HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True),
            "process_group": self._group,
        }
        if behind:
            future: Future[Any] = async_save(flat, **options)  # type: ignore[assignment]
            return future
        save(flat, **options)
        done: Future[Any] = Future()
        done.set_result(None)
        return done


def names(folder: Path, group: str) -> set[str]:
    """Of the tensors of a group; empty where the checkpoint has no such group."""
    if not (folder / SHARDS).is_dir():
        return set(_keys(folder / f"{group}.safetensors"))
    found = {name for file in (folder / SHARDS).glob("*.safetensors") for name in _keys(file)}
    return {name.removeprefix(f"{group}/") for name in found if name.startswith(f"{group}/")}


def read(folder: Path, group: str, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors of a group in place, plain or sharded, each rank its share; ranks do not wait for each other."""
    if (folder / SHARDS).is_dir():
        _read_shards(folder / SHARDS, group, targets)
        return
    with torch.no_grad(), safe_open(folder / f"{group}.safetensors", framework="pt") as file:
        for name, target in targets.items():
            share = file.get_slice(name)[share_of(target)] if target.ndim else file.get_tensor(name)
            local(target).copy_(share)


def _read_shards(folder: Path, group: str, targets: Mapping[str, Tensor]) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    flat = {f"{group}/{name}": _at_least_1d(x) for name, x in targets.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that each rank reads for itself is meant
        load(flat, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def _at_least_1d(x: Tensor) -> Tensor:
    """The safetensors form of torch.distributed.checkpoint knows no shape without axes; a view, so filled in place."""
    return x.detach() if x.ndim else x.detach().view(1)


def _keys(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _on_host(tensors: Mapping[str, Tensor], copy: bool) -> dict[str, Tensor]:
    kept = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    if copy:
        kept = {name: x.clone() if x.data_ptr() == tensors[name].data_ptr() else x for name, x in kept.items()}
    return kept


def _write_whole(folder: Path, groups: Groups) -> None:
    for name, tensors in groups.items():
        save_file(dict(tensors), folder / f"{name}.safetensors")
