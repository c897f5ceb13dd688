"""Every held-out task of `pocket-dual`, one table into its card; results and sheets into runs/evaluate_dual.

    python scripts/score_dual.py [MODEL] [--data data/pocket_dual] [--commit HASH]

Each line of the table is one `internvl evaluate` command, printed before it runs; MODEL is `pocket-dual` or a folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CARD = ROOT / "weights" / "pocket-dual" / "README.md"
OUT = Path("runs/evaluate_dual")
LANGUAGES = ("de", "es", "fr", "it", "pt", "nl", "pl", "sv", "ru", "ja")
"""Ten large languages of the held-out stamps beside English."""


def evaluate(task: str, model: str, data: Path, name: str, *options: str) -> dict[str, Any]:
    """Scores of one command."""
    out = OUT / name
    command = ["evaluate", task, model, str(data), "--out", str(out), *options]
    sys.stdout.write("internvl " + " ".join(command) + "\n")
    sys.stdout.flush()
    subprocess.run([sys.executable, "-m", "internvl.cli", *command], check=True, stdout=subprocess.DEVNULL)
    results: list[dict[str, Any]] = json.loads((out / "result.json").read_text())["results"]
    return results[0]["scores"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="pocket-dual")
    parser.add_argument("--data", type=Path, default=Path("data/pocket_dual"))
    parser.add_argument("--json", type=Path, help="write the scores here too")
    asked = parser.parse_args()
    found = scores(asked.model, asked.data)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


def scores(model: str, data: Path) -> dict[str, Any]:
    held = data / "heldout"
    found: dict[str, Any] = {}
    for head in ("c", "g"):
        for name, file in (("stamps", held / "stamps" / "en.jsonl"), ("pictures", held / "english.jsonl")):
            found[f"{name} {head}"] = evaluate("retrieval", model, file, f"{name}-{head}", "--head", head)
        by_language = {
            code: evaluate("retrieval", model, held / "stamps" / f"{code}.jsonl", f"{code}-{head}", "--head", head)
            for code in LANGUAGES
            if (held / "stamps" / f"{code}.jsonl").is_file()
        }
        found[f"languages {head}"] = by_language
        found[f"classes {head}"] = evaluate(
            "zero-shot", model, data / "classes" / "heldout", f"classes-{head}", "--head", head
        )
    found["reranked g"] = evaluate(
        "retrieval", model, held / "stamps" / "en.jsonl", "reranked", "--head", "g", "--rerank", "16"
    )
    found["captions"] = evaluate("captions", model, held / "stamps" / "en.jsonl", "captions", "--min-tokens", "2")
    return found


if __name__ == "__main__":
    main()
