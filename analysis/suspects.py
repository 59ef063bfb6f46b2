"""The lists of an audit: every row in order of suspicion as CSV, and the names of the kept files, one a line."""

import csv
import re
from pathlib import Path

import numpy as np

COLUMNS = ("file", "label", "predicted", "score", "rank", "removed")
# A spreadsheet takes a cell that begins so for a formula (OWASP, "CSV injection"). The last is what is put in front.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "'")
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")


def order(scores: np.ndarray) -> np.ndarray:
    """Row numbers from the most to the least suspicious, (N,) int64; equal scores by row number, as `filter` does."""
    return np.argsort(-scores, kind="stable")


def write_csv(
    path: Path,
    names: list[str],
    labels: list[str],
    predicted: list[str],
    scores: np.ndarray,
    removed: np.ndarray,
) -> None:
    """One line a row, most suspicious first; rank from 1; removed is yes or no.

    A text that a spreadsheet would take for a formula gets an apostrophe in front, and so does one that begins with an
    apostrophe: taking the first one away gives the text. Numbers stay. `kept.txt` has the names unchanged.
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for rank, row in enumerate(order(scores), 1):
            texts = [cell(text) for text in (names[row], labels[row], predicted[row])]
            writer.writerow([*texts, f"{scores[row]:.6g}", rank, "yes" if removed[row] else "no"])


def cell(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA) and not NUMBER.fullmatch(text) else text


def write_kept(path: Path, names: list[str], kept: np.ndarray) -> None:
    """The names of the kept rows, sorted with numbers by their value; (N,) bool `kept`."""
    chosen = sorted((name for name, keep in zip(names, kept, strict=True) if keep), key=_natural)
    path.write_text("".join(f"{name}\n" for name in chosen), encoding="utf-8")


def _natural(name: str) -> list:
    """Texts as they are, numbers between them by their value; `int` would read 4,300 digits at most."""
    return [
        (len(part.lstrip("0")), part.lstrip("0")) if number % 2 else (-1, part)
        for number, part in enumerate(re.split(r"([0-9]+)", name))
    ]
