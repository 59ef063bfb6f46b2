"""The one place that decides on device, precision, compilation and threads, and says why."""

import ctypes
import importlib.util
import os
import platform
import shutil
import warnings
from dataclasses import dataclass

import torch

from stages.lib.errors import UserError, telling_line
from stages.lib.runtime import Runtime

# Full steps from which compiling for a GPU pays, if the three trainings of a cell share it: 38 to 57 s for ResNet-20 and 0.59
# ms gained a step, 39 to 59 s and 0.64 ms for VGG-16-BN, 88 to 96 s and 1.52 ms for MobileNetV2 (one H200, benchmarks/README.md).
COMPILE_STEPS = 30_000
# Networks for which it pays on a CPU, if three trainings share it, and the pixels trained on from which it does, in full
# precision (benchmarks/README.md).
COMPILE_PIXELS = {"resnet20": 50_000_000, "mobilenetv2": 20_000_000}
# mallopt(3) parameters of glibc.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Work:
    """A training, as far as it tells whether compiling pays: its full steps, and the pixels of a batch, after the first
    convolution."""

    network: str
    steps: int
    batch_pixels: int


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


def decide(runtime: Runtime, work: Work | None = None) -> Device:
    """Settle every `auto`, and prepare the process for it (threads, memory). work: what is to be trained, if anything is."""
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
    if device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs belong to the current device
    precision = runtime.precision
    if precision == "auto":
        precision = (
            "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        )
        why.append("bf16 autocast is fast there" if precision == "bf16" else "fp32 is exact and no slower")
    if runtime.compile == "auto":
        against = why_not_compile(device, work)
        compile_ = against is None
        why.append("compiled" if compile_ else f"not compiled: {against}")
    else:
        compile_ = runtime.compile == "on"
        if compile_ and work is not None and device.type == "cpu" and (lacking := what_a_cpu_lacks()):
            raise UserError(f"compiling was asked for, but fails ({lacking}); set BACKDOOR_COMPILE=off")
        why.append("compiled as asked" if compile_ else "not compiled as asked")
    if device.type == "cuda":
        cudnn = torch.backends.cudnn
        cudnn.benchmark, cudnn.deterministic = True, False  # shapes never change but for the last batch
        cudnn.allow_tf32 = precision == "bf16"  # fp32 means fp32
    else:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(available_cores())
        keep_freed_memory()
    return Device(device, precision, compile_, "; ".join(why))


def why_not_compile(device: torch.device, work: Work | None) -> str | None:
    """Why compiling does not pay or cannot be done here, or None."""
    if work is None:
        return "nothing is trained"
    if device.type == "cuda":
        too_short, lacking = work.steps < COMPILE_STEPS, what_a_gpu_lacks
    elif work.network not in COMPILE_PIXELS:
        return f"only {' and '.join(COMPILE_PIXELS)} are known to gain by it on a CPU"
    else:
        too_short, lacking = work.steps * work.batch_pixels < COMPILE_PIXELS[work.network], what_a_cpu_lacks
    return f"{work.steps:,} steps gain less than compiling costs" if too_short else lacking()


def what_a_cpu_lacks() -> str | None:
    """How Inductor fails to compile the least of functions for a CPU, or None: it needs a C++ compiler, and Python's headers.
    What an earlier training has compiled is taken from its cache, and says no more than that this can be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says it
            torch.compile(torch.sin)(torch.zeros(8))
    except Exception as error:  # of a dozen classes, by what is missing
        return telling_line(error)
    return None


def what_a_gpu_lacks() -> str | None:
    """Why Inductor could not build kernels for a GPU here, or None: container images often have no C compiler."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"no C compiler found ({', '.join(compilers)})"
    return None


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step instead of returning it to the system.

    By default every activation over 32 MB is mapped anew in each step, and the system zeroes its pages: more than half
    the time of a MobileNetV2 step (2,060 against 826 ms). Elsewhere than on glibc this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def available_cores() -> int:
    """Cores that this process may use: fewer than the machine has under taskset or SLURM. (A container's CPU quota is
    not seen here; set OMP_NUM_THREADS there.)"""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
