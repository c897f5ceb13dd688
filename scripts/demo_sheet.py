"""Draw docs/images/demo.png: the demo pictures with the answers of `pocket`, as they come (needs the extra `train`)."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

import internvl

ROOT = Path(__file__).resolve().parent.parent


def main(model: str = "pocket", out: str = "docs/images/demo.png") -> int:
    chat = internvl.load(model)
    cases = json.loads((ROOT / "demo/questions.json").read_text(encoding="utf-8"))
    figure, axes = plt.subplots(2, 5, figsize=(15, 8))
    for axis, case in zip(axes.flat, cases, strict=True):
        lines = []
        for question in case["questions"]:
            answer = chat.chat(question, images=[ROOT / "demo" / case["picture"]], max_new_tokens=40).text
            print(f"{case['picture']:<16} {question:<60} {answer}", flush=True)
            lines += textwrap.wrap(question, 36) + ["  " + line for line in textwrap.wrap(answer, 34)]
        axis.imshow(Image.open(ROOT / "demo" / case["picture"]).convert("RGB"))
        axis.set_axis_off()
        axis.set_title("\n".join(lines), loc="left", fontsize=10, y=-0.04, verticalalignment="top")
    figure.tight_layout(h_pad=7)
    figure.savefig(ROOT / out, dpi=75, bbox_inches="tight", pad_inches=0.15)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
