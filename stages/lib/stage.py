"""What every stage does around its work: one-line errors, whole outputs or none, no result under a wrong hash.

DVC hashes the dependencies of a stage after its command has ended (iterative/dvc issue 11058): an input that is edited
meanwhile would be recorded as if it had made the output. So a stage publishes nothing if a module it has loaded or a
file it has read is not what it was at the start.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from stages.lib.errors import UserError, telling_line

ROOT = Path(__file__).resolve().parents[2]


def _sources() -> dict[Path, bytes]:
    files = [path for folder in ("analysis", "defenses", "stages") for path in ROOT.glob(f"{folder}/**/*.py")]
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in files}


_STARTED = time.monotonic()
_SOURCES = _sources()  # when the stage starts: stages/__init__.py imports this module before anything else
_PARENT = os.getppid()  # DVC, if it runs the stage


class Outputs:
    """Writes files to temporary names beside their own, and gives them their names only when all are whole.

    with Outputs([out], inputs=[data, params]) as temporary: ...write temporary[out]...

    inputs: files whose change while the stage runs forbids publishing. parameters: reads the parameters again, only
    those that the stage uses; the rest of the file may be edited meanwhile. resources: where to note seconds and peak
    memory (of the whole process, in MB), which are not byte-stable and so get a file of their own; what a stage puts into
    `noted` goes there too.
    """

    def __init__(
        self,
        outputs: Sequence[Path],
        inputs: Sequence[Path],
        parameters: Callable[[], object] = lambda: None,
        resources: Path | None = None,
    ):
        self.outputs, self.inputs = [Path(path) for path in outputs], [Path(path) for path in inputs]
        self.parameters, self.resources, self.noted = parameters, resources, {}

    def __enter__(self) -> dict[Path, Path]:
        files = [*self.outputs, *([self.resources] if self.resources else [])]
        for path in files:
            if path.is_dir():
                raise UserError(f"{path} is a folder; expected the name of a file to write")
            if os.path.realpath(path) in map(os.path.realpath, self.inputs):
                raise UserError(f"{path} is read and would be written over; choose another name for what is written")
        self.before = {path: _identity(path) for path in self.inputs}
        self.parameters_before = self.parameters()
        self.temporary = {}
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            self.temporary[path] = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        return self.temporary

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self._publish()
            elif isinstance(error, OSError):
                raise error
        except OSError as full:
            if full.filename is None and full.errno in (errno.ENOSPC, errno.EDQUOT):  # which Python does not name
                names = ", ".join(map(str, self.temporary))
                raise UserError(
                    f"{names}: {os.strerror(full.errno)}; nothing was written; make space and run it again"
                ) from full
            raise
        finally:
            for temporary in self.temporary.values():
                temporary.unlink(missing_ok=True)

    def _publish(self) -> None:
        if self.resources:
            self.temporary[self.resources].write_text(json.dumps(_resources() | self.noted, indent=2) + "\n")
        for temporary in self.temporary.values():
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        self._check_may_publish()
        for path, temporary in self.temporary.items():  # not before all of them are safe
            os.replace(temporary, path)

    def _check_may_publish(self) -> None:
        changed = [str(path) for path, before in self.before.items() if _identity(path) != before]
        try:
            if self.parameters() != self.parameters_before:
                changed.append("the parameters")
        except UserError:
            changed.append("the parameters")
        loaded = {Path(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
        for path, before in _SOURCES.items():
            if path in loaded and (not path.exists() or hashlib.sha256(path.read_bytes()).digest() != before):
                changed.append(str(path.relative_to(ROOT)))
        if changed:
            raise UserError(f"{', '.join(changed)} changed while this stage ran: nothing was written; run it again")
        # DVC was killed and the stage was not: another `dvc repro` may be at work on the same files by now.
        if "DVC_STAGE" in os.environ and os.getppid() != _PARENT:
            raise UserError("the dvc that started this stage has ended: nothing was written; run `dvc repro` again")


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Run a stage as a command: a user's mistake is one line and status 1, Ctrl-C is status 130."""
    name = os.path.basename(parser.prog)
    try:
        main(parser.parse_args())
    except UserError as error:
        sys.exit(f"{name}: {error}")
    except OSError as error:  # disk full, permission denied: the file's name and the system's words say it
        words = " ".join(str(error.strerror or error).split())
        sys.exit(f"{name}: {words}: {error.filename or 'no file named'}; nothing was written")
    except MemoryError:
        sys.exit(f"{name}: out of memory; nothing was written")
    except RuntimeError as error:
        words = telling_line(error)  # torch's errors, which is not imported here
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            sys.exit(f"{name}: out of memory ({words}); nothing was written")
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")):
            sys.exit(f"{name}: compiling failed ({words}); set BACKDOOR_COMPILE=off; nothing was written")
        raise
    except KeyboardInterrupt:
        sys.exit(130)


def parser(stage: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m stages.{stage}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def add_setting(options: argparse.ArgumentParser) -> None:
    options.add_argument("--params", type=Path, default=Path("params.yaml"), help="file with the settings")
    options.add_argument("--setting", required=True, help="name of a block under `settings:`")


def add_seed(options: argparse.ArgumentParser) -> None:
    options.add_argument("--seed", type=int, required=True, help="seed of the experiment, a whole number from 0")


def add_resources(options: argparse.ArgumentParser) -> None:
    options.add_argument("--resources", type=Path, help="JSON file for seconds and peak memory")


@contextlib.contextmanager
def naming(path: Path):
    """Errors of the block without a file name get that of `path` (h5py reports a full disk without it)."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            why = os.strerror(error.errno) if error.errno else error  # HDF5 tells a long story
            raise UserError(f"{path}: cannot be written ({why}); nothing was changed") from error
        raise


def _identity(path: Path) -> tuple | bytes:
    """Of a small file its content (an editor may save it unchanged), of a large one size and time of change."""
    try:
        stat = path.stat()
        if stat.st_size < 1 << 20:
            return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return ()
    return stat.st_size, stat.st_mtime_ns


def _remove_leftovers(path: Path) -> None:
    """Delete temporary files of processes that were killed."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        match = re.fullmatch(r"(\d+)\.tmp", leftover.name.removeprefix(f".{path.name}."))
        if match and not Path(f"/proc/{match[1]}").exists() and Path("/proc").exists():
            leftover.unlink(missing_ok=True)


def _resources() -> dict[str, float]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1 << 20)
    found = {"seconds": round(time.monotonic() - _STARTED, 2), "peak_memory_mb": round(peak)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return found
