"""Run settings x defenses x seeds on Ray, on this machine or on a cluster, and put each finished cell into `results/`.

    python -m sweep --settings quick --defenses whitened_mixture spectral_signature --seeds 1 2 3
    python -m sweep --settings resnet20-cifar10-badnets --seeds 1 2 3 --address auto --cache /shared/cache --gpus-per-training 0.5

The code is that of the last commit, the parameters are those of params.yaml as it is. Each task runs `dvc repro` in a
fresh copy; what all defenses of a setting and seed share (victim, oracle) runs once before them. A task whose machine is
lost is run again elsewhere, and what had finished comes from DVC's run cache. After Ctrl-C the same command goes on:
cells whose result is there are skipped.

Results are shared through a DVC cache folder that all machines see (--cache; by default that of this checkout) or through
a DVC remote (--remote). Every machine needs the same Python, Ray and dependencies; it needs no checkout.
"""

import argparse
import contextlib
import functools
import math
import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

from stages.lib.errors import UserError

CODE = ("dvc.yaml", "stages", "defenses", "analysis", "sweep", ".dvc")


def git(*words: str) -> bytes:
    done = subprocess.run(["git", *words], capture_output=True)
    if done.returncode:
        raise UserError(f"`git {words[0]}` failed ({done.stderr.decode().strip()}); run from a checkout with a commit")
    return done.stdout


def committed() -> tuple[bytes, str]:
    """A tar of HEAD without what cells make, and its short name; `UserError` if the code here is another."""
    commit = git("rev-parse", "--short", "HEAD").decode().strip()
    changed = git("diff", "--name-only", "HEAD", "--", *CODE).decode().split()
    if changed:
        raise UserError(f"{', '.join(changed)}: not committed, and the machines get the last commit; commit first")
    others = (":(exclude)artifacts", ":(exclude)results", ":(exclude)dvc.lock")
    return git("archive", "--format=tar", "HEAD", "--", ".", *others), commit


def check_paths(settings: set[str]) -> None:
    """Data and pictures that are not in git are read where they lie, so their paths must hold on every machine."""
    from analysis.grid import PARAMS
    from stages.lib import params

    for name in sorted(settings):
        found = params.setting(PARAMS, name)
        triggers = (found.poison.trigger, getattr(found.poison, "second_trigger", None))
        patterns = {getattr(trigger, "pattern", "noise") for trigger in triggers} - {"noise"}
        for path in (found.data.path, *sorted(patterns)):
            if path and not Path(path).expanduser().is_absolute() and not git("ls-files", "--", path):
                raise UserError(f"setting {name} reads {path}, which is not in git; give an absolute path")


def environment(cpus: float) -> dict[str, str]:
    """How it is to run: this checkout's wishes, and as many threads as the training has cores."""
    from stages.lib import runtime

    wishes = runtime.load()
    return {
        "BACKDOOR_DEVICE": wishes.device.partition(":")[0],  # which GPU is Ray's to say
        "BACKDOOR_PRECISION": wishes.precision,
        "BACKDOOR_COMPILE": wishes.compile,
        "BACKDOOR_DATA_ROOT": str(wishes.data_root.resolve()),
        "OMP_NUM_THREADS": str(max(1, int(cpus))),
    }


def remote_options(remote: str) -> dict[str, object]:
    """What DVC needs to know of a remote: its options here if it is one's name, else its address."""
    from dvc.config import Config

    known = Config.from_cwd()["remote"]
    if remote in known:
        options = dict(known[remote])
    elif "://" in remote or os.sep in remote:
        options = {"url": remote}
    else:
        raise UserError(
            f"--remote {remote}: no such DVC remote; use {', '.join(known) or 'dvc remote add'}, or give its address"
        )
    if options["url"].startswith(("http://", "https://")):
        raise UserError(
            f"--remote {remote}: DVC keeps no list of what ran over HTTP; use another kind, or --cache FOLDER"
        )
    if "://" not in options["url"]:
        options["url"] = os.path.abspath(options["url"])
    return options


def dvc_config(cache: Path | None, remote: dict[str, object] | None) -> str:
    """`.dvc/config.local` of the copies, which are no git checkouts."""
    from configobj import ConfigObj

    config = ConfigObj()
    config["core"] = {"no_scm": True} | ({"remote": "sweep"} if remote else {})
    if cache:
        config["cache"] = {"dir": str(cache)}
    if remote:
        config['remote "sweep"'] = remote
    return "\n".join(config.write()) + "\n"


def cache_folder(given: Path | None) -> Path:
    """That of the option, else the checkout's own, as DVC says."""
    if given is None:
        done = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"`dvc cache dir` failed: {done.stderr.strip()}")
        given = Path(done.stdout.strip())
    folder = given.expanduser().resolve()
    try:
        (folder / "sweep").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; give --cache a folder that can be written") from error
    return folder


@contextlib.contextmanager
def token(folder: Path):
    """A file by which the machines see that they see the same folder."""
    path = folder / f"sweep/{uuid.uuid4().hex}.token"
    try:
        path.touch()
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; give --cache a folder that can be written") from error
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def main(args) -> int:
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise UserError(
            "Ray is not installed; `pip install '.[cluster]'`, or use `python -m analysis.seeds` on one machine"
        ) from error
    for option, value, least in (
        ("--cpus-per-training", args.cpus_per_training, 0.01),
        ("--gpus-per-training", args.gpus_per_training or 0, 0),
        ("--retries", args.retries, 0),
    ):
        if not least <= value < math.inf:
            raise UserError(f"{option} is {value}; expected {least} or more")
    if args.gpus_per_training and not (args.gpus_per_training >= 0.01 and max(args.gpus_per_training, 1) % 1 == 0):
        raise UserError(f"--gpus-per-training is {args.gpus_per_training}; expected 0, 0.01 to 1, or a whole number")
    archive, commit = committed()
    from analysis import grid

    todo = grid.without_result(args)
    check_paths({cell.setting for cell in todo})
    where = environment(args.cpus_per_training)
    if not todo:
        return 0
    remote = remote_options(args.remote) if args.remote else None
    with contextlib.ExitStack() as stack:
        if remote:
            shared = proof = None
            copies = Path(tempfile.gettempdir()) / f"sweep-cache-{os.getuid()}"
            objects = args.cache.expanduser().resolve() if args.cache else copies
            config = dvc_config(None, remote)
        else:
            cache = cache_folder(args.cache)
            shared, objects, proof = cache / "sweep", None, stack.enter_context(token(cache))
            config = dvc_config(cache, None)
        from sweep import cluster
        from sweep.driver import Needs, Sweep
        from sweep.task import Code

        cluster.connect(args.address)
        stack.callback(cluster.leave)
        gpus = args.gpus_per_training
        if gpus is None:
            gpus = float(cluster.has_gpus() and where["BACKDOOR_DEVICE"] != "cpu")
        if not gpus:  # Ray hides no GPU from a task that asks for none
            where["BACKDOOR_DEVICE"] = "cpu"
        cluster.check(args.cpus_per_training, gpus, may_grow=bool(cluster.address(args.address)))
        paths = [str(path) if path else None for path in (shared, objects, proof)]
        if proof:
            cluster.check_sees(str(proof))
        code = Code(archive, config, where, *paths)
        needs = Needs(args.cpus_per_training, gpus, args.retries)
        say = functools.partial(print, file=sys.stdout, flush=True)
        # Ray prints the log of a machine that was lost, to standard output and whatever it is told.
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        sweep = Sweep(todo, code, grid.PARAMS.read_text(), commit, needs, bool(remote), args.out, say)
        try:
            sweep.submit()
            outcome = sweep.follow()
        except KeyboardInterrupt:
            ended = len(sweep.outcome)
            words = f"stopped: {ended} cells ended, {len(todo) - ended} are left; the same command goes on"
            print(words, file=sys.stderr, flush=True)
            return 130
    bad = [cell.name for cell in todo if outcome[cell] != "done"]
    if bad:
        print(f"{len(bad)} of {len(todo)} cells have no result: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


def parser() -> argparse.ArgumentParser:
    from analysis.grid import add_options

    options = argparse.ArgumentParser(
        prog="python -m sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(options)
    options.add_argument("--address", help="of a Ray cluster: auto (this machine is part of it) or host:port; default: "
                         "RAY_ADDRESS, else a cluster of this machine alone, started and stopped")  # fmt: skip
    options.add_argument("--cpus-per-training", type=float, default=1.0, help="cores and threads (1)")
    options.add_argument("--gpus-per-training", type=float, help="0.5: two share a GPU; default: 1 where there are any")
    options.add_argument("--retries", type=int, default=3, help="of a task whose machine or process was lost (3)")
    options.add_argument("--cache", type=Path, help="DVC cache, a folder that all machines see; default: the checkout's. "
                         "With --remote: a folder on each machine for its copies; default: one in its temporary "
                         "folder, which stays")  # fmt: skip
    options.add_argument("--remote", help="DVC remote, by name or address, in place of a shared cache; a named one goes "
                         "to the machines with its options here")  # fmt: skip
    return options


if __name__ == "__main__":
    try:
        sys.exit(main(parser().parse_args()))
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        sys.exit(f"python -m sweep: {error}")
    except OSError as error:
        sys.exit(f"python -m sweep: {error.strerror or error}: {error.filename or 'no file named'}")
