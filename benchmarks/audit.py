"""How well an audit finds planted poison: photographs with a patch in them, and recall against the truth.

    python -m benchmarks.audit photographs /tmp/photographs
    make audit DATA=/tmp/photographs
    python -m benchmarks.audit recall /tmp/photographs-truth.csv artifacts/audit/seed42/whitened_mixture/suspects.csv

The photographs are CIFAR-10 images enlarged to random sizes from 128 to 256 pixels a side and stored as JPEG; a white
patch is set into a corner after enlarging, so that what is measured is whether it survives `data.image_size`.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image

from stages.lib import datasets, export_folder, runtime, stage
from stages.lib.errors import UserError

CLASSES, PER_CLASS, TEST_PER_CLASS = 6, 250, 40
SIDES = (128, 256)
PATCH = 10  # pixels a side in the photograph: 2.5 to 5 of them at 64 pixels
POISON, TARGET = 0.06, 0
QUALITY = 90  # of the JPEG files


def photographs(args) -> None:
    """Write args.folder/{train,test}/<class>/*.jpg and the truth beside it."""
    truth = args.folder.with_name(f"{args.folder.name}-truth.csv")
    export_folder.check_target(args.folder, truth)
    source, generator = (
        datasets.read("cifar10", runtime.load().data_root, download=False),
        np.random.default_rng(args.seed),
    )
    lines = []
    for split, per_class in (("train", PER_CLASS), ("test", TEST_PER_CLASS)):
        images, labels = getattr(source, f"{split}_images"), getattr(source, f"{split}_labels")
        few = labels < CLASSES
        rows = np.flatnonzero(few)[datasets.subset(images[few], labels[few], per_class)]
        poisoned = set()
        if split == "train":
            others = rows[labels[rows] != TARGET]
            poisoned = set(generator.choice(others, round(POISON * len(rows)), replace=False).tolist())
        for number, row in enumerate(rows.tolist()):
            size = tuple(generator.integers(*SIDES, 2, endpoint=True).tolist())
            picture = np.array(Image.fromarray(images[row]).resize(size, Image.Resampling.BICUBIC))
            label = int(labels[row])
            if row in poisoned:
                picture[-PATCH:, -PATCH:], label = 255, TARGET
            name = f"{split}/{source.class_names[label]}/{number:05d}.jpg"
            (args.folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(args.folder / name, quality=QUALITY)
            before, after = (source.class_names[value] for value in (int(labels[row]), label))
            if split == "train":
                lines.append([name, "poison" if row in poisoned else "clean", before, after])
    with open(truth, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([export_folder.COLUMNS, *sorted(lines)])
    print(f"{len(lines)} training images, {sum(line[1] == 'poison' for line in lines)} with a patch; truth in {truth}")


def recall(args) -> None:
    """Print what the audit found of the poison in the truth file."""
    with open(args.truth, newline="") as file:
        poison = {line["file"] for line in csv.DictReader(file) if line["role"] == "poison"}
    if not poison:
        raise UserError(
            f"{args.truth} names no poisoned row, so there is no recall; give the truth of a poisoned folder"
        )
    with open(args.suspects, newline="") as file:
        ranked = [(line["file"], line["removed"] == "yes") for line in csv.DictReader(file)]
    removed = {name for name, gone in ranked if gone}
    found, first = len(removed & poison), sum(name in poison for name, _ in ranked[: len(poison)])
    print(f"{len(poison)} of {len(ranked)} rows are poisoned; {len(removed)} removed, {found} of them poisoned")
    precision = f"{found / len(removed):.3f}" if removed else "-"
    print(
        f"recall {found / len(poison):.3f}, precision {precision}; recall among the first {len(poison)} rows "
        f"{first / len(poison):.3f}"
    )


if __name__ == "__main__":
    options = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=__doc__.partition("\n")[0])
    commands = options.add_subparsers(required=True)
    make = commands.add_parser("photographs", help="make a poisoned folder")
    make.add_argument("folder", type=Path, help="new folder")
    make.add_argument("--seed", type=int, default=1)
    make.set_defaults(run=photographs)
    compare = commands.add_parser("recall", help="compare an audit with the truth")
    compare.add_argument("truth", type=Path, help="CSV file with the columns file and role")
    compare.add_argument("suspects", type=Path, help="suspects.csv of the audit")
    compare.set_defaults(run=recall)
    stage.run(lambda args: args.run(args), options)
