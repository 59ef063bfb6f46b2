"""What the files in `results/` must hold, and the first thing in which one differs."""

from typing import Any

SCHEMA_VERSION = 2  # of the cells, which `analysis.export` writes
CLIFF_VERSION = 1
LARGEST = 1e100  # beyond, means and pictures overflow
CURVES = ("undefended", "oracle", "retrained")

# What a file must hold. A type: such a value. A list of one: a list of such. A mapping: these keys at least; a key that
# ends in `?` may be missing or null. `str: x` stands for any number of keys.
NUMBERS = [float]
CELL = {
    "setting": str,
    "defense": str,
    "seed": int,
    "metrics": {
        "cell": str,
        "clean_acc": float,
        "rows_removed": int,
        "clean_removed": int,
        "undefended_clean_acc": float,
        "oracle_clean_acc": float,
        "gap_clean_acc": float,
        **dict.fromkeys(
            [
                *("asr?", "poison_recall?", "auroc?", "average_precision?", "defense_score?", "undefended_asr?"),
                *(
                    "undefended_defense_score?",
                    "oracle_asr?",
                    "oracle_defense_score?",
                    "gap_asr?",
                    "gap_defense_score?",
                ),
                *("target_clean_acc?", "undefended_target_clean_acc?", "oracle_target_clean_acc?"),
            ],
            float,
        ),
    },
    "filter": {"n": int, "n_poison": int, "precision?": float, "recall_at?": {str: float}},
    "removed": {
        "classes": [str],
        "rows": [int],
        "poisoned": [int],
        "clean_removed": [int],
        "poison_removed": [int],
    },
    "ledger": {
        "relies_on?": [str],
        "may_use": [str],
        "told": {"poison_fraction?": float},
        "n_suspected?": int,
        "suspected_classes?": [int],
    },
    "plots": {
        "scores": {"edges": NUMBERS, "clean": NUMBERS, "poisoned": NUMBERS, "cut?": float},
        "recall?": {"rows_removed": [int], "recall": NUMBERS},
        "projection": {"class": str, "n": int, "x": NUMBERS, "y": NUMBERS, "poisoned": str, "removed": str},
        "training": {name: {"accuracy": NUMBERS, "loss": NUMBERS} for name in CURVES},
    },
    "conditions": {
        "commit?": str,
        "exported": str,
        "versions": {str: str},
        "runtime": {name: {"device": str, "precision": str, "torch": str} for name in CURVES},
        "collapses": {name: list for name in CURVES},
        "parameters": {"setting": dict, "defense": dict, "filter": {"budget": object, "budget_multiplier": float}},
    },
    "resources": {str: {"seconds": float, "peak_memory_mb": float, "peak_gpu_memory_mb?": float, "defense_file?": str}},
}
ONE_LENGTH = (  # paths within a file whose values have one length
    ("removed/classes", "removed/rows", "removed/poisoned", "removed/clean_removed", "removed/poison_removed"),
    ("plots/scores/clean", "plots/scores/poisoned"),
    ("plots/recall/rows_removed", "plots/recall/recall"),
    ("plots/projection/x", "plots/projection/y", "plots/projection/poisoned", "plots/projection/removed"),
)
POISONED_ONLY = ("asr", "poison_recall", "auroc", "defense_score", "undefended_asr", "oracle_asr")
CLIFF = {
    "setting": str,
    "seed": int,
    "n_poison": int,
    "points": [{"poison_left": int, "share_left": float, "asr": float, "clean_acc": float}],
    "conditions": {"parameters": {"setting": dict}},
}


def mistake(value: Any, shape: Any, where: str = "") -> str | None:
    """The first difference between a value and what it should be, in words; None if there is none."""
    here = where or "the file"
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{here} is {short(value)}, expected a mapping"
        for key, inner in shape.items():
            if key is str:
                items = [(name, item, inner) for name, item in value.items()]
            else:
                name = key.removesuffix("?")
                if key.endswith("?") and value.get(name) is None:
                    continue
                if name not in value:
                    return f"{where}/{name} is missing".lstrip("/")
                items = [(name, value[name], inner)]
            for name, item, wanted in items:
                if wrong := mistake(item, wanted, f"{where}/{name}".lstrip("/")):
                    return wrong
        return None
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{here} is {short(value)}, expected a list"
        wrong = (mistake(item, shape[0], f"{where}/{number}") for number, item in enumerate(value))
        return next(filter(None, wrong), None)
    if shape is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST
        return None if good else f"{here} is {short(value)}, expected a finite number"
    if shape is int:
        good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
        return None if good else f"{here} is {short(value)}, expected a whole number from 0"
    return None if isinstance(value, shape) else f"{here} is {short(value)}, expected {shape.__name__}"


def uneven(content: dict) -> str | None:
    """What does not fit together in a cell of the right shape, in words; None if all does."""

    def at(path: str):
        value = content
        for key in path.split("/"):
            value = (value or {}).get(key)
        return value or []

    for paths in ONE_LENGTH:
        lengths = {path: len(at(path)) for path in paths}
        if len(set(lengths.values())) > 1:
            return f"of different lengths: {', '.join(f'{path} {n}' for path, n in lengths.items())}"
    if len(at("plots/scores/edges")) != len(at("plots/scores/clean")) + 1:
        return "plots/scores has not one edge more than bins"
    if content["filter"]["n_poison"]:
        absent = [key for key in POISONED_ONLY if content["metrics"].get(key) is None]
        if absent:
            return f"something is poisoned, but metrics has no {', '.join(absent)}"
    return None


def short(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
