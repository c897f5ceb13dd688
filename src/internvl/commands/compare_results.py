"""`internvl evaluate compare FILES`: results side by side, and in which settings they are not alike."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internvl.commands.evaluate_options import Compare


def compare_results(asked: Compare) -> int:
    from internvl.evaluate.dual_result import compare, read_result

    files = [path / "result.json" if path.is_dir() else path for path in asked.files]
    if len(files) < 2:
        raise ValueError(f"{len(files)} result to compare; give two or more")
    found = compare({str(path): read_result(path) for path in files})
    if asked.json:
        sys.stdout.write(json.dumps(found, ensure_ascii=False) + "\n")
        return 0
    _show(found)
    return 0


def _show(found: Mapping[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("task", "data", "metric", *(str(n) for n in range(1, len(found["columns"]) + 1))):
        shown.add_column(name, justify="right" if name.isdecimal() else "left")
    for row in found["rows"]:
        values = [row["values"].get(column) for column in found["columns"]]
        texts = ["–" if value is None else f"{100 * value:.2f}" for value in values]
        shown.add_row(row["task"], row["data"], row["metric"], *texts)
    console.print(shown)
    for number, column in enumerate(found["columns"], 1):
        console.print(f"{number}  {column}")
    unlike = {(row["task"], row["data"]): row["differs"] for row in found["rows"] if row["differs"]}
    for (task, data), keys in unlike.items():
        for key, values in keys.items():
            said = ", ".join(f"{found['columns'].index(column) + 1}: {value}" for column, value in values.items())
            console.print(f"{task}, {data}: {key} differs ({said})")
