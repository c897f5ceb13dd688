"""LoRA adapters by peft: where they go, saving and loading in peft's layout, merging into plain weights.

Module names on disk are the official ones, so an adapter also fits the official vision and language models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from internvl.models.chat import ChatModel
from internvl.models.contrastive import DualModel

VISION = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
LLAMA = tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))
PHI3 = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
"""The official targets (wrap_backbone_lora and wrap_llm_lora in modeling_internvl_chat.py)."""
QLLAMA = tuple(name.replace("self_attn.", "attention.") for name in LLAMA)
"""The LLaMA inside QLLaMA, not its cross-attention (wrap_qllama_lora in internvl_g's modeling_internvl.py)."""
Adaptable = ChatModel | DualModel

ROOT = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far merged outputs may be from adapted ones, as a share of their standard deviation."""


def add_adapters(
    model: Adaptable,
    rank: int,
    alpha: int | float | None = None,
    dropout: float = 0.0,
    parts: Sequence[str] = ("language", "vision"),
) -> int:
    """Put a low-rank pair beside every target of the parts and freeze the rest of them; returns how many."""
    if rank < 1:
        raise ValueError(f"adapter rank {rank} must be at least 1")
    from peft import LoraConfig

    added = 0
    for part in parts:
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            lora_dropout=dropout,
            target_modules=list(_targets(model, part)),
        )
        added += _inject(model, part, config)
    return added


def save(model: Adaptable, folder: str | Path, part: str) -> None:
    """Write one part's adapter: adapter_config.json and adapter_model.safetensors."""
    module, folder = module_of(model, part), Path(folder)
    config = _configs(module).get("default")
    if config is None:
        raise ValueError(f"the {part} model has no adapters; add them with add_adapters first")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        ROOT + _official(name.replace(".default.", "."), part): value.detach().cpu().contiguous()
        for name, value in module.state_dict().items()
        if ".lora_" in name
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    ours = config.target_modules
    config.target_modules = sorted(_official(name, part) for name in ours)
    config.inference_mode, before = True, config.inference_mode
    config.save_pretrained(str(folder))
    config.target_modules, config.inference_mode = ours, before


def load(model: Adaptable, folder: str | Path, part: str) -> int:
    """Put a saved adapter on one part; every key must find its module and every adapted module its keys."""
    config = _read_config(Path(folder), part)
    count = _inject(model, part, config)
    _copy(model, [Path(folder)], part)
    return count


def fill(model: Adaptable, folders: Sequence[Path], part: str) -> None:
    """Give the adapters of one part the values of saved ones, of the same rank and scale; of several, the mean."""
    mine = _configs(module_of(model, part))["default"]
    for folder in folders:
        saved = _read_config(folder, part)
        for name in ("r", "lora_alpha"):
            if getattr(saved, name) != getattr(mine, name):
                raise ValueError(
                    f"{folder / CONFIG}: {name} is {getattr(saved, name)}, the {part} model's adapters have "
                    f"{getattr(mine, name)}; set the {'rank' if name == 'r' else 'alpha'} to that of the file"
                )
    _copy(model, folders, part)


def mean(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Values by name, over safetensors files that hold the same names."""
    several: list[dict[str, Tensor]] = [load_file(path) for path in paths]
    for path, one in zip(paths, several, strict=True):
        if one.keys() != several[0].keys():
            raise ValueError(f"{path} and {paths[0]} hold different names; a mean is taken of the same parts")
    if len(several) == 1:
        return several[0]
    return {name: torch.stack([one[name].float() for one in several]).mean(0) for name in several[0]}


def _read_config(folder: Path, part: str) -> Any:
    """As peft wrote it, its targets by our names."""
    from peft import LoraConfig

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: not found; an adapter folder holds {CONFIG} and {WEIGHTS}")
    config = LoraConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig) or not isinstance(config.target_modules, (list, set)):
        raise ValueError(f"{folder / CONFIG}: must be a LORA adapter with a list of target modules")
    config.target_modules = {_ours(name, part) for name in config.target_modules}
    return config


@torch.no_grad()
def _copy(model: Adaptable, folders: Sequence[Path], part: str) -> None:
    values = mean([folder / WEIGHTS for folder in folders])
    stored = {_ours(key.removeprefix(ROOT), part): value for key, value in values.items()}
    own = {n.replace(".default.", "."): p for n, p in module_of(model, part).state_dict().items() if ".lora_" in n}
    wrong = sorted(own.keys() ^ stored.keys()) or [k for k in own if own[k].shape != stored[k].shape]
    if wrong:
        raise ValueError(
            f"{folders[0] / WEIGHTS}: {len(wrong)} keys do not fit the {part} model: {', '.join(wrong[:5])}"
        )
    for key, value in stored.items():
        own[key].copy_(value)


@torch.no_grad()
def attach(
    model: Adaptable,
    part: str,
    halves: Mapping[str, tuple[Tensor, Tensor]],
    alpha: float,
    *,
    root_scaled: bool = False,
) -> str:
    """Put known pairs beside modules of one part, on top of adapters that are there; returns the adapter's name.

    `halves`: module name inside the part -> (down (rank, columns), up (rows, rank)), all of one rank. All adapters
    of a part act together; `merge` folds all of them.
    """
    from peft import LoraConfig

    module = module_of(model, part)
    ranks = {down.shape[0] for down, _ in halves.values()}
    if len(ranks) != 1:
        raise ValueError(f"adapter ranks {sorted(ranks)} of the {part} model; one adapter has one rank")
    names = [*_configs(module), f"stacked{len(_configs(module))}" if _configs(module) else "default"]
    rank = ranks.pop()
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=root_scaled, target_modules=sorted(halves))
    _inject(model, part, config, names[-1])
    for name, (down, up) in halves.items():
        for side, value in (("lora_A", down), ("lora_B", up)):
            weight = module.get_parameter(f"{name}.{side}.{names[-1]}.weight")
            if weight.shape != value.shape:
                raise ValueError(f"{part} adapter {name}.{side} is {tuple(value.shape)}, must be {tuple(weight.shape)}")
            weight.copy_(value)
    for _, _, layer in _adapted(module):
        layer.set_adapter([name for name in names if name in layer.lora_A])
    return names[-1]


@torch.no_grad()
def merge(model: Adaptable) -> float:
    """Fold all adapters into plain weights. Returns the change of the outputs; ValueError where it is not rounding."""
    layers = list(_adapted(model))
    if not layers:
        return 0.0
    before = _probe(model)
    for parent, name, layer in layers:
        layer.merge(safe_merge=True)
        setattr(parent, name, layer.get_base_layer())
    for part in ("language", "vision"):
        vars(module_of(model, part)).pop("peft_config", None)
    change = max(float((old - new).abs().max() / old.std()) for old, new in zip(before, _probe(model), strict=True))
    limit = TOLERANCE[next(model.parameters()).dtype]
    if change > limit:
        raise ValueError(
            f"merging moved the outputs by {change:.2g} standard deviations, limit {limit}; merge in float32"
        )
    return change


def _inject(model: Adaptable, part: str, config: Any, adapter: str = "default") -> int:
    from peft import inject_adapter_in_model

    module = module_of(model, part)
    if adapter == "default" and any(_adapted(module)):
        raise ValueError(f"the {part} model has adapters already; merge them first")
    targets = config.target_modules
    wanted = {name for name, _ in module.named_modules() for t in targets if f".{name}".endswith(f".{t}")}
    unmatched = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in wanted)]
    if unmatched:
        raise ValueError(f"no module of the {part} model is called {', '.join(sorted(unmatched))}")
    inject_adapter_in_model(config, module, adapter_name=adapter)
    count = sum(adapter in layer.lora_A for _, _, layer in _adapted(module))
    if count != len(wanted):
        raise ValueError(f"{len(wanted)} modules of the {part} model are targets but {count} were adapted")
    return count


def _adapted(module: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Parent, name and layer of everything that peft wrapped."""
    from peft.tuners.lora import LoraLayer

    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, LoraLayer):
                yield parent, name, child


def _configs(module: nn.Module) -> dict[str, Any]:
    """peft's configs by adapter name, kept on the module that was injected."""
    found = vars(module).get("peft_config")
    return found if isinstance(found, dict) else {}


def _targets(model: Adaptable, part: str) -> tuple[str, ...]:
    module_of(model, part)
    if part == "vision":
        return VISION
    if isinstance(model, DualModel):
        return QLLAMA
    return PHI3 if model.config.language.family == "phi3" else LLAMA


def module_of(model: Adaptable, part: str) -> nn.Module:
    """What a part's adapters sit in."""
    if part == "vision":
        return model.vision
    if part == "language":
        inner: nn.Module = model.qllama if isinstance(model, DualModel) else model.language.model
        return inner
    raise ValueError(f"part {part!r} takes no adapters; it is language or vision")


def _official(name: str, part: str) -> str:
    if part != "vision":
        return name  # QLLaMA's adapters are merged, never saved apart
    return re.sub(r"^layers\.", "encoder.layers.", name).replace("attention.", "attn.")


def _ours(name: str, part: str) -> str:
    if part != "vision":
        return name
    return name.removeprefix("encoder.").replace("attn.", "attention.")


def _probe(model: Adaptable) -> list[Tensor]:
    """Logits or states of a fixed text and what a fixed tile gives, in evaluation mode."""
    training, parameter = model.training, next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.language.vocab_size, (1, 16), generator=generator).to(parameter.device)
    side = model.config.side if isinstance(model, DualModel) else model.config.tile_size
    tile = torch.randn(1, 3, side, side, generator=generator).to(parameter.device, parameter.dtype)
    model.eval()
    if isinstance(model, DualModel):
        out = [model.qllama.read(ids).float(), model.vision(tile).float()]
    else:
        logits = model.language.head(model.language(model.language.embed(ids)))
        out = [logits.float(), model.encode_tiles(tile).float()]
    model.train(training)
    return out
