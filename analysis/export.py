"""What `results/` keeps of a finished cell: figures, what was removed, what the report draws, and the conditions.

All of it is read from the stored artifacts; nothing is trained. One JSON file a cell, `<setting>/<defense>/seed<k>.json`;
`analysis.results` reads and checks it.

metrics      as `evaluate` wrote them
filter       n rows in all, n_poison, `precision` of what was removed, and `recall_at`: the recall if 1.0 or 1.5 times
             the poisoned share had been removed (the last three only where something is poisoned)
removed      per class of the labels after poisoning: its name, rows, poisoned rows, removed clean and poisoned rows
ledger       what the defense relies on and may use (null: it does not say), what it was told, and what it suspected
plots        numbers of the report's pictures, rounded
conditions   commit, versions, device, parameters
resources    seconds and peak memory of each stage, of `score` also the SHA-256 of the defense's file
"""

import importlib.metadata
import io
import json
import platform
import re
import sys
import time
from pathlib import Path

import h5py
import numpy as np

import defenses
from analysis.files import write_whole
from analysis.made_with import difference
from analysis.schema import SCHEMA_VERSION
from stages import evaluate
from stages import filter as filter_stage
from stages.lib import checkpoints, metrics, params, storage
from stages.lib.errors import UserError
from stages.lib.poisoning import PoisonIndex, open_poisoned

BUDGETS = (1.0, 1.5)  # times the poisoned share: the public task's budget, and that of its later revision
RECALL_POINTS = 100
PROJECTED_ROWS = 400
WHITENING_RIDGE = 1e-3  # of the mean variance: directions that no class uses are not blown up
CHUNK = 8192  # rows of features in memory at a time
PACKAGES = ("numpy", "scikit-learn", "h5py")


def export(setting: str, defense: str, seed: int, folder: Path, commit: str | None, dump: bool = False) -> Path | None:
    """Write `<folder>/<setting>/<defense>/seed<k>.json` from a finished cell; None if it is not finished, or if its files
    are not of one piece or of other parameters than those in params.yaml (all but the block `data` and the options of the
    defense, which the files do not tell).

    dump: also `seed<k>.npz` with the scores and the truth, from which the figures of the filter can be computed again.
    """
    shared = Path("artifacts") / setting / f"seed{seed}"
    cell = shared / defense
    if not (cell / "metrics.json").exists():
        return None
    poisoned = open_poisoned(shared.parent / "data.h5", shared / "poison.h5")
    index = poisoned.index
    digest = storage.digest(shared / "poison.h5")
    with storage.open_(cell / "scores.h5", "scores") as file:
        scores, about = file["scores"][:], dict(file.attrs)
    with storage.open_(shared / "features.h5", "features") as file:
        victim_of_features = file.attrs.get("checkpoint")
    with storage.open_(cell / "kept.h5", "kept_rows") as file:
        kept_rows, of_one_piece = file["rows"][:], about["index"] == file.attrs["index"] == digest
    if not of_one_piece:
        return None
    found_metrics = read_json(cell / "metrics.json", "evaluate")
    made_from_recorded = found_metrics.pop("made_from", None)
    reference = read_json(shared / "reference.json", "evaluate_reference")
    paths = {"undefended": shared / "victim.pt", "oracle": shared / "oracle.pt", "retrained": cell / "retrained.pt"}
    models = {name: checkpoints.load(path) for name, path in paths.items()}
    digests = {name: storage.digest(path) for name, path in paths.items()}
    made_from = {"retrained": digests["retrained"], "reference": storage.digest(shared / "reference.json")}
    try:
        kept = ~filtered(scores, about)
    except UserError:  # the filter in params.yaml refuses this defense
        return None
    of_one_piece = (
        np.array_equal(np.flatnonzero(kept), kept_rows)
        and all(model.conditions["index"] == digest for model in models.values())
        and models["retrained"].conditions["rows"] == storage.digest_array(kept_rows)
        and metrics.of_filter(scores, kept, index.poisoned).items() <= found_metrics.items()
        and made_from_recorded == made_from
        and all(reference.get(name, {}).get("checkpoint") == digests[name] for name in ("undefended", "oracle"))
        and victim_of_features == digests["undefended"]
        and about.get("features") == storage.digest(shared / "features.h5")
    )
    wanted = params.setting(Path("params.yaml"), setting)
    if not of_one_piece:
        if made_from_recorded is None:
            print(f"{cell}: measured by an earlier version of `evaluate`, which runs again", file=sys.stderr)
        return None
    if other := difference(wanted, seed, poisoned.data, shared / "poison.h5", models.values()):
        print(f"{cell}: {other}", file=sys.stderr)
        return None

    values = params.read(Path("params.yaml"))
    options = params.defense_options(Path("params.yaml"), defense)
    folders = (shared.parent, shared, cell)
    resources = [path for where in folders for path in sorted(where.glob("*.resources.json"))]
    with storage.open_(shared / "features.h5", "features") as file:
        picture = projection(file["features"], file["labels"][:], index.poisoned, ~kept, poisoned.class_names)
        labels = file["labels"][:]
    found = {
        "schema_version": SCHEMA_VERSION,
        "setting": setting,
        "defense": defense,
        "seed": seed,
        "metrics": found_metrics,
        "filter": of_budget(scores, kept, index),
        "removed": removed_by_class(labels, index.poisoned, ~kept, poisoned.class_names),
        "ledger": ledger(defenses.load(defense, **options), about),
        "plots": {
            "scores": histogram(scores, index.poisoned, kept),
            "recall": recall(scores, index.poisoned),
            "projection": picture,
            "training": {
                name: {key: rounded([row[key] for row in model.history]) for key in ("accuracy", "loss")}
                for name, model in models.items()
            },
        },
        "conditions": {
            "commit": commit,
            "exported": time.strftime("%Y-%m-%d", time.gmtime()),
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
            "runtime": {name: model.conditions["runtime"] for name, model in models.items()},
            "collapses": {name: model.conditions["collapses"] for name, model in models.items()},
            "parameters": {
                "setting": values["settings"][setting],
                "defense": values["defenses"][defense],
                "filter": values["filter"],
            },
        },
        "resources": {path.name.removesuffix(".resources.json"): read_json(path, "--force") for path in resources},
    }
    path = folder / setting / defense / f"seed{seed}.json"
    if dump:
        arrays = io.BytesIO()
        np.savez_compressed(arrays, scores=scores, poisoned=index.poisoned, kept=kept)
        write_whole(path.with_suffix(".npz"), arrays.getvalue())
    write_whole(path, as_text(found))
    return path


def read_json(path: Path, stage: str) -> dict:
    """`UserError` for a file that is missing or damaged, with the stage that makes it again."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("no mapping")
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; make it with `dvc repro {stage}`") from error
    except (ValueError, RecursionError) as error:  # no JSON, not UTF-8
        raise UserError(f"{path} is damaged ({error}); make it again with `dvc repro {stage}`") from error
    return found


def filtered(scores: np.ndarray, about: dict) -> np.ndarray:
    """(N,) bool: what the filter removes with the budget in params.yaml. about: attributes of the scores."""
    fraction, suspected = storage.optional_fraction(about["poison_fraction"]), about.get("n_suspected")
    spec = params.filter_(Path("params.yaml"))
    return filter_stage.removed(scores, filter_stage.n_to_remove(spec, len(scores), fraction, suspected))


def of_budget(scores: np.ndarray, kept: np.ndarray, index: PoisonIndex) -> dict:
    """What the scores, (N,), tell beyond the metrics, with no retraining."""
    poisoned, removed = index.poisoned, ~kept
    found = {"n": index.n, "n_poison": int(poisoned.sum())}
    if poisoned.any():
        fraction = index.poison_fraction if index.poison_fraction is not None else float(poisoned.mean())
        found["precision"] = float(poisoned[removed].mean()) if removed.any() else 0.0
        found["recall_at"] = {}
        for multiplier in BUDGETS:
            n_remove = filter_stage.n_to_remove(params.Filter("fraction", multiplier), index.n, fraction, None)
            found["recall_at"][str(multiplier)] = float(filter_stage.removed(scores, n_remove)[poisoned].mean())
    return found


def removed_by_class(labels: np.ndarray, poisoned: np.ndarray, removed: np.ndarray, names: tuple[str, ...]) -> dict:
    """Counts per class of the labels after poisoning, which are what the defense saw; (N,) arrays."""

    def count(mask: np.ndarray) -> list[int]:
        return np.bincount(labels[mask], minlength=len(names)).tolist()

    return {
        "classes": list(names),
        "rows": count(np.ones(len(labels), bool)),
        "poisoned": count(poisoned),
        "clean_removed": count(removed & ~poisoned),
        "poison_removed": count(removed & poisoned),
    }


def ledger(defense, about: dict) -> dict:
    """What the defense says of itself, and what `score` recorded: the fraction it was told, what it suspected."""
    fraction = storage.optional_fraction(about["poison_fraction"])
    found = {
        "relies_on": json.loads(about["relies_on"]) if "relies_on" in about else defenses.relies_on(defense),
        "may_use": list(getattr(defense, "MAY_USE", ())),
        "told": {} if fraction is None else {"poison_fraction": fraction},
    }
    if "n_suspected" in about:
        found["n_suspected"] = int(about["n_suspected"])
    if "suspected_classes" in about:
        found["suspected_classes"] = [int(label) for label in about["suspected_classes"]]
    return found


def histogram(scores: np.ndarray, poisoned: np.ndarray, kept: np.ndarray) -> dict:
    """`edges` of the bins, the share of the clean and of the poisoned rows in each, and `cut`, the lowest removed score."""
    rows = evaluate.score_histogram(scores, poisoned)
    clean = [row for row in rows if row["rows"] == "clean"]
    return {
        "edges": rounded([row["score"] for row in clean] + [clean[-1]["score_end"]], 6),
        "clean": rounded([row["share"] for row in clean]),
        "poisoned": rounded([row["share"] for row in rows if row["rows"] == "poisoned"]),
        "cut": None if kept.all() else rounded([scores[~kept].min()], 6)[0],
    }


def recall(scores: np.ndarray, poisoned: np.ndarray) -> dict | None:
    """Recall as rows are removed, up to three times the poison; None where nothing is poisoned."""
    if not poisoned.any():
        return None
    found = np.concatenate([[0], np.cumsum(poisoned[np.argsort(-scores, kind="stable")])])
    last = min(3 * int(poisoned.sum()), len(scores))
    counts = np.unique(np.linspace(0, last, RECALL_POINTS).round().astype(int))
    return {"rows_removed": counts.tolist(), "recall": rounded(found[counts] / poisoned.sum())}


def projection(features: h5py.Dataset, labels, poisoned, removed, names: tuple[str, ...]) -> dict:
    """One class in two dimensions: the class with the most poison, or with the most removed rows where there is none.

    Features (N, D) are whitened by the pooled covariance within the classes (so that what varies in every class alike
    does not hide the poison); shown are the class's two first principal components. The same for every defense of a
    poisoned setting and seed. At most `PROJECTED_ROWS` rows, evenly spaced: their order is pseudo-random.
    """
    mask = poisoned if poisoned.any() else removed
    label = int(np.bincount(labels[mask], minlength=len(names)).argmax()) if mask.any() else 0
    rows = np.flatnonzero(labels == label)
    width, n_classes = features.shape[1], len(names)
    sums, product, counts = (
        np.zeros((n_classes, width)),
        np.zeros((width, width)),
        np.bincount(labels, minlength=n_classes),
    )
    chosen = np.empty((len(rows), width))
    for start in range(0, len(labels), CHUNK):
        block, part = features[start : start + CHUNK].astype(np.float64), labels[start : start + CHUNK]
        np.add.at(sums, part, block)
        product += block.T @ block
        inside = (rows >= start) & (rows < start + CHUNK)
        chosen[inside] = block[rows[inside] - start]
    means = sums / np.maximum(counts, 1)[:, None]
    within = (product - (means.T * counts) @ means) / len(labels)
    values, vectors = np.linalg.eigh(within)
    ridge = WHITENING_RIDGE * max(values.mean(), np.finfo(float).tiny)
    white = (chosen - means[label]) @ (vectors / np.sqrt(values.clip(0) + ridge))
    axes = np.linalg.svd(white, full_matrices=False)[2][:2] if len(rows) else np.zeros((2, width))
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]  # the sign of a component is free
    points = np.zeros((len(rows), 2))
    points[:, : len(axes)] = white @ axes.T
    shown = np.unique(np.linspace(0, len(rows) - 1, min(PROJECTED_ROWS, len(rows))).round().astype(int))
    return {
        "class": names[label],
        "n": len(rows),
        "x": rounded(points[shown, 0]),
        "y": rounded(points[shown, 1]),
        "poisoned": "".join("1" if poisoned[row] else "0" for row in rows[shown]),
        "removed": "".join("1" if removed[row] else "0" for row in rows[shown]),
    }


def rounded(values, digits: int = 4) -> list[float]:
    """For pictures: so many significant digits."""
    return [float(f"{value:.{digits}g}") for value in values]


def as_text(found: dict) -> str:
    """Indented JSON with each list of plain values on one line."""
    text = json.dumps(found, indent=1, allow_nan=False)
    return (
        re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda match: "[" + re.sub(r"\n\s+", " ", match[1]) + "]", text) + "\n"
    )
