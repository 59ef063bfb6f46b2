"""The page and the Markdown hold the figures of the JSON files, need nothing else, and load in a real browser."""

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from made_results import cell, cliff, write
from scipy import stats
from test_dvc_yaml import closure

from analysis import charts, details, leaderboards, report, report_html, results, tables

ROOT = Path(__file__).resolve().parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NAME = 'x<script>alert("1")</script>&'  # a hostile name


class Tables(html.parser.HTMLParser):
    """Text of every table's cells, by row."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.cell = [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.cell:
            self.tables[-1][-1][-1] += f" {data}"

    def table(self, *columns: str, row: str = "") -> list[list[str]]:
        """Rows of the first table with these columns, and with a row that begins so."""
        for table in self.tables:
            begins = {line[0].strip() for line in table} | {""}
            if table and row in begins and set(columns) <= {name.strip() for name in table[0]}:
                return [[" ".join(value.split()) for value in row] for row in table]
        raise AssertionError(f"no table with {columns}")


@pytest.fixture
def folder(tmp_path):
    """Three seeds of two defenses, a clean run, a cliff, a hostile name and a broken file."""
    for seed, (one, two) in enumerate(((0.91, 0.5), (0.93, 0.7), (0.92, 0.63)), 1):
        write(tmp_path, cell(defense="one", seed=seed, clean_acc=one, asr=0.1 * seed))
        write(tmp_path, cell(defense="two", seed=seed, clean_acc=two, asr=0.9))
    write(tmp_path, cell(setting="alpha-clean", defense="one", poisoned=False, clean_acc=0.94))
    strange = cell(setting="beta")
    strange["removed"]["classes"] = [NAME, "</td></svg>"]
    strange["ledger"]["relies_on"] = [NAME]
    strange["plots"]["projection"]["class"] = NAME
    write(tmp_path, strange)
    write(tmp_path, cell(setting="resnet20-cifar10-badnets"))
    cliff(tmp_path)
    (tmp_path / "alpha/one/seed9.json").write_text("{")
    return tmp_path


def minus(text: str) -> str:
    return text.replace("-", tables.MINUS)


def test_the_leaderboard_holds_the_figures_of_the_files(folder):
    """Mean, deviation and interval by other means than the report's."""
    found = results.read(folder)
    rows = Tables(report_html.page(found)).table("defense score", "poison recall", "gap", row="two")
    place = {name: number for number, name in enumerate(rows[0])}
    by_name = {row[0]: row for row in rows[1:]}
    assert list(by_name) == ["oracle filter", "one", "two", "undefended"]
    for defense in ("one", "two"):
        files = [json.loads(path.read_text()) for path in sorted((folder / "alpha" / defense).glob("seed[123].json"))]
        for column, key in (("clean accuracy", "clean_acc"), ("ASR", "asr"), ("defense score", "defense_score")):
            values = np.array([content["metrics"][key] for content in files])
            low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values)) if values.std() else [values[0]] * 2
            expected = f"{values.mean():.3f} ± {values.std(ddof=1):.3f} [{low:.3f}, {high:.3f}]"
            assert by_name[defense][place[column]] == minus(expected)
        gaps = [content["metrics"]["gap_defense_score"] for content in files]
        assert by_name[defense][place["gap"]].startswith(f"+{np.mean(gaps):.3f}")
        assert by_name[defense][place["n"]] == "3" and by_name[defense][place["relies on"]] == "class sizes"
    assert by_name["undefended"][place["ASR"]].startswith("1.000")
    assert by_name["oracle filter"][place["clean accuracy"]].startswith("0.950")


def test_the_settings_of_the_public_table_come_first(folder):
    write(folder, cell(setting="quick"))
    assert results.read(folder).settings() == ["resnet20-cifar10-badnets", "quick", "alpha", "alpha-clean", "beta"]


def test_paired_differences_pair_the_seeds(folder):
    (folder / "alpha/two/seed3.json").unlink()
    rows = Tables(report_html.page(results.read(folder))).table("one minus")
    values = np.array([0.91 - 0.5, 0.93 - 0.7])
    low, high = stats.t.interval(0.95, 1, values.mean(), stats.sem(values))
    assert rows[1][0] == "two" and rows[1][2] == "2"
    assert rows[1][rows[0].index("clean accuracy")] == minus(
        f"{values.mean():+.3f} ± {values.std(ddof=1):.3f} [{low:+.3f}, {high:+.3f}]"
    )


def test_removed_ledger_published_and_problems_are_shown(folder):
    found = Tables(report_html.page(results.read(folder)))
    rows = found.table("cat (12 rows, 5 poisoned)")
    assert rows[1][2:] == ["0 + 4", "1"]
    assert found.table("rows removed", "precision", row="two")[1][4:9] == [
        "5",
        "1",
        "4",
        "0.800 ± 0.000",
        "0.800 ± 0.000",
    ]
    rows = [row for row in found.table("was told") if row[:2] == ["one", "alpha"]]
    assert rows == [
        ["one", "alpha", "class sizes", "nothing", "poison fraction 0.25", f"1 {tables.TIMES} the poison", "no"]
    ]
    rows = {row[0]: row for row in found.table("best published row")}
    assert rows["resnet20-cifar10-badnets"][1:] == ["0.632", "0.967"]
    assert [row[0] for row in found.table("where", "what")[1:]] == ["alpha/one/seed9.json"]
    rows = found.table("share of all rows")
    assert rows[2][0] == "one" and rows[2][4:6] == ["5", "0.250"], "a clean run: rows removed"


def test_the_cliff_is_a_table(folder):
    found = results.read(folder)
    rows = Tables(report_html.page(found)).table("poisoned rows left in")
    assert rows[1:] == [
        ["1", "0", "1.000", "0.000", "0.900"], ["1", "2", "0.600", "0.400", "0.900"], ["1", "5", "0.000", "1.000", "0.900"]
    ]  # fmt: skip
    assert tables.markdown(details.cliff(found, "alpha")) in report.readme_tables(found)
    assert details.cliff(found, "beta") is None


def test_markdown_holds_the_same_tables(folder):
    found = results.read(folder)
    text = report.all_tables(found)
    for table in (leaderboards.leaderboard(found, "alpha"), details.ledger(found), details.filtering(found, "alpha")):
        assert tables.markdown(table) in text
        lines = tables.markdown(table).splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines[: len(table.rows) + 2]}) == 1
    assert "<script" not in text


def test_names_are_escaped(folder):
    text = report_html.page(results.read(folder))
    assert "alert(" in text and NAME not in text
    assert text.count("<script>") == 1 and text.count("</svg>") == text.count("<svg")


def test_the_page_asks_for_nothing(folder):
    text = report_html.page(results.read(folder))
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|@import|url\(|\ssrc=|<iframe|<object|<embed", text)
    assert set(re.findall(r'href="([^"]*)"', text)) <= {"data:,", "#ledger", *(f"#s{n}" for n in range(9))}


def test_nothing_at_all_is_a_page_too(tmp_path):
    found = results.read(tmp_path / "none")
    assert "0 cells" in report_html.page(found) and "0 cells" in report.all_tables(found)


def test_the_readme_is_what_the_results_say():
    path = ROOT / "README.md"
    text = path.read_text()
    made = report.with_tables(text, report.readme_tables(results.read(ROOT / "results")), path)
    assert text == made, "run `python -m analysis.report --readme README.md`"


def command(folder, *words) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "analysis.report", *map(str, words)], cwd=folder, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_the_command_and_its_mistakes(folder, tmp_path):
    (tmp_path / "plain.md").write_text("no markers\n")
    for words, message in (
        ([], "nothing to write"),
        (["--readme", tmp_path / "plain.md"], "has no lines"),
        (["--html", tmp_path], "is a folder"),
        (["--readme", tmp_path / "absent.md"], "No such file"),
    ):
        status, output = command(ROOT, "--results", folder, *words)
        assert status == 1 and message in output and "Traceback" not in output
    assert (tmp_path / "plain.md").read_text() == "no markers\n"
    files = [tmp_path / "a" / name for name in ("one.html", "one.md")]
    assert command(ROOT, "--results", folder, "--html", files[0], "--markdown", files[1])[0] == 0
    first = [path.read_bytes() for path in files]
    assert command(ROOT, "--results", folder, "--html", files[0], "--markdown", files[1])[0] == 0
    assert [path.read_bytes() for path in files] == first, "the same results, the same bytes"


def test_charts_stand_what_is_flat_or_far():
    for xs, ys in (([], []), ([0], [0]), ([0, 0], [1, 1]), ([0, 1e99], [-1e99, 1e99]), ([1e-99, 2e-99], [0, 1e-99])):
        svg = charts.lines("t", [charts.Series("s", xs, ys, "s0")], ("x", "y"), scale=charts.root)
        svg += charts.scatter("t", [("clean", list(zip(xs, ys)))], (xs, ys))
        svg += charts.histogram("t", [0.0, *sorted(xs)], [("clean", ys)], 0.5, ("x", "y"))
        assert "nan" not in svg and "inf" not in svg
    assert charts.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]) and charts.ticks(3, 3) == [3]


SECOND = yaml.safe_load((ROOT / "analysis/dvc.yaml").read_text())["stages"]


def test_deps_of_the_report_are_its_import_closure():
    stage = SECOND["report"]
    listed = {dep for dep in stage["deps"] if dep.endswith(".py")}
    assert listed == closure("analysis/report.py") - {"analysis/__init__.py"}
    assert stage["wdir"] == ".." and {"results", "analysis/report.css"} <= set(stage["deps"])


def test_only_the_target_runs_the_report(tmp_path):
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "artifacts/")) and not name.endswith("dvc.lock"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"

    def dvc(*words):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *words], cwd=tmp_path, capture_output=True, text=True,
            env={"PATH": path, "HOME": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    (tmp_path / "dvc.yaml").write_text("stages: {cell: {cmd: echo computed}}\n")  # in place of some minutes
    assert re.findall(r"Running stage '(.*)'", dvc("repro")) == ["cell"], "all of the root pipeline, and nothing else"
    assert "Running stage 'analysis/dvc.yaml:report'" in dvc("repro", "analysis/dvc.yaml:report")
    assert (tmp_path / "artifacts/report/index.html").exists() and (tmp_path / "artifacts/report/report.md").exists()
    assert "Running stage" not in dvc("repro", "analysis/dvc.yaml:report")
    ignored = subprocess.run(["git", "status", "--short", "artifacts"], cwd=tmp_path, capture_output=True, text=True)
    assert "report" not in ignored.stdout


def browse(path: Path, folder: Path) -> tuple[str, list[str], set[str]]:
    """The page as the browser holds it, what it wrote to its console, and what the page asked of the network."""
    log = folder / "network.json"
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", f"--log-net-log={log}",
            "--virtual-time-budget=2000", "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    parameters = [event.get("params") for event in json.loads(log.read_text())["events"]]
    # The browser's own errands (updates, the time of day) have no origin.
    asked = {
        each["url"]
        for each in parameters
        if isinstance(each, dict) and "url" in each and each.get("initiator", "not an origin") != "not an origin"
    }
    return done.stdout, console, asked


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_in_a_real_browser(folder, tmp_path):
    path = tmp_path / "index.html"
    found = results.read(folder)
    path.write_text(report_html.page(found))
    held, console, asked = browse(path, tmp_path)
    assert console == [] and asked == set()
    assert Tables(held).tables == Tables(report_html.page(found)).tables and len(Tables(held).tables) > 20
    assert re.search(r'<button id="theme" type="button">(Dark|Light)</button>', held), "the page's one script has run"

    path.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("oops")</script>')
    _, console, asked = browse(path, tmp_path)
    assert len(console) == 1 and asked == {"http://127.0.0.1:9/x.png"}, "what this test would notice"


def test_defenses_that_are_equally_good_are_all_called_best(tmp_path):
    for name, recall in (("worse", 0.5), ("one", 0.8), ("other", 0.8)):
        write(tmp_path, cell(defense=name, recall=recall))
    rows = leaderboards.overview(results.read(tmp_path)).rows
    assert [row.values[1].text for row in rows] == ["one", "other"]
