"""What a composed model has that no part brings: rows of new tokens, a connector. As the official scripts draw them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from internvl.config import ChatConfig
from internvl.models.connector import connector_of


def resize_rows(
    weight: Float[Tensor, "rows width"], size: int, num_new: int, std: float, is_output: bool, seed: int = 0
) -> Float[Tensor, "size width"]:
    """An embedding or output head for `size` tokens, of which the last `num_new` were added to the tokenizer.

    As the official fine-tuning script: rows beyond the tokenizer go (Qwen's padding), further ones are drawn with the
    language model's deviation; added *output* rows become the mean of those before them, in float32. Added input
    rows keep what they are: drawn, or the padding row that was there.
    """
    out = weight[:size]
    if size > len(weight):
        generator = torch.Generator().manual_seed(seed)
        fresh = torch.empty(size - len(weight), weight.shape[1]).normal_(0.0, std, generator=generator)
        out = torch.cat([out, fresh.to(weight.dtype)])
    if is_output and num_new:
        out = out.clone()
        out[-num_new:] = out[:-num_new].float().mean(0).to(out.dtype)
    return out


def fresh_connector(config: ChatConfig, seed: int = 0) -> dict[str, Tensor]:
    """Weights as `torch.nn` draws them (the official mlp1 is never initialised otherwise), from a seed, in float32."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for name, weight in empty_connector(config).items():
        if name.startswith("connector.norm."):
            out[name] = torch.ones(weight.shape) if name.endswith("weight") else torch.zeros(weight.shape)
        else:
            columns = config.connector_width if ".fc1." in name else config.language.width
            if ".query_fc1." in name and config.queries is not None:
                columns = config.queries.language.width
            out[name] = torch.empty(weight.shape).uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
    return out


def empty_connector(config: ChatConfig) -> dict[str, Tensor]:
    """Its keys in a chat model, with shapes and without memory."""
    with torch.device("meta"):
        module = connector_of(config)
    return {f"connector.{key}": value for key, value in module.state_dict().items()}
