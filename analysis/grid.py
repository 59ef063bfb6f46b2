"""A grid of cells, settings x defenses x seeds: what it is made of, which cells can run, which have their result.

For the two commands that run one: `analysis.seeds` (DVC's queue, one machine) and `sweep` (Ray, many).
"""

import argparse
import json
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from analysis.files import write_whole
from analysis.schema import SCHEMA_VERSION
from stages.check import runnable
from stages.lib import params
from stages.lib.errors import UserError
from stages.score import digest_of

PARAMS = Path("params.yaml")


@dataclass(frozen=True)
class Cell:
    """budget: `auto`, a number of rows, or None for what params.yaml says."""

    setting: str
    defense: str
    seed: int
    budget: str | None

    @property
    def run(self) -> str:
        """``seed<k>``, with the budget where it is not that of params.yaml."""
        if self.budget is None:
            return f"seed{self.seed}"
        return f"seed{self.seed}-{'auto' if self.budget == 'auto' else f'budget{self.budget}'}"

    @property
    def name(self) -> str:
        return f"{self.setting}-{self.defense}-{self.run}"

    @property
    def file(self) -> Path:
        return Path("defenses") / f"{self.defense}.py"

    def changes(self) -> dict[str, object]:
        chosen = {"setting": self.setting, "defense": self.defense, "seed": self.seed}
        return chosen if self.budget is None else chosen | {"filter.budget": self._budget()}

    def _budget(self) -> str | int:
        return "auto" if self.budget == "auto" else int(self.budget)

    def parameters(self, values: dict) -> dict:
        """What a result of this cell carries under conditions.parameters."""
        budget = {} if self.budget is None else {"budget": self._budget()}
        return {
            "setting": values["settings"][self.setting],
            "defense": values["defenses"][self.defense],
            "filter": values["filter"] | budget,
        }

    def result(self, out: Path) -> Path:
        return out / self.setting / self.defense / f"{self.run}.json"

    def write(self, out: Path, text: str) -> Path:
        """Put a result in its place, whole or not at all."""
        path = self.result(out)
        write_whole(path, text)
        return path

    def is_exported(self, out: Path, values: dict) -> bool:
        """Whether the result is there, of these parameters and of today's file of the defense (older results: of any)."""
        try:
            found = json.loads(self.result(out).read_text())
            made_by = found.get("resources", {}).get("score", {}).get("defense_file")
            return (
                found["schema_version"] == SCHEMA_VERSION
                and found["conditions"]["parameters"] == self.parameters(values)
                and made_by in (None, digest_of(str(self.file)))
            )
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            return False


def choose(settings: list[str], defenses: list[str] | None, seeds: list[int], budget: str | None) -> list[Cell]:
    """All cells, or `UserError` for whatever is unknown or cannot run. No names: every defense that can run so."""
    values = params.read(PARAMS)
    if budget not in (None, "auto"):
        if not (budget.isdecimal() and budget.isascii()):
            raise UserError(f"--budget is {budget!r}; expected auto or a number of rows")
        budget = str(int(budget))  # without leading zeros, which name another file and mean another number in YAML
    check_seeds(seeds)
    rule = params.filter_(PARAMS).budget if budget is None else budget
    found = []
    for setting in dict.fromkeys(settings):
        names = list(values["defenses"]) if defenses is None else defenses
        names = runnable(PARAMS, setting, names, defenses is not None, rule)
        found += [Cell(setting, name, seed, budget) for seed in dict.fromkeys(seeds) for name in names]
    for name in {cell.defense for cell in found}:
        listed = subprocess.run(["git", "ls-files", "--error-unmatch", f"defenses/{name}.py"], capture_output=True)
        if listed.returncode:
            raise UserError(f"git does not know defenses/{name}.py, and cells run in a copy of what it knows: "
                            f"`git add defenses/{name}.py`")  # fmt: skip
    if not found:
        raise UserError("no defense can run so; name some with --defenses, or give another --budget")
    name, times = Counter(cell.name for cell in found).most_common(1)[0]
    if times > 1:
        raise UserError(f"two cells would be named {name}: run their settings one after the other")
    return found


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--settings", nargs="+", required=True, help="blocks under `settings:` in params.yaml")
    options.add_argument("--defenses", nargs="+", help="default: all that can run so")
    options.add_argument("--seeds", nargs="+", type=int, required=True, help="whole numbers from 0")
    options.add_argument("--budget", help="auto or a number of rows to remove; default: what params.yaml says")
    options.add_argument("--again", action="store_true", help="also cells whose result is there")
    options.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON files")


def check_seeds(seeds: list[int]) -> None:
    for seed in seeds:
        if seed < 0:
            raise UserError(f"seed {seed}: a seed is a whole number from 0")


def check_jobs(jobs: int) -> None:
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}; expected 1 or more")


def without_result(args: argparse.Namespace) -> list[Cell]:
    """The cells that the options of `add_options` ask for and whose result is not there; says how many these are."""
    chosen = choose(args.settings, args.defenses, args.seeds, args.budget)
    values = params.read(PARAMS)
    todo = [cell for cell in chosen if args.again or not cell.is_exported(args.out, values)]
    there = f"; the others have their result in {args.out}/ (--again runs them too)" if len(todo) < len(chosen) else ""
    print(f"{len(todo)} of {len(chosen)} cells to run{there}", flush=True)
    return todo
