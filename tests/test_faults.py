"""Faults while the pipeline runs under DVC: kills, edits, a second run, a full disk. docs/guarantees.md lists what holds.

The defense of the clone waits while there is a file `hold`, so that what happens during `score` does not depend on time.
"""

import random
import shutil
import time
from pathlib import Path

import kill
import psutil
import pytest
import yaml
from kill import START, Repro, check, figures, kills, undisturbed
from test_pipeline import LEFT, RIGHT, Clone

HOLD = """
import time
from pathlib import Path

while Path("hold").exists():
    Path("held").touch()
    time.sleep(0.05)
"""
SCORES = "artifacts/tiny/seed1/confidence_filter/scores.h5"


class Undisturbed:
    """A clone in which `dvc repro` has run to its end, and what came out."""

    def __init__(self, folder: Path):
        self.clone, self.folder = Clone(folder), folder
        defense = folder / "defenses/confidence_filter.py"
        defense.write_text(defense.read_text() + HOLD)
        self.clone.commit("a defense that waits")
        self.seconds = undisturbed(self.clone)
        self.figures = figures(folder)

    def forget(self) -> None:
        """What comes after `extract`, in DVC's run cache too."""
        shutil.rmtree(self.folder / "artifacts/tiny/seed1/confidence_filter", ignore_errors=True)
        shutil.rmtree(self.folder / ".dvc/cache/runs", ignore_errors=True)
        path = self.folder / "dvc.lock"
        lock = yaml.safe_load(path.read_text())
        lock["stages"] = {name: entry for name, entry in lock["stages"].items() if name in LEFT}
        path.write_text(yaml.safe_dump(lock))

    def held(self) -> Repro:
        """`dvc repro` that has come to the middle of `score`, which waits there until `release`."""
        (self.folder / "held").unlink(missing_ok=True)
        (self.folder / "hold").touch()
        repro = Repro(self.clone)
        until(lambda: repro.ended() or (self.folder / "held").exists())
        return repro

    def release(self) -> None:
        (self.folder / "hold").unlink()


def until(true, seconds=300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def failed(repro: Repro) -> str:
    """It ends with an error; what it said."""
    assert repro.process.wait() != 0
    return repro.log.read_text()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return Undisturbed(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def forgotten(done):
    done.forget()
    yield done
    (done.folder / "hold").unlink(missing_ok=True)
    done.clone.git("checkout", "-q", ".")


# kills


def test_five_kills_change_nothing(done):
    """Of the last four stages; `python tests/kill.py` hits all of them."""
    seconds = {stage: done.seconds[stage] for stage in (START, *RIGHT)}
    found = kills(done.clone, 5, random.Random(0), seconds, done.forget)
    assert len(found) == 5 and done.figures == figures(done.folder)


@pytest.mark.slow
def test_thirty_kills_hit_every_stage(done):
    found = kills(done.clone, 30, random.Random(1), done.seconds, lambda: done.clone.git("clean", "-ffdxq"))
    assert {kill["killed"] for kill in found} == set(kill.TARGETS)
    assert {kill["where"].split()[0] for kill in found} >= {*LEFT, *RIGHT}


def test_a_stage_whose_dvc_was_killed_publishes_nothing(forgotten):
    repro = forgotten.held()
    hit, _, stage = repro.kill("dvc")
    assert hit == "dvc" and stage.is_running()
    forgotten.release()
    psutil.wait_procs([stage])
    assert "the dvc that started this stage has ended: nothing was written" in repro.log.read_text()
    assert not list((forgotten.folder / SCORES).parent.iterdir())
    forgotten.clone.dvc("repro", "dvc.yaml")
    check(forgotten.clone, forgotten.figures)


# two at once


def test_a_second_repro_says_who_is_at_work(forgotten):
    first = forgotten.held()
    said = forgotten.clone.dvc("repro", "dvc.yaml", fails=True)
    assert "is busy, it is being blocked by" in said and f"(PID {first.process.pid})" in said
    forgotten.release()
    assert first.process.wait() == 0
    check(forgotten.clone, forgotten.figures)
