"""Scratch checkpoints: an interrupted training goes on from its last one.

They lie outside DVC's outputs (DVC deletes those before a stage runs; `persist: true` would disable the run cache),
under a name that is a digest of all that determines the training, and under a lock while it runs.
"""

import hashlib
import io
import json
import os
import pickle
import sys
import time
from pathlib import Path

import filelock
import torch

from stages.lib import runtime, sealed, stage
from stages.lib.errors import UserError

MAX_COST = 0.01  # share of the training's time that saving may take


class Scratch:
    """The scratch checkpoint of one training. Use as a context manager: it holds the lock.

    what: JSON-able description of everything the result depends on. folder: default ``.scratch`` in the user's
    checkout. min_seconds: shortest time between two saves.
    """

    def __init__(self, what: dict, folder: Path | None = None, min_seconds: float = 10.0):
        code = {
            str(path.relative_to(stage.ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (stage.ROOT / "stages/lib" / f"{name}.py" for name in ("models", "seeds", "training"))
        }
        text = json.dumps({"what": what, "code": code}, sort_keys=True)
        folder = Path(folder or runtime.home() / ".scratch")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.pt"
        self.lock = filelock.FileLock(self.path.with_suffix(".lock"))
        self.min_seconds, self.cost, self.failed = min_seconds, 0.0, False
        self.saved = time.monotonic()

    def __enter__(self) -> "Scratch":
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            print("the same training runs in another process; waiting for it", file=sys.stderr, flush=True)
            self.lock.acquire()
        return self

    def __exit__(self, *_) -> None:
        self.lock.release()

    def load(self) -> dict | None:
        """The last state that was saved, or None. One that cannot be read or was damaged is as good as none."""
        try:
            content = sealed.content(self.path)
            return content and torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (OSError, UserError, pickle.UnpicklingError):
            return None

    def offer(self, state) -> None:
        """Save `state()` if enough time has passed that all saves together stay under `MAX_COST` of it."""
        started = time.monotonic()
        if started - self.saved < max(self.min_seconds, self.cost / MAX_COST):
            return
        temporary, content = self.path.with_suffix(".tmp"), io.BytesIO()
        torch.save(state(), content)
        try:
            with open(temporary, "wb") as file:
                file.write(sealed.with_seal(content.getvalue()))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:  # a full disk is no reason to lose the training
            temporary.unlink(missing_ok=True)
            if not self.failed:
                print(f"{self.path}: {error.strerror}; training goes on, but could not be resumed", file=sys.stderr)
            self.failed = True
        self.saved = time.monotonic()
        self.cost = self.saved - started

    def remove(self) -> None:
        """When the result is published."""
        for path in (self.path, self.path.with_suffix(".tmp")):  # the latter from a process killed while it saved
            path.unlink(missing_ok=True)
