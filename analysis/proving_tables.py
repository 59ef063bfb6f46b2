"""The tables of the proving ground: Markdown from the JSON files that `analysis.proving_ground` writes.

    python -m analysis.proving_tables        # writes results/proving_ground/README.md and the blocks in the READMEs

Nothing is computed here but means, and nothing is typed: tests compare the committed pages with what this makes.
"""

import argparse
import functools
import hashlib
import io
import json
import re
import sys
import tokenize
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

FOLDER = Path("results/proving_ground")
TOOK = 0.5  # an undefended ASR below: the attack did not take, and the dump is listed but not averaged
OWN = "whitened_mixture"
HEADLINE = 8  # defenses in the README's table
NEARLY = 0.9  # of the dumps: a defense that was run on fewer has no column
MODES = ("told", "hidden", "blind", "hidden_blind")
DEFENSES = Path(__file__).parents[1] / "defenses"
STALE = "†"
NOTE = f"{STALE} scored by an earlier version of the defense's file."
USES = {"report": "Reported", "development": "Development (choices were made on these)"}
BLOCK = re.compile(r"(<!-- proving-ground:begin -->\n).*?(<!-- proving-ground:end -->)", re.DOTALL)
PREFACE = """# Proving ground

Written by `python -m analysis.proving_tables` from the JSON files beside it, one per dump; made by
`python -m analysis.proving_ground`. Each row is one victim ({devices}), so that there is no spread to report. *Ceiling*:
recall at the exact budget of a logistic regression on the truth, within the poisoned classes, out of 5 folds. Dumps on
which the undefended ASR is below {took} are listed, but not in the means: the attack did not take. In *hidden* the class
sizes are not used, in *blind* the poison fraction is not given, in *hidden_blind* neither.
"""


def read(folder: Path) -> list[dict]:
    """All records, sorted by name and seed."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*/seed*.json"))]
    return sorted(records, key=lambda found: (found["dump"], found["seed"]))


def took(found: dict) -> bool:
    return found["undefended"].get("asr", 0) >= TOOK


def value(found: dict, key: str, figure: str):
    return found["scored"].get(key, {}).get(figure)


@functools.cache
def version_of(file: Path, changes: str = "{}") -> str:
    """Digest of a defense's code and of what an ablation changes in it (JSON): a figure holds for these and no others.

    Comments, docstrings and the breaking of lines do not count.
    """
    words, at_start = [], True
    for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            words.append(tokenize.tok_name[token.type])  # a DEDENT has no text, but ends a block
        elif not (at_start and token.type == tokenize.STRING):
            words.append(token.string)
        at_start = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return hashlib.sha256(("".join(words) + changes).encode()).hexdigest()[:16]


def mark(found: dict, key: str) -> str:
    """The sign for a figure that another version of the defense's file has made than the one that is there."""
    file, entry = DEFENSES / f"{key.split(' / ')[0]}.py", found["scored"].get(key, {})
    version = entry.get("file", entry.get("version"))
    return STALE if version and file.exists() and version != version_of(file) else ""


def noted(text: str) -> str:
    return f"{text}\n\n{NOTE}" if STALE in text else text


def table(records: list[dict], keys: list[str], figure: str, names: list[str] | None = None) -> str:
    """One row a dump, one column a key; then the mean over the attacks that took and, for recall, the mean rank, both over
    the rows without a gap: a defense that was not run on a dump has one there."""
    lines = [
        "| dump (seed) | poison in its class | ASR | ceiling | " + " | ".join(names or keys) + " |",
        "|---|--:|--:|--:|" + "--:|" * len(keys),
    ]
    rows = []
    for found in records:
        values = [value(found, key, figure) for key in keys]
        if took(found):
            rows.append(values)
        asr, share = found["undefended"].get("asr"), found["share_of_class"]
        head = [f"{found['dump']} ({found['seed']})", f"{share:.0%}", show(asr), show(found["ceiling"])]
        cells = [show(v) + mark(found, key) for v, key in zip(values, keys, strict=True)]
        lines.append("| " + " | ".join(head + cells) + " |")
    values = np.array([row for row in rows if None not in row], float)
    if len(values):
        of = "" if len(values) == len(rows) else f" of the {len(values)} rows without a gap"
        lines.append(f"| *mean{of}* | | | | " + " | ".join(f"{v:.3f}" for v in values.mean(axis=0)) + " |")
        if figure == "recall" and len(keys) > 1:
            ranks = np.array([rankdata(-row.round(6)) for row in values]).mean(axis=0)
            lines.append(f"| *mean rank{of}* | | | | " + " | ".join(f"{rank:.1f}" for rank in ranks) + " |")
    return noted("\n".join(lines))


def show(v) -> str:
    return "" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v)


def defenses_told(records: list[dict]) -> list[str]:
    """Keys of the defenses that were run as told on nearly every record, the best mean recall first."""
    run: dict[str, list[dict]] = {}
    for found in records:
        for key in found["scored"]:
            if key.endswith(" / told"):
                run.setdefault(key, []).append(found)
    recall = {
        key: np.mean([value(found, key, "recall") for found in there if took(found)] or [0])
        for key, there in run.items()
        if len(there) >= NEARLY * len(records)
    }
    return sorted(recall, key=lambda key: (-recall[key], key))


def own(records: list[dict]) -> str:
    """The default defense in each mode: recall at the budget; where the fraction is not given, its own cut."""
    lines = [
        "| dump (seed) | poison in its class | ASR | ceiling | told | hidden | blind: own cut | hidden, blind: own cut |",
        "|---|--:|--:|--:|--:|--:|---|---|",
    ]
    for found in records:
        cells = [show(value(found, f"{OWN} / {mode}", "recall")) for mode in MODES[:2]]
        for mode in MODES[2:]:
            recall, precision = (value(found, f"{OWN} / {mode}", f"cut_{name}") for name in ("recall", "precision"))
            if value(found, f"{OWN} / {mode}", "n_suspected") == 0:
                cells.append("suspects nothing")
            else:
                cells.append("" if recall is None else f"{recall:.3f}, precision {precision:.3f}")
        cells = [cell + mark(found, f"{OWN} / {mode}") for cell, mode in zip(cells, MODES, strict=True)]
        asr, share = found["undefended"].get("asr"), found["share_of_class"]
        head = [f"{found['dump']} ({found['seed']})", f"{share:.0%}", show(asr), show(found["ceiling"])]
        lines.append("| " + " | ".join(head + cells) + " |")
    return noted("\n".join(lines))


def clean(records: list[dict]) -> str:
    """Rows that a defense suspects where nothing is poisoned."""
    keys = sorted(
        {k for f in records for k in f["scored"] if value(f, k, "n_suspected") is not None and k.count(" / ") == 1}
    )
    lines = ["| dump (seed) | rows | " + " | ".join(keys) + " |", "|---|--:|" + "--:|" * len(keys)]
    for found in records:
        values = [show(value(found, key, "n_suspected")) + mark(found, key) for key in keys]
        lines.append(f"| {found['dump']} ({found['seed']}) | {found['n']} | " + " | ".join(values) + " |")
    return noted("\n".join(lines))


def ablation(records: list[dict]) -> str:
    """Mean recall at the budget over the attacks that took, one ingredient off at a time; and the lowest. Dumps that
    lack one of the ablations, or all, are left out."""
    records = [found for found in records if took(found)]
    off = [{key.split(" / ")[2] for key in found["scored"] if key.count(" / ") == 2} for found in records]
    names = sorted(set().union(*off))
    records = [found for found, there in zip(records, off, strict=True) if names and len(there) == len(names)]
    lines = [
        "| | " + " | ".join(f"{mode}: mean, lowest" for mode in MODES) + " |",
        "|---|" + "--:|" * len(MODES),
    ]
    for name in ["", *names]:
        cells = []
        for mode in MODES:
            key = " / ".join(filter(None, (OWN, mode, name)))
            values = [value(found, key, "recall") for found in records]
            cells.append("" if None in values or not values else f"{np.mean(values):.3f}, {min(values):.3f}")
        lines.append(f"| {name or '*all ingredients*'} | " + " | ".join(cells) + " |")
    earlier = sum(any(mark(found, key) for key in found["scored"] if key.startswith(f"{OWN} / ")) for found in records)
    which = ", ".join(f"{found['dump']} ({found['seed']})" for found in records)
    text = "\n".join([*lines, "", f"{len(records)} dumps: {which}."])
    return f"{text} On {earlier} of {len(records)} dumps by an earlier version of the file." if earlier else text


def page(records: list[dict]) -> str:
    devices = sorted({found["runtime"]["device"].replace("cpu", "CPU") for found in records if "runtime" in found})
    parts = [PREFACE.format(took=TOOK, devices=" or ".join(devices))]
    for use, title in USES.items():
        chosen = [found for found in records if found["use"] == use]
        poisoned = [found for found in chosen if found["n_poisoned"]]
        if poisoned:
            keys = defenses_told(poisoned)
            names = [f"`{key.removesuffix(' / told')}`" for key in keys]
            parts += [f"## {title}", "Recall at the exact budget:", table(poisoned, keys, "recall", names)]
            parts += [
                "AUROC within the poisoned classes; below 0.5 the class was found and its clean half taken for the poison:",
                table(poisoned, keys, "class_auroc", names),
                f"`{OWN}` by what it is told:",
                own(poisoned),
                f"`{OWN}` with one ingredient off, recall at the budget over the attacks that took, where this was run:",
                ablation(poisoned),
            ]
        bare = [found for found in chosen if not found["n_poisoned"]]
        if bare:
            parts += ["Nothing poisoned: rows that each method suspects:", clean(bare)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def reported(records: list[dict]) -> list[dict]:
    return [found for found in records if found["use"] == "report" and found["n_poisoned"]]


def headline(records: list[dict]) -> str:
    """For README.md: the best defenses on the dumps that are only reported, on which the attack took."""
    chosen = [found for found in reported(records) if took(found)]
    keys = defenses_told(chosen)[:HEADLINE]
    return table(chosen, keys, "recall", [f"`{key.removesuffix(' / told')}`" for key in keys])


PAGES = {Path("README.md"): headline, Path("defenses/README.md"): lambda records: own(reported(records))}


def with_block(path: Path, text: str, records: list[dict]) -> str:
    """The text of one of `PAGES` with what stands between the markers made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{PAGES[path](records)}\n{match[2]}", text)


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m analysis.proving_tables", description=__doc__.partition("\n")[0]
    ).parse_args()
    records = read(FOLDER)
    if not records:
        print(f"python -m analysis.proving_tables: no dump in {FOLDER}; run analysis.proving_ground", file=sys.stderr)
        return 1
    (FOLDER / "README.md").write_text(page(records))
    for path in PAGES:
        path.write_text(with_block(path, path.read_text(), records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
