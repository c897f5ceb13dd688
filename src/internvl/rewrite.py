"""A checkpoint folder into another layout, without building the model: one shard in memory at a time.

The target appears only when it is whole and, where asked, when it says the same as the source.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from internvl.config import ChatConfig
from internvl.convert import lora
from internvl.convert.files import MAX_SHARD_BYTES, read_json, write_json
from internvl.convert.keys import Entry
from internvl.load import chat_tokenizer, load_checkpoint, save_checkpoint
from internvl.models.chat import ChatModel
from internvl.opened import (
    EMBEDDING,
    FIRST,
    HEAD,
    FirstGeneration,
    Opened,
    disk_keys,
    open_checkpoint,
    write_checkpoint,
)
from internvl.tokens import IMAGE_TOKEN
from internvl.zoo import CHAT

BESIDE = ("generation_config.json", "preprocessor_config.json")
"""Files that mean the same in both layouts."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("chat_template.json", "tokenizer.model", "vocab.json", "merges.txt"),
)


@dataclass(frozen=True)
class Wanted:
    """What to write."""

    layout: str = "official"
    dtype: torch.dtype | None = None
    """None keeps the stored number type of every tensor."""
    adapters: tuple[Path, ...] = ()
    """Folders in peft's layout, folded in on top of adapters that wrap the source."""
    apart: bool = False
    """Write adapters as peft folders below `adapters/` of the target and leave the weights as they are."""
    image_token_id: int | None = None
    """Id of <IMG_CONTEXT>, where the source has no tokenizer."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    first: FirstGeneration = FIRST
    """What a folder of InternVL-Chat 1.0, as released, does not say by itself."""

    def open(self, source: str | Path) -> Opened:
        return open_checkpoint(source, adapters=self.adapters, first=self.first)


@dataclass(frozen=True)
class Written:
    """What was written, and how it compares."""

    source_layout: str
    parameters: int
    logit_difference: float | None
    """Largest absolute difference of logits, source against target opened again; None where it was not checked."""
    merge_change: float | None
    """How far folding adapters in moved the logits of the same probe; None where there are none or no check."""


def convert(
    source: str | Path,
    target: Path,
    wanted: Wanted,
    *,
    check: bool = True,
    tolerance: float = 0.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Write `source` (a folder of either layout, or a name) to the folder `target`, which must be empty or not there.

    With `check`, logits of a random text and tile are computed by both, one model in memory after the other, in the
    number type that was written. ValueError, and no target, where they differ by more than `tolerance`.
    `progress` hears of bytes written and of all bytes.
    """
    with fresh_folder(target) as folder:
        if str(source) in CHAT and str(source) != "pocket":
            found = _write_random(str(source), folder, wanted)
        else:
            found = _write_opened(wanted.open(source), folder, wanted, progress)
        if not check:
            return found
        difference, change = _compare(source, folder, wanted)
        if not difference <= tolerance:
            raise ValueError(
                f"{target}: logits differ by up to {difference:.3g} from {source}, tolerance {tolerance:.3g}; "
                f"nothing was written"
            )
        return Written(found.source_layout, found.parameters, difference, change)


def plan_keys(source: str | Path, wanted: Wanted) -> Iterator[tuple[str, list[str], tuple[int, ...], str]]:
    """What `convert` would write: key, the keys of the source that it comes from, shape, number type. Reads headers."""
    opened = wanted.open(source)
    kinds = _kinds(opened, wanted)
    origin = {key: list(entry.disk) for entry in opened.entries for key in entry.ours}
    if opened.config.language.tied:
        origin[HEAD] = [key for key in origin[HEAD] if key in opened.names] or origin[EMBEDDING]
    image_token_id = _image_token_id(opened, wanted, chat_tokenizer(opened.folder, opened.config))
    for entry in disk_keys(opened.config, wanted.layout, kinds, image_token_id):
        on_disk = entry.to_disk([kinds[key] for key in entry.ours])
        sources = [key for ours in entry.ours for key in origin[ours]]
        for key, tensor in zip(entry.disk, on_disk, strict=True):
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield key, list(dict.fromkeys(sources)), tuple(tensor.shape), dtype


def forget_code(folder: Path) -> None:
    """Take references to a release's code, which is never copied, out of what stands beside the weights."""
    for name in ("tokenizer_config.json", "generation_config.json"):
        path = folder / name
        settings = read_json(path) if path.is_file() else {}
        if settings.pop("auto_map", None) is not None:
            fast = {"tokenizer_class": "PreTrainedTokenizerFast"} if name == "tokenizer_config.json" else {}
            write_json(path, {**settings, **fast})


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it when the block ends well, and goes when it does not."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists and is not an empty folder; give another target")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.part-") as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        yield folder
        if target.is_dir():
            target.rmdir()
        folder.rename(target)


def probe(model: ChatModel) -> Float[Tensor, "1 length vocab"]:
    """Logits of random text around one random tile, in float32."""
    generator = torch.Generator().manual_seed(0)
    parameter, side = next(model.parameters()), model.config.tile_size
    ids = torch.randint(0, model.language.vocab_size, (1, 24), generator=generator).to(parameter.device)
    tile = torch.randn(1, 3, side, side, generator=generator).to(parameter)
    with torch.inference_mode():
        visual = model.encode_tiles(tile)
        words = model.language.embed(ids)
        embeds = torch.cat([words[:, :8], visual.flatten(0, 1)[None], words[:, 8:]], dim=1)
        return model.language.head(model.language(embeds)).float()


def reader(opened: Opened, dtype: torch.dtype | None, merge: bool = True) -> Callable[[str], Tensor]:
    """Brings a tensor by our key. Those of the last entry are kept: a matrix that was split is read once."""
    entries = {key: entry for entry in opened.entries for key in entry.ours}
    last: list[tuple[Entry, list[Tensor]]] = []

    def read(key: str) -> Tensor:
        entry = entries[key]
        if not opened.has(entry):  # a tied head that is stored once
            entry = entries[EMBEDDING]
            key = EMBEDDING
        if not last or last[0][0] is not entry:
            last.clear()  # before the next is read: one entry in memory, not two
            last.append((entry, opened.read(entry, dtype, merge=merge)))
        return last[0][1][entry.ours.index(key)]

    return read


def _write_opened(opened: Opened, folder: Path, wanted: Wanted, progress: Callable[[int, int], None]) -> Written:
    tokenizer = chat_tokenizer(opened.folder, opened.config)
    image_token_id = _image_token_id(opened, wanted, tokenizer)
    kinds = _kinds(opened, wanted)
    read = reader(opened, wanted.dtype, merge=not wanted.apart)
    left = {key: kind.nbytes for key, kind in kinds.items()}
    total = sum(left.values())

    def counted(key: str) -> Tensor:
        left.pop(key, None)  # a matrix that is written in parts is asked for more than once
        progress(total - sum(left.values()), total)
        return read(key)

    write_checkpoint(folder, opened.config, wanted.layout, image_token_id, kinds, counted, wanted.max_shard_bytes)
    if wanted.apart:
        _write_apart(opened, folder)
    _write_tokenizer(opened, folder, tokenizer)
    _copy(opened.folder, folder, BESIDE)
    forget_code(folder)
    return Written(opened.layout, _count(opened.config, kinds), None, None)


def _write_tokenizer(opened: Opened, folder: Path, tokenizer: Any) -> None:
    """The same files where tokenizer.json says all; else one is made, so that nobody needs the release's code."""
    if (opened.folder / "tokenizer.json").is_file() and opened.layout != "llava":
        _copy(opened.folder, folder, TOKENIZER_FILES)
    elif tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def _copy(source: Path, folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _image_token_id(opened: Opened, wanted: Wanted, tokenizer: Any) -> int | None:
    known = wanted.image_token_id if wanted.image_token_id is not None else opened.image_token_id
    if known is not None or tokenizer is None:
        return known
    found: int | None = tokenizer.get_vocab().get(IMAGE_TOKEN)
    return found


def _write_apart(opened: Opened, folder: Path) -> None:
    for number, pairs in enumerate(opened.adapters):
        for part, prefix in lora.PARTS.items():
            if any(key.startswith(prefix) for key in pairs):
                name = part if len(opened.adapters) == 1 else f"{part}-{number}"
                lora.write_adapter(pairs, folder / "adapters" / name, part)


def _write_random(name: str, folder: Path, wanted: Wanted) -> Written:
    if wanted.adapters:
        raise ValueError(f"{name} has random weights and takes no adapters; give a checkpoint folder")
    loaded = load_checkpoint(name, dtype=wanted.dtype)
    loaded.model.image_token_id = wanted.image_token_id
    save_checkpoint(loaded.model, None, folder, wanted.layout)
    return Written(loaded.layout, _count(loaded.config, loaded.model.state_dict()), None, None)


def _compare(source: str | Path, folder: Path, wanted: Wanted) -> tuple[float, float | None]:
    """Largest difference of logits: source against target, and folded against kept adapters."""
    dtype = _number_type(folder)
    has_peft = find_spec("peft") is not None  # without it both sides are folded, which says the same of the weights
    merge = not wanted.apart or not has_peft
    before = probe(
        load_checkpoint(source, dtype=dtype, adapters=wanted.adapters, merge=merge, first=wanted.first).model
    )
    apart = sorted((folder / "adapters").glob("*/"))
    after = probe(load_checkpoint(folder, dtype=dtype, adapters=apart, merge=merge).model)
    change = None
    if not wanted.apart and has_peft and _has_adapters(source, wanted):
        kept = load_checkpoint(source, dtype=dtype, adapters=wanted.adapters, merge=False, first=wanted.first).model
        change = float((probe(kept) - before).abs().max())
    return float((after - before).abs().max()), change


def _has_adapters(source: str | Path, wanted: Wanted) -> bool:
    named = str(source) in CHAT and str(source) != "pocket"
    return not named and bool(wanted.open(source).adapters)


def _number_type(folder: Path) -> torch.dtype:
    return open_checkpoint(folder).weights.widest


def _kinds(opened: Opened, wanted: Wanted) -> dict[str, Tensor]:
    """Our keys as meta tensors: shape and number type of what will be written."""
    out: dict[str, Tensor] = {}
    for entry in opened.entries:
        stored = opened.kind(entry) if opened.has(entry) else None
        for key, shape in zip(entry.ours, opened.shapes(entry), strict=True):
            out[key] = torch.empty(shape, dtype=wanted.dtype or stored, device="meta")
    if opened.config.language.tied:
        out[HEAD] = torch.empty_like(out[EMBEDDING])
    return out


def _count(config: ChatConfig, kinds: dict[str, Any]) -> int:
    tied = {HEAD} if config.language.tied else set()
    return sum(tensor.numel() for key, tensor in kinds.items() if key not in tied)


def describe(rows: Iterator[tuple[str, list[str], tuple[int, ...], str]], as_json: bool) -> str:
    """The rows of `plan_keys` as text or JSON."""
    if as_json:
        return json.dumps([dict(zip(("key", "from", "shape", "dtype"), row, strict=True)) for row in rows], indent=2)
    return "\n".join(
        f"{key}  {'x'.join(map(str, shape))}  {dtype}" + ("" if sources == [key] else f"  <- {', '.join(sources)}")
        for key, sources, shape, dtype in rows
    )
