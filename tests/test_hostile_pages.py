"""Names that try to be HTML: the pages hold the same tags and attributes whatever the data are called."""

import copy
import json
import shutil
from html.parser import HTMLParser

import made_results
import numpy as np
import pytest
from hostile import BREAKING, changed_at
from hypothesis import given
from hypothesis import strategies as st

from analysis import audit_page, report_html, results, tables
from analysis.schema import CELL, mistake


class Skeleton(HTMLParser):
    """Tags with the names of their attributes, comments and declarations, in order; texts and values apart."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.found, self.texts, self.values = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, *[name for name, _ in attributes]))
        self.values += [(name, value) for name, value in attributes]

    def fixed(self):
        """Attributes and values, but for those that hold words of the data."""
        return [(name, value) for name, value in self.values if name not in ("title", "alt", "content", "aria-label")]

    def handle_endtag(self, tag):
        self.found.append(f"/{tag}")

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        self.found.append("comment")

    def handle_decl(self, decl):
        self.found.append("declaration")

    unknown_decl = handle_pi = handle_comment


WORDS = st.one_of(
    st.sampled_from(BREAKING),
    st.text("<>\"'&;=/!-abcSCRIPTimg onerror\u2028\u202e\x0b\x0c", min_size=1, max_size=20),
    st.text(min_size=1, max_size=10),
).filter(lambda text: text.strip() and text.isprintable() and "/" not in text and text not in ("0", tables.DASH))


def of_audit(words) -> str:
    image = np.zeros((4, 4, 3), np.uint8)

    def card(name, image):
        return audit_page.Card(name, [f"#1 · 0.5 {words[1]}", f"seen as {words[2]}"], image)

    summary = {"defense": words[0], "options": {words[1]: words[2]},
               "rows": 10, "classes": 2, "fit": 0.9, "decided_by": "defense", "removed": 3,
               "suspected_rows": 3, "suspected": [{"class": words[1], "rows": 5, "removed": 3}]}  # fmt: skip
    parts = [
        audit_page.Section(words[1], np.arange(5.0), np.arange(5) > 1, [card(words[2], image), card(words[3], None)],
                            [card(words[3], None)], (image, image, image[..., :1], 0.5))
    ]  # fmt: skip
    pages = [audit_page.Page(summary, [words[2]], [f"{words[3]}: {words[0]}"], parts).html()]
    for changes in ({"fit": 0.1}, {"decided_by": "hand"}, {"decided_by": "nobody"}):
        pages.append(audit_page.Page(summary | changes, [words[2]], [words[3]], parts).html())
    return "\n".join(pages)


@given(words=st.tuples(WORDS, WORDS, WORDS, WORDS))
def test_audit_page(words):
    plain, hostile = Skeleton(of_audit(("w", "x", "y", "z"))), Skeleton(of_audit(words))
    assert hostile.found == plain.found
    assert hostile.fixed() == plain.fixed()
    for word in words:  # nothing is lost either
        assert word.strip() in "".join(hostile.texts) or word == words[3]


def report(folder, words) -> str:
    """The page of two settings' cells with names from the list, and of files that cannot be used."""
    setting, defense, cat, relies, device, network, wrong = words
    shutil.rmtree(folder, ignore_errors=True)
    for seed in (1, 2):
        cell = made_results.cell(setting, defense, seed)
        cell["removed"]["classes"], cell["plots"]["projection"]["class"] = [cat, "dog"], cat
        cell["ledger"] |= {"relies_on": [relies], "may_use": [cat]}
        cell["conditions"]["runtime"] = {name: about | {"device": device, "torch": relies}
                                         for name, about in cell["conditions"]["runtime"].items()}  # fmt: skip
        cell["conditions"] |= {"commit": wrong, "exported": device}
        cell["conditions"]["versions"] = {cat: relies}
        parameters = cell["conditions"]["parameters"]
        parameters["setting"]["model"]["network"] = network
        parameters["setting"]["data"]["source"] = relies
        parameters["setting"]["poison"]["trigger"]["name"] = device
        parameters["defense"] = {"option": wrong}
        made_results.write(folder, cell)
    made_results.cliff(folder, setting, 1, of=cell)
    made_results.write(folder, made_results.cell(setting, f"{defense}2") | {"schema_version": wrong})
    made_results.write(folder, made_results.cell(setting, f"{defense}3"), name="seed9.json")
    found = results.read(folder)
    assert len(found.cells) == 2 and len(found.cliffs) == 1 and len(found.problems) == 2
    return report_html.page(found)


FILE_WORDS = WORDS.filter(
    lambda text: text not in (".", "..") and len(text.encode()) < 100 and not text.startswith(".")
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Skeleton(report(tmp_path_factory.mktemp("plain"), ("alpha", "one", "u", "v", "w", "x", "y")))


@given(words=st.tuples(FILE_WORDS, FILE_WORDS, *[WORDS] * 5))
def test_report(tmp_path, plain, words):
    hostile = Skeleton(report(tmp_path / "results", words))
    assert hostile.found == plain.found
    policy = next(value for name, value in hostile.values if name == "content" and "default-src" in (value or ""))
    assert policy.startswith("default-src 'none';")


@given(data=st.data())
def test_results_of_any_content(tmp_path, data):
    """A cell with anything in the place of anything is used or listed with the reason; the page is drawn."""
    folder = tmp_path / "results"
    shutil.rmtree(folder, ignore_errors=True)
    made_results.write(folder, made_results.cell(seed=1))
    path = made_results.write(folder, made_results.cell(seed=2))
    content = changed_at(data.draw, copy.deepcopy(made_results.cell(seed=2)))
    path.write_text(json.dumps(content))
    found = results.read(folder)
    assert ("alpha", "one", 1) in found.cells or found.problems
    for cell in found.cells.values():
        assert mistake(cell, CELL) is None
    assert "<html" in report_html.page(found)
