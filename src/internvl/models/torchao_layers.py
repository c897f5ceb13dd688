"""Linear layers rounded by torchao: int8 and int4 where this project has no kernels of its own, or where asked for.

Which layers, and whether they may stay, is int8.py's. torchao is an extra, imported when the first layer is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

Form = Literal["int8", "int4"]
GROUP = 32
"""Columns that share a scale and a minimum in int4, as in four_bit.py; torchao's own default is 128."""


def torchao_rounding(form: Form) -> Callable[[nn.Linear], nn.Linear]:
    """What makes a rounded copy of a layer, on the device where its weights are.

    ValueError without torchao; from the copy, where int4 has no kernel on the device or for the width.
    """
    try:
        from torchao.quantization import quantize_
    except ImportError as error:
        raise ValueError(
            f"rounding to {form} by torchao needs: pip install 'internvl[quantise]' ({error}); or use dtype bfloat16"
        ) from error

    def rounding(layer: nn.Linear) -> nn.Linear:
        if form == "int4" and layer.in_features % GROUP:
            raise ValueError(
                f"a matrix of width {layer.in_features}: 4-bit weights need a multiple of {GROUP}; use dtype bfloat16"
            )
        copy = nn.Linear(layer.in_features, layer.out_features, device="meta")
        copy.weight, copy.bias = layer.weight, layer.bias
        quantize_(copy, _settings(form, layer.weight.device.type))
        return copy

    return rounding


def _settings(form: Form, device: str) -> Any:
    """torchao's settings; it would change inductor's for the whole process, and nothing is compiled here."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if form == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    # Fitting by HQQ takes ten times as long and gains little: 0.48 nats on `pocket` against 0.50.
    if device == "cuda":
        return Int4WeightOnlyConfig(
            group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    if device != "cpu":
        raise ValueError(f"4-bit weights by torchao on {device}: they run on cpu and cuda; use dtype bfloat16")
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig  # int4 on a CPU is there in 0.18

    return PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
