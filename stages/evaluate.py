"""evaluate: what the defense reached, beside the undefended model and the oracle filter; metrics, plots, a table."""

import csv
import json
from pathlib import Path

import numpy as np

from stages.lib import checkpoints, device, metrics, runtime, stage, storage
from stages.lib.errors import UserError
from stages.lib.poisoning import open_poisoned

HISTOGRAM_BINS = 40
RECALL_POINTS = 200


def score_histogram(scores: np.ndarray, poisoned: np.ndarray) -> list[dict]:
    """Share of the clean and of the poisoned rows per bin; the outermost 0.5 % of the scores lie in the outer bins."""
    low, high = np.percentile(scores, [0.5, 99.5])
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, HISTOGRAM_BINS + 1)
    clipped = scores.clip(low, high)
    rows = []
    for name, chosen in (("clean", ~poisoned), ("poisoned", poisoned)):
        shares = np.histogram(clipped[chosen], edges)[0] / max(chosen.sum(), 1)
        rows += [
            {"score": float(start), "score_end": float(end), "share": float(share), "rows": name}
            for start, end, share in zip(edges, edges[1:], shares, strict=False)
        ]
    return rows


def recall_curve(scores: np.ndarray, poisoned: np.ndarray) -> list[dict]:
    """Share of the poison found as a function of the rows removed, up to three times the poison."""
    n_poisoned = int(poisoned.sum())
    found = np.concatenate([[0], np.cumsum(poisoned[np.argsort(-scores, kind="stable")])])
    counts = np.unique(np.linspace(0, min(3 * n_poisoned, len(scores)), RECALL_POINTS).round().astype(int))
    return [
        {"rows_removed": int(count), "recall": float(recall), "filter": name}
        for name, recalls in (
            ("this defense", found[counts] / max(n_poisoned, 1)),
            ("perfect filter", np.minimum(counts / max(n_poisoned, 1), 1)),
        )
        for count, recall in zip(counts, recalls, strict=True)
    ]


def training_curves(histories: dict[str, list[dict]]) -> list[dict]:
    """One row an epoch and model, from each model's history."""
    return [
        {"epoch": row["epoch"], "model": name, "accuracy": row["accuracy"], "loss": row["loss"]}
        for name, history in histories.items()
        for row in history
    ]


def table(found: dict) -> str:
    """The three rows that tell the story."""
    lines = [f"{found['cell']}", f"{'':<24}{'clean_acc':>11}{'asr':>9}{'recall':>9}{'defense_score':>15}"]
    for name, prefix, recall in (
        ("undefended", "undefended_", 0.0),
        ("this defense", "", found.get("poison_recall")),
        ("oracle filter", "oracle_", 1.0),
    ):
        values = [found[f"{prefix}clean_acc"], found.get(f"{prefix}asr"), recall, found.get(f"{prefix}defense_score")]
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        lines.append(f"{name:<24}{cells[0]:>11}{cells[1]:>9}{cells[2]:>9}{cells[3]:>15}")
    return "\n".join(lines)


def read_reference(path: Path, poisoned: bool) -> dict:
    """What `evaluate_reference` wrote; UserError for anything else. poisoned: the attack's figures must be there."""
    figures = ("clean_acc", "asr", "target_clean_acc") if poisoned else ("clean_acc",)
    try:
        found = json.loads(path.read_text())
        numbers = [found["oracle"]["defense_score"]] if poisoned else []
        for name in ("undefended", "oracle"):
            model = found[name]
            numbers += [row[key] for row in model["history"] for key in ("epoch", "accuracy", "loss")]
            numbers += [model[key] for key in figures]
        if not (isinstance(found["index"], str) and all(type(x) in (int, float) and abs(x) < np.inf for x in numbers)):
            raise TypeError
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; make it with `dvc repro evaluate_reference`") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # ValueError: no JSON, not UTF-8, endless digits
        raise UserError(f"{path} is damaged; make it again with `dvc repro evaluate_reference`") from error
    return found


def measure(args) -> tuple[dict, dict[str, list[dict]]]:
    """The flat metrics and the rows of each plot."""
    poisoned = open_poisoned(args.data, args.index)
    digests = storage.digest(args.data), storage.digest(args.index)
    checkpoint = checkpoints.load_for(args.checkpoint, args.data, args.index, digests)
    with storage.open_(args.scores, "scores") as file:
        scores, scored_index, defense = file["scores"][:], file.attrs["index"], file.attrs["defense"]
    with storage.open_(args.kept, "kept_rows") as file:
        kept_rows, kept_index = file["rows"][:], file.attrs["index"]
    n, is_poisoned = poisoned.index.n, poisoned.index.poisoned
    reference = read_reference(args.reference, bool(is_poisoned.any()))
    epochs = {len(reference[name]["history"]) for name in ("undefended", "oracle")} | {len(checkpoint.history)}
    for path, index in ((args.scores, scored_index), (args.kept, kept_index), (args.reference, reference["index"])):
        if index != digests[1]:
            raise UserError(f"{path} belongs to another poison index than {args.index}; run `dvc repro`")
    if len(epochs) > 1:
        raise UserError(f"{args.reference} is of other epochs than {args.checkpoint}; train again (`dvc repro`)")
    if len(scores) != n:
        raise UserError(f"{args.scores} holds {len(scores)} scores for {n} training rows; run `dvc repro score`")
    kept = np.zeros(n, bool)
    kept[kept_rows] = True
    if checkpoint.conditions.get("rows") != storage.digest_array(kept_rows):
        raise UserError(f"{args.checkpoint} was not trained on the rows in {args.kept}; run `dvc repro retrain`")

    model = metrics.of_model(checkpoint, poisoned, device.decide(runtime.load()).device)
    found = (
        {"cell": f"{args.setting}/{Path(defense).stem}/seed{args.seed}"}
        | model
        | metrics.of_filter(scores, kept, is_poisoned)
    )
    undefended, oracle = reference["undefended"], reference["oracle"]
    found |= {"undefended_clean_acc": undefended["clean_acc"], "oracle_clean_acc": oracle["clean_acc"]}
    found["gap_clean_acc"] = oracle["clean_acc"] - found["clean_acc"]
    histories = {"undefended": undefended["history"], "retrained": checkpoint.history, "oracle": oracle["history"]}
    plots = {
        "scores": score_histogram(scores, is_poisoned),
        "recall": recall_curve(scores, is_poisoned),
        "training": training_curves(histories),
    }
    if is_poisoned.any():
        found["defense_score"] = metrics.defense_score(found["clean_acc"], found["asr"], found["poison_recall"])
        found |= {
            "undefended_asr": undefended["asr"],
            "undefended_target_clean_acc": undefended["target_clean_acc"],
            "undefended_defense_score": metrics.defense_score(undefended["clean_acc"], undefended["asr"], 0.0),
            "oracle_asr": oracle["asr"],
            "oracle_target_clean_acc": oracle["target_clean_acc"],
            "oracle_defense_score": oracle["defense_score"],
            "gap_asr": found["asr"] - oracle["asr"],
            "gap_defense_score": oracle["defense_score"] - found["defense_score"],
        }
    return found, plots


def main(args) -> None:
    plots = {name: args.plots / f"{name}.csv" for name in ("scores", "recall", "training")}
    inputs = [args.data, args.index, args.scores, args.kept, args.checkpoint, args.reference]
    with stage.Outputs(
        [args.metrics, args.cell_metrics, *plots.values()], inputs, resources=args.resources
    ) as temporary:
        found, rows = measure(args)
        made_from = {"retrained": storage.digest(args.checkpoint), "reference": storage.digest(args.reference)}
        for path, content in ((args.metrics, found), (args.cell_metrics, found | {"made_from": made_from})):
            temporary[path].write_text(json.dumps(content, indent=1) + "\n")
        for name, path in plots.items():
            with open(temporary[path], "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[name][0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows[name])
    print(table(found))


if __name__ == "__main__":
    options = stage.parser("evaluate", __doc__)
    options.add_argument("--setting", required=True, help="named in the metrics")
    stage.add_seed(options)
    options.add_argument("--data", type=Path, required=True, help="output of prepare")
    options.add_argument("--index", type=Path, required=True, help="output of poison")
    options.add_argument("--scores", type=Path, required=True, help="output of score")
    options.add_argument("--kept", type=Path, required=True, help="output of filter")
    options.add_argument("--checkpoint", type=Path, required=True, help="checkpoint trained on the kept rows")
    options.add_argument("--reference", type=Path, required=True, help="output of evaluate_reference")
    options.add_argument(
        "--metrics", type=Path, required=True, help="JSON file to write, the one that `dvc metrics` reads"
    )
    options.add_argument(
        "--cell-metrics", type=Path, required=True, help="the same beside the cell's other files, with their digests"
    )
    options.add_argument("--plots", type=Path, required=True, help="folder for the CSV files that `dvc plots` draws")
    stage.add_resources(options)
    stage.run(main, options)
