"""What several test files share: a stage run as a command within this process, and the check of a refusal."""

import contextlib
import copy
import io
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from stages.lib.errors import UserError

# One epoch on 200 digits of 8 x 8; a few milliseconds to prepare and a second to train.
TINY = {
    "data": {"source": "digits", "image_size": 8, "train_per_class": 20, "test_per_class": 5},
    "poison": {"trigger": {"name": "badnets", "patch_size": 3}, "poison_fraction": 0.1, "target_label": 2},
    "model": {"network": "resnet20"},
    "train": {"epochs": 1, "batch_size": 32, "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4, "crop_padding": 1,
              "flip": False},
}  # fmt: skip


class Ended(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def command():
    """``command("score", "--out", path, cwd=folder, BACKDOOR_DEVICE="cpu")``: what ``python -m stages.score`` does; a name
    with a dot, such as ``analysis.audit``, is the whole one.

    In this process, since most stages import torch, which takes two seconds; the device is the CPU if none is given.
    """

    def run(name, *words, cwd=None, **environment) -> Ended:
        out, err, status = io.StringIO(), io.StringIO(), 0
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # imported by a test file
            patch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
            for variable in ("BACKDOOR_PRECISION", "BACKDOOR_COMPILE", "BACKDOOR_DATA_ROOT"):
                patch.delenv(variable, raising=False)
            for variable, value in ({"BACKDOOR_DEVICE": "cpu"} | environment).items():
                patch.setenv(variable, value)
            if cwd is not None:
                patch.chdir(cwd)
            try:
                runpy.run_module(name if "." in name else f"stages.{name}", run_name="__main__")
            except SystemExit as end:
                status = end.code or 0
        if isinstance(status, str):  # the interpreter prints it and ends with status 1
            return Ended(1, out.getvalue(), f"{err.getvalue()}{status}\n")
        return Ended(status, out.getvalue(), err.getvalue())

    return run


class Disk(NamedTuple):
    folder: Path

    def leave(self, free: int) -> None:
        """Fill it with a file `filler` so that so many bytes are free."""
        (self.folder / "filler").unlink(missing_ok=True)
        (self.folder / "filler").write_bytes(bytes(shutil.disk_usage(self.folder).free - free))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MB (a tmpfs, which needs Linux and root)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        sys.platform != "linux"
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("a small disk cannot be mounted here: it takes Linux and root")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def refuses():
    """``with refuses("a", "b"):`` expects a `UserError` of one line that holds these words."""

    @contextlib.contextmanager
    def check(*words):
        with pytest.raises(UserError) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert str(word) in message

    return check


@pytest.fixture(scope="session")
def write_params():
    """Write a parameter file with the settings that are given as changes of a tiny one; returns its path."""

    def write(path: Path, **settings: dict) -> Path:
        content = {
            "setting": "tiny", "defense": "random_filter", "seed": 3,
            "filter": {"budget": "fraction", "budget_multiplier": 1.0},
            "defenses": {"random_filter": {}, "spectral_signature": {}},
            "settings": {},
        }  # fmt: skip
        for name, changes in settings.items():
            content["settings"][name] = copy.deepcopy(TINY)
            for block, values in changes.items():
                content["settings"][name][block] |= values
        path.write_text(yaml.safe_dump(content))
        return path

    return write
