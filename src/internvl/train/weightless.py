"""Tensors that have shapes and no memory, for rehearsals: modules made of them, and the numbers that code reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from internvl.models.internvit import Embeddings
from internvl.models.layers import resize_positions


class Numbers(TorchDispatchMode):
    """Whole numbers and truths are real in a rehearsal, since code reads them; those that follow from floats are 0.

    Entered inside the mode whose tensors have no memory. Pixels (uint8) and what is larger than LARGEST have none.
    """

    LARGEST = 2**26
    KINDS = (torch.bool, torch.int32, torch.int64)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if given and not any(isinstance(x, FakeTensor) or x.is_floating_point() for x in given):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        out = func(*(_by_number(x) if isinstance(x, list) else x for x in args), **kwargs)
        if not given and self._reads(out):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return tree_map(self._real, out)

    def _real(self, x: Any) -> Any:
        if not self._reads(x):
            return x
        with unset_fake_temporarily():
            return torch.zeros(x.shape, dtype=x.dtype)

    def _reads(self, x: Any) -> bool:
        return isinstance(x, FakeTensor) and x.dtype in self.KINDS and x.numel() <= self.LARGEST


def _by_number(indices: list[Any]) -> list[Any]:
    """Masks among the indices as the numbers that they stand for: the length of the result must be known."""
    found: list[Any] = []
    for index in indices:
        masks = isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        with unset_fake_temporarily():
            found += list(index.nonzero(as_tuple=True)) if masks else [index]
    return found


@contextmanager
def weightless(*modules: nn.Module | None) -> Iterator[FakeTensorMode]:
    """Inside, no tensor has memory, the parameters and buffers of these modules neither."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        _place(*modules)
        for module in (m for some in modules if some is not None for m in some.modules()):
            if isinstance(module, Embeddings):  # its memory of resized positions goes by address, which these have not
                module.positions = partial(resize_positions, module.position_embedding)  # type: ignore[method-assign]
        yield fake


def _place(*modules: nn.Module | None) -> None:
    """Parameters and buffers of the meta device, as tensors of a CPU without memory: autocast knows those."""
    known: dict[int, nn.Parameter] = {}
    for module in (m for some in modules if some is not None for m in some.modules()):
        for name, old in module._parameters.items():
            if old is not None:
                fresh = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                module._parameters[name] = known.setdefault(id(old), nn.Parameter(fresh, old.requires_grad))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
