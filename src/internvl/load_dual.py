"""A folder, an original `.pth` or a name to InternVL-C or -G, and back. Chat models are `load.py`'s."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl.config import DualConfig, LanguageConfig, VisionConfig
from internvl.convert import dual
from internvl.convert.files import Weights, open_weights, read_json, write_json, write_weights
from internvl.convert.keys import Entry, Rule, check_keys, expand, matches
from internvl.convert.pickled import open_pickled
from internvl.load import read_tokenizer
from internvl.locate import locate
from internvl.models.build import build_dual, tie
from internvl.models.contrastive import AttentionPooling, DualModel
from internvl.models.internvit import InternViT
from internvl.zoo import DUAL

FINE_TUNED = "InternVL-14B-Flickr30K-FT-364px"
EMBEDDING, HEAD = "qllama.embed_tokens.weight", "qllama.head.weight"
POSITIONS = "vision.embeddings.position_embedding"


@dataclass(frozen=True)
class LoadedDual:
    """A model in evaluation mode, and the tokenizer where the folder has one."""

    model: DualModel
    tokenizer: Any
    config: DualConfig


def load_dual(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    ignore: Sequence[str] = (),
    allow_pickle: bool = False,
) -> LoadedDual:
    """Open the folder or hub id of an InternVL-G checkpoint (official layout), or `tiny-dual` of random weights.

    Strict: a missing or unused key is a ValueError (an unused one of the two released fine-tuned checkpoints, whose
    files hold unlisted tensors, a warning); `ignore` names patterns of keys on disk to leave unread. `dtype`
    None keeps the stored number type. `allow_pickle` reads `pytorch_model*.bin` by torch's restricted unpickler where
    the folder has no safetensors.
    """
    if str(path) in DUAL and str(path).startswith("tiny-"):
        config = DUAL[str(path)]
        return LoadedDual(build_dual(config, dtype or torch.float32, device), None, config)
    folder = locate(path)
    config = dual.from_official(read_json(folder / "config.json"), folder / "config.json")
    pickled = allow_pickle and not any(folder.glob("*.safetensors"))
    weights = open_pickled(folder) if pickled else open_weights(folder)
    config = _stored_grid(config, weights, "vision_model.embeddings.position_embedding")
    model = _load(config, dual.OFFICIAL_RULES, weights, folder, device, dtype, ignore)
    return LoadedDual(model, read_tokenizer(folder, config.language), config)


def load_original(
    path: str | Path,
    config: DualConfig | str = "InternVL-C-13B-224px",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    ignore: Sequence[str] = (),
) -> DualModel:
    """InternVL-C from an original `.pth` (internvl_c_13b_224px.pth), which holds no configuration: give it or its name.

    Read by torch's restricted unpickler: no code of the file runs. Strict, as `load_dual`.
    """
    if isinstance(config, str):
        if config not in DUAL:
            raise ValueError(f"configuration {config!r}; it is one of {', '.join(DUAL)}, or a DualConfig")
        config = DUAL[config]
    weights = open_pickled(Path(path))
    config = _stored_grid(replace(config, generative=False), weights, "pos_embed")
    return _load(config, dual.ORIGINAL_RULES, weights, Path(path), device, dtype, ignore)


def load_original_vision(
    path: str | Path, config: VisionConfig, *, dtype: torch.dtype | None = torch.float32
) -> tuple[InternViT, dict[str, Tensor]]:
    """InternViT from an original `.pth` (intern_vit_6b_224px.pth), and its `clip_projector` by our names, if any.

    The released file carries the 14 tensors of InternVL-C's pooling, which `AttentionPooling.load_state_dict` takes.
    """
    weights = open_pickled(Path(path))
    with torch.device("meta"):
        vit = InternViT(config)
        pool = AttentionPooling(config.width, 1, 1)
    ours = {f"vision.{key}": x.shape for key, x in vit.state_dict().items()}
    pooled = {key: size for key, size in weights.shapes.items() if key.startswith("clip_projector.")}
    pool_entries = expand(dual.ORIGINAL_RULES, [f"image_pool.{key}" for key in pool.state_dict()]) if pooled else []
    entries = expand(dual.ORIGINAL_VISION_RULES, ours)
    unknown = pooled.keys() - {key for entry in pool_entries for key in entry.disk}
    found = {key: size for key, size in weights.shapes.items() if key not in pooled or key in unknown}
    check_keys(entries, ours, found, path)
    state = {key.removeprefix("vision."): x for key, x in _tensors(entries, weights, dtype, "cpu").items()}
    vit.load_state_dict(state, assign=True)
    pool_state = _tensors(pool_entries, weights, dtype, "cpu")
    return vit.eval(), {key.removeprefix("image_pool."): x for key, x in pool_state.items()}


def save_dual(model: DualModel, tokenizer: Any, out: str | Path) -> None:
    """Write the official layout: safetensors, config.json and the tokenizer. Each file appears only when whole."""
    folder, state = Path(out), model.state_dict()
    entries = expand(dual.OFFICIAL_RULES, state)
    readers = {key: state[ours] for entry in entries for ours, key in zip(entry.ours, entry.disk, strict=True)}
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, {key: (tuple(x.shape), x.dtype) for key, x in readers.items()}, readers.__getitem__)
    dtype = str(state[EMBEDDING].dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**dual.to_official(model.config), "torch_dtype": dtype})
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def save_original(model: DualModel, path: str | Path) -> None:
    """Write InternVL-C under the original names, as `{"module": ...}`; of InternVL-G only the C part has names."""
    state = model.state_dict()
    with torch.device("meta"):
        wanted = DualModel(replace(model.config, generative=False)).state_dict()
    entries = expand(dual.ORIGINAL_RULES, wanted)
    content = {key: state[ours].detach().cpu() for e in entries for ours, key in zip(e.ours, e.disk, strict=True)}
    scratch = Path(path).with_name(f".{Path(path).name}.part")
    torch.save({"module": content}, scratch)
    os.replace(scratch, path)


def carry_over(source: DualModel, target: DualModel) -> list[str]:
    """Give InternVL-G every weight of a trained InternVL-C; the names that C does not have, and which stay, come back.

    Stage 2 begins so (paper 1.0, section 3.3). The output head is not in C: take it from the LLaMA that C began as.
    """
    mine, theirs = target.state_dict(), source.state_dict()
    wrong = [key for key, x in theirs.items() if key not in mine or mine[key].shape != x.shape]
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights have no place of their shape: {', '.join(wrong[:5])}; same sizes needed"
        )
    target.load_state_dict(theirs, strict=False)
    return sorted(mine.keys() - theirs.keys())


def extend_llama(folder: str | Path, vision: VisionConfig, seed: int = 0, **sizes: Any) -> LoadedDual:
    """InternVL-G around the LLaMA of a transformers folder; all that is not in it is random from `seed`.

    Stage 1 begins so (paper 1.0, section 3.3). `sizes`: fields of DualConfig, such as num_queries.
    """
    folder = Path(folder)
    config = DualConfig(vision, LanguageConfig("llama", read_json(folder / "config.json")), **sizes)
    weights, model = open_weights(folder), build_dual(config, seed=seed)
    prefix, state = "qllama.", model.state_dict()
    entries = [e for e in expand(dual.OFFICIAL_RULES, state) if e.disk[0].startswith(prefix)]
    theirs = [replace(e, disk=(e.disk[0].removeprefix(prefix),)) for e in entries if ".cross." not in e.ours[0]]
    found = {k: size for k, size in weights.shapes.items() if not matches(f"{prefix}{k}", dual.DERIVED_KEYS)}
    optional = ["lm_head.weight"] if config.language.tied else []
    check_keys(theirs, {key: x.shape for key, x in state.items()}, found, folder, optional=optional)
    present = [e for e in theirs if e.disk[0] in found]
    model.load_state_dict(_tensors(present, weights, torch.float32, "cpu"), strict=False)
    return LoadedDual(model.eval(), read_tokenizer(folder, config.language), config)


def _stored_grid(config: DualConfig, weights: Weights, key: str) -> DualConfig:
    """Fine-tuned checkpoints store positions of `force_image_size`, whatever `vision_config.image_size` says."""
    forced = replace(config.vision, image_size=config.side)
    stored = weights.shapes.get(key, ())
    if len(stored) == 3 and stored[1] == forced.num_positions != config.vision.num_positions:
        return replace(config, vision=forced)
    return config


def _load(
    config: DualConfig,
    rules: Sequence[Rule],
    weights: Weights,
    where: Path,
    device: torch.device | str,
    dtype: torch.dtype | None,
    ignore: Sequence[str],
) -> DualModel:
    dtype = dtype or weights.widest
    model = build_dual(config, dtype, "meta")
    ours = {key: tensor.shape for key, tensor in model.state_dict().items()}
    entries = expand(rules, ours)
    head = [key for entry in entries if HEAD in entry.ours for key in entry.disk]
    optional = head if config.language.tied else []
    found = {k: size for k, size in weights.shapes.items() if not matches(k, (*dual.DERIVED_KEYS, *ignore))}
    if _is_fine_tuned(config):
        found = _without_extras(found, {key for entry in entries for key in entry.disk}, where)
    check_keys(entries, ours, found, where, optional=optional)
    state = _tensors([e for e in entries if e.disk[0] in found], weights, dtype, device)
    if config.generative and config.language.tied:
        if HEAD in state and not torch.equal(state[HEAD], state[EMBEDDING]):
            raise ValueError(
                f"{where}: tie_word_embeddings is true but {head[0]} differs from the embedding; set false"
            )
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, assign=True)
    tie(model)
    return model.eval()


def _is_fine_tuned(config: DualConfig) -> bool:
    """Whether these are the sizes of the two checkpoints fine-tuned for retrieval, whose files are 14 MB larger than
    their list of tensors: some more are in them, which nobody has named (published sizes of the two folders)."""
    released = DUAL[FINE_TUNED]
    return (config.image_size, config.num_parameters) == (released.image_size, released.num_parameters)


def _without_extras(found: Mapping[str, tuple[int, ...]], known: Set[str], where: Path) -> dict[str, tuple[int, ...]]:
    extras = sorted(found.keys() - known)
    if extras:
        warnings.warn(
            f"{where}: {len(extras)} tensors that InternVL-G does not use are left unread: {', '.join(extras[:8])}",
            stacklevel=4,
        )
    return {key: size for key, size in found.items() if key in known}


def _tensors(
    entries: Sequence[Entry], weights: Weights, dtype: torch.dtype | None, device: torch.device | str
) -> dict[str, Tensor]:
    """By our names; every rule of these layouts renames one key."""
    return {entry.ours[0]: weights.get(entry.disk[0], dtype, device) for entry in entries}
