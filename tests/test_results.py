"""What `results/` holds is read as it is; what cannot be used is told with its reason and never averaged."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from made_results import cell, cliff, write
from sklearn.metrics import average_precision_score, roc_auc_score

from analysis import details, report, report_html, results, tables

ROOT = Path(__file__).resolve().parents[1]


def problems(folder) -> dict[str, str]:
    return {problem.where: problem.what for problem in results.read(folder).problems}


def test_reads_cells_and_cliffs(tmp_path):
    for seed in (1, 2):
        for defense in ("one", "two"):
            write(tmp_path, cell(defense=defense, seed=seed, clean_acc=0.8 + seed / 16))
    cliff(tmp_path)
    found = results.read(tmp_path)
    assert found.problems == [] and len(found.cells) == 4 and list(found.cliffs) == [("alpha", 1)]
    assert found.figures("alpha", "two", "clean_acc") == {1: 0.8625, 2: 0.925}
    assert found.references("alpha", "oracle_clean_acc") == {1: 0.95, 2: 0.95}
    assert results.read(tmp_path / "nothing").cells == {}


def test_other_schema_versions_are_told(tmp_path):
    write(tmp_path, cell() | {"schema_version": 1})
    write(tmp_path, cell(seed=2) | {"schema_version": 99})
    write(tmp_path, cell(seed=3))
    found = problems(tmp_path)
    assert "schema version 1, this report reads 2" in found["alpha/one/seed1.json"]
    assert "schema version 99" in found["alpha/one/seed2.json"]
    assert list(results.read(tmp_path).cells) == [("alpha", "one", 3)]


def test_two_results_for_one_cell_are_both_left_out(tmp_path):
    write(tmp_path, cell(clean_acc=0.1))
    write(tmp_path, cell(clean_acc=0.9), "seed1-again.json")
    write(tmp_path, cell(seed=2, clean_acc=0.5))
    found = results.read(tmp_path)
    assert found.figures("alpha", "one", "clean_acc") == {2: 0.5}
    assert "2 results for one cell" in problems(tmp_path)["alpha/one/seed1"]


def test_a_file_in_the_wrong_place_is_not_used(tmp_path):
    write(tmp_path, cell(seed=5), "seed6.json")
    assert results.read(tmp_path).cells == {}
    assert "holds alpha/one/seed5" in problems(tmp_path)["alpha/one/seed6.json"]


def test_budgets_of_their_own_are_apart(tmp_path):
    for budget, name in (("fraction", "seed1"), ("auto", "seed1-auto"), (7, "seed1-budget7"), (8, "seed2-budget7")):
        content = cell(seed=int(name[4]))
        content["conditions"]["parameters"]["filter"]["budget"] = budget
        write(tmp_path, content, f"{name}.json")
    found = results.read(tmp_path)
    assert found.defenses("alpha") == ["one", "one, 7 rows", "one, auto"]
    assert {key[1]: content["name"].rpartition("/")[2] for key, content in found.cells.items()} == {
        "one": "seed1", "one, 7 rows": "seed1-budget7", "one, auto": "seed1-auto"
    }  # fmt: skip
    assert list(problems(tmp_path)) == ["alpha/one/seed2-budget7.json"], "the name says 7 rows, the file 8"
    write(tmp_path, found.cells["alpha", "one, auto", 1], "seed01-auto.json")
    assert "2 results for one cell" in problems(tmp_path)["alpha/one/seed1-auto"]


def test_missing_cells_are_told(tmp_path):
    for defense, seeds in (("one", (1, 2, 3)), ("two", (2,))):
        for seed in seeds:
            write(tmp_path, cell(defense=defense, seed=seed))
    assert problems(tmp_path) == {"alpha/two": "no result for seed 1, 3, which other defenses of the setting have"}


def test_cells_of_other_parameters_are_not_averaged(tmp_path):
    for seed in (1, 2, 3):
        content = cell(seed=seed)
        if seed == 3:
            content["conditions"]["parameters"]["setting"]["train"]["epochs"] = 99
        write(tmp_path, content)
    assert results.read(tmp_path).seeds("alpha") == [1, 2]
    assert "other parameters (setting)" in problems(tmp_path)["alpha/one/seed3"]


def test_defenses_with_other_budgets_are_not_compared(tmp_path):
    for defense in ("one", "two", "three"):
        content = cell(defense=defense)
        if defense == "three":
            content["conditions"]["parameters"]["filter"]["budget_multiplier"] = 10.0
        write(tmp_path, content)
    assert results.read(tmp_path).defenses("alpha") == ["one", "two"]
    assert "other parameters (filter)" in problems(tmp_path)["alpha/three/seed1"]


def test_a_cliff_of_other_parameters_is_not_drawn(tmp_path):
    write(tmp_path, cell())
    path = cliff(tmp_path)
    assert results.read(tmp_path).cliffs
    content = json.loads(path.read_text())
    content["conditions"]["parameters"]["setting"]["train"]["epochs"] = 99
    path.write_text(json.dumps(content))
    assert not results.read(tmp_path).cliffs
    assert "other parameters (setting)" in problems(tmp_path)["alpha/cliff/seed1"]


def test_only_cells_of_the_same_victim_are_compared(tmp_path):
    for seed, clean in ((1, 0.92), (2, 0.5)):
        write(tmp_path, cell(defense="one", seed=seed, recall=0.8))
        write(tmp_path, cell(defense="two", seed=seed, recall=0.6, undefended=(clean, 1.0)))
    assert results.read(tmp_path).pair("alpha", "one", "two", "poison_recall") == ({1: 0.8}, {1: 0.6})


def test_references_that_disagree_are_left_out(tmp_path):
    write(tmp_path, cell(defense="one", oracle=(0.95, 0.0)))
    write(tmp_path, cell(defense="two", oracle=(0.90, 0.0)))
    assert results.read(tmp_path).references("alpha", "oracle_clean_acc") == {}
    assert "disagree on oracle_clean_acc" in problems(tmp_path)["alpha/seed1"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"12", b"\xff\xfe", b'{"schema_version": 2}', b"[" * 10**5]
)
def test_damaged_files_are_one_line(tmp_path, content):
    path = write(tmp_path, cell())
    path.write_bytes(content)
    found = problems(tmp_path)
    assert list(found) == ["alpha/one/seed1.json"] and "\n" not in found["alpha/one/seed1.json"]


def paths(value, where=()):
    """Every place within a nested value."""
    yield where
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, (*where, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from paths(inner, (*where, number))


@pytest.mark.parametrize("wrong", [None, "word", -1, [], {}, [[]], True, float("nan"), 1e300, {"a": {}}], ids=repr)
def test_whatever_is_wrong_anywhere_the_report_is_drawn(tmp_path, wrong):
    """Each value of a file is replaced in turn: the file is told or drawn, and nothing fails."""
    good, told = cell(), 0
    for place in paths(good):
        content = copy.deepcopy(good)
        if not place:
            content = wrong
        else:
            at = content
            for key in place[:-1]:
                at = at[key]
            at[place[-1]] = wrong
        path = tmp_path / "alpha/one/seed1.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        found = results.read(tmp_path)
        assert found.problems or found.cells
        told += bool(found.problems)
        assert report_html.page(found) and report.all_tables(found)
    assert told > 30, "most replacements are mistakes"


def test_a_damaged_cliff_is_told(tmp_path):
    write(tmp_path, cell())
    path = cliff(tmp_path)
    content = json.loads(path.read_text())
    for points in ([{}], 3, [{"poison_left": -1, "share_left": 0, "asr": 0, "clean_acc": 0}]):
        path.write_text(json.dumps(content | {"points": points}))
        assert "damaged" in problems(tmp_path)["alpha/cliff/seed1.json"]


def test_no_surrogate_or_strange_name_breaks_the_files(tmp_path):
    content = cell()
    content["removed"]["classes"] = ["\ud800", "a|b`c\n</td>"]
    write(tmp_path, content)
    found = results.read(tmp_path)
    assert found.problems == []
    assert report_html.page(found).encode("utf-8", "replace") and "\\|" in tables.markdown(
        details.by_class(found, "alpha")
    )


DUMPS = sorted((ROOT / "results").rglob("*.npz"))


def test_there_is_a_dump():
    assert DUMPS, "export one small cell with --dump"


@pytest.mark.parametrize("path", DUMPS, ids=lambda path: str(path.relative_to(ROOT / "results")))
def test_committed_figures_follow_from_the_stored_scores(path):
    """Straight from the definitions, not with the code that made the figures."""
    with np.load(path) as dump:
        scores, poisoned, kept = dump["scores"], dump["poisoned"], dump["kept"]
    found = json.loads(path.with_suffix(".json").read_text())
    metrics, budget, n = found["metrics"], found["filter"], len(scores)
    assert budget["n"] == n and budget["n_poison"] == poisoned.sum()
    order = sorted(range(n), key=lambda row: (-scores[row], row))
    fraction = found["conditions"]["parameters"]["setting"]["poison"]["poison_fraction"]
    if found["conditions"]["parameters"]["filter"] == {"budget": "fraction", "budget_multiplier": 1.0}:
        assert sorted(order[: round(fraction * n)]) == np.flatnonzero(~kept).tolist()
    assert metrics["poison_recall"] == (~kept & poisoned).sum() / poisoned.sum()
    assert metrics["rows_removed"] == (~kept).sum() and metrics["clean_removed"] == (~kept & ~poisoned).sum()
    assert budget["precision"] == pytest.approx((~kept & poisoned).sum() / (~kept).sum())
    for multiplier, recall in budget["recall_at"].items():
        assert recall == poisoned[order[: round(float(multiplier) * fraction * n)]].sum() / poisoned.sum()
    assert metrics["auroc"] == pytest.approx(roc_auc_score(poisoned, scores), abs=1e-12)
    pairs = scores[poisoned][:, None] - scores[~poisoned][None]
    assert metrics["auroc"] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean(), abs=1e-12)
    assert metrics["average_precision"] == pytest.approx(average_precision_score(poisoned, scores), abs=1e-12)
    assert metrics["defense_score"] == pytest.approx(
        (metrics["clean_acc"] + 1 - metrics["asr"] + metrics["poison_recall"]) / 3, abs=1e-12
    )


def test_all_committed_results_are_used():
    """Some may be missing; none may be unreadable, ambiguous or of other parameters."""
    odd = [one for one in results.read(ROOT / "results").problems if not one.what.startswith("no result for seed")]
    assert odd == []
