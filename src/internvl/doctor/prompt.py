"""The tokenizer's chat template beside the template that config.json names: the same conversation, rendered twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from internvl.data.templates import Template, render

MESSAGES = (
    {"role": "user", "content": "First question"},
    {"role": "assistant", "content": "First answer"},
    {"role": "user", "content": "Second question"},
)
SHOWN = 70
"""Characters of a prompt that are shown from the first difference on."""


class Rendered(NamedTuple):
    """What a chat template makes of MESSAGES, or why it makes nothing."""

    text: str
    error: str = ""


def foreign(template: str, special: dict[str, str], seconds: float = 30.0) -> Rendered:
    """The prompt by a chat template of a checkpoint; `special` has its bos_token and eos_token."""
    asked = json.dumps({"template": template, "messages": MESSAGES, **special})
    program = [sys.executable, "-I", str(Path(__file__).with_name("render.py"))]
    try:
        done = subprocess.run(program, input=asked, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return Rendered("", f"it was not rendered within {seconds:g} s")
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return Rendered("", said[-1][:200] if said else f"it ended with {done.returncode}: too much time or memory")
    return Rendered(str(json.loads(done.stdout)["text"]))


def own(template: Template, system_message: str | None) -> str:
    """The prompt that chatting here makes."""
    return render(list(MESSAGES), template, True, system_message)


def without_system(prompt: str, template: Template) -> str:
    """From the first question on: what stays when the system texts alone differ."""
    at = prompt.find(template.user_start)
    return prompt[at:] if at >= 0 else prompt


def from_difference(one: str, other: str) -> tuple[str, str]:
    """Both prompts from a little before the place where they part, short enough to read."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, same - 20)
    return one[start : start + SHOWN], other[start : start + SHOWN]
