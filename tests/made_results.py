"""Files for `results/` with chosen figures, for the tests of what reads them."""

import json
from pathlib import Path

EVENLY = [0.0, 0.25, 0.5]


def cell(setting="alpha", defense="one", seed=1, *, clean_acc=0.9, asr=0.1, recall=0.8, auroc=0.95, oracle=(0.95, 0.0),
         undefended=(0.92, 1.0), poisoned=True) -> dict:  # fmt: skip
    """A whole cell of 20 rows, 5 of them poisoned, 5 removed; pairs are clean accuracy and ASR."""

    def score(clean, attack, found):
        return (clean + 1 - attack + found) / 3

    metrics = {
        "cell": f"{setting}/{defense}/seed{seed}",
        "clean_acc": clean_acc,
        "rows_removed": 5,
        "clean_removed": 1 if poisoned else 5,
        "undefended_clean_acc": undefended[0],
        "oracle_clean_acc": oracle[0],
        "gap_clean_acc": oracle[0] - clean_acc,
    }
    if poisoned:
        metrics |= {
            "asr": asr,
            "poison_recall": recall,
            "auroc": auroc,
            "average_precision": 0.7,
            "defense_score": score(clean_acc, asr, recall),
            "undefended_asr": undefended[1],
            "undefended_defense_score": score(*undefended, 0.0),
            "oracle_asr": oracle[1],
            "oracle_defense_score": score(*oracle, 1.0),
            "gap_asr": asr - oracle[1],
            "gap_defense_score": score(*oracle, 1.0) - score(clean_acc, asr, recall),
        }
    runtime = {"device": "cpu", "precision": "fp32", "compile": False, "threads": 2, "torch": "2.13.0"}
    names = ("undefended", "oracle", "retrained")
    return {
        "schema_version": 2,
        "setting": setting,
        "defense": defense,
        "seed": seed,
        "metrics": metrics,
        "filter": {"n": 20, "n_poison": 5, "precision": 0.8, "recall_at": {"1.0": 0.8, "1.5": 0.95}}
        if poisoned
        else {"n": 20, "n_poison": 0},
        "removed": {
            "classes": ["cat", "dog"],
            "rows": [12, 8],
            "poisoned": [5, 0] if poisoned else [0, 0],
            "clean_removed": [0, 1] if poisoned else [2, 3],
            "poison_removed": [4, 0] if poisoned else [0, 0],
        },
        "ledger": {"relies_on": ["class_sizes"], "may_use": [], "told": {"poison_fraction": 0.25} if poisoned else {}},
        "plots": {
            "scores": {"edges": EVENLY, "clean": [0.9, 0.1], "poisoned": [0.2, 0.8] if poisoned else [0, 0], "cut": 0.3},
            "recall": {"rows_removed": [0, 5, 15], "recall": [0.0, 0.8, 1.0]} if poisoned else None,
            "projection": {"class": "cat", "n": 12, "x": [0, 1, 2], "y": [2, 0, 1],
                           "poisoned": "110" if poisoned else "000", "removed": "101"},
            "training": {name: {"accuracy": [0.5, 0.9], "loss": [1.0, 0.2]} for name in names},
        },
        "conditions": {
            "commit": "abc1234",
            "exported": "2026-01-01",
            "versions": {"python": "3.12.1"},
            "runtime": {name: runtime for name in names},
            "collapses": {name: [] for name in names},
            "parameters": {
                "setting": {"data": {"source": "digits"}, "model": {"network": "resnet20"}, "train": {"epochs": 2},
                            "poison": {"trigger": {"name": "badnets", "patch_size": 3}, "poison_fraction": 0.25}},
                "defense": {},
                "filter": {"budget": "fraction", "budget_multiplier": 1.0},
            },
        },
        "resources": {"victim": {"seconds": 10.0, "peak_memory_mb": 100}, "score": {"seconds": 0.5, "peak_memory_mb": 50}},
    }  # fmt: skip


def write(folder: Path, content: dict, name: str | None = None) -> Path:
    path = folder / content["setting"] / content["defense"] / (name or f"seed{content['seed']}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def cliff(folder: Path, setting="alpha", seed=1, of=None) -> Path:
    """of: a cell whose setting has the parameters that the cliff is of."""
    points = [
        {"poison_left": left, "share_left": left / 5, "asr": asr, "clean_acc": 0.9}
        for left, asr in ((0, 0.0), (2, 0.4), (5, 1.0))
    ]
    path = folder / setting / "cliff" / f"seed{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "schema_version": 1,
                "setting": setting,
                "seed": seed,
                "n_poison": 5,
                "points": points,
                "conditions": {"parameters": {"setting": (of or cell())["conditions"]["parameters"]["setting"]}},
            }
        )
    )
    return path
