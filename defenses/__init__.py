"""Defenses: one file per method, and the contract that each keeps.

A defense looks at a training set that may hold poisoned samples and gives each sample a score: **higher = more
suspicious**. What it sees is what a network trained on that set (the victim) makes of it. The pipeline then removes
the highest-scored samples and trains again. To add a method, write one file, ``defenses/<name>.py``, and name its
options in ``params.yaml`` (``defenses.<name>: {}`` if it has none). The file needs no base class and no import from
this project, and a file written for the public benchmark (``custom_backdoor_defense.py``) works unchanged::

    import numpy as np


    class BackdoorDefense:
        def __init__(self, power=2.0):
            self.power = power

        def fit(self, features, labels, poison_fraction, **kwargs):
            self.labels_ = np.array(labels)
            self.means_ = {c: features[labels == c].mean(axis=0) for c in np.unique(labels)}

        def score_samples(self, features, logits):
            means = np.stack([self.means_[c] for c in self.labels_])
            return (np.abs(features - means) ** self.power).sum(axis=1)

``__init__(self, **options)``
    Options arrive by name from ``params.yaml``; one that the signature does not take is refused. Raise ValueError for
    a value that makes no sense: its message is shown to the user.
``fit(self, features, labels, poison_fraction, **kwargs)``
    ``features``: (N, D) float32, the victim's penultimate features. ``labels``: (N,) int64 in [0, C), the labels that
    the victim was trained on, poisoned ones included; a class may be empty or have one row. ``poison_fraction``: the
    poisoned share of all N rows, in (0, 0.5], or None where it is not known. Two more are passed by name to a fit
    that takes them (as parameters, or through ``**kwargs``): ``seed``, an int >= 0, the only source of randomness a
    defense should use, absent where the caller has none; ``n_classes``, C. What fit returns is ignored.
``score_samples(self, features, logits)``
    The same features, row for row, and the ``logits`` (N, C) float32 of the same victim. Returns (N,) real, finite
    numbers. Called once, after fit.

The same inputs must give the same scores, and permuted rows the permuted scores: the order of the rows tells nothing
about poison and must not be used. Leave the arrays as they are. (``score`` gives each call arrays of its own, so
that a file from elsewhere that normalises in place spoils nothing; the contract tests pass read-only ones.)

Optional attributes:

``RELIES_ON`` (class)
    A tuple of words: what the method is told or assumes about the poison. ``"poison_fraction"``: it reads the
    fraction, and is refused where that is None. ``"class_sizes"``: it takes clean classes to be equally large.
    ``"minority_in_class"``: it takes poison to be less than half of its class. ``()``: nothing. A file without
    ``RELIES_ON`` is taken to rely on the fraction, which fit has to accept in any case.
``MAY_USE`` (class)
    A tuple of the same words: what the method uses where it is told, and does without where it is not. Default ``()``.
``CHUNKED = True`` (class)
    features and logits may be h5py data sets, float16 or float32, to be read in slices (``features[a:b]``).
    Without it they are read whole, as float32.
``n_suspected_`` (int), ``suspected_classes_`` (sequence of int)
    Set by a method that decides for itself how many rows are poisoned, or which classes hold them. Whoever called
    ``score`` reads them from the instance afterwards.

Files whose name begins with an underscore are no defenses. ``tests/defenses/test_contract.py`` runs over all others.
"""

import difflib
import hashlib
import importlib.util
import inspect
import numbers
import sys
import traceback
from pathlib import Path

import numpy as np

__all__ = ["DefenseError", "available", "load", "needs_fraction", "relies_on", "score"]

_FOLDER = Path(__file__).resolve().parent
_METHODS = {"fit": ("features", "labels", "poison_fraction"), "score_samples": ("features", "logits")}
_WORDS = ("poison_fraction", "class_sizes", "minority_in_class")
_BLOCK_VALUES = 2**22  # values checked at a time: 16 MiB of float32
_LARGEST_SCORE = 1e150  # beyond, differences and squares of scores overflow; as good as infinite


class DefenseError(ValueError):
    """A defense that cannot be used, or inputs that it cannot be given: one line, to be shown to the user."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))


def available():
    """Names of the defenses in this folder, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if not path.name.startswith("_"))


def load(name_or_path, /, **options):
    """Make a defense from its name or its file.

    Parameters
    ----------
    name_or_path : str or Path
        A name from ``available()``, or the path of a ``.py`` file anywhere. The file is read anew on each call.
    **options
        What the file's ``BackdoorDefense`` takes in its constructor.

    Returns
    -------
    An instance of the file's ``BackdoorDefense``.

    Raises
    ------
    DefenseError
        Unknown name, unknown or refused option, or a file that cannot be imported or does not keep the contract.
    """
    path = _find(name_or_path)
    cls = getattr(_import_file(path), "BackdoorDefense", None)
    if not inspect.isclass(cls):
        raise DefenseError(f"{path} has no class BackdoorDefense; the contract stands at the top of {__file__}")
    missing = [method for method in _METHODS if not callable(getattr(cls, method, None))]
    if missing:
        raise DefenseError(f"class BackdoorDefense in {path} has no method {' and no method '.join(missing)}")
    relies_on(cls)

    parameters = inspect.signature(cls).parameters
    unknown = [option for option in options if not _takes(parameters, option)]
    if unknown:
        raise DefenseError(f"defense {path.stem} has no option {', '.join(unknown)}; {_describe(parameters)}")
    try:
        defense = cls(**options)
    except (TypeError, ValueError) as error:
        raise DefenseError(f"defense {path.stem} refuses its options: {error}; {_describe(parameters)}") from error
    except Exception as error:
        raise DefenseError(f"defense {path.stem} failed in __init__: {_cause(error, path)}") from error
    for method, arguments in _METHODS.items():
        signature = inspect.signature(getattr(defense, method))
        try:
            signature.bind_partial(*arguments)
        except TypeError as error:
            expected = ", ".join(arguments)
            raise DefenseError(f"defense {path.stem} has {method}{signature}; expected {method}({expected})") from error
    return defense


def relies_on(defense):
    """What a defense (instance or class) says it relies on: a tuple of words, or None if it says nothing."""
    words = getattr(defense, "RELIES_ON", None)
    if words is None:
        return None
    if not isinstance(words, (tuple, list)) or not all(isinstance(word, str) for word in words):
        raise DefenseError(
            f"RELIES_ON of defense {_name(defense)} is {words!r}; expected a tuple of words such as "
            "('poison_fraction',) or ()"
        )
    if unknown := [word for word in words if word not in _WORDS]:
        raise DefenseError(f"RELIES_ON of defense {_name(defense)} names {unknown[0]!r}; known: {', '.join(_WORDS)}")
    return tuple(words)


def needs_fraction(defense):
    """Whether a defense has to be told the poison fraction: it says so, or says nothing of what it relies on."""
    words = relies_on(defense)
    return words is None or "poison_fraction" in words


def score(defense, features, logits, labels, poison_fraction, *, seed=None, n_classes=None):
    """Fit a defense and score each sample; higher = more suspicious.

    The one edge at which inputs and scores are checked. Each call of the defense gets arrays of its own, read or
    copied just before it: pass h5py data sets rather than arrays, and the features are in memory once.

    Parameters
    ----------
    defense : object
        What ``load`` returned, or any object with the same two methods.
    features : (N, D) array or h5py data set, finite
    logits : (N, C) array or h5py data set, finite
    labels : (N,) integers in [0, C)
        After poisoning.
    poison_fraction : float in (0, 0.5], or None
        Poisoned share of the N rows; None where it is not known.
    seed : int >= 0, optional
    n_classes : int, optional
        C; if given, it must be the width of the logits.

    Returns
    -------
    scores : (N,) float64 array, finite

    Raises
    ------
    DefenseError
        Inputs or scores break the contract, the defense needs a fraction that is not known, or it failed itself
        (its own exception is the ``__cause__``).
    """
    features, logits, labels = _check_inputs(features, logits, labels)
    n_samples, width = logits.shape
    if n_classes is not None and n_classes != width:
        raise DefenseError(f"n_classes is {n_classes}, but the logits have {width} columns")
    if poison_fraction is not None:
        if not isinstance(poison_fraction, numbers.Real) or not 0 < poison_fraction <= 0.5:
            raise DefenseError(f"poison_fraction is {poison_fraction!r}; expected a number in (0, 0.5], or None")
        poison_fraction = float(poison_fraction)
    if poison_fraction is None and needs_fraction(defense):
        silent = relies_on(defense) is None
        reason = "does not say what it relies on (no RELIES_ON)" if silent else "relies on poison_fraction"
        raise DefenseError(
            f"defense {_name(defense)} {reason} and the fraction is not known here; give poison_fraction, or choose a "
            "defense whose RELIES_ON is without it"
        )

    parameters = inspect.signature(defense.fit).parameters
    keywords = {"seed": seed, "n_classes": width}
    keywords = {key: value for key, value in keywords.items() if value is not None and _takes(parameters, key)}
    chunked = getattr(defense, "CHUNKED", False) is True
    _call(defense, "fit", _private(features, chunked), labels, poison_fraction, **keywords)
    scores = _call(defense, "score_samples", _private(features, chunked), _private(logits, chunked))
    return _check_scores(scores, n_samples, _name(defense))


def _find(name_or_path):
    names = available()
    if isinstance(name_or_path, str) and name_or_path in names:
        return _FOLDER / f"{name_or_path}.py"
    path = Path(str(name_or_path))
    if path.suffix != ".py" and len(path.parts) == 1:
        close = difflib.get_close_matches(str(name_or_path), names, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise DefenseError(
            f"unknown defense {str(name_or_path)!r}{hint}; available: {', '.join(names)}; or the path of a .py file"
        )
    if path.suffix != ".py" or not path.is_file():
        raise DefenseError(f"no defense at {path}; expected a .py file, or one of: {', '.join(names)}")
    return path.resolve()


def _import_file(path):
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"_defense_{digest}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    try:
        # Not exec_module: it trusts a .pyc whose source has the same size and second, so a quick edit would be missed.
        exec(spec.loader.source_to_code(spec.loader.get_data(str(path)), str(path)), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise DefenseError(f"cannot import defense {path.stem}: {_cause(error, path)}") from error
    return module


def _takes(parameters, name):
    """Whether a signature takes an argument of this name, by name or through ``**kwargs``."""
    named = name in parameters and parameters[name].kind in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    return named or any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def _describe(parameters):
    return f"legal options: {', '.join(map(str, parameters.values()))}" if parameters else "it takes no options"


def _file(defense):
    """The file that a defense was read from, or None."""
    cls = defense if inspect.isclass(defense) else type(defense)
    return getattr(sys.modules.get(cls.__module__), "__file__", None)


def _name(defense):
    file = _file(defense)
    if file:
        return Path(file).stem
    return (defense if inspect.isclass(defense) else type(defense)).__name__


def _cause(error, path):
    """``ValueError: message (file.py:line)``, with the deepest line that stands in the defense's own file."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{type(error).__name__}: {error.msg} ({Path(path).name}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(path)]
    frame = (own or frames)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"


def _call(defense, method, *arguments, **keywords):
    try:
        return getattr(defense, method)(*arguments, **keywords)
    except (Exception, SystemExit) as error:
        raise DefenseError(f"defense {_name(defense)} failed in {method}: {_cause(error, _file(defense))}") from error


def _is_dataset(values):
    return hasattr(values, "read_direct")  # h5py.Dataset, told apart without importing h5py


def _private(values, chunked):
    if chunked and _is_dataset(values):
        return _Rows(values)
    return np.array(values, dtype=np.float32, order="C")


class _Rows:
    """The rows of an h5py data set without its file, whose name and attributes are not the defense's business."""

    ndim = 2

    def __init__(self, values):
        self._values, self.shape, self.dtype = values, values.shape, values.dtype

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        return self._values[rows]


def _check_inputs(features, logits, labels):
    features, logits = (x if _is_dataset(x) else np.asarray(x) for x in (features, logits))
    labels = np.asarray(labels)
    for name, values in (("features", features), ("logits", logits)):
        if len(values.shape) != 2 or 0 in values.shape or values.dtype.kind not in "iuf":
            raise DefenseError(
                f"{name} have shape {values.shape} and dtype {values.dtype}; expected a matrix of real numbers with at "
                "least one row and one column"
            )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DefenseError(
            f"labels have shape {labels.shape} and dtype {labels.dtype}; expected one integer for each row"
        )
    rows = (features.shape[0], logits.shape[0], labels.shape[0])
    if len(set(rows)) > 1:
        raise DefenseError(f"features, logits and labels have {rows[0]}, {rows[1]} and {rows[2]} rows; expected equal")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise DefenseError(
            f"labels run from {labels.min()} to {labels.max()}; expected 0 to {logits.shape[1] - 1}, one class for "
            "each column of the logits"
        )
    _check_finite("features", features)
    _check_finite("logits", logits)
    return features, logits, labels.astype(np.int64)  # a copy, whatever the dtype


def _check_finite(name, values):
    block = max(1, _BLOCK_VALUES // values.shape[1])
    for start in range(0, values.shape[0], block):
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is reported as such
            finite = np.isfinite(np.asarray(values[start : start + block]).astype(np.float32)).all(axis=1)
        if not finite.all():
            raise DefenseError(
                f"{name} hold NaN or infinity (as float32), first in row {start + finite.argmin()}; the victim's "
                "training has probably diverged"
            )


def _check_scores(scores, n_samples, name):
    expected = f"expected one real number for each of the {n_samples} rows, shape ({n_samples},)"
    try:
        scores = np.asarray(scores)
    except Exception as error:
        raise DefenseError(f"score_samples of defense {name} returned no array ({error}); {expected}") from error
    if scores.shape != (n_samples,) or scores.dtype.kind not in "iuf":
        raise DefenseError(
            f"score_samples of defense {name} returned shape {scores.shape} and dtype {scores.dtype}; {expected}"
        )
    scores = np.array(scores, dtype=np.float64)
    wrong = np.flatnonzero(~(np.abs(scores) < _LARGEST_SCORE))
    if wrong.size:
        raise DefenseError(
            f"score_samples of defense {name} returned NaN or infinity for {wrong.size} of {n_samples} rows, first for "
            f"row {wrong[0]}"
        )
    return scores
