"""What the pipeline costs beside its trainings: whole commands in a fresh clone of HEAD.

    python -m benchmarks.pipeline [--setting quick]

Prints the seconds of a first `dvc repro` less its three trainings (each a whole process, from its own record), of
another one with nothing to do, of a change of defense, and of the change back.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAININGS = ("victim", "oracle", "retrained")


def seconds(folder: Path, *words: str) -> float:
    """Wall time of a DVC command in `folder`; ends this program if it fails."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "dvc", *words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"benchmarks.pipeline: dvc {' '.join(words)} failed: {done.stderr.strip()[-2000:]}")
    return time.perf_counter() - started


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__.partition("\n")[0])
    options.add_argument("--setting", default="quick")
    options.add_argument("--other-defense", default="random_filter", help="the one to change to and back")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / "clone"
        subprocess.run(["git", "clone", "--quiet", ".", str(clone)], check=True)
        first = seconds(clone, "exp", "run", "-S", f"setting={args.setting}")
        cell = json.loads((clone / "artifacts/metrics.json").read_text())["cell"].split("/")
        trained = [json.loads(path.read_text())["seconds"] for path in clone.glob("artifacts/**/*.resources.json")
                   if path.name.split(".")[0] in TRAININGS]  # fmt: skip
        assert len(trained) == len(TRAININGS), "one victim, one oracle, one retraining"
        print(
            f"first run {first:6.1f} s, of which {sum(trained):.1f} s trainings; the rest {first - sum(trained):.1f} s"
        )
        print(f"no-op     {seconds(clone, 'repro'):6.1f} s")
        print(
            f"change    {seconds(clone, 'exp', 'run', '-S', f'defense={args.other_defense}'):6.1f} s (with a training)"
        )
        print(f"back      {seconds(clone, 'exp', 'run', '-S', f'defense={cell[1]}'):6.1f} s")
        print(f"no-op     {seconds(clone, 'repro'):6.1f} s")


if __name__ == "__main__":
    main()
