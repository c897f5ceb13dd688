"""A folder of pictures, or a file of texts, to a file of unit vectors: batched, resumable, nothing lost in silence."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from internvl.data.labelled import PICTURES
from internvl.data.records import Problem
from internvl.generate.dual import Dual, Fit, picture_bytes, pixels_of
from internvl.generate.embedded import Embedded, Facts, check_out, fingerprint, read_embedded, write_embedded
from internvl.generate.kept import PART, Advance, Kept, keep, num_kept
from internvl.models.contrastive import Head


@dataclass(frozen=True)
class Source:
    """What is to be embedded: pictures below a folder, or the lines of a file."""

    path: Path
    kind: str
    names: tuple[str, ...]
    stamps: tuple[str, ...]
    """What tells that an item is still the same."""


@dataclass(frozen=True)
class Made:
    """An output, and what a user should know about it."""

    embedded: Embedded
    resumed: int
    """Parts that an earlier run had left."""
    long: int
    """Texts of more than 80 tokens: the model saw their beginning."""

    @property
    def broken(self) -> Sequence[Problem]:
        return self.embedded.facts.broken


def read_source(path: str | Path) -> Source:
    """A folder, searched with its subfolders, or a text file, one text a line. Hidden files are not looked at."""
    path = Path(path)
    if path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in PICTURES and not any(p.startswith(".") for p in file.relative_to(path).parts)
        ]
        files = [file for file in files if file.is_file()]
        if not files:
            raise ValueError(f"{path}: no picture in it or its subfolders; pictures end in {', '.join(PICTURES)}")
        names = tuple(file.relative_to(path).as_posix() for file in files)
        stats = [file.stat() for file in files]
        return Source(path, "pictures", names, tuple(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such folder or file; give a folder of pictures or a file of texts")
    if path.suffix.lower() in PICTURES:
        raise ValueError(f"{path}: one picture; give the folder that holds it")
    try:
        lines = tuple(path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    lines = tuple(line.rstrip("\r") for line in lines)
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path}: no text in it; write one a line")
    return Source(path, "texts", lines, ())


def embed(
    dual: Dual,
    model: str,
    source: Source,
    out: Path,
    *,
    head: Head = "c",
    fit: Fit = "squash",
    batch: int = 32,
    part: int = PART,
    advance: Advance = lambda count: None,
) -> Made:
    """Embed everything of a source into `out`, going on from the parts beside it where there are some.

    Broken pictures and empty lines are left out and named in the file. An output of the same source and model that is
    already there is read, another one is a ValueError.
    """
    check_out(out)
    facts = Facts(
        model=model,
        fingerprint=fingerprint(dual),
        head=head,
        kind=source.kind,
        source=str(source.path.resolve()),
        fit=fit if source.kind == "pictures" else "",
        side=dual.config.side,
        dtype=str(dual.model.text_projection.dtype).removeprefix("torch."),
        items=hash_of([*source.names, *source.stamps]),
    )
    parts = out.with_name(out.name + ".parts")
    if out.exists():
        there = _same_output(out, facts, source)
        shutil.rmtree(parts, ignore_errors=True)
        advance(len(source.names))
        return Made(there, 0, _num_long(dual, source))
    resumed = num_kept(parts)
    settings = {name: getattr(facts, name) for name in ("fingerprint", "head", "kind", "source", "fit", "dtype")}
    settings["stamps"] = len(set(source.stamps)) and hash_of(source.stamps)
    if source.kind == "pictures":
        paths = [source.path / name for name in source.names]
        kept = kept_pictures(dual, parts, paths, source.names, settings, head, fit, batch, part, advance)
    else:
        kept = kept_texts(dual, parts, source.names, settings, batch, part, advance)
    if not len(kept.rows):
        raise ValueError(f"{source.path}: none of {len(source.names)} could be used; the first: {kept.broken[0]}")
    facts = Facts(**{**vars(facts), "broken": kept.broken})
    embedded = Embedded(tuple(kept.at(source.names)), kept.rows, facts)
    write_embedded(out, embedded)
    shutil.rmtree(parts)
    return Made(embedded, resumed, _num_long(dual, source))


def hash_of(words: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(words).encode("utf-8", "surrogatepass")).hexdigest()[:16]  # names may be no UTF-8


def kept_pictures(
    dual: Dual,
    folder: Path,
    paths: Sequence[Path],
    names: Sequence[str],
    settings: dict[str, object],
    head: Head,
    fit: Fit,
    batch: int = 32,
    part: int = PART,
    advance: Advance = lambda count: None,
) -> Kept:
    """Unit vectors of pictures."""

    def compute(squares: list[Tensor]) -> Float[Tensor, "pictures embed"]:
        return dual.encode_image(pixels_of(squares), head).cpu()

    return keep(
        folder,
        names,
        settings,
        lambda place: picture_bytes(paths[place], dual.config.side, fit),
        compute,
        batch=batch,
        part=part,
        threads=torch.get_num_threads(),
        advance=advance,
    )


def kept_texts(
    dual: Dual,
    folder: Path,
    texts: Sequence[str],
    settings: dict[str, object],
    batch: int = 32,
    part: int = PART,
    advance: Advance = lambda count: None,
) -> Kept:
    """Unit vectors of texts; an empty one is broken."""

    def prepare(place: int) -> str:
        if not texts[place].strip():
            raise ValueError("no text in it; write one or remove the line")
        return texts[place]

    names = [text if text.strip() else f"line {place}" for place, text in enumerate(texts, 1)]
    return keep(
        folder,
        names,
        settings,
        prepare,
        lambda some: dual.encode_text(some).cpu(),
        batch=batch,
        part=part,
        advance=advance,
    )


def _same_output(out: Path, facts: Facts, source: Source) -> Embedded:
    there = read_embedded(out)
    unlike = [
        k for k, v in vars(facts).items() if k not in ("broken", "model", "items") and getattr(there.facts, k) != v
    ]
    missing = len(there.names) + len(there.facts.broken) != len(source.names)
    if unlike or missing or not set(there.names) <= set(source.names):
        why = f"another {', '.join(unlike)}" if unlike else "other names"
        raise ValueError(f"{out}: there already, with {why}; give another --out or remove it")
    if there.facts.items not in ("", facts.items):
        raise ValueError(
            f"{out}: there already, but the {source.kind} have changed since; remove it to embed again, or give "
            "another --out"
        )
    return there


def _num_long(dual: Dual, source: Source) -> int:
    return dual.num_cut(source.names) if source.kind == "texts" else 0
