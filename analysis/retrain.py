"""Train again on the rows that an audit kept, and compare the clean accuracy of both models on the test split."""

import argparse
import json
from pathlib import Path

from analysis.pictures import FromDataset
from stages import train
from stages.lib import checkpoints, device, metrics, runtime, stage, storage
from stages.lib.errors import UserError
from stages.lib.poisoning import open_poisoned

NO_TEST_IMAGES = (
    "no test images to compare the models on: add a test folder (test_images to an archive), or set "
    "settings.own.data.test_fraction"
)


def main(args) -> None:
    inputs = [args.data, args.index, args.model, args.kept]
    with stage.Outputs([args.accuracy], inputs) as temporary:
        poisoned = open_poisoned(args.data, args.index)
        digests = storage.digest(args.data), storage.digest(args.index)
        before = checkpoints.load_for(args.model, args.data, args.index, digests)
        n_test = len(poisoned.test().labels)
        if not n_test:
            raise UserError(NO_TEST_IMAGES)
        args.rows = str(args.kept)
        train.main(args)
        where = device.decide(runtime.load()).device
        held_out = FromDataset(args.data).n_held_out
        found = {
            "n_test": n_test,
            "n_test_held_out_of_the_audited": held_out,
            "n_train": poisoned.index.n,
            "n_kept": checkpoints.load(args.out).conditions["n_rows"],
            "clean_acc_all_rows": metrics.of_model(before, poisoned, where)["clean_acc"],
            "clean_acc_kept_rows": metrics.of_model(checkpoints.load(args.out), poisoned, where)["clean_acc"],
        }
        temporary[args.accuracy].write_text(json.dumps(found, indent=1) + "\n")
    print(comparison(found))


def comparison(found: dict) -> str:
    """The content of `--accuracy` in words."""
    words = (
        f"accuracy on {found['n_test']} test images: {found['clean_acc_all_rows']:.4f} trained on all {found['n_train']} rows, "
        f"{found['clean_acc_kept_rows']:.4f} on the {found['n_kept']} kept"
    )
    if found["n_test_held_out_of_the_audited"]:
        words += (
            "\nThese test images were held out of the same set and not audited: if it is poisoned, so are they, and a model "
            "that obeys the trigger is right about those. Clean test images in a folder of their own tell more."
        )
    return words


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m analysis.retrain", description=__doc__)
    stage.add_setting(options)
    stage.add_seed(options)
    options.add_argument("--data", type=Path, required=True, help="output of prepare")
    options.add_argument("--index", type=Path, required=True, help="output of poison")
    options.add_argument("--model", type=Path, required=True, help="checkpoint trained on all rows")
    options.add_argument("--kept", type=Path, required=True, help="kept.h5 of the audit")
    options.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    options.add_argument("--accuracy", type=Path, required=True, help="JSON file to write")
    stage.add_resources(options)
    return options


if __name__ == "__main__":
    stage.run(main, parser())
