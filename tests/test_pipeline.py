"""The user's commands in a clone of their own: which stages run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "data": {"source": "digits", "image_size": 8, "train_per_class": 20, "test_per_class": 10},
    "poison": {"trigger": {"name": "badnets", "patch_size": 2}, "poison_fraction": 0.1, "target_label": 1},
    "model": {"network": "resnet20"},
    "train": {
        "epochs": 1,
        "batch_size": 64,
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "crop_padding": 1,
        "flip": False,
    },
}
LEFT = ["prepare", "poison", "train_victim", "extract", "retrain_oracle", "evaluate_reference"]
RIGHT = ["check", "score", "filter", "retrain", "evaluate"]


class Clone:
    """A checkout of the working tree, at that setting, with the one-epoch settings `tiny` and `other`."""

    def __init__(self, folder: Path, setting="tiny"):
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True,
        ).stdout.decode().split("\0")  # fmt: skip
        for name in filter(None, listed):
            if (ROOT / name).is_file() and not name.startswith(("artifacts/", "dvc.lock", "tests/")):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
        params = yaml.safe_load((folder / "params.yaml").read_text())
        params |= {"setting": setting, "defense": "confidence_filter", "seed": 1}
        params["settings"] |= {"tiny": TINY, "other": TINY | {"data": TINY["data"] | {"train_per_class": 25}}}
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        self.git("init", "-q")
        self.commit("start")

    def git(self, *words):
        names = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(
            ["git", *names, *words], cwd=self.folder, check=True, capture_output=True, text=True
        ).stdout

    def commit(self, message):
        self.git("add", "-A")
        self.git("commit", "-q", "-m", message)

    def start(self, *words, **options) -> subprocess.Popen:
        """A DVC command under way; options are those of Popen."""
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "BACKDOOR_DEVICE": "cpu",
            "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.org",
            "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@example.org",
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-m", "dvc", *words], cwd=self.folder, text=True, env=environment, **options
        )

    def dvc(self, *words, fails=False):
        done = self.start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        stdout, stderr = done.communicate()
        assert (done.returncode != 0) == fails, stdout + stderr
        return stdout + stderr

    def ran(self, *words) -> list[str]:
        """Names of the stages whose command ran, sorted."""
        return sorted(re.findall(r"Running stage '(\w+)'", self.dvc(*words)))

    def metrics(self) -> dict:
        return json.loads((self.folder / "artifacts/metrics.json").read_text())


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return Clone(tmp_path_factory.mktemp("clone"))


def test_which_stages_run(clone):
    """One long test: each step starts from what the last one left."""
    assert clone.ran("repro") == sorted(LEFT + RIGHT)
    first = clone.metrics()
    assert first["cell"] == "tiny/confidence_filter/seed1"
    clone.commit("first cell")
    assert clone.ran("repro") == [], "second run"

    assert clone.ran("exp", "run", "-S", "defense=spectral_signature", "-n", "spectral") == sorted(RIGHT)
    assert clone.metrics()["cell"] == "tiny/spectral_signature/seed1"
    changes = json.loads(clone.dvc("metrics", "diff", "HEAD", "spectral", "--json"))["artifacts/metrics.json"]
    assert changes["cell"] == {"old": "tiny/confidence_filter/seed1", "new": "tiny/spectral_signature/seed1"}
    assert {"cell", "auroc"} <= set(changes)
    table = clone.dvc("exp", "show", "--csv", "--no-pager")
    assert "spectral" in table and "defense_score" in table

    assert clone.ran("exp", "run", "-S", "defense=confidence_filter") == [], "back to the first"
    assert clone.metrics() == first
    assert clone.ran("exp", "run", "-S", "defense=spectral_signature") == [], "and to the second again"

    assert clone.ran("exp", "run", "-S", "seed=2") == sorted(LEFT[1:] + RIGHT[1:]), "not prepare, not check"
    assert clone.ran("exp", "run", "-S", "setting=other") == sorted(LEFT + RIGHT), "another setting"
    clone.git("checkout", "-q", ".")
    clone.dvc("checkout", "dvc.yaml")
    assert clone.ran("repro") == []

    key = "settings.tiny.poison.trigger.patch_size=3"
    assert "poison" in clone.ran("exp", "run", "-S", key, "poison"), (
        "a key that DVC's run cache looks at (params.UNSEEN)"
    )
    clone.git("checkout", "-q", ".")
    clone.dvc("checkout", "dvc.yaml")

    defense = clone.folder / "defenses/confidence_filter.py"
    defense.write_text(defense.read_text() + "\n# a remark that changes no score\n")
    assert clone.ran("repro") == ["check", "score"], "an edited defense with the same scores"
    defense.write_text(defense.read_text().replace("def score_samples(self, features, logits):", "def score_samples(self, features, logits):\n        return -self._before(features, logits)\n\n    def _before(self, features, logits):"))  # fmt: skip # noqa: E501
    assert clone.ran("repro") == sorted(RIGHT), "an edited defense with other scores"
    clone.git("checkout", "-q", ".")
    clone.dvc("checkout", "dvc.yaml")

    other = clone.folder / "defenses/spectral_signature.py"
    other.write_text(other.read_text() + "\n# of no concern to this cell\n")
    assert clone.ran("repro") == [], "a module that no stage of the cell imports"
    clone.git("checkout", "-q", ".")


def test_a_public_benchmark_file_runs_through_dvc(clone):
    clone.git("checkout", "-q", ".")
    clone.dvc("checkout", "dvc.yaml")
    (clone.folder / "defenses/custom_backdoor_defense.py").write_text(
        "import numpy as np\n\n\n"
        "class BackdoorDefense:\n"
        "    def __init__(self):\n        pass\n\n"
        "    def fit(self, features, labels, poison_fraction, **kwargs):\n        self.mean = features.mean(0)\n\n"
        "    def score_samples(self, features, logits):\n        return np.linalg.norm(features - self.mean, axis=1)\n"
    )
    params = clone.folder / "params.yaml"
    params.write_text(params.read_text().replace("defenses:\n", "defenses:\n  custom_backdoor_defense: {}\n"))
    assert clone.ran("exp", "run", "-S", "defense=custom_backdoor_defense") == sorted(RIGHT)
    assert clone.metrics()["cell"] == "tiny/custom_backdoor_defense/seed1"


def test_mistakes_end_in_one_line(clone):
    clone.git("checkout", "-q", ".")
    for change, words in (
        (["-S", "setting=nowhere"], "nowhere"),
        (["-S", "settings.tiny.train.lr=-1"], "settings.tiny.train.lr is -1"),
        (["-S", "defense=nothing"], "nothing"),
        (["-S", "+defenses.confidence_filter.power=2"], "defense confidence_filter has no option power"),
        (["-S", "filter.budget=auto"], "defense confidence_filter: no decision of its own"),
    ):
        output = clone.dvc("exp", "run", *change, fails=True)
        assert words in output and "Traceback" not in output
        assert "Running stage 'poison'" not in output, "told before anything is trained"
        clone.git("checkout", "-q", ".")
