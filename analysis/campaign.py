"""In which order cells go through DVC's queue: one of each setting and seed, then the others that share its victim."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.queue import Queue
from stages.lib.errors import UserError

if TYPE_CHECKING:
    from analysis.grid import Cell

SHARED = ("prepare", "poison", "train_victim", "extract", "retrain_oracle", "evaluate_reference")
POLL, STATUS = 2.0, 15.0  # seconds between two looks at git's references (cheap) and at the queue (1 s of work)
PROGRESS = 60.0  # seconds between two looks at the logs of what runs (1 s of work each)
STEP = re.compile(r"Running stage '|\w+: epoch \d")
TAIL = 4  # lines of a failed cell's log that are shown


def preparation(setting: str) -> str:
    """Name of the experiment that only reads the data."""
    return f"{setting}-prepare"


class Campaign:
    """Cells on their way through the queue. `waiting`, `running` and what became of the others in `outcome`.

    finish: called with a cell, its experiment and the commit that this stands on as soon as it is there; returns the
    file that it has written. watched: files that a queued cell takes from the workspace, and that must not change meanwhile.
    """

    def __init__(
        self, queue: Queue, todo: list[Cell], finish: Callable[[Cell, str, str], Path], watched: Iterable[Path] = ()
    ):
        self.queue, self.finish = queue, finish
        self.watched = {path: path.read_bytes() for path in watched}
        self.waiting, self.running, self.outcome = list(todo), {}, {}
        self.open_groups: set[tuple[str, int]] = set()  # settings and seeds whose victim and oracle are there
        self.preparing: dict[str, str] = {}  # experiment by setting
        self.total = len(todo)
        self.told, self.told_at = {}, time.monotonic()  # the last line of progress by experiment

    def run(self) -> dict[Cell, str]:
        """`done`, `failed` or `skipped` by cell."""
        self.adopt()
        self.prepare()
        looked, alone = time.monotonic(), 0
        while self.waiting or self.running:
            if self.submit():
                self.queue.start()
            time.sleep(POLL)
            finished = self.queue.finished([*self.running, *self.preparing.values()])
            for setting, name in list(self.preparing.items()):
                if name in finished:
                    self.queue.remove(name, finished[name][1])
                    del self.preparing[setting]
            for name in self.running.keys() & finished.keys():
                cell = self.running.pop(name)
                self.open_groups.add((cell.setting, cell.seed))
                try:
                    self.end(cell, "done", str(self.finish(cell, *finished[name])))
                except UserError as error:  # its artifacts are gone or not whole; the others go on
                    self.end(cell, "failed", str(error))
            if time.monotonic() - looked > STATUS:
                alone = self.look(alone)
                looked = time.monotonic()
        return self.outcome

    def adopt(self) -> None:
        """Go on with what an earlier start has left in the queue, and clear away how it ended last time."""
        names = self.names()
        tasks, _ = self.queue.status()
        self.queue.forget([name for name, state in tasks if name in names and state in ("Success", "Failed")])
        states = dict(tasks)
        for cell in list(self.waiting):
            state = states.get(cell.name)
            if state in ("Queued", "Running"):
                self.waiting.remove(cell)
                self.running[cell.name] = cell
                print(f"going on with {cell.name}, {state.lower()} since an earlier start", flush=True)
        if self.running:
            self.queue.start()

    def names(self) -> set[str]:
        """All that may be in the queue for the cells that have not ended."""
        cells = [*self.waiting, *self.running.values()]
        return {cell.name for cell in cells} | {preparation(cell.setting) for cell in cells}

    def prepare(self) -> None:
        """Read the data of a setting once before its seeds run side by side: two downloads would fight for a file."""
        groups = {(cell.setting, cell.seed) for cell in self.waiting}
        for setting in sorted({setting for setting, _ in groups}):
            seeds = [seed for name, seed in groups if name == setting]
            if self.queue.jobs > 1 and len(seeds) > 1:
                name = preparation(setting)
                changes = {"setting": setting, "defense": self.waiting[0].defense, "seed": seeds[0]}
                self.queue.put(name, changes, ["prepare"])
                self.preparing[setting] = name
        if self.preparing:
            self.queue.start()

    def submit(self) -> int:
        """Queue what may run: one cell of each setting and seed, and the others when it is done."""
        under_way = {(cell.setting, cell.seed) for cell in self.running.values()}
        chosen = []
        for cell in self.waiting:
            group = cell.setting, cell.seed
            if cell.setting not in self.preparing and (group in self.open_groups or group not in under_way):
                chosen.append(cell)
                under_way.add(group)
        for path, content in self.watched.items() if chosen else ():
            if path.read_bytes() != content:
                raise UserError(
                    f"{path} has changed since the start, and the next cells would be of the new one; "
                    "the same command goes on, with the file as it is then"
                )
        for cell in chosen:
            self.queue.put(cell.name, cell.changes())
            self.waiting.remove(cell)
            self.running[cell.name] = cell
            print(f"queued  {cell.name}", flush=True)
        return len(chosen)

    def look(self, alone: int) -> int:
        """Find failures; start workers that are missing. alone: how often in a row tasks ran without a worker."""
        tasks, workers = self.queue.status()
        states = dict(tasks)
        for setting, name in list(self.preparing.items()):
            if states.get(name) == "Failed":
                print(f"failed  {name}\n{self.tail(name)}", flush=True)
                del self.preparing[setting]
                self.skip(lambda cell, setting=setting: cell.setting == setting)
        ended = [name for name in self.running if states.get(name) not in ("Queued", "Running")]
        for name in set(ended) - self.queue.finished(ended).keys():  # failed, or removed from the queue by hand
            cell = self.running.pop(name)
            if states.get(name) != "Failed":
                self.end(cell, "failed", "(it is no longer in the queue)")
            else:
                self.end(cell, "failed", "\n" + self.tail(name))
                if self.failed_in(name) in SHARED:  # it would fail for the other defenses too, after as long
                    self.skip(lambda other, cell=cell: (other.setting, other.seed) == (cell.setting, cell.seed))
        self.tell(name for name in self.running if states.get(name) == "Running")
        mine = [states.get(name) for name in (*self.running, *self.preparing.values())]
        if "Queued" in mine and workers < self.queue.jobs:
            self.queue.start()
        if "Running" not in mine or workers:
            return 0
        if alone:  # a worker that was killed says nothing; this marks its tasks as failed
            self.queue.stop({name for name in self.running if states.get(name) == "Running"})
        return alone + 1

    def tell(self, names: Iterable[str]) -> None:
        """The stage that each runs, or how far its training is, once a minute and where that is new."""
        if time.monotonic() - self.told_at < PROGRESS:
            return
        self.told_at = time.monotonic()
        for name in names:
            try:
                steps = [line for line in self.queue.log(name) if STEP.match(line)]
            except UserError:  # it was removed from the queue just now
                continue
            if steps and steps[-1] != self.told.get(name):
                self.told[name] = steps[-1]
                print(f"running {name}: {steps[-1].removesuffix(':')}", flush=True)

    def tail(self, name: str) -> str:
        return "\n".join(f"    {line}" for line in self.queue.log(name)[-TAIL:])

    def failed_in(self, name: str) -> str:
        """The stage that failed, or nothing if the log does not tell."""
        words = [line.split("'")[1] for line in self.queue.log(name) if "failed to reproduce '" in line]
        return words[-1] if words else ""

    def skip(self, concerned) -> None:
        for cell in [cell for cell in self.waiting if concerned(cell)]:
            self.waiting.remove(cell)
            self.end(cell, "skipped", "(what it needs failed)")

    def end(self, cell: Cell, how: str, words: str) -> None:
        self.outcome[cell] = how
        print(f"{how:<7} {cell.name} ({len(self.outcome)} of {self.total}) {words}", flush=True)
