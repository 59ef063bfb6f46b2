"""What a sweep on Ray costs beside its stages: a grid in a fresh clone of HEAD with an empty cache, on this machine.

    python -m benchmarks.sweep [--setting quick --defenses A B C D --seeds 1 2 3 4 5 --out FOLDER]

Prints as JSON the seconds of the tasks (from the sweep's lines), of all stage commands and of the trainings alone (each a
whole process, from its own record in the results), what the tasks add to the stages per cell, and, on a cluster that is
warm, the time from starting the command to the first stage of one more seed.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAININGS = ("victim", "oracle", "retrained")
OF_THE_CELL = ("score", "filter", "retrained", "evaluate")


def sweep(clone: Path, words: list[str], **environment) -> subprocess.Popen:
    command = [sys.executable, "-m", "sweep", *words]
    return subprocess.Popen(command, cwd=clone, stdout=subprocess.PIPE, text=True, env=os.environ | environment)


def stage_seconds(folder: Path) -> tuple[float, float]:
    """Of all stage commands, and of the trainings among them; what cells share counts once."""
    once = {}
    for path in folder.glob("*/*/seed*.json"):
        found = json.loads(path.read_text())
        for name, used in found["resources"].items():
            key = (found["setting"], found["seed"]) if name != "prepare" else (found["setting"],)
            once[*key, found["defense"] if name in OF_THE_CELL else "", name] = used["seconds"]
    return sum(once.values()), sum(seconds for key, seconds in once.items() if key[-1] in TRAININGS)


def first_stage(clone: Path, words: list[str], folder: Path) -> float:
    """Seconds from the start of the command to that of its first stage, on a cluster with a worker process that is warm."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "env_vars": {"TMPDIR": str(folder)}})
    try:
        sweep(clone, [*words, "--again", "--address", cluster.address]).communicate()
        started = time.perf_counter()
        process = sweep(clone, [*words[:-1], "1000", "--address", cluster.address])
        while not any("Running stage" in path.read_text() for path in folder.glob("sweep-*/.dvc/tmp/sweep.log")):
            if process.poll() is not None:
                sys.exit("benchmarks.sweep: the sweep ended before a stage began")
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        process.terminate()  # Ctrl-C is ignored by what a shell has put into the background
        process.communicate()
        return seconds
    finally:
        cluster.shutdown()


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.partition("\n")[0])
    options.add_argument("--setting", default="quick")
    options.add_argument("--defenses", nargs="+",
                         default=["random_filter", "confidence_filter", "self_confidence", "whitened_mixture"])  # fmt: skip
    options.add_argument("--seeds", nargs="+", default=["1", "2", "3", "4", "5"])
    options.add_argument("--cpus-per-training", default="1")
    options.add_argument("--out", type=Path, help="folder to keep the results in")
    args = options.parse_args()
    if args.out and args.out.exists():
        sys.exit(f"benchmarks.sweep: {args.out} is there, and cells that it holds would not run; give a new folder")
    with tempfile.TemporaryDirectory() as name:
        clone, results = Path(name) / "clone", (args.out or Path(name) / "results").resolve()
        subprocess.run(["git", "clone", "--quiet", ".", str(clone)], check=True)
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=clone, text=True).strip()
        words = ["--settings", args.setting, "--out", str(results), "--cpus-per-training", args.cpus_per_training]
        started = time.perf_counter()
        process = sweep(clone, [*words, "--defenses", *args.defenses, "--seeds", *args.seeds])
        output = ""
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            output += line
        process.wait()
        wall = time.perf_counter() - started
        if process.returncode:
            sys.exit("benchmarks.sweep: the sweep failed")
        tasks = sum(map(float, re.findall(r"^done .* (\d+) s on ", output, re.MULTILINE)))
        stages, trainings = stage_seconds(results)
        cells = len(args.defenses) * len(args.seeds)
        (folder := Path(name) / "tmp").mkdir()
        one = [*words, "--defenses", args.defenses[0], "--seeds", args.seeds[0]]
        print(json.dumps({
            "setting": args.setting, "cells": cells, "commit": commit, "cores": os.cpu_count(),
            "wall_seconds": round(wall, 1), "task_seconds": tasks, "stage_seconds": round(stages, 1),
            "training_seconds": round(trainings, 1),
            "added_seconds_a_cell": round((tasks - stages) / cells, 2),
            "share_of_trainings": round((tasks - stages) / trainings, 4),
            "share_of_trainings_with_other_stages": round(tasks / trainings - 1, 4),
            "first_stage_seconds": round(first_stage(clone, one, folder), 2),
            "date": time.strftime("%Y-%m-%d", time.gmtime()), "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("dvc", "ray", "torch")},
        }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
