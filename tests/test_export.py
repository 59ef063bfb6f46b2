"""What an exported cell says follows from the arrays it was made from."""

import json

import numpy as np
import pytest

from analysis import export
from stages.lib import storage
from stages.lib.poisoning import PoisonIndex


def index(poisoned: np.ndarray, fraction) -> PoisonIndex:
    rows = np.flatnonzero(poisoned)
    role = np.full(len(rows), storage.POISON, np.uint8)
    nothing = np.zeros(len(rows), np.int64)
    goals = np.empty((0, 2), np.int64)
    return PoisonIndex(len(poisoned), rows, role, rows, rows, rows, nothing, nothing, goals, (), "all_to_one", fraction)


def test_precision_and_recall_at_both_budgets():
    poisoned = np.isin(np.arange(20), [0, 1, 2, 9])
    scores = -np.arange(20.0)  # rows 0 to 3 are removed at 1.0 times the poison, rows 0 to 5 at 1.5 times
    kept = np.arange(20) >= 4
    found = export.of_budget(scores, kept, index(poisoned, 0.2))
    assert found == {"n": 20, "n_poison": 4, "precision": 0.75, "recall_at": {"1.0": 0.75, "1.5": 0.75}}
    assert export.of_budget(-scores, kept, index(poisoned, None))["recall_at"] == {"1.0": 0.0, "1.5": 0.0}
    assert export.of_budget(scores, kept, index(np.zeros(20, bool), None)) == {"n": 20, "n_poison": 0}


def test_removed_by_class():
    labels, poisoned = np.array([0, 0, 0, 2, 2]), np.array([1, 1, 0, 0, 0], bool)
    found = export.removed_by_class(labels, poisoned, np.array([1, 0, 1, 0, 1], bool), ("a", "b", "c"))
    assert found == {
        "classes": ["a", "b", "c"], "rows": [3, 0, 2], "poisoned": [2, 0, 0], "clean_removed": [1, 0, 1],
        "poison_removed": [1, 0, 0],
    }  # fmt: skip


def test_histogram_and_recall():
    scores, poisoned = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0, 0, 1, 1], bool)
    found = export.histogram(scores, poisoned, np.array([1, 1, 1, 0], bool))
    assert len(found["edges"]) == len(found["clean"]) + 1 and found["cut"] == 3.0
    assert sum(found["clean"]) == sum(found["poisoned"]) == 1.0
    assert export.histogram(scores, poisoned, np.ones(4, bool))["cut"] is None
    assert export.recall(scores, poisoned) == {"rows_removed": [0, 1, 2, 3, 4], "recall": [0.0, 0.5, 1.0, 1.0, 1.0]}
    assert export.recall(scores, np.zeros(4, bool)) is None


@pytest.fixture
def features():
    """Three classes of 300 rows in 6 dimensions; a third of class 1 is poison, moved along a direction of low variance."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 300)
    values = generator.normal(size=(900, 6)) * [30, 5, 1, 1, 1, 0] + labels[:, None] * 50
    poisoned = np.zeros(900, bool)
    poisoned[300:400] = True
    values[poisoned, 2] += 12
    return values.astype(np.float32), labels, poisoned


def test_projection_shows_what_differs_within_the_class(features):
    values, labels, poisoned = features
    found = export.projection(values, labels, poisoned, poisoned, ("a", "b", "c"))
    assert found["class"] == "b" and found["n"] == 300 and len(found["x"]) == 300
    truth = np.array(list(found["poisoned"])) == "1"
    assert truth.sum() == 100 and found["removed"] == found["poisoned"]
    x = np.array(found["x"])
    assert abs(x[truth].mean() - x[~truth].mean()) > 3 * (x[truth].std() + x[~truth].std()) / 2
    again = export.projection(values, labels, poisoned, ~poisoned, ("a", "b", "c"))
    assert (again["x"], again["y"]) == (found["x"], found["y"]), "the same picture for every defense"


def test_projection_in_pieces_and_of_little(features, monkeypatch):
    values, labels, poisoned = features
    whole = export.projection(values, labels, poisoned, poisoned, ("a", "b", "c"))
    monkeypatch.setattr(export, "CHUNK", 7)
    pieces = export.projection(values, labels, poisoned, poisoned, ("a", "b", "c"))
    np.testing.assert_allclose(pieces["x"], whole["x"], rtol=0.01, atol=0.01)
    monkeypatch.setattr(export, "PROJECTED_ROWS", 50)
    assert len(export.projection(values, labels, poisoned, poisoned, ("a", "b", "c"))["x"]) == 50
    nothing = np.zeros(900, bool)
    assert export.projection(values, labels, nothing, nothing, ("a", "b", "c"))["class"] == "a"
    one = export.projection(values[:1] * 0, labels[:1], nothing[:1], nothing[:1], ("a",))
    assert one["x"] == [0.0] and one["y"] == [0.0]


def test_text_is_json_with_short_lists():
    content = {"a": [1, 2, 3], "b": {"c": ["x [", "y"], "d": []}, "e": [[1], [2]], "f": "two [\n words"}
    text = export.as_text(content)
    assert json.loads(text) == content
    assert '"a": [1, 2, 3]' in text
    with pytest.raises(ValueError):
        export.as_text({"a": float("nan")})


def test_ledger():
    class Defense:
        RELIES_ON, MAY_USE = ("class_sizes",), ("poison_fraction",)

    about = {"poison_fraction": np.float64("nan"), "relies_on": "null"}
    assert export.ledger(Defense(), about) == {"relies_on": None, "may_use": ["poison_fraction"], "told": {}}
    about = {"poison_fraction": 0.1, "relies_on": '["class_sizes"]', "n_suspected": np.int64(3)}
    about |= {"suspected_classes": np.array([2])}
    assert export.ledger(Defense(), about) == {
        "relies_on": ["class_sizes"], "may_use": ["poison_fraction"], "told": {"poison_fraction": 0.1}, "n_suspected": 3,
        "suspected_classes": [2],
    }  # fmt: skip
