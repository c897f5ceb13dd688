"""Whether the files of an InternVL-C or -G folder agree: configuration, keys and their count, vocabulary, prompt ids.

Weights are not read, only their headers; no code of the folder runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl.config import DualConfig
from internvl.convert import dual
from internvl.convert.files import PICKLE_SUFFIXES, Weights, open_weights, read_json, some
from internvl.convert.keys import expand, matches
from internvl.data.dual_texts import TEXT_PREFIX
from internvl.doctor.folder import ODD, Finding
from internvl.load import read_tokenizer
from internvl.models.build import build_dual

CHECKED = "configuration, keys, count of numbers, positions, vocabulary, prompt and padding ids, code and pickle"
PREFIX_IDS = [19138, 675, 29901]
""""summarize:" of the released tokenizer, between begin and end of text (computed from its file)."""
RELEASED_WORDS = 49954


def diagnose(folder: Path) -> tuple[DualConfig | None, list[Finding]]:
    """The configuration, None where it describes no model, and every finding, conflicts first."""
    path = folder / "config.json"
    found: list[Finding] = []
    try:
        config = dual.from_official(read_json(path), path)
        assert config.num_parameters
    except ODD as error:
        return None, [Finding("conflict", "config.json", str(error), "the model cannot be opened", "nothing")]
    try:
        found += _keys(config, open_weights(folder))
    except (ValueError, OSError) as error:
        found.append(Finding("conflict", "weights", str(error), "the model cannot be opened", "nothing"))
    found += _words(config, folder)
    found += _beside(folder)
    return config, sorted(found, key=lambda finding: finding.level != "conflict")


def _keys(config: DualConfig, weights: Weights) -> Iterator[Finding]:
    stored = {k: size for k, size in weights.shapes.items() if not matches(k, dual.DERIVED_KEYS)}
    model = build_dual(config, device="meta").state_dict()
    wanted: dict[str, tuple[int, ...]] = {}
    for entry in expand(dual.OFFICIAL_RULES, model):
        wanted |= {key: tuple(model[ours].shape) for ours, key in zip(entry.ours, entry.disk, strict=True)}
    head = "qllama.lm_head.weight"
    missing = sorted(wanted.keys() - stored.keys() - ({head} if config.language.tied else set()))
    unknown = sorted(stored.keys() - wanted.keys())
    refused = "nothing: opening it is refused"
    if missing:
        yield Finding("conflict", "keys", f"{len(missing)} are missing: {some(missing)}", "config.json", refused)
    if unknown:
        used = f"{refused}; load_dual(..., ignore=[...]) leaves them unread"
        yield Finding("conflict", "keys", f"{len(unknown)} are unknown: {some(unknown)}", "config.json", used)
    unlike = [key for key in sorted(stored.keys() & wanted.keys()) if tuple(stored[key]) != wanted[key]]
    if unlike:
        key = unlike[0]
        says = f"{key} is {tuple(stored[key])} ({len(unlike)} such)"
        used = "its own grid" if _only_positions(unlike, stored[key], config) else refused
        level = "note" if used == "its own grid" else "conflict"
        yield Finding(level, "shapes", says, f"config.json: {wanted[key]}", used)  # type: ignore[arg-type]
    total = sum(math.prod(size) for key, size in stored.items() if key in wanted)
    if not (missing or unknown or unlike) and total != config.num_parameters:
        says = f"config.json describes {config.num_parameters:,} numbers"
        tied = config.language.tied and head in stored
        level = "note" if tied else "conflict"
        yield Finding(level, "weights", says, f"the files hold {total:,}", "the files")  # type: ignore[arg-type]


def _only_positions(unlike: list[str], stored: tuple[int, ...], config: DualConfig) -> bool:
    """Fine-tuned checkpoints store the positions of `force_image_size`, which opening understands."""
    grid = config.side // config.vision.patch_size
    return unlike == ["vision_model.embeddings.position_embedding"] and stored[1] == grid**2 + 1


def _words(config: DualConfig, folder: Path) -> Iterator[Finding]:
    settings = config.language.settings
    try:
        tokenizer: Any = read_tokenizer(folder, config.language)
    except (ValueError, OSError, ImportError) as error:
        yield Finding("conflict", "tokenizer", str(error), "texts cannot be read", "nothing")
        return
    if tokenizer is None:
        yield Finding("note", "tokenizer", "there is none", "", "ids alone; put tokenizer.model there for texts")
        return
    if len(tokenizer) > config.language.vocab_size:
        says = f"the tokenizer has {len(tokenizer)} words"
        against = f"config.json: vocab_size {config.language.vocab_size}"
        yield Finding("conflict", "vocabulary", says, against, "ids above it end in an error")
    for name in ("bos_token_id", "eos_token_id"):
        theirs, ours = getattr(tokenizer, name), settings.get(name)
        if theirs is not None and ours is not None and theirs != ours:
            yield Finding(
                "conflict", "ends of text", f"tokenizer: {name} {theirs}", f"config.json: {ours}", "config.json"
            )
    if tokenizer.pad_token_id not in (None, 0):
        says = f"tokenizer: padding id {tokenizer.pad_token_id}"
        yield Finding("note", "padding", says, "the model learned 0", "0, with a mask")
    ids = tokenizer(TEXT_PREFIX, add_special_tokens=False)["input_ids"]
    if config.language.vocab_size == RELEASED_WORDS and ids != PREFIX_IDS:
        says = f"{TEXT_PREFIX!r} becomes {ids}"
        used = "these ids; embeddings will not be those that were published"
        yield Finding("conflict", "prompt", says, f"the released tokenizer gives {PREFIX_IDS}", used)


def _beside(folder: Path) -> Iterator[Finding]:
    names = sorted(path.name for path in folder.iterdir())
    code = [name for name in names if name.endswith(".py")]
    if code:
        says = f"{', '.join(code[:4])} came with the checkpoint"
        yield Finding("note", "code", says, "", "this project's own code; theirs never runs")
    pickles = [name for name in names if Path(name).suffix in PICKLE_SUFFIXES]
    if pickles and any(name.endswith(".safetensors") for name in names):
        yield Finding("note", "pickle", ", ".join(pickles[:4]), "", "the safetensors; the others are never opened")
