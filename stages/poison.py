"""poison: choose the rows that the attacker stamps and relabels, and record them in the poison index."""

import json
from pathlib import Path

import numpy as np

from stages.lib import attacks, export_folder, params, stage, storage, triggers
from stages.lib.errors import UserError


def summary(spec: params.Poison, labels: np.ndarray, arrays: dict[str, np.ndarray]) -> str:
    """One line: the triggers, the poisoned and cover rows, and the poisoned share of each target class, if they are few."""
    poisoned = arrays["role"] == storage.POISON
    after = labels.copy()
    after[arrays["rows"]] = arrays["labels_after"]
    names = " and ".join(trigger["name"] for trigger in attacks.triggers(spec))
    if not names:  # "0 rows poisoned" would read as a verdict on a user's own data
        return f"no trigger: {len(labels)} rows, left as they are"
    attack = "" if spec.attack == "all_to_one" else f", {spec.attack}"
    text = f"{names}{attack}: {poisoned.sum()} of {len(labels)} rows poisoned"
    if not poisoned.all():
        text += f", {(~poisoned).sum()} cover rows"
    targets = np.unique(arrays["target"][poisoned])
    for target in targets if len(targets) <= 2 else ():
        text += f", {(arrays['target'] == target).sum() / (after == target).sum():.0%} of class {target}"
    return text


def check_test_images(goals: np.ndarray, poison: params.Poison, labels: np.ndarray, names: list[str]) -> None:
    """Refuse, before anything is trained, test labels (M,) with which a goal (T, C) cannot be measured. With no test images
    at all a defense can still be run: that is said only."""
    targets = [getattr(poison, key) for key in ("target_label", "second_target_label") if hasattr(poison, key)]
    if not len(goals):
        return
    if not len(labels):
        print("no test images: clean accuracy and ASR cannot be measured, and `evaluate` will refuse")
        return
    for wanted in goals:
        if not (wanted[labels] >= 0).any():
            text = ", ".join(names[c] for c in np.flatnonzero(wanted >= 0)[:5])
            raise UserError(f"no test image by which the ASR could be measured: add some of class {text}")
    absent = [names[target] for target in targets if target not in labels]
    if absent:
        raise UserError(f"no test image of the target class {absent[0]}: add some, or choose another target")


def main(args) -> None:
    def parameters():
        return params.setting(args.params, args.setting).poison

    spec = parameters()
    truth = args.truth or (args.export_folder and args.export_folder.with_name(f"{args.export_folder.name}-truth.csv"))
    if args.export_folder:
        export_folder.check_target(args.export_folder, truth)
    with stage.Outputs([args.out], [args.data], parameters, args.resources) as temporary:
        with storage.open_(args.data, "dataset") as file:
            labels, shape = file["train/labels"][:], file["train/images"].shape[1:]
            test_labels, names = file["test/labels"][:], json.loads(file.attrs["class_names"])
        arrays = attacks.plan(labels, len(names), spec, args.seed)
        check_test_images(arrays["goals"], spec, test_labels, names)
        options = attacks.triggers(spec)
        pictures = [triggers.picture(trigger, shape) for trigger in options]
        for trigger, picture in zip(options, pictures, strict=True):
            triggers.make(trigger, picture)  # refuses what does not fit the images, before anything is trained
        attributes = {
            "n": len(labels),
            "attack": spec.attack,
            "triggers": json.dumps(options),
            "poison_fraction": np.nan if spec.poison_fraction is None else spec.poison_fraction,
            "data": storage.digest(args.data),
        }
        arrays["pictures"] = np.array(pictures, np.uint8).reshape(-1, *shape)
        with stage.naming(args.out):
            storage.write(temporary[args.out], "poison_index", arrays, attributes)
    print(summary(spec, labels, arrays))
    if args.export_folder:
        n_files = export_folder.export(args.data, args.out, args.export_folder, truth)
        print(f"{n_files} images in {args.export_folder}, and which are poisoned in {truth}")


if __name__ == "__main__":
    options = stage.parser("poison", __doc__)
    stage.add_setting(options)
    stage.add_seed(options)
    options.add_argument("--data", type=Path, required=True, help="output of prepare")
    options.add_argument("--out", type=Path, required=True, help="HDF5 file to write")
    options.add_argument("--export-folder", type=Path, help="also write the poisoned images to this new folder, as PNG")
    options.add_argument(
        "--truth", type=Path, help="CSV file for what was done; default: beside the folder, -truth.csv"
    )
    stage.add_resources(options)
    stage.run(main, options)
