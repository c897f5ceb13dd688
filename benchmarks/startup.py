"""Starting: seconds of `internvl --help` and of `import internvl`, each in fresh processes, beside bare Python.

python benchmarks/startup.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

from measure import in_turns, write

COMMANDS = {
    "python alone": "pass",
    "import internvl": "import internvl",
    "internvl --help": "import sys; from internvl.cli import main; sys.exit(main(['--help']))",
    "internvl chat --help": "import sys; from internvl.cli import main; sys.exit(main(['chat', '--help']))",
    "import torch": "import torch",
}


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = in_turns({name: partial(run, code) for name, code in COMMANDS.items()}, options.rounds)
    for name, seconds in found.items():
        print(
            f"{name:22} {1000 * seconds['median']:7.0f} ms   {1000 * seconds['min']:.0f} to {1000 * seconds['max']:.0f}"
        )
    print(f"written to {write('startup', {'rounds': options.rounds, 'seconds': found}, {}, options.out)}")


if __name__ == "__main__":
    main()
