"""The page of an audit: one HTML file with all its pictures in it, no script, nothing fetched from anywhere.

Every text that came with the data is escaped, and the page's own content policy forbids scripts and remote addresses.
"""

import json
from dataclasses import dataclass, field
from html import escape

import numpy as np

from analysis import pictures

# Share of the rows that the model gives their own label, under which its verdict is not shown as one. Victims with 0.52 and
# 0.62 (1,500 photographs, 240 and 940 steps) had fitted a sixth and a quarter of their poison; the audit found 6 and 3 %
# of it, and natural images in its place. One with 0.89 (Fashion-MNIST) had learnt the trigger, and all of it was found.
WELL_FITTED = 0.7
SMALL_CLASS = 8  # rows; in a smaller class two kinds of images cannot be told apart
FEW_CLASSES = 5  # fewer, and there is little to tell what halves of ordinary classes look like (defenses/README.md)
BINS = 44
HEIGHT = 90  # of the histogram, in its own units; one bin is ten wide


@dataclass
class Card:
    """One picture with what is said below it; `image` (H, W, C) uint8, or None where there is none."""

    name: str
    lines: list[str]
    image: np.ndarray | None


@dataclass
class Section:
    """One class. scores: (n,) of its rows, removed: (n,) bool; averages: as `pictures.averages` gives them."""

    name: str
    scores: np.ndarray
    removed: np.ndarray
    suspects: list[Card]
    typical: list[Card]
    averages: tuple[np.ndarray, np.ndarray, np.ndarray, float] | None = None


@dataclass
class Page:
    """summary: as `analysis.audit` writes it to summary.json. notes: what a reader must know. skipped: unused files."""

    summary: dict
    notes: list[str]
    skipped: list[str]
    sections: list[Section] = field(default_factory=list)

    def html(self) -> str:
        title, text, tone = headline(self.summary)
        body = [
            f'<header class="{tone}"><p class="kicker">Data set audit</p><h1>{escape(title)}</h1><p>{escape(text)}</p>'
            f"</header>{self._tiles()}"
        ]
        if self.notes:
            body.append('<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in self.notes) + "</ul>")
        body += [_section(section) for section in self.sections]
        if self.skipped:
            lines = "".join(f"<li>{escape(line)}</li>" for line in self.skipped)
            body.append(
                f'<details class="skipped"><summary>{len(self.skipped):,} entries skipped: neither trained on nor '
                f"scored</summary><ul>{lines}</ul></details>"
            )
        body.append(f"<footer><p>{HOW_TO_READ}</p></footer>")
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">\n"
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
            + "\n".join(body)
            + "\n</main></body></html>\n"
        )

    def _tiles(self) -> str:
        summary = self.summary
        by = {"hand": "budget given by hand", "defense": "decided by the defense", "nobody": "ranked only"}
        options = [f"{name}: {json.dumps(value)}" for name, value in summary["options"].items()]
        tiles = [
            (f"{summary['rows']:,}", f"rows in {summary['classes']:,} classes"),
            (f"{summary['removed']:,}", f"rows removed, {summary['removed'] / summary['rows']:.1%}"),
            (f"{summary['fit']:.0%}", "of the rows fitted by the model"),
            (summary["defense"], ", ".join([by[summary["decided_by"]], *options])),
        ]
        cells = "".join(  # <wbr>: a long name breaks between its words
            f"<div><b>{escape(value).replace('_', '_<wbr>')}</b><span>{escape(what)}</span></div>"
            for value, what in tiles
        )
        return f'<section class="tiles">{cells}</section>'


def headline(summary: dict) -> tuple[str, str, str]:
    """Title, sentence and tone (alarm, calm or open) of the verdict."""
    found = [f"{item['class']} ({item['removed']:,} of {item['rows']:,} rows)" for item in summary["suspected"]]
    text = "; ".join(found[:8]) + (f"; and {len(found) - 8} more" if len(found) > 8 else "")
    if summary["fit"] < WELL_FITTED and summary["decided_by"] != "hand":
        names = ", ".join(item["class"] for item in summary["suspected"][:8])
        return (
            "The model learnt too little to judge by",
            f"It gives only {summary['fit']:.0%} of the rows the label that they have, so that it need not have learnt a "
            "trigger: train longer (of your own images: settings.own.train.epochs). "
            + (f"The defense would name {names}." if names else ""),
            "open",
        )
    if summary["decided_by"] == "hand":
        return (
            f"{summary['removed']:,} most suspicious rows, as many as asked for",
            text or "No row was asked for.",
            "open",
        )
    if summary["decided_by"] == "nobody":
        return "Ranked, not judged", "This defense does not say whether the data are poisoned.", "open"
    if not summary["suspected"]:
        compared = summary["classes_compared"]
        if compared < 2:
            return (
                "Too few rows to judge by",
                f"Nearly every class has fewer than {SMALL_CLASS} rows: two kinds of images within one cannot be told apart.",
                "open",
            )
        few = compared < FEW_CLASSES
        return (
            "Nothing looks poisoned" + (f", as far as {compared} classes tell" if few else ""),
            "No class splits into two kinds of images that differ as a trigger makes them differ. This is no proof: what "
            "the model did not learn, and what is smaller than a handful of images, cannot be seen.",
            "open" if few else "calm",
        )
    classes = "1 class looks" if len(found) == 1 else f"{len(found)} classes look"
    return f"{classes} poisoned", text, "alarm"


def verdict_line(summary: dict) -> str:
    title, text, _ = headline(summary)
    return f"{title}. {text}"


def _section(section: Section) -> str:
    n, n_removed = len(section.scores), int(section.removed.sum())
    said = f"{n_removed:,} of {n:,} rows removed" if n_removed else f"{n:,} rows, none removed"
    first = "Most suspicious first" if n_removed else "Ranked highest, and not suspected"
    frame, rest = ("odd", n - n_removed) if n_removed else ("", n - len(section.suspects))
    parts = [
        f'<section class="class"><h2>Class {escape(section.name)} <small>{said}</small></h2>',
        '<div class="facts">',
        _histogram(section.scores, section.removed),
        _averages(section, n_removed > 0),
        "</div>",
        f'<div class="pair"><div><h3>{first}{_of(section.suspects, n_removed or n)}</h3>{_grid(section.suspects, frame)}'
        f"</div><div><h3>Typical of the rest{_of(section.typical, rest)}</h3>{_grid(section.typical, '')}</div>"
        "</div></section>",
    ]
    return "\n".join(parts)


def _of(cards: list[Card], n: int) -> str:
    return f" <small>{len(cards):,} of {n:,}</small>"


def _grid(cards: list[Card], kind: str) -> str:
    if not cards:
        return '<p class="none">none</p>'
    kind += "" if any(card.image is not None for card in cards) else " bare"  # features alone: no pictures at all
    return f'<div class="grid {kind}">' + "".join(_card(card) for card in cards) + "</div>"


def _card(card: Card) -> str:
    name = escape(card.name, quote=True)
    picture = '<span class="blank">no picture</span>' if card.image is None else _img(card.image, card.name)
    lines = "<br>".join(escape(line) for line in card.lines)
    short = escape(card.name.rpartition("/")[2])
    return f'<figure title="{name}">{picture}<figcaption>{lines}<span>{short}</span></figcaption></figure>'


def _img(image: np.ndarray, alt: str) -> str:
    coarse = ' class="coarse"' if max(image.shape[:2]) < 48 else ""
    return f'<img{coarse} src="{pictures.data_uri(image)}" alt="{escape(alt, quote=True)}">'


def _averages(section: Section, removed: bool) -> str:
    if section.averages is None:
        return ""
    first, second, difference, largest = section.averages
    words = ("suspects" if removed else "ranked highest", "typical", f"difference, up to {largest:.0%}")
    figures = "".join(
        f"<figure>{_img(image, word)}<figcaption>{escape(word)}</figcaption></figure>"
        for image, word in zip((first, second, difference), words, strict=True)
    )
    return f'<div class="averages"><h3>Average pictures</h3><div>{figures}</div></div>'


def _histogram(scores: np.ndarray, removed: np.ndarray) -> str:
    """Number of rows by score, removed ones stacked on the kept; square-root heights, or few rows would not show."""
    low, high = np.percentile(scores, [0.5, 99.5])
    if not high > low:
        low, high = low - 0.5, low + 0.5
    edges, clipped = np.linspace(low, high, BINS + 1), scores.clip(low, high)
    kept, gone = (np.histogram(clipped[mask], edges)[0] for mask in (~removed, removed))
    unit = HEIGHT / np.sqrt(max((kept + gone).max(), 1))
    bars = []
    for place, (below, above) in enumerate(zip(kept.tolist(), gone.tolist(), strict=True)):
        full, part = np.sqrt(below + above) * unit, 0.0
        if below:
            part = full * below / (below + above)
            bars.append(_bar(place, part, 0, "kept"))
        if above:
            bars.append(_bar(place, full - part, part, "gone"))
    return (
        '<div class="histogram"><h3>Scores of the class</h3>'
        f'<svg viewBox="0 0 {BINS * 10} {HEIGHT}" role="img" aria-label="histogram of scores">{"".join(bars)}</svg>'
        f'<p><span>{low:.3g}</span><span class="key"><i class="kept"></i>kept <i class="gone"></i>removed, higher = more '
        f"suspicious</span><span>{high:.3g}</span></p></div>"
    )


def _bar(place: int, height: float, above: float, kind: str) -> str:
    y = HEIGHT - above - height
    return f'<rect class="{kind}" x="{place * 10 + 1}" y="{y:.2f}" width="8" height="{max(height, 1):.2f}" rx="1"/>'


HOW_TO_READ = (
    "A model was trained on the data as they are, or brought along; each class is asked whether it holds two kinds of "
    "images that differ as a trigger makes them differ. Look at what the suspects share and the typical images do not: a "
    "mark in one place shows in the average difference. Suspects may be harmless: a class can have two natural kinds. "
    "All rows stand in suspects.csv; the names of the kept ones in kept.txt. Nothing was changed or deleted."
)

# Pictures keep their square corners: a round one would hide a patch that lies there.
STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf7;--card:#fff;--ink:#1d1c1a;--soft:#6d6a63;--line:#e4e0d7;--hot:#b3341f;
--hot-soft:#fbe9e3;--cool:#2f6f5b;--cool-soft:#e4f1ea;--open:#5b5488;--open-soft:#ecebf6;--bar:#b9b4a8}
@media (prefers-color-scheme:dark){:root{--paper:#171614;--card:#201f1c;--ink:#ece9e2;--soft:#a09b90;--line:#35322d;
--hot:#ff8a6b;--hot-soft:#3a211a;--cool:#7fcfb2;--cool-soft:#1b2f28;--open:#b6aef0;--open-soft:#272440;--bar:#5f5b52}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 24px 64px}h1,h2,h3,p{margin:0}
header{overflow-wrap:anywhere;padding:24px 28px;border-radius:14px;border-left:6px solid var(--tone);background:var(--tone-soft)}
header.alarm{--tone:var(--hot);--tone-soft:var(--hot-soft)}header.calm{--tone:var(--cool);--tone-soft:var(--cool-soft)}
header.open{--tone:var(--open);--tone-soft:var(--open-soft)}
header h1{font-size:30px;line-height:1.2;margin:2px 0 6px;color:var(--tone)}
.kicker{font-size:12px;letter-spacing:.08em;text-transform:uppercase;color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:12px;margin:16px 0}
.tiles div,.class,.skipped{background:var(--card);border:1px solid var(--line);border-radius:12px}
.tiles div{padding:14px 18px}.tiles b{display:block;font-size:22px;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tiles span,small,figcaption,footer,.none{color:var(--soft)}small{font-size:13px;font-weight:400;margin-left:6px}
.notes{overflow-wrap:anywhere;margin:0 0 16px;padding:12px 18px 12px 36px;border:1px dashed var(--line);border-radius:12px}
.class{padding:22px 24px;margin:16px 0}h2{font-size:21px;overflow-wrap:anywhere}
h3{font-size:13px;color:var(--soft);font-weight:600;margin-bottom:8px}
.facts{display:grid;grid-template-columns:minmax(280px,1.6fr) minmax(260px,1fr);gap:28px;margin:16px 0 20px}
.histogram svg{width:100%;height:auto;border-bottom:1px solid var(--line);display:block}
.histogram p{display:flex;justify-content:space-between;font-size:12px;color:var(--soft);margin-top:4px}
rect.kept{fill:var(--bar)}rect.gone{fill:var(--hot)}
.key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin:0 4px 0 8px}
i.kept{background:var(--bar)}i.gone{background:var(--hot)}
.averages>div{display:flex;gap:12px}.averages figure{flex:1;max-width:128px}
.pair{display:grid;grid-template-columns:2fr 1fr;gap:28px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,82px);gap:12px 10px}
figure{margin:0;min-width:0}img{width:100%;aspect-ratio:1;object-fit:contain;display:block;outline:1px solid var(--soft);
background:var(--line)}img.coarse{image-rendering:pixelated}.odd img{box-shadow:0 0 0 2px var(--hot)}
.blank{display:grid;place-items:center;aspect-ratio:1;background:var(--line);font-size:11px;
color:var(--soft)}.bare .blank{display:none}
figcaption{font-size:11px;line-height:1.35;margin-top:5px;font-variant-numeric:tabular-nums;
overflow:hidden}figcaption span{display:block;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.skipped{padding:14px 18px}.skipped ul{margin:8px 0 0;padding-left:20px;font-size:13px;overflow-wrap:anywhere}
footer{font-size:13px;margin-top:24px;max-width:78ch}
@media (max-width:760px){.facts,.pair{grid-template-columns:1fr}main{padding:16px 12px 48px}}
""".strip()
