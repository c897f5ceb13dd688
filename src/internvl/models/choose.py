"""Which decoder serves a language model: the fused one where it computes the same and its copy of the weights fits.

The decoders themselves are decoder.py and fused.py.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from internvl.models.decoder import Decoder, PlainDecoder
from internvl.models.fused import Form, FusedDecoder
from internvl.models.int8 import is_rounded
from internvl.models.language import LanguageModel
from internvl.models.products import blocked_is_available

SHARE_OF_MEMORY = 0.5
"""Of what is free, for a second copy of the language model in oneDNN's layout."""


def choose_decoder(language: LanguageModel, *, int4: bool = False, exact: bool = True) -> Decoder:
    """The fastest decoder that fits the model, its device and the memory that is free."""
    reason = why_not_here(language)
    copy = _copy_form(language)
    if int4:
        if reason is not None:
            raise ValueError(f"4-bit weights: {reason}; round by torchao, or use dtype bfloat16")
        return FusedDecoder(language, "int4", reading=copy, exact=exact)
    if reason is not None or copy == "plain":
        return PlainDecoder(language)
    return FusedDecoder(language, copy, exact=exact)


def free_memory() -> float:
    """Bytes that the system could give out now; without limit where it does not tell."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))


def why_not_here(language: LanguageModel) -> str | None:
    """Why neither the fused path nor its 4-bit blocks serve this model on its device; None where they do."""
    device = language.model.get_input_embeddings().weight.device.type
    return f"the device is {device}, not cpu" if device != "cpu" else why_not_fused(language)


def why_not_fused(language: LanguageModel) -> str | None:
    """What this path does not compute, in words; None where it fits."""
    config = language.model.config
    if config.model_type not in ("llama", "qwen2"):
        return f"a language model of type {config.model_type} has no fused path"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act} has no fused path"
    if getattr(config, "use_sliding_window", False):
        return "sliding windows have no fused path"
    some = [layer.self_attn.q_proj for layer in language.model.model.layers]
    if any(type(one) is not nn.Linear or is_rounded(one.weight) for one in some):
        return "adapters are not merged, or the weights are rounded"
    return None


def _copy_form(language: LanguageModel) -> Form:
    """ "blocked" where a second copy of the weights can be made and fits, else "plain"."""
    copy = sum(parameter.nbytes for parameter in language.parameters())
    fits = copy <= SHARE_OF_MEMORY * free_memory()
    return "blocked" if fits and blocked_is_available(language.model.lm_head.weight.dtype) else "plain"
