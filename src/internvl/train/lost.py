"""What a run tells about records that it did not learn from: `skipped.txt`, `records.json`, one sentence at the end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl.train.checkpoint import replace_text


class Lost:
    """The two files of one run."""

    def __init__(self, out: Path, keep: bool) -> None:
        """`keep` goes on with what an earlier process of the run named."""
        self._skipped, self._records = out / "skipped.txt", out / "records.json"
        self._known: dict[str, str] = {}
        if keep and self._skipped.is_file():
            lines = self._skipped.read_text(encoding="utf-8").splitlines()
            self._known = dict(line.split("\t", 1) for line in lines if "\t" in line)
        elif self._skipped.is_file():
            self._skipped.unlink()

    def tell(self, num_cut: int, skipped: Mapping[str, str], cursor: Mapping[str, Any]) -> dict[str, int]:
        """Write what is new; counts for a line of metrics, empty where nothing is lost."""
        if not skipped.keys() <= self._known.keys():
            self._known |= skipped
            text = "".join(f"{source}\t{why}\n" for source, why in sorted(self._known.items()))
            replace_text(self._skipped, text)
        if "counts" in cursor:
            replace_text(self._records, json.dumps(cursor["counts"], indent=1) + "\n")
        return {name: count for name, count in (("skipped", len(self._known)), ("cut", num_cut)) if count}


def sentence(counts: Mapping[str, Any]) -> str:
    """What became of the records, from the counts in a cursor of the data."""
    sets = counts.values()
    totals = {name: sum(entry[name] for entry in sets) for name in ("given", "accepted", "cut")}
    reasons = sum((Counter[str](entry["rejected"]) for entry in sets), Counter[str]())
    listed = "".join(f", {count} {reason}" for reason, count in sorted(reasons.items()))
    return (
        f"records: {totals['given']} given = {totals['accepted']} accepted + {reasons.total()} rejected{listed}; "
        f"{totals['cut']} cut"
    )
