"""Checkpoints from the model hub, through huggingface_hub: its cache, mirror, proxy and token settings hold.

Only weights as safetensors, JSON and tokenizer files are fetched: never code, never pickle. Besides `fetch.py`, nothing
else in the project touches the network.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt")
"""What a checkpoint consists of. Not listed and so never fetched: `*.py`, `*.bin`, `*.pth` and the like."""
NOT_FILES = ("*/*",)
"""Folders inside a repository: other formats, pictures of the model card."""


def is_hub_id(name: str) -> bool:
    """`owner/model`, and no path that was mistyped: there is no folder `owner` here."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not Path(name).parent.is_dir()


def download(hub_id: str) -> Path:
    """Folder of a checkpoint in the hub's cache, fetched as far as it is not there; FileNotFoundError says why not."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise FileNotFoundError(
            f"{hub_id}: fetching it needs: pip install huggingface_hub; {_by_hand(hub_id)}"
        ) from error
    failures: Any = (OSError, ValueError, *HfHubHTTPError.__bases__)  # the last are those of its transport library
    try:
        found = snapshot_download(hub_id, allow_patterns=list(FILES), ignore_patterns=list(NOT_FILES))
    except failures as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{hub_id}: no such folder, and the hub did not give it ({cause}); {_by_hand(hub_id)}"
        ) from error
    folder = Path(str(found))
    missing = [pattern for pattern in ("config.json", "*.safetensors") if not any(folder.glob(pattern))]
    if missing:
        raise FileNotFoundError(
            f"{hub_id}: the repository has no {' and no '.join(missing)}; pickled weights are never fetched. "
            f"Get a version with safetensors, or save the model as safetensors where you trust it"
        )
    return folder


def _by_hand(hub_id: str) -> str:
    return (
        f"where there is a connection run `hf download {hub_id} --exclude '*.py' '*.bin' --local-dir FOLDER`, "
        f"bring FOLDER here and give its path"
    )
