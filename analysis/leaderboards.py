"""Tables that compare: the leaderboard of a setting, paired differences, the best of each setting, the public table."""

from analysis import published
from analysis.results import Results
from analysis.statistics import paired, summary
from analysis.tables import DASH, MINUS, Row, Table, Value, budget, count, figure, number, words


def mean_score(results: Results, setting: str, defense: str) -> float | None:
    """What a setting's defenses are ranked by: the defense score, or clean accuracy where nothing is poisoned."""
    key = "defense_score" if results.is_poisoned(setting) else "clean_acc"
    return summary(results.figures(setting, defense, key).values()).mean


def ranked(results: Results, setting: str) -> list[str]:
    """Defenses of a setting, the best mean score first; equal ones by name."""
    means = {defense: mean_score(results, setting, defense) for defense in results.defenses(setting)}
    return sorted(means, key=lambda defense: (1.0 if means[defense] is None else -means[defense], defense))


def any_cell(results: Results, setting: str, defense: str) -> dict:
    return next(iter(results.of(setting, defense).values()))


def leaderboard(results: Results, setting: str) -> Table:
    if not results.is_poisoned(setting):
        return clean_run(results, setting)
    columns = [
        *("defense", "relies on", "n", "clean accuracy", "ASR", "poison recall", "AUROC", "defense score"),
        *("gap", "gap: ASR", "gap: clean accuracy"),
    ]
    keys = ["clean_acc", "asr", "poison_recall", "auroc", "defense_score"]
    rows = []
    for defense in ranked(results, setting):
        found = [summary(results.figures(setting, defense, key).values()) for key in keys]
        figures = [figure(one, bar=key == keys[-1], brief=key == "auroc") for key, one in zip(keys, found, strict=True)]
        gaps = [
            figure(summary(results.figures(setting, defense, key).values()), sign=True, brief=True)
            for key in ("gap_defense_score", "gap_asr", "gap_clean_acc")
        ]
        about = Value(words(any_cell(results, setting, defense)))
        n = Value(str(len(results.seeds(setting, defense))))
        rows.append(Row([Value(defense, code=True), about, n, *figures, *gaps], "defense"))

    def reference(title: str, prefix: str, recall: str, auroc: str) -> Row:
        found = {key: results.references(setting, prefix + key) for key in ("clean_acc", "asr", "defense_score")}
        n = Value(str(len(found["clean_acc"])))
        accuracy, asr, score = (
            figure(summary(values.values()), bar=key == "defense_score") for key, values in found.items()
        )
        best = {key: results.references(setting, f"oracle_{key}") for key in found}
        gaps = [
            figure(paired(best["defense_score"], found["defense_score"]), sign=True, brief=True),
            figure(paired(found["asr"], best["asr"]), sign=True, brief=True),
            figure(paired(best["clean_acc"], found["clean_acc"]), sign=True, brief=True),
        ]
        values = [Value(title), Value(""), n, accuracy, asr, Value(recall), Value(auroc), score, *gaps]
        return Row(values, "reference")

    rows.insert(0, reference("oracle filter", "oracle_", "1", "1"))
    rows.append(reference("undefended", "undefended_", "0", DASH))
    for title, score in published.DEFENSE_SCORE.get(setting, {}).items():
        values = [Value(title), Value("not stated"), Value("1"), *[Value(DASH)] * 4, Value(number(score), bar=score)]
        rows.append(Row([*values, *[Value(DASH)] * 3], "published"))
    note = (
        "Mean ± standard deviation over n seeds, with the 95 % interval of the mean. Gaps are to the oracle filter of the "
        "same seed, which removes all the poison and nothing else: what is lost in defense score and "
        "clean accuracy, what is left in ASR; 0 is perfect. Intervals are not cut off at 0 and 1."
    )
    if setting in published.DEFENSE_SCORE:
        note += f" Last two rows: {published.SOURCE}."
    return Table("Leaderboard", columns, rows, note, 2)


def clean_run(results: Results, setting: str) -> Table:
    columns = [
        "defense",
        "relies on",
        "budget",
        "n",
        "rows removed",
        "share of all rows",
        "clean accuracy",
        "gap: clean accuracy",
    ]
    rows = []
    for defense in ranked(results, setting):
        cells = list(results.of(setting, defense).values())
        shares = [cell["metrics"]["rows_removed"] / cell["filter"]["n"] for cell in cells]
        rows.append(
            Row(
                [
                    Value(defense, code=True),
                    Value(words(cells[0])),
                    Value(budget(cells[0])),
                    Value(str(len(cells))),
                    Value(count([cell["metrics"]["rows_removed"] for cell in cells])),
                    figure(summary(shares)),
                    figure(summary(results.figures(setting, defense, "clean_acc").values())),
                    figure(summary(results.figures(setting, defense, "gap_clean_acc").values()), sign=True),
                ],
                "defense",
            )
        )
    oracle = results.references(setting, "oracle_clean_acc")
    values = [Value("all rows kept"), Value(""), Value(DASH), Value(str(len(oracle))), Value("0"), Value("0")]
    rows.insert(0, Row([*values, figure(summary(oracle.values())), Value("0")], "reference"))
    note = "Nothing is poisoned here: every removed row is a clean one, and the gap is what removing it costs."
    return Table("Clean run", columns, rows, note, 3)


def differences(results: Results, setting: str) -> Table | None:
    """The best defense minus each other one, over the seeds in which both have the same victim."""
    names = ranked(results, setting)
    if len(names) < 2:
        return None
    best, keys = names[0], {"defense_score": "defense score", "asr": "ASR", "poison_recall": "poison recall"}
    keys = (keys if results.is_poisoned(setting) else {}) | {"clean_acc": "clean accuracy"}
    rows = []
    for other in names[1:]:
        found = [paired(*results.pair(setting, best, other, key)) for key in keys]
        about = Value(words(any_cell(results, setting, other)))
        values = [Value(other, code=True), about, Value(str(found[0].n)), *(figure(one, sign=True) for one in found)]
        rows.append(Row(values, "defense"))
    note = (
        f"{best} minus the defense of the row, seed by seed: mean ± standard deviation and 95 % interval of the "
        "difference. An interval without 0 is a difference that the seeds support; one seed supports none."
    )
    return Table("Paired differences", [f"{best} minus", "relies on", "n", *keys.values()], rows, note, 2)


def score_matrix(results: Results, setting: str) -> Table | None:
    """Paired difference in the score of every two defenses."""
    names = ranked(results, setting)
    if len(names) < 3 or not results.is_poisoned(setting):
        return None
    rows = [
        Row(
            [
                Value(one, code=True),
                Value(words(any_cell(results, setting, one))),
                *(
                    Value("")
                    if one == other
                    else figure(paired(*results.pair(setting, one, other, "defense_score")), sign=True)
                    for other in names
                ),
            ],
            "defense",
        )
        for one in names
    ]
    note = "Defense score of the row minus that of the column, over the seeds in which both have the same victim."
    return Table(
        "Every two defenses", ["defense score of", "relies on", *(f"minus {name}" for name in names)], rows, note, 2
    )


def overview(results: Results) -> Table:
    rows = []
    for setting in results.settings():
        if not results.is_poisoned(setting):
            continue
        names = ranked(results, setting)
        first = mean_score(results, setting, names[0])
        known = published.DEFENSE_SCORE.get(setting, {})
        for best in [name for name in names if mean_score(results, setting, name) == first]:
            values = [
                Value(setting, code=True),
                Value(best, code=True),
                Value(words(any_cell(results, setting, best))),
                Value(str(len(results.seeds(setting, best)))),
                figure(summary(results.figures(setting, best, "defense_score").values()), bar=True),
                figure(summary(results.references(setting, "oracle_defense_score").values())),
                figure(summary(results.figures(setting, best, "gap_defense_score").values()), sign=True),
                figure(summary(results.references(setting, "undefended_defense_score").values())),
                Value(number(known.get("best published row"))),
            ]
            rows.append(Row(values, "defense"))
    columns = [
        *(
            "setting",
            "best defense",
            "relies on",
            "n",
            "defense score",
            "oracle filter",
            "gap",
            "undefended",
            "best published",
        ),
    ]
    note = f"Defense score = (clean accuracy + (1 {MINUS} ASR) + poison recall) / 3. Retrained from scratch on what was kept."
    return Table("Best of each setting", columns, rows, note, 3)


def public_table() -> Table:
    rows = [
        Row([Value(setting, code=True), *(Value(number(score), bar=score) for score in scores.values())], "published")
        for setting, scores in published.DEFENSE_SCORE.items()
    ]
    titles = list(next(iter(published.DEFENSE_SCORE.values())))
    note = f"Defense score; {published.SOURCE}."
    return Table("The public table", ["setting", *titles], rows, note)
