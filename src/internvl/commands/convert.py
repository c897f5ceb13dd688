"""`internvl convert`: write a model in the official or the native layout, and check that it still says the same."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from torch import Tensor

    from internvl.models.chat import ChatModel

BESIDE = ("generation_config.json", "preprocessor_config.json")
"""Files that mean the same in both layouts."""


@dataclass(frozen=True)
class Convert:
    """Write a model in the official or the native layout."""

    source: Annotated[str, tyro.conf.Positional]
    """A checkpoint folder of either layout, a hub id, or the name of a model such as pocket."""
    target: Annotated[Path, tyro.conf.Positional]
    """The folder to write; it must be empty or not there."""
    layout: Literal["official", "native"] = "official"
    """official: what vLLM, SGLang and lmdeploy read; native: what transformers reads."""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """Number type to write."""
    image_token_id: int | None = None
    """Id of <IMG_CONTEXT>, where the source has no tokenizer."""
    check: bool = True
    """Open what was written and compare logits with the source on a random text and picture."""
    json: bool = False
    """Print the result as JSON."""


def main(arguments: list[str]) -> int:
    asked = tyro.cli(Convert, args=arguments, prog="internvl convert")
    if asked.target.exists() and (not asked.target.is_dir() or any(asked.target.iterdir())):
        raise ValueError(f"{asked.target}: exists and is not an empty folder; give another target")
    import torch

    from internvl.load import load_checkpoint, save_checkpoint
    from internvl.locate import locate

    loaded = load_checkpoint(asked.source, dtype=None if asked.dtype == "stored" else getattr(torch, asked.dtype))
    model = loaded.model
    if asked.image_token_id is not None:
        model.image_token_id = asked.image_token_id
    before = _logits(model) if asked.check else None
    save_checkpoint(model, loaded.tokenizer, asked.target, asked.layout)
    source = Path(asked.source) if loaded.layout == "random" else locate(asked.source)
    for name in BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, asked.target / name)
    result = {"source": asked.source, "from": loaded.layout, "target": str(asked.target), "to": asked.layout}
    result["parameters"] = f"{sum(p.numel() for p in model.parameters()):,}"
    if before is not None:
        again = load_checkpoint(asked.target, dtype=next(model.parameters()).dtype).model
        again.image_token_id = model.image_token_id
        difference = float((_logits(again) - before).abs().max())
        if difference != 0.0:
            raise ValueError(
                f"{asked.target}: logits differ by up to {difference:.3g} from {asked.source}; do not use it"
            )
        result["logits"] = "equal"
    lines = json.dumps(result, indent=2) if asked.json else "\n".join(f"{k:<11} {v}" for k, v in result.items())
    sys.stdout.write(lines + "\n")
    return 0


def _logits(model: ChatModel) -> Tensor:
    """Logits of random text around one random tile."""
    import torch

    generator = torch.Generator().manual_seed(0)
    parameter, side = next(model.parameters()), model.config.tile_size
    ids = torch.randint(0, model.language.vocab_size, (1, 24), generator=generator)
    tile = torch.randn(1, 3, side, side, generator=generator).to(parameter)
    with torch.inference_mode():
        visual = model.encode_tiles(tile)
        words = model.language.embed(ids)
        embeds = torch.cat([words[:, :8], visual.flatten(0, 1)[None], words[:, 8:]], dim=1)
        return model.language.head(model.language(embeds)).float()
