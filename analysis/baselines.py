"""Make every cell of `results/` a git tag, `baseline/<setting>/<defense>/seed<k>`, for `dvc metrics diff` and `dvc plots diff`.

    python -m analysis.baselines
    dvc metrics diff baseline/quick/random_filter/seed42 baseline/quick/spectral_signature/seed42

Nothing is trained. Each tag holds a commit on top of HEAD whose tree is that of HEAD, but for `artifacts/metrics.json`,
`artifacts/plots` and, in `params.yaml`, the three words of the cell and its filter. It is made of git's plumbing: work
tree, index and branches are left alone. Run again, it makes the same commits; after a new commit it moves the tags there.
"""

import argparse
import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from analysis import results
from stages.lib.errors import UserError

PREFIX = "baseline/"
WHO = {"NAME": "baselines", "EMAIL": "baselines@localhost"}


def git(*words: str, content: str | None = None, **environment: str) -> str:
    """What git prints; `UserError` with its own last line if it fails."""
    try:
        done = subprocess.run(
            ["git", *words], input=content, capture_output=True, text=True, env=os.environ | environment
        )
    except FileNotFoundError as error:
        raise UserError("git is not installed; baselines are git tags") from error
    if done.returncode:
        raise UserError(f"git {words[0]}: {' '.join(done.stderr.split()) or 'failed'}")
    return done.stdout.strip()


def plots(cell: dict) -> dict[str, str | None]:
    """The three CSV files that `evaluate` writes, from the rounded numbers that `results/` holds; None: there is none."""
    found, bins, curve = cell["plots"], cell["plots"]["scores"], cell["plots"].get("recall")
    tables: dict[str, list[dict]] = {"scores": [], "recall": [], "training": []}
    for rows, shares in (("clean", bins["clean"]), ("poisoned", bins["poisoned"])):
        for start, end, share in zip(bins["edges"], bins["edges"][1:], shares, strict=False):
            tables["scores"].append({"score": start, "score_end": end, "share": share, "rows": rows})
    if curve:
        poison = cell["filter"]["n_poison"]
        for name, recalls in (
            ("this defense", curve["recall"]),
            ("perfect filter", [min(count / poison, 1.0) for count in curve["rows_removed"]]),
        ):
            for count, recall in zip(curve["rows_removed"], recalls, strict=True):
                tables["recall"].append({"rows_removed": count, "recall": recall, "filter": name})
    for model, history in found["training"].items():
        for epoch, (accuracy, loss) in enumerate(zip(history["accuracy"], history["loss"], strict=True), 1):
            tables["training"].append({"epoch": epoch, "model": model, "accuracy": accuracy, "loss": loss})
    written = {}
    for name, rows in tables.items():
        text = io.StringIO()
        if not rows:
            written[f"artifacts/plots/{name}.csv"] = None
        else:
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            written[f"artifacts/plots/{name}.csv"] = text.getvalue()
    return written


def files(cell: dict, parameters: str) -> dict[str, str | None]:
    """Content by path of what the cell's commit holds other than HEAD; None: not there."""
    for key in ("setting", "defense", "seed"):
        parameters = re.sub(rf"^{key}: .*$", lambda _, key=key: f"{key}: {cell[key]}", parameters, flags=re.MULTILINE)
    wanted = cell["conditions"]["parameters"]["filter"]

    def set_filter(block: re.Match) -> str:
        text = block[0]
        for key, value in wanted.items():
            text = re.sub(rf"^(\s+{key}: *)\S+", rf"\g<1>{value}", text, flags=re.MULTILINE)
        return text

    parameters = re.sub(r"^filter:.*?(?=^\S|\Z)", set_filter, parameters, flags=re.MULTILINE | re.DOTALL)
    if yaml.safe_load(parameters).get("filter") != wanted:
        raise UserError(f"the block filter of params.yaml cannot be given the values of {cell['name']}: {wanted}")
    metrics = json.dumps(cell["metrics"], indent=1) + "\n"
    return {"artifacts/metrics.json": metrics, "params.yaml": parameters, **plots(cell)}


def make(cells: dict, head: str) -> int:
    """Set one tag for each cell; returns how many were new or moved."""
    parameters = git("show", f"{head}:./params.yaml") + "\n"
    prefix = git("rev-parse", "--show-prefix")  # the project may be a folder of a larger repository
    when = git("show", "-s", "--format=%cI", head)  # of HEAD, so that the same cell gives the same commit
    person = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in WHO.items()}
    person |= {"GIT_AUTHOR_DATE": when, "GIT_COMMITTER_DATE": when}
    before = dict(
        line.split(" ", 1)[::-1]
        for line in git("for-each-ref", "--format=%(objectname) %(refname)", f"refs/tags/{PREFIX}").splitlines()
    )
    updates = []
    with tempfile.TemporaryDirectory() as folder:
        index = str(Path(folder) / "index")
        for _, cell in sorted(cells.items()):
            name = cell["name"]
            git("read-tree", head, GIT_INDEX_FILE=index)
            lines = ""
            for path, text in files(cell, parameters).items():
                blob = git("hash-object", "-w", "--stdin", content=text) if text is not None else "0" * len(head)
                lines += f"{'100644' if text is not None else '0'} {blob}\t{prefix}{path}\n"
            git("update-index", "--add", "--index-info", content=lines, GIT_INDEX_FILE=index)
            tree = git("write-tree", GIT_INDEX_FILE=index)
            commit = git("commit-tree", tree, "-p", head, "-m", f"Baseline {name}, from results/", **person)
            if before.get(f"refs/tags/{PREFIX}{name}") != commit:
                updates.append(f"update refs/tags/{PREFIX}{name} {commit}\n")
    git("update-ref", "--stdin", content="".join(updates))
    return len(updates)


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m analysis.baselines", description=__doc__.partition("\n")[0])
    options.add_argument("--results", type=Path, default=Path("results"), help="folder with the cells' JSON files")
    args = options.parse_args()
    try:
        found = results.read(args.results)
        for problem in found.problems:
            print(f"not used: {problem.where}: {problem.what}", file=sys.stderr)
        if not found.cells:
            raise UserError(f"{args.results} holds no usable cell; export some with `python -m analysis.cells`")
        bad = [name for name in (cell["name"] for cell in found.cells.values()) if not re.fullmatch(r"[\w/-]+", name)]
        if bad:
            raise UserError(f"{bad[0]!r} cannot be the name of a git tag; rename the setting or the defense")
        changed = make(found.cells, git("rev-parse", "--verify", "HEAD^{commit}"))
    except UserError as error:
        print(f"python -m analysis.baselines: {error}", file=sys.stderr)
        return 1
    print(f"{len(found.cells)} baselines, {changed} of them new or moved: git tag --list '{PREFIX}*'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
