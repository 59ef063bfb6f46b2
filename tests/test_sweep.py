"""Sweeps on Ray: nothing trained twice, a lost node costs no finished work, and every mistake is one line."""

import functools
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import test_seeds
import yaml
from test_pipeline import LEFT, RIGHT, TINY, Clone

pytest.importorskip("ray")
from ruamel.yaml import YAML

from stages.lib import params
from sweep import cluster
from sweep.driver import with_changes

WORDS = ["--settings", "tiny", "--defenses", "random_filter", "confidence_filter"]
OF_A_CELL = RIGHT[1:]  # `check` is made once, before anything starts
run = functools.partial(test_seeds.run, module="sweep")
start = functools.partial(test_seeds.start, module="sweep")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return Clone(tmp_path_factory.mktemp("sweep"))


def another(clone, folder) -> Clone:
    """A second checkout of the same commit."""
    subprocess.run(["git", "clone", "-q", str(clone.folder), str(folder)], check=True)
    other = Clone.__new__(Clone)
    other.folder = folder
    return other


def stages_run(output: str) -> dict[str, list[str]]:
    """By task, in order of their ends."""
    found = re.findall(r"^done    (\S+) .*: ran ([\w ]+)", output, re.MULTILINE)
    return {name: [] if words.startswith("nothing") else sorted(words.split()) for name, words in found}


def figures(clone) -> dict[str, dict]:
    paths = (clone.folder / "results/tiny").glob("*/*.json")
    return {f"{path.parent.name}/{path.stem}": json.loads(path.read_text())["metrics"] for path in paths}


def repro(clone, cache, defense, seed) -> list[str]:
    """What `dvc repro` of a cell runs in a checkout with that cache, beside `check`."""
    clone.dvc("cache", "dir", "--local", str(cache))
    path = clone.folder / "params.yaml"
    path.write_text(with_changes(path.read_text(), {"defense": defense, "seed": seed}))
    return [name for name in clone.ran("repro") if name != "check"]


def test_victim_and_oracle_are_trained_once(clone, tmp_path):
    """Two cells that share them; another checkout with the same cache has nothing to run, a second start neither."""
    words = [*WORDS, "--seeds", "1", "--cache", str(tmp_path / "cache")]
    status, output = run(clone, *words)
    assert status == 0, output
    assert stages_run(output) == {
        "tiny-seed1-shared": sorted(LEFT),
        "tiny-random_filter-seed1": sorted(OF_A_CELL),
        "tiny-confidence_filter-seed1": sorted(OF_A_CELL),
    }
    assert clone.git("status", "--short").split() == ["??", "results/tiny/"], "the checkout is left as it was"
    found = json.loads((clone.folder / "results/tiny/random_filter/seed1.json").read_text())
    assert found["metrics"]["cell"] == "tiny/random_filter/seed1"
    assert clone.git("rev-parse", "HEAD").startswith(found["conditions"]["commit"])

    other = another(clone, tmp_path / "other")
    assert repro(other, tmp_path / "cache", "random_filter", 1) == []
    assert other.metrics() == found["metrics"]

    status, output = run(clone, *words)
    assert (status, output) == (
        0,
        "0 of 2 cells to run; the others have their result in results/ (--again runs them too)\n",
    )
    shutil.rmtree(clone.folder / "results/tiny")


@pytest.fixture(scope="module")
def undisturbed(clone, tmp_path_factory):
    """Figures of two defenses and two seeds, and what ran where, on a cluster of three nodes."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        words = [*WORDS, "--seeds", "1", "2", "--cache", str(tmp_path_factory.mktemp("cache") / "cache")]
        status, output = run(clone, *words, "--address", cluster.address)
    finally:
        cluster.shutdown()
    assert status == 0, output
    found = figures(clone)
    shutil.rmtree(clone.folder / "results/tiny")
    return found, output, words


@pytest.mark.slow
def test_a_grid_on_several_nodes(clone, undisturbed, tmp_path):
    found, output, words = undisturbed
    assert sorted(found) == [f"{name}/seed{k}" for name in ("confidence_filter", "random_filter") for k in (1, 2)]
    ran = stages_run(output)
    assert ran.pop("tiny-prepare") == ["prepare"]
    assert [ran.pop(f"tiny-seed{seed}-shared") for seed in (1, 2)] == [sorted(LEFT[1:])] * 2
    assert list(ran.values()) == [sorted(OF_A_CELL)] * 4
    assert len(set(re.findall(r"^running .* on (\S+)", output, re.MULTILINE))) > 1

    other = another(clone, tmp_path / "other")
    for cell in found:
        assert repro(other, words[-1], *cell.split("/seed")[:1], int(cell.split("/seed")[1])) == []
        assert other.metrics() == found[cell]

    status, output = run(clone, *words)
    assert status == 0 and figures(clone) == found
    assert set(map(tuple, stages_run(output).values())) == {()}, "lost results come back without any stage"
    shutil.rmtree(clone.folder / "results/tiny")


@pytest.mark.slow
def test_a_node_that_is_killed_costs_no_finished_work(clone, undisturbed, tmp_path):
    from ray.cluster_utils import Cluster

    cache = tmp_path / "cache"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = {node.node_id[:6]: node for node in (cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1))}
        words = [*WORDS, "--seeds", "1", "2", "--cache", str(cache), "--address", cluster.address]
        process, lines, killed = start(clone, *words), [], None
        for line in process.stdout:
            lines.append(line)
            if killed is None and (match := re.match(r"running tiny-seed(\d)-shared on \S+/(\w{6})", line)):
                victim = f"artifacts/tiny/seed{match[1]}/victim.pt"
                while not any(f"- path: {victim}" in path.read_text() for path in (cache / "runs").glob("*/*/*")):
                    assert process.poll() is None
                    time.sleep(0.1)
                killed = match
                cluster.remove_node(nodes[match[2]], allow_graceful=False)
        assert process.wait() == 0, "".join(lines)
    finally:
        cluster.shutdown()
    output = "".join(lines)
    assert killed and len(re.findall(rf"^running tiny-seed{killed[1]}-shared on", output, re.MULTILINE)) == 2
    assert "train_victim" not in stages_run(output)[f"tiny-seed{killed[1]}-shared"], "it had finished before"
    assert figures(clone) == undisturbed[0]
    shutil.rmtree(clone.folder / "results/tiny")


@pytest.mark.slow
def test_two_sweeps_on_one_cache(clone, tmp_path):
    other = another(clone, tmp_path / "other")
    words = [*WORDS, "--seeds", "1", "--cache", str(tmp_path / "cache")]
    sweeps = [start(one, *words) for one in (clone, other)]
    outputs = [sweep.communicate()[0] for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0], outputs
    assert figures(clone) == figures(other) and len(figures(other)) == 2
    ran = [stage for output in outputs for stages in stages_run(output).values() for stage in stages]
    assert sorted(ran) == sorted(LEFT + OF_A_CELL * 2), "each stage by one of the two"
    shutil.rmtree(clone.folder / "results/tiny")


@pytest.mark.slow
def test_a_remote_in_place_of_a_shared_folder(clone, tmp_path):
    remote = ["--remote", str(tmp_path / "remote"), "--cache", str(tmp_path / "copies")]
    status, output = run(clone, *WORDS, "--seeds", "1", *remote)
    assert status == 0, output
    assert sorted(stages_run(output).values()) == sorted([sorted(LEFT), sorted(OF_A_CELL), sorted(OF_A_CELL)])
    found = figures(clone)
    other = another(clone, tmp_path / "other")
    other.dvc("remote", "add", "--local", "--default", "r", str(tmp_path / "remote"))
    path = other.folder / "params.yaml"
    path.write_text(with_changes(path.read_text(), {"defense": "random_filter"}))
    # DVC pushes no output that is not cached, such as metrics.json: those are made again, from the models that it pulls.
    assert other.ran("repro", "--pull") == ["evaluate"]
    assert other.metrics() == found["random_filter/seed1"]
    shutil.rmtree(clone.folder / "results/tiny")


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(clone, tmp_path):
    process = start(
        clone, *WORDS, "--seeds", "1", "--cache", str(tmp_path / "cache"), TMPDIR=str(tmp_path), RAY_TMPDIR="/tmp"
    )
    while "running" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and output == "stopped: 0 cells ended, 2 are left; the same command goes on\n"
    for _ in range(60):
        if not list(tmp_path.glob("sweep-*")):  # the folder goes after the processes in it
            break
        time.sleep(0.5)
    else:
        raise AssertionError("a task's folder is still there")
    assert not list((tmp_path / "cache/sweep").glob("*.token")) and not (clone.folder / "results/tiny").exists()


@pytest.mark.slow
def test_a_failure_of_one_defense_takes_no_other_down(clone, mistaken, tmp_path):
    """A budget of more rows than there are shows itself in `filter`; data that are not there in `prepare`."""
    cache = ["--seeds", "1", "--cache", str(tmp_path / "cache")]
    status, output = run(clone, *WORDS, *cache, "--budget", "100000")
    assert status == 1 and "Traceback" not in output
    assert "the budget is to remove 100000 of 200 rows" in output and "ERROR: failed to reproduce 'filter'" in output
    assert output.splitlines()[-1].startswith("2 of 2 cells have no result: tiny-random_filter-seed1-budget100000, ")
    status, output = run(clone, "--settings", "absent", "tiny", *WORDS[2:4], *cache)
    assert status == 1 and "Traceback" not in output
    assert "failed  absent-seed1-shared" in output
    assert re.search(r"skipped absent-random_filter-seed1 \(\d of 2\): absent-seed1-shared failed", output)
    assert list(figures(clone)) == ["random_filter/seed1"]
    shutil.rmtree(clone.folder / "results/tiny")


SEED = ["--seeds", "1"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--settings", "nowhere", *SEED], "nowhere"),
        (["--settings", "tiny", *SEED, "--defenses", "nobody"], "nobody"),
        ([*WORDS, "--seeds", "-1"], "seed -1"),
        ([*WORDS, *SEED, "--budget", "many"], "--budget is 'many'"),
        ([*WORDS, *SEED, "--cpus-per-training", "0"], "--cpus-per-training is 0.0; expected 0.01 or more"),
        ([*WORDS, *SEED, "--cpus-per-training", "inf"], "--cpus-per-training is inf; expected"),
        (
            [*WORDS, *SEED, "--gpus-per-training", "1.5"],
            "--gpus-per-training is 1.5; expected 0, 0.01 to 1, or a whole",
        ),
        ([*WORDS, *SEED, "--retries", "-1"], "--retries is -1"),
        ([*WORDS, *SEED, "--remote", "https://example.org/x"], "DVC keeps no list of what ran over HTTP"),
        ([*WORDS, *SEED, "--remote", "nobody"], "--remote nobody: no such DVC remote"),
        ([*WORDS, *SEED, "--cache", "params.yaml"], "give --cache a folder"),
        (
            ["--settings", "second-picture", *SEED, "--defenses", "random_filter"],
            "reads pictures/mine.png, which is not in git",
        ),
        (
            ["--settings", "relative", *SEED, "--defenses", "random_filter"],
            "which is not in git; give an absolute path",
        ),
        ([*WORDS, *SEED, "--address", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"),
        ([*WORDS, *SEED, "--cpus-per-training", "1000"], "no machine has the 1000 CPUs and 0 GPUs of a training"),
    ],
)
def test_mistakes_are_one_line(mistaken, words, told):
    status, output = run(mistaken, *words)
    lines = [line for line in output.splitlines() if "cells to run" not in line]
    assert status == 1 and told in output and len(lines) == 1, output


@pytest.fixture(scope="module")
def mistaken(clone):
    """With a setting whose data are not in git, and one whose data are nowhere."""
    path = clone.folder / "params.yaml"
    values = yaml.safe_load(path.read_text())
    own = {"source": "folder", "image_size": 32}
    values["settings"]["relative"] = TINY | {"data": own | {"path": "images"}}
    twice = {"trigger": {"name": "badnets"}, "second_trigger": {"name": "blend", "pattern": "pictures/mine.png"}}
    twice |= {"attack": "two_targets", "poison_fraction": 0.1, "second_target_label": 3}
    values["settings"]["second-picture"] = TINY | {"poison": twice}
    values["settings"]["absent"] = TINY | {"data": own | {"path": "/nowhere/images"}}
    path.write_text(yaml.safe_dump(values))
    clone.commit("settings that cannot run")
    return clone


def test_a_machine_that_does_not_see_the_cache_is_refused(tmp_path, refuses):
    cluster.connect(None)
    try:
        (tmp_path / "token").touch()
        cluster.check_sees(str(tmp_path / "token"))
        with refuses(socket.gethostname(), f"does not see {tmp_path / 'nowhere'}: give --cache"):
            cluster.check_sees(str(tmp_path / "nowhere/sweep/token"))
    finally:
        cluster.leave()


def test_code_that_is_not_committed_is_refused(clone):
    path = clone.folder / "stages/score.py"
    before = path.read_text()
    path.write_text(before + "\n# edited\n")
    status, output = run(clone, *WORDS, *SEED)
    path.write_text(before)
    assert status == 1 and output == (
        "python -m sweep: stages/score.py: not committed, and the machines get the last commit; commit first\n"
    )


def test_without_ray_it_says_how_to_install_it(clone):
    hide = "import sys, runpy; sys.modules['ray'] = None; runpy.run_module('sweep', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hide, *WORDS, *SEED], cwd=clone.folder, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("python -m sweep: Ray is not installed; `pip install '.[cl")
    assert len(done.stderr.splitlines()) == 1


def test_both_readers_see_the_other_values_as_before():
    """DVC reads YAML 1.2 and the stages 1.1, in which a word such as off is a word only in quotes."""
    odd = """{x: 1e-5, mode: "off", time: '1:30', yes: 'yes', octal: 010, "on": [0o17, "~", "null", '1_0']}"""
    text = f"setting: one\na: {odd}\nlong: '{'word ' * 100}'\n"
    new = with_changes(text, {"setting": "two"})
    for read in (params.load_yaml, YAML(typ="safe").load):
        assert read(new) == read(text) | {"setting": "two"}


def test_a_cell_is_written_into_the_parameters_and_nothing_else_is():
    text = "a: {x: 1e-5} # kept\nsetting: one\nfilter:\n  budget: fraction\n"
    new = with_changes(text, {"setting": "two", "filter.budget": 72})
    assert new == "a: {x: 1e-5} # kept\nsetting: two\nfilter:\n  budget: 72\n"
