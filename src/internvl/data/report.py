"""The report of check.py for people: a terminal, or one HTML file without scripts. Everything from data is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from internvl.data.findings import NOTES, Report, SetReport, spread
from internvl.data.records import printable

if TYPE_CHECKING:
    from rich.console import Console

BINS = 24
_WIDTH_PX, _HEIGHT_PX = 260, 70
LISTED = 200
"""Findings that a page or a terminal lists; the JSON has them all."""
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #1c2430 }
table { border-collapse: collapse; margin: .6rem 0 1.4rem } th, td { padding: .25rem .7rem; text-align: left }
th { border-bottom: 2px solid #cbd3df } td { border-bottom: 1px solid #e6eaf0; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums } .wrong { color: #b3261e } .note { color: #5b6675 }
.sound { color: #1b7f3b } figure { display: inline-block; margin: 0 1.5rem 1rem 0 } figcaption { color: #5b6675 }
code { background: #f2f5f9; padding: 0 .2rem; overflow-wrap: anywhere } rect { fill: #4c78a8 } text { font-size: 10px }
"""


def histogram(values: Int[np.ndarray, " values"], bins: int = BINS) -> tuple[list[int], list[int]]:
    """Counts, and the edges around them, which are whole numbers."""
    if not len(values):
        return [], []
    low, high = int(values.min()), int(values.max())
    edges = np.unique(np.linspace(low, high + 1, min(bins, high - low + 1) + 1).round().astype(np.int64))
    return np.histogram(values, edges)[0].tolist(), edges.tolist()


def _bars(values: Int[np.ndarray, " values"], title: str) -> str:
    """A small histogram as SVG."""
    counts, edges = histogram(values)
    if not counts:
        return ""
    step, most = _WIDTH_PX / len(counts), max(counts)
    bars = "".join(
        f'<rect x="{place * step:.1f}" y="{_HEIGHT_PX * (1 - count / most):.1f}" width="{max(1.0, step - 1):.1f}" '
        f'height="{_HEIGHT_PX * count / most:.1f}">'
        f"<title>{edges[place]} to {edges[place + 1] - 1}: {count}</title></rect>"
        for place, count in enumerate(counts)
    )
    ends = (
        f'<text x="0" y="{_HEIGHT_PX + 12}">{edges[0]:,}</text>'
        f'<text x="{_WIDTH_PX}" y="{_HEIGHT_PX + 12}" text-anchor="end">{edges[-1] - 1:,}</text>'
    )
    picture = f'<svg width="{_WIDTH_PX}" height="{_HEIGHT_PX + 16}" role="img">{bars}{ends}</svg>'
    return f"<figure>{picture}<figcaption>{escape(title)}</figcaption></figure>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells that are numbers stand on the right."""
    body = "".join(
        "<tr>" + "".join(f"<td{NUMBER if _is_number(cell) else ''}>{cell}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>{body}</table>"


NUMBER = ' class="n"'


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").removesuffix("%").isdigit()


def _spread_row(name: str, values: Int[np.ndarray, " values"]) -> list[str]:
    return [name, *(f"{value:,}" for value in spread(values).values())]


SPREAD = ("", "least", "median", "95 %", "99 %", "most", "mean", "all")


def to_html(report: Report, title: str = "Data check") -> str:
    """One page."""
    wrong = report.wrong()
    given, accepted = (sum(getattr(some, name) for some in report.sets) for name in ("given", "accepted"))
    verdict = f'<span class="wrong">{wrong:,} wrong</span>' if wrong else '<span class="sound">nothing wrong</span>'
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{given:,} records given = {accepted:,} accepted + {given - accepted:,} rejected; {verdict}.</p>",
        _table(
            ("set", "given", "accepted", "rejected", "kinds"),
            (
                [escape(some.name), f"{some.given:,}", f"{some.accepted:,}", f"{some.rejected:,}", _listed(some.kinds)]
                for some in report.sets
            ),
        ),
        *(_section(some) for some in report.sets),
        _findings(report),
    ]
    return "\n".join(parts) + "\n"


def _section(some: SetReport) -> str:
    columns = dict(zip(("tokens", "tiles", "learned tokens"), some.sizes.T, strict=True))
    reasons = (
        [f'<span class="{"note" if reason in NOTES else "wrong"}">{escape(reason)}</span>', f"{count:,}"]
        for reason, count in some.reasons.most_common()
    )
    return "".join(
        (
            f"<h2>{escape(some.name)}</h2><p><code>{escape(some.annotation)}</code>; {over_length(some)}</p>",
            *(_bars(values, name) for name, values in columns.items()),
            _table(SPREAD, (_spread_row(name, values) for name, values in columns.items() if len(values))),
            _table(("finding", "records"), reasons) if some.reasons else "",
            f"<p>Fields that nothing reads: {_listed(some.ignored)}</p>" if some.ignored else "",
            f"<p>Fields of the meta JSON that nothing reads: {escape(_named(some.meta_ignored))}</p>"
            if some.meta_ignored
            else "",
        )
    )


def over_length(some: SetReport) -> str:
    """The share of records that are too long."""
    if some.max_length is None or not len(some.sizes):
        return "no limit of tokens"
    return f"{some.over:,} ({some.over / len(some.sizes):.2%}) of more than {some.max_length:,} tokens"


def _listed(counts: dict[str, int]) -> str:
    return escape(", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())))


def _named(fields: Sequence[str]) -> str:
    return printable(", ".join(fields))


def _findings(report: Report) -> str:
    if not report.findings:
        return ""
    shown = report.findings[:LISTED]
    rows = (
        [
            f"<code>{escape(f'{some.file}:{some.line}' if some.line else some.file)}</code>",
            escape(some.reason),
            escape(some.message),
        ]
        for some in shown
    )
    rest = len(report.findings) + report.left_off - len(shown)
    more = f"<p>{rest:,} more: <code>internvl data check ... --json</code> lists them.</p>" if rest else ""
    return f"<h2>Findings</h2>{_table(('file and line', 'finding', 'what'), rows)}{more}"


def tell(report: Report, console: Console, listed: int = 20) -> None:
    """On a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("set", "given", "accepted", "rejected", "kinds", box=SIMPLE_HEAD)
    sizes = Table("set", *SPREAD, box=SIMPLE_HEAD)
    sizes.add_column("", no_wrap=True)
    reasons = Table("set", "finding", "records", "", box=SIMPLE_HEAD)
    for some in report.sets:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(some.kinds.items()))
        table.add_row(some.name, f"{some.given:,}", f"{some.accepted:,}", f"{some.rejected:,}", kinds)
        for name, values in zip(("tokens", "tiles", "learned"), some.sizes.T, strict=True):
            if len(values):
                sizes.add_row(some.name, *_spread_row(name, values), bar(values))
        for reason, count in some.reasons.most_common():
            reasons.add_row(some.name, reason, f"{count:,}", "note" if reason in NOTES else "wrong")
    for shown in (table, sizes, reasons):
        if shown.row_count:
            console.print(shown)
    for some in report.sets:
        console.print(f"{some.name}: {over_length(some)}")
        if some.ignored:
            fields = ", ".join(f"{name} ({count:,})" for name, count in sorted(some.ignored.items()))
            console.print(f"{some.name}: fields that nothing reads: {printable(fields)}")
        if some.meta_ignored:
            console.print(f"{some.name}: fields of the meta JSON that nothing reads: {_named(some.meta_ignored)}")
    _tell_findings(report, console, listed)


def _tell_findings(report: Report, console: Console, listed: int) -> None:
    wrong = [finding for finding in report.findings if finding.reason not in NOTES]
    for finding in wrong[:listed]:
        where = f"{finding.file}:{finding.line}" if finding.line else finding.file
        said = finding.message.removeprefix(f"{where}: ")
        console.print(f"{where}: {finding.reason}: {said}", soft_wrap=True)
    if len(wrong) > listed:
        console.print(f"... {len(wrong) - listed + report.left_off:,} more; --json lists them")


def bar(values: Int[np.ndarray, " values"]) -> str:
    """A histogram of one line."""
    counts, _ = histogram(values, 16)
    most = max(counts, default=1)
    return "".join(" ▁▂▃▄▅▆▇█"[min(8, -(-8 * count // most))] for count in counts)
