"""Compute cells without DVC or network, and export finished ones to `results/`, one JSON per cell.

    python -m analysis.cells --settings resnet20-cifar10-badnets --defenses scan --seeds 1 2 --jobs 4 --time-limit 1500
    python -m analysis.cells --settings quick --defenses random_filter --seeds 42 --export-only
    python -m analysis.cells --settings quick --defenses scan --seeds 1 2 3 --up-to extract   # for analysis.proving_ground

The commands are those of dvc.yaml, and so are the paths: brought back to a checkout with the same params.yaml, the
artifacts of a cell enter DVC's cache with `dvc commit -f dvc.yaml`. A stage is run again only if its command, its
parameters or a file it depends on has changed; a training that was cut off goes on from its scratch checkpoint. Stages
that do not wait for each other run side by side, `--jobs` at a time: victim and oracle, then one retraining per defense;
what they print (a training: some ten lines, with the time left) is passed on as they print it.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from analysis import grid
from analysis.tasks import Runner, current_commit, tasks_of, up_to
from stages.check import runnable
from stages.lib import params
from stages.lib.errors import UserError

MPS_QUIT_SECONDS = 60.0


@contextlib.contextmanager
def nvidia_mps() -> Iterator[None]:
    """NVIDIA's Multi-Process Service, started for what runs inside and in a folder of its own: without it the processes on
    one GPU take turns. https://docs.nvidia.com/deploy/mps"""
    control, variables = shutil.which("nvidia-cuda-mps-control"), ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
    if control is None:
        raise UserError("--mps: nvidia-cuda-mps-control is not there; it comes with NVIDIA's driver. Leave --mps out")
    if taken := [variable for variable in variables if variable in os.environ]:
        raise UserError(f"--mps: {taken[0]} is set, so MPS seems to run already; leave --mps out to use it")
    # What it says goes to a file: the daemon might hold a pipe open for as long as it runs.
    folders = tempfile.TemporaryDirectory(prefix="mps-", ignore_cleanup_errors=True)  # the daemon may still write there
    with folders as folder, tempfile.TemporaryFile("w+") as said:
        os.environ |= dict.fromkeys(variables, folder)
        try:
            if status := subprocess.run([control, "-d"], stdout=said, stderr=said).returncode:
                said.seek(0)
                reason = (said.read().strip().splitlines() or [f"exit status {status}"])[-1]
                raise UserError(f"--mps: MPS does not start ({reason}); leave --mps out")
            try:
                yield
            finally:
                with contextlib.suppress(subprocess.TimeoutExpired):  # what was computed is exported all the same
                    subprocess.run(
                        [control], input="quit\n", text=True, stdout=subprocess.DEVNULL, timeout=MPS_QUIT_SECONDS
                    )
        finally:
            for variable in variables:
                del os.environ[variable]


def main() -> int:
    options = argparse.ArgumentParser(
        prog="python -m analysis.cells", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--settings", nargs="+", required=True, help="blocks under `settings:` in params.yaml")
    options.add_argument("--defenses", nargs="+", required=True, help="lines under `defenses:` in params.yaml")
    options.add_argument("--seeds", nargs="+", type=int, required=True, help="whole numbers from 0")
    options.add_argument("--jobs", type=int, default=1, help="stages side by side")
    options.add_argument("--mps", action="store_true", help="run NVIDIA's MPS meanwhile, so that they share one GPU")
    options.add_argument(
        "--time-limit", type=float, default=float("inf"), help="seconds; what is left resumes next time"
    )
    options.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON files")
    options.add_argument("--commit", help="recorded with the results; default: that of this checkout")
    options.add_argument("--dump", action="store_true", help="export the scores and the truth too, seed<k>.npz")
    options.add_argument(
        "--up-to", metavar="STAGE", help="run this stage of dvc.yaml and what it needs; export nothing"
    )
    options.add_argument("--export-only", action="store_true", help="run nothing")
    args = options.parse_args()
    cells = [(s, d, k) for s in args.settings for k in args.seeds for d in args.defenses]
    try:
        grid.check_jobs(args.jobs)
        grid.check_seeds(args.seeds)
        if not Path("dvc.yaml").exists():
            raise UserError("dvc.yaml is not there; run from the folder of the checkout")
        from analysis.export import export  # torch and scikit-learn, which neither --help nor a mistake needs

        unfinished = set()
        if not args.export_only:
            tasks = up_to(tasks_of(cells), args.up_to) if args.up_to else tasks_of(cells)
            for setting in () if args.up_to else args.settings:
                runnable(grid.PARAMS, setting, args.defenses, True, params.filter_(grid.PARAMS).budget)
            with nvidia_mps() if args.mps else contextlib.nullcontext():
                outcome = Runner(args.jobs, time.monotonic() + args.time_limit).run(tasks)
            bad = {command for command, how in outcome.items() if how not in ("done", "ran")}
            if args.up_to:
                return 2 if bad else 0
            unfinished = {cell for cell in cells if bad & tasks_of([cell]).keys()}
        missing, commit = [], args.commit or current_commit()
        for cell in cells:
            path = None if cell in unfinished else export(*cell, args.out, commit, args.dump)
            print(f"cell   {path}" if path else f"open   {'/'.join(map(str, cell))}")
            missing += [] if path else [cell]
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        print(f"python -m analysis.cells: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        words = f"{error.strerror or error}: {error.filename or 'no file named'}"
        print(f"python -m analysis.cells: {words}", file=sys.stderr)
        return 1
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
