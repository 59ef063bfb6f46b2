"""report: `results/` as one HTML page and the same tables in Markdown; nothing is computed but means over seeds.

    dvc repro analysis/dvc.yaml:report
    python -m analysis.report --results results --html report.html --markdown report.md
    python -m analysis.report --readme README.md     # writes the results between its two markers

Stage of the second pipeline, analysis/dvc.yaml. Files that cannot be used are listed in the report, with the reason.
"""

from pathlib import Path

from analysis import details, leaderboards, report_html, results, tables
from analysis.results import Results
from stages.lib import stage
from stages.lib.errors import UserError

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def all_tables(found: Results) -> str:
    """report.md: every table of the page."""
    parts = ["# Backdoor defenses, measured", report_html.facts(found)]

    def add(table, level: str = "###") -> None:
        if table is not None:
            parts.append(f"{level} {tables.escaped(table.title)}\n\n{tables.markdown(table)}")

    add(details.problems(found), "##")
    add(leaderboards.overview(found), "##")
    add(leaderboards.public_table(), "##")
    for setting in found.settings():
        parts.append(f"## {tables.code(setting)}\n\n{tables.escaped(report_html.describe(found, setting))}")
        for make in (
            *(
                leaderboards.leaderboard,
                leaderboards.differences,
                leaderboards.score_matrix,
                details.filtering,
                details.by_class,
            ),
            *(details.cliff, details.target_class, details.resources, details.conditions),
        ):
            add(make(found, setting))
    add(details.ledger(found), "##")
    return "\n\n".join(parts) + "\n"


def readme_tables(found: Results) -> str:
    """What stands between the markers: the leaderboard of each setting, in short, and its conditions in one line."""
    parts = []
    for setting in found.settings():
        table = tables.without(leaderboards.leaderboard(found, setting), ("gap: ASR", "gap: clean accuracy"))
        cells = [cell["conditions"] for (name, _, _), cell in found.cells.items() if name == setting]
        runs = [run for one in cells for run in one["runtime"].values()]
        devices = ", ".join(sorted({f"{run['device']} ({run['precision']}, torch {run['torch']})" for run in runs}))
        commits = ", ".join(sorted({one.get("commit") or "not recorded" for one in cells}))
        seeds = ", ".join(map(str, found.seeds(setting)))
        about = f"{report_html.describe(found, setting)} Seeds: {seeds}. Device: {devices}. Commit: {commits}."
        parts.append(f"{tables.code(setting)}: {tables.escaped(about)}\n\n{tables.markdown(table)}")
        if cliff := details.cliff(found, setting):
            parts.append(f"The cliff of {tables.code(setting)}:\n\n{tables.markdown(cliff)}")
    parts.append(
        "Mean \u00b1 standard deviation over n seeds with the 95 % interval; *gap* is what is lost to the oracle filter, which "
        "removes all the poison and nothing else; *relies on* is what the defense is told or assumes. Written by `python "
        "-m analysis.report --readme README.md` from the files in `results/`, which hold the conditions."
    )
    return "\n\n".join(parts)


def with_tables(text: str, made: str, where: Path) -> str:
    """A README with `made` between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{where} has no lines {BEGIN} and {END}; put them where the results should stand")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def main(args) -> None:
    found = results.read(args.results)
    if not (args.html or args.markdown or args.readme):
        raise UserError("nothing to write; give --html, --markdown or --readme")
    files = {args.html: report_html.page, args.markdown: all_tables}
    made = {path: make(found) for path, make in files.items() if path}
    if args.readme:
        try:
            made[args.readme] = with_tables(args.readme.read_text(), readme_tables(found), args.readme)
        except UnicodeDecodeError as error:
            raise UserError(f"{args.readme} is no UTF-8 text") from error
    with stage.Outputs(list(made), []) as temporary:
        for path, text in made.items():
            temporary[path].write_bytes(text.encode("utf-8", "replace"))
    print(f"{report_html.facts(found)} Written: {', '.join(map(str, made))}")


if __name__ == "__main__":
    options = stage.parser("report", __doc__.partition("\n")[0])
    options.prog = "python -m analysis.report"
    options.add_argument("--results", type=Path, default=Path("results"), help="folder with the cells' JSON files")
    options.add_argument("--html", type=Path, help="page to write")
    options.add_argument("--markdown", type=Path, help="the same tables in Markdown, to write")
    options.add_argument("--readme", type=Path, help="file whose text between the two markers is replaced")
    stage.run(main, options)
