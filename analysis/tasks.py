"""The stages of dvc.yaml as plain commands: which cells need which, what is done already, and running the rest side by side.

A stage is run again only if its command, its parameters or a file it depends on has changed; a training that was cut off
goes on from its scratch checkpoint.
"""

import concurrent.futures
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from stages.lib import params, storage
from stages.lib.errors import UserError

EXCLUSIVE = ("evaluate",)  # writes the one file that `dvc metrics` reads: one at a time
STAMPS = Path(".scratch/cells")


@dataclass
class Task:
    """One stage of one or several cells."""

    name: str
    command: str
    deps: list[Path]
    outs: list[Path]
    parameters: dict
    after: set[str] = field(default_factory=set)  # commands of the tasks that make the dependencies

    def key(self) -> str:
        """Digest of all that the outputs follow from; the dependencies must be there."""
        files = {str(path): storage.digest(path) for path in self.deps}
        text = json.dumps([self.command, files, self.parameters], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def stamp(self) -> Path:
        return STAMPS / hashlib.sha256(self.command.encode()).hexdigest()[:32]

    def state(self) -> str:
        """`key` and the digests of the outputs: what the stamp of a finished task holds."""
        return json.dumps([self.key(), [storage.digest(path) for path in self.outs]])

    def is_done(self) -> bool:
        if not all(path.exists() for path in self.outs) or not self.stamp.exists():
            return False
        return self.stamp.read_text() == self.state()


def tasks_of(cells: list[tuple[str, str, int]], path: Path = Path("params.yaml")) -> dict[str, Task]:
    """All stages of these (setting, defense, seed) cells by their command, each once. path: of the parameters."""
    stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]
    values = params.read(path)
    tasks: dict[str, Task] = {}
    for setting, defense, seed in cells:
        params.setting(path, setting)  # a mistake is told before work begins
        params.defense_options(path, defense)

        def fill(text: str, cell=(("setting", setting), ("defense", defense), ("seed", str(seed)))) -> str:
            for word, value in cell:
                text = text.replace(f"${{{word}}}", value)
            return text

        for name, stage in stages.items():
            command = " ".join(fill(stage["cmd"]).split())
            # Shared outputs (metrics, plots) are overwritten by the next cell and do not count.
            deps, outs = ([Path(fill(file)) for file in stage[kind]] for kind in ("deps", "outs"))
            blocks = {dotted: block(values, fill(dotted)) for dotted in stage.get("params", [])}
            tasks.setdefault(command, Task(name, command, deps, outs, blocks))
    made_by = {file: task.command for task in tasks.values() for file in task.outs}
    for task in tasks.values():
        task.after = {made_by[file] for file in task.deps if file in made_by}
    return tasks


def up_to(tasks: dict[str, Task], name: str) -> dict[str, Task]:
    """Those of the stage with this name, and what they need. `UserError` if there is none."""
    names = sorted({task.name for task in tasks.values()})
    if name not in names:
        raise UserError(f"no stage is called {name!r}; use one of {', '.join(names)}")
    needed, waiting = set(), {command for command, task in tasks.items() if task.name == name}
    while waiting:
        needed |= waiting
        waiting = set().union(*(tasks[command].after for command in waiting)) - needed
    return {command: task for command, task in tasks.items() if command in needed}


def block(values: dict, dotted: str):
    """The part of the parameters that ``a.b.c`` names. Names of settings hold no dots."""
    for word in dotted.split("."):
        values = values.get(word, {})
    return values


class Runner:
    """Runs tasks in the order of their dependencies until all are done, one fails for good or the time is up."""

    def __init__(self, jobs: int, deadline: float):
        self.jobs, self.deadline = jobs, deadline
        self.running: set[subprocess.Popen] = set()
        self.exclusive, self.stopping = threading.Lock(), threading.Event()

    def run(self, tasks: dict[str, Task]) -> dict[str, str]:
        """Name of the outcome by command: done, ran, failed, stopped or skipped (something before it failed)."""
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # As shells start what ends in "&". The stages would inherit it, and then the time limit could not stop them.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        outcome: dict[str, str] = {}
        pool = concurrent.futures.ThreadPoolExecutor(self.jobs)
        try:
            waiting, futures = dict(tasks), {}
            while waiting or futures:
                for command, task in list(waiting.items()):
                    before = [outcome.get(other) for other in task.after]
                    if any(how in ("failed", "stopped", "skipped") for how in before):
                        outcome[command] = "skipped"
                    elif all(before):
                        futures[pool.submit(self.one, task)] = command
                    else:
                        continue
                    del waiting[command]
                if not futures:
                    continue
                left = max(0.0, self.deadline - time.monotonic())
                finished, _ = concurrent.futures.wait(
                    futures, timeout=min(left, 3600) if not self.stopping.is_set() else None,
                    return_when=concurrent.futures.FIRST_COMPLETED,
                )  # fmt: skip
                if not finished and time.monotonic() >= self.deadline:
                    self.stop()
                for future in finished:
                    outcome[futures.pop(future)] = future.result()
        except BaseException:  # Ctrl-C, or a file that a task needs is not there: start nothing more
            self.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return outcome

    def one(self, task: Task) -> str:
        if task.is_done():
            return "done"
        if self.stopping.is_set() or time.monotonic() >= self.deadline:
            return "stopped"
        if task.name in EXCLUSIVE:
            with self.exclusive:
                return self.execute(task)
        return self.execute(task)

    def execute(self, task: Task) -> str:
        key, started = task.key(), time.monotonic()
        tell(f"start  {task.outs[0]}")
        words = shlex.split(task.command)
        process = subprocess.Popen(
            [sys.executable, *words[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},  # each line when it is printed
        )  # fmt: skip
        self.running.add(process)
        if self.stopping.is_set():
            process.send_signal(signal.SIGINT)
        last = ""
        try:
            for raw in process.stdout:
                # Of a progress bar, which returns to the start of its line, the last state.
                line = raw.decode(errors="replace").rstrip().rpartition("\r")[2]
                last = line.strip() or last
                if line and not self.stopping.is_set():
                    tell(f"       {task.outs[0]}: {line}")
        except BaseException:
            process.send_signal(signal.SIGINT)
            raise
        finally:
            process.wait()
            self.running.discard(process)
        seconds = time.monotonic() - started
        if process.returncode:
            how = "stopped" if self.stopping.is_set() else "failed"
            tell(f"{how:<6} {task.outs[0]} after {seconds:.0f} s: {last}")
            return how
        task.stamp.parent.mkdir(parents=True, exist_ok=True)
        if task.key() != key:
            tell(f"failed {task.outs[0]}: what it was made from changed meanwhile")
            return "failed"
        task.stamp.write_text(task.state())
        tell(f"done   {task.outs[0]} in {seconds:.0f} s")
        return "ran"

    def stop(self) -> None:
        """The time is up: trainings are interrupted and go on from their scratch checkpoints next time."""
        self.stopping.set()
        for process in list(self.running):
            process.send_signal(signal.SIGINT)


def tell(line: str) -> None:
    """One line, whole, from whichever thread."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def current_commit() -> str | None:
    """What HEAD is called, with `-dirty` where a tracked file differs that is no output. None: no checkout, or no git."""
    outputs = [f":(exclude){path}" for path in ("artifacts", "results", "dvc.lock")]
    try:
        done = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ".", *outputs], capture_output=True)
    except FileNotFoundError:
        return None
    commit = done.stdout.strip()
    return f"{commit}-dirty" if commit and changed.returncode else commit or None
