"""Tables as data: what a cell of a table shows, how figures are written, and Markdown; `analysis.report_html` draws HTML.

Every figure is a mean over the seeds of its row, n of them, with the standard deviation and the 95 % Student t interval
where n is two or more (`analysis.statistics`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.statistics import Summary

DASH, TIMES, MINUS = "\u2013", "\u00d7", "\u2212"


@dataclass(frozen=True)
class Value:
    """What stands in a table's cell. note: in small print after it. code: a name. bar: a share in [0, 1] to draw."""

    text: str
    note: str = ""
    code: bool = False
    bar: float | None = None


@dataclass(frozen=True)
class Row:
    """kind: ``defense``, ``reference`` (undefended, oracle), ``published`` or ``plain``."""

    values: list[Value]
    kind: str = "plain"


@dataclass(frozen=True)
class Table:
    """names: how many of the first columns hold words, not figures."""

    title: str
    columns: list[str]
    rows: list[Row]
    note: str = ""
    names: int = 1


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    if value is None:
        return DASH
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    if not float(text):
        return text.lstrip("+-")  # no minus zero
    return text.replace("-", MINUS)


def figure(found: Summary, sign: bool = False, bar: bool = False, brief: bool = False) -> Value:
    """brief: without the interval, for tables of many columns."""
    if found.mean is None:
        return Value(DASH)
    text = number(found.mean, sign=sign)
    note = ""
    if found.sd is not None:
        spread = f"\u00b1 {number(found.sd)}"
        interval = f"[{number(found.low, sign=sign)}, {number(found.high, sign=sign)}]"
        text, note = (text, spread) if brief else (f"{text} {spread}", interval)
    return Value(text, note, bar=min(max(found.mean, 0.0), 1.0) if bar else None)


def count(values: Sequence[float]) -> str:
    """A mean of whole numbers."""
    mean = sum(values) / len(values)
    return f"{mean:,.0f}" if mean == round(mean) else f"{mean:,.1f}"


def words(cell: dict) -> str:
    """The ledger in a few words, as every table shows it."""
    ledger = cell["ledger"]
    relies, may_use = ledger.get("relies_on"), ledger["may_use"]
    parts = ["does not say" if relies is None else ", ".join(relies)]
    parts += [f"may use {', '.join(may_use)}"] if may_use else []
    return "; ".join(filter(None, parts)).replace("_", " ") or "nothing"


def budget(cell: dict) -> str:
    spec = cell["conditions"]["parameters"]["filter"]
    if spec["budget"] == "fraction":
        return f"{spec['budget_multiplier']:g} {TIMES} the poison"
    return "as it decides" if spec["budget"] == "auto" else f"{spec.get('budget')} rows"


def flat(values) -> str:
    """Parameters in words: ``badnets (patch_size 3)``."""
    if not isinstance(values, dict):
        return str(values)
    if len(values) > 1 and "name" in values:
        return f"{values['name']} ({flat({key: value for key, value in values.items() if key != 'name'})})"
    parts = (f"{key} {flat(value)}" for key, value in values.items())
    return ", ".join(parts)


def without(table: Table, columns: Sequence[str]) -> Table:
    """The table without these columns and without its note."""
    left = [place for place, name in enumerate(table.columns) if name not in columns]
    rows = [Row([row.values[place] for place in left], row.kind) for row in table.rows]
    return Table(table.title, [table.columns[place] for place in left], rows, names=table.names)


def markdown(table: Table) -> str:
    """As GitHub draws it: no HTML, every name escaped."""
    lines = ["| " + " | ".join(escaped(column) for column in table.columns) + " |"]
    lines.append("|" + "|".join("---" if place < table.names else "--:" for place in range(len(table.columns))) + "|")
    for row in table.rows:
        values = []
        for value in row.values:
            text = code(value.text) if value.code and value.text else escaped(value.text)
            text += f" {escaped(value.note)}" if value.note else ""
            values.append(f"*{text}*" if row.kind in ("reference", "published") and value is row.values[0] else text)
        lines.append("| " + " | ".join(values) + " |")
    note = f"\n\n{escaped(table.note)}" if table.note else ""
    return "\n".join(lines) + note


def escaped(text: str) -> str:
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_|\[\]~])", r"\\\1", plain)


def code(text: str) -> str:
    """Between backticks, where a backslash escapes nothing but a pipe."""
    plain = re.sub(r"[\s`]+", " ", text).replace("|", "\\|")
    return f"`{plain}`"
