"""A model spread over ranks by FSDP2: mesh, units, precision, offload. What is computed with it is the loop's.

A block is one unit: its weights are gathered just before it runs. All the rest (embeddings, connector, norms, head) is
one unit with `Whole`, through which everything that uses the model is called, so that any stage works unchanged.
Which units run must not depend on a batch: a rank that leaves one out would leave the others waiting. A single number
(InternVL-C's logit scale) cannot be cut: every rank keeps it, and their gradients are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from internvl.parallel import collectives

P = ParamSpec("P")
R = TypeVar("R")


class Whole(nn.Module):
    """Modules that are sharded together; its forward is the function it is given, with every root weight gathered."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)


def make_mesh(device: torch.device, replicas: int = 1) -> DeviceMesh:
    """Every rank on one line, or `replicas` lines: a copy of the model lies on each line, in equal shards."""
    num_ranks = collectives.num_ranks()
    if replicas < 1 or num_ranks % replicas:
        raise ValueError(
            f"ranks.replicas is {replicas} over {num_ranks} ranks; every copy needs as many ranks: use a divisor"
        )
    if replicas == 1:
        return init_device_mesh(device.type, (num_ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, num_ranks // replicas), mesh_dim_names=("replica", "shard"))


def shard(
    whole: Whole,
    device: torch.device,
    *,
    replicas: int = 1,
    low: bool = False,
    reshard: bool = True,
    offload: bool = False,
) -> None:
    """Replace every parameter but single numbers by this rank's share of it, unit by unit.

    `low`: gather in bfloat16 and sum gradients in float32. `reshard`: give the weights of a block back after its
    forward pass and gather them again for its backward pass. `offload`: shares, gradients and what the optimiser
    keeps lie on the host.
    """
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low else None,
        reduce_dtype=torch.float32 if low else None,
        cast_forward_inputs=False,  # autocast decides, as on one process
    )
    settings: dict[str, Any] = {
        "mesh": make_mesh(device, replicas),
        "mp_policy": precision,
        "offload_policy": CPUOffloadPolicy() if offload and device.type == "cuda" else OffloadPolicy(),
        "ignored_params": {p for p in whole.parameters() if not p.ndim},
    }
    for parameter in settings["ignored_params"]:
        parameter.data = parameter.data.to(device)
    for unit in units(whole):
        fully_shard(unit, reshard_after_forward=reshard, **settings)
    fully_shard(whole, **settings)


def units(module: nn.Module) -> list[nn.Module]:
    """The blocks of every stack of blocks, outermost stacks only."""
    found: list[nn.Module] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) else units(child)
    return found


def give_back(whole: Whole) -> None:
    """Free what was gathered for a forward pass that no backward pass follows."""
    if isinstance(whole, FSDPModule):
        whole.reshard()


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Of what every rank keeps whole, in place; sharding does so for all the rest."""
    for parameter in parameters:
        if not isinstance(parameter, DTensor) and parameter.grad is not None:
            parameter.grad.copy_(collectives.total(parameter.grad) / collectives.num_ranks())


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float = math.inf) -> Tensor:
    """Scale gradients to a norm of at most `limit` over all shards; the norm before, the same on every rank."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local(x: Tensor) -> Tensor:
    """This rank's share of a sharded tensor; a plain one as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def share_of(x: Tensor) -> tuple[slice, ...]:
    """Which part of the full tensor `local(x)` is."""
    if not isinstance(x, DTensor):
        return tuple(slice(0, size) for size in x.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
