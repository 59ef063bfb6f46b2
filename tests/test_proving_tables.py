"""The pages of the proving ground are what its JSON files make."""

from pathlib import Path

import pytest

from analysis import proving_tables

ROOT = Path(__file__).resolve().parents[1]


def record(dump, use="report", asr=1.0, **recalls):
    scored = {f"{name} / told": {"recall": recall, "class_auroc": 0.9} for name, recall in recalls.items()}
    return {
        "dump": dump, "seed": 1, "use": use, "n": 100, "n_poisoned": 10, "share_of_class": 0.5, "ceiling": 0.9,
        "undefended": {"clean_acc": 0.9, "asr": asr}, "scored": scored,
    }  # fmt: skip


def test_the_committed_pages_are_what_the_files_make():
    records = proving_tables.read(ROOT / "results/proving_ground")
    assert (ROOT / "results/proving_ground/README.md").read_text() == proving_tables.page(records)
    for path in proving_tables.PAGES:
        text = (ROOT / path).read_text()
        assert proving_tables.BLOCK.search(text) and text == proving_tables.with_block(path, text, records)


def test_means_leave_out_attacks_that_did_not_take():
    records = [record("a", one=1.0, two=0.5), record("b", one=0.8, two=0.9), record("c", asr=0.1, one=0.0, two=0.0)]
    text = proving_tables.table(records, ["one / told", "two / told"], "recall")
    assert "| *mean* | | | | 0.900 | 0.700 |" in text
    assert "| *mean rank* | | | | 1.5 | 1.5 |" in text
    assert "| c (1) | 50% | 0.100 | 0.900 | 0.000 | 0.000 |" in text


def test_a_defense_that_was_not_run_nearly_everywhere_gets_no_column():
    records = [record("a", one=1.0, two=0.5), record("b", one=0.8)]
    assert proving_tables.defenses_told(records) == ["one / told"]
    records = [record(str(i), one=1.0, two=0.5) for i in range(9)] + [record("z", one=0.5)]
    assert proving_tables.defenses_told(records) == ["one / told", "two / told"]


def test_a_gap_is_shown_and_its_row_is_in_no_mean():
    records = [record("a", one=1.0, two=0.5), record("b", one=0.5)]
    text = proving_tables.table(records, ["one / told", "two / told"], "recall")
    assert "| b (1) | 50% | 1.000 | 0.900 | 0.500 |  |" in text
    assert "| *mean of the 1 rows without a gap* | | | | 1.000 | 0.500 |" in text


def test_ablations_are_told_with_mean_and_lowest():
    records = [record("a"), record("b")]
    for found, recall in zip(records, (1.0, 0.5)):
        found["scored"] = {f"whitened_mixture / told{end}": {"recall": recall} for end in ("", " / no oddness")}
    records += [record("c", whitened_mixture=0.0)]  # not run with ablations
    text = proving_tables.ablation(records)
    assert "| *all ingredients* | 0.750, 0.500 |" in text and "| no oddness | 0.750, 0.500 |" in text
    records[0]["scored"]["whitened_mixture / told / one more"] = {"recall": 1.0}  # and not on the other
    text = proving_tables.ablation(records)
    assert "| *all ingredients* | 1.000, 1.000 |" in text and "| no oddness | 1.000, 1.000 |" in text


def test_ablations_by_an_earlier_version_are_told():
    found = record("a", whitened_mixture=1.0)
    found["scored"]["whitened_mixture / told / no oddness"] = {"recall": 0.5, "version": "1" * 16, "file": "0" * 16}
    assert "On 1 of 1 dumps by an earlier version" in proving_tables.ablation([found])
    found["scored"]["whitened_mixture / told / no oddness"]["file"] = proving_tables.version_of(
        ROOT / "defenses/whitened_mixture.py"
    )
    assert "earlier" not in proving_tables.ablation([found])


def test_development_and_report_are_never_in_one_table():
    text = proving_tables.page([record("a", use="development", one=1.0), record("b", one=0.5)])
    reported, development = text.split("## Development")
    assert "| b (1)" in reported and "| a (1)" not in reported and "| a (1)" in development


@pytest.mark.parametrize("suspected", [0, 7])
def test_what_is_suspected_on_clean_data_is_shown(suspected):
    found = record("clean") | {"n_poisoned": 0, "scored": {"one / blind": {"n_suspected": suspected}}}
    assert f"| clean (1) | 100 | {suspected} |" in proving_tables.page([found])


def test_a_figure_of_an_earlier_version_is_marked():
    now = proving_tables.version_of(ROOT / "defenses/scan.py")
    found = record("a", scan=0.5, elsewhere=1.0)
    for version, expected in ((now, "| 0.500 |"), ("0" * 16, "| 0.500† |")):
        found["scored"]["scan / told"]["version"] = version
        text = proving_tables.table([found], ["scan / told", "elsewhere / told"], "recall")
        assert expected in text and (proving_tables.NOTE in text) == (version != now)


def test_comments_and_docstrings_make_no_version(tmp_path):
    text = '"""A."""\n\nLIMIT = "a"  # of\n\n\ndef f(x):\n    """B."""\n    return x + len("C" "D")\n'
    versions = set()
    for number, (old, new) in enumerate((
        ("A.", "A,\nlonger"), ("  # of", ""), ("B.", "b"), ("x + len(", "x + len(\n        "),
        ('"a"', '"b"'), ('"D"', '"E"'), ("x +", "x -"),
    )):  # fmt: skip
        path = tmp_path / f"{number}.py"
        path.write_text(text.replace(old, new))
        versions.add(proving_tables.version_of(path))
    inside, outside = ("for x in y:\n    t += x\n    t *= 2\n", "for x in y:\n    t += x\nt *= 2\n")
    for path, loop in ((tmp_path / "inside.py", inside), (tmp_path / "outside.py", outside)):
        path.write_text(loop)
    assert proving_tables.version_of(tmp_path / "inside.py") != proving_tables.version_of(tmp_path / "outside.py")
    path = tmp_path / "same.py"
    path.write_text(text)
    assert len(versions) == 4 and proving_tables.version_of(path) in versions
    assert proving_tables.version_of(path, '{"LIMIT": 1}') not in versions
