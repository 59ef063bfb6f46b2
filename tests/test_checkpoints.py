"""Checkpoints: byte-stable, code in them never runs, and one line for every file that is not what it should be."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch

from stages.lib import checkpoints, sealed
from stages.lib.checkpoints import Checkpoint
from stages.lib.training import Architecture

ARCHITECTURE = Architecture("resnet20", 3, 8, (0.5,), (0.25,))


@pytest.fixture
def checkpoint():
    """A network with random weights and a history of two epochs."""
    history = [{"epoch": i + 1, "lr": 0.1 / (i + 1), "loss": 1 / 3, "accuracy": 0.5} for i in range(2)]
    conditions = {
        "n_rows": 7,
        "data": "d" * 64,
        "index": "i" * 64,
        "collapses": [],
        "recipe": {"lr": 0.1},
        "rows": "r" * 64,
        "runtime": {},
    }
    return Checkpoint(ARCHITECTURE, ARCHITECTURE.build(seed=1).state_dict(), history, conditions)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


def test_round_trip(checkpoint, path):
    checkpoints.save(path, checkpoint)
    found = checkpoints.load(path)
    assert found.architecture == checkpoint.architecture
    assert (found.history, found.conditions) == (checkpoint.history, checkpoint.conditions)
    assert list(found.state) == list(checkpoint.state)
    for name, tensor in checkpoint.state.items():
        assert found.state[name].dtype == tensor.dtype and torch.equal(found.state[name], tensor)


def test_the_network_that_comes_back_gives_the_same_answers(checkpoint, path):
    original, images = ARCHITECTURE.build(seed=1).eval(), torch.randn(5, 1, 8, 8)
    checkpoints.save(path, checkpoint)
    model = checkpoints.load(path).model()
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(images), original(images))
        assert not torch.equal(ARCHITECTURE.build(seed=2).eval()(images), original(images))


def test_same_content_same_bytes(checkpoint, path, tmp_path):
    def copied(value):
        """Equal, but no string or list is the same object."""
        if isinstance(value, dict):
            return {copied(key): copied(item) for key, item in value.items()}
        if isinstance(value, list):
            return [copied(item) for item in value]
        return "".join(list(value)) if isinstance(value, str) else value

    model = checkpoint.model().to(memory_format=torch.channels_last)  # as a training leaves it
    parameters = dict(model.named_parameters())
    state = {copied(name): parameters.get(name, tensor) for name, tensor in model.state_dict().items()}
    assert any(tensor.requires_grad for tensor in state.values())
    assert not all(tensor.is_contiguous() for tensor in state.values())
    history, conditions = copied(checkpoint.history), copied(checkpoint.conditions)
    assert next(iter(history[1])) is not next(iter(checkpoint.history[0]))
    other = tmp_path / ".another-name.12.tmp"
    checkpoints.save(path, checkpoint)
    checkpoints.save(other, Checkpoint(dataclasses.replace(ARCHITECTURE), state, history, conditions))
    assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("what", ["state", "history", "conditions"])
def test_other_content_other_bytes(checkpoint, path, what):
    checkpoints.save(path, checkpoint)
    before = path.read_bytes()
    changed = {
        "state": {name: tensor + 1 for name, tensor in checkpoint.state.items()},
        "history": checkpoint.history[:1],
        "conditions": checkpoint.conditions | {"n_rows": 8},
    }[what]
    checkpoints.save(path, dataclasses.replace(checkpoint, **{what: changed}))
    assert path.read_bytes() != before


def test_truncated(checkpoint, path, refuses):
    checkpoints.save(path, checkpoint)
    content = path.read_bytes()
    for length in [0, 1, 3, 4, 30, 64, 1000, *range(5000, len(content), 100_001), len(content) - 22, len(content) - 1]:
        path.write_bytes(content[:length])
        with refuses(path, "checkpoint", "make it again with `dvc repro`"):
            checkpoints.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b".", b"K", b"text\n", b'{"a": 1}', b"\x89HDF\r\n\x1a\n" + bytes(600), b"PK\x03\x04" + bytes(100),
     pickle.dumps({"kind": "checkpoint"}), b"\x80\x02" + bytes(20), bytes(range(256))],
)  # fmt: skip
def test_no_checkpoint(path, refuses, content):
    path.write_bytes(content)
    with refuses(path, "checkpoint", "make it again with `dvc repro`"):
        checkpoints.load(path)


class Attack:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("protocol", ["torch", "torch, inside", "pickle"])
def test_code_in_a_file_does_not_run(checkpoint, path, tmp_path, refuses, protocol):
    mark, whole = tmp_path / "mark", {"kind": "checkpoint", "schema_version": 1, "about": "{}", "state": {}}
    if protocol == "pickle":
        path.write_bytes(pickle.dumps(Attack(mark)))
    else:
        torch.save(Attack(mark) if protocol == "torch" else whole | {"state": {"weight": Attack(mark)}}, path)
    with refuses(path, "its seal is missing", "make it again"):
        checkpoints.load(path)
    sealed.seal(path)
    with refuses(path, "more than weights", "make it again"):
        checkpoints.load(path)
    assert not mark.exists()
    if protocol != "pickle":
        torch.load(path, weights_only=False)
        assert mark.exists()  # it would have


def test_folder_and_missing_file(tmp_path, refuses):
    with refuses(tmp_path, "not a readable checkpoint"):
        checkpoints.load(tmp_path)
    with refuses(tmp_path / "no.pt", "is not there"):
        checkpoints.load(tmp_path / "no.pt")


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        (dataclasses.replace(ARCHITECTURE, n_classes=4), ["of resnet20 (head.weight: (3, 64), expected (4, 64))"]),
        (dataclasses.replace(ARCHITECTURE, mean=(0, 0, 0), std=(1, 1, 1)), ["(16, 1, 3, 3), expected (16, 3, 3, 3)"]),
        (dataclasses.replace(ARCHITECTURE, network="mobilenetv2"), ["not those of mobilenetv2", "missing, expected"]),
        (dataclasses.replace(ARCHITECTURE, network="resnet18"), ["resnet18"]),
    ],
)
def test_weights_of_another_architecture(checkpoint, path, refuses, architecture, words):
    checkpoints.save(path, dataclasses.replace(checkpoint, architecture=architecture))
    with refuses(*words):
        checkpoints.load(path)


def test_a_tensor_too_many_or_too_few(checkpoint, path, refuses):
    checkpoints.save(path, dataclasses.replace(checkpoint, state=checkpoint.state | {"extra": torch.zeros(2)}))
    with refuses(path, "(extra: (2,), expected missing)", "make it again"):
        checkpoints.load(path)
    few = {name: tensor for name, tensor in checkpoint.state.items() if name != "head.bias"}
    checkpoints.save(path, dataclasses.replace(checkpoint, state=few))
    with refuses(path, "(head.bias: missing, expected (3,))"):
        checkpoints.load(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "model"}, ["not a checkpoint of this project"]),
        ({"kind": None}, ["not a checkpoint of this project"]),
        ({"schema_version": 99}, ["schema version 99, expected 1"]),
        ({"schema_version": None}, ["schema version None, expected 1"]),
        ({"about": None}, ["damaged"]),
        ({"about": "{"}, ["damaged"]),
        ({"about": "[]"}, ["damaged"]),
        ({"about": '{"architecture": {"network": "resnet20"}, "history": [], "conditions": {}}'}, ["damaged", "mean"]),
        ({"state": None}, ["damaged"]),
        ({"state": {"head.bias": 3}}, ["damaged"]),
    ],
)
def test_damaged_content(checkpoint, path, refuses, changes, words):
    about = {"architecture": dataclasses.asdict(ARCHITECTURE), "history": [], "conditions": {}}
    content = {"kind": "checkpoint", "schema_version": 1, "about": json.dumps(about), "state": checkpoint.state}

    def save(content):
        torch.save(content, path)
        sealed.seal(path)

    save(content)
    checkpoints.load(path)
    save({key: value for key, value in (content | changes).items() if value is not None})
    with refuses(path, *words, "make it again"):
        checkpoints.load(path)
    save([1, 2])
    with refuses(path, "not a checkpoint of this project"):
        checkpoints.load(path)


def test_only_for_the_data_it_was_trained_on(checkpoint, path, refuses):
    checkpoints.save(path, checkpoint)
    data, index = Path("data.h5"), Path("poison.h5")
    found = checkpoints.load_for(path, data, index, ("d" * 64, "i" * 64))
    assert found.conditions == checkpoint.conditions
    with refuses(f"{path} was trained on another data set than {data}", "train again"):
        checkpoints.load_for(path, data, index, ("x" * 64, "i" * 64))
    with refuses(f"{path} was trained on another poison index than {index}", "train again"):
        checkpoints.load_for(path, data, index, ("d" * 64, "x" * 64))
    checkpoints.save(path, dataclasses.replace(checkpoint, conditions={}))
    with refuses(path, "another data set"):
        checkpoints.load_for(path, data, index, ("d" * 64, "i" * 64))
