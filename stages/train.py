"""train: train a network on all rows (the victim), on all but the poison (the oracle) or on the rows that were kept."""

import dataclasses
from pathlib import Path

import numpy as np

from stages.lib import checkpoints, device, models, params, runtime, stage, storage
from stages.lib.errors import UserError
from stages.lib.poisoning import PoisonedData, open_poisoned
from stages.lib.scratch import Scratch
from stages.lib.training import Architecture, Recipe, train

ALL, CLEAN = "all", "clean"


def choose_rows(rows: str, poisoned: PoisonedData, index_digest: str) -> np.ndarray:
    """Row numbers to train on, rising: `all`, `clean`, or those in a file of kept rows."""
    if rows == ALL:
        return np.arange(poisoned.index.n)
    if rows == CLEAN:
        return np.flatnonzero(~poisoned.index.poisoned)
    with storage.open_(Path(rows), "kept_rows") as file:
        kept, n, made_for = file["rows"][:], int(file.attrs["n"]), file.attrs["index"]
    if made_for != index_digest or n != poisoned.index.n:
        raise UserError(f"{rows} belongs to another poison index; make it again with `dvc repro filter`")
    if not len(kept):
        raise UserError(f"{rows}: the filter kept no row; lower filter.budget")
    return kept


def main(args) -> None:
    def parameters():
        setting = params.setting(args.params, args.setting)
        return setting.model, setting.train

    model, recipe = parameters()
    inputs = [args.data, args.index, *([Path(args.rows)] if args.rows not in (ALL, CLEAN) else [])]
    with stage.Outputs([args.out], inputs, parameters, args.resources) as temporary:
        poisoned = open_poisoned(args.data, args.index)
        data_digest, index_digest = storage.digest(args.data), storage.digest(args.index)
        rows = choose_rows(args.rows, poisoned, index_digest)
        training_set = poisoned.train()
        images, labels = training_set.images[rows], training_set.labels[rows]
        del training_set
        architecture = Architecture(model.network, poisoned.n_classes, poisoned.image_size, poisoned.mean, poisoned.std)
        # By all rows, not the kept ones: victim, oracle and retraining are compiled or not, all alike.
        steps = recipe.epochs * (poisoned.index.n // recipe.batch_size)
        work = device.Work(model.network, steps, recipe.batch_size * models.side_in_full(poisoned.image_size) ** 2)
        where = device.decide(runtime.load(), work)
        first = "victim" if poisoned.index.poisoned.any() else "model"  # of a folder that is audited nothing is known
        title = {ALL: first, CLEAN: "oracle"}.get(args.rows, "retrained")
        print(f"{title}: {model.network} on {len(rows)} rows, {recipe.epochs} epochs, {where}", flush=True)
        conditions = {
            "n_rows": len(rows),
            "rows": storage.digest_array(rows),
            "seed": args.seed,
            "recipe": dataclasses.asdict(recipe),
            "runtime": where.describe(),
            "data": data_digest,
            "index": index_digest,
        }
        what = conditions | {"architecture": dataclasses.asdict(architecture)}
        what |= {"images": storage.digest_array(images), "labels": storage.digest_array(labels)}
        with Scratch(what) as scratch:
            trained = train(images, labels, architecture, Recipe(**vars(recipe)), where, args.seed, title, scratch)
            conditions["collapses"] = trained.collapses
            checkpoint = checkpoints.Checkpoint(architecture, trained.state, trained.history, conditions)
            checkpoints.save(temporary[args.out], checkpoint)
    scratch.remove()


if __name__ == "__main__":
    options = stage.parser("train", __doc__)
    stage.add_setting(options)
    stage.add_seed(options)
    options.add_argument("--data", type=Path, required=True, help="output of prepare")
    options.add_argument("--index", type=Path, required=True, help="output of poison")
    options.add_argument("--rows", required=True, help="all, clean (all but the poison), or the output of filter")
    options.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    stage.add_resources(options)
    stage.run(main, options)
