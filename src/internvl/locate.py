"""What someone calls a model -> the folder with its files: a path, `pocket`, `pocket-dual`, or a hub id.

Reading it is `load.py`'s.
"""

from __future__ import annotations

from pathlib import Path

from internvl.hub import download, is_hub_id
from internvl.zoo import CHAT, DUAL, RELEASED


def locate(name: str | Path) -> Path:
    """Folder of a checkpoint; FileNotFoundError with what to give instead.

    The name of a release is not enough: nothing large is fetched before someone writes its hub id.
    """
    if str(name) == "pocket":
        from internvl.pocket import pocket_folder

        return pocket_folder()
    if str(name) == "pocket-dual":
        from internvl.pocket_dual import pocket_dual_folder

        return pocket_dual_folder()
    if Path(name).is_dir():
        return Path(name)
    if str(name) in CHAT:
        raise FileNotFoundError(f"{name}: made of random weights when it is opened; it has no files to read")
    if str(name) in RELEASED and not RELEASED[str(name)].on_hub:
        raise FileNotFoundError(
            f"{name}: was never released; its row is for plans and recipes. Give the folder of one that was trained"
        )
    if str(name) in RELEASED or str(name) in DUAL:
        config = RELEASED[str(name)].config if str(name) in RELEASED else DUAL[str(name)]
        raise FileNotFoundError(
            f"{name}: its weights (about {2 * config.num_parameters / 1e9:.1f} GB in bfloat16) are not here. "
            f"Give the folder that holds them, or OpenGVLab/{name} to fetch them from the hub"
        )
    if is_hub_id(str(name)):
        return download(str(name))
    duals = [dual for dual in DUAL if dual.startswith(("pocket", "tiny"))]
    raise FileNotFoundError(
        f"{name}: no such folder, and no model of that name; names are {', '.join([*CHAT, *duals])}, "
        f"and hub ids such as OpenGVLab/InternVL2_5-1B"
    )
