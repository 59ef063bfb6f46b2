"""`params.yaml`, read and checked: every block as a typed value, every mistake as one line.

Where the paper trail of the benchmark leaves a value open, `params.yaml` says so with the comment ``assumed``.
"""

import difflib
import math
import re
import types
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import yaml

from stages.lib.errors import UserError

SOURCES = ("digits", "cifar10", "cifar100", "fashion_mnist", "folder", "npz")
OWN_SOURCES = ("folder", "npz")  # a user's own data, at `data.path`
OWN_IMAGE_SIZES = (32, 224)
NETWORKS = ("resnet20", "vgg16bn", "mobilenetv2")
UNSEEN = ("size", "nfiles")  # DVC's run cache leaves keys of these names out of its key: another value, the old result


def _number(low: float, high: float, default=MISSING, low_open: bool = False):
    return field(default=default, metadata={"low": low, "high": high, "low_open": low_open})


def _one_of(*legal: str, default=MISSING):
    return field(default=default, metadata={"legal": legal})


@dataclass(frozen=True)
class Data:
    """Which images. `image_size`: pixels a side (digits, folder and npz; the others have a size of their own). `pad_to`:
    zero-padded evenly to so many pixels a side, after the trigger. `train_per_class`, `test_per_class`: so many of each
    class. `imbalance_factor`: training images of the first class over those of the last, falling exponentially between
    (long-tailed; the test set stays as it is). Of one's own data (folder, npz): `path`, and `test_fraction` of each class
    held out if there is no test split.
    """

    source: str = _one_of(*SOURCES)
    image_size: int | None = _number(8, 256, default=None)
    pad_to: int | None = _number(8, 256, default=None)
    train_per_class: int | None = _number(2, 10**7, default=None)
    test_per_class: int | None = _number(1, 10**7, default=None)
    imbalance_factor: float | None = _number(1, 10**4, default=None)
    path: str | None = None
    test_fraction: float | None = _number(0, 0.9, default=None, low_open=True)


# A trigger (its `name`) and an attack (the word `attack` of the block `poison`) have a class each: its fields are what it
# reads, and every other key is refused. What they do stands in `stages.lib.triggers` and `stages.lib.attacks`.


@dataclass(frozen=True)
class BadNets:
    """`patch_size`: pixels a side of the white square."""

    name: str = _one_of("badnets")
    patch_size: int = _number(1, 256, default=3)
    corner: str = _one_of("bottom_right", "bottom_left", default="bottom_right")


@dataclass(frozen=True)
class Blend:
    """`alpha`: opacity. `pattern`: ``noise``, a smooth random picture, or the path of a picture."""

    name: str = _one_of("blend")
    alpha: float = _number(0, 1, default=0.2, low_open=True)
    pattern: str = "noise"


@dataclass(frozen=True)
class Sig:
    """`delta`: amplitude in grey levels. `frequency`: waves across the image."""

    name: str = _one_of("sig")
    delta: float = _number(0, 255, default=20.0, low_open=True)
    frequency: float = _number(0, 128, default=6.0, low_open=True)


@dataclass(frozen=True)
class WaNet:
    """`grid`: control points a side. `strength`: about twice the mean shift in pixels. `cover_ratio`: rows of the noise mode
    (warped another way, labels kept) per poisoned row."""

    name: str = _one_of("wanet")
    grid: int = _number(2, 64, default=4)
    strength: float = _number(0, 100, default=0.5, low_open=True)
    cover_ratio: float = _number(0, 100, default=2.0)


@dataclass(frozen=True)
class AdaptiveBlend:
    """`alpha`, `pattern`: as for blend. `pieces_per_side`: the pattern is cut into that many by as many, of which a training
    image shows half. `cover_ratio`: rows with the trigger and their labels kept, per poisoned row."""

    name: str = _one_of("adaptive_blend")
    alpha: float = _number(0, 1, default=0.2, low_open=True)
    pattern: str = "noise"
    pieces_per_side: int = _number(2, 64, default=4)
    cover_ratio: float = _number(0, 100, default=1.0)


@dataclass(frozen=True)
class NoTrigger:
    name: str = _one_of("none")


Fixed = BadNets | Blend | Sig  # the same on every image, in training and test
Trigger = BadNets | Blend | Sig | WaNet | AdaptiveBlend | NoTrigger


@dataclass(frozen=True)
class AllToOne:
    """`poison_fraction`: share of the training rows, in (0, 0.5]; null with the trigger ``none``, here and below."""

    trigger: Trigger
    poison_fraction: float | None = _number(0, 0.5, default=None, low_open=True)
    target_label: int = _number(0, 10**6, default=0)
    attack: str = _one_of("all_to_one", default="all_to_one")


@dataclass(frozen=True)
class CleanLabel:
    trigger: Fixed
    poison_fraction: float = _number(0, 0.5, low_open=True)
    target_label: int = _number(0, 10**6, default=0)
    attack: str = _one_of("clean_label", default="clean_label")


@dataclass(frozen=True)
class SourceSpecific:
    """`source_label`: the class whose images obey the trigger. `cover_ratio`: rows of other classes that are triggered and
    keep their labels, per poisoned row."""

    trigger: Fixed
    source_label: int = _number(0, 10**6)
    poison_fraction: float = _number(0, 0.5, low_open=True)
    target_label: int = _number(0, 10**6, default=0)
    cover_ratio: float = _number(0, 100, default=1.0)
    attack: str = _one_of("source_specific", default="source_specific")


@dataclass(frozen=True)
class TwoTargets:
    """`poison_fraction`: of both together."""

    trigger: Fixed
    second_trigger: Fixed
    second_target_label: int = _number(0, 10**6)
    poison_fraction: float = _number(0, 0.5, low_open=True)
    target_label: int = _number(0, 10**6, default=0)
    attack: str = _one_of("two_targets", default="two_targets")


@dataclass(frozen=True)
class AllToAll:
    trigger: Fixed
    poison_fraction: float = _number(0, 0.5, low_open=True)
    attack: str = _one_of("all_to_all", default="all_to_all")


Poison = AllToOne | CleanLabel | SourceSpecific | TwoTargets | AllToAll


@dataclass(frozen=True)
class Model:
    network: str = _one_of(*NETWORKS)


@dataclass(frozen=True)
class Train:
    """The recipe. `crop_padding` in pixels."""

    epochs: int = _number(1, 100_000)
    batch_size: int = _number(1, 1_000_000)
    lr: float = _number(0, 1000, low_open=True)
    momentum: float = _number(0, 1)
    weight_decay: float = _number(0, 1)
    crop_padding: int = _number(0, 64)
    flip: bool


@dataclass(frozen=True)
class Setting:
    data: Data
    poison: Poison
    model: Model
    train: Train


@dataclass(frozen=True)
class Filter:
    """`budget`: ``fraction`` (budget_multiplier x poison_fraction x N rows), ``auto`` (as many as the defense suspects)
    or a number of rows."""

    budget: str | int = field(default="fraction", metadata={"expected": "fraction, auto or a number of rows"})
    budget_multiplier: float = _number(0, 100, default=1.0, low_open=True)


@dataclass(frozen=True)
class Audit:
    """`budget`: ``auto`` (as many rows as the defense suspects) or a number of rows. `options`: of the defense, for audits
    alone, ``KEY=VALUE KEY=VALUE``."""

    budget: str | int = field(default="auto", metadata={"expected": "auto or a number of rows"})
    options: str = ""


MOST_VALUES = 100_000  # in a file, its aliases written out


class _Loader(yaml.SafeLoader):
    """Plain values. Not so many that a few lines of aliases could stand for any amount of memory; no key twice, of which YAML
    would take the last and which DVC refuses; no number beyond 64 bits: one of a million digits cannot even be shown."""

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None and _size(node, {}) > MOST_VALUES:
            self._refuse("too many values, or one within itself", node)
        return node

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                self._refuse(f"the key {key.value!r:.100} stands twice in one block", key)
            seen.add((key.tag, str(key.value)))
        return node

    def construct_yaml_int(self, node):
        value = super().construct_yaml_int(node)
        if abs(value) >= 1 << 63:
            self._refuse("a whole number has more than 64 bits", node)
        return value

    def _refuse(self, words, where):
        raise yaml.MarkedYAMLError(problem=words, problem_mark=where.start_mark)


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """Values in the node, aliases written out; infinite if it stands within itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is counted
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def load_yaml(text: str):
    """What the text holds; raises ValueError, with one line, for what is not YAML or goes beyond plain values."""
    try:
        return yaml.load(text, _Loader)
    except (
        Exception
    ) as error:  # beside YAMLError: of !!int "" IndexError, of !!bool x KeyError, of [[[[… RecursionError
        raise ValueError(" ".join(f"{error}".split()) or type(error).__name__) from error


def read(path: Path) -> dict:
    """The whole file as a mapping with the keys that it must have."""
    try:
        values = load_yaml(Path(path).read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; run from the folder that holds it, or give --params") from error
    except ValueError as error:  # or it is not UTF-8
        raise UserError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping with setting, defense, seed, settings, defenses and filter")
    known = ("setting", "defense", "seed", "filter", "audit", "defenses", "settings")
    for key in values:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{_did_you_mean(key, known)}")
    for key in ("settings", "defenses"):
        if not isinstance(values.get(key), dict):
            raise UserError(f"{path}: expected a block `{key}:` with one entry per name, got {values.get(key)!r}")
    for key in ("setting", "defense"):
        _check_name(values.get(key, "none"), f"{path}: {key}")
    if "defense" in values:  # this and the filter are told before the trainings, not after them
        _check_defense(values["defense"], values["defenses"], path)
        _check_file(values["defense"], path)
    seed = values.get("seed", 0)
    if type(seed) is not int or seed < 0:
        raise UserError(f"{path}: seed is {seed!r}; expected a whole number from 0")
    _filter(values, path)
    audit = _build(Audit, values.get("audit", {}), f"{path}: audit")
    if audit.budget != "auto" and not (isinstance(audit.budget, int) and audit.budget >= 0):
        raise UserError(f"{path}: audit.budget is {audit.budget!r}; expected auto or a number of rows")
    if not re.fullmatch(r"(\w+=[\w.+-]+( +|$))*", audit.options):  # it goes through a shell
        raise UserError(
            f"{path}: audit.options is {audit.options!r}; expected KEY=VALUE KEY=VALUE, of letters and digits"
        )
    return values


def setting(path: Path, name: str) -> Setting:
    """The block ``settings.<name>``, all of it checked, whatever part the caller reads."""
    settings = read(path)["settings"]
    if name not in settings:
        raise UserError(f"setting {name!r} is not in {path}{_did_you_mean(name, settings)}")
    _check_name(name, f"{path}: setting")
    found = _build(Setting, settings[name], f"{path}: settings.{name}")
    _check_poison(found.poison, f"{path}: settings.{name}.poison")
    if found.data.source in OWN_SOURCES:
        _check_own(found.data, f"{path}: settings.{name}.data")
        return found
    if found.data.image_size is not None and found.data.source != "digits":
        raise UserError(
            f"{path}: settings.{name}.data.image_size: only digits can be enlarged; leave it out, or use pad_to"
        )
    for key in ("path", "test_fraction"):
        if getattr(found.data, key) is not None:
            raise UserError(
                f"{path}: settings.{name}.data.{key} belongs to the sources {' and '.join(OWN_SOURCES)}; leave it out"
            )
    return found


def _check_name(name, where: str) -> None:
    """dvc.yaml makes a folder's name of it, and a word of a command line."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(
            f"{where}: {name!r} cannot name a folder: letters, digits, _ and - only (a dot ends a word in DVC)"
        )


def _check_defense(name: str, defenses: dict, path: Path) -> None:
    if name not in defenses:
        raise UserError(
            f"defense {name!r} has no line in {path}{_did_you_mean(name, defenses)}; "
            f"a new one needs `{name}: {{}}` under `defenses:`"
        )


def _check_file(name: str, path: Path) -> None:
    """Whether the file of the chosen defense is there and parses; what only an import shows, `score` tells."""
    folder = Path(path).parent / "defenses"
    if not folder.is_dir():  # parameters of a list of dumps, say
        return
    file = folder / f"{name}.py"
    try:
        compile(file.read_bytes(), file, "exec")
    except FileNotFoundError as error:
        raise UserError(f"defense {name!r} has a line in {path}, but there is no file {file}") from error
    except (SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise UserError(f"{file}{where}: {getattr(error, 'msg', error)}; mend the file of the defense") from error


def _check_own(data: Data, where: str) -> None:
    if not data.path:
        raise UserError(f"{where}.path is missing; expected the path of the {data.source}")
    low, high = OWN_IMAGE_SIZES
    if data.image_size is not None and not low <= data.image_size <= high:
        raise UserError(f"{where}.image_size is {data.image_size}; expected a whole number in [{low}, {high}]")
    for key in ("pad_to", "train_per_class", "test_per_class", "imbalance_factor"):
        if getattr(data, key) is not None:
            raise UserError(f"{where}.{key} does not go with the source {data.source}; leave it out")


def _check_poison(poison: Poison, where: str) -> None:
    if (poison.trigger.name == "none") != (poison.poison_fraction is None):
        raise UserError(
            f"{where}: trigger {poison.trigger.name!r} with poison_fraction "
            f"{poison.poison_fraction}; a trigger needs a fraction in (0, 0.5], and `none` needs null"
        )
    if isinstance(poison, SourceSpecific) and poison.source_label == poison.target_label:
        raise UserError(f"{where}: source_label and target_label are both {poison.target_label}; give two classes")
    if isinstance(poison, TwoTargets):
        if poison.second_target_label == poison.target_label:
            raise UserError(
                f"{where}: target_label and second_target_label are both {poison.target_label}; give two classes"
            )
        if poison.second_trigger == poison.trigger:
            raise UserError(f"{where}: trigger and second_trigger are the same; give each target one of its own")


def filter_(path: Path) -> Filter:
    """The block ``filter``."""
    return _filter(read(path), path)


def _filter(values: dict, path: Path) -> Filter:
    found = _build(Filter, values.get("filter", {}), f"{path}: filter")
    if isinstance(found.budget, str) and found.budget not in ("fraction", "auto"):
        raise UserError(f"{path}: filter.budget is {found.budget!r}; expected fraction, auto or a number of rows")
    if isinstance(found.budget, int) and found.budget < 0:
        raise UserError(f"{path}: filter.budget is {found.budget}; a number of rows is 0 or more")
    return found


def defense_options(path: Path, name: str) -> dict:
    """The block ``defenses.<name>``: keyword arguments, to be checked by the defense itself."""
    defenses = read(path)["defenses"]
    _check_defense(name, defenses, path)
    options = defenses[name]
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise UserError(f"{path}: defenses.{name} is {options!r}; expected its options, or {{}} for none")
    for key in UNSEEN:
        if key in options:
            raise UserError(
                f"{path}: defenses.{name}.{key}: DVC's run cache does not look at a parameter called {key} and would bring back "
                "what another value gave; give the option another name"
            )
    return {key: exponent(value) for key, value in options.items()}


def _build(cls, block, where: str):
    """`block` as an instance of the dataclass `cls`, or of the one of several that the block names; `where` names the block
    in messages."""
    if isinstance(cls, types.UnionType):
        cls, kind = _named(cls, block, where)
    else:
        kind = ""
    known = {f.name: f for f in fields(cls)}
    if not isinstance(block, dict):
        raise UserError(f"{where} is {block!r}; expected a block with {', '.join(known)}")
    for key in block:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{kind}{_did_you_mean(key, known)}")
    hints, values = typing.get_type_hints(cls), {}
    for name, spec in known.items():
        if name in block:
            values[name] = _value(hints[name], block[name], spec.metadata, f"{where}.{name}")
        elif spec.default is MISSING:
            raise UserError(f"{where}: {name} is missing{kind}; expected {_expected(hints[name], spec.metadata)}")
    return cls(**values)


def _named(union, block, where: str):
    """The dataclass of several that a block asks for by its `name` or `attack`, and words that say so in messages."""
    classes = typing.get_args(union)
    key = "name" if "name" in classes[0].__dataclass_fields__ else "attack"
    named = {cls.__dataclass_fields__[key].metadata["legal"][0]: cls for cls in classes}
    if not isinstance(block, dict):
        raise UserError(
            f"{where} is {block!r}; expected a block with {key} (one of {', '.join(named)}) and its options"
        )
    word = block.get(key, "all_to_one" if key == "attack" else MISSING)
    if word is MISSING:
        raise UserError(f"{where}: {key} is missing; expected one of {', '.join(named)}")
    if not isinstance(word, str) or word not in named:
        raise UserError(f"{where}.{key} is {word!r}; expected one of {', '.join(named)}")
    return named[word], f" for {word}"


def _value(hint, value, metadata, where: str):
    if _is_block(hint):
        return _build(hint, value, where)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    if float in options:
        value = exponent(value)
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    wrong = type(value) not in options
    if isinstance(value, str) and any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in value):
        wrong = True  # no path holds such
    if not wrong and isinstance(value, int | float) and "low" in metadata:
        too_low = value <= metadata["low"] if metadata["low_open"] else value < metadata["low"]
        wrong = too_low or not value <= metadata["high"]
    if not wrong and "legal" in metadata:
        wrong = value not in metadata["legal"]
    if wrong:
        raise UserError(f"{where} is {value!r}; expected {_expected(hint, metadata)}")
    return value


def _is_block(hint) -> bool:
    return hasattr((typing.get_args(hint) or (hint,))[0], "__dataclass_fields__")


def exponent(value):
    """PyYAML reads 1e-5 (no dot) as a string, and so it arrives from `dvc exp run -S`."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def _expected(hint, metadata) -> str:
    if "expected" in metadata:
        return metadata["expected"]
    if "legal" in metadata:
        return "one of " + ", ".join(metadata["legal"])
    if _is_block(hint):
        return "a block"
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    text = " or ".join(words[option] for option in options)
    if "low" in metadata:
        text += f" in {'(' if metadata['low_open'] else '['}{metadata['low']}, {metadata['high']}]"
    return text


def _did_you_mean(word, known) -> str:
    close = difflib.get_close_matches(str(word), [str(k) for k in known], 1)
    return (f" (did you mean {close[0]}?)" if close else "") + f"; known: {', '.join(str(k) for k in known)}"
