"""The audit as DVC runs it: what stands in analysis/dvc.yaml, and what is trained again when."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from dvc.utils.hydra import apply_overrides
from filelock import FileLock
from PIL import Image
from test_dvc_yaml import closure, plain_deps
from test_pipeline import Clone

from analysis import audit_images

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


def make(*words):
    return subprocess.run(
        ["make", "--no-print-directory", "-s", "audit", "--assume-old=install", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "DATA= is not there"),
        (("DATA=/no such folder",), "DATA=/no such folder is not there"),
        (("DATA=tests", "BUDGET=10 %"), "BUDGET=10 %; expected auto or a number of rows"),
        (("DATA=tests", "DEFENSE=nonsense"), "defense 'nonsense' has no line in params.yaml"),
        (("DATA=tests", "DEFENSE=spectre"), "relies on the share of poisoned rows"),
        (("DATA=tests", "OPTIONS=k=1"), "has no option k"),
        (("DATA=tests", "OPTIONS=k"), "expected KEY=VALUE"),
    ],
)
def test_make_refuses_before_anything_is_trained(words, message):
    ended = make(*words)
    assert ended.returncode != 0 and message in ended.stderr and "make audit: " in ended.stderr
    assert "Traceback" not in ended.stderr and not ended.stdout


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_make_names_what_dvc_would_stop_at(tmp_path, kind):
    if kind == "link":
        (tmp_path / "odd").symlink_to(tmp_path / "gone")
    else:
        os.mkfifo(tmp_path / "odd")
    ended = make(f"DATA={tmp_path}")
    assert ended.returncode != 0 and f"DVC stops at {tmp_path}/odd" in ended.stderr


def test_one_audit_at_a_time(clone):
    before = (clone.folder / "params.yaml").read_bytes()
    (clone.folder / ".dvc/tmp").mkdir(parents=True, exist_ok=True)
    with FileLock(clone.folder / audit_images.LOCK):
        ended = subprocess.run(
            [sys.executable, "-m", "analysis.audit_images", clone.images],
            cwd=clone.folder, capture_output=True, text=True,
        )  # fmt: skip
    assert ended.returncode == 1 and "another audit is at work in this checkout" in ended.stderr
    assert (clone.folder / "params.yaml").read_bytes() == before


@pytest.mark.parametrize("name", ["my images, [1]", "l'été: a=b {c} (d) #e", "日本 50 % 'x' \"y\"", "UP.NPZ"])
def test_paths_and_options_arrive_as_they_are(tmp_path, name):
    """What is handed over is read as `dvc exp run -S` reads it."""
    args = SimpleNamespace(
        data=str(tmp_path / name),
        budget="7",
        option=["use_class_sizes=false", "threshold=8.5"],
        defense="whitened_mixture",
    )
    words = audit_images.overrides(args)
    assert words[::2] == ["-S"] * 5
    content = {"settings": {"own": {"data": {"path": "x"}}}, "audit": {}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    apply_overrides(tmp_path / "params.yaml", [f"++{word}" for word in words[1::2]])
    assert yaml.safe_load((tmp_path / "params.yaml").read_text()) == {
        "settings": {"own": {"data": {"path": args.data, "source": "npz" if name == "UP.NPZ" else "folder"}}},
        "audit": {"budget": 7, "options": "use_class_sizes=false threshold=8.5"},
        "defense": "whitened_mixture",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--budget", "5000"), r"BUDGET=5000, and there are \d+ rows to score; expected auto, or 0 to \d+"),
        (("--retrain",), "RETRAIN=1, and no test images to compare the models on: add a test folder"),
    ],
)
def test_what_the_images_do_not_allow_is_refused_before_anything_is_trained(clone, tmp_path, words, message):
    images = tmp_path / "images"
    shutil.copytree(clone.images / "train", images)
    ended = subprocess.run(
        [sys.executable, "-m", "analysis.audit_images", images, *words], cwd=clone.folder, capture_output=True, text=True
    )
    assert ended.returncode == 1 and re.search(message, ended.stderr), ended.stderr
    assert "audit_train" not in ended.stdout


def test_the_audit_by_make_says_the_verdict_again_and_takes_old_accuracies_away(clone):
    def audited(*words):
        done = subprocess.run(
            [sys.executable, "-m", "analysis.audit_images", clone.images, *words],
            cwd=clone.folder, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = clone.folder / "artifacts/audit/seed1/whitened_mixture"
    assert "accuracy on 6 test images" in audited("--budget", "3", "--retrain")
    said = audited("--budget", "3")
    assert "didn't change, skipping" in said and "3 most suspicious rows, as many as asked for" in said
    assert (out / "accuracy.json").exists(), "the same rows are kept"
    said = audited("--budget", "4", "--options", "use_class_sizes=false")
    assert json.loads((out / "summary.json").read_text())["options"] == {"use_class_sizes": False}
    assert not (out / "accuracy.json").exists() and not (out / "retrained.pt").exists(), "of three rows, not four"
    audited("--budget", "4")
    assert json.loads((out / "summary.json").read_text())["options"] == {}, "an option does not stay"
