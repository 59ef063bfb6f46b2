"""The filter: exactly the rows that the budget allows, the highest scores first, ties broken by row number."""

import h5py
import numpy as np
import pytest

from stages import filter as filter_stage
from stages.lib import storage
from stages.lib.params import Filter


@pytest.mark.parametrize(
    ("scores", "n_remove", "rows"),
    [
        ([0.1, 0.9, 0.5], 0, []),
        ([0.1, 0.9, 0.5], 1, [1]),
        ([0.1, 0.9, 0.5], 2, [1, 2]),
        ([-3.0, -1.0, -2.0], 1, [1]),
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 1]),
        ([0.0, 2.0, 1.0, 2.0, 1.0, 1.0], 4, [1, 2, 3, 4]),
        ([0.0, -0.0, 0.0], 2, [0, 1]),
        ([1e308, -1e308, 1e-308], 1, [0]),
    ],
)
def test_highest_scores_go_and_ties_are_broken_by_row_number(scores, n_remove, rows):
    scores = np.array(scores)
    before = scores.copy()
    mask = filter_stage.removed(scores, n_remove)
    assert mask.dtype == bool and np.flatnonzero(mask).tolist() == rows
    np.testing.assert_array_equal(scores, before)


def test_against_a_plain_sort():
    scores = np.random.default_rng(0).integers(0, 20, 500).astype(float)  # many ties
    for n_remove in (1, 7, 250, 499):
        expected = sorted(range(500), key=lambda row: (-scores[row], row))[:n_remove]
        assert np.flatnonzero(filter_stage.removed(scores, n_remove)).tolist() == sorted(expected)


@pytest.mark.parametrize(
    ("spec", "n", "fraction", "n_suspected", "n_remove"),
    [
        (Filter(), 1000, 0.05, None, 50),
        (Filter(), 1437, 0.05, 9, 72),  # 71.85
        (Filter("fraction", 1.5), 1000, 0.05, None, 75),
        (Filter("fraction", 1.5), 50_000, 0.05, None, 3750),
        (Filter("fraction", 0.5), 101, 0.1, None, 5),  # 5.05
        (Filter("fraction", 1e-6), 100, 0.1, None, 0),
        (Filter("auto"), 100, None, 17, 17),
        (Filter("auto", 1.5), 100, 0.05, 0, 0),  # the multiplier and the fraction do not matter
        (Filter(30), 100, None, None, 30),
        (Filter(30, 2.0), 100, 0.5, 17, 30),
        (Filter(0), 100, None, None, 0),
        (Filter(99), 100, None, None, 99),
    ],
)
def test_budgets(spec, n, fraction, n_suspected, n_remove):
    assert filter_stage.n_to_remove(spec, n, fraction, n_suspected) == n_remove


@pytest.mark.parametrize(
    ("spec", "fraction", "n_suspected", "words"),
    [
        (Filter("auto"), 0.05, None, ["filter.budget is auto", "does not decide for itself", "use fraction or rows"]),
        (Filter("fraction"), None, 7, ["filter.budget is fraction", "not known", "use auto or a number of rows"]),
        (Filter("fraction", 2.0), 0.5, None, ["remove 100 of 100 rows", "expected 0 to 99"]),
        (Filter(100), None, None, ["remove 100 of 100 rows", "expected 0 to 99"]),
        (Filter("auto"), None, 100, ["remove 100 of 100 rows"]),
        (Filter("auto"), None, -1, ["remove -1 of 100 rows"]),
    ],
)
def test_refused_budgets(refuses, spec, fraction, n_suspected, words):
    with refuses(*words):
        filter_stage.n_to_remove(spec, 100, fraction, n_suspected)


@pytest.fixture
def filtered(tmp_path, command):
    """Run the command on ten scores; returns what it said and the output's path."""

    def run(scores, budget="fraction", multiplier=1.0, fraction=0.2, name="kept.h5", **attributes):
        (tmp_path / "params.yaml").write_text(
            f"settings: {{}}\ndefenses: {{}}\nfilter: {{budget: {budget}, budget_multiplier: {multiplier}}}\n"
        )
        about = {"defense": "d", "poison_fraction": np.nan if fraction is None else fraction, "index": "i" * 64}
        storage.write(tmp_path / "scores.h5", "scores", {"scores": np.array(scores, float)}, about | attributes)
        words = ["--params", "params.yaml", "--scores", "scores.h5", "--out", name]
        return command("filter", *words, cwd=tmp_path), tmp_path / name

    return run


SCORES = [0.3, 0.1, 0.9, 0.2, 0.9, 0.0, 0.4, 0.5, 0.9, 0.6]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 3, 5, 6, 7, 8, 9]),
        ({"multiplier": 1.5}, [0, 1, 3, 5, 6, 7, 9]),
        ({"budget": "auto", "n_suspected": 1, "fraction": None}, [0, 1, 3, 4, 5, 6, 7, 8, 9]),
        ({"budget": 9}, [5]),
        ({"budget": 0, "fraction": None}, list(range(10))),
    ],
)
def test_command(filtered, options, kept):
    ended, path = filtered(SCORES, **options)
    assert ended == (0, f"{10 - len(kept)} of 10 rows removed, {len(kept)} kept\n", "")
    with storage.open_(path, "kept_rows") as file:
        assert file["rows"][:].tolist() == kept
        assert dict(file.attrs) == {"kind": "kept_rows", "schema_version": 1, "n": 10, "index": "i" * 64}


def test_other_scores_that_pick_the_same_rows_give_the_same_file(filtered):
    _, first = filtered(SCORES)
    _, second = filtered(np.array(SCORES) * 2 - 1, name="second.h5", defense="another")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("scores", "options", "words"),
    [
        (SCORES, {"fraction": None}, "fraction is not known"),
        (SCORES, {"budget": "auto"}, "does not decide for itself"),
        (SCORES, {"budget": 10}, "remove 10 of 10 rows"),
        (SCORES, {"budget": "most"}, "filter.budget is 'most'"),
        ([*SCORES[:-1], np.nan], {}, "scores.h5: holds NaN or infinite scores"),
        ([*SCORES[:-1], np.inf], {}, "scores.h5: holds NaN or infinite scores"),
        ([], {"budget": 0}, "remove 0 of 0 rows"),
    ],
)
def test_command_refuses(filtered, scores, options, words):
    ended, path = filtered(scores, **options)
    assert ended.status == 1 and ended.err.count("\n") == 1 and words in ended.err
    assert sorted(file.name for file in path.parent.iterdir()) == ["params.yaml", "scores.h5"]


def test_rows_of_no_known_origin(filtered, tmp_path):
    """Scores of a dump from elsewhere carry no poison index; the rows say so."""
    ended, path = filtered(SCORES, index="")
    assert ended.status == 0
    with h5py.File(path) as file:
        assert file.attrs["index"] == ""
