"""Run every defense over a stored set of dumps: recall at the budget, AUROC, ranks, seconds, and what a dump allows.

    python -m analysis.proving_ground --make --time-limit 3000      # train the victims that are missing
    python -m analysis.proving_ground                               # every defense on all dumps that are there
    python -m analysis.proving_ground --defenses whitened_mixture --modes told hidden blind hidden_blind --ablation

`analysis/dumps.yaml` lists the dumps (attack x network x rate x target composition x seed) and says which ones choices
are made on (`development`) and which ones are only reported (`report`); the two are never averaged together. The limit
of a dump is its supervised ceiling: the recall of a logistic regression on the truth, within the poisoned classes, out of
fold. Everything goes to `results/proving_ground/` as one JSON per dump, from which `analysis.proving_tables` makes a page;
what is there for the same dump, the same defense file and the same options is not computed again.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import defenses
from analysis.files import write_whole
from analysis.made_with import difference
from analysis.proving_tables import table, version_of
from stages.lib import checkpoints, device, metrics, params, poisoning, runtime, storage
from stages.lib.errors import UserError
from stages.lib.seeds import stream

LIST = Path("analysis/dumps.yaml")
OUT = Path("results/proving_ground")
CEILING_C = (0.001, 0.01, 0.1)  # inverse strengths of the regression's penalty; the best one counts
MODES = {  # what a defense is told: the poison fraction, and whether classes are about equally large
    "told": (True, {}),
    "hidden": (True, {"use_class_sizes": False}),
    "blind": (False, {}),
    "hidden_blind": (False, {"use_class_sizes": False}),
}


def _own_directions(white: np.ndarray, share: float, most: int) -> np.ndarray:
    """Instead of `_class_coordinates` of whitened_mixture: a class along its own principal directions, not compared with
    the other classes, on one scale."""
    _, sizes, directions = np.linalg.svd(white, full_matrices=False)
    return white @ directions[:most].T / (sizes[0] / np.sqrt(len(white)) + 1e-12) * 3


# One ingredient of whitened_mixture off at a time: other values for the names of its module.
ABLATIONS: dict[str, dict] = {
    "not compared with other classes": {"_class_coordinates": _own_directions},
    "Gaussian components": {"_DEGREES": 1e6},
    "8 directions": {"_DIRECTIONS": 8},
    "one split a class": {"_CANDIDATES": 1, "_CANDIDATES_TOLD": 1},
    "halves not split again": {"_MIN_HALF": 10**12},
    "parts of halves near to the rest too": {"_AWAY": 1.0},
    "one component a half": {"_FINER": ()},
    "numbers of components weigh the same": {"_COUNT_ERROR": 1e9},
    "no distinctness": {"_WEIGHTS": {"distinct": 0.0}},
    "no discriminant": {"_discriminated": lambda values, log_odds, expected: log_odds},
    "best hypothesis alone": {"_NEGLIGIBLE": -1e-9},
    "no oddness": {"_WEIGHTS": {"oddness": 0.0}},
    "alike rows are odd too": {"_LEAST_Z": [-np.inf] * 10},
    "no traces of other classes": {"_SAMPLING": [0.0] * 8 + [1e18] * 2},  # infinite variance
    "no separation": {"_WEIGHTS": {"separation": 0.0}},
    "no held-out gain": {"_WEIGHTS": {"held_out": 0.0}},
    "no likelihood within the class": {"_WEIGHTS": {"likelihood": 0.0}},
}


@dataclass(frozen=True)
class Dump:
    """One victim's features. `change`: dotted keys of the setting with other values; such a dump has a name of its own."""

    name: str
    setting: str
    seed: int
    use: str
    change: tuple[tuple[str, object], ...] = ()

    @property
    def folder(self) -> Path:
        """Where the pipeline keeps the same thing, if nothing is changed: a victim is trained once."""
        root = Path("artifacts") if not self.change else Path("artifacts/dumps")
        return root / self.name / f"seed{self.seed}"

    @property
    def data(self) -> Path:
        return self.folder.parent / "data.h5"


def listed(path: Path = LIST) -> list[Dump]:
    """The dumps of the list, each once, development and report apart."""
    try:
        entries = yaml.safe_load(path.read_text())
        found = [
            Dump(
                entry.get("name", entry["setting"]),
                entry["setting"],
                int(seed),
                use,
                tuple(entry.get("change", {}).items()),
            )
            for entry in entries
            for use in ("development", "report")
            for seed in entry.get(use, [])
        ]
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; run from the folder of the checkout, or give --list") from error
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path}: expected a list of blocks with setting, development and report (seeds), name and change; {error!r}"
        ) from error
    places = [dump.folder for dump in found]
    twice = {str(place) for place in places if places.count(place) > 1}
    if twice:
        raise UserError(
            f"{path}: {', '.join(sorted(twice))} listed twice; development and report must not share a dump"
        )
    return found


def parameters(dump: Dump) -> Path:
    """The file with the dump's setting: params.yaml, or one that is written beside the dump where something is changed.

    `UserError` where that file was written for another list, so that what lies there was made otherwise.
    """
    if not dump.change:
        return Path("params.yaml")
    values = params.read(Path("params.yaml"))
    params.setting(Path("params.yaml"), dump.setting)
    block = values["settings"][dump.setting]
    for key, value in dump.change:
        *parents, last = key.split(".")
        part = block
        try:
            for word in parents:
                part = part[word]
            part[last] = value
        except (KeyError, TypeError) as error:
            raise UserError(f"dump {dump.name}: setting {dump.setting} has no block {'.'.join(parents)}") from error
    path = dump.folder.parent / "params.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(yaml.safe_dump({**values, "settings": {dump.setting: block}}))
    try:
        wanted = params.setting(temporary, dump.setting)
        if path.exists() and params.setting(path, dump.setting) != wanted:
            raise UserError(f"{path.parent} was made with other parameters than it has now; delete that folder")
    except UserError as error:
        temporary.unlink()
        raise UserError(f"dump {dump.name}: {error}") from error
    os.replace(temporary, path)
    return path


def check(dump: Dump, models: Iterable[checkpoints.Checkpoint] = ()) -> None:
    """`UserError` if what is there was not made as the list and params.yaml say."""
    setting = params.setting(parameters(dump), dump.setting)
    if other := difference(setting, dump.seed, dump.data, dump.folder / "poison.h5", models):
        raise UserError(f"{dump.folder} is not what {dump.name} is now: {other}; delete that folder")


def make(dump: Dump, deadline: float) -> None:
    """Train the victim and extract its features by the plain stage commands, unless they are there."""
    settings = parameters(dump)
    dump.folder.mkdir(parents=True, exist_ok=True)
    data, index, victim = dump.data, dump.folder / "poison.h5", dump.folder / "victim.pt"
    of, seed = ["--params", settings, "--setting", dump.setting], ["--seed", dump.seed]
    both = ["--data", data, "--index", index]
    steps = (
        (data, ["prepare", *of, "--out", data]),
        (index, ["poison", *of, *seed, "--data", data, "--out", index]),
        (
            victim,
            ["train", *of, *seed, *both, "--rows", "all", "--out", victim, "--resources", dump.folder / "victim.json"],
        ),
        (dump.folder / "features.h5", ["extract", *both, "--checkpoint", victim, "--out", dump.folder / "features.h5"]),
    )
    for out, (stage, *arguments) in steps:
        if not out.exists():
            if stage == "train":
                check(dump)
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            command = [sys.executable, "-m", f"stages.{stage}", *map(str, arguments)]
            done = subprocess.run(
                command, timeout=None if left == float("inf") else left, capture_output=True, text=True
            )
            if done.returncode:
                raise UserError(f"{dump.name} seed {dump.seed}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")


def undefended(dump: Dump, checkpoint: checkpoints.Checkpoint) -> dict:
    """Clean accuracy and attack success of the victim: on an attack that did not take, a low recall is no failure."""
    poisoned = poisoning.open_poisoned(dump.data, dump.folder / "poison.h5")
    found = metrics.of_model(checkpoint, poisoned, device.decide(runtime.load()).device)
    return {key: value for key, value in found.items() if isinstance(value, float)}


def ceiling(features, logits, labels, poisoned) -> float | None:
    """Recall at the exact budget of a supervised rule, out of 5 folds: logistic regression on features and logits of the
    rows that carry a label which any poisoned row carries. None where there is nothing to learn from."""
    inside = np.isin(labels, np.unique(labels[poisoned]))
    truth = poisoned[inside]
    if min(truth.sum(), (~truth).sum()) < 5:
        return None
    table = np.hstack([features[inside], logits[inside]])
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    best = 0.0
    for strength in CEILING_C:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        values = cross_val_predict(model, table, truth, cv=folds, method="decision_function")
        best = max(best, recall_at_budget(values, truth))
    return best


def recall_at_budget(scores: np.ndarray, poisoned: np.ndarray) -> float:
    """Share of the poison among as many highest-scored rows as there are poisoned ones; ties by index."""
    budget = int(poisoned.sum())
    return float(poisoned[np.argsort(-scores, kind="stable")[:budget]].sum() / budget)


def judge(scores: np.ndarray, labels: np.ndarray, poisoned: np.ndarray, n_suspected: int | None) -> dict:
    """Recall at the budget, AUROC, AUROC within the poisoned classes (which shows a ranking that found the class and took
    the wrong half); where the method decides for itself, its own cut's recall and precision."""
    found: dict[str, float | int] = {}
    if poisoned.any():
        inside = np.isin(labels, np.unique(labels[poisoned]))
        found["recall"] = recall_at_budget(scores, poisoned)
        found["auroc"] = float(roc_auc_score(poisoned, scores))
        if not poisoned[inside].all():
            found["class_auroc"] = float(roc_auc_score(poisoned[inside], scores[inside]))
    if n_suspected is not None:
        found["n_suspected"] = int(n_suspected)
        if poisoned.any():
            hits = int(poisoned[np.argsort(-scores, kind="stable")[:n_suspected]].sum())
            found["cut_recall"] = hits / int(poisoned.sum())
            found["cut_precision"] = hits / max(int(n_suspected), 1)
    return found


def run_one(name: str, mode: str, dump: Dump, arrays, constants: dict | None = None) -> dict:
    """Score one dump with one defense in one mode; that it needs what the mode hides is recorded. `DefenseError` if it
    fails."""
    features, logits, labels, poisoned = arrays
    told, options = MODES[mode]
    fraction = poisoned.mean() if told and poisoned.any() else None
    started = time.monotonic()
    try:
        defense = defenses.load(name, **options)
    except defenses.DefenseError as error:  # without options `main` has loaded it
        return {"refused": str(error)}
    needs = defenses.relies_on(defense)
    if fraction is None and (needs is None or "poison_fraction" in needs):
        return {"refused": "relies on poison_fraction"}
    module = sys.modules[type(defense).__module__]
    for constant, value in (constants or {}).items():
        before = getattr(module, constant)
        setattr(module, constant, {**before, **value} if isinstance(before, dict) else value)
    seed = stream(dump.seed, "defense") % 2**32
    scores = defenses.score(defense, features, logits, labels, fraction, seed=seed, n_classes=logits.shape[1])
    found = judge(scores, labels, poisoned, getattr(defense, "n_suspected_", None))
    return found | {"seconds": round(time.monotonic() - started, 2)}


def read(dump: Dump):
    """Features, logits, labels and truth of a dump, and its victim; `UserError` if they do not belong together, or were
    not made as the list says."""
    data, index, victim = dump.data, dump.folder / "poison.h5", dump.folder / "victim.pt"
    checkpoint = checkpoints.load_for(victim, data, index, (storage.digest(data), storage.digest(index)))
    check(dump, [checkpoint])
    with storage.open_(dump.folder / "features.h5", "features") as file:
        for what, path in (("index", index), ("checkpoint", victim)):
            storage.must_match(what, dump.folder / "features.h5", file.attrs.get(what, ""), path)
        features, logits, labels = (file[name][:].astype(kind) for name, kind in
                                    (("features", "float32"), ("logits", "float32"), ("labels", "int64")))  # fmt: skip
    return (features, logits, labels, poisoning.read_index(index).poisoned), checkpoint


def load_record(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("no mapping")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); take it back from git, or delete it") from error
    return found


def record(dump: Dump, jobs: list[tuple[str, str, str | None]], out: Path) -> tuple[dict, int]:
    """Everything known of one dump, computing what is missing, written after each defense; and how many failed."""
    path = out / dump.use / dump.name / f"seed{dump.seed}.json"
    digest = storage.digest(dump.folder / "features.h5")
    found, failed = load_record(path), 0
    if found.get("features") != digest:
        if found.get("scored"):
            raise UserError(
                f"{path} holds the figures of another victim; delete it, or give another --out, to have those of {dump.folder}"
            )
        found = {"features": digest, "dump": dump.name, "seed": dump.seed, "use": dump.use, "scored": {}}
    arrays, checkpoint = read(dump)
    poisoned = arrays[3]
    if "n" not in found:
        found |= {"n": len(poisoned), "n_poisoned": int(poisoned.sum()), "undefended": undefended(dump, checkpoint)}
        found["runtime"] = checkpoint.conditions["runtime"]
        inside = np.isin(arrays[2], np.unique(arrays[2][poisoned]))
        found["share_of_class"] = float(poisoned.sum() / inside.sum()) if poisoned.any() else 0.0
        found["ceiling"] = ceiling(*arrays) if poisoned.any() else None
    for name, mode, ablation in jobs:
        changes = json.dumps(ABLATIONS.get(ablation, {}), default=inspect.getsource)
        version = version_of(file_of(name), changes)
        key = key_of(name, mode, ablation)
        if found["scored"].get(key, {}).get("version") == version:
            continue
        try:
            result = run_one(name, mode, dump, arrays, ABLATIONS.get(ablation))
        except defenses.DefenseError as error:
            print(f"{dump.name} seed {dump.seed}: {key}: failed, not recorded: {error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        found["scored"][key] = {"version": version, "file": version_of(file_of(name)), **result}
        print(f"{dump.name} seed {dump.seed}: {key}: " + _line(result), flush=True)
        write_whole(path, json.dumps(found, indent=1, sort_keys=True) + "\n")
    return found, failed


def file_of(name: str) -> Path:
    return Path(name) if name.endswith(".py") else Path(defenses.__file__).with_name(f"{name}.py")


def key_of(name: str, mode: str, ablation: str | None) -> str:
    """Of a record: a defense of this project by its name, one from elsewhere by its path."""
    own = file_of(name).resolve().parent == Path(defenses.__file__).parent
    return " / ".join(filter(None, (Path(name).stem if own else name, mode, ablation)))


def _line(result: dict) -> str:
    if "refused" in result:
        return "refused"
    return ", ".join(f"{key} {value:.4g}" for key, value in result.items())


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m analysis.proving_ground", description=__doc__.partition("\n")[0])
    options.add_argument("--list", type=Path, default=LIST, help="YAML list of the dumps")
    options.add_argument("--use", choices=("development", "report"), help="only these dumps")
    options.add_argument("--dumps", nargs="+", help="only dumps whose name holds one of these words")
    options.add_argument("--defenses", nargs="+", default=defenses.available(), help="names, or paths of .py files")
    options.add_argument("--modes", nargs="+", choices=list(MODES), default=["told"], help="what a defense is told")
    options.add_argument(
        "--ablation", action="store_true", help="also one ingredient of whitened_mixture off at a time"
    )
    options.add_argument("--make", action="store_true", help="train victims that are missing")
    options.add_argument(
        "--time-limit", type=float, default=float("inf"), help="seconds for --make; the rest next time"
    )
    options.add_argument(
        "--figure", nargs="+", default=["recall", "class_auroc", "seconds"], help="which tables to print"
    )
    options.add_argument("--out", type=Path, default=OUT, help="folder of the JSON files")
    args = options.parse_args()
    try:
        for name in args.defenses:
            defenses.load(name)
        dumps = [dump for dump in listed(args.list) if args.use in (None, dump.use)]
        dumps = [dump for dump in dumps if not args.dumps or any(word in dump.name for word in args.dumps)]
        if not dumps:
            raise UserError(
                f"no dump of {args.list} fits; known: {', '.join(sorted({d.name for d in listed(args.list)}))}"
            )
        deadline = time.monotonic() + args.time_limit
        if args.make:
            for dump in dumps:
                make(dump, deadline)
        jobs = [(name, mode, None) for name in args.defenses for mode in args.modes]
        if args.ablation:
            jobs += [("whitened_mixture", mode, ablation) for ablation in ABLATIONS for mode in args.modes]
        there = [dump for dump in dumps if (dump.folder / "features.h5").exists()]
        if not there:
            raise UserError(f"none of these {len(dumps)} dumps is there; train their victims with --make")
        records, failed = [], 0
        for dump in there:
            try:
                found, failures = record(dump, jobs, args.out)
                records.append(found)
                failed += failures
            except UserError as error:
                print(f"{dump.name} seed {dump.seed}: left out: {error}", file=sys.stderr, flush=True)
                failed += 1
        keys = [key_of(*job) for job in jobs]
        for use in ("development", "report"):
            chosen = [found for found in records if found["use"] == use and found["n_poisoned"]]
            for figure in args.figure if chosen else ():
                print(f"\n{figure}, {use} dumps\n\n{table(chosen, keys, figure)}")
            clean = [found for found in records if found["use"] == use and not found["n_poisoned"]]
            if clean:
                print(f"\nrows suspected on clean data, {use} dumps\n\n{table(clean, keys, 'n_suspected')}")
        missing = [f"{dump.name} seed {dump.seed}" for dump in dumps if dump not in there]
        if missing:
            print(f"\nnot there (--make trains their victims): {', '.join(missing)}")
        if failed:
            return 1
    except TimeoutError:
        print("python -m analysis.proving_ground: the time is up; the same command goes on", file=sys.stderr)
        return 2
    except subprocess.TimeoutExpired:
        print(
            "python -m analysis.proving_ground: the time is up in a training; the same command resumes it",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    except (UserError, defenses.DefenseError) as error:
        print(f"python -m analysis.proving_ground: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
