"""Attacks: which rows the attacker touches, with which labels, and what he wants of a triggered test image.

Each states its eligible rows and what its attack success rate (ASR) counts. N stays as it is; ``poison_fraction`` of all
rows are poisoned, and cover rows come on top: they bear the trigger and keep their labels, so that the trigger alone is
not what gives the poison away.

all_to_one       Rows of another class than the target, relabelled to it. ASR: test images of another class than the target
                 that are taken for the target. With the triggers wanet (Nguyen & Tran 2021, arXiv:2102.10369) and
                 adaptive_blend (Qi et al. 2023, ICLR), cover rows of any class.
clean_label      Rows of the target class, labels kept: with the trigger sig, Barni et al. 2019, arXiv:1902.11237. ASR as for
                 all_to_one.
source_specific  TaCT (Tang et al. 2021, arXiv:1908.00686). Rows of the source class, relabelled to the target; cover rows of
                 all classes but these two. ASR: test images of the source class that are taken for the target.
two_targets      Two attacks all_to_one, each with half of the rows and a trigger and a target of its own; no row has both
                 triggers. ASR: the mean of the two.
all_to_all       Rows of every class y, relabelled to y + 1 modulo C (Gu et al. 2017, arXiv:1708.06733). ASR: test images that
                 are taken for y + 1.
"""

import dataclasses

import numpy as np

from stages.lib import params
from stages.lib.errors import UserError
from stages.lib.seeds import stream
from stages.lib.storage import COVER, POISON

VARIED = {"wanet": (COVER,), "adaptive_blend": (POISON, COVER)}  # trigger -> roles in which it differs from row to row
ELIGIBLE = {
    "all_to_one": "of another class than the target",
    "clean_label": "of the target class",
    "source_specific": "of the source class",
    "two_targets": "of another class than the target",
    "all_to_all": "eligible",
}


def triggers(poison: params.Poison) -> list[dict]:
    """What the poison index says of each trigger of the attack, for `triggers.make`; none with the trigger ``none``."""
    blocks = [poison.trigger, getattr(poison, "second_trigger", None)]
    found = [dataclasses.asdict(block) for block in blocks if block is not None and block.name != "none"]
    # The index says `size`, from before params.yaml could not (`params.UNSEEN`): an old index stays what it is, and its victims.
    return [{"size" if key == "patch_size" else key: value for key, value in options.items()} for options in found]


def goals(poison: params.Poison, n_classes: int) -> np.ndarray:
    """(T, C) int64: what a test image of class c with trigger t should be taken for; -1 where that is no success."""
    for name in ("target_label", "second_target_label", "source_label"):
        label = getattr(poison, name, 0)
        if label >= n_classes:
            raise UserError(f"poison.{name} is {label}, but the classes are 0 to {n_classes - 1}")
    if isinstance(poison, params.AllToAll):
        return (np.arange(n_classes)[None] + 1) % n_classes
    targets = [poison.target_label, *([poison.second_target_label] if isinstance(poison, params.TwoTargets) else [])]
    wanted = np.repeat(np.array(targets)[:, None], n_classes, axis=1)
    counts = np.arange(n_classes) != wanted
    if isinstance(poison, params.SourceSpecific):
        counts = np.arange(n_classes)[None] == poison.source_label
    return np.where(counts, wanted, -1)[: len(triggers(poison))]


def plan(labels: np.ndarray, n_classes: int, poison: params.Poison, seed: int) -> dict[str, np.ndarray]:
    """Every data set of the poison index (`stages.lib.storage`) but the pictures, from the (N,) true labels.

    round(poison_fraction * N) rows are poisoned and round(cover_ratio * that) are cover, all drawn without replacement.
    Raises `UserError` for a class that is not there and for more rows than are eligible; at least one such row is left.
    """
    wanted = goals(poison, n_classes)
    n_poison = _n_poison(poison, len(labels), len(wanted))
    clean_label = isinstance(poison, params.CleanLabel)
    generator, free = np.random.default_rng(stream(seed, "rows")), np.ones(len(labels), bool)

    def draw(count: int, eligible: np.ndarray, option: str, which: str) -> np.ndarray:
        eligible = np.flatnonzero(free & eligible)
        if count >= len(eligible):
            raise UserError(
                f"{option} asks for {count} rows, but only {len(eligible)} of {len(labels)} {which}, and some must stay "
                "clean; lower it"
            )
        rows = generator.choice(eligible, count, replace=False)
        free[rows] = False
        return rows

    parts = []  # (rows, role, trigger, labels afterwards)
    for number, goal in enumerate(wanted):
        share = (n_poison + len(wanted) - 1 - number) // len(wanted)  # of two, the first has the odd row
        eligible = labels == poison.target_label if clean_label else goal[labels] >= 0
        rows = draw(share, eligible, f"poison_fraction {poison.poison_fraction}", f"are {ELIGIBLE[poison.attack]}")
        parts.append((rows, POISON, number, labels[rows] if clean_label else goal[labels[rows]]))
    ratio = getattr(poison.trigger, "cover_ratio", 0) or getattr(poison, "cover_ratio", 0)
    if n_cover := round(ratio * n_poison):
        eligible = np.ones(len(labels), bool)
        if isinstance(poison, params.SourceSpecific):
            eligible = ~np.isin(labels, (poison.source_label, poison.target_label))
        rows = draw(n_cover, eligible, f"cover_ratio {ratio}", "can be cover")
        parts.append((rows, COVER, 0, labels[rows]))
    return _arrays(labels, parts, poison, seed) | {"goals": wanted}


def _n_poison(poison: params.Poison, n: int, n_triggers: int) -> int:
    """Rows to be poisoned, at least one for each trigger."""
    if n_triggers == 0:
        return 0
    count = round(poison.poison_fraction * n)
    if count < n_triggers:
        few = "no row at all" if count == 0 else "no row for the second target"
        raise UserError(f"poison_fraction {poison.poison_fraction} of {n} rows is {few}; raise it")
    return count


def _arrays(labels, parts, poison, seed) -> dict[str, np.ndarray]:
    """The parts as one data set each, rows rising."""
    rows = np.concatenate([np.empty(0, np.int64), *(part[0] for part in parts)])
    order, lengths = np.argsort(rows), [len(part[0]) for part in parts]
    rows = rows[order]
    role = np.repeat(np.array([part[1] for part in parts], np.uint8), lengths)[order]
    trigger = np.repeat(np.array([part[2] for part in parts], np.int64), lengths)[order]
    after = np.concatenate([np.empty(0, np.int64), *(part[3] for part in parts)])[order]
    seeds = np.random.default_rng(stream(seed, "variants")).integers(1, 2**63, len(rows))
    return {
        "rows": rows,
        "role": role,
        "target": np.where(role == POISON, after, -1),
        "labels_before": labels[rows],
        "labels_after": after,
        "trigger": trigger,
        "variant": np.where(np.isin(role, VARIED.get(poison.trigger.name, ())), seeds, 0),
    }
