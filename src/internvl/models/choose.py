"""What answers: a fused decoder and a fused encoder where they compute the same and their copy of the weights fits.

The decoders themselves are decoder.py and fused.py, the encoders internvit.py and fused_vision.py.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from internvl.models.decoder import Decoder, PlainDecoder
from internvl.models.fused import Form, FusedDecoder
from internvl.models.fused_vision import FusedInternViT
from internvl.models.int8 import is_rounded
from internvl.models.internvit import InternViT
from internvl.models.language import LanguageModel
from internvl.models.layers import Linear
from internvl.models.products import blocked_is_available

SHARE_OF_MEMORY = 0.5
"""Of what is free, for a second copy of a part in oneDNN's layout."""


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


def choose_vision(vision: InternViT) -> InternViT:
    """The fastest encoder of the same outputs: a fused copy on a CPU where it fits, else the encoder itself."""
    linears = [part for part in vision.modules() if isinstance(part, nn.Linear)]
    plain = all(type(part) is Linear and not is_rounded(part.weight) for part in linears)
    here = {parameter.device.type for parameter in vision.parameters()} == {"cpu"}
    if not plain or not here or not _copy_fits(vision):
        return vision
    return FusedInternViT(vision)


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
    return "blocked" if _copy_fits(language) else "plain"


def _copy_fits(part: nn.Module) -> bool:
    parameters = list(part.parameters())
    fits = sum(parameter.nbytes for parameter in parameters) <= SHARE_OF_MEMORY * free_memory()
    return fits and all(blocked_is_available(dtype) for dtype in {parameter.dtype for parameter in parameters})
