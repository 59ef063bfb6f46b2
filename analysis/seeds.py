"""Run seeds x defenses x settings through DVC's queue and export the finished cells to `results/`.

    python -m analysis.seeds --settings quick --defenses whitened_mixture spectral_signature --seeds 1 2 3
    python -m analysis.seeds --settings quick-clean --seeds 42 --budget auto

Of each setting and seed one whole cell runs first, so that victim and oracle are trained once; the other defenses find
them in DVC's run cache. A cell whose result is there, computed with the parameters of today, is skipped, and what DVC has
computed before is brought back: after Ctrl-C the same command goes on where it was. Each cell is an experiment with a
name, `<setting>-<defense>-seed<k>`, and `dvc exp show` lists it.

With --budget the cells stand beside those of params.yaml, as `seed<k>-auto` (the defense decides how many rows it
removes) or `seed<k>-budget<rows>`.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path

import yaml

from analysis import grid
from analysis.campaign import Campaign
from analysis.export import export as export_cell
from analysis.grid import Cell
from analysis.queue import Queue
from stages.lib.errors import UserError


def export(cell: Cell, experiment: str, base: str, queue: Queue, out: Path) -> Path:
    """Write the result of a finished experiment from what its commit holds; the workspace is left as it is.

    base: the commit that it stands on, recorded with the result; `-dirty` if its code is not that of the commit."""
    from dvc.api import DVCFileSystem

    shared = f"artifacts/{cell.setting}/seed{cell.seed}"
    changed = queue.git("diff", "--name-only", base, experiment, "--", "dvc.yaml", "stages", "defenses")
    commit = queue.git("rev-parse", "--short", base).strip() + ("-dirty" if changed else "")
    stages = yaml.safe_load(queue.git("show", f"{experiment}:dvc.lock"))["stages"].values()
    made = [out["path"] for stage in stages for out in stage["outs"]]
    Path(".scratch").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=".scratch") as folder:
        files = DVCFileSystem(".", rev=experiment)
        for path in made:
            target = Path(folder) / path
            if os.path.dirname(path) in (os.path.dirname(shared), shared, f"{shared}/{cell.defense}"):
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    files.get_file(path, str(target))  # a link into the cache, where the system has links
                except FileNotFoundError as error:
                    raise UserError(f"{cell.name}: {path} is no longer in DVC's cache; run it again") from error
        (Path(folder) / "params.yaml").write_text(queue.git("show", f"{experiment}:params.yaml"))
        with contextlib.chdir(folder):
            exported = export_cell(cell.setting, cell.defense, cell.seed, Path("out"), commit)
            text = exported.read_text() if exported else None
    if text is None:
        raise UserError(f"{cell.name}: the experiment holds no whole cell, or one of other parameters; run it again")
    return cell.write(out, text)


def main(args) -> int:
    grid.check_jobs(args.jobs)
    queue = Queue(args.jobs)
    todo = grid.without_result(args)
    if args.jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        from stages.lib.device import available_cores

        queue.environment["OMP_NUM_THREADS"] = str(max(1, available_cores() // args.jobs))
    watched = {grid.PARAMS, *(cell.file for cell in todo)}
    campaign = Campaign(queue, todo, lambda cell, *commits: export(cell, *commits, queue, args.out), watched)
    try:
        outcome = campaign.run()
    except KeyboardInterrupt:
        queue.stop(campaign.names())
        left = len(todo) - len(campaign.outcome)
        print(
            f"stopped: {len(campaign.outcome)} cells ended, {left} are left; the same command goes on", file=sys.stderr
        )
        return 130
    bad = [cell.name for cell, how in outcome.items() if how != "done"]
    if bad:
        print(f"{len(bad)} of {len(todo)} cells have no result: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    options = argparse.ArgumentParser(
        prog="python -m analysis.seeds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    grid.add_options(options)
    options.add_argument("--jobs", type=int, default=1, help="cells side by side; the cores are shared among them")
    try:
        sys.exit(main(options.parse_args()))
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        sys.exit(f"python -m analysis.seeds: {error}")
