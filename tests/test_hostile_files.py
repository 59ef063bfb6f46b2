"""Hostile files: whatever a file holds, a reader gives what is in it or refuses with one line."""

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import os
import pickle
import pickletools
import shlex
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from hostile import ODD_NAMES, TEXTS, VALUES, changed_at, damaged, one_line, read_in_a_fork
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_storage import EXAMPLES

from analysis import feature_dump, kept_copy
from stages import evaluate, train
from stages.lib import (
    checkpoints,
    foreign_hdf5,
    image_folder,
    npz_images,
    own_data,
    params,
    scratch,
    sealed,
    storage,
    triggers,
)
from stages.lib.errors import UserError
from stages.lib.poisoning import open_poisoned
from stages.lib.training import Architecture

linux = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module", autouse=True)
def quick_children():
    """A real child takes 0.4 s to start; `test_foreign_files_that_hang_or_crash` keeps it."""
    with pytest.MonkeyPatch.context() as patch:
        real = foreign_hdf5.check
        patch.setattr(foreign_hdf5, "check", read_in_a_fork)
        yield real


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@contextlib.contextmanager
def refusal_or_right():
    """The block may end in a refusal of one line; what it asserts itself must hold; nothing else may be raised."""
    try:
        yield
    except UserError as error:
        one_line(error)


# params.yaml

PARAMS = {
    "setting": "s", "defense": "d", "seed": 3,
    "filter": {"budget": "fraction", "budget_multiplier": 1.0},
    "audit": {"budget": "auto"},
    "defenses": {"d": {"n": 3, "word": "x"}},
    "settings": {
        "s": {"data": {"source": "digits", "image_size": 16},
              "poison": {"trigger": {"name": "badnets", "patch_size": 3}, "poison_fraction": 0.05, "target_label": 0},
              "model": {"network": "resnet20"},
              "train": {"epochs": 3, "batch_size": 4, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0,
                        "crop_padding": 2, "flip": False}},
        "own": {"data": {"source": "folder", "path": "x"},
                "poison": {"trigger": {"name": "none"}, "poison_fraction": None},
                "model": {"network": "vgg16bn"},
                "train": {"epochs": 3, "batch_size": 4, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0,
                          "crop_padding": 2, "flip": True}},
    },
}  # fmt: skip


def read_params(path):
    """All that the stages read from it, each refused or of the type and range that they rely on."""
    with refusal_or_right():
        values = params.read(path)
        cell = Path("artifacts") / str(values.get("setting", "s")) / f"seed{values.get('seed', 0)}"
        cell /= str(values.get("defense", "d"))
        assert len(cell.parts) == 4 and os.path.normpath(cell) == str(cell)  # nothing leaves its folder
        assert shlex.split(f"python {cell}") == ["python", str(cell)]  # nothing ends a word of the command line
    for name in ("s", "own"):
        with refusal_or_right():
            found = params.setting(path, name)
            recipe = found.train
            assert type(recipe.epochs) is int and 1 <= recipe.epochs <= 100_000 and 1 <= recipe.batch_size <= 1_000_000
            assert type(recipe.lr) is float and 0 < recipe.lr <= 1000 and 0 <= recipe.momentum <= 1
            assert 0 <= recipe.weight_decay <= 1 and 0 <= recipe.crop_padding <= 64 and type(recipe.flip) is bool
            fraction = found.poison.poison_fraction
            assert (fraction is None) == (found.poison.trigger.name == "none") and (
                fraction is None or 0 < fraction <= 0.5
            )
            assert found.data.source in params.SOURCES and found.model.network in params.NETWORKS
            if found.data.path is not None:
                Path(found.data.path).exists()  # a text that the system takes
            json.dumps(dataclasses.asdict(found), allow_nan=False)  # finite, whatever it is
    with refusal_or_right():
        found = params.filter_(path)
        assert found.budget in ("fraction", "auto") or (type(found.budget) is int and found.budget >= 0)
        assert 0 < found.budget_multiplier <= 100
    with refusal_or_right():
        assert all(isinstance(key, str) for key in params.defense_options(path, "d"))


@given(data=st.data())
def test_parameters_of_any_structure(folder, data):
    content = changed_at(data.draw, copy.deepcopy(PARAMS))
    if data.draw(st.booleans()):
        content = changed_at(data.draw, content)
    path = folder / "params.yaml"
    path.write_bytes(yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass"))
    read_params(path)


PIECES = st.sampled_from(
    ["!!int ''", "!!bool x", "!!timestamp x", "!!float ''", "!!binary x", "!!set {a}", "!!omap [a]", "!!pairs [a]", "!!null x",
     "!!python/object/apply:os.system ['touch mark']", "!!python/name:os.system", "!x y", "&a", "*a", "<<: *a", "[", "]", "{",
     "}", ": ", "- ", "? ", "|", ">", "\n", "\n  ", "#", "'", '"', "---\n", "...\n", "%YAML 9.9\n", "%TAG ! x\n", "\t", "\x00",
     "\ufeff", "[" * 2000, "&a [" + "*a," * 9 + "]", "0x" + "f" * 5000, "9" * 5000, "1:1:1:1:1:1:1:1", "1e999", ".nan", ".inf",
     "2001-99-99", "~", "on", "0o17", "1_000", "=", "<<", '"\\ud800"', "\u0663e\u0665", "1e-5", "seed: 4\n", "settings: {}\n"]
)  # fmt: skip


@given(pieces=st.lists(PIECES, min_size=1, max_size=4), place=st.integers(0, 2000), wild=st.binary(max_size=4))
def test_parameters_of_any_text(folder, pieces, place, wild):
    text = yaml.safe_dump(PARAMS)
    place %= len(text)
    path = folder / "params.yaml"
    path.write_bytes(
        text[:place].encode() + "".join(pieces).encode("utf-8", "surrogatepass") + wild + text[place:].encode()
    )
    read_params(path)
    assert not Path("mark").exists()


@given(data=st.data())
def test_names_in_parameters_stay_in_the_project(folder, data):
    """Settings, defenses and seeds are parts of paths and words of the commands in dvc.yaml."""
    name = data.draw(TEXTS)
    content = copy.deepcopy(PARAMS) | {data.draw(st.sampled_from(["setting", "defense", "seed"])): name}
    content["settings"][name], content["defenses"][name] = content["settings"]["s"], {}
    path = folder / "params.yaml"
    path.write_bytes(yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass"))
    read_params(path)
    with refusal_or_right():
        params.setting(path, name)
        assert name.replace("-", "").replace("_", "").isalnum() and name.isascii()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("settings: {}\nsettings: {}\ndefenses: {}", "'settings' stands twice"),
        ("defenses: &a {x: *a}\nsettings: {}", "too many values, or one within itself"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
            f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in itertools.pairwise("abcdefgh")),
         "too many values"),
        ("seed: 0x" + "f" * 5000, "more than 64 bits"),
        ("seed: !!int ''", "not valid YAML"),
        ("settings: {}\ndefenses: {}\nsetting: ../x", "setting: '../x' cannot name a folder"),
        ("settings: {}\ndefenses: {}\ndefense: 'x; rm -r y'", "defense: 'x; rm -r y' cannot name a folder"),
        ("settings: {}\ndefenses: {scan: {}}\ndefense: scna", "defense 'scna' has no line in"),
        ("settings: {}\ndefenses: {}\nseed: ../x", "seed is '../x'"),
    ],
)  # fmt: skip
def test_refused_parameters(tmp_path, refuses, text, words):
    (tmp_path / "params.yaml").write_text(text)
    with refuses("params.yaml", words):
        params.read(tmp_path / "params.yaml")


def test_aliases_and_merges_are_read():
    assert params.load_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}\ne: *x") == {
        "a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}, "e": {"b": 1, "c": 2},
    }  # fmt: skip


# The HDF5 files between the stages: damaged


def content_of(file) -> dict:
    found = {}
    file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found | {f"@{name}": value for name, value in file.attrs.items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[k], other[k], equal_nan=_is_float(one[k])) for k in one
    )


def _is_float(value) -> bool:
    return isinstance(value, float | np.ndarray) and np.asarray(value).dtype.kind == "f"


@linux
@pytest.mark.parametrize("kind", sorted(EXAMPLES))
@given(data=st.data())
def test_a_damaged_file_is_refused(folder, kind, data):
    """A flip anywhere is noticed: what opens has the content that was written."""
    path = folder / f"{kind}.h5"
    storage.write(path, kind, *EXAMPLES[kind])
    with storage.open_(path, kind) as file:
        right = content_of(file)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    with refusal_or_right(), storage.open_(path, kind) as file:
        assert same(content_of(file), right)


# The HDF5 files between the stages: forged, with a seal

DTYPES = st.sampled_from(
    ["u1", "i1", "i8", "u8", "f2", "f4", "f8", "c8", "S1", "S9", "V3", "?", ">i8", ">f4", h5py.string_dtype(),
     h5py.vlen_dtype(np.int32), h5py.ref_dtype, [("a", "i8"), ("b", "f4")], h5py.enum_dtype({"A": 1}, "i8")]
)  # fmt: skip
SHAPES = st.one_of(st.just(()), st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple))
HUGE = st.sampled_from([(10**12,), (10**9, 64), (2**40, 2**10), (10**6, 32, 32, 3), (3, 10**9)])


def forge(draw, file, arrays, name) -> None:
    """Put something else in the place of a data set."""
    before = np.asarray(arrays.get(name, np.zeros(3)))
    if before.dtype.kind == "U":
        before = before.astype("S")
    if file.get(name, getlink=True) is not None:
        del file[name]
    how = draw(st.sampled_from(["values", "values", "values", "shape", "type", "soft", "external", "raw", "huge", "group", "none",
                                "empty", "virtual"]))  # fmt: skip
    if how == "values":
        changed = np.array(before)
        for _ in range(draw(st.integers(1, 3))):
            value = draw(
                st.one_of(st.integers(-3, 5), st.sampled_from([np.nan, np.inf, -np.inf, 2**62, -(2**62), 255, 1e300]))
            )
            with np.errstate(all="ignore"), contextlib.suppress(OverflowError, ValueError):
                if changed.size:
                    changed.flat[draw(st.integers(0, changed.size - 1))] = value
        file[name] = changed
    elif how == "shape":
        file.create_dataset(name, data=np.resize(before, draw(SHAPES)).astype(before.dtype))
    elif how == "type":
        with contextlib.suppress(TypeError, ValueError):  # h5py makes no such
            file.create_dataset(name, before.shape, draw(DTYPES))
    elif how == "soft":
        file[name] = h5py.SoftLink(draw(st.sampled_from(["/nothing", "/", name, "/train", "."])))
    elif how == "external":
        file[name] = h5py.ExternalLink(draw(st.sampled_from(["/etc/passwd", "nothing.h5", "other.h5"])), "/x")
    elif how == "raw":
        with contextlib.suppress(TypeError, ValueError):
            file.create_dataset(name, before.shape, before.dtype, external=[("/etc/passwd", 0, max(before.nbytes, 1))])
    elif how == "huge":
        chunks = draw(st.sampled_from([None, True]))
        file.create_dataset(name, draw(HUGE), before.dtype, chunks=chunks)
    elif how == "group":
        file.create_group(name)
    elif how == "empty":
        file[name] = h5py.Empty(before.dtype)
    elif how == "virtual":
        layout = h5py.VirtualLayout(before.shape, before.dtype)
        if before.shape:
            layout[...] = h5py.VirtualSource("other.h5", "x", shape=before.shape)
        file.create_virtual_dataset(name, layout)


ATTRIBUTES = st.one_of(
    st.integers(-5, 5), st.floats(), st.text(max_size=5).filter(lambda text: "\0" not in text and text.isprintable()),
    st.sampled_from([np.zeros(3), np.zeros(0), np.array([[1.0]]), np.float32(0.3), np.bytes_(b"x"), h5py.Empty("f8"), 2**63 - 1,
                     "[]", "{}", "[" * 3000, '["a"]', '["a", "b", "a"]', "[null]", '[{"name": "badnets", "size": -3}]',
                     '[{"name": "wanet"}]', '[{"name": "blend", "alpha": NaN}]', '[{"name": "badnets", "size": 1e9}]', True]),
)  # fmt: skip


@functools.cache
def whole(path, kind) -> bytes:
    storage.write(path, kind, *EXAMPLES[kind])
    return path.read_bytes()


@st.composite
def forged(draw, path, kind):
    """A sealed file of the kind in which one or two things are not what they should be."""
    arrays, attributes = EXAMPLES[kind]
    path.write_bytes(whole(path, kind))
    with h5py.File(path, "r+") as file:
        for _ in range(draw(st.integers(1, 2))):
            if draw(st.integers(0, 2)):
                forge(draw, file, arrays, draw(st.sampled_from(sorted(arrays))))
            else:
                known = [
                    *attributes,
                    "kind",
                    "schema_version",
                    "n_suspected",
                    "suspected_classes",
                    "relies_on",
                    "checkpoint",
                ]
                name, value = draw(st.sampled_from(known)), draw(ATTRIBUTES)
                with contextlib.suppress(TypeError, ValueError):
                    file.attrs[name] = value
    sealed.seal(path)
    return path


@linux
@pytest.mark.parametrize("kind", sorted(EXAMPLES))
@given(data=st.data())
def test_a_forged_file_is_refused_or_makes_sense(folder, kind, data):
    path = data.draw(forged(folder / f"{kind}.h5", kind))
    with refusal_or_right(), storage.open_(path, kind) as file:
        for name, (dtype, ndim) in storage.SCHEMAS[kind][1].items():
            assert file[name].ndim == ndim and file[name].dtype.kind == np.dtype(dtype).kind
            assert isinstance(file.get(name, getlink=True), h5py.HardLink) and not file[name].external
            assert len(file[name]) < 10**7  # no declared shape without data
        if kind == "kept_rows":
            rows = file["rows"][:]
            assert (np.diff(rows) > 0).all() and (rows >= 0).all() and (rows < file.attrs["n"]).all()
        elif kind == "scores":
            assert np.isfinite(file["scores"][:]).all()
        elif kind == "poison_index":
            assert len(set(file["rows"][:].tolist())) == len(file["rows"]) and set(file["role"][:]) <= {1, 2}


COMMANDS = {
    "scores": ("filter", "--scores"),
    "features": ("score", "--defense", "random_filter", "--features"),
    "dataset": ("poison", "--setting", "tiny", "--seed", 1, "--data"),
}


@linux
@pytest.mark.parametrize("kind", sorted(COMMANDS))
@given(data=st.data())
def test_a_stage_gives_a_result_or_one_line(folder, command, write_params, kind, data):
    """As a command, on a forged file or on a damaged one."""
    path = folder / f"{kind}.h5"
    write_params(folder / "params.yaml", tiny={"poison": {"target_label": 0, "poison_fraction": 0.4}})
    if data.draw(st.booleans()):
        data.draw(forged(path, kind))
    else:
        path.write_bytes(data.draw(damaged(whole(path, kind))))
    out = folder / "out.h5"
    out.unlink(missing_ok=True)
    before = set(folder.iterdir())
    ended = command(*COMMANDS[kind], path, "--params", folder / "params.yaml", "--out", out)
    assert "Traceback" not in ended.err
    if ended.status:
        assert ended.err.count("\n") == 1 and set(folder.iterdir()) == before
    else:
        storage.open_(
            out, {"filter": "kept_rows", "score": "scores", "poison": "poison_index"}[COMMANDS[kind][0]]
        ).close()


@linux
@given(data=st.data())
def test_kept_rows_and_index_in_use(folder, data):
    """What training reads of them: rows of the data set, each once; images and labels of it."""
    dataset, index, kept = folder / "d.h5", folder / "i.h5", folder / "k.h5"
    storage.write(dataset, "dataset", *EXAMPLES["dataset"])
    arrays, attributes = EXAMPLES["poison_index"]
    arrays = arrays | {"labels_before": np.array([1, 0]), "labels_after": np.array([0, 0])}
    attributes = attributes | {"data": storage.digest(dataset), "triggers": '[{"name": "badnets", "size": 2}]'}
    storage.write(index, "poison_index", arrays, attributes)
    poisoned = open_poisoned(dataset, index)
    storage.write(kept, "kept_rows", EXAMPLES["kept_rows"][0], {"n": 3, "index": storage.digest(index)})
    assert train.choose_rows(str(kept), poisoned, storage.digest(index)).tolist() == [0, 2]

    target = data.draw(st.sampled_from([dataset, index, kept]))
    kind = {dataset: "dataset", index: "poison_index", kept: "kept_rows"}[target]
    with h5py.File(target, "r+") as file:
        if data.draw(st.booleans()):
            forge(data.draw, file, EXAMPLES[kind][0], data.draw(st.sampled_from(sorted(EXAMPLES[kind][0]))))
        else:
            with contextlib.suppress(TypeError, ValueError):
                file.attrs[data.draw(st.sampled_from(sorted(EXAMPLES[kind][1])))] = data.draw(ATTRIBUTES)
    sealed.seal(target)
    if target == dataset:  # and an index that says it was made from it
        storage.write(index, "poison_index", arrays, attributes | {"data": storage.digest(dataset)})
    with refusal_or_right():
        poisoned = open_poisoned(dataset, index)
        rows = train.choose_rows(str(kept), poisoned, storage.digest(index))
        assert len(set(rows.tolist())) == len(rows) and (rows >= 0).all() and (rows < 3).all()
        images = poisoned.train()
        assert len(images.images) == len(images.labels) == 3 and 0 <= images.labels.min() <= images.labels.max() < 2
        assert images.images.shape[1:3] == (poisoned.image_size, poisoned.image_size)
        for stamped, wanted in poisoned.triggered_tests():
            assert len(stamped.images) == len(wanted)


@given(data=st.data())
def test_a_damaged_reference_is_refused(folder, data):
    model = {"clean_acc": 0.9, "asr": 0.1, "target_clean_acc": 0.8, "history": [{"epoch": 0, "lr": 0.1, "loss": 1.0,
             "accuracy": 0.5}]}  # fmt: skip
    content = {"index": "i", "undefended": model, "oracle": model | {"defense_score": 0.9}}
    path = folder / "reference.json"
    path.write_text(json.dumps(content))
    assert evaluate.read_reference(path, True) == content
    path.write_text(json.dumps(changed_at(data.draw, content)))
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    with refusal_or_right():
        found = evaluate.read_reference(path, True)
        assert 0 * sum(found[name][key] for name in ("undefended", "oracle") for key in ("clean_acc", "asr")) == 0


# Features from elsewhere


def a_dump(rows=30):
    generator = np.random.default_rng(0)
    return {
        "features": generator.normal(size=(rows, 4)).astype(np.float32),
        "logits": generator.normal(size=(rows, 3)).astype(np.float32),
        "labels": np.arange(rows) % 3,
        "files": np.array([f"train/{row % 3}/{row}.png" for row in range(rows)]),
    }


def write_h5(path, arrays, **options):
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            if name == "files":
                file.create_dataset(name, data=value.tolist(), dtype=h5py.string_dtype())
            else:
                file.create_dataset(name, data=value, **options)
    return path


def check_dump(path):
    with refusal_or_right(), feature_dump.open_dump(path) as found:
        features, logits = np.asarray(found.features[:]), np.asarray(found.logits[:])
        assert features.ndim == logits.ndim == 2 and len(features) == len(logits) == len(found.labels)
        assert found.labels.min() >= 0 and found.labels.max() < logits.shape[1]
        for text in found.files or []:
            text.encode()  # can be written to a list
            assert "\n" not in text
        return features, logits, found.labels, found.files


@linux
@given(data=st.data(), chunked=st.booleans())
def test_foreign_hdf5_damaged(folder, data, chunked):
    """Without a seal a flipped value cannot be told; nothing hangs, crashes or ends in a traceback."""
    options = {"chunks": (8, 2), "compression": "gzip", "fletcher32": True} if chunked else {}
    arrays = a_dump()
    path = write_h5(folder / "foreign.h5", {k: v for k, v in arrays.items() if k != "labels"}, **options)
    with h5py.File(path, "a") as file:
        file["labels"] = arrays["labels"]
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    check_dump(path)


@linux
@given(data=st.data())
def test_foreign_hdf5_forged(folder, data):
    path = write_h5(folder / "foreign.h5", a_dump())
    with h5py.File(path, "r+") as file:
        forge(
            data.draw, file, a_dump(), data.draw(st.sampled_from(["features", "logits", "labels", "files", "classes"]))
        )
    found = check_dump(path)
    if found:
        assert len(found[2]) == 30


@given(data=st.data(), compressed=st.booleans())
def test_foreign_npz_damaged(folder, data, compressed):
    """zip keeps a checksum of each array: what opens is what was stored."""
    arrays, path = a_dump(), folder / "foreign.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    found = check_dump(path)
    if found:
        for name, values in zip(("features", "logits", "labels"), found, strict=False):
            np.testing.assert_array_equal(values, arrays[name])
        assert found[3] in (None, arrays["files"].tolist())  # without the member's name it is not looked for


class Attack:
    """Leaves a mark when it is unpickled."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def npy(draw, array, mark) -> bytes:
    """A .npy whose header may lie, or something else."""
    buffer = io.BytesIO()
    how = draw(st.sampled_from(["right", "right", "lying", "pickled", "header", "bytes", "values", "fortran"]))
    if how == "pickled":
        objects = np.empty(len(array), object)
        objects[:] = [Attack(Path.touch, mark)] * len(array)
        np.save(buffer, objects)
        return buffer.getvalue()
    if how == "values":
        array = np.array(array)
        if array.dtype.kind in "iuf" and array.size:
            with np.errstate(all="ignore"):
                array.flat[0] = draw(st.sampled_from([-1, 3, 255, 2**31])) % 256 if array.dtype == np.uint8 else -1
    if how == "fortran":
        array = np.asfortranarray(array)
    np.save(buffer, array)
    content = buffer.getvalue()
    if how == "lying":
        shape = draw(st.sampled_from(["(10**12,)", "(2**40, 2**40)", "(-1,)", "(30, -4)", "(0,)", "()", "(3.5,)", "(True,)",
                                      "(31,)",
                                      "(99999999999999999999,)", "(30, 4, 0)"]))  # fmt: skip
        shape = str(eval(shape))  # a literal, as the header wants it
        dtype = draw(st.sampled_from(["<f4", "<i8", "|u1", "|O", "<U9", "|V0", "|S0", "<M8[s]", "x", "<f16"]))
        header = (
            repr({"descr": dtype, "fortran_order": draw(st.booleans()), "shape": "S"}).replace("'S'", shape).encode()
        )
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + content[128:]
    if how == "header":
        return draw(damaged(content[:128])) + content[128:]
    return draw(st.binary(max_size=200)) if how == "bytes" else content


def write_zip(draw, path, arrays, mark) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            if not draw(st.integers(0, 9)):
                continue
            method = draw(
                st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
            )
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), npy(draw, array, mark), method)


@given(data=st.data())
def test_foreign_npz_forged(folder, data):
    path, mark = folder / "forged.npz", folder / "mark"
    write_zip(data.draw, path, a_dump(), mark)
    check_dump(path)
    assert not mark.exists()


def test_foreign_files_that_hang_or_crash(tmp_path, refuses, monkeypatch, quick_children):
    """Through a real child: a heap whose objects have no size makes libhdf5 loop for ever (or be refused, one day)."""
    path = write_h5(tmp_path / "foreign.h5", a_dump())
    quick_children(path, ("features", "files"))
    content = path.read_bytes()
    place = content.index(b"GCOL") + 16 + 8  # the size of the first object
    path.write_bytes(content[:place] + b"\xf8" + b"\xff" * 7 + content[place + 8 :])
    monkeypatch.setattr(foreign_hdf5, "LEAST_SECONDS", 15.0)
    with refuses(path, "not a readable HDF5 file"):
        quick_children(path, ("features", "files"))
    monkeypatch.setattr(foreign_hdf5, "LEAST_SECONDS", 0.01)
    with refuses(path, "still not read after 0 s"):
        quick_children(path, ("features", "files"))


def test_what_unpacks_to_absurd_amounts(tmp_path, refuses, monkeypatch, quick_children):
    """A thousand times its own size is what deflate can do; the limit is lowered from a GB."""
    path, arrays = tmp_path / "bomb", a_dump() | {"labels": np.zeros(1 << 20, np.int64)}
    write_h5(path, {"labels": arrays["labels"]}, chunks=True, compression="gzip")
    foreign_hdf5.read_all(path, ("labels",))
    np.savez_compressed(tmp_path / "bomb.npz", **arrays)
    with refuses("rows; expected one number"):
        feature_dump.open_dump(tmp_path / "bomb.npz")
    monkeypatch.setattr(foreign_hdf5, "BOMB", 1 << 20)
    with pytest.raises(ValueError, match=r"labels unpacks from .* to 8,388,608 bytes"):
        foreign_hdf5.read_all(path, ("labels",))
    monkeypatch.setattr(npz_images, "BOMB", 1 << 20)
    with refuses("labels unpacks from", "to 8,388,608 bytes; store it uncompressed"):
        feature_dump.open_dump(tmp_path / "bomb.npz")


# A user's own images


@functools.cache
def picture_bytes(kind: str) -> bytes:
    buffer, image = io.BytesIO(), Image.fromarray(np.random.default_rng(7).integers(0, 200, (20, 24, 3), np.uint8))
    if kind == "huge":  # a header that declares 60,000 x 60,000 pixels, and nothing behind it
        image.save(buffer, "png")
        header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + buffer.getvalue()[24:29]
        return buffer.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + buffer.getvalue()[33:]
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("x.png", picture_bytes("png"))
        return buffer.getvalue()
    if kind == "eps":
        return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n"
    image.convert("P" if kind == "gif" else "RGB").save(buffer, kind)
    return buffer.getvalue()


FILES = st.tuples(
    st.one_of(st.sampled_from(["a.png", "b.jpg", "c.PNG", "d.gif", "e.tiff", "n.txt"]),
              ODD_NAMES.map(lambda name: f"{name}.png")),
    st.sampled_from(["png", "jpeg", "gif", "webp", "huge", "zip", "eps", "cut", "flipped", "empty", "text", "folder", "pipe",
                     "link in", "link out", "link to nothing", "link to itself", "link to a folder"]),
)  # fmt: skip
SECRET = 255  # no picture of the folder has a channel that bright


@linux
@given(classes=st.lists(st.tuples(TEXTS, st.lists(FILES, max_size=4)), max_size=3), data=st.data())
def test_image_folders(folder, classes, data):
    root, outside, out = folder / "own", folder / "outside", folder / "own.h5"
    shutil.rmtree(root, ignore_errors=True)
    outside.mkdir(exist_ok=True)
    Image.new("RGB", (9, 9), (SECRET,) * 3).save(outside / "secret.png")
    out.unlink(missing_ok=True)
    for name, files in [
        ("cat", [("0.png", "png"), ("1.png", "png")]),
        ("dog", [("0.png", "jpeg"), ("1.png", "gif")]),
        *classes,
    ]:
        where = root / "train" / name
        if name in ("", ".") or "\0" in name or not os.path.abspath(where).startswith(f"{root}/train/"):
            continue
        try:
            where.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError):  # too long for the system, or no text for it
            continue
        for file, kind in files:
            with contextlib.suppress(OSError, ValueError):
                put(data.draw, where / file, kind, outside)
    with refusal_or_right():
        own_data.write(params.Data("folder", path=str(root), image_size=32), root, out)
        with storage.open_(out, "dataset") as file:
            names, labels = [name.decode() for name in file["train/files"][:]], file["train/labels"][:]
            class_names, images = json.loads(file.attrs["class_names"]), file["train/images"][:]
        assert len(set(names)) == len(names) == len(labels) >= 2 and images.max() < SECRET
        for name, label, image in zip(names, labels, images, strict=True):
            assert class_names[label] == Path(name).parts[1] and "\n" not in name
            assert (root / name).resolve().is_relative_to(root.resolve())
            expected = image_folder.read_resized(root / name, 32)[0]
            np.testing.assert_array_equal(image, expected[..., : image.shape[2]])


def put(draw, path, kind, outside) -> None:
    if os.path.lexists(path):
        return
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind.startswith("link"):
        to = {"link in": "../cat/0.png", "link out": outside / "secret.png", "link to nothing": "nothing.png",
              "link to itself": path.name, "link to a folder": outside}[kind]  # fmt: skip
        path.symlink_to(to)
    elif kind in ("cut", "flipped"):
        content = picture_bytes("png")
        path.write_bytes(draw(damaged(content)) if kind == "flipped" else content[: draw(st.integers(0, len(content)))])
    else:
        path.write_bytes({"empty": b"", "text": b"x"}[kind] if kind in ("empty", "text") else picture_bytes(kind))


def test_a_pipe_among_the_images(tmp_path):
    """Opening it would wait for ever."""
    for label, name in itertools.product(("cat", "dog"), range(2)):
        (tmp_path / "own" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / f"own/{label}/{name}.png").write_bytes(picture_bytes("png"))
    os.mkfifo(tmp_path / "own/cat/pipe.png")
    notes = own_data.write(params.Data("folder", image_size=32), tmp_path / "own", tmp_path / "out.h5")
    assert "  cat/pipe.png: not a file, or a link to nothing" in notes
    (tmp_path / "own/owl").mkdir()
    os.mkfifo(tmp_path / "own/owl/pipe.png")
    with pytest.raises(UserError, match="owl holds no images"):
        image_folder.list_images(tmp_path / "own")


def own_arrays():
    generator = np.random.default_rng(0)
    return {
        "train_images": generator.integers(0, 256, (12, 9, 10), np.uint8), "train_labels": np.arange(12) % 3,
        "test_images": generator.integers(0, 256, (6, 9, 10), np.uint8), "test_labels": np.arange(6)[:, None] % 3,
    }  # fmt: skip


@given(data=st.data(), damage=st.booleans(), compressed=st.booleans())
def test_npz_archives(folder, data, damage, compressed):
    path, out, mark, arrays = folder / "own.npz", folder / "npz.h5", folder / "mark", own_arrays()
    out.unlink(missing_ok=True)
    if damage:
        (np.savez_compressed if compressed else np.savez)(path, **arrays)
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    else:
        write_zip(data.draw, path, arrays, mark)
    with refusal_or_right():
        own_data.write(params.Data("npz", path=str(path), image_size=32), path, out)
        with storage.open_(out, "dataset") as file:
            names, labels, images = (file[f"train/{what}"][:] for what in ("files", "labels", "images"))
        assert len(labels) == 12
        for name, label, image in zip(names, labels, images, strict=True) if damage else ():
            row = int(name.decode().removeprefix("train_images[").removesuffix("]"))
            assert label == arrays["train_labels"][row]
            np.testing.assert_array_equal(
                image, image_folder.resized(Image.fromarray(arrays["train_images"][row]), 32)[..., :1]
            )
    assert not mark.exists()


@given(
    names=st.lists(st.one_of(TEXTS, st.sampled_from(["a.png", "sub/b.png", "out.png", "sub"])), max_size=3),
    link=st.booleans(),
)
def test_copies_of_kept_files_stay_in_their_folder(folder, names, link):
    source, target = folder / "photos", folder / "clean"
    shutil.rmtree(target, ignore_errors=True)
    (source / "sub").mkdir(parents=True, exist_ok=True)
    (source / "a.png").write_bytes(b"a")
    (source / "sub/b.png").write_bytes(b"b")
    if not (source / "out.png").is_symlink():
        (source / "out.png").symlink_to("/etc/passwd")
    list_of_names = folder / "kept.txt"
    list_of_names.write_bytes("\n".join(names).encode("utf-8", "surrogatepass"))
    before = {path for path in folder.iterdir() if path != target}
    with refusal_or_right(), contextlib.suppress(OSError):  # OSError: a name that is too long for the system
        names = kept_copy.read_names(list_of_names)
        kept_copy.make(names, source, target, link=link)
        made = [path for path in target.rglob("*") if not path.is_dir()]
        assert {str(path.relative_to(target)) for path in made} == {os.path.normpath(name) for name in names}
        assert all(path.read_bytes() in (b"a", b"b") for path in made)
    assert {path for path in folder.iterdir() if path != target} == before


# Checkpoints

ARCHITECTURE = Architecture("resnet20", 3, 8, (0.5,), (0.25,))


@pytest.fixture(scope="module")
def saved(folder):
    """A checkpoint, its bytes and its path."""
    history = [{"epoch": 0, "lr": 0.1, "loss": 1 / 3, "accuracy": 0.5}]
    conditions = {"n_rows": 7, "data": "d", "index": "i", "collapses": [], "rows": "r", "runtime": {"device": "cpu"}}
    checkpoint = checkpoints.Checkpoint(ARCHITECTURE, ARCHITECTURE.build(seed=1).state_dict(), history, conditions)
    checkpoints.save(folder / "model.pt", checkpoint)
    return checkpoint, (folder / "model.pt").read_bytes(), folder / "damaged.pt"


def equal(found, checkpoint) -> bool:
    others = (found.architecture, found.history, found.conditions) == (
        checkpoint.architecture,
        checkpoint.history,
        checkpoint.conditions,
    )
    return others and all(torch.equal(found.state[name], tensor) for name, tensor in checkpoint.state.items())


@given(data=st.data())
def test_a_damaged_checkpoint_is_refused(saved, data):
    """A flipped bit of a weight too: without the seal it would be read as if it were right."""
    checkpoint, content, path = saved
    path.write_bytes(data.draw(damaged(content)))
    with refusal_or_right():
        assert equal(checkpoints.load(path), checkpoint)


def test_a_flipped_weight(saved, refuses):
    checkpoint, content, path = saved
    weight = checkpoint.state["head.weight"].numpy().tobytes()
    place = content.index(weight)
    path.write_bytes(content[: place + 3] + bytes([content[place + 3] ^ 1]) + content[place + 4 :])
    unsealed = torch.load(io.BytesIO(path.read_bytes()[: -sealed.LENGTH]), weights_only=True)["state"]["head.weight"]
    assert not torch.equal(unsealed, checkpoint.state["head.weight"])  # torch does not notice
    with refuses(path, "its content is not what was written", "dvc repro"):
        checkpoints.load(path)
    with refuses(path, "its content is not what was written"):
        storage.digest(path)


TENSORS = st.sampled_from(
    [torch.zeros(0), torch.zeros(3), torch.full((3, 64), float("nan")), torch.zeros(3, 64, dtype=torch.float64),
     torch.zeros(3, 64, dtype=torch.int64), torch.zeros(1).expand(3, 64), torch.zeros(3, 64).to_sparse(),
     torch.zeros(64, 3).T, torch.zeros(3, 64, dtype=torch.complex64), torch.full((3, 64), 1e30),
     torch.zeros(3, 64, device="meta"),
     torch.nn.Parameter(torch.zeros(3, 64)), 3, "x", None, [1.0], {}]
)  # fmt: skip


@given(data=st.data())
def test_a_forged_checkpoint_is_refused_or_makes_sense(saved, data):
    checkpoint, _, path = saved
    about = {
        "architecture": dataclasses.asdict(ARCHITECTURE),
        "history": checkpoint.history,
        "conditions": checkpoint.conditions,
    }
    content = {"kind": "checkpoint", "schema_version": 1, "state": dict(checkpoint.state)}
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(["head.weight", "head.bias", "extra", sorted(checkpoint.state)[0]]))
        content["state"][name] = data.draw(TENSORS)
    else:
        about = changed_at(data.draw, about)
    content["about"] = json.dumps(about)
    if not data.draw(st.integers(0, 4)):
        content[data.draw(st.sampled_from(sorted(content)))] = data.draw(VALUES)
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(NotImplementedError, RuntimeError):
        torch.save(content, path)
    sealed.seal(path)
    with refusal_or_right():
        found = checkpoints.load(path)
        with torch.no_grad():
            assert found.model()(torch.zeros(2, len(found.architecture.mean), 8, 8)).shape == (
                2,
                found.architecture.n_classes,
            )
        checkpoints.load_for(path, Path("d"), Path("i"), ("d", "i"))


CALLS = st.sampled_from(
    [(os.system, "touch {}"), (Path.touch, "{}"), (eval, "open('{}', 'w')"), (exec, "open('{}', 'w')"), (open, "{}", "w"),
     (subprocess.call, ["touch", "{}"]), (shutil.copyfile, __file__, "{}"), (getattr, "x", "upper"), (torch.load, "{}"),
     (__import__, "os"), (os.mkdir, "{}"), (sys.exit, 3)]
)  # fmt: skip


@given(data=st.data())
def test_a_crafted_checkpoint_runs_no_code(saved, data):
    """Calls anywhere in the pickle, as torch's zip, as its old format or as a plain pickle, and pickles of random opcodes."""
    checkpoint, content, path = saved
    mark = path.with_name("mark")
    call, *arguments = data.draw(CALLS)
    fill = [[str(a).format(mark) for a in argument] if isinstance(argument, list) else
            argument.format(mark) if isinstance(argument, str) else argument for argument in arguments]  # fmt: skip
    attack = Attack(call, *fill)
    whole = {"kind": "checkpoint", "schema_version": 1, "about": "{}", "state": {"weight": attack}}
    form = data.draw(st.sampled_from(["zip", "old", "pickle", "inside", "opcodes", "code"]))
    if form in ("zip", "old"):
        torch.save(data.draw(st.sampled_from([attack, whole])), path, _use_new_zipfile_serialization=form == "zip")
    elif form == "pickle":
        path.write_bytes(pickle.dumps(whole, protocol=data.draw(st.integers(0, 5))))
    else:
        before = zipfile.ZipFile(io.BytesIO(content[: -sealed.LENGTH]))
        opcodes = b"".join(
            op.code.encode("latin-1") for op in data.draw(st.lists(st.sampled_from(pickletools.opcodes)))
        )
        inner = pickle.dumps(whole, protocol=2) if form != "opcodes" else opcodes + data.draw(st.binary(max_size=50))
        with zipfile.ZipFile(path, "w") as archive:
            for name in before.namelist():
                is_pickle = name.endswith("data.pkl")
                archive.writestr(name, inner if is_pickle else before.read(name))
            if form == "code":  # what a TorchScript archive holds
                archive.writestr("archive/constants.pkl", inner)
                archive.writestr("archive/code/x.py", "import os")
    if data.draw(st.integers(0, 3)):
        sealed.seal(path)
    with refusal_or_right():
        assert checkpoints.load(path) is None, "it must be refused"
    assert not mark.exists()


def test_a_damaged_scratch_checkpoint_is_as_good_as_none(tmp_path):
    """A training must not go on from flipped weights."""
    keeper = scratch.Scratch({"seed": 1}, tmp_path, 0)
    keeper.saved -= 100
    keeper.offer(lambda: {"weight": torch.arange(500.0)})
    content = keeper.path.read_bytes()
    place = content.index(torch.arange(500.0).numpy().tobytes()) + 7
    keeper.path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert torch.load(keeper.path, weights_only=True)["weight"].shape == (500,)  # torch does not notice
    assert keeper.load() is None


def test_names_that_no_file_has(tmp_path, refuses):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/loop.png").symlink_to("loop.png")
    for name, words in (("a\0b", "is no name of a file"), ("loop.png", "is not there")):
        with refuses(words):
            kept_copy.make([name], tmp_path / "photos", tmp_path / "clean", link=False)
    arrays = a_dump(2) | {"labels": np.array([0, 1]), "files": np.array(["a", "\ud800"])}
    np.savez(tmp_path / "dump.npz", **arrays)
    with refuses("files[1]", "it cannot stand in a list"):
        feature_dump.open_dump(tmp_path / "dump.npz")


def test_features_of_extract_without_their_seal(tmp_path, refuses):
    """They cannot pass for features from elsewhere, which need none."""
    path = tmp_path / "features.h5"
    storage.write(path, "features", *EXAMPLES["features"])
    path.write_bytes(path.read_bytes()[: -sealed.LENGTH])
    with refuses(path, "its seal is missing", "dvc repro extract"):
        storage.open_(path, "features")
    with refuses(path, "its seal is missing"):
        feature_dump.open_dump(path)


def test_a_home_that_nobody_has(tmp_path, command, write_params):
    own = {"data": {"source": "folder", "path": "~nobody-here/x", "image_size": 32}}
    path = write_params(tmp_path / "params.yaml", tiny={})
    values = yaml.safe_load(path.read_text())
    values["settings"]["tiny"] |= own | {"poison": {"trigger": {"name": "none"}, "poison_fraction": None}}
    path.write_text(yaml.safe_dump(values))
    ended = command("prepare", "--params", path, "--setting", "tiny", "--out", tmp_path / "out.h5", cwd=tmp_path)
    assert ended.status == 1 and ended.err.count("\n") == 1 and "no folder" in ended.err


@pytest.mark.parametrize("kind", ["eps", "pipe"])
def test_a_pattern_that_is_no_picture(tmp_path, refuses, kind):
    """Pillow would start another program for the one, and wait for ever for the other."""
    path = tmp_path / "pattern.png"
    put(None, path, kind, None)
    with refuses("is not a readable picture"):
        triggers.picture({"name": "blend", "pattern": str(path)}, (8, 8, 1))
