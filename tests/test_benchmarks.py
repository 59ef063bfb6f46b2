"""The processes of the training benchmark: timed when all are warm, and none left behind."""

import argparse
import os
import sys
import time

import pytest

from benchmarks import training

CONTENDER = """#!{python}
import json, os, sys, time
print("x" * 200_000, "why", file=sys.stderr)
print("a line of a library")
folder = {folder!r}
with open(os.path.join(folder, str(os.getpid())), "w"):
    pass
if {dies} and len(os.listdir(folder)) == 2:
    sys.exit(3)
time.sleep(0.3 * len(os.listdir(folder)))
warm = time.monotonic()
print("ready", flush=True)
assert sys.stdin.readline() == "\\n"
print(json.dumps({{"warm": warm, "told": time.monotonic(), "words": sys.argv[1:]}}))
"""


@pytest.fixture
def contender(tmp_path, monkeypatch):
    """Writes a stand-in for Python with the benchmark; with `dies` the second of them fails. The folder tells who ran."""

    def write(dies=False):
        folder, program = tmp_path / "ran", tmp_path / "python"
        folder.mkdir()
        program.write_text(CONTENDER.format(python=sys.executable, folder=str(folder), dies=dies))
        program.chmod(0o755)
        monkeypatch.setattr(training.sys, "executable", str(program))
        return folder

    return write


ARGS = argparse.Namespace(seconds=0.5, n=64)


def test_several_are_timed_once_all_are_warm(contender):
    contender()
    found = training.in_processes("ours", "resnet20", ARGS, 3)
    assert max(one["warm"] for one in found) <= min(one["told"] for one in found)
    assert found[0]["words"][2:] == ["--contender", "ours", "--networks", "resnet20", "--seconds", "0.5", "--n", "64"]


def test_one_that_fails_ends_the_others(contender):
    folder, started = contender(dies=True), time.monotonic()
    with pytest.raises(SystemExit, match="ours failed on resnet20: .*why$"):
        training.in_processes("ours", "resnet20", ARGS, 2)
    assert time.monotonic() - started < 20
    for process in map(int, os.listdir(folder)):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
