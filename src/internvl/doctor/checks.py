"""Whether the files of a checkpoint agree: each check yields what it finds. No weights are read.

Checks of prompts and vocabulary are `words.py`'s; those of pictures, weights and files are here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from internvl.convert.files import PICKLE_SUFFIXES
from internvl.convert.keys import matches
from internvl.convert.official import CHAT_DEFAULTS, DERIVED_KEYS
from internvl.data.images import STATISTICS
from internvl.doctor.folder import LORA_FIELDS, Finding, Folder
from internvl.doctor.words import chat_template, special_tokens, stops, template, vocabulary
from internvl.plan import Plan
from internvl.zoo import RELEASED


def diagnose(folder: Folder) -> list[Finding]:
    """Every finding, conflicts first."""
    found = [finding for check in CHECKS for finding in check(folder)]
    return sorted(found, key=lambda finding: finding.level != "conflict")


def tiles(folder: Folder) -> Iterator[Finding]:
    config = folder.config
    if config is None:
        return
    side = config.vision.image_size
    if config.tile_size != side:
        says, against = f"config.json: force_image_size {config.tile_size}", f"vision_config: image_size {side}"
        yield Finding("note", "tiles", says, against, f"tiles of {config.tile_size} px; positions are interpolated")
    stored = folder.positions
    if stored is not None and len(stored) == 3 and stored[1] != config.vision.num_positions:
        says = f"vision_config: image_size {side}, so {config.vision.num_positions} positions"
        yield Finding("conflict", "tiles", says, f"{stored[1]} are stored", "nothing: opening it is refused")
    if config.min_tiles > config.max_tiles:
        says = f"config.json: min_dynamic_patch {config.min_tiles}"
        yield Finding("conflict", "tiles", says, f"max_dynamic_patch {config.max_tiles}", "the maximum")
    if folder.layout == "official":
        absent = [k for k in ("max_dynamic_patch", "dynamic_image_size", "use_thumbnail") if k not in folder.settings]
        for field in absent:
            says = f"config.json has no {field}"
            yield Finding("note", "tiles", says, "", f"{CHAT_DEFAULTS[field]}, the default of the official class")
    largest, room = Plan(config), config.language.settings.get("max_position_embeddings")
    positions = largest.picture_tokens(largest.max_tiles)
    if room and positions >= room:
        says = f"a picture of {largest.max_tiles} tiles takes {positions} positions"
        used = "prompts to that limit; lower max_tiles"
        yield Finding("conflict", "tiles", says, f"max_position_embeddings {room}", used)
    yield from _pictures(folder)


def _pictures(folder: Folder) -> Iterator[Finding]:
    """preprocessor_config.json, which other tools read and nothing here does."""
    config, said = folder.config, folder.pictures
    assert config is not None
    used = "config.json"
    size = said.get("size", said.get("crop_size"))
    side = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
    if isinstance(side, int) and side != config.tile_size:
        says = f"preprocessor_config.json: {side} px"
        yield Finding("conflict", "pictures", says, f"config.json: tiles of {config.tile_size} px", used)
    for field, values in zip(("image_mean", "image_std"), STATISTICS[config.normalize], strict=True):
        theirs = said.get(field)
        if isinstance(theirs, list) and not _close(theirs, values):
            against = f"config.json: {config.normalize}, {list(values)}"
            yield Finding("conflict", "pictures", f"preprocessor_config.json: {field} {theirs}", against, used)
    most = said.get("max_patches", said.get("max_dynamic_patch"))
    if isinstance(most, int) and most != config.max_tiles:
        says, against = f"preprocessor_config.json: {most} tiles", f"config.json: {config.max_tiles}"
        yield Finding("conflict", "pictures", says, against, used)


def token_order(folder: Folder) -> Iterator[Finding]:
    """An absent ps_version is v1 in the official class; a checkpoint that learned v2 answers wrongly then."""
    config = folder.config
    if config is None or folder.layout == "native" or "ps_version" in folder.settings:
        return
    says, used = "config.json has no ps_version", "v1, as the official class does: tokens column by column"
    if config.template in ("internvl2_5", "internlm2-chat", "phi3-chat") or config.dynamic_tiles:
        against = "every release with this template or with dynamic tiles has v2"
        yield Finding("conflict", "token order", says, against, f'{used}; write "ps_version": "v2" if it learned v2')
    else:
        yield Finding("note", "token order", says, "", used)


def tied(folder: Folder) -> Iterator[Finding]:
    config = folder.config
    if config is None or folder.weights is None:
        return
    if config.language.tied and folder.head is not None:
        used = "one matrix; opening compares both and refuses where they differ"
        yield Finding("note", "output head", "config.json: tied to the embedding", "both matrices are stored", used)
    if not config.language.tied and folder.head is None:
        against = "the weights have no output head"
        yield Finding("conflict", "output head", "config.json: not tied", against, "nothing: opening it is refused")
    whole = folder.settings.get("tie_word_embeddings")
    if folder.layout == "official" and isinstance(whole, bool) and whole != config.language.tied:
        says, against = f"config.json: tie_word_embeddings {whole}", f"llm_config: {config.language.tied}"
        yield Finding("note", "output head", says, against, "llm_config, which describes the language model")


def adapters(folder: Folder) -> Iterator[Finding]:
    ranks = {field: folder.settings.get(field) for field in LORA_FIELDS if folder.settings.get(field)}
    keys = [] if folder.weights is None else [key for key in folder.weights.shapes if ".lora_" in key]
    if ranks and folder.weights is not None and not keys:
        says = f"config.json: {', '.join(f'{field} {rank}' for field, rank in ranks.items())}"
        used = "nothing: set the ranks to 0 where the adapters were merged"
        yield Finding("conflict", "adapters", says, "the weights hold no adapter", used)
    if keys and not ranks:
        says = f"the weights hold {len(keys)} adapter matrices"
        yield Finding("conflict", "adapters", says, "config.json: ranks are 0", "nothing: opening it is refused")
    if ranks and keys:
        says = f"config.json: {', '.join(f'{field} {rank}' for field, rank in ranks.items())}"
        used = "the adapters with their base; the official class wraps such a model once more when it is fine-tuned"
        yield Finding("note", "adapters", says, "", used)
    if (folder.path / "adapter_config.json").is_file():
        yield Finding("note", "adapters", "adapter_config.json lies beside the weights", "", "the weights, without it")


def code_and_pickle(folder: Folder) -> Iterator[Finding]:
    names = sorted(path.name for path in folder.path.iterdir())
    code = [name for name in names if name.endswith(".py")]
    if code or "auto_map" in folder.settings:
        says = _some(code) if code else "config.json: auto_map"
        yield Finding(
            "note", "code", f"{says} came with the checkpoint", "", "this project's own code; theirs never runs"
        )
    pickles = [name for name in names if Path(name).suffix in PICKLE_SUFFIXES]
    if pickles and folder.weights is not None:
        yield Finding("note", "pickle", _some(pickles), "", "the safetensors; pickle can run code and is never opened")


def numbers(folder: Folder) -> Iterator[Finding]:
    """Count and type of the stored numbers."""
    if folder.weights is None:
        return
    types = sorted(set(folder.weights.types.values()))
    named = folder.settings.get("torch_dtype", folder.settings.get("dtype"))
    short = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(str(named))
    if short is not None and types != [short]:
        says, against = f"config.json: {named}", f"stored are {', '.join(types)}"
        yield Finding("note", "number type", says, against, "the stored type, cast to the one that is asked for")
    if folder.config is None or any(".lora_" in key for key in folder.weights.shapes):
        return
    stored = {key: shape for key, shape in folder.weights.shapes.items() if not matches(key, DERIVED_KEYS)}
    total = sum(_product(shape) for shape in stored.values())
    wanted = folder.config.num_parameters
    if folder.config.language.tied and folder.head is not None:
        wanted += folder.config.language.embedding_parameters
    if total != wanted:
        says, against = f"config.json describes {wanted:,} numbers", f"the files hold {total:,}"
        yield Finding("conflict", "weights", says, against, "nothing: opening it lists the keys")


def release(folder: Folder) -> Iterator[Finding]:
    """Beside the table of releases, where the folder or its config has a release's name."""
    names = (folder.path.resolve().name, Path(str(folder.settings.get("_name_or_path", ""))).name)
    row = next((RELEASED[name] for name in names if name in RELEASED), None)
    if row is None or folder.config is None:
        return
    ours, theirs = folder.config, row.config
    pairs: dict[str, tuple[Any, Any]] = {
        name: (getattr(ours, name), getattr(theirs, name))
        for name in (
            "template",
            "num_queries",
            "pixel_shuffle",
            "feature_layer",
            "tile_size",
            "max_tiles",
            "dynamic_tiles",
            "thumbnail",
        )
    }
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        pairs[f"language.{name}"] = (ours.language.settings.get(name), theirs.language.settings.get(name))
    for name in ("width", "depth"):
        pairs[f"vision.{name}"] = (getattr(ours.vision, name), getattr(theirs.vision, name))
    for name, (mine, published) in pairs.items():
        if mine != published and name not in row.unverified:
            says, against = f"{name} is {mine!r}", f"{row.name} was released with {published!r}"
            yield Finding("note", "release", says, against, "the file: it describes these weights")


CHECKS = (
    template,
    chat_template,
    stops,
    vocabulary,
    special_tokens,
    tiles,
    token_order,
    tied,
    adapters,
    code_and_pickle,
    numbers,
    release,
)


def _close(theirs: Sequence[Any], ours: Sequence[float]) -> bool:
    """The same numbers to the four digits that files print."""
    same_kind = len(theirs) == len(ours) and all(isinstance(value, (int, float)) for value in theirs)
    return same_kind and all(abs(a - b) < 1e-4 for a, b in zip(theirs, ours, strict=True))


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total
