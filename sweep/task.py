"""What runs on the machines of the cluster: DVC in a clean copy of the code, and what came of it.

Ray carries this module by value: a machine needs the project's dependencies but no checkout, so nothing of the project
is imported here.
"""

import contextlib
import io
import os
import re
import shlex
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

TAIL = 4  # lines of a failed task's log that are shown

# When a node is lost its workers end at once and leave their grandchildren (DVC's stages) running. This shell outlives the
# worker and holds the other end of a pipe: at its end, without the word that all is over, it kills the whole group. It
# detaches itself, since Ray kills a worker's direct children with it.
REAPER = """exec 3<&0
(read -r group <&3; read -r over <&3
[ "$over" ] || [ -z "$group" ] || { kill -s KILL -- "-$group"; sleep 1; }
rm -rf -- "$1") &"""


@dataclass(frozen=True)
class Code:
    """What every task of a sweep starts from. archive: a tar of the commit. config: text of ``.dvc/config.local``.
    environment: what the stages are to find there. shared: folder that all machines see, with the locks and scratch
    checkpoints; None: there is none, and `objects` is a folder on each machine for what came from the remote.
    token: a file in `shared` by which a machine tells that it is the same folder."""

    archive: bytes
    config: str
    environment: dict[str, str]
    shared: str | None
    objects: str | None
    token: str | None


@dataclass
class Outcome:
    """how: done, failed or skipped. stages: those whose command ran, in order. text: of the result, if there is one."""

    name: str
    how: str
    words: str = ""
    node: str = ""
    seconds: float = 0.0
    stages: list[str] = field(default_factory=list)
    text: str | None = None


class Board:
    """An actor that remembers which tasks have started, and where, until the driver asks."""

    def __init__(self):
        self.lines: list[tuple[str, str]] = []

    def started(self, name: str, node: str) -> None:
        self.lines.append((name, node))

    def take(self) -> list[tuple[str, str]]:
        lines, self.lines = self.lines, []
        return lines


def run(
    name: str, code: Code, parameters: str, commands: list[list[str]], result: str | None, board, *before
) -> Outcome:
    """Run commands (the words after `python -m`) one after another in a fresh copy.

    parameters: text of params.yaml. result: the file to return. before: outcomes of the tasks that this one needs.
    """
    import ray

    for needed in before:
        if needed.how != "done":
            return Outcome(name, "skipped", f"{needed.name} {needed.how}")
    node = f"{socket.gethostname()}/{ray.get_runtime_context().get_node_id()[:6]}"
    board.started.remote(name, node)
    started = time.monotonic()
    if code.token and not Path(code.token).exists():
        return Outcome(name, "failed", blind(code.token), node)
    try:
        with copy(code, parameters) as (folder, register), lock(code, name):
            script = " && ".join(shlex.join([sys.executable, "-m", *words]) for words in commands)
            log = folder / ".dvc/tmp/sweep.log"
            log.parent.mkdir(exist_ok=True)
            here = {
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "DVC_SITE_CACHE_DIR": str(folder / ".dvc/tmp/site"),  # else each copy leaves one in /var/tmp
            }
            with open(log, "wb") as file:
                process = subprocess.Popen(
                    ["sh", "-c", script], cwd=folder, env=os.environ | code.environment | here,
                    stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                register(process.pid)
                status = process.wait()
            output = log.read_text(errors="replace").replace("\r", "\n")
            ended = Outcome(
                name, "done", "", node, time.monotonic() - started, re.findall(r"Running stage '(\w+)'", output)
            )
            if status:
                lines = [line for line in output.splitlines() if line.strip()]
                ended.how, ended.words = "failed", "\n".join(lines[-TAIL:])
            elif result:
                ended.text = (folder / result).read_text()
            return ended
    except OSError as error:  # no space for the copy, a cache that is read-only there
        return Outcome(name, "failed", " ".join(str(error).split()), node)


def blind(token: str) -> str:
    """Of a machine that does not see the token, what is wrong with it."""
    return f"does not see {Path(token).parents[1]}: give --cache FOLDER that all machines see, or --remote"


@contextlib.contextmanager
def copy(code: Code, parameters: str):
    """A folder with the code, and a function that takes the process group to kill if this process is lost; both end with
    the block."""
    folder = Path(tempfile.mkdtemp(prefix="sweep-"))
    reaper = subprocess.Popen(
        ["sh", "-c", REAPER, "sh", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip

    def register(group: int) -> None:
        reaper.stdin.write(b"%d\n" % group)
        reaper.stdin.flush()

    try:
        with tarfile.open(fileobj=io.BytesIO(code.archive)) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # not in Python before 3.11.4 (Debian 12)
            archive.extractall(folder)
        (folder / "params.yaml").write_text(parameters)
        (folder / ".dvc/config.local").write_text(code.config)
        if code.shared:
            scratch = Path(code.shared) / "scratch"
        else:  # the machine's copies of the remote's files are shared by its tasks, the list of what ran is not
            scratch = Path(code.objects) / "scratch"
            for path in (files := Path(code.objects) / "files", folder / ".dvc/cache"):
                path.mkdir(parents=True, exist_ok=True)
            (folder / ".dvc/cache/files").symlink_to(files)
        scratch.mkdir(parents=True, exist_ok=True)
        (folder / ".scratch").symlink_to(scratch)
        yield folder, register
        reaper.stdin.write(b"over\n")
    finally:
        reaper.stdin.close()
        reaper.wait()


def lock(code: Code, name: str):
    """Two sweeps on one cache do not compute the same at once: the second waits, and then finds it in the run cache."""
    if not code.shared:
        return contextlib.nullcontext()
    import filelock

    return filelock.FileLock(Path(code.shared) / f"{name}.lock")
