"""Hands a grid to Ray and tells how it goes. Ray places, retries and reports; what waits for what is said by references.

Of each setting the data are read once, of each setting and seed the stages that do not depend on the defense run once, and
then its cells, side by side.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import ray
from ruamel.yaml import YAML

from analysis.grid import Cell
from sweep import task
from sweep.task import Board, Code, Outcome

POLL = 1.0  # seconds between two looks at what has started
SHARED = ("train_victim", "extract", "retrain_oracle", "evaluate_reference")  # do not depend on the defense
OF_THE_CELL = ("retrain", "evaluate")  # with all that they need


@dataclass(frozen=True)
class Needs:
    """Of one training. retries: how often Ray runs a task again whose machine or process was lost."""

    cpus: float
    gpus: float
    retries: int


class Sweep:
    """outcome: done, failed or skipped by cell. push: to the DVC remote, as soon as a stage that is named above has ended.
    say: prints a line."""

    def __init__(
        self, cells: list[Cell], code: Code, parameters: str, commit: str, needs: Needs, push: bool, out: Path,
        say: Callable[[str], None],
    ):  # fmt: skip
        ray.cloudpickle.register_pickle_by_value(task)
        self.cells, self.parameters, self.commit = cells, parameters, commit
        self.push, self.out, self.say = push, out, say
        self.code, self.run = ray.put(code), ray.remote(task.run)
        self.options = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "max_retries": needs.retries}
        self.board = ray.remote(Board).options(num_cpus=0, max_restarts=-1).remote()
        self.tasks: dict[ray.ObjectRef, tuple[str, Cell | None, tuple]] = {}
        self.outcome: dict[Cell, str] = {}
        self.bad: set[ray.ObjectRef] = set()

    def submit(self) -> None:
        """All of it at once, so that a cluster which grows by itself knows what is coming."""
        groups: dict[tuple[str, int], list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault((cell.setting, cell.seed), []).append(cell)
        several = {setting for setting, _ in groups if sum(name == setting for name, _ in groups) > 1}
        prepared: dict[str, ray.ObjectRef] = {}
        for (setting, seed), cells in groups.items():
            if setting in several and setting not in prepared:
                prepared[setting] = self.start(f"{setting}-prepare", cells[0], ["prepare"], gpus=0)
            before = [prepared[setting]] if setting in prepared else []
            shared = self.start(f"{setting}-seed{seed}-shared", cells[0], SHARED, before)
            for cell in cells:
                self.start(cell.name, cell, OF_THE_CELL, [shared], whole=True)

    def start(self, name, cell: Cell, targets, before=(), whole: bool = False, gpus: float | None = None):
        result, commands = None, [["dvc", "repro", *targets]]
        if self.push:
            commands = [
                words
                for target in targets
                for words in (["dvc", "repro", "--pull", target], ["dvc", "push", "--run-cache", "--with-deps", target])
            ]
        if whole:
            of_cell = ["--settings", cell.setting, "--defenses", cell.defense, "--seeds", str(cell.seed)]
            commands.append(["analysis.cells", *of_cell, "--export-only", "--out", "exported", "--commit", self.commit])
            result = f"exported/{cell.setting}/{cell.defense}/seed{cell.seed}.json"
        options = self.options | ({} if gpus is None else {"num_gpus": gpus})
        words = with_changes(self.parameters, cell.changes())
        ref = self.run.options(name=name, **options).remote(
            name, self.code, words, commands, result, self.board, *before
        )
        self.tasks[ref] = (name, cell if whole else None, tuple(before))
        return ref

    def follow(self) -> dict[Cell, str]:
        """Until all have ended; each result is in its place as soon as it is there."""
        left = list(self.tasks)
        while left:
            ready, left = ray.wait(left, num_returns=1, timeout=POLL)
            with contextlib.suppress(ray.exceptions.RayError):  # lost with its machine: Ray starts another
                for name, node in ray.get(self.board.take.remote(), timeout=10 * POLL):
                    self.say(f"running {name} on {node}")
            for ref in ready:
                name, cell, before = self.tasks[ref]
                self.end(ref, cell, self.outcome_of(ref, name, before))
        return self.outcome

    def outcome_of(self, ref, name: str, before: tuple) -> Outcome:
        try:
            return ray.get(ref)
        except ray.exceptions.RayError as error:  # lost more often than it may be, or an error in `task.run` itself
            if self.bad.intersection(before):
                return Outcome(name, "skipped", "what it needs was lost")
            return Outcome(name, "failed", " ".join(str(error).split()))

    def end(self, ref, cell: Cell | None, ended: Outcome) -> None:
        if ended.how != "done":
            self.bad.add(ref)
        count, words = "", ended.words
        if cell:
            self.outcome[cell] = ended.how
            count = f" ({len(self.outcome)} of {len(self.cells)})"
        if ended.how == "done":
            words = f"ran {' '.join(ended.stages)}" if ended.stages else "ran nothing, all of it was computed before"
            if cell:
                words += f"; {cell.write(self.out, ended.text)}"
        elif "\n" in words:
            words = "\n" + "\n".join(f"    {line}" for line in words.splitlines())
        where = f" {ended.seconds:.0f} s on {ended.node}" if ended.node else ""
        self.say(f"{ended.how:<7} {ended.name}{count}{where}: {words}")


def with_changes(text: str, changes: dict[str, object]) -> str:
    """params.yaml with other values, all else as written: two readers, DVC's and that of the stages, must see the same as
    in the file itself."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 10**9
    values = yaml.load(text)
    for dotted, value in changes.items():
        *blocks, key = dotted.split(".")
        block = values
        for name in blocks:
            block = block[name]
        block[key] = value
    new = StringIO()
    yaml.dump(values, new)
    return new.getvalue()
