"""The HDF5 files: the same bytes for the same content, and one line for every file that is not what it should be."""

import contextlib
import hashlib
import time

import h5py
import numpy as np
import pytest

from stages.lib import sealed, storage

EXAMPLES = {
    "dataset": (
        {
            "train/images": np.arange(48, dtype=np.uint8).reshape(3, 4, 4, 1),
            "train/labels": np.array([0, 1, 0]),
            "test/images": np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1),
            "test/labels": np.array([1, 0]),
        },
        {"class_names": '["a", "b"]', "mean": np.array([0.5]), "std": np.array([0.25]), "pad_to": 4},
    ),
    "poison_index": (
        {
            "rows": np.array([1, 2]),
            "role": np.array([1, 2], np.uint8),
            "target": np.array([0, 0]),
            "labels_before": np.array([1, 1]),
            "labels_after": np.array([0, 1]),
            "trigger": np.array([0, 0]),
            "variant": np.array([0, 17]),
            "goals": np.array([[-1, 0]]),
            "pictures": np.zeros((1, 4, 4, 1), np.uint8),
        },
        {"n": 3, "attack": "all_to_one", "triggers": '[{"name": "badnets"}]', "poison_fraction": 0.3, "data": "d" * 64},
    ),
    "features": (
        {
            "features": np.linspace(0, 1, 6, dtype=np.float32).reshape(3, 2),
            "logits": np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2),
            "labels": np.array([0, 1, 0]),
        },
        {"poison_fraction": np.nan, "index": "i" * 64, "checkpoint": "c" * 64},
    ),
    "scores": ({"scores": np.array([0.1, 0.3, 0.2])}, {"defense": "d", "poison_fraction": 0.3, "index": "i" * 64}),
    "kept_rows": ({"rows": np.array([0, 2])}, {"n": 3, "index": "i" * 64}),
}
KINDS = sorted(EXAMPLES)
DATA_SETS = [(kind, name) for kind in KINDS for name in EXAMPLES[kind][0]]
MAKERS = {
    "dataset": "prepare",
    "poison_index": "poison",
    "features": "extract",
    "scores": "score",
    "kept_rows": "filter",
}


@pytest.fixture
def write(tmp_path):
    """Write the example of a kind, with some data sets or attributes changed (None: left out); returns its path."""

    def example(kind, arrays=None, attributes=None, name="file.h5"):
        parts = [{k: v for k, v in (part | (changes or {})).items() if v is not None}
                 for part, changes in zip(EXAMPLES[kind], (arrays, attributes), strict=True)]  # fmt: skip
        storage.write(tmp_path / name, kind, *parts)
        return tmp_path / name

    return example


def opens(path, kind):
    storage.open_(path, kind).close()


@contextlib.contextmanager
def changing(path):
    """The file, open for changes, and sealed again after them."""
    with h5py.File(path, "a") as file:
        yield file
    sealed.seal(path)


def test_the_examples_are_of_every_kind():
    assert set(EXAMPLES) == set(storage.SCHEMAS) == set(storage.ONE_LENGTH)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(write, kind):
    arrays, attributes = EXAMPLES[kind]
    with storage.open_(write(kind), kind) as file:
        for name, array in arrays.items():
            assert file[name].dtype == array.dtype
            np.testing.assert_array_equal(file[name][:], array)
        for name, value in attributes.items():
            np.testing.assert_array_equal(file.attrs[name], value)
        assert file.mode == "r"


def test_same_content_same_bytes(write):
    first = [write(kind, name=f"{kind}.h5").read_bytes() for kind in KINDS]
    time.sleep(1.1)  # HDF5's times of change count seconds
    second = [write(kind, name=f".again_{kind}.123.tmp").read_bytes() for kind in KINDS]
    assert first == second


@pytest.mark.parametrize("kind", KINDS)
def test_other_content_other_bytes(write, kind):
    name = next(iter(EXAMPLES[kind][0]))
    changed = EXAMPLES[kind][0][name].copy()
    changed.flat[0] += 1
    assert write(kind).read_bytes() != write(kind, {name: changed}, name="other.h5").read_bytes()


def test_digests(write, tmp_path, refuses):
    path = write("scores")
    content = path.read_bytes()[: -sealed.LENGTH]
    assert storage.digest(path) == hashlib.sha256(content).hexdigest()
    (tmp_path / "plain").write_bytes(content)
    assert storage.digest(tmp_path / "plain") == storage.digest(path)
    wide = np.arange(6).reshape(2, 3)
    assert storage.digest_array(wide[:, ::2]) == hashlib.sha256(np.array([0, 2, 3, 5]).tobytes()).hexdigest()
    with refuses(tmp_path, "is a folder"):
        storage.digest(tmp_path)
    for missing in (tmp_path / "no.h5", path / "no.h5"):
        with refuses(missing, "is not there"):
            storage.digest(missing)


def test_files_that_do_not_belong_together(write, refuses):
    path, other = write("scores"), write("kept_rows", name="other.h5")
    storage.must_match("thing", path, storage.digest(other), other)
    with refuses(path, other, "was made from another thing", "make it again"):
        storage.must_match("thing", path, storage.digest(path), other)


def test_a_fraction_that_is_not_known():
    assert storage.optional_fraction(np.float64("nan")) is None
    assert storage.optional_fraction(np.float64(0.25)) == 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_truncated(write, refuses, kind):
    path = write(kind)
    content = path.read_bytes()
    for length in {0, 1, 8, 95, 96, 512, len(content) // 3, len(content) // 2, len(content) - 200, len(content) - 1}:
        path.write_bytes(content[:length])
        with refuses(path, "cut short", f"dvc repro {MAKERS[kind]}"):
            opens(path, kind)


@pytest.mark.parametrize("content", [b"", b"text\n", b"\x89PNG\r\n\x1a\n" + bytes(600), b"\x80\x02}q\x00."])
def test_no_hdf5(tmp_path, refuses, content):
    path = tmp_path / "file.h5"
    path.write_bytes(content)
    with refuses(path, "not a readable HDF5 file", "dvc repro score"):
        opens(path, "scores")


def test_hdf5_of_another_program(tmp_path, refuses):
    path = tmp_path / "file.h5"
    with h5py.File(path, "w") as file:
        file["scores"] = np.zeros(3)
    with refuses(path, "its seal is missing", "dvc repro score"):
        opens(path, "scores")
    with refuses(path, "holds kind 'none', expected 'features'", "dvc repro extract"):
        opens(path, "features")
    for odd in (np.array([1, 2]), 3, np.bytes_(b"scores")):
        with changing(path) as file:
            file.attrs["kind"] = odd
        with refuses(path, "holds kind", "expected 'scores'"):
            opens(path, "scores")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("expected", KINDS)
def test_wrong_kind(write, refuses, kind, expected):
    path = write(kind)
    if kind == expected:
        opens(path, expected)
    else:
        with refuses(path, f"holds kind {kind!r}, expected {expected!r}", f"dvc repro {MAKERS[expected]}"):
            opens(path, expected)


@pytest.mark.parametrize("version", [storage.SCHEMA_VERSIONS["scores"] + 1, 0, "1", np.array([1, 1]), None])
def test_wrong_version(write, refuses, version):
    path = write("scores")
    with changing(path) as file:
        del file.attrs["schema_version"]
        if version is not None:
            file.attrs["schema_version"] = version
    with refuses(path, f"schema version {version}, expected {storage.SCHEMA_VERSIONS['scores']}", "dvc repro score"):
        opens(path, "scores")


@pytest.mark.parametrize(("kind", "name"), DATA_SETS)
def test_missing_data_set(write, refuses, kind, name):
    path = write(kind, {name: None})
    with refuses(path, f"data set {name!r} is missing", f"dvc repro {MAKERS[kind]}"):
        opens(path, kind)


def test_a_group_in_place_of_a_data_set(write, refuses):
    path = write("scores", {"scores": None, "scores/inner": np.zeros(3)})
    with refuses(path, "data set 'scores' is missing"):
        opens(path, "scores")


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in KINDS for name in storage.SCHEMAS[kind][2] if "?" not in name]
)
def test_missing_attribute(write, refuses, kind, name):
    path = write(kind, attributes={name: None})
    with refuses(path, f"attribute {name!r} is missing", f"dvc repro {MAKERS[kind]}"):
        opens(path, kind)


@pytest.mark.parametrize(("kind", "name"), DATA_SETS)
def test_wrong_type_or_number_of_dimensions(write, refuses, kind, name):
    right = EXAMPLES[kind][0][name]
    expected = f"expected {right.dtype} with {right.ndim}"
    for wrong in (right.astype(np.int16), right.astype(">f4"), right.astype("S1")):
        path = write(kind, {name: wrong})
        with refuses(path, f"{name} is {wrong.dtype} with {right.ndim} dimensions", expected, f"repro {MAKERS[kind]}"):
            opens(path, kind)
    for wrong in (right[..., None], right[0]):
        path = write(kind, {name: wrong})
        with refuses(path, f"{name} is {right.dtype} with {wrong.ndim} dimensions", expected):
            opens(path, kind)


def test_features_from_elsewhere_may_be_half_as_wide_and_name_no_origin(write):
    halved = {name: EXAMPLES["features"][0][name].astype(np.float16) for name in ("features", "logits")}
    opens(write("features", halved, {"index": None, "checkpoint": None}), "features")


@pytest.mark.parametrize(
    ("kind", "name", "other"),
    [("dataset", "train/labels", "train/images"), ("dataset", "test/images", "test/labels"),
     ("poison_index", "role", "rows"), ("poison_index", "target", "rows"), ("poison_index", "labels_before", "rows"),
     ("poison_index", "labels_after", "rows"), ("features", "logits", "features"), ("features", "labels", "features")],
)  # fmt: skip
def test_unequal_lengths(write, refuses, kind, name, other):
    array = EXAMPLES[kind][0][name]
    path = write(kind, {name: array[:-1]})
    with refuses(path, f"{name} has {len(array) - 1}", f"{other} has {len(array)}", f"dvc repro {MAKERS[kind]}"):
        opens(path, kind)


def test_folder_and_missing_file(tmp_path, write, refuses):
    with refuses(tmp_path, "is a folder"):
        opens(tmp_path, "scores")
    for missing in (tmp_path / "no.h5", tmp_path / "no" / "no.h5", write("scores") / "no.h5"):
        with refuses(f"{missing} is not there; make it with `dvc repro`, or give its path"):
            opens(missing, "scores")


def test_forbidden_file(write, refuses, monkeypatch):
    path = write("scores")

    def forbidden(*_):  # a mode of 0 would not stop root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sealed, "check", forbidden)
    with refuses(f"{path} cannot be read: permission denied"):
        opens(path, "scores")


def test_a_refused_file_is_closed(write, refuses):
    path = write("scores", attributes={"index": None})
    with refuses("'index' is missing"):
        opens(path, "scores")
    with changing(path) as file:  # HDF5 refuses this for a file that is open
        file.attrs["index"] = "i"
    opens(path, "scores")
