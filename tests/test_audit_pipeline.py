"""The audit as DVC runs it: what stands in analysis/dvc.yaml, and what is trained again when."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from dvc.utils.hydra import apply_overrides
from PIL import Image
from test_dvc_yaml import closure, plain_deps
from test_pipeline import Clone

ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    name: stage
    for name, stage in yaml.safe_load((ROOT / "analysis/dvc.yaml").read_text())["stages"].items()
    if name.startswith("audit")
}


def commands(stage: dict) -> list[str]:
    return [stage["cmd"]] if isinstance(stage["cmd"], str) else stage["cmd"]


@pytest.mark.parametrize("name", STAGES)
def test_deps_are_the_import_closure(name):
    stage, modules = STAGES[name], set()
    for command in commands(stage):
        modules |= closure(re.match(r"python -m ([\w.]+) ", command)[1].replace(".", "/") + ".py")
    listed = {dep for dep in plain_deps(stage) if dep.endswith(".py") and "${" not in dep}
    assert listed == modules
    assert stage["wdir"] == ".."


@pytest.mark.parametrize("name", STAGES)
def test_every_path_is_declared(name):
    stage = STAGES[name]
    words = {word for command in commands(stage) for word in command.split() if word.startswith("artifacts/")}
    outs = [next(iter(out)) if isinstance(out, dict) else out for out in stage["outs"]]
    declared = {path for path in [*plain_deps(stage), *outs] if path.startswith("artifacts/")}
    if name == "audit":  # it is told the folder
        declared = {path.rpartition("/")[0] if "${defense}" in path else path for path in declared}
    assert words == declared


def test_no_truth_is_asked_for_on_this_path():
    text = yaml.safe_dump(STAGES)
    assert "oracle" not in text and "evaluate" not in text and "--rows clean" not in text
    own = yaml.safe_load((ROOT / "params.yaml").read_text())["settings"]["own"]
    assert own["poison"] == {"trigger": {"name": "none"}, "poison_fraction": None}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A checkout whose setting `own` is one epoch on a folder of 3 x 12 images, in a place with an awkward name."""
    folder = tmp_path_factory.mktemp("clone")
    made, images = Clone(folder), tmp_path_factory.mktemp("data") / "my images, [1], été"
    generator = np.random.default_rng(0)
    for split, n in (("train", 12), ("test", 2)):
        for name in ("ant", "bee", "fox"):
            (images / split / name).mkdir(parents=True)
            for i in range(n):
                picture = Image.fromarray(generator.integers(0, 256, (20, 30, 3), np.uint8))
                picture.save(images / split / name / f"{i}.png")
    content = yaml.safe_load((folder / "params.yaml").read_text())
    content["defense"] = "whitened_mixture"
    content["settings"]["own"]["data"]["image_size"] = 32
    content["settings"]["own"]["train"] |= {"epochs": 1, "batch_size": 12, "lr": 0.01}
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    made.commit("own")
    made.images = images
    return made


def test_which_stages_run(clone):
    def ran(*words):
        said.append(clone.dvc(*words))
        return re.findall(r"Running stage 'analysis/dvc.yaml:(\w+)'", said[-1])

    said = []
    chain = ["audit_prepare", "audit_train", "audit_extract", "audit"]
    target = "analysis/dvc.yaml:audit"
    path = f"settings.own.data.path='{clone.images}'"
    assert "Running stage 'prepare'" in clone.dvc("repro", "--dry", "prepare"), "the root is valid without the folder"
    assert ran("exp", "run", "-S", path, target) == chain
    assert "\nmodel: resnet20 on 36 rows, 1 epochs, " in said[-1], "nobody knows of a victim"
    out = clone.folder / "artifacts/audit/seed1/whitened_mixture"
    assert json.loads((out / "summary.json").read_text())["rows"] == 36
    assert len((out / "suspects.csv").read_text().splitlines()) == 37
    kept = (out / "kept.txt").read_text().splitlines()
    assert "train/ant/0.png" in kept and not any(name.startswith("test/") for name in kept)
    assert not (out / "accuracy.json").exists(), "retraining is asked for by name"

    assert ran("repro", target) == [], "a second run"
    picture = Image.open(clone.images / "train/ant/0.png").rotate(180)
    picture.save(clone.images / "train/ant/new.png")
    assert ran("exp", "run", "-S", "audit.budget=5", target) == chain, "a file added trains again"
    assert json.loads((out / "summary.json").read_text())["removed"] == 5
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "expected 0 to 36" in clone.dvc("exp", "run", "-S", "audit.budget=5000", target, fails=True)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}, "a mistyped budget takes no report away"
    assert ran("exp", "run", "-S", "audit.budget=5", target) == []
    assert ran("repro", "analysis/dvc.yaml:audit_retrain") == ["audit_retrain"]
    found = json.loads((out / "accuracy.json").read_text())
    assert (found["n_test"], found["n_train"], found["n_kept"]) == (6, 37, 32)
    assert found["n_test_held_out_of_the_audited"] == 0, "they are of a folder of their own"
    assert 0 <= found["clean_acc_kept_rows"] <= 1 and 0 <= found["clean_acc_all_rows"] <= 1


def test_make_says_what_is_missing():
    ended = subprocess.run(
        ["make", "--no-print-directory", "audit", "--assume-old=install", "DATA=/no such folder"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode != 0 and "DATA=/no such folder is not there" in ended.stdout + ended.stderr


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_make_names_what_dvc_would_stop_at(tmp_path, kind):
    if kind == "link":
        (tmp_path / "odd").symlink_to(tmp_path / "gone")
    else:
        os.mkfifo(tmp_path / "odd")
    ended = subprocess.run(
        ["make", "-s", "audit", "--assume-old=install", f"DATA={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode != 0 and f"DVC stops at {tmp_path}/odd" in ended.stdout + ended.stderr


@pytest.mark.parametrize("name", ["my images, [1]", "l'été: a=b {c} (d) #e", "日本 50 % 'x' \"y\""])
def test_make_quotes_the_path(tmp_path, name):
    """What arrives is read as `dvc exp run -S` reads it."""
    folder = tmp_path / name
    folder.mkdir()
    (tmp_path / "dvc").write_text(f'#!{sys.executable}\nimport sys\nprint("\\n".join(sys.argv[1:]))\n')
    (tmp_path / "dvc").chmod(0o755)
    ended = subprocess.run(
        ["make", "-s", "audit", "--assume-old=install", f"DATA={folder}", "BUDGET=7", f"BIN={tmp_path}",
         f"PATH={tmp_path}:/usr/bin:/bin"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    words = ended.stdout.splitlines()
    assert words[:3] == ["exp", "run", "-S"] and words[4:] == [
        "-S", "settings.own.data.source=folder", "-S", "audit.budget=7", "-S", "defense=whitened_mixture",
        "analysis/dvc.yaml:audit",
    ], ended.stderr  # fmt: skip
    (tmp_path / "params.yaml").write_text("settings: {own: {data: {path: x}}}")
    apply_overrides(tmp_path / "params.yaml", [words[3]])
    found = yaml.safe_load((tmp_path / "params.yaml").read_text())
    assert found["settings"]["own"]["data"]["path"] == str(folder)
