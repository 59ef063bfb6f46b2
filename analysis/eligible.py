"""Which defenses can run where the poison fraction is not known, or where they have to decide for themselves."""

from pathlib import Path

import numpy as np

import defenses
from stages.lib import params
from stages.lib.errors import UserError

ROWS, WIDTH, CLASSES = 300, 8, 3  # of the made-up dump; 100 rows a class are enough for every method so far


def eligible(path: Path, names: list[str], named: bool, *, told_fraction: bool, must_decide: bool) -> list[str]:
    """The names that can run, in their order and once each.

    path: params.yaml. named: the user named them, so that one that cannot run is refused and not left out.
    told_fraction: the poison fraction of the setting is known. must_decide: ``filter.budget`` is auto.
    """
    found, left_out = [], {}
    for name in dict.fromkeys(names):
        options = params.defense_options(path, name)
        try:
            defense = defenses.load(name, **options)
            why = None
            if not told_fraction and defenses.needs_fraction(defense):
                why = "needs the poison fraction, and where nothing is poisoned there is none"
            elif must_decide and not decides(defense, told_fraction):
                why = "no decision of its own on how many rows to remove; give a number of rows as the budget"
        except defenses.DefenseError as error:
            raise UserError(str(error)) from error
        if why is None:
            found.append(name)
        elif named:
            raise UserError(f"defense {name}: {why}")
        else:
            left_out.setdefault(why, []).append(name)
    for why, others in left_out.items():
        print(f"left out: {', '.join(others)}: {why}", flush=True)
    return found


def decides(defense, told_fraction: bool) -> bool:
    """Whether it says how many rows it suspects. It tells only after scoring: tried on a small made-up dump."""
    generator = np.random.default_rng(0)
    labels = np.arange(ROWS) % CLASSES
    features = (np.eye(CLASSES, WIDTH)[labels] * 4 + generator.normal(size=(ROWS, WIDTH))).astype(np.float32)
    logits = features[:, :CLASSES].copy()
    defenses.score(defense, features, logits, labels, 0.1 if told_fraction else None, seed=0, n_classes=CLASSES)
    return getattr(defense, "n_suspected_", None) is not None
