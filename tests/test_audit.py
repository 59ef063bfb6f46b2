"""The audit: what it says of planted and of clean data, its lists, its page, the cleaned copy, and every refusal."""

import base64
import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from PIL import Image

import defenses
from analysis import audit_page, kept_copy, pictures, suspects
from stages.lib import own_data, params, storage
from stages.lib.errors import UserError

N, CLASSES, WIDTH, TARGET, POISON = 1500, 6, 16, 2, 120


def dump(poisoned=True, seed=0, **changes):
    """Made-up activations of a victim; with poison, a second mode in class 2. Also which rows are poisoned."""
    generator = np.random.default_rng(seed)
    labels = np.arange(N) % CLASSES
    centres = generator.normal(size=(CLASSES, WIDTH)) * 4
    features = centres[labels] + generator.normal(size=(N, WIDTH))
    poison = np.zeros(N, bool)
    if poisoned:
        poison[generator.choice(np.flatnonzero(labels != TARGET), POISON, replace=False)] = True
        labels = np.where(poison, TARGET, labels)
        shift = generator.normal(size=WIDTH) * 1.5
        features[poison] = centres[TARGET] + shift + 0.7 * generator.normal(size=(POISON, WIDTH))
    logits = features @ centres.T / 4
    arrays = {"features": features.astype(np.float32), "logits": logits.astype(np.float32), "labels": labels}
    return {name: value for name, value in (arrays | changes).items() if value is not None}, poison


def write_h5(path, arrays):
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            if name in ("files", "classes"):
                file.create_dataset(name, data=value, dtype=h5py.string_dtype())
            else:
                file[name] = value
    return path


def save(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
        return path
    return write_h5(path, arrays)


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def audit(command, tmp_path):
    """``audit(path, "--budget", 3)`` -> how it ended; writes to ``out``. Defenses have no options of a params.yaml."""
    (tmp_path / "params.yaml").write_text(
        yaml.safe_dump({"settings": {}, "filter": {}, "defenses": {name: {} for name in defenses.available()}})
    )

    def run(path, *words):
        return command("analysis.audit", "--features", path, "--out", "out", *words, cwd=tmp_path)

    return run


# The verdict


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_planted_poison_is_found(audit, tmp_path, suffix):
    arrays, poison = dump()
    ended = audit(save(tmp_path / f"features{suffix}", arrays))
    assert ended.status == 0, ended.err
    assert ended.out.startswith("1 class looks poisoned. 2 (")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert [found["class"] for found in summary["suspected"]] == ["2"] and summary["decided_by"] == "defense"
    rows = table(tmp_path / "out/suspects.csv")
    removed = {int(line["file"].removeprefix("row ")) for line in rows if line["removed"] == "yes"}
    planted = set(np.flatnonzero(poison).tolist())
    assert len(removed & planted) >= 0.97 * POISON and len(removed - planted) <= 0.05 * POISON
    assert len(removed) == summary["removed"] == summary["suspected"][0]["removed"]


def test_clean_data_are_called_clean(audit, tmp_path):
    ended = audit(save(tmp_path / "features.npz", dump(poisoned=False)[0]))
    assert ended.status == 0 and ended.out.startswith("Nothing looks poisoned. ")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["removed"] == 0 and summary["suspected"] == []
    assert {line["removed"] for line in table(tmp_path / "out/suspects.csv")} == {"no"}
    page = (tmp_path / "out/report.html").read_text()
    assert "Nothing looks poisoned" in page and "This is no proof" in page
    assert page.count("Ranked highest, and not suspected") == CLASSES, "a class that was missed can be looked at"


def test_a_budget_by_hand(audit, tmp_path):
    arrays, poison = dump()
    ended = audit(save(tmp_path / "features.npz", arrays), "--budget", 10)
    assert ended.out.startswith("10 most suspicious rows, as many as asked for. 2 (10 of ")
    rows = table(tmp_path / "out/suspects.csv")
    assert [line["removed"] for line in rows] == ["yes"] * 10 + ["no"] * (N - 10)
    assert poison[[int(line["file"].removeprefix("row ")) for line in rows[:10]]].all()
    with storage.open_(tmp_path / "out/kept.h5", "kept_rows") as file:
        assert len(file["rows"]) == N - 10 and file.attrs["n"] == N


def test_a_defense_that_only_ranks(audit, tmp_path):
    path = save(tmp_path / "features.npz", dump()[0])
    ended = audit(path, "--defense", "spectral_signature")
    assert "Ranked, not judged" in ended.out and "give a budget by hand" in ended.out
    ended = audit(path, "--defense", "spectral_signature", "--budget", 50)
    assert ended.status == 0 and json.loads((tmp_path / "out/summary.json").read_text())["removed"] == 50


def test_a_defense_that_needs_the_fraction(audit, tmp_path):
    path = save(tmp_path / "features.npz", dump()[0])
    (tmp_path / "needy.py").write_text(
        "class BackdoorDefense:\n    def fit(self, features, labels, poison_fraction): assert poison_fraction == 0.08\n"
        "    def score_samples(self, features, logits): return features[:, 0]\n"
    )
    ended = audit(path, "--defense", tmp_path / "needy.py")
    assert ended.status == 1 and "the fraction is not known here" in ended.err and ended.err.count("\n") == 1
    assert audit(path, "--defense", tmp_path / "needy.py", "--poison-fraction", 0.08).status == 0


def test_a_model_that_learnt_too_little(audit, tmp_path):
    """No verdict is shown, whatever the defense says: on such features it takes natural sub-classes for poison."""
    arrays, _ = dump()
    generator = np.random.default_rng(1)
    arrays["logits"][generator.random(N) < 0.6] = np.eye(CLASSES)[0] * 9
    ended = audit(save(tmp_path / "features.npz", arrays))
    assert ended.out.startswith("The model learnt too little to judge by. It gives only ")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["removed"] == 0 and summary["decided_by"] == "nobody" and summary["fit"] < 0.7
    assert {line["removed"] for line in table(tmp_path / "out/suspects.csv")} == {"no"}
    assert "of the same rows, in the same order" in ended.out, "or the logits are of another order"
    assert "train longer" in ended.out and "looks poisoned" not in (tmp_path / "out/report.html").read_text()
    assert "need not have learnt a trigger" in audit(tmp_path / "features.npz", "--budget", 60).out


def test_it_is_said_that_sizes_of_unequal_classes_are_not_looked_at(audit, tmp_path):
    arrays, _ = dump(poisoned=False)
    rows = np.flatnonzero((arrays["labels"] < 2) | (np.arange(N) % 5 < 2))
    path = save(tmp_path / "features.npz", {name: value[rows] for name, value in arrays.items()})
    assert "sizes were not looked at" in audit(path).out
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert "sizes were not looked at" in summary["notes"][0]
    assert "sizes were not looked at" in (tmp_path / "out/report.html").read_text()
    assert "takes clean classes for about equally large" in audit(path, "--defense", "scan").out
    assert "large" not in audit(path, "--defense", "spectral_signature", "--budget", 5).out, "it knows nothing of sizes"


def test_without_class_sizes_the_list_may_be_a_part(audit, tmp_path):
    path = save(tmp_path / "features.npz", dump()[0])
    found = audit(path, "--option", "use_class_sizes=false", "--budget", 20).out
    assert "Class sizes were not looked at. The rows named can be a part of the poison" in found
    nothing = audit(path, "--option", "use_class_sizes=false", "--budget", 0).out
    assert "Class sizes were not looked at.\n" in nothing and "can be a part" not in nothing
    assert "can be a part of the poison" not in audit(path).out


def test_a_suspected_class_that_is_large_is_pointed_out(audit, tmp_path):
    """Poison swells a class, and so does nature: one that is suspected says how large it is and what to try."""
    arrays, poison = dump()
    kept = (arrays["labels"] == TARGET) | (np.arange(N) // CLASSES % 3 == 0)  # of the others a third
    path = save(tmp_path / "features.npz", {name: value[kept] for name, value in arrays.items()})
    ended = audit(path)
    assert "1 class looks poisoned" in ended.out
    assert re.search(
        r"Class 2 has \d+ rows, [45]\.\d times the median class.*--option use_class_sizes=false", ended.out
    )
    assert "times the median" not in audit(path, "--option", "use_class_sizes=false").out


def test_few_classes_are_pointed_out(audit, tmp_path):
    arrays, _ = dump(poisoned=False)
    path = save(tmp_path / "six.npz", arrays)
    assert "judge by the pictures" not in audit(path).out
    few = {name: value[arrays["labels"] < 3] for name, value in arrays.items()}
    path = save(tmp_path / "three.npz", few | {"logits": few["logits"][:, :3]})
    ended = audit(path)
    assert ended.out.startswith("Nothing looks poisoned, as far as 3 classes tell.")
    assert "There are 3 classes to compare with one another" in ended.out
    assert "judge by the pictures" in (tmp_path / "out/report.html").read_text()
    assert "judge by the pictures" in audit(path, "--budget", 5).out  # the order may be wrong too


def test_classes_that_are_too_small_are_not_called_clean(audit, tmp_path):
    generator = np.random.default_rng(0)
    labels = np.arange(140) % 20
    arrays = {"features": generator.normal(size=(140, 8)), "logits": np.eye(20)[labels], "labels": labels}
    ended = audit(save(tmp_path / "small.npz", arrays))
    assert ended.out.startswith("Too few rows to judge by.") and "Nothing looks poisoned" not in ended.out
    assert "Nothing looks poisoned" not in (tmp_path / "out/report.html").read_text()


def test_an_emptied_class_is_pointed_out(audit, tmp_path):
    arrays, _ = dump(poisoned=False)
    rows = np.r_[np.flatnonzero(arrays["labels"] != 1), np.flatnonzero(arrays["labels"] == 1)[:3]]
    arrays = {name: value[rows] for name, value in arrays.items()}
    (tmp_path / "ones.py").write_text(
        "class BackdoorDefense:\n"
        "    RELIES_ON = ()\n"
        "    def fit(self, features, labels, poison_fraction, **kwargs):\n"
        "        self.labels = labels\n"
        "    def score_samples(self, features, logits):\n"
        "        return (self.labels == 1) * 1.0\n"
    )
    path = save(tmp_path / "few.npz", arrays | {"classes": np.array([f"c{i}" for i in range(CLASSES)])})
    assert "No row is kept of 1 class (c1)" in audit(path, "--defense", tmp_path / "ones.py", "--budget", 3).out
    assert "No row is kept" not in audit(path, "--defense", tmp_path / "ones.py", "--budget", 2).out


@pytest.mark.parametrize(
    ("splits", "fraction", "held_out"),
    [(["train"], 0.25, 6), (["train"], None, 0), (["train", "test"], 0.25, 0), ([""], 0.25, 6)],
)
def test_held_out_images_are_not_among_the_kept(audit, tmp_path, splits, fraction, held_out):
    """They are not judged, so that a cleaned copy is without them: said, or nobody would know."""
    for split in splits:
        for name in ("ant", "bee"):
            (tmp_path / "own" / split / name).mkdir(parents=True)
            for i in range(12):
                Image.new("RGB", (9, 9), (i, len(split), len(name))).save(tmp_path / "own" / split / name / f"{i}.png")
    spec = params.Data("folder", path=str(tmp_path / "own"), image_size=32, test_fraction=fraction)
    own_data.write(spec, tmp_path / "own", tmp_path / "data.h5")
    source = pictures.FromDataset(tmp_path / "data.h5")
    n = len(source.labels)
    made = {"features": np.random.default_rng(0).normal(size=(n, 4)), "logits": np.eye(2)[source.labels]}
    ended = audit(save(tmp_path / "features.npz", made | {"labels": source.labels}), "--data", tmp_path / "data.h5")
    assert ended.status == 0, ended.err
    assert f"{held_out} images were held out as test images" in ended.out if held_out else "held out" not in ended.out
    assert len((tmp_path / "out/kept.txt").read_text().splitlines()) == n == 24 - held_out


# The lists


def test_lists(audit, tmp_path):
    arrays, _ = dump(
        files=[f"photos/{row}.jpg" for row in range(N)], classes=["ant", "bee", "=cat", "dog", "eel", "fox"]
    )
    assert audit(save(tmp_path / "features.h5", arrays)).status == 0
    rows = table(tmp_path / "out/suspects.csv")
    assert list(rows[0]) == ["file", "label", "predicted", "score", "rank", "removed"]
    assert [int(line["rank"]) for line in rows] == list(range(1, N + 1))
    scores = [float(line["score"]) for line in rows]
    assert scores == sorted(scores, reverse=True)
    names = ["ant", "bee", "'=cat", "dog", "eel", "fox"]
    for line in rows:
        row = int(line["file"].removeprefix("photos/").removesuffix(".jpg"))
        assert line["label"] == names[arrays["labels"][row]]
        assert line["predicted"] == names[arrays["logits"][row].argmax()]
    kept = (tmp_path / "out/kept.txt").read_text().splitlines()
    assert kept == sorted((line["file"] for line in rows if line["removed"] == "no"), key=lambda f: int(f[7:-4]))


def test_names_with_more_digits_than_a_number_may_have(tmp_path):
    names = [f"{'1' * 5000}.png", "a10.png", "a9.png", "a009.png", f"{'9' * 4999}.png"]
    suspects.write_kept(tmp_path / "kept.txt", names, np.ones(5, bool))
    assert (tmp_path / "kept.txt").read_text().split() == [names[4], names[0], "a9.png", "a009.png", "a10.png"]


def test_a_suspected_class_without_rows_is_refused(audit, tmp_path):
    (tmp_path / "odd.py").write_text(
        "class BackdoorDefense:\n"
        "    RELIES_ON = ()\n"
        "    def fit(self, features, labels, poison_fraction, **kwargs): return self\n"
        "    def score_samples(self, features, logits):\n"
        "        self.n_suspected_, self.suspected_classes_ = 1, [5]\n"
        "        return features[:, 0].astype(float)\n"
    )
    arrays, _ = dump()
    path = save(tmp_path / "mine.npz", {name: values[arrays["labels"] < 5] for name, values in arrays.items()})
    ended = audit(path, "--defense", tmp_path / "odd.py")
    assert ended.status == 1 and "suspects class 5, which has no rows" in ended.err and ended.err.count("\n") == 1


@pytest.mark.parametrize("name", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "'=1+1"])
def test_no_cell_is_a_formula(tmp_path, name):
    suspects.write_csv(tmp_path / "s.csv", [name], [name], [name], np.zeros(1), np.zeros(1, bool))
    line = table(tmp_path / "s.csv")[0]
    assert line["file"] == line["label"] == line["predicted"] == f"'{name}"


def test_numbers_are_no_formulas(tmp_path):
    suspects.write_csv(tmp_path / "s.csv", ["row 0"], ["-1"], ["+2.5"], np.zeros(1), np.zeros(1, bool))
    assert [table(tmp_path / "s.csv")[0][name] for name in ("label", "predicted")] == ["-1", "+2.5"]


def test_commas_and_quotes_survive(tmp_path):
    name = 'a,"b";c.png'
    suspects.write_csv(tmp_path / "s.csv", [name], ["x"], ["x"], np.zeros(1), np.zeros(1, bool))
    assert table(tmp_path / "s.csv")[0]["file"] == name


def test_a_second_run_gives_the_same_bytes(audit, tmp_path):
    path = save(tmp_path / "features.npz", dump()[0])
    found = []
    for _ in range(2):
        assert audit(path).status == 0
        found.append({file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()})
    assert found[0] == found[1] and len(found[0]) == 5


# The page


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def images_of(page):
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].removeprefix("data:image/png;base64,")))))
        for image in Elements(page).of("img")
    ]


def test_page_with_pictures(audit, tmp_path):
    """Suspects carry a white corner: it is in their thumbnails, and alone in the average difference."""
    (tmp_path / "own/train").mkdir(parents=True)
    arrays, poison = dump()
    generator = np.random.default_rng(1)
    files = []
    for row in range(N):
        image = generator.integers(0, 200, (32, 32, 3), np.uint8)
        if poison[row]:
            image[-6:, -6:] = 255
        files.append(f"train/{row}.png")
        Image.fromarray(image).save(tmp_path / "own" / files[-1], compress_level=0)
    path = save(tmp_path / "features.npz", arrays | {"files": np.array(files)})
    ended = audit(path, "--images", tmp_path / "own")
    assert ended.status == 0, ended.err
    page = (tmp_path / "out/report.html").read_text()
    found = images_of(page)
    difference, shown = found[2], found[3:]
    assert len(shown) == 48 + 24 and difference.shape == (96, 96)
    assert difference[-16:, -16:].mean() > 200 and difference[:76, :76].max() < 100
    white = [image[-10:, -10:].min() > 240 for image in shown]
    assert np.mean(white[:48]) > 0.97 and np.mean(white[48:]) < 0.05


def test_page_is_self_contained_and_escaped(audit, tmp_path):
    evil = '<script>alert(1)</script>"onmouseover="x'
    arrays, _ = dump(files=[f"{evil}{row}" for row in range(N)], classes=[f"{evil}<b>{c}" for c in range(CLASSES)])
    assert audit(save(tmp_path / "features.h5", arrays)).status == 0
    page = (tmp_path / "out/report.html").read_text()
    elements = Elements(page)
    assert not elements.of("script") and not elements.of("link") and not elements.of("iframe")
    assert not any(key.startswith("on") or (key in ("src", "href") and not value.startswith("data:"))
                   for _, attributes in elements.found for key, value in attributes.items())  # fmt: skip
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page and 'onmouseover="x' not in page
    assert "default-src 'none'" in page and "prefers-color-scheme:dark" in page
    assert any(attributes.get("title", "").startswith(evil) for attributes in elements.of("figure")), "shown as text"


def test_pictures_come_from_the_folder_alone(tmp_path):
    (tmp_path / "own").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "own/good.png")
    (tmp_path / "own/broken.png").write_bytes(b"x")
    (tmp_path / "own/link.png").symlink_to(tmp_path / "secret.png")
    names = [
        "good.png",
        "../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "broken.png",
        "missing.png",
        "x" * 999,
    ]
    source = pictures.FromFolder(tmp_path / "own", names)
    assert list(source.get(np.arange(len(names)))) == [0]


def test_typical_rows():
    features = np.concatenate([np.zeros((10, 2)), np.full((10, 2), 0.1), np.full((5, 2), 9.0)])
    found = pictures.typical_rows(features, np.arange(25)[::-1], 6)
    assert len(found) == 6 and found.max() < 20 and len(set(found.tolist())) == 6
    assert pictures.typical_rows(features, np.arange(3), 6).tolist() == [0, 1, 2]
    assert len(pictures.typical_rows(features, np.arange(0), 6)) == 0


def test_the_page_of_a_class_with_equal_scores_or_one_row():
    summary = {
        "defense": "d",
        "options": {},
        "rows": 1,
        "classes": 1,
        "classes_compared": 1,
        "fit": 1.0,
        "removed": 0,
        "decided_by": "defense",
        "suspected": [],
    }
    section = audit_page.Section("c", np.zeros(1), np.zeros(1, bool), [audit_page.Card("n", ["#1"], None)], [])
    page = audit_page.Page(summary, [], ["a: <b>"], [section]).html()
    assert "no picture" in page and "a: &lt;b&gt;" in page and "nan" not in page


# Features from elsewhere: refused


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": np.ones((N, 4))}, "features are the same in every row; were they read from the right layer?"),
        ({"features": None}, "holds no features"),
        ({"logits": None}, "holds no logits"),
        ({"labels": None}, "holds no labels"),
        ({"labels": np.zeros(N - 1, int)}, f"features has {N:,}, logits has {N:,}, labels has {N - 1:,} rows"),
        ({"features": np.zeros((N, 4, 4), np.float32)}, "features has shape"),
        ({"labels": np.zeros(N, np.float32)}, "labels has shape"),
        ({"labels": np.full(N, CLASSES)}, "labels[0] is 6, but the logits have 6 columns"),
        ({"labels": np.full(N, -1)}, "labels[0] is -1"),
        ({"labels": np.arange(N), "logits": np.zeros((N, N), np.float32)}, "1,500 classes with 1,500 images"),
        ({"files": ["a"] * (N - 1)}, f"files has {N - 1:,} rows"),
        ({"files": ["a\nb"] * N}, "holds control characters"),
        ({"files": [f"{row // 2}.png" for row in range(N)]}, "files names '0.png' 2 times"),
        ({"classes": ["a"] * 3}, "classes has shape (3,); expected (6,)"),
    ],
)
def test_refused_features(audit, tmp_path, suffix, changes, words):
    path = save(tmp_path / f"mine{suffix}", dump(**changes)[0])
    ended = audit(path)
    assert ended.status == 1 and words in ended.err and f"mine{suffix}" in ended.err
    assert ended.err.count("\n") == 1 and not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["features", "logits"])
def test_nan_is_named(audit, tmp_path, name, value):
    arrays, _ = dump()
    arrays[name][17, 3] = value
    ended = audit(save(tmp_path / "mine.npz", arrays))
    assert ended.status == 1 and f"{name} hold NaN or infinity" in ended.err and "row 17" in ended.err
    assert "mine.npz" in ended.err and ended.err.count("\n") == 1


def test_nothing_is_unpickled(audit, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    arrays, _ = dump()
    np.savez(tmp_path / "mine.npz", **arrays | {"files": np.array([Bomb()] * N, object)})
    ended = audit(tmp_path / "mine.npz")
    assert ended.status == 1 and "files holds pickled Python objects, which are never loaded" in ended.err
    assert not (tmp_path / "exploded").exists()


def test_files_that_are_no_features(audit, tmp_path):
    assert "no file" in audit(tmp_path / "missing.npz").err
    assert "is a folder" in audit(tmp_path).err
    (tmp_path / "text").write_text("x")
    assert "neither HDF5 nor .npz" in audit(tmp_path / "text").err
    for suffix in (".npz", ".h5"):
        path = save(tmp_path / f"cut{suffix}", dump()[0])
        path.write_bytes(path.read_bytes()[:3000])
        ended = audit(path)
        assert "perhaps cut short" in ended.err and ended.err.count("\n") == 1


def test_links_to_other_files_are_not_followed(audit, tmp_path):
    arrays, _ = dump()
    write_h5(tmp_path / "other.h5", arrays)
    with h5py.File(tmp_path / "mine.h5", "w") as file:
        file["logits"], file["labels"] = arrays["logits"], arrays["labels"]
        file["features"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "features")
    assert "features is a link or lies in another file" in audit(tmp_path / "mine.h5").err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--budget", N), f"remove {N} of {N} rows"),
        (("--budget", -1), "--budget is -1"),
        (("--poison-fraction", 0.7), "--poison-fraction is 0.7"),
        (("--defense", "nonesuch"), "nonesuch"),
        (("--copy-to", "clean"), "need --images"),
        (("--images", "."), "holds no files"),
        (("--images", "nowhere"), "--images nowhere is not there or no folder"),
    ],
)
def test_refused_options(audit, tmp_path, words, message):
    ended = audit(save(tmp_path / "mine.npz", dump()[0]), *words)
    assert ended.status == 1 and message in ended.err and ended.err.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


# From Python, without DVC or files


def snippet_of_the_readme(word):
    """The Python code in the README's section that holds the word."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    section = text[text.index("## Audit your own data") :]
    return next(code for code in re.findall(r"```python\n(.*?)```", section, re.S) if word in code)


def test_from_python():
    arrays, poison = dump()
    names = dict(arrays)
    exec(snippet_of_the_readme("from defenses import load"), names)
    classes, number = names["suspected"]
    assert classes == [TARGET] and abs(number - POISON) <= 0.05 * POISON
    assert poison[np.argsort(-names["scores"])[:POISON]].mean() > 0.95


def test_from_a_notebook_elsewhere(tmp_path):
    """As the README says: the checkout on the path is all; neither its folder nor torch, DVC or an installation."""
    arrays, _ = dump()
    np.savez(tmp_path / "mine.npz", **arrays)
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import numpy as np\n"
        "with np.load('mine.npz') as file:\n    features, logits, labels = (file[k] for k in ('features', 'logits', 'labels'))\n"
        f"{snippet_of_the_readme('from defenses import load')}\n"
        "print(suspected[0], sorted({'torch', 'dvc'} & set(sys.modules)))\n"
    )
    ended = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ended.stdout == f"[{TARGET}] []\n", ended.stderr


def test_features_from_any_module(audit, tmp_path, monkeypatch):
    """Features from any `nn.Module`: the code in the README, run on a small network."""
    import torch

    snippet = snippet_of_the_readme("nn.Module")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    loader = [(torch.randn(20, 3, 4, 4), torch.arange(20) % 3) for _ in range(4)]
    monkeypatch.chdir(tmp_path)
    exec(snippet, {"model": model, "last_layer": model[-1], "loader": loader})
    ended = audit(tmp_path / "features.npz")
    assert ended.status == 0, ended.err
    with np.load(tmp_path / "features.npz") as file:
        assert file["features"].shape == (80, 16) and file["logits"].shape == (80, 3)
        expected = model[:3](loader[0][0]).detach().numpy()
        np.testing.assert_allclose(file["features"][:20], expected, rtol=1e-5)


# The cleaned copy


@pytest.fixture
def source(tmp_path):
    for name in ("train/a/1.png", "train/a/2.png", "train/b/grün =1.png"):
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text(name)
    return tmp_path / "own"


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("link", [False, True])
def test_kept_copy(source, tmp_path, command, link):
    before = files_in(source)
    kept = tmp_path / "kept.txt"
    kept.write_text("train/a/2.png\ntrain/b/grün =1.png\n")
    option = "--link-to" if link else "--copy-to"
    ended = command("analysis.kept_copy", kept, "--source", source, option, tmp_path / "clean/er")
    assert ended.status == 0 and ended.out == f"2 files {'linked' if link else 'copied'} to {tmp_path}/clean/er\n"
    found = files_in(tmp_path / "clean/er")
    assert found == {name: before[name] for name in ("train/a/2.png", "train/b/grün =1.png")}
    assert files_in(source) == before
    assert (tmp_path / "clean/er/train/a/2.png").is_symlink() == link
    if not link:
        (tmp_path / "clean/er/train/a/2.png").write_text("changed")
        assert files_in(source) == before
    ended = command("analysis.kept_copy", kept, "--source", source, option, tmp_path / "clean/er")
    assert ended.status == 1 and "not empty" in ended.err


@pytest.mark.parametrize(
    ("names", "target", "words"),
    [
        (["train/a/3.png"], "clean", "is not there"),
        (["../secret"], "clean", "leads out of"),
        (["/etc/passwd"], "clean", "leads out of"),
        (["train/link"], "clean", "leads out of"),
        (["train/a/1.png", "train/a/2.png", "train/a/1.png"], "clean", "'train/a/1.png' stands 2 times"),
        (["train/a/1.png"], "own/clean", "lies within"),
        (["train/a/1.png"], ".", "not empty"),
        (["train/a/1.png"], "file", "is no folder"),
        (["train/a/1.png"], "own", "not empty"),
    ],
)
def test_refused_copies(source, tmp_path, names, target, words):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "file").write_text("x")
    (source / "train/link").symlink_to(tmp_path / "secret")
    before = files_in(tmp_path)
    with pytest.raises(UserError, match=re.escape(words)):
        kept_copy.make(names, source, tmp_path / target, link=False)
    assert files_in(tmp_path) == before and not list(tmp_path.glob(".*"))


def test_rows_of_an_archive_are_no_files_to_copy(tmp_path):
    np.savez(tmp_path / "set.npz", train_images=np.zeros(1))
    with pytest.raises(UserError, match="names rows of its arrays"):
        kept_copy.make(["train_images[0]"], tmp_path / "set.npz", tmp_path / "clean", link=False)


def test_a_failed_copy_leaves_the_lists_and_says_so(audit, tmp_path, monkeypatch):
    arrays, _ = dump(files=[f"{row}.png" for row in range(N)])
    (tmp_path / "own").mkdir()
    for name in arrays["files"]:
        (tmp_path / "own" / name).write_text("x")

    def full(*args):
        raise OSError(28, "No space left on device", "clean/0.png")

    monkeypatch.setattr(kept_copy.shutil, "copy2", full)
    path = save(tmp_path / "features.npz", arrays)
    ended = audit(path, "--images", tmp_path / "own", "--copy-to", tmp_path / "clean")
    assert ended.status == 1 and "the lists are in out, but no copy was made: No space left" in ended.err
    assert "nothing was written" not in ended.err and (tmp_path / "out/kept.txt").exists()
    assert not (tmp_path / "clean").exists()


def test_a_folder_without_the_files_is_refused(audit, tmp_path):
    path = save(tmp_path / "features.npz", dump(files=[f"{row}.png" for row in range(N)])[0])
    (tmp_path / "other").mkdir()
    ended = audit(path, "--images", tmp_path / "other")
    assert ended.status == 1 and f"none of the {N:,} files, such as 0.png, is in" in ended.err
    assert not (tmp_path / "out/report.html").exists()


def test_audit_and_copy_in_one(audit, tmp_path):
    arrays, _ = dump(files=[f"train/{row % 7}/{row}.png" for row in range(N)])
    for name in arrays["files"]:
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text("x")
    path = save(tmp_path / "features.h5", arrays)
    ended = audit(path, "--images", tmp_path / "own", "--link-to", tmp_path / "clean")
    assert ended.status == 0, ended.err
    kept = (tmp_path / "out/kept.txt").read_text().splitlines()
    assert set(files_in(tmp_path / "clean")) == set(kept) and 0 < len(kept) < N
