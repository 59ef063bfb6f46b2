"""The one place that decides on device, precision, compilation and threads, and says why."""

import os
import shutil
from dataclasses import dataclass

import torch

from stages.lib.errors import UserError
from stages.lib.runtime import Runtime

# On a CPU, compiling costs 20 to 90 s and saves a share of each step: below this many images it does not pay.
# Measured by `python -m benchmarks.training` (see benchmarks/README.md).
CPU_COMPILE_PAYS_FROM_IMAGES = 400_000


@dataclass(frozen=True)
class Device:
    """What a training runs on. `describe()` goes into the checkpoint."""

    device: torch.device
    precision: str  # "fp32" or "bf16" (autocast; weights, batch-norm statistics and loss stay fp32)
    compile: bool
    reason: str

    def describe(self) -> dict[str, str | bool]:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "device": name,
            "precision": self.precision,
            "compile": self.compile,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def __str__(self) -> str:
        settings = self.describe()
        how = f"{settings['threads']} threads" if self.device.type == "cpu" else settings["device"]
        return f"{self.device} ({how}), {self.precision}: {self.reason}"


def decide(runtime: Runtime, images_to_train: int = 0) -> Device:
    """Settle every `auto`. `images_to_train`: N times epochs, from which it follows whether compiling pays on a CPU."""
    if runtime.device == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        why = ["a GPU is there" if name == "cuda" else "no GPU found"]
    else:
        name, why = runtime.device, ["as asked"]
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {name!r} is not there ({str(error).splitlines()[0]}); set BACKDOOR_DEVICE=cpu or auto"
        ) from error
    precision = runtime.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
        why.append("bf16 autocast is fast there" if precision == "bf16" else "fp32 is exact and no slower")
    if runtime.compile == "auto":
        if device.type == "cuda":
            compile_, because = True, "compiled"
        elif shutil.which(os.environ.get("CXX", "g++")) is None:
            compile_, because = False, "not compiled: no C++ compiler"
        elif images_to_train < CPU_COMPILE_PAYS_FROM_IMAGES:
            compile_, because = False, "not compiled: too short to pay"
        else:
            compile_, because = True, "compiled"
        why.append(because)
    else:
        compile_ = runtime.compile == "on"
        why.append("compiled as asked" if compile_ else "not compiled as asked")
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(available_cores())
    return Device(device, precision, compile_, "; ".join(why))


def available_cores() -> int:
    """Cores that this process may use: fewer than the machine has under taskset, SLURM or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
