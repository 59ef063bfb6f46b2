"""score: one score per training sample by a defense, higher = more suspicious.

Reads features, logits, labels after poisoning and the poison fraction stored with them: which rows are poisoned stands in
the poison index, which this stage is never given. Works without DVC, with a defense from anywhere:
python -m stages.score --defense path/to/file.py --features features.h5 --out scores.h5
"""

import hashlib
import json
import operator
import sys
from pathlib import Path

import numpy as np

import defenses
from stages.lib import params, stage, storage
from stages.lib.errors import UserError
from stages.lib.seeds import stream


def given_options(args) -> dict:
    """Options of the defense: those of `params.yaml` for a named one, then those of the command line."""
    options = {} if args.defense.endswith(".py") else dict(params.defense_options(args.params, args.defense))
    for text in args.option:
        key, separator, value = text.partition("=")
        if not separator:
            raise UserError(f"--option {text!r}: expected KEY=VALUE")
        try:
            options[key] = params.exponent(params.load_yaml(value))
        except ValueError as error:
            raise UserError(f"--option {text!r}: {value!r} is not valid YAML") from error
    return options


def suspicions(name: str, defense, n_rows: int) -> tuple[int | None, np.ndarray | None]:
    """How many rows and which classes, (K,) int64, a defense suspects after scoring; None for what it does not decide."""
    number, classes = (getattr(defense, word, None) for word in ("n_suspected_", "suspected_classes_"))
    try:
        number = None if number is None else operator.index(number)
        classes = None if classes is None else np.array([operator.index(label) for label in classes], np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"defense {name}: n_suspected_ or suspected_classes_ is no whole number ({error})") from error
    if (number or 0) < 0 or (classes is not None and (classes < 0).any()):
        raise UserError(
            f"defense {name}: n_suspected_ or suspected_classes_ is negative; expected counts and labels from 0"
        )
    if (number or 0) > n_rows:
        raise UserError(f"defense {name}: n_suspected_ is {number}, and there are {n_rows} rows")
    return number, classes


def unwatched(before: set[str]) -> list[str]:
    """Files of this checkout imported since: DVC watches the defense's own file alone, and follows no imports."""
    root = Path(__file__).resolve().parents[1]
    new = [name for name in sys.modules if name not in before and not name.startswith("_defense_")]
    files = [Path(file) for name in new if (file := getattr(sys.modules[name], "__file__", None))]
    inside = [file.relative_to(root) for file in files if root in file.parents and "site-packages" not in file.parts]
    return sorted(map(str, inside))


def digest_of(defense: str) -> str | None:
    """SHA-256 of the file of a defense, by name or path, as hex; None if it is not there."""
    file = Path(defense) if defense.endswith(".py") else Path(defenses.__file__).with_name(f"{defense}.py")
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def main(args) -> None:
    fraction, modules = args.poison_fraction, set(sys.modules)
    if fraction is not None and not 0 < fraction <= 0.5:
        raise UserError(f"--poison-fraction is {fraction}; expected a number in (0, 0.5]")
    try:
        outputs = stage.Outputs([args.out], [args.features], lambda: given_options(args), args.resources)
        with outputs as temporary:
            # Not with the scores: an edit that leaves these as they are must not filter and train again.
            outputs.noted["defense_file"] = digest_of(args.defense)
            defense = defenses.load(args.defense, **given_options(args))
            with storage.open_(args.features, "features") as file:
                if fraction is None:
                    fraction = storage.optional_fraction(file.attrs["poison_fraction"])
                scores = defenses.score(
                    defense,
                    file["features"],
                    file["logits"],
                    file["labels"][:],
                    fraction,
                    seed=stream(args.seed, "defense") % 2**32,  # what np.random.RandomState takes
                    n_classes=file["logits"].shape[1],
                )
                index = file.attrs.get("index", "")
            attributes = {
                "defense": args.defense,
                "relies_on": json.dumps(defenses.relies_on(defense)),
                "poison_fraction": np.nan if fraction is None else fraction,
                "index": index,
                "features": storage.digest(args.features),
            }
            number, classes = suspicions(args.defense, defense, len(scores))
            if number is not None:
                attributes["n_suspected"] = number
            if classes is not None:
                attributes["suspected_classes"] = classes
            with stage.naming(args.out):
                storage.write(temporary[args.out], "scores", {"scores": scores}, attributes)
    except defenses.DefenseError as error:
        raise UserError(str(error)) from error
    print(f"{args.defense}: {len(scores)} scores in {args.out}")
    if beside := unwatched(modules):
        print(
            f"{args.defense} imports {', '.join(beside)}, which DVC does not watch: when that changes, change a line of the "
            "defense's own file too, or DVC takes the scores from before for the present ones",
            file=sys.stderr,
        )


if __name__ == "__main__":
    options = stage.parser("score", __doc__.partition("\n")[0])
    options.add_argument("--defense", required=True, help="name of a file in defenses/, or path of a .py file")
    options.add_argument("--features", type=Path, required=True, help="output of extract")
    options.add_argument("--out", type=Path, required=True, help="HDF5 file to write")
    options.add_argument("--seed", type=int, default=0, help="seed of the experiment")
    options.add_argument("--params", type=Path, default=Path("params.yaml"), help="file with the options of defenses")
    options.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="option of the defense")
    options.add_argument(
        "--poison-fraction", type=float, help="told to the defense; default: as stored in the features"
    )
    stage.add_resources(options)
    stage.run(main, options)
