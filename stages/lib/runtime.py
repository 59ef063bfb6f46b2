"""How it runs, as opposed to what it computes: device, precision, compilation, data root.

None of these are DVC parameters: changing one retrains nothing. Each comes from the environment
(``BACKDOOR_DEVICE``, ``BACKDOOR_PRECISION``, ``BACKDOOR_COMPILE``, ``BACKDOOR_DATA_ROOT``), else from ``runtime.yaml``
(git-ignored, beside ``params.yaml``), else a default. Nothing here imports torch.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from stages.lib.errors import UserError

CHOICES = {"device": ("auto", "cpu", "cuda"), "precision": ("auto", "fp32", "bf16"), "compile": ("auto", "on", "off")}


@dataclass(frozen=True)
class Runtime:
    """The user's wishes; `auto` is decided by `stages.lib.device.decide`."""

    device: str = "auto"
    precision: str = "auto"
    compile: str = "auto"
    data_root: Path = Path("data")


def home() -> Path:
    """Folder of the checkout in which the user works.

    Also from a temporary workspace of ``dvc exp run --queue``, which lies in ``.dvc/tmp/exps`` of that checkout and has
    none of its git-ignored files.
    """
    here = Path.cwd()
    for parent in (here, *here.parents):
        if parent.parts[-3:] == (".dvc", "tmp", "exps"):
            return parent.parents[2]
    return here


def load() -> Runtime:
    """Read the environment and ``runtime.yaml``; raise `UserError` on an unknown key or value."""
    path = home() / "runtime.yaml"
    values = {}
    if path.is_file():
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that is none
            raise UserError(f"{path}: not valid YAML ({error})") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}: expected lines like `device: cpu`, got a {type(values).__name__}")
    known = (*CHOICES, "data_root")
    for key in values:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}; use {', '.join(known)}")
    origin = dict.fromkeys(values, str(path))
    for key in known:
        variable = f"BACKDOOR_{key.upper()}"
        if os.environ.get(variable):
            values[key], origin[key] = os.environ[variable], variable
    for key, legal in CHOICES.items():
        value = values.get(key, "auto")
        if isinstance(value, bool):  # YAML reads a bare `on` as true
            value = "on" if value else "off"
        if value not in legal and not (key == "device" and str(value).startswith("cuda:")):
            raise UserError(f"{origin[key]}: {key} is {value!r}; use one of {', '.join(legal)}")
        values[key] = value
    root = values.get("data_root", "data")
    if not isinstance(root, str):
        raise UserError(f"{origin['data_root']}: data_root is {root!r}; expected the path of a folder")
    values["data_root"] = home() / Path(root).expanduser()
    return Runtime(**values)
