"""Seconds and peak memory of scoring: every defense on 50,000 x 512, and the default from 10,000 to 1,000,000 x 2,048.

    python -m benchmarks.scoring                               # both tables
    python -m benchmarks.scoring --sizes 10000x2048x100        # rows x width x classes, whitened_mixture only

Features are made up (Gaussian classes, 5 % of the rows shifted and relabelled), float16 in an HDF5 file, and scored in a
process of their own, so that its peak memory is the defense's and the reader's. Recall is printed to show that the work
was done; on data this easy it says nothing else.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

import defenses

SIZE_OF_ALL = "50000x512x100"
SIZES = ("10000x2048x100", "100000x2048x100", "1000000x2048x100")
POISON = 0.05
OUT = Path(__file__).with_name("scoring.json")


def make(path: Path, rows: int, width: int, classes: int) -> None:
    """Write features, logits, labels and the truth; in blocks, since a million rows of 2,048 are 4 GB."""
    rng = np.random.default_rng(0)
    means = rng.normal(scale=0.5, size=(classes, width)).astype(np.float32)
    shift = means[0] * 0.7 + rng.normal(scale=0.6, size=width).astype(np.float32)
    true, poisoned = rng.integers(0, classes, rows), rng.random(rows) < POISON
    labels = np.where(poisoned, 0, true)
    with h5py.File(path, "w") as file:
        features = file.create_dataset("features", (rows, width), "f2", chunks=(1024, width))
        logits = file.create_dataset("logits", (rows, classes), "f2", chunks=(1024, classes))
        for start in range(0, rows, 65536):
            block = slice(start, min(start + 65536, rows))
            of, here = true[block], poisoned[block, None]
            x = means[of] * np.where(here, np.float32(0.3), np.float32(1)) + here * shift
            x += rng.standard_normal(x.shape, dtype=np.float32)
            features[block] = x
            logits[block] = x @ means.T / np.sqrt(width) + 5 * np.eye(classes, dtype=np.float32)[labels[block]]
        file["labels"], file["poisoned"] = labels, poisoned


def measure(path: Path, name: str) -> dict:
    """In this process: score the file with one defense."""
    with h5py.File(path) as file:
        labels, poisoned = file["labels"][:], file["poisoned"][:]
        defense = defenses.load(name)
        started = time.perf_counter()
        scores = defenses.score(defense, file["features"], file["logits"], labels, float(poisoned.mean()), seed=0)
        seconds = time.perf_counter() - started
    found = poisoned[np.argsort(-scores, kind="stable")[: poisoned.sum()]].mean()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    return {"seconds": round(seconds, 2), "peak_memory_mb": round(peak), "recall": round(float(found), 4)}


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description=__doc__.partition("\n")[0])
    options.add_argument("--sizes", nargs="*", default=SIZES, help="rows x width x classes, for whitened_mixture")
    options.add_argument("--defenses", nargs="*", default=defenses.available(), help=f"on {SIZE_OF_ALL}")
    options.add_argument("--folder", type=Path, help="where the features are put (5 GB for a million rows)")
    options.add_argument("--out", type=Path, default=OUT)
    options.add_argument("--measure", nargs=2, metavar=("FILE", "DEFENSE"), help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1])))
        return 0
    from analysis.tasks import current_commit  # not in the process that is measured

    jobs = [(SIZE_OF_ALL, name) for name in args.defenses] + [(size, "whitened_mixture") for size in args.sizes]
    found = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for size, name in jobs:
            path = Path(folder) / f"{size}.h5"
            if not path.exists():
                for old in Path(folder).glob("*.h5"):
                    old.unlink()
                make(path, *(int(number) for number in size.split("x")))
            command = [sys.executable, "-m", "benchmarks.scoring", "--measure", str(path), name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
                print(f"{size} {name}: {reason}", file=sys.stderr)
                return 1
            found.append({"size": size, "defense": name} | json.loads(done.stdout))
            row = found[-1]
            print(
                f"{size:>18} {name:<24}{row['seconds']:>9.1f} s{row['peak_memory_mb']:>8} MB  recall {row['recall']:.3f}",
                flush=True,
            )
    conditions = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "commit": current_commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    args.out.write_text(json.dumps({"conditions": conditions, "rows": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
