"""What every stage does around its work: all of its outputs or none, and one line for whatever goes wrong."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.lib import stage
from stages.lib.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path):
    """A folder with an input and an old output."""
    (tmp_path / "input").write_text("input")
    (tmp_path / "old").write_text("old")
    return tmp_path


def content(folder) -> dict[str, str]:
    """Every file in it, hidden and temporary ones too."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_outputs_appear_at_the_end(folder):
    outputs = [folder / "old", folder / "new/inner/out"]
    with stage.Outputs(outputs, [folder / "input"]) as temporary:
        assert sorted(temporary) == sorted(outputs)
        for path in outputs:
            assert temporary[path].parent == path.parent  # so that giving it its name cannot fail half-way
            temporary[path].write_text("new")
        assert not outputs[1].exists() and outputs[0].read_text() == "old"
    assert content(folder) == {"input": "input", "old": "new", "new/inner/out": "new"}


def test_resources_stand_in_a_file_of_their_own(folder):
    with stage.Outputs([folder / "out"], [], resources=folder / "resources.json") as temporary:
        temporary[folder / "out"].write_text("new")
    found = json.loads((folder / "resources.json").read_text())
    assert set(found) == {"seconds", "peak_memory_mb"}
    assert found["seconds"] > 0 and 10 < found["peak_memory_mb"] < 1e6


def refused(folder, do, error=UserError, **arguments):
    """Nothing is published if `do` happens while a stage with two outputs runs; returns the error."""
    before = content(folder)
    stage_of_two = stage.Outputs([folder / "old", folder / "new"], [folder / "input"], **arguments)
    with pytest.raises(error) as caught, stage_of_two as temporary:
        for path in temporary.values():
            path.write_text("new")
        do()
    after = content(folder)
    assert {k: v for k, v in after.items() if k != "input"} == {k: v for k, v in before.items() if k != "input"}
    return str(caught.value)


@pytest.mark.parametrize("error", [ValueError, UserError, KeyboardInterrupt, SystemExit])
def test_nothing_is_written_after_an_error(folder, error):
    def fail():
        raise error("stop")

    assert refused(folder, fail, error) == "stop"


@pytest.mark.parametrize("change", ["edited", "removed"])
def test_nothing_is_written_if_an_input_changed(folder, change):
    path = folder / "input"
    message = refused(folder, lambda: path.write_text("other") if change == "edited" else path.unlink())
    assert message == f"{path} changed while this stage ran: nothing was written; run it again"


def test_nothing_is_written_if_an_input_appeared(folder):
    (folder / "input").unlink()
    assert "changed while" in refused(folder, lambda: (folder / "input").write_text("here"))


def test_an_editor_may_save_an_input_unchanged(folder):
    with stage.Outputs([folder / "out"], [folder / "input"]) as temporary:
        temporary[folder / "out"].write_text("new")
        (folder / "input").unlink()
        (folder / "input").write_text("input")
        os.utime(folder / "input", ns=(1, 1))
    assert (folder / "out").exists()


def test_a_large_input_is_watched_by_size_and_time(folder):
    path = folder / "input"
    path.write_bytes(bytes(1 << 20))
    times = path.stat().st_mtime_ns

    def touch():
        os.utime(path, ns=(times + 1, times + 1))

    assert f"{path} changed" in refused(folder, touch)
    with stage.Outputs([folder / "out"], [path]) as temporary:
        temporary[folder / "out"].write_text("new")
    assert (folder / "out").exists()


def test_nothing_is_written_if_the_parameters_changed(folder):
    parameters = {"lr": 0.1}
    message = refused(folder, lambda: parameters.update(lr=0.2), parameters=lambda: dict(parameters))
    assert "the parameters changed while this stage ran" in message

    def read():
        if parameters["lr"] != 0.2:
            raise UserError("wrong value")
        return parameters["lr"]

    assert "the parameters changed" in refused(folder, lambda: parameters.update(lr=-1), parameters=read)


def test_nothing_is_written_if_one_output_is_missing(folder):
    def forget():
        next(folder.glob(".new.*.tmp")).unlink()

    refused(folder, forget, FileNotFoundError)


@pytest.mark.parametrize("name", ["out", "resources"])
def test_a_folder_is_no_output(folder, refuses, name):
    (folder / name).mkdir()
    with refuses(folder / name, "is a folder"), stage.Outputs([folder / "out"], [], resources=folder / "resources"):
        raise AssertionError("refused before any work is done")


def test_what_is_read_is_not_written_over(folder, refuses):
    (folder / "in").write_text("features")
    (folder / "link").symlink_to(folder / "in")
    for out in ("in", "link"):
        with refuses(folder / out, "would be written over"), stage.Outputs([folder / out], [folder / "in"]):
            raise AssertionError("refused before any work is done")
    assert (folder / "in").read_text() == "features"


def test_wrong_parameters_are_refused_before_a_folder_is_made(folder, refuses):
    def read():
        raise UserError("wrong value")

    with refuses("wrong value"), stage.Outputs([folder / "a/b/out"], [], parameters=read):
        raise AssertionError("refused before any work is done")
    assert not (folder / "a").exists()


SCRIPT = """
import sys
from pathlib import Path
from stages.lib import errors, stage
from stages.lib.errors import UserError

edited, out = Path(sys.argv[1]), Path("out")
try:
    with stage.Outputs([out], []) as temporary:
        temporary[out].write_text("new")
        if edited.name == "gone.py":
            Path("stages/lib/errors.py").unlink()
        elif edited.name:
            edited.write_text(edited.read_text() + "# edited")
except UserError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    ("edited", "changed"),
    [("stages/lib/errors.py", "stages/lib/errors.py"), ("gone.py", "stages/lib/errors.py"), ("script.py", None),
     ("stages/lib/training.py", None), ("defenses/spectral_signature.py", None)],
)  # fmt: skip
def test_nothing_is_written_if_a_loaded_module_changed(tmp_path, edited, changed):
    for name in ("stages", "defenses"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py", edited], cwd=tmp_path, capture_output=True, text=True)
    if changed:
        assert done.stderr == f"{changed} changed while this stage ran: nothing was written; run it again\n"
    assert (done.returncode, (tmp_path / "out").exists()) == ((1, False) if changed else (0, True))
    assert not list(tmp_path.glob(".out*"))


def test_a_module_edited_while_the_next_ones_are_imported_is_seen(tmp_path):
    """torch takes seconds, and what was loaded before it may be edited meanwhile."""
    for name in ("stages", "defenses"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    edit = "from stages.lib import errors\nopen(errors.__file__, 'a').write('# edited')\n"
    (tmp_path / "script.py").write_text(edit + SCRIPT)
    done = subprocess.run([sys.executable, "script.py", ""], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.startswith("stages/lib/errors.py changed while") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("by_dvc", [True, False])
def test_nothing_is_written_if_dvc_has_ended(folder, monkeypatch, by_dvc):
    monkeypatch.setattr(stage, "_PARENT", os.getppid() + 1)
    if by_dvc:
        monkeypatch.setenv("DVC_STAGE", "score")
        assert "the dvc that started this stage has ended" in refused(folder, lambda: None)
    else:  # a shell that was closed
        monkeypatch.delenv("DVC_STAGE", raising=False)
        with stage.Outputs([folder / "out"], []) as temporary:
            temporary[folder / "out"].write_text("new")
        assert (folder / "out").exists()


@pytest.mark.parametrize("where", ["body", "resources"])
def test_a_full_disk_is_named(folder, monkeypatch, where):
    def full(*_):
        raise OSError(28, "No space left on device")

    if where == "resources":
        monkeypatch.setattr(stage, "_resources", full)
    outputs = stage.Outputs([folder / "old"], [], resources=folder / "resources.json")
    with pytest.raises(UserError, match=f"{folder / 'old'}, .*No space left .*make space"), outputs as temporary:
        temporary[folder / "old"].write_text("new")
        if where == "body":
            full()
    assert content(folder) == {"input": "input", "old": "old"}


def test_leftovers_of_dead_processes_are_removed(folder):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    gone = folder / f".old.{ended.pid}.tmp"
    stay = [folder / f".old.{os.getppid()}.tmp", folder / f".other.{ended.pid}.tmp", folder / f".old.x.{ended.pid}.tmp",
            folder / ".old.note.tmp", folder / f"old.{ended.pid}.tmp"]  # fmt: skip
    for path in (gone, *stay):
        path.write_text("half")
    with stage.Outputs([folder / "old"], []) as temporary:
        assert not gone.exists()
        temporary[folder / "old"].write_text("new")
    assert all(path.exists() for path in stay)


# run


def ended(main, monkeypatch) -> object:
    """What a command whose work is `main` passes to sys.exit."""
    monkeypatch.setattr(sys, "argv", ["anything"])
    with pytest.raises(SystemExit) as caught:
        stage.run(main, stage.parser("score", "words"))
    return caught.value.code


def raising(error):
    def main(args):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("a\n  b"), "python -m stages.score: a b"),
        (OSError(28, "No space left on device", "data.h5"), "No space left on device: data.h5; nothing was written"),
        (PermissionError(13, "Permission denied", Path("x/y")), "Permission denied: x/y; nothing was written"),
        (OSError("odd\nwords"), "odd words: no file named; nothing was written"),
        (MemoryError(), "out of memory; nothing was written"),
    ],
)
def test_one_line_for_a_mistake(monkeypatch, error, line):
    text = ended(raising(error), monkeypatch)
    assert text.startswith("python -m stages.score: ") and text.endswith(line) and "\n" not in text


def test_status_of_an_interruption(monkeypatch):
    assert ended(raising(KeyboardInterrupt()), monkeypatch) == 130


def test_a_mistake_of_the_programmer_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["anything"])
    with pytest.raises(ZeroDivisionError):
        stage.run(lambda args: 1 / 0, stage.parser("score", "words"))


def test_success_gives_the_options_to_the_work(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["anything", "--setting", "s", "--seed", "3", "--resources", "r.json"])
    options, seen = stage.parser("poison", "words"), []
    stage.add_setting(options)
    stage.add_seed(options)
    stage.add_resources(options)
    assert stage.run(seen.append, options) is None
    assert seen == [argparse.Namespace(params=Path("params.yaml"), setting="s", seed=3, resources=Path("r.json"))]


@pytest.mark.parametrize("source", ["main", "full"])
def test_the_process_ends_with_one_line_and_status_1(tmp_path, source):
    work = {"main": "raise UserError('one\\ntwo')", "full": "raise OSError(28, 'No space left on device', 'x')"}[source]
    script = f"from stages.lib import stage\nfrom stages.lib.errors import UserError\ndef main(args): {work}\n"
    script += "stage.run(main, stage.parser('score', ''))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch(r"python -m stages\.score: .+\n", done.stderr)


def test_naming_gives_an_error_the_file_that_it_lacks(refuses):
    with refuses("out.h5", "cannot be written", "disk is full"), stage.naming(Path("out.h5")):
        raise OSError("disk is full")
    with pytest.raises(OSError, match="other"), stage.naming(Path("out.h5")):
        raise OSError(28, "full", "other")


def test_a_message_is_one_line_that_a_terminal_can_show():
    assert str(UserError("two\n  lines \x1b[2J \ud800 \u202e é")) == "two lines \\x1b[2J \\ud800 \\u202e é"
