"""That the story of `quick` is true. In a file of its own, so that it runs beside tests/test_pipeline.py."""

from test_pipeline import Clone


def test_the_story_of_quick_is_true(tmp_path):
    """The default setting, whole: the victim is backdoored and good, and without the poison it is good and clean."""
    clone = Clone(tmp_path)
    clone.dvc("exp", "run", "-S", "setting=quick", "-S", "seed=42", "-S", "defense=random_filter")
    found = clone.metrics()
    assert found["cell"] == "quick/random_filter/seed42"
    assert found["undefended_asr"] >= 0.95 and found["undefended_clean_acc"] >= 0.97
    assert found["oracle_asr"] <= 0.02 and found["oracle_clean_acc"] >= 0.97
    assert found["rows_removed"] == 72 and found["poison_recall"] < 0.2
    plots = clone.folder / "plots-drawn"
    clone.dvc("plots", "show", "-o", str(plots))
    assert (plots / "index.html").stat().st_size > 10_000
