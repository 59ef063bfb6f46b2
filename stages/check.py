"""check: tell before anything is trained whether the defense can run on the setting with the budget that is asked for.

Its file is imported, its options are tried, and it scores a small made-up dump. A name that is not there is refused; what else
fails there need not fail on features that a network made: that is said.
"""

import json
import sys
from pathlib import Path

import numpy as np

import defenses
from stages.lib import params, stage
from stages.lib.errors import UserError

ROWS, WIDTH, CLASSES = 300, 8, 3  # of the made-up dump; 100 rows a class are enough for every method so far
MISTAKES = (AttributeError, NameError, ImportError)  # of the file, whatever the rows


def runnable(path: Path, setting: str, names: list[str], named: bool, budget: str | int) -> list[str]:
    """The defenses that can run on a setting with a budget (as `filter.budget`), in their order and once each.

    path: params.yaml. named: the user named them, so that one that cannot run is refused (`UserError`) and not left out.
    """
    fraction = params.setting(path, setting).poison.poison_fraction
    if budget == "fraction" and fraction is None:
        raise UserError(f"setting {setting} has no poison fraction; give auto or a number of rows as the budget")
    found, left_out = [], {}
    for name in dict.fromkeys(names):
        if why := _why_not(path, name, told_fraction=fraction is not None, must_decide=budget == "auto"):
            if named:
                raise UserError(f"defense {name}: {why}")
            left_out.setdefault(why, []).append(name)
        else:
            found.append(name)
    for why, others in left_out.items():
        print(f"left out: {', '.join(others)}: {why}", flush=True)
    return found


def _why_not(path: Path, name: str, *, told_fraction: bool, must_decide: bool) -> str | None:
    try:
        defense = defenses.load(name, **params.defense_options(path, name))
        if not told_fraction and defenses.needs_fraction(defense):
            return "needs the poison fraction, and where nothing is poisoned there is none"
    except defenses.DefenseError as error:
        raise UserError(str(error)) from error
    try:
        _score_made_up(defense, told_fraction)
    except defenses.DefenseError as error:
        if isinstance(error.__cause__, MISTAKES):
            raise UserError(str(error)) from error
        print(f"on {ROWS} made-up rows of {CLASSES} classes: {error}; it may still do on features", file=sys.stderr)
        return None
    if must_decide and getattr(defense, "n_suspected_", None) is None:  # told only after scoring
        return "no decision of its own on how many rows to remove; give a number of rows as the budget"
    return None


def _score_made_up(defense, told_fraction: bool) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(ROWS) % CLASSES
    features = (np.eye(CLASSES, WIDTH)[labels] * 4 + generator.normal(size=(ROWS, WIDTH))).astype(np.float32)
    logits = features[:, :CLASSES].copy()
    defenses.score(defense, features, logits, labels, 0.1 if told_fraction else None, seed=0, n_classes=CLASSES)


def main(args) -> None:
    def parameters():
        given = params.setting(args.params, args.setting).poison, params.defense_options(args.params, args.defense)
        return *given, params.filter_(args.params)

    with stage.Outputs([args.out], [], parameters) as temporary:
        budget = params.filter_(args.params).budget
        runnable(args.params, args.setting, [args.defense], True, budget)
        found = {"setting": args.setting, "defense": args.defense, "budget": budget}
        temporary[args.out].write_text(json.dumps(found, indent=2) + "\n")
    print(f"{args.defense}: checked for {args.setting}, budget {budget}")


if __name__ == "__main__":
    options = stage.parser("check", __doc__.partition("\n")[0])
    stage.add_setting(options)
    options.add_argument("--defense", required=True, help="name of a file in defenses/")
    options.add_argument("--out", type=Path, required=True, help="JSON file to write")
    stage.run(main, options)
