"""`make chat`: questions about the ten pictures of demo/, or about a picture of your own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import internvl

DEMO = Path(__file__).resolve().parent.parent / "demo"


def main(picture: str, question: str) -> int:
    try:
        model = internvl.load("pocket")
        if picture:
            print(model.chat(question or "What is this?", images=[picture]).text)
            return 0
        for case in json.loads((DEMO / "questions.json").read_text(encoding="utf-8")):
            for asked in case["questions"]:
                reply = model.chat(asked, images=[DEMO / case["picture"]])
                print(f"{case['picture']:<16} {asked:<44} {reply.text}", flush=True)
    except (ValueError, OSError) as error:
        print(f"make chat: {error}", file=sys.stderr)
        return 1
    print('\nYour own picture: make chat PICTURE=a.jpg QUESTION="What is this?"')
    return 0


if __name__ == "__main__":
    words = [*sys.argv[1:], "", ""]
    sys.exit(main(words[0], words[1]))
