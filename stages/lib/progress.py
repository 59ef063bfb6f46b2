"""Progress of a training: a bar on a terminal, plain lines elsewhere."""

import sys
import time

from tqdm import tqdm


class EpochProgress:
    """Shows epoch, loss, accuracy and time left; on a terminal as a bar, else as at most some ten lines."""

    def __init__(self, title: str, epochs: int, done: int = 0):
        self.title, self.epochs, self.first = title, epochs, done
        self.started = time.monotonic()
        self.every = max(1, epochs // 10)
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=epochs, initial=done, desc=title, unit="epoch", dynamic_ncols=True)

    def update(self, epoch: int, loss: float, accuracy: float) -> None:
        """After epoch number `epoch` (from 1)."""
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.3f}", refresh=False)
            self.bar.update()
        elif epoch % self.every == 0 or epoch == self.epochs:
            seconds = time.monotonic() - self.started
            left = seconds / (epoch - self.first) * (self.epochs - epoch)
            print(
                f"{self.title}: epoch {epoch}/{self.epochs}  loss {loss:.3f}  accuracy {accuracy:.3f}  "
                f"{seconds:.0f} s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
