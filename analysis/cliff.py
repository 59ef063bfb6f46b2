"""The cliff: attack success after retraining as a function of the poisoned rows that a filter has left in.

    dvc repro analysis/dvc.yaml:cliff                          # the setting and seed of params.yaml
    python -m analysis.cliff export --setting quick --seed 42  # ... and its curve into results/

The filter is the oracle's with k poisoned rows put back, the first k of one order drawn with the seed, so that each point
holds the rows of the one before. No clean row is lost: what remains of the attack at recall 1 - k / n_poison, and so how
much recall is enough. k = 0 is the oracle filter's model and k = n_poison the victim; they are taken from there.
"""

import argparse
import dataclasses
import json
import shlex
from pathlib import Path

import numpy as np

from analysis.files import write_whole
from analysis.tasks import Runner, Task, current_commit, tasks_of
from stages.lib import checkpoints, device, metrics, params, runtime, stage, storage
from stages.lib.errors import UserError
from stages.lib.poisoning import PoisonedData, open_poisoned
from stages.lib.seeds import stream

SCHEMA_VERSION = 1
PER_DECADE, DECADES = 2, 2  # between 1 % and all of the poison
WORK = Path(".scratch/cliff")  # models of the points: no outputs of DVC, which deletes those before a stage runs


def default_counts(n_poison: int) -> list[int]:
    """0, all, and between them a geometric row down to 1 % of the poison."""
    between = [round(n_poison * 10 ** (-step / PER_DECADE)) for step in range(1, PER_DECADE * DECADES + 1)]
    return sorted({0, n_poison, *(max(1, count) for count in between)})


def kept_rows(poisoned: np.ndarray, left: int, seed: int) -> np.ndarray:
    """Rows to train on, rising: all clean rows and the first `left` poisoned ones of the seed's order.

    poisoned: (N,) bool. The sets are nested in `left`.
    """
    order = np.random.default_rng(stream(seed, "cliff")).permutation(np.flatnonzero(poisoned))
    return np.sort(np.concatenate([np.flatnonzero(~poisoned), order[:left]]))


def chosen_counts(asked: list[int] | None, n_poison: int) -> list[int]:
    if n_poison == 0:
        raise UserError("nothing is poisoned in this setting, so there is no cliff; choose one with a trigger")
    counts = default_counts(n_poison) if asked is None else sorted(set(asked))
    for count in counts:
        if not 0 <= count <= n_poison:
            raise UserError(f"--poison-left {count}: there are {n_poison} poisoned rows; expected 0 to {n_poison}")
    return counts


def train(args, counts: list[int], poisoned: PoisonedData, index_digest: str) -> dict[int, Path]:
    """A checkpoint for each count, trained by `stages.train`; one made from the same files is taken as it is."""
    cell = args.setting, next(iter(params.read(args.params)["defenses"])), args.seed
    like = next(task for task in tasks_of([cell], args.params).values() if task.name == "retrain_oracle")
    modules = [path for path in like.deps if path.suffix == ".py"]
    folder = WORK / args.setting / f"seed{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    tasks, models = {}, {}
    for count in counts:
        kept, models[count] = folder / f"left{count}.h5", folder / f"left{count}.pt"
        rows = kept_rows(poisoned.index.poisoned, count, args.seed)
        storage.write(kept, "kept_rows", {"rows": rows}, {"n": poisoned.index.n, "index": index_digest})
        command = shlex.join(map(str, (
            "python", "-m", "stages.train", "--params", args.params, "--setting", args.setting, "--seed", args.seed,
            "--data", args.data, "--index", args.index, "--rows", kept, "--out", models[count],
        )))  # fmt: skip
        deps = [args.data, args.index, kept, *modules]
        tasks[command] = Task("train", command, deps, [models[count]], like.parameters)
    outcome = Runner(args.jobs, float("inf")).run(tasks)
    if bad := [tasks[command].outs[0].stem for command, how in outcome.items() if how not in ("done", "ran")]:
        raise UserError(f"the training of {', '.join(bad)} failed (see above); nothing was written")
    return models


def one_runtime(found: list[dict]) -> dict:
    """How the models were trained; where they differ, the different values in a list."""
    merged = {}
    for key in found[0]:
        values = list(dict.fromkeys(one[key] for one in found))
        merged[key] = values[0] if len(values) == 1 else values
    return merged


def measure(args) -> None:
    def parameters():
        return params.setting(args.params, args.setting)

    parameters()
    inputs = [args.data, args.index, *(path for path in (args.victim, args.oracle) if path)]
    with stage.Outputs([args.out], inputs, parameters, args.resources) as temporary:
        poisoned = open_poisoned(args.data, args.index)
        digests = storage.digest(args.data), storage.digest(args.index)
        n_poison = int(poisoned.index.poisoned.sum())
        counts = chosen_counts(args.poison_left, n_poison)
        models = {count: path for count, path in ((0, args.oracle), (n_poison, args.victim)) if path}
        models |= train(args, [count for count in counts if count not in models], poisoned, digests[1])
        where = device.decide(runtime.load()).device
        points, runtimes = [], []
        for count in counts:
            checkpoint = checkpoints.load_for(models[count], args.data, args.index, digests)
            rows = storage.digest_array(kept_rows(poisoned.index.poisoned, count, args.seed))
            if checkpoint.conditions["rows"] != rows:
                raise UserError(
                    f"{models[count]} was not trained with {count} poisoned rows left in; give the right file"
                )
            if checkpoint.conditions["recipe"] != dataclasses.asdict(parameters().train):
                raise UserError(
                    f"{models[count]} was trained by another recipe than that of {args.params}; train it again"
                )
            found = metrics.of_model(checkpoint, poisoned, where)
            points.append(
                {
                    "poison_left": count,
                    "share_left": count / n_poison,
                    "asr": found["asr"],
                    "clean_acc": found["clean_acc"],
                }
            )
            runtimes.append(checkpoint.conditions["runtime"])
            print(f"{count:>6} of {n_poison} left: ASR {found['asr']:.4f}, clean accuracy {found['clean_acc']:.4f}")
        about = {
            "schema_version": SCHEMA_VERSION,
            "setting": args.setting,
            "seed": args.seed,
            "n_poison": n_poison,
            "points": points,
            "runtime": one_runtime(runtimes),
            "parameters": {"setting": params.read(args.params)["settings"][args.setting]},
        }
        temporary[args.out].write_text(json.dumps(about, indent=1) + "\n")


def export(args) -> None:
    """`<out>/<setting>/cliff/seed<k>.json` from what the stage has written."""
    made = Path("artifacts") / args.setting / f"seed{args.seed}" / "cliff.json"
    params.setting(args.params, args.setting)
    try:
        found = json.loads(made.read_text())
        conditions = {name: found.pop(name) for name in ("runtime", "parameters")}
        setting = conditions["parameters"]["setting"]
    except FileNotFoundError as error:
        raise UserError(f"{made} is not there; make it with `dvc repro analysis/dvc.yaml:cliff`") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{made} is damaged; make it again with `dvc repro analysis/dvc.yaml:cliff`") from error
    if setting != params.read(args.params)["settings"][args.setting]:
        raise UserError(f"{made} was made with other parameters than those of {args.params}; make it again")
    found["conditions"] = {"commit": current_commit()} | conditions
    path = args.out / args.setting / "cliff" / f"seed{args.seed}.json"
    write_whole(path, json.dumps(found, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    options = argparse.ArgumentParser(prog="python -m analysis.cliff", description=__doc__.partition("\n")[0])
    verbs = options.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("measure", help="train the points and measure them: the stage `cliff`")
    stage.add_setting(make)
    stage.add_seed(make)
    make.add_argument("--data", type=Path, required=True, help="output of prepare")
    make.add_argument("--index", type=Path, required=True, help="output of poison")
    make.add_argument("--victim", type=Path, help="the model with all the poison; trained if it is not given")
    make.add_argument("--oracle", type=Path, help="the model with none of it; trained if it is not given")
    make.add_argument("--poison-left", type=int, nargs="+", help="poisoned rows left in; default: 0, 1 %% to 100 %%")
    make.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    make.add_argument("--out", type=Path, required=True, help="JSON file to write")
    stage.add_resources(make)
    write = verbs.add_parser("export", help="write the curve to results/")
    stage.add_setting(write)
    stage.add_seed(write)
    write.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON files")
    stage.run(lambda args: (measure if args.verb == "measure" else export)(args), options)
