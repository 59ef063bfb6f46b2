"""Loading and calling: what is accepted, what is refused, and with which words."""

import sys
import textwrap
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

import defenses

FEATURES = np.arange(12, dtype=np.float32).reshape(6, 2)
LOGITS = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]]
LABELS = np.array([0, 1, 2, 0, 1, 2])

# As written for the public benchmark: no options, no RELIES_ON, and it normalises in place.
PUBLIC_FILE = """
import numpy as np


class BackdoorDefense:
    def __init__(self):
        self.means = {}

    def fit(self, features, labels, poison_fraction, **kwargs):
        features -= features.min(axis=0)
        for c in np.unique(labels):
            self.means[c] = features[labels == c].mean(axis=0)
        self.labels = labels

    def score_samples(self, features, logits):
        features -= features.min(axis=0)
        return np.array([np.abs(x - self.means[y]).sum() for x, y in zip(features, self.labels)])
"""

WITHOUT_FRACTION = """
class BackdoorDefense:
    RELIES_ON = ()
    def fit(self, features, labels, poison_fraction, **kwargs):
        pass
    def score_samples(self, features, logits):
        return {scores}
"""


class Recorder:
    """Keeps what it was given; subclasses change the signature of fit."""

    RELIES_ON = ()

    def fit(self, features, labels, poison_fraction, **kwargs):
        self.features, self.labels, self.poison_fraction, self.kwargs = features, labels, poison_fraction, kwargs

    def score_samples(self, features, logits):
        self.score_features, self.score_logits = features, logits
        return np.arange(len(features))


def score(defense, features=FEATURES, logits=LOGITS, labels=LABELS, poison_fraction=0.1, **keywords):
    return defenses.score(defense, features, logits, labels, poison_fraction, **keywords)


def message(call, *arguments, **keywords):
    with pytest.raises(defenses.DefenseError) as caught:
        call(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def contains(text, *parts):
    missing = [part for part in parts if part not in text]
    assert not missing, f"{missing} not in {text!r}"


# Finding


def test_the_baselines_are_available():
    names = defenses.available()
    assert names == sorted(names)
    assert {"confidence_filter", "spectral_signature", "activation_clustering", "fine_pruning", "random_filter"} <= set(
        names
    )
    assert not any(name.startswith("_") for name in names)


def test_unknown_name():
    text = message(defenses.load, "spectral_sig")
    contains(text, "unknown defense 'spectral_sig' (did you mean spectral_signature?)", "available: activation_")
    text = message(defenses.load, "zzz")
    contains(text, "unknown defense 'zzz'", ", spectral_signature")
    assert "did you mean" not in text


def test_the_loader_s_own_file_is_no_defense():
    contains(message(defenses.load, "__init__"), "unknown defense '__init__'")


def test_path_without_a_file(tmp_path):
    contains(message(defenses.load, tmp_path / "none.py"), "no defense at", "none.py", "spectral_signature")
    contains(message(defenses.load, str(tmp_path)), "no defense at", "expected a .py file")
    (tmp_path / "folder.py").mkdir()
    contains(message(defenses.load, tmp_path / "folder.py"), "no defense at", "folder.py")


def test_a_path_is_loaded_as_str_and_as_path_and_relative(write, tmp_path, monkeypatch):
    path = write(PUBLIC_FILE)
    monkeypatch.chdir(tmp_path)
    for form in (path, str(path), "mine.py"):
        assert type(defenses.load(form)).__name__ == "BackdoorDefense"


# Importing


def test_public_benchmark_file_loads_and_scores_unchanged(write):
    features, labels = FEATURES.copy(), LABELS.copy()
    scores = score(defenses.load(write(PUBLIC_FILE)), features=features, labels=labels)
    # Rows i and i + 3 share a class and differ by 6 in both columns: 3 + 3 from their mean each.
    np.testing.assert_array_equal(scores, [6, 6, 6, 6, 6, 6])
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(features, FEATURES)
    np.testing.assert_array_equal(labels, LABELS)


def test_the_example_in_the_contract_works(write):
    example = defenses.__doc__.split("::\n\n", 1)[1].split("\n\n``__init__", 1)[0]
    scores = score(defenses.load(write(textwrap.dedent(example)), power=1))
    np.testing.assert_array_equal(scores, [6, 6, 6, 6, 6, 6])  # as above


def test_syntax_error(write):
    text = message(defenses.load, write("import numpy\n\ndef broken(:\n"))
    contains(text, "cannot import defense mine", "SyntaxError: invalid syntax", "(mine.py:3)")


def test_missing_import(write):
    text = message(defenses.load, write("import numpy\nimport no_such_module_anywhere\n"))
    contains(text, "cannot import defense mine", "No module named 'no_such_module_anywhere'", "(mine.py:2)")


def test_error_while_the_file_runs_names_its_own_line(write):
    text = message(defenses.load, write("import numpy as np\nx = 1\nnp.stack([])\n"))
    contains(text, "cannot import defense mine: ValueError:", "(mine.py:3)")


def test_exit_while_the_file_runs(write):
    text = message(defenses.load, write("raise SystemExit('usage:\\n  mine')\n"))
    contains(text, "SystemExit: usage: mine (mine.py:1)")


def test_a_failed_import_leaves_no_module_behind(write):
    before = set(sys.modules)
    message(defenses.load, write("raise ValueError\n"))
    assert set(sys.modules) == before


@pytest.mark.parametrize("text", ["x = 1\n", "BackdoorDefense = 1\n", "def BackdoorDefense(): pass\n"])
def test_no_class(write, text):
    contains(message(defenses.load, write(text)), "mine.py has no class BackdoorDefense", "__init__.py")


def test_missing_methods(write):
    text = message(defenses.load, write("class BackdoorDefense:\n    fit = 1\n"))
    contains(text, "mine.py has no method fit and no method score_samples")
    text = message(defenses.load, write("class BackdoorDefense:\n    def fit(self): pass\n"))
    assert text.endswith("has no method score_samples")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "labels, poison_fraction, **kwargs",
            "labels",
            "has fit(features, labels); expected fit(features, labels, poison_fr",
        ),
        ("features, logits", "features", "has score_samples(features); expected score_samples(features, logits)"),
    ],
)
def test_too_few_arguments(write, old, new, words):
    assert old in PUBLIC_FILE
    contains(message(defenses.load, write(PUBLIC_FILE.replace(old, new))), "defense mine", words)


@pytest.mark.parametrize("value", ["'poison_fraction'", "('poison_fraction')", "(1,)", "True"])
def test_relies_on_that_is_no_tuple_of_words(write, value):
    path = write(f"{WITHOUT_FRACTION.format(scores=0)}\nBackdoorDefense.RELIES_ON = {value}\n")
    contains(message(defenses.load, path), "RELIES_ON of defense mine is", "expected a tuple of words")


def test_relies_on_an_unknown_word(write):
    """A misspelt word would let a defense that needs the fraction run without it."""
    path = write(f"{WITHOUT_FRACTION.format(scores=0)}\nBackdoorDefense.RELIES_ON = ('poison_fractoin',)\n")
    contains(message(defenses.load, path), "'poison_fractoin'; known: poison_fraction, class_sizes, minority_in_class")


def test_relies_on(write):
    assert defenses.relies_on(defenses.load(write(PUBLIC_FILE))) is None
    assert defenses.relies_on(SimpleNamespace(RELIES_ON=["poison_fraction"])) == ("poison_fraction",)
    assert defenses.relies_on(defenses.load("random_filter")) == ()


def test_an_edited_file_is_read_anew(write):
    path = write(WITHOUT_FRACTION.format(scores="[1] * 6"))
    assert score(defenses.load(path))[0] == 1
    write(WITHOUT_FRACTION.format(scores="[2] * 6"))  # same size, and most likely the same second
    assert score(defenses.load(path))[0] == 2


def test_a_file_may_hold_dataclasses_and_bear_any_name(write):
    text = """
from __future__ import annotations
import dataclasses
from typing import ClassVar

@dataclasses.dataclass
class BackdoorDefense:
    RELIES_ON: ClassVar[tuple] = ()
    power: float = 2.0

    def fit(self, features, labels, poison_fraction, **kwargs):
        pass

    def score_samples(self, features, logits):
        return features[:, 0] ** self.power
"""
    numpy_before, path_before = sys.modules["numpy"], list(sys.path)
    defense = defenses.load(write(text, "numpy.py"), power=3)
    np.testing.assert_array_equal(score(defense), [0, 8, 64, 216, 512, 1000])
    assert sys.modules["numpy"] is numpy_before
    assert sys.path == path_before
    contains(message(defenses.load, write(text, "numpy.py"), exponent=1), "no option exponent", "power: 'float' = 2.0")


def test_files_of_one_name_in_two_folders_stay_apart(write, tmp_path):
    (tmp_path / "other").mkdir()
    first = defenses.load(write(WITHOUT_FRACTION.format(scores="[1] * 6")))
    second = defenses.load(write(WITHOUT_FRACTION.format(scores="[2] * 6"), "other/mine.py"))
    assert type(first).__module__ != type(second).__module__


# Options


def test_unknown_option():
    text = message(defenses.load, "activation_clustering", components=3, n_components=4)
    contains(text, "defense activation_clustering has no option components", "legal options: n_components=10")
    contains(message(defenses.load, "random_filter", seed=3), "no option seed", "it takes no options")


def test_options_reach_the_constructor(write):
    assert defenses.load("activation_clustering", n_components=3).n_components == 3
    path = write(PUBLIC_FILE.replace("__init__(self)", "__init__(self, **options)").replace("= {}", "= options"))
    assert defenses.load(path, anything=1, path=2).means == {"anything": 1, "path": 2}


@pytest.mark.parametrize("error", ["ValueError", "TypeError"])
def test_refused_option(write, error):
    body = f"__init__(self, power=1, *, scale=2):\n        raise {error}('power is\\n 1')"
    text = message(defenses.load, write(PUBLIC_FILE.replace("__init__(self):", body)))
    contains(text, "defense mine refuses its options: power is 1;", "legal options: power=1, scale=2")


def test_missing_option(write):
    text = message(defenses.load, write(PUBLIC_FILE.replace("__init__(self)", "__init__(self, power)")))
    contains(text, "missing 1 required", "'power'", "legal options: power")


def test_constructor_that_fails_otherwise(write):
    text = message(defenses.load, write(PUBLIC_FILE.replace("self.means = {}", "{}['key']")))
    contains(text, "defense mine failed in __init__: KeyError: 'key' (mine.py:7)")


# Inputs


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"features": FEATURES[0]}, ["features have shape (2,)", "expected a matrix"]),
        ({"features": FEATURES[:, :0]}, ["features have shape (6, 0)"]),
        ({"features": FEATURES.astype(str)}, ["features have shape (6, 2)", "dtype <U", "real numbers"]),
        ({"features": FEATURES + 1j}, ["features", "complex"]),
        ({"logits": LOGITS[..., None]}, ["logits have shape (6, 3, 1)"]),
        ({"logits": LOGITS > 0}, ["logits", "dtype bool"]),
        ({"features": FEATURES[:0], "logits": LOGITS[:0], "labels": LABELS[:0]}, ["shape (0, 2)", "at least one row"]),
        ({"features": FEATURES[:5]}, ["5, 6 and 6 rows"]),
        ({"logits": LOGITS[:5]}, ["6, 5 and 6 rows"]),
        ({"labels": LABELS[:5]}, ["6, 6 and 5 rows"]),
        ({"labels": LABELS[:, None]}, ["labels have shape (6, 1)", "one integer for each row"]),
        ({"labels": LABELS.astype(float)}, ["labels", "float64", "integer"]),
        ({"labels": LABELS > 0}, ["labels", "bool"]),
        ({"labels": LABELS + 1}, ["labels run from 1 to 3; expected 0 to 2"]),
        ({"labels": LABELS - 1}, ["labels run from -1 to 1; expected 0 to 2"]),
        ({"n_classes": 4}, ["n_classes is 4", "3 columns"]),
        ({"poison_fraction": 0}, ["poison_fraction is 0; expected a number in (0, 0.5], or None"]),
        ({"poison_fraction": 0.51}, ["poison_fraction is 0.51"]),
        ({"poison_fraction": -0.1}, ["poison_fraction is -0.1"]),
        ({"poison_fraction": float("nan")}, ["poison_fraction is nan"]),
        ({"poison_fraction": "0.1"}, ["poison_fraction is '0.1'"]),
        ({"poison_fraction": True}, ["poison_fraction is True"]),
    ],
)
def test_refused_input(changes, parts):
    contains(message(score, Recorder(), **changes), *parts)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("name", ["features", "logits"])
def test_refused_value(name, value, monkeypatch):
    monkeypatch.setattr(defenses, "_BLOCK_VALUES", 6)  # two or three rows at a time
    values = {"features": FEATURES, "logits": LOGITS}[name].astype(np.float64)
    values[4, 1] = value
    contains(message(score, Recorder(), **{name: values}), f"{name} hold NaN or infinity", "first in row 4")


def test_unknown_fraction_is_refused_by_a_method_that_relies_on_it(write):
    text = message(score, defenses.load(write(PUBLIC_FILE)), poison_fraction=None)
    contains(text, "defense mine does not say what it relies on", "the fraction is not known", "give poison_fraction")
    told = defenses.load(write(PUBLIC_FILE + "\n    RELIES_ON = ('class_sizes', 'poison_fraction')\n"))
    contains(message(score, told, poison_fraction=None), "defense mine relies on poison_fraction")
    assert score(told).shape == (6,)


def test_unknown_fraction_is_passed_on_to_others():
    recorder = Recorder()
    score(recorder, poison_fraction=None)
    assert recorder.poison_fraction is None


# What a defense is given


def test_arrays_are_private_and_of_one_type():
    recorder = Recorder()
    features = np.asfortranarray(FEATURES.astype(np.float16))
    score(recorder, features=features, logits=LOGITS.tolist(), labels=LABELS.astype(np.uint8), poison_fraction=0.5)
    for array in (recorder.features, recorder.score_features, recorder.score_logits):
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert array.flags.writeable
    assert recorder.labels.dtype == np.int64
    assert recorder.poison_fraction == 0.5
    assert not np.shares_memory(recorder.features, recorder.score_features)
    np.testing.assert_array_equal(recorder.features, FEATURES)
    np.testing.assert_array_equal(recorder.score_logits, LOGITS)


def test_labels_are_private():
    recorder = Recorder()
    score(recorder)
    assert not np.shares_memory(recorder.labels, LABELS)


@pytest.mark.parametrize("chunked", [False, True])
def test_data_sets(chunked, tmp_path):
    recorder = Recorder()
    recorder.CHUNKED = chunked
    with h5py.File(tmp_path / "features.h5", "w") as file:
        features = file.create_dataset("features", data=FEATURES.astype(np.float16))
        logits = file.create_dataset("logits", data=LOGITS)
        score(recorder, features=features, logits=logits, labels=file.create_dataset("labels", data=LABELS))
        for given in (recorder.features, recorder.score_features, recorder.score_logits):
            assert isinstance(given, np.ndarray) != chunked
            assert len(given) == given.shape[0] and given.ndim == 2
            # The file's name and attributes would tell the setting and the fraction.
            assert not any(hasattr(given, name) for name in ("file", "attrs", "parent", "name"))
        np.testing.assert_array_equal(recorder.features[:], FEATURES)
        assert type(recorder.labels) is np.ndarray


def test_seed_and_n_classes_go_to_a_fit_that_takes_them():
    class Seeded(Recorder):
        def fit(self, features, labels, poison_fraction, seed=7):
            super().fit(features, labels, poison_fraction, seed=seed)

    class Bare(Recorder):
        def fit(self, features, labels, poison_fraction):
            super().fit(features, labels, poison_fraction)

    class PositionalOnly(Recorder):
        def fit(self, features, labels, poison_fraction, seed=7, /):
            super().fit(features, labels, poison_fraction, seed=seed)

    for cls, keywords, expected in [
        (Recorder, {"seed": 5}, {"seed": 5, "n_classes": 3}),
        (Recorder, {"n_classes": 3}, {"n_classes": 3}),
        (Seeded, {"seed": 0, "n_classes": 3}, {"seed": 0}),
        (Seeded, {}, {"seed": 7}),
        (Bare, {"seed": 5, "n_classes": 3}, {}),
        (PositionalOnly, {"seed": 5}, {"seed": 7}),
    ]:
        defense = cls()
        score(defense, **keywords)
        assert defense.kwargs == expected


# What a defense does


def test_failure_in_fit(write):
    path = write(PUBLIC_FILE.replace("self.labels = labels", "np.linalg.inv(np.zeros((2, 2)))"))
    with pytest.raises(defenses.DefenseError) as caught:
        score(defenses.load(path))
    assert str(caught.value) == "defense mine failed in fit: LinAlgError: Singular matrix (mine.py:13)"
    assert isinstance(caught.value.__cause__, np.linalg.LinAlgError)


def test_failure_in_score_samples(write):
    path = write(PUBLIC_FILE.replace("return np.array(", "raise OSError('two\\nlines')\n        return np.array("))
    with pytest.raises(defenses.DefenseError) as caught:
        score(defenses.load(path))
    assert str(caught.value) == "defense mine failed in score_samples: OSError: two lines (mine.py:17)"
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("scores", "parts"),
    [
        ("None", ["shape () and dtype object"]),
        ("logits[:, :1]", ["shape (6, 1)", "shape (6,)"]),
        ("features[:5, 0]", ["shape (5,)", "each of the 6 rows"]),
        ("features[:, 0] > 3", ["dtype bool", "real number"]),
        ("features[:, 0] * 1j", ["complex"]),
        ("list('abcdef')", ["dtype <U1"]),
        ("[[1], [2, 3]]", ["returned no array"]),
        ("features[:, 0] * float('nan')", ["returned NaN or infinity for 6 of 6 rows, first for row 0"]),
        ("[0, 1, 2, float('inf'), 4, 5]", ["returned NaN or infinity for 1 of 6 rows, first for row 3"]),
    ],
)
def test_refused_scores(write, scores, parts):
    text = message(score, defenses.load(write(WITHOUT_FRACTION.format(scores=scores))))
    contains(text, "score_samples of defense mine returned", *parts)


@pytest.mark.parametrize("scores", ["range(6)", "features[:, 0].astype('i2') // 2", "features[:, 0].astype('f2') / 2"])
def test_scores_become_float64(write, scores):
    result = score(defenses.load(write(WITHOUT_FRACTION.format(scores=scores))))
    assert result.dtype == np.float64
    np.testing.assert_array_equal(result, range(6))


def test_what_a_method_decides_for_itself_stays_on_the_instance(write):
    decided = "self.suspected_classes_ = [1]\n        self.labels = labels"
    defense = defenses.load(write(PUBLIC_FILE.replace("self.labels = labels", decided)))
    score(defense)
    assert defense.suspected_classes_ == [1]
