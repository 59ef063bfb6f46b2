"""check: what cannot run is told before anything is trained, and what may run is not refused."""

import json

import pytest
import yaml
from conftest import TINY

from stages.check import runnable

DEFENSE = """
class BackdoorDefense:
    RELIES_ON = ()

    def __init__(self, fails=False, decides=False):
        self.fails, self.decides = fails, decides

    def fit(self, features, labels, poison_fraction, **kwargs):
        if self.fails:
            raise ValueError(f"{features.shape[1]} columns, and 10 are the least")

    def score_samples(self, features, logits):
        if self.decides:
            self.n_suspected_ = 0
        return features[:, 0]
"""


@pytest.fixture
def check(tmp_path, command):
    """Run it on a setting `tiny` or `clean` with a defense of the project: ``check(setting, defense, options, budget)``."""

    def run(setting, defense, options=None, budget="fraction"):
        values = {
            "settings": {"tiny": TINY, "clean": TINY | {"poison": {"trigger": {"name": "none"}}}},
            "defenses": {defense: options or {}},
            "filter": {"budget": budget},
        }
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
        words = ("--setting", setting, "--defense", defense, "--out", "found.json")
        return command("check", *words, cwd=tmp_path)

    return run


@pytest.mark.parametrize(
    ("setting", "defense", "options", "budget"),
    [
        ("tiny", "spectre", None, "fraction"),
        ("tiny", "whitened_mixture", {"threshold": "1e1"}, "auto"),
        ("clean", "whitened_mixture", None, "auto"),
        ("clean", "random_filter", None, 30),
    ],
)
def test_what_can_run(check, tmp_path, setting, defense, options, budget):
    ended = check(setting, defense, options, budget)
    assert ended == (0, f"{defense}: checked for {setting}, budget {budget}\n", "")
    assert json.loads((tmp_path / "found.json").read_text()) == {
        "setting": setting,
        "defense": defense,
        "budget": budget,
    }


@pytest.mark.parametrize(
    ("setting", "defense", "options", "budget", "told"),
    [
        ("tiny", "whitened_mixture", {"treshold": 5}, "fraction", "has no option treshold"),
        (
            "tiny",
            "whitened_mixture",
            {"threshold": "high"},
            "fraction",
            "threshold is 'high'; expected a finite number",
        ),
        ("tiny", "random_filter", None, "auto", "defense random_filter: no decision of its own"),
        ("clean", "whitened_mixture", None, "fraction", "setting clean has no poison fraction; give auto"),
        ("clean", "spectre", None, 30, "defense spectre: needs the poison fraction"),
        ("tinny", "spectre", None, 30, "did you mean tiny?"),
        ("tiny", "nobody", None, "fraction", "unknown defense 'nobody'"),
    ],
)
def test_what_cannot(check, tmp_path, setting, defense, options, budget, told):
    ended = check(setting, defense, options, budget)
    assert ended.status == 1 and ended.out == "" and told in ended.err and len(ended.err.splitlines()) == 1, ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """``own(options, budget)``: whether a defense with the file above can run."""
    (tmp_path / "mine.py").write_text(DEFENSE)
    monkeypatch.setattr("defenses._FOLDER", tmp_path)

    def run(options, budget, named=True):
        values = {"settings": {"tiny": TINY}, "defenses": {"mine": options}, "filter": {}}
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
        return runnable(tmp_path / "params.yaml", "tiny", ["mine", "mine"], named, budget)

    return run


def test_what_fails_on_made_up_rows_is_said_and_may_run(own, capsys):
    for budget in ("fraction", "auto"):
        assert own({"fails": True}, budget) == ["mine"]
        said = capsys.readouterr().err
        assert "made-up rows of 3 classes: defense mine failed in fit: ValueError: 8 columns" in said
        assert "may still do on features" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("line", ["self.scael", "skale", "__import__('no_such_module')"])
def test_a_name_that_is_not_there_is_refused(own, refuses, tmp_path, line):
    (tmp_path / "mine.py").write_text(DEFENSE.replace("return features[:, 0]", f"return {line}"))
    with refuses("defense mine failed in score_samples: ", "(mine.py:15)"):
        own({}, "fraction")


def test_who_decides_is_seen_by_scoring(own, capsys, refuses):
    assert own({"decides": True}, "auto") == ["mine"]
    with refuses(
        "defense mine: no decision of its own on how many rows to remove; give a number of rows as the budget"
    ):
        own({}, "auto")
    assert own({}, "auto", named=False) == []
    assert capsys.readouterr().out.startswith("left out: mine: no decision of its own")
