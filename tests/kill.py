"""Kill the pipeline at random moments, let it finish, and compare with a run that nobody disturbed.

    python tests/kill.py [--setting tiny] [--kills 100] [--seed 0] [--out kills.json]

In a clone of the working tree. A kill: start `dvc repro`, wait until a stage that is drawn among the next three has begun,
wait for a drawn time within what it takes, and send SIGKILL to the stage's process, to DVC alone or to the whole process
group. The next `dvc repro` starts at once, while a stage whose DVC was killed may still run. After the last
stages `dvc repro` is left to finish, its files, `dvc.lock`, `dvc status` and DVC's cache are checked, and a new round starts
from nothing. The draws follow from --seed; where a kill falls within a stage depends on the machine as well.
"""

import argparse
import contextlib
import datetime
import hashlib
import itertools
import json
import os
import platform
import random
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import psutil
import yaml
from test_pipeline import ROOT, Clone

TARGETS = ("stage", "dvc", "group")
START = "(start)"  # before the first stage
EMPTY_RUN = "join() argument must be str"  # DVC makes the folder of a run first, then the file in it
LOCK_CUT_SHORT = re.compile(r"'(\./)?dvc\.lock' (validation failed|is invalid)|unable to read: 'dvc\.lock'")


class Repro:
    """`dvc repro` under way in a process group of its own."""

    def __init__(self, clone: Clone):
        self.clone, self.lock_removed = clone, False
        self.log = clone.folder / ".dvc/tmp/kill.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self) -> None:
        with open(self.log, "w") as log:
            self.process = self.clone.start("repro", "dvc.yaml", stdout=log, stderr=log, start_new_session=True)

    def ended(self) -> bool:
        """Whether it came to its end by itself; AssertionError with what it said if that was not a good end.

        DVC writes `dvc.lock` in place, and a kill just then leaves half of it; or an empty folder in the run cache. With the
        two messages for which something has to be done by hand, that is done, and DVC brings all back from its run cache.
        """
        if self.process.poll() and EMPTY_RUN in self.log.read_text():
            empty = [f for f in (self.clone.folder / ".dvc/cache/runs").glob("*/*") if not any(f.iterdir())]
            assert empty, self.log.read_text()  # and not the same again and again
            for folder in empty:
                folder.rmdir()
            self.start()
        if self.process.poll() and LOCK_CUT_SHORT.search(self.log.read_text()):
            (self.clone.folder / "dvc.lock").unlink()
            self.lock_removed = True
            self.start()
        assert not self.process.poll(), self.log.read_text()
        return self.process.returncode == 0

    def last(self) -> str:
        """The stage that DVC began to run last."""
        return re.findall(r"^Running stage '(\w+)'|\Z", self.log.read_text(), re.MULTILINE)[-2:][0] or START

    def stage(self) -> psutil.Process | None:
        """The process of the stage that runs now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                if "stages." in " ".join(child.cmdline()):
                    return child
        return None

    def kill(self, target: str) -> tuple[str, str, psutil.Process | None]:
        """SIGKILL. Returns what was hit (DVC if no stage runs just now), in which state, and a stage that lives on."""
        stage, last = self.stage(), self.last()
        where = f"{last} runs" if stage else "before the first stage" if last == START else f"after {last}"
        if target == "group":
            os.killpg(self.process.pid, signal.SIGKILL)
        elif target == "stage" and stage:
            with contextlib.suppress(psutil.NoSuchProcess):
                stage.kill()
        else:
            target = "dvc"
            self.process.kill()
        self.process.wait()
        return target, where, stage if target == "dvc" else None


def undisturbed(clone: Clone) -> dict[str, float]:
    """Let it run to its end; seconds from the start of each stage to that of the next, in their order."""
    repro, times = Repro(clone), {}
    while not repro.ended():
        times.setdefault(repro.last(), time.monotonic())
        time.sleep(0.02)
    ends = [*list(times.values())[1:], time.monotonic()]
    return {stage: end - start for (stage, start), end in zip(times.items(), ends)}


def figures(folder: Path) -> dict[str, object]:
    """All that must be equal: SHA-256 of the outputs and the entries of `dvc.lock`, without seconds and peak memory."""
    found: dict[str, object] = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (folder / "artifacts").rglob("*")
        if path.is_file() and not path.name.endswith(".resources.json")
    }
    for stage, entry in yaml.safe_load((folder / "dvc.lock").read_text())["stages"].items():
        entry["outs"] = [out for out in entry["outs"] if not out["path"].endswith(".resources.json")]
        found[f"dvc.lock: {stage}"] = entry
    return found


def damaged(cache: Path) -> list[Path]:
    """Objects of a DVC cache whose content has another hash than their name.

    A copy that was cut off has a temporary name, `.….tmp`, stays there and is never read.
    """
    objects = [path for path in (cache / "files/md5").rglob("[!.]*") if path.is_file()]
    assert objects
    return [path for path in objects if hashlib.md5(path.read_bytes()).hexdigest() != path.parent.name + path.name]


def check(clone: Clone, expected: dict[str, object]) -> None:
    """After a run that was left to finish: the figures of an undisturbed one, and nothing left behind."""
    found = figures(clone.folder)
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    assert not differing, f"not as in an undisturbed run: {differing}"
    status = clone.dvc("status", "dvc.yaml")
    assert "up to date" in status, status
    assert not damaged(clone.folder / ".dvc/cache")
    leftovers = [*(clone.folder / "artifacts").rglob(".*.tmp"), *(clone.folder / ".scratch").glob("*.tmp")]
    assert not leftovers, leftovers


def kills(
    clone: Clone, count: int, rng: random.Random, seconds: dict[str, float], forget: Callable[[], object]
) -> list[dict]:
    """Kill so often, in as many rounds as that takes. Returns of each kill round, what was hit, and where.

    The clone has run to its end. seconds: what `undisturbed` says of the stages to hit; forget: makes DVC run them again.
    """
    expected, stages = figures(clone.folder), list(seconds)
    found: list[dict] = []

    def position(stage: str) -> int:
        """A stage that is not among those to hit runs when `dvc.lock` was lost, and is before them."""
        return stages.index(stage) if stage in stages else 0

    def run(until: str | None) -> Repro:
        """`dvc repro` that has begun that stage or a later one, or come to its end."""
        repro = Repro(clone)
        while not repro.ended() and (until is None or position(repro.last()) < stages.index(until)):
            time.sleep(0.01)
        return marked(repro)

    def marked(repro: Repro) -> Repro:
        if repro.lock_removed:
            found[-1]["dvc.lock"] = "cut short"
        return repro

    for number in itertools.count(1):
        forget()
        at, orphans = 0, []
        while len(found) < count:
            aim = rng.choice([*stages, None][at : at + 3])  # None: this round is over
            if aim is None:
                break
            wait, target = rng.uniform(0, seconds[aim]), rng.choice(TARGETS)
            repro = run(until=aim)
            time.sleep(wait)
            ended = repro.ended()
            marked(repro)
            if ended:
                break
            at = position(repro.last())
            target, where, orphan = repro.kill(target)
            orphans += [orphan] if orphan else []
            found.append({"round": number, "killed": target, "where": where})
        run(until=None)
        psutil.wait_procs(orphans)  # what a stage without its DVC does at its end must change nothing either
        check(clone, expected)
        print(f"round {number}: as undisturbed after {len(found)} kills in all", flush=True)
        if len(found) == count:
            return found


def table(found: list[dict]) -> str:
    """Where the kills fell, as Markdown."""
    counts = Counter((kill["where"], kill["killed"]) for kill in found)
    lines = [f"| | {' | '.join(TARGETS)} |", "|---|" + "--:|" * len(TARGETS)]
    for where in sorted({kill["where"] for kill in found}):
        lines.append(f"| {where} | {' | '.join(str(counts[where, target] or '') for target in TARGETS)} |")
    cut = sum("dvc.lock" in kill for kill in found)
    return "\n".join([*lines, "", f"{len(found)} kills; {cut} of them cut dvc.lock short, which was then removed"])


def main() -> None:
    options = argparse.ArgumentParser(prog="python tests/kill.py", description=__doc__.partition("\n")[0])
    options.add_argument("--setting", default="tiny", help="tiny (one epoch) or a setting of params.yaml")
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="JSON file for the kills and their conditions")
    args = options.parse_args()
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
    with tempfile.TemporaryDirectory() as folder:
        clone = Clone(Path(folder), args.setting)
        started = time.monotonic()
        seconds = undisturbed(clone)
        print(f"undisturbed: {sum(seconds.values()):.0f} s", flush=True)
        found = kills(clone, args.kills, random.Random(args.seed), seconds, lambda: clone.git("clean", "-ffdxq"))
    print(table(found))
    conditions = {
        "setting": args.setting, "seed": args.seed, "kills": len(found), "rounds": found[-1]["round"],
        "minutes": round((time.monotonic() - started) / 60, 1), "date": datetime.date.today().isoformat(),
        "commit": commit,
        "system": f"{platform.system()}, {os.cpu_count()} CPU cores", "dvc": version("dvc"), "torch": version("torch"),
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps({"conditions": conditions, "kills": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
