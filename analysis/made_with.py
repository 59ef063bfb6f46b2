"""Whether stored artifacts were made with a setting as params.yaml has it now: what the files themselves tell, compared.

Of the data nothing but their labels is compared: a data set does not say what it was prepared from.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from stages.lib import attacks, params, storage
from stages.lib.checkpoints import Checkpoint
from stages.lib.errors import UserError


def difference(
    setting: params.Setting, seed: int, data: Path, index: Path, models: Iterable[Checkpoint] = ()
) -> str | None:
    """What is not as the setting and seed would make it, in words, or None.

    The poisoned rows are drawn again from the labels in `data`, so that every field of the block `poison` counts.
    """
    with storage.open_(data, "dataset") as file:
        labels, n_classes = file["train/labels"][:], len(json.loads(file.attrs["class_names"]))
    with storage.open_(index, "poison_index") as file:
        found, fields = dict(file.attrs), {name: file[name][:] for name in storage.SCHEMAS["poison_index"][1]}
    spec = setting.poison
    try:
        wanted = attacks.plan(labels, n_classes, spec, seed)
    except UserError as error:  # as many rows or classes are not there
        return str(error)
    if (
        found["attack"] != spec.attack
        or json.loads(found["triggers"]) != attacks.triggers(spec)
        or storage.optional_fraction(found["poison_fraction"]) != spec.poison_fraction
        or any(not np.array_equal(fields[name], values) for name, values in wanted.items())
    ):
        return f"{index} is of another attack, trigger, fraction or seed"
    for model in models:
        if model.architecture.network != setting.model.network:
            return f"a model is {model.architecture.network}, not {setting.model.network}"
        if model.conditions["recipe"] != dataclasses.asdict(setting.train):
            return "a model was trained by another recipe"
    return None
