"""The stages as commands, from images to figures on a one-epoch setting: bytes, figures, and one line per mistake."""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from stages.lib import checkpoints, datasets, device, metrics, sealed, storage
from stages.lib.poisoning import open_poisoned, read_index

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("check", "prepare", "poison", "train", "extract", "score", "filter", "evaluate_reference", "evaluate")

# Name -> command. {out} begins the names of the outputs; inputs are those of the first run, which begin with a/.
CELL = "--params params.yaml --setting {setting}"
DATA = "--data a/data.h5 --index a/poison.h5"
COMMANDS = {
    "prepare": f"prepare {CELL} --out {{out}}data.h5",
    "poison": f"poison {CELL} --seed 3 --data a/data.h5 --out {{out}}poison.h5",
    "victim": f"train {CELL} --seed 3 {DATA} --rows all --out {{out}}victim.pt",
    "oracle": f"train {CELL} --seed 3 {DATA} --rows clean --out {{out}}oracle.pt",
    "extract": f"extract {DATA} --checkpoint a/victim.pt --out {{out}}features.h5",
    "score": "score --params params.yaml --defense {defense} --seed 3 --features a/features.h5 --out {out}scores.h5",
    "filter": "filter --params params.yaml --scores a/scores.h5 --out {out}kept.h5",
    "retrained": f"train {CELL} --seed 3 {DATA} --rows a/kept.h5 --out {{out}}retrained.pt",
    "reference": f"evaluate_reference {DATA} --victim a/victim.pt --oracle a/oracle.pt --out {{out}}reference.json",
    "evaluate": f"evaluate --setting {{setting}} --seed 3 {DATA} --scores a/scores.h5 --kept a/kept.h5 "
    "--checkpoint a/retrained.pt --reference a/reference.json "
    "--metrics {out}metrics.json --cell-metrics {out}cell.json --plots {out}plots",
}


class Chain:
    """All stages of one setting, run in a folder of their own; `ended` holds what each said."""

    def __init__(self, folder, command, setting, defense):
        self.folder, self.command, self.setting, self.defense = folder, command, setting, defense
        self.ended = {}

    def run(self, name, out, extra=(), **environment):
        """Run one of the commands; a later option overrides an earlier one."""
        words = COMMANDS[name].format(out=out, setting=self.setting, defense=self.defense).split()
        return self.command(words[0], *words[1:], *extra, cwd=self.folder, **environment)

    def run_all(self):
        for name in COMMANDS:
            self.ended[name] = self.run(name, "a/", ("--resources", f"{name}.resources.json"))
            assert self.ended[name].status == 0, self.ended[name].err
        return self

    def metrics(self) -> dict:
        return json.loads((self.folder / "a/metrics.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For bytes that do not depend on the number of cores; networks as small as these gain nothing by more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, command, write_params, one_thread):
    folder = tmp_path_factory.mktemp("chain")
    write_params(folder / "params.yaml", tiny={})
    return Chain(folder, command, "tiny", "spectral_signature").run_all()


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file in it by its path, hidden and temporary ones too; but for locks, which stay behind."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Bytes


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_run_to_other_paths_gives_the_same_bytes(chain, tmp_path, name):
    again = chain.run(name, f"{tmp_path}/again-")
    assert again.status == 0
    found = {path.removeprefix("again-"): content for path, content in files_of(tmp_path).items()}
    first = files_of(chain.folder / "a")
    assert found and found == {path: first[path] for path in found}
    assert again.out.replace(f"{tmp_path}/again-", "a/") == chain.ended[name].out


def test_all_trainings_of_a_cell_are_compiled_alike(chain, tmp_path, monkeypatch):
    """Decided by the steps over all 200 rows: with 180 kept ones an epoch has one full step fewer."""
    told, decide = [], device.decide
    monkeypatch.setattr(device, "decide", lambda runtime, work=None: told.append(work) or decide(runtime, work))
    for name in ("victim", "oracle", "retrained"):
        assert chain.run(name, f"{tmp_path}/").status == 0
    assert [work.steps for work in told] == [200 // 32] * 3


def test_the_chain_leaves_its_outputs_and_nothing_else(chain):
    names = [f"{name}.h5" for name in ("data", "features", "kept", "poison", "scores")]
    names += [f"{name}.pt" for name in ("oracle", "retrained", "victim")]
    names += [f"{name}.json" for name in ("cell", "metrics", "reference")]
    names += [f"plots/{name}.csv" for name in ("recall", "scores", "training")]
    assert sorted(files_of(chain.folder / "a")) == sorted(names)
    assert not [path for path in files_of(chain.folder) if path.startswith(".scratch/")]


def full_disks():
    """Bytes that are free: none, too few for any output, enough for HDF5 to begin and for small outputs."""
    for name in COMMANDS:
        yield pytest.param(name, 0, marks=pytest.mark.slow)
        yield pytest.param(name, 4096, marks=[pytest.mark.slow] if name in ("oracle", "retrained", "evaluate") else [])
    yield from ((name, storage.RESERVE + 4096) for name in ("prepare", "extract"))


@pytest.mark.parametrize(("name", "free"), list(full_disks()))
def test_a_full_disk_is_one_line_and_nothing_is_half_written(chain, small_disk, name, free):
    """In a process of its own, since HDF5 may take the whole process with it."""
    out, words = f"{small_disk.folder}/", ("--resources", f"{small_disk.folder}/resources.json")
    small_disk.leave(free)
    stage, *options = COMMANDS[name].format(out=out, setting=chain.setting, defense=chain.defense).split()
    ended = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}", *options, *words], capture_output=True, text=True,
        cwd=chain.folder, env=os.environ | {"PYTHONPATH": str(ROOT), "BACKDOOR_DEVICE": "cpu"},
    )  # fmt: skip
    said = [line for line in ended.stderr.splitlines() if "epoch 1/1" not in line]
    assert ended.returncode == 1 and len(said) == 1, ended
    assert f"{out}" in said[0] and "No space left on device" in said[0]
    assert [path.name for path in small_disk.folder.rglob("*") if path.is_file()] == ["filler"]
    (small_disk.folder / "filler").unlink()
    assert chain.run(name, out, words).status == 0
    found = files_of(small_disk.folder)
    del found["resources.json"]
    assert found == {path: files_of(chain.folder / "a")[path] for path in found}


def test_the_oracle_and_a_filter_that_keeps_the_same_rows_give_the_same_model(chain, tmp_path):
    index = read_index(chain.folder / "a/poison.h5")
    about = {"n": index.n, "index": storage.digest(chain.folder / "a/poison.h5")}
    storage.write(tmp_path / "kept.h5", "kept_rows", {"rows": np.flatnonzero(~index.poisoned)}, about)
    assert chain.run("retrained", f"{tmp_path}/", ("--rows", tmp_path / "kept.h5")).status == 0
    assert (tmp_path / "retrained.pt").read_bytes() == (chain.folder / "a/oracle.pt").read_bytes()


def test_resources_stand_apart(chain):
    for name in COMMANDS:
        found = json.loads((chain.folder / f"{name}.resources.json").read_text())
        assert set(found) >= {"seconds", "peak_memory_mb"}


# What the stages say and store


def test_data_set(chain):
    assert chain.ended["prepare"].out == "digits: 200 training and 50 test images in a/data.h5\n"
    with storage.open_(chain.folder / "a/data.h5", "dataset") as file:
        assert np.bincount(file["train/labels"][:]).tolist() == [20] * 10
        assert np.bincount(file["test/labels"][:]).tolist() == [5] * 10
        assert (np.diff(file["train/labels"][:]) < 0).sum() > 50  # not class by class


def test_features_are_those_of_the_victim(chain):
    poisoned = open_poisoned(chain.folder / "a/data.h5", chain.folder / "a/poison.h5")
    checkpoint = checkpoints.load(chain.folder / "a/victim.pt")
    model, train = checkpoint.model(), poisoned.train()
    pixels = torch.from_numpy(train.images).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (poisoned.mean, poisoned.std))
    with torch.no_grad():
        features = model.double().forward_features((pixels - mean) / std)
        logits = model.forward_head(features)
    with storage.open_(chain.folder / "a/features.h5", "features") as file:
        np.testing.assert_allclose(file["features"][:], features, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(file["logits"][:], logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(file["labels"][:], train.labels)
        assert file.attrs["poison_fraction"] == 0.1
        assert file.attrs["checkpoint"] == storage.digest(chain.folder / "a/victim.pt")
        assert set(file) == {"features", "logits", "labels"}  # nothing tells which rows are poisoned


def test_checkpoints_say_how_they_came_about(chain):
    for name, n_rows in (("victim", 200), ("oracle", 180), ("retrained", 180)):
        found = checkpoints.load(chain.folder / f"a/{name}.pt")
        assert found.conditions["n_rows"] == n_rows and found.conditions["seed"] == 3
        assert found.conditions["data"] == storage.digest(chain.folder / "a/data.h5")
        assert found.conditions["index"] == storage.digest(chain.folder / "a/poison.h5")
        assert found.conditions["recipe"]["epochs"] == len(found.history) == 1


def test_metrics(chain):
    found = chain.metrics()
    assert list(found) == [
        "cell", "clean_acc", "asr", "target_clean_acc", "rows_removed", "clean_removed", "poison_recall", "auroc",
        "average_precision", "undefended_clean_acc", "oracle_clean_acc", "gap_clean_acc", "defense_score",
        "undefended_asr", "undefended_target_clean_acc", "undefended_defense_score", "oracle_asr",
        "oracle_target_clean_acc", "oracle_defense_score", "gap_asr", "gap_defense_score",
    ]  # fmt: skip
    assert found["cell"] == "tiny/spectral_signature/seed3"
    assert all(type(value) in (int, float) for key, value in found.items() if key != "cell")
    made_from = {"retrained": "retrained.pt", "reference": "reference.json"}
    made_from = {name: storage.digest(chain.folder / "a" / file) for name, file in made_from.items()}
    assert json.loads((chain.folder / "a/cell.json").read_text()) == found | {"made_from": made_from}


def test_metrics_follow_from_the_files(chain):
    found = chain.metrics()
    index = read_index(chain.folder / "a/poison.h5")
    with h5py.File(chain.folder / "a/kept.h5") as file:
        removed = set(range(200)) - set(file["rows"][:].tolist())
    assert found["rows_removed"] == len(removed) == 20
    assert found["clean_removed"] == len(removed - set(index.rows.tolist()))
    assert found["poison_recall"] == len(removed & set(index.rows.tolist())) / 20
    assert found["defense_score"] == pytest.approx((found["clean_acc"] + 1 - found["asr"] + found["poison_recall"]) / 3)
    assert found["undefended_defense_score"] == pytest.approx(
        (found["undefended_clean_acc"] + 1 - found["undefended_asr"]) / 3
    )
    assert found["oracle_defense_score"] == pytest.approx((found["oracle_clean_acc"] + 1 - found["oracle_asr"] + 1) / 3)
    assert found["gap_clean_acc"] == found["oracle_clean_acc"] - found["clean_acc"]
    assert found["gap_asr"] == found["asr"] - found["oracle_asr"]
    assert found["gap_defense_score"] == found["oracle_defense_score"] - found["defense_score"]
    poisoned = open_poisoned(chain.folder / "a/data.h5", chain.folder / "a/poison.h5")
    for name, prefix in (("victim", "undefended_"), ("oracle", "oracle_"), ("retrained", "")):
        measured = metrics.of_model(checkpoints.load(chain.folder / f"a/{name}.pt"), poisoned, torch.device("cpu"))
        assert measured == {key: found[f"{prefix}{key}"] for key in ("clean_acc", "asr", "target_clean_acc")}


def test_plots(chain):
    rows = {}
    for name in ("scores", "recall", "training"):
        with open(chain.folder / f"a/plots/{name}.csv", newline="") as file:
            rows[name] = list(csv.DictReader(file))
    assert {row["rows"] for row in rows["scores"]} == {"clean", "poisoned"}
    curve = {(row["filter"], int(row["rows_removed"])): float(row["recall"]) for row in rows["recall"]}
    assert curve["this defense", 20] == chain.metrics()["poison_recall"] and curve["perfect filter", 20] == 1
    assert [(row["model"], row["epoch"]) for row in rows["training"]] == [
        ("undefended", "1"), ("retrained", "1"), ("oracle", "1")
    ]  # fmt: skip


def test_table(chain):
    lines = chain.ended["evaluate"].out.splitlines()
    found = chain.metrics()
    assert lines[0] == found["cell"] and lines[1].split() == ["clean_acc", "asr", "recall", "defense_score"]
    for line, name, prefix, recall in (
        (lines[2], "undefended", "undefended_", 0),
        (lines[3], "this defense", "", found["poison_recall"]),
        (lines[4], "oracle filter", "oracle_", 1),
    ):
        values = [found[f"{prefix}clean_acc"], found[f"{prefix}asr"], recall, found[f"{prefix}defense_score"]]
        assert line.split() == [*name.split(), *(f"{value:.4f}" for value in values)]
    assert len(lines) == 5


def test_progress_goes_to_stderr_and_the_result_to_stdout(chain):
    assert chain.ended["victim"].out.startswith("victim: resnet20 on 200 rows, 1 epochs, cpu (1 threads), fp32: ")
    assert re.fullmatch(
        r"victim: epoch 1/1  loss [\d.]+  accuracy [\d.]+  \d+ s, 0 s left\n", chain.ended["victim"].err
    )
    assert all(chain.ended[name].err == "" for name in ("prepare", "poison", "extract", "score", "filter", "evaluate"))


# Without a trigger


def test_an_attack_with_cover_rows(tmp_path, command, write_params, one_thread):
    poison = {"attack": "source_specific", "source_label": 5, "poison_fraction": 0.05, "cover_ratio": 3.0}
    write_params(tmp_path / "params.yaml", tact={"poison": poison})
    chain = Chain(tmp_path, command, "tact", "random_filter").run_all()
    said = "badnets, source_specific: 10 of 200 rows poisoned, 30 cover rows, 33% of class 2\n"
    assert chain.ended["poison"].out == said
    found = chain.metrics()
    assert found["rows_removed"] == 10  # the budget counts the poison alone
    index = read_index(tmp_path / "a/poison.h5")
    with h5py.File(tmp_path / "a/kept.h5") as file:
        removed = np.setdiff1d(np.arange(200), file["rows"][:])
    assert found["poison_recall"] == index.poisoned[removed].sum() / 10
    oracle = checkpoints.load(tmp_path / "a/oracle.pt")
    assert oracle.conditions["rows"] == storage.digest_array(np.flatnonzero(~index.poisoned))  # it keeps the cover rows
    assert oracle.conditions["n_rows"] == 190


def test_a_setting_without_a_trigger(tmp_path, command, write_params, one_thread):
    poison = {"trigger": {"name": "none"}, "poison_fraction": None}
    path = write_params(tmp_path / "params.yaml", clean={"poison": poison})
    path.write_text(path.read_text().replace("budget: fraction", "budget: 7"))
    chain = Chain(tmp_path, command, "clean", "random_filter").run_all()
    assert chain.ended["poison"].out == "no trigger: 200 rows, left as they are\n"
    found = chain.metrics()
    assert list(found) == [
        "cell", "clean_acc", "rows_removed", "clean_removed",
        "undefended_clean_acc", "oracle_clean_acc", "gap_clean_acc",
    ]  # fmt: skip
    assert (found["rows_removed"], found["clean_removed"]) == (7, 7)
    assert (tmp_path / "a/oracle.pt").read_bytes() == (tmp_path / "a/victim.pt").read_bytes()  # no poison to leave out
    line = chain.ended["evaluate"].out.splitlines()[3]
    assert line.split() == ["this", "defense", f"{found['clean_acc']:.4f}", "-", "-", "-"]
    (tmp_path / "own.py").write_text(CUSTOM)  # says nothing of what it relies on
    refused = chain.run("score", "b/", ("--defense", "own.py"))
    assert_one_line(refused, "defense own", "the fraction is not known here", "give poison_fraction")
    path.write_text(path.read_text().replace("budget: 7", "budget: fraction"))
    assert_one_line(chain.run("filter", "b/"), "filter.budget is fraction", "not known")
    assert not files_of(tmp_path / "b")
    assert chain.run("score", "b/", ("--poison-fraction", "0.1", "--defense", "own.py")).status == 0


# A dump from elsewhere


CUSTOM = '''
import numpy as np


class BackdoorDefense:
    """Distance from the class's mean, in the style of the public benchmark."""

    def fit(self, features, labels, poison_fraction, **kwargs):
        self.labels = labels
        self.means = {label: features[labels == label].mean(axis=0) for label in np.unique(labels)}

    def score_samples(self, features, logits):
        return np.array([np.linalg.norm(row - self.means[label]) for row, label in zip(features, self.labels)])
'''


def test_a_file_for_the_public_benchmark_scores_a_dump_from_elsewhere(tmp_path):
    """In an empty folder: no params.yaml, no DVC, no torch, and features of another program."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)), np.repeat([0, 1, 2], 20)
    features[[3, 30]] += 9
    with h5py.File(tmp_path / "dump.h5", "w") as file:
        file.attrs.update({"kind": "features", "schema_version": 1, "poison_fraction": 0.03})
        file["features"], file["labels"] = features.astype(np.float16), labels
        file["logits"] = rng.normal(size=(60, 3)).astype(np.float32)
    (tmp_path / "custom_backdoor_defense.py").write_text(CUSTOM)
    script = (
        "import runpy, sys; runpy.run_module('stages.score', run_name='__main__'); assert 'torch' not in sys.modules"
    )
    words = ["--defense", "custom_backdoor_defense.py", "--features", "dump.h5", "--out", "scores.h5"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "custom_backdoor_defense.py: 60 scores in scores.h5\n"
    with storage.open_(tmp_path / "scores.h5", "scores") as file:
        assert sorted(np.argsort(file["scores"][:])[-2:]) == [3, 30]
        assert file.attrs["poison_fraction"] == 0.03 and file.attrs["index"] == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["custom_backdoor_defense.py", "dump.h5", "scores.h5"]


@pytest.mark.parametrize(
    "line, said",
    [
        ("", ""),
        ("from defenses import scan", "imports defenses/scan.py, which DVC does not watch"),
        (
            "import sys; sys.path.insert(0, {folder!r}); import scan",
            "imports defenses/scan.py, which DVC does not watch",
        ),
        ("import analysis.files", "imports analysis/__init__.py, analysis/files.py, which DVC does not watch"),
    ],
)
def test_a_module_beside_a_defense_is_named(chain, tmp_path, line, said):
    """In a process of its own: other tests import modules of `defenses`."""
    (tmp_path / "own.py").write_text(line.format(folder=str(ROOT / "defenses")) + "\n" + CUSTOM)
    words = ["--defense", "own.py", "--features", chain.folder / "a/features.h5", "--out", "scores.h5"]
    done = subprocess.run(
        [sys.executable, "-m", "stages.score", *words], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0 and said in done.stderr and bool(done.stderr) == bool(said)


def test_what_a_defense_suspects_is_stored(chain, tmp_path):
    (tmp_path / "own.py").write_text(
        "import numpy as np\n"
        "class BackdoorDefense:\n"
        "    RELIES_ON = ()\n"
        "    def __init__(self, n=3): self.n_suspected_, self.suspected_classes_ = n, [2, 5]\n"
        "    def fit(self, features, labels, poison_fraction, **kwargs): pass\n"
        "    def score_samples(self, features, logits): return features[:, 0]\n"
    )
    words = ("--defense", tmp_path / "own.py", "--option", "n=11", "--resources", tmp_path / "resources.json")
    assert chain.run("score", f"{tmp_path}/", words).status == 0
    digest = hashlib.sha256((tmp_path / "own.py").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "resources.json").read_text())["defense_file"] == digest
    with storage.open_(tmp_path / "scores.h5", "scores") as file:
        assert file.attrs["n_suspected"] == 11 and file.attrs["suspected_classes"].tolist() == [2, 5]
        assert file.attrs["relies_on"] == "[]"
    for text, expected in (
        ("n=many", "no whole number"),
        ("n=-1", "is negative"),
        ("n=201", "n_suspected_ is 201, and there are 200 rows"),
        ("n=[", "not valid YAML"),
        ("n", "expected KEY=VALUE"),
        ("k=1", "no option k"),
    ):
        ended = chain.run("score", f"{tmp_path}/b/", ("--defense", tmp_path / "own.py", "--option", text))
        assert_one_line(ended, expected)
    assert not files_of(tmp_path / "b")


# Mistakes


def assert_one_line(ended, *words):
    """Status 1 and exactly one line on stderr, which holds the words."""
    assert ended.status == 1
    assert ended.err.count("\n") == 1 and ended.err.endswith("\n")
    assert ended.err.startswith("python -m stages.") and "Traceback" not in ended.err
    for word in words:
        assert word in ended.err


@pytest.fixture
def damaged(chain, tmp_path):
    """A copy of the chain's folder, one file of which is damaged: ``damaged("a/data.h5", keep=0.5)`` cuts it short."""
    folder = tmp_path / "copy"
    shutil.copytree(chain.folder, folder)
    copy = Chain(folder, chain.command, chain.setting, chain.defense)

    def damage(name=None, keep=None, content=None, text=()):
        if name is None:
            return copy
        path = folder / name
        if keep is not None:
            path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
        elif content is not None:
            path.write_bytes(content)
        elif text:
            assert text[0] in path.read_text()
            path.write_text(path.read_text().replace(*text))
        else:
            path.unlink()
        return copy

    return damage


def assert_refused(chain, name, *words, extra=(), **environment):
    """The command is refused with one line, and no file is written, changed or left over."""
    before = files_of(chain.folder)
    assert_one_line(chain.run(name, "new/", extra, **environment), *words)
    assert files_of(chain.folder) == before


@pytest.mark.parametrize(
    ("name", "extra", "words"),
    [
        ("prepare", ["--setting", "tinny"], ["setting 'tinny' is not in params.yaml", "did you mean tiny?"]),
        ("poison", ["--setting", "tinny"], ["did you mean tiny?"]),
        ("victim", ["--setting", "tinny"], ["did you mean tiny?"]),
        ("prepare", ["--params", "no.yaml"], ["no.yaml is not there"]),
        ("filter", ["--params", "no.yaml"], ["no.yaml is not there"]),
        (
            "score",
            ["--defense", "spectral_sig"],
            ["defense 'spectral_sig' has no line", "did you mean spectral_signature?"],
        ),
        ("score", ["--defense", "no/such.py"], ["no defense at no/such.py"]),
        ("score", ["--poison-fraction", "0.7"], ["--poison-fraction is 0.7", "(0, 0.5]"]),
        ("victim", ["--rows", "no.h5"], ["no.h5 is not there"]),
        ("retrained", ["--rows", "a/scores.h5"], ["a/scores.h5: holds kind 'scores', expected 'kept_rows'"]),
        ("extract", ["--checkpoint", "a/scores.h5"], ["a/scores.h5: not a checkpoint"]),
        ("extract", ["--checkpoint", "a"], ["a: not a readable checkpoint"]),
        ("filter", ["--scores", "a/kept.h5"], ["a/kept.h5: holds kind 'kept_rows', expected 'scores'"]),
        ("evaluate", ["--checkpoint", "a/victim.pt"], ["a/victim.pt was not trained on the rows in a/kept.h5"]),
        ("evaluate", ["--reference", "a/kept.h5"], ["a/kept.h5 is damaged", "dvc repro evaluate_reference"]),
        ("evaluate", ["--reference", "no.json"], ["no.json is not there"]),
    ],
)
def test_wrong_arguments(chain, name, extra, words):
    assert_refused(chain, name, *words, extra=extra)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("poison", "data.h5"), ("victim", "data.h5"), ("victim", "poison.h5"), ("retrained", "kept.h5"),
        ("extract", "victim.pt"), ("extract", "poison.h5"), ("score", "features.h5"), ("filter", "scores.h5"),
        ("reference", "oracle.pt"), ("evaluate", "retrained.pt"), ("evaluate", "scores.h5"), ("evaluate", "kept.h5"),
        ("evaluate", "reference.json"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("keep", [0, 0.5, 0.99, None])
def test_a_file_that_is_cut_short_or_missing(damaged, name, file, keep):
    assert_refused(damaged(f"a/{file}", keep), name, f"a/{file}", "dvc repro")


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        (("epochs: 1", "epochs: 0"), "victim", "settings.tiny.train.epochs is 0"),
        (("epochs: 1", "epoch: 1"), "prepare", "unknown key 'epoch' (did you mean epochs?)"),
        (("test_per_class: 5", "test_per_class: 500"), "prepare", "500 images per class"),
        (("image_size: 8", "pad_to: 8\n      image_size: 16"), "prepare", "data.pad_to is 8, less than the images' 16"),
        (("poison_fraction: 0.1", "poison_fraction: 0.001"), "poison", "is no row at all"),
        (("target_label: 2", "target_label: 10"), "poison", "poison.target_label is 10, but the classes are 0 to 9"),
        (("patch_size: 3", "patch_size: 9"), "poison", "a patch of 9 pixels does not fit"),
        (("network: resnet20", "network: vgg16bn"), "victim", "vgg16bn needs images of at least 32 pixels"),
        (("budget: fraction", "budget: 200"), "filter", "remove 200 of 200 rows"),
        (("budget: fraction", "budget: auto"), "filter", "does not decide for itself"),
        (("spectral_signature: {}", "spectral_signature: {n: 1}"), "score", "spectral_signature has no option n"),
    ],
)
def test_wrong_parameters(damaged, text, name, words):
    assert_refused(damaged("params.yaml", text=text), name, words)


def test_files_that_do_not_belong_together(damaged):
    """A second seed's index among the first one's files."""
    chain = damaged()
    assert chain.run("poison", "b/", ("--seed", "4")).status == 0
    other = ("--index", "b/poison.h5")
    assert_refused(chain, "extract", "a/victim.pt was trained on another poison index than b/poison.h5", extra=other)
    assert_refused(chain, "reference", "a/victim.pt was trained on another poison index", extra=other)
    assert_refused(chain, "retrained", "a/kept.h5 belongs to another poison index", extra=other)
    assert_refused(chain, "evaluate", "a/retrained.pt was trained on another poison index", extra=other)
    shutil.copy(chain.folder / "b/poison.h5", chain.folder / "a/poison.h5")
    assert chain.run("retrained", "b/", ("--rows", "all")).status == 0
    new = ("--checkpoint", "b/retrained.pt")
    assert_refused(chain, "evaluate", "a/scores.h5 belongs to another poison index than a/poison.h5", extra=new)


def test_a_reference_of_other_epochs(damaged):
    chain = damaged("a/reference.json", text=('"history": [', '"history": [{"epoch": 0, "accuracy": 0, "loss": 0}, '))
    assert_refused(chain, "evaluate", "a/reference.json is of other epochs than a/retrained.pt")


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"undefended": 3}', b"\xff", b'{"undefended": {}, "oracle": {}}'])
def test_a_damaged_reference(damaged, content):
    assert_refused(damaged("a/reference.json", content=content), "evaluate", "a/reference.json is damaged")


def test_a_score_for_each_row(damaged, chain):
    with h5py.File(chain.folder / "a/scores.h5") as file:
        scores, about = file["scores"][:], {key: file.attrs[key] for key in ("defense", "poison_fraction", "index")}
    copy = damaged()
    storage.write(copy.folder / "a/scores.h5", "scores", {"scores": scores[:-1]}, about)
    assert_refused(copy, "evaluate", "a/scores.h5 holds 199 scores for 200 training rows")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise RuntimeError('over\\n  there')", ["own failed in score_samples: RuntimeError: over there (own.py:4)"]),
        ("return features[:-1, 0]", ["returned shape (199,)", "expected one real number for each of the 200 rows"]),
        ("return features", ["returned shape (200, 64)"]),
        ("return features[:, 0] * float('nan')", ["returned NaN or infinity for 200 of 200 rows, first for row 0"]),
        ("return None", ["score_samples of defense own returned shape ()"]),
        ("return features[:, 0].astype(complex)", ["complex"]),
        ("syntax error", ["cannot import defense own: SyntaxError", "own.py:4"]),
    ],
)
def test_a_defense_that_fails(chain, tmp_path, body, words):
    (tmp_path / "own.py").write_text(
        "class BackdoorDefense:\n"
        "    def fit(self, features, labels, poison_fraction, **kwargs): pass\n"
        "    def score_samples(self, features, logits):\n"
        f"        {body}\n"
    )
    assert_refused(chain, "score", *words, extra=["--defense", tmp_path / "own.py"])


def test_an_empty_class(chain, monkeypatch):
    whole = datasets.read("digits", None, image_size=8)
    for part in ("train", "test"):
        rows = getattr(whole, f"{part}_labels") != 4
        parts = {f"{part}_{what}": getattr(whole, f"{part}_{what}")[rows] for what in ("images", "labels")}
        monkeypatch.setattr(
            datasets, "read", lambda *_, parts=parts, **__: datasets.ImageDataset(**vars(whole) | parts)
        )
        assert_refused(chain, "prepare", f"digits: class '4' has no {part} images")


def test_a_stamp_of_another_size(damaged, chain):
    copy = damaged()
    with h5py.File(copy.folder / "a/poison.h5", "r+") as file:
        del file["pictures"]
        file["pictures"] = np.zeros((1, 9, 9, 1), np.uint8)
    sealed.seal(copy.folder / "a/poison.h5")
    assert_refused(copy, "victim", "the trigger is made for images of shape (9, 9, 1), got (8, 8, 1)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
@pytest.mark.parametrize("name", ["victim", "extract", "reference", "evaluate"])
def test_a_device_that_is_not_there(chain, name):
    assert_refused(chain, name, "device 'cuda' is not there", "BACKDOOR_DEVICE=cpu", BACKDOOR_DEVICE="cuda")


@pytest.mark.parametrize("variable", ["BACKDOOR_DEVICE", "BACKDOOR_PRECISION", "BACKDOOR_COMPILE"])
def test_a_wrong_wish(chain, variable):
    assert_refused(chain, "victim", f"{variable}: ", "is 'best'; use one of auto, ", **{variable: "best"})


def test_an_output_that_cannot_be_written(chain, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert_refused(chain, "filter", f"{tmp_path}/folder is a folder", extra=["--out", tmp_path / "folder"])
    assert_refused(chain, "filter", f"{tmp_path}/file", extra=["--out", tmp_path / "file/kept.h5"])


def test_an_old_output_survives_a_refusal(damaged):
    chain = damaged("params.yaml", text=("budget: fraction", "budget: 200"))
    before = (chain.folder / "a/kept.h5").read_bytes()
    assert_one_line(chain.run("filter", "a/"), "remove 200 of 200 rows")
    assert (chain.folder / "a/kept.h5").read_bytes() == before
    assert not list((chain.folder / "a").glob(".*"))


# As processes of their own


def process(*words, cwd):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BACKDOOR_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "BACKDOOR_DEVICE": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=cwd, capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("stages.prepare --setting no --out new.h5", "setting 'no' is not in params.yaml; known: tiny"),
        ("stages.score --defense no --features a/features.h5 --out new.h5", "defense 'no' has no line in params.yaml"),
    ],
)
def test_one_line_and_status_1_of_a_process(chain, words, expected):
    done = process(*words.split(), cwd=chain.folder)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and expected in done.stderr
    assert not (chain.folder / "new.h5").exists()


def test_a_process_gives_the_same_bytes(chain, tmp_path):
    words = COMMANDS["victim"].format(out=f"{tmp_path}/", setting="tiny").split()
    done = process(f"stages.{words[0]}", *words[1:], cwd=chain.folder)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "victim.pt").read_bytes() == (chain.folder / "a/victim.pt").read_bytes()


def test_stages_that_need_no_torch_do_not_wait_for_it():
    script = "import sys, stages.prepare, stages.poison, stages.score, stages.filter; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", STAGES)
def test_help(command, name):
    ended = command(name, "--help")
    assert ended.status == 0 and ended.out.startswith(f"usage: python -m stages.{name} ")
    assert f"{name}: " in ended.out and ended.err == ""
