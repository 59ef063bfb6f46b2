"""Faults while the pipeline runs under DVC: kills, edits, a second run, a full disk. docs/guarantees.md lists what holds.

The defense of the clone waits while there is a file `hold`, so that what happens during `score` does not depend on time.
"""

import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import h5py
import kill
import psutil
import pytest
import yaml
from kill import START, Repro, check, damaged, figures, kills, undisturbed
from test_pipeline import LEFT, RIGHT, Clone

from stages.lib import checkpoints

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


def until(true, every=0.02) -> None:
    end = time.monotonic() + 1800  # seconds; only to come to an end at all
    while not true():
        assert time.monotonic() < end
        time.sleep(every)


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
    """Of the first stage and the last four; `python tests/kill.py` hits all of them."""
    seconds = {stage: done.seconds[stage] for stage in (START, *RIGHT)}
    found = kills(done.clone, 5, random.Random(0), seconds, done.forget)
    assert len(found) == 5 and done.figures == figures(done.folder)


@pytest.mark.slow
def test_kills_that_cut_the_lock_short(done, monkeypatch):
    """All stages run again, since `forget` empties the run cache too, and give the same."""

    def kill_and_cut(repro, target, kill=Repro.kill):
        found, lock = kill(repro, target), repro.clone.folder / "dvc.lock"
        if lock.exists():
            text = lock.read_text()
            lock.write_text(text[: text.rindex("path:") + 3])
        return found

    monkeypatch.setattr(Repro, "kill", kill_and_cut)
    seconds = {stage: done.seconds[stage] for stage in (START, *RIGHT)}
    found = kills(done.clone, 2, random.Random(2), seconds, done.forget)
    assert any("dvc.lock" in kill for kill in found) and done.figures == figures(done.folder)


@pytest.mark.slow
def test_thirty_kills_hit_every_stage(done):
    """Or as many more as that takes: where they fall depends on the machine."""
    found, hit, rng = [], set(), random.Random(1)
    while len(found) < 30 or (len(found) < 200 and not hit >= {*LEFT, *RIGHT}):
        found += kills(done.clone, 10, rng, done.seconds, lambda: done.clone.git("clean", "-ffdxq"))
        hit = {kill["where"].split()[0] for kill in found}
    assert {kill["killed"] for kill in found} == set(kill.TARGETS)
    assert hit >= {*LEFT, *RIGHT}


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_second_repro_says_who_is_at_work(forgotten):
    first = forgotten.held()
    said = forgotten.clone.dvc("repro", "dvc.yaml", fails=True)
    assert "is busy, it is being blocked by" in said and f"(PID {first.process.pid})" in said
    forgotten.release()
    assert first.process.wait() == 0
    check(forgotten.clone, forgotten.figures)


@pytest.mark.slow
def test_two_clones_with_one_cache(done, tmp_path):
    """Both train everything at the same time and put it under the same names."""
    clones = [Clone(tmp_path / name) for name in "ab"]
    for clone in clones:
        clone.dvc("config", "--local", "cache.dir", str(tmp_path / "cache"))
    for repro in [Repro(clone) for clone in clones]:
        until(repro.ended)
    expected = {name: value for name, value in done.figures.items() if not name.startswith("dvc.lock")}
    for clone in clones:
        found = figures(clone.folder)
        assert found | expected == found
        assert "up to date" in clone.dvc("status", "dvc.yaml")
    assert not damaged(tmp_path / "cache")


@pytest.mark.slow
def test_two_queue_workers(tmp_path):
    """Two cells that need the same victim, started at the same time, get the figures of cells run one by one."""
    clone, alone, defenses = Clone(tmp_path / "two"), Clone(tmp_path / "one"), ("spectral_signature", "random_filter")
    for defense in defenses:
        clone.dvc("exp", "run", "--queue", "-n", defense, "-S", f"defense={defense}")
    clone.dvc("queue", "start", "--jobs", "2")
    until(lambda: len(re.findall(r"Success|Failed", clone.dvc("queue", "status"))) == 2, every=5)
    for defense in defenses:
        ref = clone.git("for-each-ref", "--format=%(refname)", f"refs/exps/**/{defense}").strip()
        found = json.loads(clone.git("show", f"{ref}:artifacts/metrics.json"))
        alone.dvc("exp", "run", "-S", f"defense={defense}", "dvc.yaml")
        assert found == alone.metrics()
    assert not damaged(clone.folder / ".dvc/cache")


# edits while a stage runs


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def refused(repro: Repro, stage: str, changed: str) -> None:
    """The stage published nothing, and the next `dvc repro` makes what is right for the files as they are now."""
    clone = repro.clone
    assert repro.process.wait() != 0
    said = repro.log.read_text()
    assert f"{changed} changed while this stage ran: nothing was written; run it again" in said
    lock = yaml.safe_load((clone.folder / "dvc.lock").read_text())["stages"]
    assert stage not in lock or "changed" in clone.dvc("status", stage)
    clone.dvc("repro", stage)
    found = figures(clone.folder)
    clone.dvc("repro", "--force", "--single-item", stage)
    assert figures(clone.folder) == found, "what was recorded is not what these files give"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("defenses/confidence_filter.py", "return own", "return -own"),
     pytest.param("stages/lib/seeds.py", '"""', '""" ', marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_source_is_edited_while_score_runs(forgotten, name, old, new):
    repro = forgotten.held()
    edit(forgotten.folder / name, old, new)
    forgotten.release()
    refused(repro, "score", name)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a parameter", "an input", "a module"])
def test_an_edit_while_the_victim_is_trained(done, what):
    folder, clone = done.folder, done.clone
    edit(folder / "params.yaml", "epochs: 1\n", "epochs: 20\n")
    repro = Repro(clone)
    until(lambda: "victim: resnet20 on" in repro.log.read_text())
    if what == "a parameter":
        edit(folder / "params.yaml", "epochs: 20\n", "epochs: 2\n")
        refused(repro, "train_victim", "the parameters")
    elif what == "a module":
        edit(folder / "stages/lib/training.py", "GRAPH_WARM_UP_STEPS = 3", "GRAPH_WARM_UP_STEPS = 4")
        refused(repro, "train_victim", "stages/lib/training.py")
    else:
        data = folder / "artifacts/tiny/data.h5"
        shutil.copy(data, folder / "other.h5")
        (folder / "other.h5").chmod(0o644)
        with h5py.File(folder / "other.h5", "r+") as file:
            file["train/images"][:] = 255 - file["train/images"][:]
        os.replace(folder / "other.h5", data)
        refused(repro, "train_victim", "artifacts/tiny/data.h5")
    victim = checkpoints.load(folder / "artifacts/tiny/seed1/victim.pt")
    assert len(victim.history) == (2 if what == "a parameter" else 20)
    clone.git("checkout", "-q", ".")
    clone.dvc("repro", "dvc.yaml")
    check(clone, done.figures)


# a full disk


@pytest.mark.slow
def test_dvc_on_a_full_disk(done, small_disk, tmp_path):
    """Of the cache: the message is DVC's. When there is space the same command goes on."""
    clone = Clone(tmp_path / "clone")
    clone.dvc("config", "--local", "cache.dir", str(small_disk.folder / "cache"))
    small_disk.leave(64 << 10)
    said = clone.dvc("repro", "dvc.yaml", fails=True)
    assert "No space left on device" in said and "Traceback" not in said
    (small_disk.folder / "filler").unlink()
    clone.dvc("repro", "dvc.yaml")
    found = figures(clone.folder)
    assert found | {k: v for k, v in done.figures.items() if not k.startswith("dvc.lock")} == found
    assert not damaged(small_disk.folder / "cache")
