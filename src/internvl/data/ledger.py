"""What became of the records: accepted + rejected = given, by set and reason; and the file of those set aside.

Which records come, and what is wrong with one, is loader.py's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from internvl.data.records import Reason, place_of


class Rejection(NamedTuple):
    """A record that could not be used."""

    number: int
    """Its place in the mixture."""
    name: str
    """Of its set."""
    source: str
    """File and line."""
    reason: Reason
    message: str
    counts: bool = True
    """False of a later part of a record that was split."""


@dataclass
class Ledger:
    """Counts since the beginning of a run: they travel with the data's cursor."""

    accepted: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    """Accepted records that lost their end."""
    rejected: dict[str, Counter[str]] = field(default_factory=dict)
    """Set -> reason -> records."""

    @property
    def num_accepted(self) -> int:
        return self.accepted.total()

    @property
    def num_rejected(self) -> int:
        return sum(reasons.total() for reasons in self.rejected.values())

    @property
    def num_given(self) -> int:
        return self.num_accepted + self.num_rejected

    def add(self, accepted: Iterable[tuple[str, bool]], rejected: Iterable[Rejection]) -> None:
        """Set and whether it was cut of each accepted record; the others."""
        for name, was_cut in accepted:
            self.accepted[name] += 1
            self.cut[name] += was_cut
        for some in filter(lambda one: one.counts, rejected):
            self.rejected.setdefault(some.name, Counter())[some.reason] += 1

    def check(self, limit: float, epoch: int, example: str) -> None:
        """Refuse to go on where too much is lost: of an epoch of this many records, or of all given if that is more."""
        share = self.num_rejected / max(self.num_given, epoch)
        if share <= limit:
            return
        reasons = sum(self.rejected.values(), Counter[str]())
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise ValueError(
            f"{self.num_rejected} of {max(self.num_given, epoch)} records rejected ({listed}): {share:.2%}; the limit "
            f"is {limit:.2%}; repair the data (internvl data check names each), or raise data.max_rejected. "
            f"The last: {example}"
        )

    def state(self) -> dict[str, Any]:
        """By set, as plain JSON."""
        names = sorted({*self.accepted, *self.rejected})
        return {
            name: {
                "given": self.accepted[name] + self.rejected.get(name, Counter()).total(),
                "accepted": self.accepted[name],
                "cut": self.cut[name],
                "rejected": dict(sorted(self.rejected.get(name, Counter()).items())),
            }
            for name in names
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Ledger:
        """The inverse of `state`."""
        return cls(
            Counter({name: entry["accepted"] for name, entry in state.items()}),
            Counter({name: entry["cut"] for name, entry in state.items()}),
            {name: Counter(entry["rejected"]) for name, entry in state.items() if entry["rejected"]},
        )


def entry_of(name: str, source: str, reason: str, message: str, line: bytes) -> dict[str, Any]:
    """A rejected record of a set, for a file: where it stands, why, and what it says."""
    path, place = place_of(source)
    record: Any = None  # of a file that is not made of lines
    try:
        record = json.loads(line.decode("utf-8-sig")) if line else None
        json.dumps(record)
    except (ValueError, RecursionError):
        record = line.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
    return {
        "file": path,
        "line": place,
        "set": name,
        "reason": reason,
        "message": message,
        "record": record,
    }


class Quarantine:
    """A JSONL file that holds each rejected record once, however often it is met and the run is resumed."""

    def __init__(self, path: Path, keep: bool) -> None:
        """`keep` goes on with the file of a run; what a kill cut off at its end goes."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if keep and path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        entries = [json.loads(line) for line in whole.splitlines()]
        self._known = {(entry["file"], entry["line"]) for entry in entries}
        path.write_bytes(whole)

    def add(self, some: Rejection, line: bytes) -> None:
        if place_of(some.source) in self._known:
            return
        self._known.add(place_of(some.source))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry_of(some.name, some.source, some.reason, some.message, line)) + "\n")
