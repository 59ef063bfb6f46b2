"""Cells by plain commands: the same files as DVC makes, nothing twice, and a time limit that loses nothing."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_pipeline import LEFT, RIGHT, Clone

from analysis import cells
from analysis.tasks import Runner, Task


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return Clone(tmp_path_factory.mktemp("cells"))


def run(clone, *words):
    done = subprocess.run(
        [sys.executable, "-m", "analysis.cells", "--settings", "tiny", "--seeds", "1", *words],
        cwd=clone.folder, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_computes_exports_and_resumes(clone):
    status, output = run(clone, "--defenses", "confidence_filter", "random_filter", "--time-limit", "0")
    assert status == 2 and "start" not in output and output.count("open") == 2, "no time, nothing started"

    status, output = run(clone, "--defenses", "confidence_filter", "random_filter", "--jobs", "2")
    assert status == 0, output
    assert output.count("start") == len(LEFT) + 2 * len(RIGHT), "victim and oracle are shared by the cells"
    assert "\n       artifacts/tiny/seed1/victim.pt: victim: epoch 1/1 " in output, "what a stage prints is passed on"
    for defense in ("confidence_filter", "random_filter"):
        found = json.loads((clone.folder / f"results/tiny/{defense}/seed1.json").read_text())
        assert found["metrics"]["cell"] == f"tiny/{defense}/seed1"
        assert found["conditions"]["runtime"]["retrained"]["precision"] == "fp32"
        assert found["conditions"]["commit"] == clone.git("describe", "--always").strip(), (
            "outputs make no commit dirty"
        )
        assert found["conditions"]["parameters"]["setting"]["train"]["epochs"] == 1
        assert {"victim", "oracle", "retrained", "score"} <= set(found["resources"])

    status, output = run(clone, "--defenses", "confidence_filter", "random_filter")
    assert status == 0 and "start" not in output, "a second run finds all done"

    path = clone.folder / "params.yaml"
    before = path.read_text()
    for old, other in (
        ("lr: 0.01", "lr: 0.011"), ("budget_multiplier: 1.0", "budget_multiplier: 1.5"), ("target_label: 1", "target_label: 2"),
    ):  # fmt: skip
        assert old in before
        path.write_text(before.replace(old, other))
        for words in (["--time-limit", "0"], ["--export-only"]):
            status, output = run(clone, "--defenses", "random_filter", *words)
            assert status == 2 and "open" in output, "figures never stand beside parameters they were not made with"
    path.write_text(before)

    for name, told in (
        ("random_filter/metrics.json", "retrained"),
        ("random_filter/metrics.json", "reference"),
        ("reference.json", "checkpoint"),
    ):
        file = clone.folder / "artifacts/tiny/seed1" / name
        whole = file.read_text()
        file.write_text(re.sub(rf'("{told}": ")\w{{64}}"', rf'\g<1>{"0" * 64}"', whole))
        assert file.read_text() != whole
        status, output = run(clone, "--defenses", "random_filter", "--export-only")
        assert status == 2 and "open" in output, "figures never stand beside models they were not measured on"
        file.write_text(whole[:40])
        status, output = run(clone, "--defenses", "random_filter", "--export-only")
        assert status == 1 and output.count("\n") == 1 and f"{name} is damaged" in output
        file.write_text(whole)
    status, output = run(clone, "--defenses", "random_filter", "--export-only")
    assert status == 0 and "cell" in output

    scores = clone.folder / "artifacts/tiny/seed1/random_filter/scores.h5"
    scores.write_bytes(scores.read_bytes() + b"x")
    status, output = run(clone, "--defenses", "random_filter")
    assert status == 0 and output.count("start") == 1, "a file that is not what was made is made again"

    scores.unlink()
    status, output = run(clone, "--defenses", "random_filter")
    assert status == 0 and output.count("start") == 1, "a lost file is made again, and being the same, nothing else"


def test_victims_alone(clone):
    words = ["--defenses", "random_filter", "scan", "--seeds", "2", "--up-to"]
    status, output = run(clone, *words, "extract")
    assert status == 0, output
    assert sorted(path.name for path in (clone.folder / "artifacts/tiny/seed2").glob("*.*t")) == ["victim.pt"]
    assert (clone.folder / "artifacts/tiny/seed2/features.h5").exists()
    assert not (clone.folder / "results/tiny/random_filter/seed2.json").exists()
    status, output = run(clone, *words, "victim")
    assert status == 1 and "no stage is called 'victim'; use one of check, evaluate, " in output and output.count("\n") == 1
    status, output = run(clone, *words, "extract", "--time-limit", "0")
    assert status == 0 and "start" not in output, "all done"
    status, output = run(clone, *words, "score", "--time-limit", "0")
    assert status == 2 and "start" not in output


def test_the_artifacts_enter_the_cache_of_dvc(clone):
    clone.git("checkout", "-q", "params.yaml")
    run(clone, "--defenses", "confidence_filter")
    clone.dvc("commit", "-f", "dvc.yaml")
    assert clone.ran("repro") == [], "DVC runs nothing that the plain commands have made"


def test_mistakes_are_told_before_work_begins(clone):
    status, output = run(clone, "--defenses", "nobody")
    assert status == 1 and "start" not in output and "Traceback" not in output
    assert "defense 'nobody' has no line in params.yaml" in output
    status, output = run(clone, "--settings", "quick-clean", "--defenses", "scan")
    assert status == 1 and "start" not in output and "setting quick-clean has no poison fraction" in output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--jobs", "0"], "--jobs is 0; expected 1 or more"),
        (["--seeds", "-1"], "seed -1: a seed is a whole number"),
        ([], "dvc.yaml is not there; run from the folder of the"),
    ],
)
def test_a_mistake_outside_a_checkout_is_one_line(tmp_path, words, told):
    done = subprocess.run(
        [sys.executable, "-m", "analysis.cells", "--settings", "quick", "--defenses", "scan", "--seeds", "1", *words],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"python -m analysis.cells: {told}") and done.stderr.count("\n") == 1


CONTROL = """#!{python}
import os, subprocess, sys
words = sys.argv[1:] or [sys.stdin.read().strip()]
with open({log!r}, "a") as file:
    print(*words, os.environ["CUDA_MPS_PIPE_DIRECTORY"], os.path.isdir(os.environ["CUDA_MPS_PIPE_DIRECTORY"]), file=file)
if words == ["-d"]:
    if {refuses}:
        sys.exit("An instance of this daemon is already running")
    subprocess.Popen(["/bin/sleep", "30"], start_new_session=True)  # a daemon that keeps what it was given open
elif {hangs}:
    import time
    time.sleep(60)
"""


@pytest.fixture
def control(tmp_path, monkeypatch):
    """A stand-in for NVIDIA's program on the path; ``control()`` writes it, and its log tells what it was asked."""
    for variable in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
        monkeypatch.delenv(variable, raising=False)

    def write(refuses=False, hangs=False):
        program, log = tmp_path / "nvidia-cuda-mps-control", tmp_path / "log"
        program.write_text(CONTROL.format(python=sys.executable, log=str(log), refuses=refuses, hangs=hangs))
        program.chmod(0o755)
        return log

    monkeypatch.setenv("PATH", str(tmp_path))
    return write


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_mps_runs_for_what_is_inside_and_no_longer(control, error):
    log = control()
    with contextlib.suppress(KeyboardInterrupt), cells.nvidia_mps():
        folder = os.environ["CUDA_MPS_PIPE_DIRECTORY"]
        assert log.read_text() == f"-d {folder} True\n", "started before anything else is"
        if error:
            raise error
    assert log.read_text() == f"-d {folder} True\nquit {folder} True\n"
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ and not Path(folder).exists()


def test_mps_that_does_not_end_keeps_nothing_from_being_exported(control, monkeypatch):
    log = control(hangs=True)
    monkeypatch.setattr(cells, "MPS_QUIT_SECONDS", 2.0)
    with cells.nvidia_mps():
        pass
    assert "quit" in log.read_text() and "CUDA_MPS_PIPE_DIRECTORY" not in os.environ


def test_mps_that_cannot_be_had_is_one_line(control, monkeypatch, refuses):
    with refuses("--mps", "nvidia-cuda-mps-control is not there"), cells.nvidia_mps():
        pass
    log = control(refuses=True)
    with refuses("--mps", "An instance of this daemon is already running"), cells.nvidia_mps():
        pass
    assert "quit" not in log.read_text() and "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/elsewhere")
    with refuses("--mps", "CUDA_MPS_PIPE_DIRECTORY is set"), cells.nvidia_mps():
        pass
    assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == "/elsewhere"


@pytest.mark.parametrize(("error", "told"), [
    (FileNotFoundError(2, "No such file or directory", "data.h5"), "No such file or directory: data.h5"),
    (OSError("odd"), "odd: no file named"),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_one_line(monkeypatch, capsys, error, told):
    def refuse(_):
        raise error

    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(cells, "tasks_of", refuse)
    monkeypatch.setattr(sys, "argv", ["cells", "--settings", "quick", "--defenses", "scan", "--seeds", "1"])
    assert cells.main() == 1
    assert capsys.readouterr() == ("", f"python -m analysis.cells: {told}\n")


def test_a_failed_stage_skips_what_needs_it_and_nothing_else(tmp_path, monkeypatch, capsys):
    """Two chains of two tasks; the first task of one fails."""
    monkeypatch.chdir(tmp_path)

    def task(name, code, deps=()):
        return Task(name, f"python -c '{code}'", [tmp_path / d for d in deps], [tmp_path / name], {})

    tasks = [
        task("bad", 'import sys; print("why"); sys.exit(3)'),
        task("after-bad", 'open("after-bad", "w")', ["bad"]),
        task("good", 'open("good", "w")'),
        task("after-good", 'open("after-good", "w")', ["good"]),
    ]
    tasks[1].after, tasks[3].after = {tasks[0].command}, {tasks[2].command}
    runner = Runner(2, float("inf"))
    outcome = runner.run({one.command: one for one in tasks})
    assert [outcome[one.command] for one in tasks] == ["failed", "skipped", "ran", "ran"]
    assert re.search(r"^failed .*bad after \d+ s: why$", capsys.readouterr().out, re.M)
    assert Runner(1, float("inf")).run({tasks[3].command: tasks[3], tasks[2].command: tasks[2]}) == {
        tasks[2].command: "done", tasks[3].command: "done",
    }  # fmt: skip


def test_what_a_stage_prints_is_passed_on_while_it_runs(tmp_path, monkeypatch):
    """The stage ends only once its first line has arrived, which it does not flush; a bar is one line, its last state."""
    monkeypatch.chdir(tmp_path)
    told = []

    def tell(line):
        told.append(line)
        if line.endswith("early"):
            (tmp_path / "go").touch()

    monkeypatch.setattr("analysis.tasks.tell", tell)
    (tmp_path / "stage.py").write_text(
        "import os, sys, time\n"
        "print('early')\n"
        "end = time.monotonic() + 30\n"
        "while not os.path.exists('go') and time.monotonic() < end: time.sleep(0.01)\n"
        "sys.stdout.buffer.write(b'1%\\r50%\\r100%\\n\\n\\xff\\n')\n"
        "open('made', 'w').close()\n"
        "sys.exit(not os.path.exists('go'))\n"
    )
    task = Task("stage", "python stage.py", [], [tmp_path / "made"], {})
    assert Runner(1, float("inf")).run({task.command: task}) == {task.command: "ran"}
    assert [line.rpartition(": ")[2] for line in told[1:-1]] == ["early", "100%", "\ufffd"]


def test_a_reader_that_goes_away_leaves_no_stage_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def tell(line):
        if "told" in line:
            raise BrokenPipeError

    monkeypatch.setattr("analysis.tasks.tell", tell)
    code = 'import time; print("told"); time.sleep(60)'
    task = Task("stage", f"python -c '{code}'", [], [tmp_path / "never"], {})
    runner, started = Runner(1, float("inf")), time.monotonic()
    with pytest.raises(BrokenPipeError):
        runner.run({task.command: task})
    assert time.monotonic() - started < 20 and not runner.running


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def test_the_time_limit_interrupts_what_runs(tmp_path, monkeypatch, request, handler):
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    slow = Task("slow", "python -c 'import time; time.sleep(60)'", [], [tmp_path / "never"], {})
    started = time.monotonic()
    outcome = Runner(1, time.monotonic() + 1.0).run({slow.command: slow})
    assert outcome == {slow.command: "stopped"}
    assert time.monotonic() - started < 20
