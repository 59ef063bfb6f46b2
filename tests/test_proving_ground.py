"""The proving ground: what it measures, that development and report stay apart, and a run from list to tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TINY

from analysis import proving_ground
from stages.lib import params
from stages.lib.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def run(folder, *words):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "BACKDOOR_DEVICE": "cpu"}
    command = [sys.executable, "-m", "analysis.proving_ground", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_committed_list_keeps_development_and_report_apart():
    dumps = proving_ground.listed(ROOT / "analysis/dumps.yaml")
    uses = {use: {dump.folder for dump in dumps if dump.use == use} for use in ("development", "report")}
    assert uses["development"] and uses["report"] and not uses["development"] & uses["report"]
    for dump in dumps:  # each setting is there
        params.setting(ROOT / "params.yaml", dump.setting)


def test_a_dump_listed_twice_is_refused(tmp_path):
    path = tmp_path / "dumps.yaml"
    path.write_text(yaml.safe_dump([{"setting": "quick", "development": [1], "report": [1, 2]}]))
    with pytest.raises(UserError, match="quick/seed1 listed twice"):
        proving_ground.listed(path)


@pytest.mark.parametrize("text", ["{}: ]", "quick", "- [1]", "- {development: [1]}"])
def test_a_broken_list_is_refused(tmp_path, text):
    path = tmp_path / "dumps.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="expected a list of blocks"):
        proving_ground.listed(path)


def test_figures_of_a_ranking():
    labels = np.array([0, 0, 0, 0, 1, 1])
    poisoned = np.array([True, True, False, False, False, False])
    found = proving_ground.judge(np.array([5.0, 1, 4, 0, 6, 0.5]), labels, poisoned, n_suspected=3)
    assert found == {
        "recall": 0.5,  # of the two highest, 6 and 5, one is poison
        "auroc": pytest.approx((3 + 2) / 8),  # 5 is above 4, 0, 0.5; 1 above 0, 0.5
        "class_auroc": pytest.approx((2 + 1) / 4),
        "n_suspected": 3,
        "cut_recall": 0.5,
        "cut_precision": pytest.approx(1 / 3),
    }


def test_the_ceiling_is_what_a_supervised_rule_finds():
    rng = np.random.default_rng(0)
    labels, poisoned = np.zeros(200, np.int64), np.arange(200) < 60
    logits, features = rng.normal(size=(200, 2)), rng.normal(size=(200, 4))
    assert proving_ground.ceiling(features, logits, labels, poisoned) < 0.6
    features[:, 0] += 20 * poisoned
    assert proving_ground.ceiling(features, logits, labels, poisoned) == 1


def test_from_the_list_to_the_tables(tmp_path):
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values | {"settings": {"tiny": TINY}}))
    changed = {"poison.trigger": {"name": "none"}, "poison.poison_fraction": None}
    dumps = [
        {"setting": "tiny", "development": [3]},
        {"setting": "tiny", "name": "bare", "change": changed, "report": [1]},
    ]
    (tmp_path / "dumps.yaml").write_text(yaml.safe_dump(dumps))
    words = ["--list", "dumps.yaml", "--defenses", "whitened_mixture", "spectre", "--modes", "told", "blind"]
    done = run(tmp_path, *words, "--make")
    assert done.returncode == 0, done.stderr
    assert "recall, development dumps" in done.stdout and "recall, report dumps" not in done.stdout
    assert "rows suspected on clean data, report dumps" in done.stdout

    found = json.loads((tmp_path / "results/proving_ground/development/tiny/seed3.json").read_text())
    assert (found["n"], found["n_poisoned"]) == (200, 20)
    assert set(found["undefended"]) == {"clean_acc", "asr", "target_clean_acc"}
    assert 0 <= found["scored"]["whitened_mixture / told"]["recall"] <= 1
    assert "relies on poison_fraction" in found["scored"]["spectre / blind"]["refused"]

    again = run(tmp_path, *words)
    assert again.returncode == 0 and "seed 3: whitened" not in again.stdout  # nothing is computed twice
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]

    (tmp_path / "scan.py").write_text(  # of the name of another, and it fails
        "class BackdoorDefense:\n    RELIES_ON = ()\n    def fit(self, features, labels, poison_fraction):\n        pass\n"
        "    def score_samples(self, features, logits):\n        assert FINE\n        return features[:, 0]\n"
    )
    one = ["--list", "dumps.yaml", "--use", "development", "--defenses", "./scan.py"]
    failed = run(tmp_path, *one)
    assert failed.returncode == 1 and "failed, not recorded" in failed.stderr and "NameError" in failed.stderr
    record = tmp_path / "results/proving_ground/development/tiny/seed3.json"
    assert json.loads(record.read_text()) == found
    (tmp_path / "scan.py").write_text((tmp_path / "scan.py").read_text().replace("assert FINE", "pass"))
    assert run(tmp_path, *one).returncode == 0
    scored = json.loads(record.read_text())["scored"]
    assert scored.keys() - found["scored"].keys() == {"./scan.py / told"}, (
        "it does not pass for the one of this project"
    )

    for path, old, new, expected in (
        ("params.yaml", "poison_fraction: 0.1", "poison_fraction: 0.12", "another attack, trigger, fraction or seed"),
        ("params.yaml", "lr: 0.02", "lr: 0.03", "another recipe"),
        (
            "dumps.yaml",
            "poison_fraction: null",
            "poison_fraction: null\n    train.lr: 0.05",
            "made with other parameters than it has now",
        ),
        ("dumps.yaml", "name: none", "name: badnets", "dump bare: "),
    ):
        text = (tmp_path / path).read_text()
        assert old in text
        (tmp_path / path).write_text(text.replace(old, new))
        stale = run(tmp_path, *words, "--dumps", "bare" if path == "dumps.yaml" else "tiny")
        assert stale.returncode == 1 and expected in stale.stderr and len(stale.stderr.splitlines()) == 1, stale.stderr
        assert "left out" in stale.stderr, "and the others would go on"
        (tmp_path / path).write_text(text)
    record.write_text(record.read_text().replace(found["features"], "0" * 64))
    other = run(tmp_path, *words, "--dumps", "tiny")
    assert (
        other.returncode == 1
        and "holds the figures of another victim; delete it, or give another --out" in other.stderr
    )
    record.write_text(record.read_text()[:100])
    assert "is damaged" in run(tmp_path, *words, "--dumps", "tiny").stderr


def test_mistakes_are_one_line(tmp_path):
    for words, expected in (
        (["--defenses", "spectre_of"], "unknown defense 'spectre_of'"),
        (["--list", "nowhere.yaml"], "nowhere.yaml is not there"),
        (
            ["--list", str(ROOT / "analysis/dumps.yaml"), "--dumps", "quick-tact"],
            "dumps is there; train their victims with --make",
        ),
    ):
        done = run(tmp_path, *words)
        assert done.returncode == 1 and expected in done.stderr and len(done.stderr.splitlines()) == 1
