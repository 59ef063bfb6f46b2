"""Seeds through DVC's queue: nothing trained twice, nothing run again, and every mistake told before anything is queued."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from test_pipeline import LEFT, RIGHT, Clone

from analysis import campaign, grid
from analysis.campaign import Campaign
from analysis.grid import Cell
from analysis.queue import EXPERIMENT, ROW, WORKERS, Queue
from analysis.schema import SCHEMA_VERSION
from stages.lib.errors import UserError

WORDS = ["--settings", "tiny", "--seeds", "1"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return Clone(tmp_path_factory.mktemp("seeds"))


def start(clone, *words, module="analysis.seeds", **environment) -> subprocess.Popen:
    names = {f"GIT_{who}_{what}": "t@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return subprocess.Popen(
        [sys.executable, "-m", module, *words], cwd=clone.folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | names | {"BACKDOOR_DEVICE": "cpu"} | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in the background
    )  # fmt: skip


def run(clone, *words, **options) -> tuple[int, str]:
    process = start(clone, *words, **options)
    output, _ = process.communicate(timeout=1500)
    return process.returncode, output


def stages_run(clone, name) -> list[str]:
    return sorted(re.findall(r"Running stage '(\w+)'", clone.dvc("queue", "logs", name)))


@pytest.mark.slow
def test_victim_and_oracle_are_trained_once(clone):
    """Two cells that share them; a second start runs nothing; a lost result comes back from the run cache."""
    status, output = run(clone, *WORDS, "--defenses", "random_filter", "confidence_filter")
    assert status == 0, output
    logs = [stages_run(clone, f"tiny-{name}-seed1") for name in ("random_filter", "confidence_filter")]
    assert logs == [sorted(LEFT + RIGHT), sorted(RIGHT)]
    for defense in ("random_filter", "confidence_filter"):
        found = json.loads((clone.folder / f"results/tiny/{defense}/seed1.json").read_text())
        assert found["metrics"]["cell"] == f"tiny/{defense}/seed1"
        assert clone.git("rev-parse", "HEAD").startswith(found["conditions"]["commit"])
        assert {"victim", "oracle", "retrained", "score"} <= set(found["resources"])
    assert clone.git("status", "--short").split() == ["??", "results/tiny/"], "the workspace is left as it was"

    status, output = run(clone, *WORDS, "--defenses", "random_filter", "confidence_filter")
    assert status == 0 and "queued" not in output and "0 of 2 cells to run" in output

    (clone.folder / "results/tiny/random_filter/seed1.json").unlink()
    status, output = run(clone, *WORDS, "--defenses", "random_filter", "confidence_filter")
    assert status == 0 and output.count("queued") == 1
    assert stages_run(clone, "tiny-random_filter-seed1") == []


@pytest.mark.slow
def test_ctrl_c_leaves_no_training_behind(clone):
    process = start(clone, "--settings", "other", "--seeds", "1", "--defenses", "random_filter")
    while "queued" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(8)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "stopped: 0 cells ended, 1 are left" in output and "Traceback" not in output
    assert not re.search(r"other-random_filter-seed1 .*(Queued|Running)", clone.dvc("queue", "status"))
    assert not (clone.folder / "results/other").exists()


@pytest.mark.slow
def test_a_failure_is_told_with_the_end_of_its_log(clone):
    """A budget of more rows than there are shows itself in `filter` only."""
    status, output = run(clone, *WORDS, "--defenses", "random_filter", "--budget", "100000")
    assert status == 1 and "Traceback" not in output
    assert "failed  tiny-random_filter-seed1-budget100000 (1 of 1)" in output
    assert "the budget is to remove 100000 of 200 rows" in output
    assert output.splitlines()[-1] == "1 of 1 cells have no result: tiny-random_filter-seed1-budget100000"
    assert not list((clone.folder / "results/tiny").glob("*/*budget*"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--settings", "nowhere", "--seeds", "1"], "nowhere"),
        ([*WORDS, "--defenses", "nobody"], "nobody"),
        (["--settings", "tiny", "--seeds", "-1"], "seed -1"),
        ([*WORDS, "--jobs", "0"], "--jobs is 0"),
        ([*WORDS, "--budget", "many"], "--budget is 'many'"),
        ([*WORDS, "--budget", "auto", "--defenses", "random_filter"], "defense random_filter: no decision of its own"),
        (["--settings", "quick-clean", "--seeds", "1"], "setting quick-clean has no poison fraction"),
    ],
)
def test_mistakes_are_told_before_anything_is_queued(clone, words, told):
    status, output = run(clone, *words)
    assert status == 1 and told in output and len(output.splitlines()) == 1, output


def test_a_budget_with_leading_zeros_is_the_same_budget():
    assert [cell.name for cell in grid.choose(["quick"], ["random_filter"], [1, 1], "072")] == [
        "quick-random_filter-seed1-budget72"
    ]


def test_two_cells_of_one_name_are_refused(monkeypatch, refuses):
    names = ["clean-x", "x"]
    values = {"settings": {}, "defenses": {name: {} for name in names}, "filter": {"budget": "fraction"}}
    monkeypatch.setattr(grid.params, "read", lambda path: values)
    monkeypatch.setattr(grid.params, "filter_", lambda path: SimpleNamespace(budget="fraction"))
    monkeypatch.setattr(grid, "runnable", lambda *words: names)
    monkeypatch.setattr(grid.subprocess, "run", lambda *words, **others: SimpleNamespace(returncode=0))
    with refuses("two cells would be named quick-clean-x-seed1"):
        grid.choose(["quick", "quick-clean"], None, [1], None)


def test_a_result_counts_only_with_the_parameters_of_today(tmp_path):
    values = {"settings": {"s": {"x": 1}}, "defenses": {"d": {}}, "filter": {"budget": "fraction"}}
    cell, forced = Cell("s", "d", 3, None), Cell("s", "d", 3, "72")
    assert (cell.name, forced.name, Cell("s", "d", 3, "auto").name) == (
        "s-d-seed3",
        "s-d-seed3-budget72",
        "s-d-seed3-auto",
    )
    assert forced.parameters(values)["filter"] == {"budget": 72}
    for one in (cell, forced):
        assert not one.is_exported(tmp_path, values)
        path = one.result(tmp_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"schema_version": SCHEMA_VERSION, "conditions": {"parameters": one.parameters(values)}})
        )
        assert one.is_exported(tmp_path, values)
    assert not cell.is_exported(tmp_path, values | {"settings": {"s": {"x": 2}}})
    path.write_text("{")
    assert not forced.is_exported(tmp_path, values)


def test_a_result_counts_only_with_the_file_of_today(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"settings": {"s": {}}, "defenses": {"d": {}}, "filter": {}}
    cell = Cell("s", "d", 3, None)
    cell.file.parent.mkdir()
    cell.file.write_text("first")
    found = {
        "schema_version": SCHEMA_VERSION,
        "conditions": {"parameters": cell.parameters(values)},
        "resources": {"score": {"defense_file": hashlib.sha256(b"first").hexdigest()}},
    }
    cell.write(tmp_path, json.dumps(found))
    assert cell.is_exported(tmp_path, values)
    cell.file.write_text("second")
    assert not cell.is_exported(tmp_path, values)


class FakeQueue:
    """Ends at once what is started, in the way that `fails` names; remembers what was queued in which order."""

    jobs = 1

    def __init__(self, fails=()):
        self.fails, self.queued, self.over = fails, [], {}

    def status(self):
        return list(self.over.items()), 0

    def put(self, name, changes, targets=()):
        self.queued.append(name)
        self.over[name] = "Failed" if name in self.fails else "Success"

    def finished(self, names):
        return {name: ("e", "b") for name in names if self.over.get(name) == "Success"}

    def log(self, name):
        return ["noise", f"ERROR: failed to reproduce '{self.fails[name]}': exited with 1"]

    def remove(self, name, base):
        self.over.pop(name)

    def start(self):
        pass

    def forget(self, names):
        assert not names


def ended(monkeypatch, queue, todo) -> dict[str, str]:
    monkeypatch.setattr(campaign, "POLL", 0.0)
    monkeypatch.setattr(campaign, "STATUS", 0.0)
    return {cell.name: how for cell, how in Campaign(queue, todo, lambda *_: "a file").run().items()}


CELLS = [Cell("s", defense, seed, None) for seed in (1, 2) for defense in "abc"]


def test_one_whole_cell_of_each_seed_comes_first(monkeypatch):
    queue = FakeQueue()
    assert set(ended(monkeypatch, queue, CELLS).values()) == {"done"}
    assert queue.queued[:2] == ["s-a-seed1", "s-a-seed2"] and len(queue.queued) == 6


def test_no_cell_is_queued_with_a_file_that_has_changed_meanwhile(monkeypatch, tmp_path):
    """The first of a seed is queued at the start, the others when it is done; a queued cell takes what is there then."""
    monkeypatch.setattr(campaign, "POLL", 0.0)
    path, queue = tmp_path / "params.yaml", FakeQueue()
    path.write_text("before")
    ended = Campaign(queue, CELLS[:3], lambda *_: path.write_text("after"), [path])
    with pytest.raises(UserError, match=r"params\.yaml has changed since the start.*the same command goes on"):
        ended.run()
    assert queue.queued == ["s-a-seed1"]


def test_seeds_side_by_side_read_the_data_once(monkeypatch):
    queue = FakeQueue()
    queue.jobs = 2
    assert len(ended(monkeypatch, queue, CELLS)) == 6
    assert queue.queued[0] == "s-prepare" and len(queue.queued) == 7


def test_a_failed_defense_hands_its_place_on_and_a_failed_victim_ends_its_seed(monkeypatch, capsys):
    queue = FakeQueue({"s-a-seed1": "score", "s-a-seed2": "train_victim"})
    found = ended(monkeypatch, queue, CELLS)
    assert found == {
        "s-a-seed1": "failed", "s-b-seed1": "done", "s-c-seed1": "done",
        "s-a-seed2": "failed", "s-b-seed2": "skipped", "s-c-seed2": "skipped",
    }  # fmt: skip
    assert "failed  s-a-seed1 " in capsys.readouterr().out


def test_what_runs_is_told_where_it_is_new(monkeypatch, capsys):
    logs = {"one": ["Running stage 'prepare':", "> python -m stages.prepare", "> python"], "two": []}
    queue = FakeQueue()
    monkeypatch.setattr(queue, "log", logs.__getitem__)
    found = Campaign(queue, CELLS, lambda *_: "a file")

    def told(seconds=61):
        found.told_at = time.monotonic() - seconds
        found.tell(logs)
        return capsys.readouterr().out

    assert told(59) == "", "less than a minute after the last time"
    assert told() == "running one: Running stage 'prepare'\n"
    logs["one"] += ["victim: epoch 3/30  loss 1.234  accuracy 0.567  8 s, 70 s left", "noise"]
    assert told() == f"running one: {logs['one'][-2]}\n"
    assert told() == "", "nothing new"


def test_a_task_that_was_removed_by_hand_is_not_waited_for(monkeypatch, capsys):
    queue = FakeQueue()
    monkeypatch.setattr(queue, "put", lambda name, changes: None)
    assert ended(monkeypatch, queue, CELLS[:1]) == {"s-a-seed1": "failed"}
    assert "no longer in the queue" in capsys.readouterr().out


def test_an_experiment_is_removed_from_its_commit_alone(clone, monkeypatch):
    """The same name on two commits: what a second start meets after a commit."""
    monkeypatch.chdir(clone.folder)
    bases = clone.git("rev-parse", "HEAD").strip(), "ab" + "c" * 38
    for base in bases:
        clone.git("update-ref", f"refs/exps/{base[:2]}/{base[2:]}/twice", "HEAD")
    queue = Queue(1)
    assert set(queue.experiments()["twice"].values()) <= set(bases) and queue.finished(["twice"]) == {}
    queue.remove("twice", bases[0])
    assert list(queue.experiments()["twice"].values()) == [bases[1]]
    clone.git("update-ref", "-d", f"refs/exps/{bases[1][:2]}/{bases[1][2:]}/twice")


def test_the_table_of_dvc_is_read():
    text = (
        "Task     Name                 Created    Status\n"
        "aa04941  s-a-seed1            11:18 PM   Running\n"
        "264657c  tiny-b_c-seed1-auto  Nov 22, 2026  Failed\n\n"
        "Worker status: 2 active, 1 idle\n"
    )
    assert ROW.findall(text) == [("s-a-seed1", "Running"), ("tiny-b_c-seed1-auto", "Failed")]
    assert WORKERS.search(text).groups() == ("2", "1")
    assert EXPERIMENT.match(f"refs/exps/ab/{'c' * 38}/s-a-seed1")[3] == "s-a-seed1"
    assert not EXPERIMENT.match("refs/exps/exec/EXEC_HEAD")
