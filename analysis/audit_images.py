"""make audit: check what is asked for, run the audit of a data set of one's own through DVC, and say what was found.

One at a time in a checkout: `dvc exp run -S` writes what it is told to params.yaml before it takes DVC's own lock, so that a
second one would give the first its data.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from filelock import FileLock, Timeout

import defenses
from analysis import audit_page
from analysis.retrain import NO_TEST_IMAGES, comparison
from stages import score as score_stage
from stages.lib import params, stage, storage
from stages.lib.errors import UserError

LOCK = Path(".dvc/tmp/audit.lock")
SUFFIX = ".npz"


def check(args) -> None:
    """Whatever can be refused before anything is trained."""
    if not args.data or not Path(args.data).exists():
        raise UserError(f"DATA={args.data} is not there; give a folder, or an .npz file: make audit DATA=folder")
    odd = shlex.split(r"\( -type l -o -type p -o -type s -o ! -perm -400 \) -print -quit")
    if found := subprocess.run(["find", "-L", args.data, *odd], capture_output=True, text=True).stdout.strip():
        raise UserError(f"DVC stops at {found}, a link to nothing, a pipe, or not readable; move it out of the folder")
    if args.budget != "auto" and not (args.budget.isdecimal() and args.budget.isascii()):
        raise UserError(f"BUDGET={args.budget}; expected auto or a number of rows")
    try:
        needs_fraction = defenses.needs_fraction(defenses.load(args.defense, **score_stage.given_options(args)))
    except defenses.DefenseError as error:
        raise UserError(f"DEFENSE={args.defense}: {error}") from error
    if needs_fraction:
        raise UserError(
            f"DEFENSE={args.defense} relies on the share of poisoned rows, which nobody knows here (or does not say what it "
            "relies on); choose one that does without, such as whitened_mixture"
        )


def check_rows(args, data: Path) -> None:
    """What can be refused once the images are read, and before anything is trained."""
    with storage.open_(data, "dataset") as file:
        n, n_test = len(file["train/labels"]), len(file["test/labels"])
    if args.budget != "auto" and int(args.budget) >= n:
        raise UserError(f"BUDGET={args.budget}, and there are {n} rows to score; expected auto, or 0 to {n - 1}")
    if args.retrain and not n_test:
        raise UserError(f"RETRAIN=1, and {NO_TEST_IMAGES}")


def run(args, stage_name: str) -> None:
    words = ["dvc", "exp", "run", *overrides(args), f"analysis/dvc.yaml:{stage_name}"]
    if status := subprocess.run(words).returncode:
        sys.exit(status)


def overrides(args) -> list[str]:
    """What `dvc exp run -S` is told. To its parser commas, brackets and apostrophes mean something, so texts are quoted."""
    path = str(Path(args.data).resolve())
    values = {
        "settings.own.data.path": quoted(path),
        "settings.own.data.source": "npz" if path.lower().endswith(SUFFIX) else "folder",
        "audit.budget": args.budget,
        "audit.options": quoted(" ".join(args.option)),
        "defense": args.defense,
    }
    return [word for name, value in values.items() for word in ("-S", f"{name}={value}")]


def quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def main(args) -> None:
    args.params, args.option = Path("params.yaml"), shlex.split(args.options)
    check(args)
    folder = Path(f"artifacts/audit/seed{params.read(args.params)['seed']}")
    out = folder / args.defense
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(LOCK, timeout=0):
            before = digests(folder / "model.pt", out / "kept.h5")
            if args.retrain or args.budget != "auto":
                run(args, "audit_prepare")
                check_rows(args, folder.parent / "data.h5")
            run(args, "audit_retrain" if args.retrain else "audit")
            if not args.retrain and digests(folder / "model.pt", out / "kept.h5") != before:
                for name in ("accuracy.json", "retrained.pt"):  # of another audit
                    (out / name).unlink(missing_ok=True)
    except Timeout:
        raise UserError("another audit is at work in this checkout; wait for its end, or use a second clone") from None
    summary = json.loads((out / "summary.json").read_text())
    print(f"\n{audit_page.verdict_line(summary)}", *summary["notes"], sep="\n")
    if args.retrain:
        print(comparison(json.loads((out / "accuracy.json").read_text())))
    print(f"lists and pictures in {out} (report.html)")


def digests(*paths: Path) -> list[str | None]:
    return [storage.digest(path) if path.exists() else None for path in paths]


if __name__ == "__main__":
    options = argparse.ArgumentParser(
        prog="make audit", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("data", help="folder or .npz file")
    options.add_argument("--defense", default="whitened_mixture", help="name of a file in defenses/")
    options.add_argument("--budget", default="auto", help="auto (as the defense decides), or rows to remove")
    options.add_argument("--options", default="", help="of the defense: KEY=VALUE KEY=VALUE")
    options.add_argument("--retrain", action="store_true", help="also train on what is kept, and compare")
    stage.run(main, options)
