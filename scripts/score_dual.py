"""Every held-out task of `pocket-dual`: results and sheets in runs/evaluate_dual, the table in its card.

    python scripts/score_dual.py [MODEL] [--data data/pocket_dual] [--fill]

Each score is one `internvl evaluate` command, printed before it runs. MODEL is `pocket-dual`, or the folder of a run,
to compare stages. `--fill` writes the table into weights/pocket-dual/README.md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CARD = ROOT / "weights" / "pocket-dual" / "README.md"
BASELINE = ROOT / "benchmarks" / "results" / "retrieval_baseline_stamps.json"
LANGUAGES = ("de", "es", "fr", "it", "ja", "nl", "pl", "pt", "ru", "sv")
WAYS = ("image to text", "text to image")
Scores = dict[str, float]


class Tasks:
    """The commands on one model."""

    def __init__(self, model: str, data: Path) -> None:
        self.model, self.data = model, data
        self.name = Path(model).parent.name if Path(model).name == "model" else Path(model).name

    def score(self, task: str, data: str, *options: str) -> Scores:
        out = Path("runs/evaluate_dual") / "-".join([self.name, task, Path(data).stem, *options])
        command = ["evaluate", task, self.model, str(self.data / data), "--out", str(out), *options]
        sys.stdout.write(f"internvl {' '.join(command)}\n")
        sys.stdout.flush()
        subprocess.run([sys.executable, "-m", "internvl.cli", *command], check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads((out / "result.json").read_text())["results"][0]
        return dict(found["scores"])

    def retrieval(self, language: str, head: str, *options: str) -> Scores:
        return self.score("retrieval", f"heldout/stamps/{language}.jsonl", "--head", head, *options)


def recalls(found: Scores, way: str) -> str:
    return " / ".join(f"{found[f'{way} R@{k}']:.2f}" for k in (1, 5, 10))


def average(found: list[Scores]) -> str:
    return " / ".join(f"{mean(one[f'{way} R@{k}'] for one in found for way in WAYS):.2f}" for k in (1, 5, 10))


def table(tasks: Tasks) -> list[str]:
    """Rows of Markdown."""
    base = json.loads(BASELINE.read_text())
    ridge = {f"{way} R@{k}": base[way]["at"][str(k)] for way in WAYS for k in (1, 5, 10)}
    english = {head: tasks.retrieval("en", head) for head in ("c", "g")}
    ranked = tasks.retrieval("en", "g", "--rerank", "16")
    others = {head: [tasks.retrieval(code, head) for code in LANGUAGES] for head in ("c", "g")}
    wide = {head: tasks.score("retrieval", "heldout/english.jsonl", "--head", head) for head in ("c", "g")}
    classes = {head: tasks.score("zero-shot", "classes/heldout", "--head", head) for head in ("c", "g")}
    rows = ["| held out | C | G | G, re-ranked by matching | ridge baseline |", "| --- | --- | --- | --- | --- |"]
    for way, said in zip(WAYS, ("picture to caption", "caption to picture"), strict=True):
        values = [recalls(one, way) for one in (english["c"], english["g"], ranked, ridge)]
        rows.append(f"| 100 stamps, English, {said}, R@1 / 5 / 10 | {' | '.join(values)} |")
    rows.append(
        f"| the same in {len(LANGUAGES)} other languages, mean of both ways | {average(others['c'])} "
        f"| {average(others['g'])} | – | – |"
    )
    rows.append(f"| 578 pictures, English, both ways | {average([wide['c']])} | {average([wide['g']])} | – | – |")
    shown = [f"{classes[head]['top-1']:.2f}" for head in ("c", "g")]
    rows.append(f"| photos in 12 classes, zero-shot, top-1 | {' | '.join(shown)} | – | – |")
    captions = tasks.score("captions", "heldout/stamps/en.jsonl", "--min-tokens", "2", "--max-tokens", "16")
    rows.append(f"| captions of the stamps, CIDEr-D | – | {captions['CIDEr']:.2f} | – | – |")
    for kind in ("linear", "attention"):
        found = tasks.score("probe", "classes", "--kind", kind)
        rows.append(f"| photos in 12 classes, {kind} probe of the ViT, top-1 | {found['top-1']:.2f} | – | – | – |")
    count = len((tasks.data / "masks" / "classes.txt").read_text().splitlines())
    options = f"--kind linear --classes {count} --iterations 150 --train-batch 8 --crop 224 --stride 112 --warmup 15"
    found = tasks.score("segment", "masks", *options.split(), "--rate", "0.01", "--limit", "60", "--dtype", "float32")
    rows.append(f"| composed scenes, {count} classes, linear head, mean IoU | {found['mean IoU']:.2f} | – | – | – |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", nargs="?", default="pocket-dual")
    parser.add_argument("--data", type=Path, default=Path("data/pocket_dual"))
    parser.add_argument("--fill", action="store_true")
    asked = parser.parse_args()
    text = "\n".join(table(Tasks(asked.model, asked.data)))
    sys.stdout.write(text + "\n")
    if asked.fill:
        card = CARD.read_text(encoding="utf-8")
        marked = re.sub(
            r"(<!-- scores:begin -->\n).*?(<!-- scores:end -->)", lambda m: f"{m[1]}{text}\n{m[2]}", card, flags=re.S
        )
        CARD.write_text(marked, encoding="utf-8")


if __name__ == "__main__":
    main()
