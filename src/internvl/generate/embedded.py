"""Files of embeddings: names, unit vectors, and which model made them, as safetensors or parquet.

A vector says nothing without its model: the facts stand in the file, and reading compares them with who asks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from internvl.data.records import Problem
from internvl.generate.dual import Dual

SUFFIXES = (".safetensors", ".parquet")
SAMPLED = 64
"""Numbers of each tensor that a fingerprint looks at."""


@dataclass(frozen=True)
class Facts:
    """Where vectors come from."""

    model: str
    """What it was called: a folder, hub id or name."""
    fingerprint: str
    """Of its weights and tokenizer (`fingerprint`)."""
    head: str
    """c or g; of texts either, they are the same."""
    kind: str
    """"pictures" or "texts"."""
    source: str
    """The folder that names of pictures are relative to, or the file of the texts."""
    fit: str
    side: int
    """Pixels of a side of the square that the model saw."""
    dtype: str
    broken: tuple[Problem, ...] = ()
    """What was left out, with the reason."""
    items: str = ""
    """A digest of the names and, of pictures, their sizes and times: tells that they are still the same."""


@dataclass(frozen=True)
class Embedded:
    """One unit vector a name."""

    names: tuple[str, ...]
    vectors: Float[Tensor, "rows dim"]
    facts: Facts


def fingerprint(dual: Dual) -> str:
    """A short name of weights and tokenizer, the same in float32 and bfloat16, another after any training step.

    Not every number is looked at (27 GB would be): 64 of each tensor, evenly spaced, rounded to bfloat16.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(dual.model.state_dict().items()):
        flat = tensor.detach().flatten()
        values = flat[evenly(len(flat), SAMPLED).to(flat.device)].to(torch.bfloat16).cpu().view(torch.int16)
        digest.update(f"{key} {tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    if dual.tokenizer is not None:
        digest.update(json.dumps(dual.ids(["summarize:A 猫, quickly; ça va? 0123"])[0].tolist()).encode())
    return digest.hexdigest()[:16]


def evenly(length: int, count: int) -> Int[Tensor, " picked"]:
    """At most `count` places from the first to the last, in whole numbers: float32 has none above 2**24."""
    count = min(count, length)
    return torch.arange(count) * (length - 1) // max(1, count - 1)


def check_out(path: Path) -> None:
    """ValueError unless the name of an output says its format; for parquet, unless it can be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: the name of an output ends in {' or '.join(SUFFIXES)}")
    if path.suffix.lower() == ".parquet":
        _pyarrow()


def write_embedded(path: Path, embedded: Embedded) -> None:
    """Whole or not at all; the suffix says the format."""
    check_out(path)
    if len(embedded.names) != len(embedded.vectors):
        raise ValueError(f"{len(embedded.names)} names for {len(embedded.vectors)} vectors; one each is needed")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    facts = json.dumps(asdict(embedded.facts))
    if path.suffix.lower() == ".parquet":
        _write_parquet(scratch, embedded, facts)
    else:
        names = torch.frombuffer(bytearray(json.dumps(embedded.names).encode()), dtype=torch.uint8)
        save_file({"vectors": embedded.vectors.contiguous(), "names": names}, str(scratch), metadata={"facts": facts})
    os.replace(scratch, path)


def read_embedded(path: str | Path) -> Embedded:
    """ValueError where the file is damaged, or no file of embeddings."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; make it with internvl embed")
    if path.suffix.lower() == ".parquet":
        names, vectors, facts = _read_parquet(path)
    else:
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {})["facts"])
                names = json.loads(bytes(file.get_tensor("names").numpy()))
                vectors = file.get_tensor("vectors")
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: damaged, or not made by internvl embed ({error}); make it again") from error
    if not isinstance(names, list) or len(names) != len(vectors):
        raise ValueError(f"{path}: {len(names)} names for {len(vectors)} vectors; make it again")
    return Embedded(tuple(names), vectors, _facts(facts, path))


def check_same(embedded: Embedded, dual: Dual, head: str | None) -> None:
    """ValueError unless this model, and head, made these vectors: others would give scores that mean nothing."""
    mine, theirs = fingerprint(dual), embedded.facts.fingerprint
    if mine != theirs:
        raise ValueError(
            f"the vectors were made by {embedded.facts.model} ({theirs}), this model is {mine}; "
            "give the model that made them, or embed again"
        )
    if head is not None and head != embedded.facts.head:
        raise ValueError(
            f"the vectors are of head {embedded.facts.head!r}, asked is {head!r}; leave out --head or embed again"
        )


def _facts(values: Any, path: Path) -> Facts:
    try:
        found = Facts(**values)
        return replace(found, broken=tuple(Problem(**one) for one in values["broken"]))  # JSON has no dataclasses
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: its facts are {str(values)[:80]!r} ({error}); make it again") from error


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError("parquet files need: pip install 'internvl[parquet]'") from error
    return pyarrow, parquet


def _write_parquet(path: Path, embedded: Embedded, facts: str) -> None:
    pyarrow, parquet = _pyarrow()
    flat = pyarrow.array(embedded.vectors.float().flatten().numpy())
    columns = {
        "name": pyarrow.array(_utf8(embedded.names), pyarrow.string()),
        "vector": pyarrow.FixedSizeListArray.from_arrays(flat, embedded.vectors.shape[1]),
    }
    table = pyarrow.table(columns).replace_schema_metadata({"facts": facts})
    parquet.write_table(table, str(path))


def _utf8(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the file name {name!r} is not UTF-8; write .safetensors, or rename it") from error
    return names


def _read_parquet(path: Path) -> tuple[list[str], Tensor, Mapping[str, Any]]:
    pyarrow, parquet = _pyarrow()
    try:
        table = parquet.read_table(str(path))
        facts = json.loads((table.schema.metadata or {})[b"facts"])
        width = table.schema.field("vector").type.list_size
        flat = table.column("vector").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return table.column("name").to_pylist(), torch.from_numpy(flat.copy()).view(-1, width), facts
    except (pyarrow.ArrowException, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, or not made by internvl embed ({error}); make it again") from error
