"""Checkpoints: weights and how they came about, byte-stable, loaded without running any code from the file."""

import io
import json
import math
import pickle
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from stages.lib import sealed
from stages.lib.errors import UserError
from stages.lib.training import Architecture

SCHEMA_VERSION = 1
MOST_CLASSES = 100_000  # a network of more would fill memory before its weights are looked at


@dataclass(frozen=True)
class Checkpoint:
    """state: the network's tensors by name, on the CPU. history: one dict an epoch (epoch, lr, loss, accuracy).

    conditions: rows trained on, number of rows, seed, recipe, collapses, device, digests of data set and poison index.
    """

    architecture: Architecture
    state: dict[str, Tensor]
    history: list[dict[str, float]]
    conditions: dict

    def model(self) -> torch.nn.Module:
        model = self.architecture.build()
        model.load_state_dict(self.state)
        return model.eval()


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write to `path`; the same content gives the same bytes.

    Not to the path itself, since torch.save embeds the stem of a path; JSON for all but the tensors, since a pickle's bytes
    depend on which equal strings are one object.
    """
    about = {
        "architecture": asdict(checkpoint.architecture),
        "history": checkpoint.history,
        "conditions": checkpoint.conditions,
    }
    # Strides are stored too: `contiguous` keeps those of a 1 x 1 or one-channel convolution in channels-last memory.
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in checkpoint.state.items()
    }
    content = {"kind": "checkpoint", "schema_version": SCHEMA_VERSION, "about": json.dumps(about), "state": state}
    buffer = io.BytesIO()  # on a full disk torch.save would raise a RuntimeError about positions, where a file says OSError
    torch.save(content, buffer)
    Path(path).write_bytes(sealed.with_seal(buffer.getvalue()))


def load(path: Path) -> Checkpoint:
    """Check the seal and read with ``weights_only=True``; `UserError` names the file if it is missing, damaged, cut short
    or something else."""
    again = "make it again with `dvc repro`"
    try:
        stored = sealed.content(path)
        if stored is None:
            raise UserError(f"{path}: not a readable checkpoint, perhaps cut short (its seal is missing); {again}")
        with warnings.catch_warnings(action="ignore"):  # of foreign pickles: said below, in one line
            content = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path} is not there; {again}, or give its path") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: not a checkpoint of this project (no or more than weights); {again}") from error
    except Exception as error:  # for garbage the unpickler raises KeyError, IndexError, struct.error, …
        raise UserError(f"{path}: not a readable checkpoint, perhaps cut short; {again}") from error
    if not isinstance(content, dict) or content.get("kind") != "checkpoint":
        raise UserError(f"{path}: not a checkpoint of this project; {again}")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{path}: schema version {content.get('schema_version')}, expected {SCHEMA_VERSION}; {again}")
    try:
        about = json.loads(content["about"])
        fields = about["architecture"]
        fields |= {"mean": tuple(fields["mean"]), "std": tuple(fields["std"])}
        checkpoint = Checkpoint(Architecture(**fields), content["state"], about["history"], about["conditions"])
        if not 0 < checkpoint.architecture.n_classes <= MOST_CLASSES or len(fields["mean"]) not in (1, 3):
            raise ValueError(f"{checkpoint.architecture.n_classes} classes, {len(fields['mean'])} channels")
        expected = {name: tensor.shape for name, tensor in checkpoint.architecture.build().state_dict().items()}
        found = {name: tensor.shape for name, tensor in checkpoint.state.items()}
        wrong = _wrong(checkpoint)
    except UserError as error:  # of an unknown network
        raise UserError(f"{path}: {error}; {again}") from error
    except Exception as error:  # KeyError, TypeError, RecursionError, …: whatever the content is not
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: a damaged checkpoint ({words:.200}); {again}") from error
    if found != expected:
        odd = next(name for name in (expected | found) if expected.get(name) != found.get(name))
        raise UserError(
            f"{path}: its weights are not those of {checkpoint.architecture.network} ({odd}: "
            f"{_shape(found.get(odd))}, expected {_shape(expected.get(odd))}); {again}"
        )
    if wrong:
        raise UserError(f"{path}: a damaged checkpoint ({wrong}); {again}")
    return checkpoint


def _wrong(checkpoint: Checkpoint) -> str | None:
    """What the types and values are not, in words."""
    architecture = checkpoint.architecture
    for name, tensor in checkpoint.state.items():
        usual = torch.int64 if name.endswith("num_batches_tracked") else torch.float32
        if type(tensor) is not Tensor or tensor.dtype != usual or tensor.layout != torch.strided:
            return f"{name} is no {usual} tensor"
        if not tensor.isfinite().all():
            return f"{name} holds NaN or infinity"
    channels = (*architecture.mean, *architecture.std)
    if (
        not all(isinstance(value, int | float) and math.isfinite(value) for value in channels)
        or min(architecture.std) <= 0
    ):
        return "mean or std is no number"
    for row in checkpoint.history:
        if not all(isinstance(row[key], int | float) for key in ("epoch", "lr", "loss", "accuracy")):
            return f"its history holds {row!r:.100}"
    return None if isinstance(checkpoint.conditions, dict) else "its conditions are no mapping"


def load_for(path: Path, data: Path, index: Path, digests: tuple[str, str]) -> Checkpoint:
    """`load`, and refuse a checkpoint that was trained on another data set or poison index."""
    checkpoint = load(path)
    recorded = checkpoint.conditions.get("data"), checkpoint.conditions.get("index")
    for what, other, one, two in zip(("data set", "poison index"), (data, index), recorded, digests, strict=True):
        if one != two:
            raise UserError(f"{path} was trained on another {what} than {other}; train again (`dvc repro`)")
    missing = {"rows", "runtime", "collapses"} - checkpoint.conditions.keys()
    if missing:
        raise UserError(f"{path} does not say its {', '.join(sorted(missing))}; train again (`dvc repro`)")
    return checkpoint


def _shape(shape) -> str:
    return "missing" if shape is None else str(tuple(shape))
