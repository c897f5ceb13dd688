"""The mean of what several runs learned: `python scripts/mean_parts.py runs/A/parts runs/B/parts --out weights/mine`.

All of it, or none: connector, adapters of both sides, token rows; numbers stay in the kind of the first folder's. A run
that begins with `--start A B` takes the mean of what it teaches itself; this is for parts that ship.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from internvl.models.adapters import mean

CONFIG = "adapter_config.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args(arguments)
    files = [{path.relative_to(folder) for path in folder.rglob("*.safetensors")} for folder in asked.parts]
    for folder, names in zip(asked.parts, files, strict=True):
        if names != files[0] or not names:
            odd = sorted(map(str, names ^ files[0]))
            parser.error(f"{folder} and {asked.parts[0]} hold different parts: {', '.join(odd) or 'none at all'}")
    for name in sorted(files[0]):
        paths = [folder / name for folder in asked.parts]
        kinds = {key: value.dtype for key, value in load_file(paths[0]).items()}
        (asked.out / name).parent.mkdir(parents=True, exist_ok=True)
        values = {key: value.to(kinds[key]).contiguous() for key, value in mean(paths).items()}
        save_file(values, asked.out / name, metadata={"format": "pt"})
        if paths[0].with_name(CONFIG).is_file():
            shutil.copyfile(paths[0].with_name(CONFIG), (asked.out / name).with_name(CONFIG))
    return 0


if __name__ == "__main__":
    sys.exit(main())
