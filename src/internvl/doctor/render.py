"""A program of its own: a chat template and messages as JSON on standard input, the prompt on standard output.

A chat template is a small program that somebody else wrote. It runs in jinja's sandbox, in a process that may use few
seconds and little memory, and that `prompt.py` ends when it takes longer.
"""

from __future__ import annotations

import json
import sys
from typing import Any

SECONDS = 10
BYTES = 512 * 1024**2
CHARACTERS = 1_000_000
"""Of a rendered prompt: a few short messages make no such text."""


def limit() -> None:
    """Less time and memory for this process, where the system can do that."""
    try:
        import resource
    except ImportError:
        return
    for kind, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, BYTES)):
        resource.setrlimit(kind, (most, most))


def render(asked: dict[str, Any]) -> str:
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    # As transformers sets it up (transformers/utils/chat_template_utils.py).
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals.update(raise_exception=refuse, strftime_now=lambda _: "")
    text = environment.from_string(asked.pop("template")).render(**asked, add_generation_prompt=True)
    if len(text) > CHARACTERS:
        raise ValueError(f"it makes {len(text):,} characters of three short messages; the limit is {CHARACTERS:,}")
    return text


if __name__ == "__main__":
    limit()
    json.dump({"text": render(json.load(sys.stdin))}, sys.stdout)
