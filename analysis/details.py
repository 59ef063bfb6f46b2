"""Tables that explain: what was removed, who knows what, time and memory, conditions, and what could not be used."""

from analysis.leaderboards import any_cell, ranked
from analysis.results import Results
from analysis.statistics import summary
from analysis.tables import DASH, TIMES, Row, Table, Value, budget, count, figure, flat, number, words

MOST_CLASSES = 12  # columns of the table per class


def filtering(results: Results, setting: str) -> Table:
    """What the scores alone tell."""
    columns = [
        *("defense", "relies on", "budget", "n", "rows removed", "clean", "poisoned", "precision", "recall"),
        *(f"recall at 1.0 {TIMES}", f"recall at 1.5 {TIMES}", "AUROC", "average precision"),
    ]
    rows = []
    for defense in ranked(results, setting):
        cells = list(results.of(setting, defense).values())
        removed = [cell["metrics"]["rows_removed"] for cell in cells]
        clean = [cell["metrics"]["clean_removed"] for cell in cells]
        poison = [a - b for a, b in zip(removed, clean, strict=True)]

        def of(block: str, key: str, cells=cells) -> Value:
            values = [cell[block].get(key) for cell in cells]
            return figure(summary(value for value in values if value is not None), brief=True)

        def at(multiplier: str, cells=cells) -> Value:
            values = [(cell["filter"].get("recall_at") or {}).get(multiplier) for cell in cells]
            return figure(summary(value for value in values if value is not None), brief=True)

        values = [
            *(Value(defense, code=True), Value(words(cells[0])), Value(budget(cells[0])), Value(str(len(cells)))),
            *(Value(count(values)) for values in (removed, clean, poison)),
            *(of("filter", "precision"), of("metrics", "poison_recall"), at("1.0"), at("1.5")),
            *(of("metrics", "auroc"), of("metrics", "average_precision")),
        ]
        rows.append(Row(values, "defense"))
    note = (
        f"From the stored scores, with no retraining. Recall at 1.0 {TIMES} and 1.5 {TIMES}: had so many times the poisoned "
        "share been removed. Counts are means over the seeds."
    )
    return Table("What is removed", columns, rows, note, 3)


def cliff(results: Results, setting: str) -> Table | None:
    """What is left of the attack when so much poison is left in; None where it was not measured."""
    rows = []
    for (name, seed), found in sorted(results.cliffs.items()):
        if name == setting:
            for point in sorted(found["points"], key=lambda point: point["poison_left"]):
                shares = (1 - point["share_left"], point["asr"], point["clean_acc"])
                rows.append(
                    Row([Value(str(seed)), Value(f"{point['poison_left']:,}"), *(Value(number(x)) for x in shares)])
                )
    columns = ["seed", "poisoned rows left in", "poison recall", "ASR", "clean accuracy"]
    note = "Retrained on the oracle filter's rows with so many poisoned ones put back."
    return Table("The cliff", columns, rows, note, 1) if rows else None


def target_class(results: Results, setting: str) -> Table | None:
    """Accuracy on the clean test images of the target class; None where it was not measured."""
    keys = ("undefended_target_clean_acc", "target_clean_acc", "oracle_target_clean_acc")
    rows = []
    for defense in ranked(results, setting):
        found = [results.figures(setting, defense, key) for key in keys]
        if found[1]:
            names = [
                Value(defense, code=True),
                Value(words(any_cell(results, setting, defense))),
                Value(str(len(found[1]))),
            ]
            rows.append(Row([*names, *(figure(summary(values.values())) for values in found)], "defense"))
    columns = ["defense", "relies on", "n", "undefended", "after the defense", "oracle filter"]
    note = "Share of the clean test images of the target class that the model gets right."
    return Table("Accuracy on the target class", columns, rows, note, 2) if rows else None


def by_class(results: Results, setting: str) -> Table:
    """Clean and poisoned rows that each defense removed, per class of the labels that it saw."""
    cells = [cell for (s, _, _), cell in results.cells.items() if s == setting]
    names = cells[0]["removed"]["classes"]
    lost = [0.0] * len(names)
    for cell in cells:
        for kind in ("poison_removed", "clean_removed", "poisoned"):
            for number_, rows in enumerate(cell["removed"][kind][: len(names)]):
                lost[number_] += rows * (1 if kind == "clean_removed" else len(cells) * 1000)  # poisoned classes first
    order = sorted(range(len(names)), key=lambda label: -lost[label])
    shown = sorted(order[:MOST_CLASSES] if len(names) > MOST_CLASSES else order)
    rest = [label for label in range(len(names)) if label not in shown]

    def total(cell: dict, kind: str, labels: list[int]) -> int:
        return sum(cell["removed"][kind][label] for label in labels if label < len(cell["removed"][kind]))

    groups = [[label] for label in shown] + ([rest] if rest else [])

    def heading(labels: list[int]) -> str:
        rows, poison = (count([total(cell, kind, labels) for cell in cells]) for kind in ("rows", "poisoned"))
        name = f"{len(rest)} others" if labels is rest else names[labels[0]]
        return f"{name} ({rows} rows{f', {poison} poisoned' if poison != '0' else ''})"

    rows = []
    for defense in ranked(results, setting):
        of = list(results.of(setting, defense).values())
        values = []
        for labels in groups:
            clean, poison = ([total(cell, f"{kind}_removed", labels) for cell in of] for kind in ("clean", "poison"))
            values.append(Value(count(clean) + (f" + {count(poison)}" if any(poison) else "")))
        rows.append(Row([Value(defense, code=True), Value(words(of[0])), *values], "defense"))
    note = (
        "Rows removed from each class of the labels after poisoning, means over the seeds: clean ones, + poisoned ones."
    )
    return Table("What is removed, by class", ["defense", "relies on", *map(heading, groups)], rows, note, 2)


def resources(results: Results, setting: str) -> Table:
    """Seconds and peak memory: of what all defenses of a seed share once per seed, of the rest once per cell."""
    shared = {"prepare", "poison", "victim", "oracle", "extract", "evaluate_reference"}
    order = [
        "prepare",
        "poison",
        "victim",
        "extract",
        "oracle",
        "evaluate_reference",
        "score",
        "filter",
        "retrained",
        "evaluate",
    ]
    found: dict[tuple[str, str], dict] = {}
    for (where, defense, seed), cell in sorted(results.cells.items()):
        if where != setting:
            continue
        for stage, used in cell["resources"].items():
            key = (stage, defense if stage == "score" else "")
            found.setdefault(key, {})[seed if stage in shared else (seed, defense)] = used
    names = {"victim": "train_victim", "oracle": "retrain_oracle", "retrained": "retrain"}
    place = {stage: number for number, stage in enumerate(order)}
    rows = []
    for stage, defense in sorted(found, key=lambda key: (place.get(key[0], len(place)), key)):
        used = list(found[stage, defense].values())
        about = words(any_cell(results, setting, defense)) if defense else ""
        seconds = [one["seconds"] for one in used]
        spread = f"({min(seconds):.1f} to {max(seconds):.1f})" if len(used) > 1 else ""
        gpu = [one["peak_gpu_memory_mb"] for one in used if one.get("peak_gpu_memory_mb") is not None]
        rows.append(
            Row(
                [
                    Value(names.get(stage, stage), code=True),
                    Value(defense, code=bool(defense)),
                    Value(about),
                    Value(str(len(used))),
                    Value(f"{sum(seconds) / len(used):.1f}", spread),
                    Value(f"{max(one['peak_memory_mb'] for one in used):,.0f}"),
                    Value(f"{max(gpu):,.0f}" if gpu else DASH),
                ]
            )
        )
    columns = ["stage", "defense", "relies on", "n", "seconds", "peak memory, MB", "peak GPU memory, MB"]
    return Table("Time and memory", columns, rows, "Mean seconds of n runs (their range), and the largest peak.", 3)


def conditions(results: Results, setting: str) -> Table:
    cells = {key: cell for key, cell in results.cells.items() if key[0] == setting}
    about = [cell["conditions"] for cell in cells.values()]

    def distinct(values) -> str:
        return ", ".join(sorted({str(value) for value in values})) or DASH

    runs = [run for one in about for run in one["runtime"].values()]
    collapses = sum(len(found) for one in about for found in one["collapses"].values())
    versions = sorted({(name, version) for one in about for name, version in one["versions"].items()})
    pairs = {
        "seeds": ", ".join(map(str, results.seeds(setting))),
        "trained on": distinct(f"{run['device']} ({run['precision']})" for run in runs),
        "torch": distinct(run["torch"] for run in runs),
        "exported with": ", ".join(f"{name} {version}" for name, version in versions),
        "commit": distinct(one.get("commit") or "not recorded" for one in about),
        "exported": distinct(one["exported"] for one in about),
        "repeated trainings (collapsed)": str(collapses),
    }
    parameters = about[0]["parameters"]["setting"]
    pairs |= {block: flat(values) for block, values in parameters.items()}
    return Table("Conditions", ["", ""], [Row([Value(key), Value(value)]) for key, value in pairs.items()], names=2)


def ledger(results: Results) -> Table:
    rows, seen = [], set()
    for (setting, defense, _), cell in sorted(results.cells.items(), key=lambda item: (item[0][1], item[0])):
        told = cell["ledger"]["told"]
        fraction = told.get("poison_fraction")
        about = cell["ledger"]
        relies = about.get("relies_on")
        values = (
            defense,
            ("does not say" if relies is None else ", ".join(relies) or "nothing").replace("_", " "),
            (", ".join(about["may_use"]) or "nothing").replace("_", " "),
            "nothing" if fraction is None else f"poison fraction {fraction:g}",
            budget(cell),
            "yes" if "n_suspected" in about else "no",
        )
        if (setting, values) not in seen:
            seen.add((setting, values))
            rows.append(
                Row([Value(values[0], code=True), Value(setting, code=True), *map(Value, values[1:])], "defense")
            )
    columns = ["defense", "setting", "relies on", "may use", "was told", "rows removed", "decides for itself how many"]
    note = (
        "Declared in each defense's file. A budget that is a multiple of the poison uses the fraction in every row, "
        "whatever the defense was told. Class sizes: clean classes are equally large. Minority in class: poison is less "
        "than half of its class. None is given clean data or the number of poisoned classes."
    )
    return Table("Who knows what", columns, rows, note, 7)


def problems(results: Results) -> Table | None:
    rows = [Row([Value(problem.where, code=True), Value(problem.what)]) for problem in results.problems]
    return Table("Not used, or missing", ["where", "what"], rows, names=2) if rows else None
