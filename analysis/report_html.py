"""The report as one HTML page that needs nothing else: no server, no network, light and dark.

A content security policy forbids every request and every script but the page's own switch of the theme. Whatever comes
from the results is escaped, names included.
"""

import base64
import hashlib
from html import escape
from pathlib import Path

from analysis import charts, details, leaderboards, tables
from analysis.figures import Figure, Painter
from analysis.results import Results
from analysis.tables import Table, Value

DARK = {
    "paper": "#15181c", "card": "#1a1e23", "ink": "#e6e4df", "soft": "#a3a9b2", "faint": "#737a84", "rule": "#2b3037",
    "wash": "#1c2026", "accent": "#86bccb", "bar": "#2a3a40", "grid": "#242931",
    "clean": "#7089a0", "poison": "#e0675d", "caught": "#55b79b", "lost": "#e3ac4a", "keep": "#56616d",
    "s0": "#6ba7d6", "s1": "#e38d5f", "s2": "#62b88f", "s3": "#ad8bd1", "s4": "#d2b04d", "s5": "#58bfc4", "s6": "#d980a9",
    "s7": "#a5abb5",
}  # fmt: skip
SCRIPT = """
const root = document.documentElement, button = document.getElementById("theme");
const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
const label = () => { button.textContent = dark() ? "Light" : "Dark"; };
button.hidden = false;
button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; label(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
label();
"""
FEATURE_LEGEND = [
    ("clean", "clean"), ("poison", "poisoned"), ("kept", "clean, kept"), ("caught", "poison, removed"),
    ("lost", "clean, removed"), ("missed", "poison, kept"),
]  # fmt: skip


def stylesheet() -> str:
    colours = "; ".join(f"--{name}: {value}" for name, value in DARK.items())
    dark = (
        f"@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ color-scheme: dark; {colours} }} }}\n"
        f":root[data-theme=dark] {{ color-scheme: dark; {colours} }}"
    )
    series = "\n".join(
        f".line.s{n} {{ stroke: var(--s{n}); }} .point.s{n} {{ fill: var(--s{n}); }}" for n in range(charts.COLOURS)
    )
    text = Path(__file__).with_name("report.css").read_text()
    return text.replace("\nDARK\n", f"\n{dark}\n").replace("\nCOLOURS\n", f"\n{series}\n")


def page(results: Results) -> str:
    painter = Painter(results)
    names = results.settings()
    anchors = [(f"s{place}", name) for place, name in enumerate(names)] + ([("ledger", "ledger")] if names else [])
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name in anchors)
    odd = details.problems(results)
    body = [
        "<h1>Backdoor defenses, measured</h1>",
        '<p class="lead">An attacker stamps a trigger on a few training images and relabels them. A defense scores every '
        "sample, the most suspicious are removed, and a network is trained from scratch on the rest. What is left of the "
        "attack, beside no defense at all and beside a perfect filter.</p>",
        f'<p class="facts">{escape(facts(results))}</p>',
        f'<div class="warn">{table(odd)}</div>' if odd else "",
        table(leaderboards.overview(results)) if any(map(results.is_poisoned, names)) else "",
        table(leaderboards.public_table()),
    ]
    body += [section(results, painter, name, f"s{place}") for place, name in enumerate(names)]
    if names:
        body.append(f'<section id="ledger"><h2>The ledger</h2>{table(details.ledger(results))}</section>')
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Backdoor defenses, measured</title>
<link rel="icon" href="data:,">
<style>
{stylesheet()}</style>
</head>
<body>
<nav class="bar-top"><div>{links}<button id="theme" type="button" hidden>Dark</button></div></nav>
<main>
{"".join(body)}
<footer>Drawn from the JSON files in results/ alone. The same tables stand in report.md.</footer>
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def facts(results: Results) -> str:
    defenses, seeds = ({key[place] for key in results.cells} for place in (1, 2))
    counts = [
        (len(results.cells), "cell"),
        (len(results.settings()), "setting"),
        (len(defenses), "defense"),
        (len(seeds), "seed"),
    ]
    words = [f"{number} {noun}{'' if number == 1 else 's'}" for number, noun in counts]
    unused = len(results.problems)
    note = (
        f" {unused} thing{'' if unused == 1 else 's'} could not be used or {'is' if unused == 1 else 'are'} missing."
        if unused
        else ""
    )
    return f"{words[0]}: {', '.join(words[1:-1])} and {words[-1]}.{note}"


def section(results: Results, painter: Painter, setting: str, anchor: str) -> str:
    poisoned = results.is_poisoned(setting)
    parts = [
        f'<section id="{anchor}"><h2>{escape(setting)}</h2><p class="facts">{escape(describe(results, setting))}</p>'
    ]
    parts.append(table(leaderboards.leaderboard(results, setting)))
    if found := leaderboards.differences(results, setting):
        parts.append(table(found))
    if found := leaderboards.score_matrix(results, setting):
        parts.append(folded(found))
    big = [found for draw in (painter.recall, painter.cliff, painter.training) if (found := draw(setting))]
    parts.append(f'<h3>Curves</h3>{legend(_merged(big))}<div class="plots">{"".join(map(figure, big))}</div>')
    if found := details.cliff(results, setting):
        parts.append(folded(found))
    scores = "".join(map(figure, painter.histograms(setting)))
    shown = [("clean", "clean"), ("poison", "poisoned")] if poisoned else [("clean", "clean")]
    parts.append(f'<h3>Scores</h3>{legend(shown)}<div class="plots small">{scores}</div>')
    parts.append(
        '<p class="note">Share of the clean and of the poisoned rows in each bin; the outermost 0.5 % of the scores lie in '
        "the outer bins. From the dashed line on, rows were removed.</p>"
    )
    dots = "".join(map(figure, painter.features(setting)))
    keys = FEATURE_LEGEND if poisoned else [("kept", "clean, kept"), ("lost", "clean, removed")]
    parts.append(f'<h3>Features in two dimensions</h3>{legend(keys)}<div class="plots dots-grid">{dots}</div>')
    which = "The class with the most poison" if poisoned else "The class of which most rows were removed"
    parts.append(
        f'<p class="note">{which}: penultimate features of the victim, whitened by the covariance within the '
        "classes, on their first two principal components.</p>"
    )
    parts.append(table(details.filtering(results, setting)))
    parts.append(table(details.by_class(results, setting)))
    if found := details.target_class(results, setting):
        parts.append(table(found))
    parts += [folded(details.resources(results, setting)), folded(details.conditions(results, setting)), "</section>"]
    return "".join(parts)


def describe(results: Results, setting: str) -> str:
    """The setting in one line, from the parameters of its cells."""
    cell = next(cell for (name, _, _), cell in results.cells.items() if name == setting)
    blocks = cell["conditions"]["parameters"]["setting"]

    def of(block: str) -> dict:
        found = blocks.get(block)
        return found if isinstance(found, dict) else {}

    poison, total = cell["filter"]["n_poison"], cell["filter"]["n"]
    attack = f"{tables.flat(of('poison').get('trigger', ''))}, {poison:,} of" if poison else "nothing poisoned,"
    rows = f"{total:,} training rows{' poisoned' if poison else ''}"
    network, source, epochs = (
        of("model").get("network", ""),
        of("data").get("source", ""),
        of("train").get("epochs", ""),
    )
    return f"{network} on {source}: {attack} {rows}; {epochs} epochs."


def table(found: Table) -> str:
    return f"<h3>{escape(found.title)}</h3>{grid(found)}"


def folded(found: Table) -> str:
    return f"<details><summary>{escape(found.title)}</summary>{grid(found)}</details>"


def grid(found: Table) -> str:
    head = "".join(f"<th{_word(found, place)}>{escape(name)}</th>" for place, name in enumerate(found.columns))
    rows = "".join(
        f'<tr class="{row.kind}">'
        + "".join(f"<td{_word(found, place)}>{cell(value)}</td>" for place, value in enumerate(row.values))
        + "</tr>"
        for row in found.rows
    )
    note = f'<p class="note">{escape(found.note)}</p>' if found.note else ""
    size = ' class="narrow"' if len(found.columns) <= 3 else ""
    return f'<div class="scroll"><table{size}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}'


def _word(found: Table, place: int) -> str:
    return ' class="word"' if place < found.names else ""


def cell(value: Value) -> str:
    text = escape(value.text)
    if value.code and value.text:
        text = f"<code>{text}</code>"
    if value.text in ("0", tables.DASH):
        text = f'<span class="nil">{text}</span>'
    if value.bar is not None:
        text = f'<b>{text}</b><span class="meter"><i style="width:{100 * value.bar:.1f}%"></i></span>'
    return text + (f"<small>{escape(value.note)}</small>" if value.note else "")


def figure(found: Figure) -> str:
    return f"<figure><h4>{escape(found.title)}</h4>{found.svg}<figcaption>{escape(found.caption)}</figcaption></figure>"


def legend(items) -> str:
    def swatch(style: str) -> str:
        words = style.split()[0]
        shape = f'<path class="line {style}" d="M1 5h16"/>'
        if words in ("clean", "poison", "kept", "caught", "lost", "missed"):
            shape = f'<path class="dots {words}" d="M9 5h0"/>'
        return f'<svg viewBox="0 0 18 10">{shape}</svg>'

    return f'<ul class="legend">{"".join(f"<li>{swatch(style)}{escape(words)}</li>" for style, words in items)}</ul>'


def _merged(figures: list[Figure]) -> list[tuple[str, str]]:
    """One legend for several pictures: the defenses once, then the other lines."""
    found = dict.fromkeys(item for one in figures for item in one.legend)
    return sorted(found, key=lambda item: item[0].split()[0] in ("reference", "strong"))
