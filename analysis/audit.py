"""audit: which rows of a training set look poisoned, by what a model makes of them; lists and a page of pictures.

    python -m analysis.audit --features features.h5 --out audit

Nothing is known of the poison, and nothing is trained: features, logits and labels come from this project's `extract`
(then `--data` gives names and pictures) or from a model of one's own (see analysis/feature_dump.py). In the folder `--out`:
suspects.csv (every row, most suspicious first), kept.txt, kept.h5 (row numbers, for retraining), report.html, summary.json.
"""

import argparse
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import defenses
from analysis import audit_page, kept_copy, suspects
from analysis.feature_dump import Dump, open_dump
from analysis.pictures import FromDataset, FromFolder, averages, typical_rows
from stages import filter as filter_stage
from stages import score as score_stage
from stages.lib import own_data, stage, storage
from stages.lib.errors import UserError
from stages.lib.seeds import stream

OUTPUTS = ("suspects.csv", "kept.txt", "kept.h5", "report.html", "summary.json")
AUTO = "auto"
SHOWN_CLASSES, SHOWN_SUSPECTS, SHOWN_TYPICAL, AVERAGED = 6, 48, 24, 200
# Upper over lower quartile of the class sizes, beyond which they mislead a defense that relies on them. Quartiles, since a
# single large class is what poison makes.
UNEQUAL = 1.5
SIZES = "use_class_sizes"  # the option with which a defense that relies on class sizes does without
WITHOUT_SIZES = f"without its size (--option {SIZES}=false; of images: make audit DATA=… OPTIONS={SIZES}=false)"


@dataclass
class Verdict:
    """scores: (N,) float64. removed: (N,) bool. decided: whether the defense's own decision holds; n_suspected, None if it
    makes none, and suspected_classes, most suspect first, are that decision. without_sizes: whether it can look at class sizes
    and did not."""

    scores: np.ndarray
    removed: np.ndarray
    decided: bool
    n_suspected: int | None
    suspected_classes: list[int]
    relies_on: tuple[str, ...]
    without_sizes: bool
    options: dict


def unequal(labels: np.ndarray) -> bool:
    """Whether the sizes of classes differ so much that a surplus tells nothing."""
    sizes = np.bincount(labels)
    low, high = np.percentile(sizes[sizes > 0], [25, 75])
    return high > UNEQUAL * low


def judge(dump: Dump, args) -> Verdict:
    """Score the rows and remove as many as the defense suspects, or as the budget says."""
    options = score_stage.given_options(args)
    try:
        defense = defenses.load(args.defense, **options)
        fraction = dump.poison_fraction if args.poison_fraction is None else args.poison_fraction
        scores = defenses.score(
            defense,
            dump.features,
            dump.logits,
            dump.labels,
            fraction,
            seed=stream(args.seed, "defense") % 2**32,  # what np.random.RandomState takes
        )
    except defenses.DefenseError as error:
        raise UserError(f"{dump.path}: {error}") from error
    number, classes = score_stage.suspicions(args.defense, defense, len(scores))
    classes = [] if classes is None else classes.tolist()
    for label in classes:
        if not 0 <= label < dump.logits.shape[1]:
            raise UserError(
                f"defense {args.defense} suspects class {label}; the classes are 0 to {dump.logits.shape[1] - 1}"
            )
        if label not in dump.labels:
            raise UserError(f"defense {args.defense} suspects class {label}, which has no rows")
    budget = (number or 0) if args.budget == AUTO else args.budget
    if not 0 <= budget < len(scores):
        raise UserError(f"the budget is to remove {budget} of {len(scores)} rows; expected 0 to {len(scores) - 1}")
    removed = filter_stage.removed(scores, budget)
    relies_on = defenses.relies_on(defense) or ()
    without_sizes = hasattr(defense, SIZES) and "class_sizes" not in relies_on
    return Verdict(scores, removed, number is not None, number, classes, relies_on, without_sizes, options)


def check_differ(dump: Dump) -> None:
    """Refuse features that are the same in every row: of such nothing can be told."""
    first = np.asarray(dump.features[:1])
    for start in range(0, len(dump.features), 8192):
        if (np.asarray(dump.features[start : start + 8192]) != first).any():
            return
    raise UserError(f"{dump.path}: features are the same in every row; were they read from the right layer?")


def predictions(logits) -> np.ndarray:
    """(N,) int64, read in slices."""
    return np.concatenate([np.asarray(logits[start : start + 8192]).argmax(1) for start in range(0, len(logits), 8192)])


def shown_classes(verdict: Verdict, labels: np.ndarray, by_hand: bool) -> list[int]:
    """Classes to show: those suspected; with a budget by hand also the others that lose rows. Where none loses any, those
    whose first rows rank highest: what the defense does not call poison can still be looked at."""
    classes = [] if by_hand else list(verdict.suspected_classes)
    losses = np.bincount(labels[verdict.removed], minlength=1)
    classes += [int(c) for c in np.argsort(-losses, kind="stable") if losses[c] and int(c) not in classes]
    return (classes or list(dict.fromkeys(labels[suspects.order(verdict.scores)].tolist())))[:SHOWN_CLASSES]


def notes_on(labels: np.ndarray, classes: list[str], verdict: Verdict, by_hand: bool, fit: float) -> list[str]:
    """What a reader must know to trust the result or not. fit: share of the rows that the model gives their label."""
    notes = []
    sizes = np.bincount(labels)
    of_label, sizes = sizes, sizes[sizes > 0]
    differ, without = unequal(labels), verdict.without_sizes
    if differ and "class_sizes" in verdict.relies_on:
        notes.append(
            f"The classes have {sizes.min():,} to {sizes.max():,} rows, and this defense takes clean classes for about "
            "equally large: the result may be about their sizes alone."
        )
    elif differ and without:
        notes.append(
            f"The classes have {sizes.min():,} to {sizes.max():,} rows: a class that is larger than others is no sign of "
            "poison here, and sizes were not looked at. Less is found without them: look at the pictures."
        )
    elif without:
        part = (
            " The rows named can be a part of the poison: compare with the list made with class sizes; where both name a "
            "class, remove what either names."
        )
        notes.append(f"Class sizes were not looked at.{part if verdict.removed.any() else ''}")
    elif "class_sizes" in verdict.relies_on and not by_hand:
        for label in verdict.suspected_classes:
            times = of_label[label] / np.median(sizes)
            if times > UNEQUAL:
                notes.append(
                    f"Class {classes[label]} has {of_label[label]:,} rows, {times:.1f} times the median class, which counts "
                    f"against it. If it is so large by nature, look again {WITHOUT_SIZES}."
                )
    if verdict.n_suspected is None and not by_hand:
        notes.append("This defense ranks rows and does not decide how many are poisoned: give a budget by hand.")
    if len(sizes) < audit_page.FEW_CLASSES:
        notes.append(
            f"There are {len(sizes)} classes to compare with one another, fewer than {audit_page.FEW_CLASSES}: judge by the "
            "pictures, and not by the verdict alone."
        )
    small = int((sizes < audit_page.SMALL_CLASS).sum())
    if small:
        notes.append(
            f"{_classes(small)} with fewer than {audit_page.SMALL_CLASS} rows: too few to tell two kinds of images apart."
        )
    if by_hand and fit < audit_page.WELL_FITTED:
        notes.append(f"The model fits only {fit:.0%} of the rows: it need not have learnt a trigger. Train longer.")
    emptied = [classes[label] for label in np.setdiff1d(labels, labels[~verdict.removed])]
    if emptied:
        notes.append(
            f"No row is kept of {_classes(len(emptied))} ({', '.join(emptied[:8])}{', …' if len(emptied) > 8 else ''}): a copy "
            "has no folder for them, and torchvision then numbers the others anew."
        )
    return notes


def _classes(number: int) -> str:
    return f"{number:,} class{'es' if number > 1 else ''}"


def section(label: int, classes, names, predicted, verdict: Verdict, dump: Dump, source) -> audit_page.Section:
    """One class of the page: its suspects (or, if it has none, its highest ranked rows) beside typical ones."""
    ranks = suspects.order(verdict.scores)
    rank_of = np.empty(len(ranks), np.int64)
    rank_of[ranks] = np.arange(1, len(ranks) + 1)
    rows = ranks[dump.labels[ranks] == label]
    gone = verdict.removed[rows]
    odd = rows[gone] if gone.any() else rows[:SHOWN_SUSPECTS]
    typical = typical_rows(dump.features, rows[~gone] if gone.any() else rows[SHOWN_SUSPECTS:], AVERAGED)
    few = (
        typical[np.unique(np.linspace(0, len(typical) - 1, SHOWN_TYPICAL).round().astype(int))]
        if len(typical)
        else typical
    )
    images = source.get(np.concatenate([odd[:AVERAGED], typical])) if source else {}

    def card(row: int, *lines: str) -> audit_page.Card:
        return audit_page.Card(names[row], list(lines), images.get(int(row)))

    def words(row: int) -> list[str]:
        seen = [] if predicted[row] == label else [f"seen as {classes[predicted[row]]}"]
        return [f"#{rank_of[row]:,} · {verdict.scores[row]:.3g}", *seen]

    both = [[images[int(row)] for row in some if int(row) in images] for some in (odd[:AVERAGED], typical)]
    return audit_page.Section(
        classes[label],
        verdict.scores[rows],
        gone,
        [card(row, *words(row)) for row in odd[:SHOWN_SUSPECTS]],
        [card(row, *words(row)) for row in few],
        averages(*both) if all(both) else None,
    )


def main(args) -> None:
    args.option = [*shlex.split(args.options), *args.option]
    outputs = [args.out / name for name in OUTPUTS]
    target = args.copy_to or args.link_to
    if args.budget != AUTO and args.budget < 0:
        raise UserError(f"--budget is {args.budget}; expected auto or a number of rows from 0")
    if args.poison_fraction is not None and not 0 < args.poison_fraction <= 0.5:
        raise UserError(f"--poison-fraction is {args.poison_fraction}; expected a number in (0, 0.5]")
    if target is not None:
        if args.images is None:
            raise UserError("--copy-to and --link-to need --images, the folder that the file names are relative to")
        kept_copy.check_target(args.images, Path(target).absolute())
    inputs = [args.features, *([args.data] if args.data else [])]
    with (
        stage.Outputs(outputs, inputs, lambda: score_stage.given_options(args), args.resources) as temporary,
        open_dump(args.features) as dump,
    ):
        labels = dump.labels
        check_differ(dump)
        own_data.check_classes(np.unique(labels, return_counts=True)[1], args.features)
        pictures = None
        names, classes, skipped = dump.files, dump.classes, []
        if args.data is not None:
            pictures = FromDataset(args.data)
            if not np.array_equal(pictures.labels, labels):
                raise UserError(f"{args.data}: its labels are not those of {args.features}; give the files of one run")
            names, classes, skipped = pictures.names, pictures.class_names, pictures.skipped
        if args.images is not None and not args.images.is_dir():
            raise UserError(
                f"--images {args.images} is not there or no folder; give the one that the names are relative to"
            )
        if args.images is not None and pictures is None:
            if names is None:
                raise UserError(f"{args.features} holds no files, so that --images cannot be used; add their names")
            pictures = FromFolder(args.images, names)
        named = names is not None
        names = names or [f"row {row}" for row in range(len(labels))]
        classes = classes or [str(label) for label in range(dump.logits.shape[1])]
        verdict, predicted = judge(dump, args), predictions(dump.logits)
        by_hand = args.budget != AUTO
        if not by_hand and (predicted == labels).mean() < audit_page.WELL_FITTED:
            verdict.decided, verdict.removed[:] = False, False
        of_label = np.array(classes, object)
        suspects.write_csv(
            temporary[outputs[0]], names, of_label[labels], of_label[predicted], verdict.scores, verdict.removed
        )
        suspects.write_kept(temporary[outputs[1]], names, ~verdict.removed)
        storage.write(
            temporary[outputs[2]],
            "kept_rows",
            {"rows": np.flatnonzero(~verdict.removed)},
            {"n": len(labels), "index": dump.index},
        )
        summary = summary_of(args.defense, verdict, labels, predicted, classes, by_hand)
        notes = summary["notes"] = notes_on(labels, classes, verdict, by_hand, summary["fit"])
        if args.data is not None and pictures.n_held_out:
            notes.append(
                f"{pictures.n_held_out:,} images were held out as test images: not scored, and not among the kept files."
            )
        if args.data is None and summary["fit"] < audit_page.WELL_FITTED:
            notes.append(
                "If your model is right more often than that: are features, logits and labels of the same rows, in the same "
                "order, and are the features what its last layer is given?"
            )
        page = audit_page.Page(summary, notes, skipped)
        for label in shown_classes(verdict, labels, by_hand):
            page.sections.append(section(label, classes, names, predicted, verdict, dump, pictures))
        temporary[outputs[3]].write_text(page.html(), encoding="utf-8")
        temporary[outputs[4]].write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(audit_page.verdict_line(summary))
    for note in page.notes:
        print(note)
    print(f"lists and pictures in {args.out} (report.html)")
    if target is not None:
        if not named:
            raise UserError(f"{args.features} holds no file names: nothing to copy")
        kept = [name for name, gone in zip(names, verdict.removed, strict=True) if not gone]
        try:
            kept_copy.make(kept, args.images, target, link=args.link_to is not None)
        except OSError as error:
            where = error.filename or target
            raise UserError(f"the lists are in {args.out}, but no copy was made: {error.strerror}: {where}") from error
        print(f"{len(kept)} kept files {'linked' if args.link_to else 'copied'} to {target}")


def summary_of(defense: str, verdict: Verdict, labels, predicted, classes: list[str], by_hand: bool) -> dict:
    """The verdict in words and numbers that a program can read."""
    lost, sizes = (np.bincount(values, minlength=len(classes)) for values in (labels[verdict.removed], labels))
    hit = [label for label in verdict.suspected_classes if not by_hand] or np.flatnonzero(lost).tolist()
    return {
        "defense": Path(defense).stem,
        "options": verdict.options,
        "rows": len(labels),
        "classes": len(classes),
        "classes_compared": int((sizes >= audit_page.SMALL_CLASS).sum()),
        "fit": float((labels == predicted).mean()),
        "decided_by": "hand" if by_hand else "defense" if verdict.decided else "nobody",
        "removed": int(verdict.removed.sum()),
        "suspected_rows": verdict.n_suspected,
        "suspected": [{"class": classes[c], "rows": int(sizes[c]), "removed": int(lost[c])} for c in hit],
    }


def budget(text: str) -> str | int:
    return AUTO if text == AUTO else int(text)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m analysis.audit",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.add_argument("--features", type=Path, required=True, help="HDF5 or .npz: features, logits, labels[, files]")
    options.add_argument("--out", type=Path, required=True, help="folder to write to")
    options.add_argument("--data", type=Path, help="output of prepare that the features were made from")
    options.add_argument("--images", type=Path, help="folder that the file names are relative to")
    options.add_argument("--defense", default="whitened_mixture", help="name of a file in defenses/, or path of one")
    options.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="option of the defense")
    options.add_argument("--options", default="", metavar='"KEY=VALUE …"', help="several of them in one word")
    options.add_argument("--params", type=Path, default=Path("params.yaml"), help="file with the options of defenses")
    options.add_argument("--budget", type=budget, default=AUTO, help="auto (as the defense decides), or rows to remove")
    options.add_argument("--poison-fraction", type=float, help="told to the defense, if it is known")
    options.add_argument("--seed", type=int, default=0, help="seed of a defense that draws random numbers")
    target = options.add_mutually_exclusive_group()
    target.add_argument("--copy-to", type=Path, help="new folder for copies of the kept files of --images")
    target.add_argument("--link-to", type=Path, help="new folder for links to the kept files of --images")
    stage.add_resources(options)
    return options


if __name__ == "__main__":
    stage.run(main, parser())
