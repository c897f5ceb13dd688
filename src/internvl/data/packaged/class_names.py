"""Class names and prompts of the public zero-shot benchmarks, read from the `clip-benchmark` package.

Only its JSON files are unpacked and read; none of its code is imported.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "clip-benchmark"
LANGUAGES = {"en": "en", "zh": "cn", "ja": "jp", "ar": "ar", "it": "it"}
"""Our (ISO 639-1) names -> the package's."""


@dataclass(frozen=True)
class ClassNames:
    """One benchmark in one language."""

    dataset: str
    language: str
    names: tuple[str, ...]
    """In the order of the labels. The published lists repeat a few; then `repeated` names them and the scores share."""
    templates: tuple[str, ...]
    """Prompts with `{}` or `{c}`, repetitions as published."""

    @property
    def repeated(self) -> tuple[str, ...]:
        return tuple(name for name, count in Counter(self.names).items() if count > 1)


def read(folder: Path, dataset: str = "imagenet1k", language: str = "en") -> ClassNames:
    """Names and templates out of the unpacked package (`fetch.fetch("clip-benchmark")`).

    Datasets without prompts of their own take those of imagenet1k, as the package does. ValueError for an unknown
    language or dataset.
    """
    if language not in LANGUAGES:
        raise ValueError(f"no language {language!r}; there are {', '.join(LANGUAGES)}")
    code = LANGUAGES[language]
    names = _table(folder, f"{code}_classnames.json")
    templates = _table(folder, f"{code}_zeroshot_classification_templates.json")
    if dataset not in names:
        raise ValueError(f"no class names of {dataset!r} in {language}; there are {', '.join(sorted(names))}")
    prompts = templates.get(dataset, templates.get("imagenet1k"))
    return ClassNames(
        dataset, language, _strings(names[dataset], folder, dataset), _strings(prompts, folder, f"prompts of {dataset}")
    )


def _table(folder: Path, name: str) -> dict[str, Any]:
    found = sorted(folder.rglob(name))
    if len(found) != 1:
        raise ValueError(f"{folder}: {len(found)} files {name} instead of one; delete the folder and fetch again")
    table = json.loads(found[0].read_bytes())
    if not isinstance(table, dict):
        raise ValueError(f"{found[0]}: a JSON {type(table).__name__}; the list has another layout than version 1.6.2")
    return table


def _strings(values: Any, folder: Path, what: str) -> tuple[str, ...]:
    kept = list(values.values()) if isinstance(values, dict) else values
    if not isinstance(kept, list) or not kept or not all(isinstance(one, str) for one in kept):
        raise ValueError(f"{folder}: {what} are no list of texts; the list has another layout than version 1.6.2")
    return tuple(kept)
