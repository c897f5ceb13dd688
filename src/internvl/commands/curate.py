"""`internvl curate`: training data made better. Each verb is a module of its own, imported when it is called."""

from __future__ import annotations

import sys
from importlib import import_module

VERBS = {
    "filter": ("curate_filter", "chat records: repetition, abnormal lengths, low scores and duplicates go"),
    "pairs": ("curate_pairs", "pictures with captions: size, shape, length, language, fit and duplicates"),
}
"""Verb -> module of commands/ with `main(arguments)`, and what it does."""

USAGE = """usage: internvl curate VERB [arguments]     (internvl curate VERB --help says more)

{verbs}
"""


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE.format(verbs="\n".join(f"  {verb:<9} {text}" for verb, (_, text) in VERBS.items())))
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb not in VERBS:
        raise ValueError(f"no verb {verb!r}; it is one of {', '.join(VERBS)}")
    code: int = import_module(f"internvl.commands.{VERBS[verb][0]}").main(rest)
    return code
