"""What the files of a run say, in short, as part of a loader's state: changed records are noticed when a run goes on.

Each loader has a fingerprint of what else decides its order; here the two are compared with those of a state.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from internvl.data.mixture import DataSet

Changed = Literal["error", "accept"]
"""Files that say something else than when a state was taken: refuse the state, or go on with what they say now."""


def contents(sets: Sequence[DataSet]) -> dict[str, str]:
    """File -> what it says."""
    return {data.annotation: data.records.digest() for data in sets}


def check_state(
    state: Mapping[str, Any], fingerprint: str, here: Mapping[str, str], changed: Changed, what: str
) -> bool:
    """Whether files changed since a state was taken, which is accepted.

    ValueError where the state is of another fingerprint (`what` must be the same), or of other files and `changed` is
    "error". A state of before says nothing about files, and passes.
    """
    said = state.get("contents", here)
    unlike = [path for path, digest in here.items() if said.get(path) != digest]
    named = f"; {_few(unlike)} changed since" if unlike else ""
    if state["fingerprint"] != fingerprint:
        raise ValueError(
            f"the state is of other data or settings ({state['fingerprint']}, here {fingerprint}{named}); "
            f"resume with the same {what}, or start anew"
        )
    if unlike and changed == "error":
        raise ValueError(
            f"the state is of other records: {_few(unlike)} changed since; put the old file back, start anew, or "
            "set data.changed to accept to go on with what it says now"
        )
    if unlike:
        warnings.warn(f"{_few(unlike)} changed since; going on with what it says now", stacklevel=3)
    return bool(unlike)


def _few(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
