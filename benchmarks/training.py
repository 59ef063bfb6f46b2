"""The training engine against the plain PyTorch loop that a careful user would write, side by side.

    python -m benchmarks.training [--networks resnet20 ...] [--rounds 3] [--out benchmarks/training.json]
    python -m benchmarks.training --networks resnet20 --side-by-side 4     # ours alone and four at a time

For each network in its full benchmark setting (shapes, batch, crop, flip): milliseconds a step, images a second, share
of the device's measured matrix-multiply peak, peak memory, and for ours the seconds until the first steps are done
(compiling, choice of algorithms, graph; the most of all rounds, since a later one finds compiled code in the cache). The
two take turns, each time in a process of its own, and medians over the rounds are printed: on a shared machine absolute
times drift, ratios less so.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import stages  # noqa: F401  (sets how OpenMP waits, before torch loads it)

# isort: split
import numpy as np
import torch
import torch.nn.functional as F

from analysis.files import write_whole
from analysis.tasks import current_commit
from stages.lib import device, models, params, runtime
from stages.lib.torchvision_compat import import_torchvision
from stages.lib.training import Architecture, Recipe, Trainer, draws

SETTINGS = {  # network -> benchmark setting, channels, classes
    "resnet20": ("resnet20-cifar10-badnets", 3, 10),
    "vgg16bn": ("vgg16bn-cifar100-blend", 3, 100),
    "mobilenetv2": ("mobilenetv2-fmnist-badnets", 1, 10),
}
SIZE = 32
WARM_UP_STEPS = 3
READY = "ready"  # what a contender says when it is warm
N_IMAGES = {"cpu": 4096, "cuda": 50_000}  # few: an epoch would end every 30 ms on a GPU
GNU_SPINCOUNT = "300000"  # what GNU OpenMP takes of itself, unless there are more threads than cores
MATMUL_SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192)}


def case(network: str, n: int):
    setting, channels, n_classes = SETTINGS[network]
    recipe = Recipe(**vars(params.setting(Path("params.yaml"), setting).train))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, SIZE, SIZE, channels), dtype=np.uint8)
    labels = rng.integers(0, n_classes, n)
    return images, labels, Architecture(network, n_classes, SIZE, (0.5,) * channels, (0.25,) * channels), recipe


def decided(network: str) -> device.Device:
    """As for a training on a full data set."""
    recipe = case(network, 2)[3]
    steps = recipe.epochs * (N_IMAGES["cuda"] // recipe.batch_size)
    return device.decide(runtime.load(), device.Work(network, steps, recipe.batch_size * SIZE**2))


class PlainSet(torch.utils.data.Dataset):
    """PIL images through torchvision transforms, one at a time."""

    def __init__(self, images, labels, architecture, recipe):
        transforms = import_torchvision().transforms
        self.images, self.labels, self.to_pil = images, labels, transforms.ToPILImage()
        flip = [transforms.RandomHorizontalFlip()] if recipe.flip else []
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(SIZE, padding=recipe.crop_padding),
                *flip,
                transforms.ToTensor(),
                transforms.Normalize(architecture.mean, architecture.std),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(self.to_pil(self.images[i])), int(self.labels[i])


def time_steps(step, batches, where: torch.device, seconds: float) -> float:
    """Seconds a step, over full batches, for about so many seconds from when the parent says so, after the warm-up."""
    for _ in range(WARM_UP_STEPS):
        step(next(batches))
    synchronise(where)
    print(READY, flush=True)
    if not sys.stdin.readline():
        sys.exit("the parent is gone")
    steps, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        step(next(batches))
        steps += 1
        if steps % 50 == 0:  # so that the queue of a GPU does not run away from the clock
            synchronise(where)
    synchronise(where)
    return (time.perf_counter() - started) / steps


def synchronise(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize()


def ours(network: str, n: int, seconds: float) -> dict:
    images, labels, architecture, recipe = case(network, n)
    how = decided(network)
    started = time.perf_counter()
    trainer = Trainer(images, labels, architecture, recipe, how, seed=0)
    first = draws(n, recipe, 0, 0, 0).to(how.device)[:, : recipe.batch_size]
    trainer.full_step(first)
    trainer._step(first[:, : recipe.batch_size // 2])
    synchronise(how.device)
    set_up = time.perf_counter() - started

    def batches():
        epoch = 0
        while True:
            chosen = draws(n, recipe, 0, 0, epoch).to(how.device)
            yield from (batch for batch in chosen.split(recipe.batch_size, 1) if batch.shape[1] == recipe.batch_size)
            epoch += 1

    step = time_steps(trainer.full_step, batches(), how.device, seconds)
    return {"seconds_per_step": step, "set_up_seconds": set_up, "compile": how.compile}


def plain(network: str, n: int, seconds: float) -> dict:
    """No channels-last, no fused optimiser, no kept memory, nothing computed twice, threads that wait as they do by default; bf16
    autocast on a GPU, as a careful user has it."""
    images, labels, architecture, recipe = case(network, n)
    wanted = runtime.load().device
    where = torch.device("cuda" if wanted == "auto" and torch.cuda.is_available() else wanted.replace("auto", "cpu"))
    model = architecture.build().to(where).train()
    for block in model.modules():
        if isinstance(block, models._InvertedResidual):
            block.layers = torch.nn.Sequential(*block.layers)
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    on_gpu = where.type == "cuda"
    workers = min(device.available_cores(), 8)
    loader = torch.utils.data.DataLoader(
        PlainSet(images, labels, architecture, recipe), recipe.batch_size, shuffle=True, num_workers=workers,
        pin_memory=on_gpu, persistent_workers=True, drop_last=True,
    )  # fmt: skip

    def batches():
        while True:
            yield from loader

    def step(batch):
        inputs, targets = (tensor.to(where, non_blocking=True) for tensor in batch)
        optimizer.zero_grad()
        with torch.autocast(where.type, torch.bfloat16, enabled=on_gpu):
            loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()

    return {"seconds_per_step": time_steps(step, batches(), where, seconds)}


def matmul_peak(how: device.Device) -> float:
    """Floating-point operations a second of the fastest of some square products, in the precision of the engine."""
    where, dtype, best = how.device, torch.bfloat16 if how.precision == "bf16" else torch.float32, 0.0
    for size in MATMUL_SIZES[where.type]:
        a = torch.randn(size, size, device=where, dtype=dtype)
        for _ in range(8):
            synchronise(where)
            started = time.perf_counter()
            a @ a
            synchronise(where)
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def operations(network: str) -> int:
    """Floating-point operations of one step: three times those of the forward pass, which are counted by hand (torch's
    own counter takes the backward pass of a depthwise convolution for a full one)."""
    _, _, architecture, recipe = case(network, 2)
    model, counts = architecture.build().eval(), []

    def count(module, inputs, output):
        if isinstance(module, torch.nn.Conv2d):
            counts.append(2 * output.numel() * module.weight[0].numel())
        elif isinstance(module, torch.nn.Linear):
            counts.append(2 * output.numel() * module.in_features)

    for module in model.modules():
        module.register_forward_hook(count)
    with torch.inference_mode():
        model(torch.zeros(1, len(architecture.mean), SIZE, SIZE))
    return 3 * sum(counts) * recipe.batch_size


def measure(contender: str, args) -> dict:
    found = {"ours": ours, "plain": plain}[contender](args.networks[0], args.n, args.seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated() / 2**20
    return found | {"peak_memory_mb": peak}


def in_processes(contender: str, network: str, args, number: int = 1) -> list[dict]:
    """`measure` in so many processes at once, each with memory and threads of its own, timed when all are warm."""
    command = [sys.executable, "-m", "benchmarks.training", "--contender", contender, "--networks", network]
    command += ["--seconds", str(args.seconds), "--n", str(args.n)]
    environment = os.environ | ({"GOMP_SPINCOUNT": GNU_SPINCOUNT} if contender == "plain" else {})
    with contextlib.ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(number)]  # a pipe can fill up
        running = []
        for file in errors:
            process = subprocess.Popen(
                command, text=True, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file
            )
            stack.callback(process.wait)
            stack.callback(process.kill)  # before the wait, if something goes wrong; nothing if it has ended
            running.append(process)

        def failed(index: int) -> None:
            errors[index].seek(0)
            sys.exit(f"benchmarks.training: {contender} failed on {network}: {errors[index].read().strip()[-2000:]}")

        for index, process in enumerate(running):
            if READY not in map(str.strip, process.stdout):  # up to that line, or to the end
                failed(index)
        for process in running:
            process.stdin.write("\n")
            process.stdin.flush()
        found = []
        for index, process in enumerate(running):
            output = process.communicate()[0]
            if process.returncode:
                failed(index)
            found.append(json.loads(output))
    return found


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.partition("\n")[0])
    options.add_argument("--networks", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=15.0, help="measured time of each contender in each round")
    options.add_argument("--n", type=int, help="images in the made-up data set; default: 4096, on a GPU 50000")
    options.add_argument(
        "--side-by-side",
        type=int,
        default=1,
        help="ours also so many at a time; on one GPU that pays with NVIDIA's MPS",
    )
    options.add_argument("--out", type=Path, help="JSON file to write, after each network")
    options.add_argument("--contender", choices=("ours", "plain"), help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.side_by_side < 1:
        options.error(f"--side-by-side is {args.side_by_side}; expected 1 or more")
    if args.contender:
        print(json.dumps(measure(args.contender, args)))
        return
    how = device.decide(runtime.load())
    args.n = args.n or N_IMAGES[how.device.type]
    peak = matmul_peak(how)
    commit = current_commit()
    conditions = how.describe()
    del conditions["compile"]  # told with each network
    found = {
        "conditions": conditions | {
            "python": platform.python_version(), "commit": commit, "date": time.strftime("%Y-%m-%d"),
            "rounds": args.rounds, "seconds": args.seconds, "n": args.n, "matmul_peak_tflops": peak / 1e12,
        },
        "networks": {},
    }  # fmt: skip
    print(f"{conditions['device']}, {conditions['threads']} threads, {how.precision}; commit {commit}")
    print(f"matrix-multiply peak {peak / 1e12:.2f} TFLOP/s")
    print(
        f"{'network':<13}{'loop':<7}{'ms/step':>9}{'images/s':>10}{'of peak':>9}{'memory MB':>11}{'set-up s':>10}{'ratio':>8}"
    )
    for network in args.networks:
        rounds = [
            {name: in_processes(name, network, args)[0] for name in ("ours", "plain")} for _ in range(args.rounds)
        ]
        batch, flops = case(network, 2)[3].batch_size, operations(network)
        ratio = statistics.median(one["plain"]["seconds_per_step"] / one["ours"]["seconds_per_step"] for one in rounds)
        found["networks"][network] = {"ratio_plain_to_ours": ratio, "operations_per_step": flops}
        for name in ("ours", "plain"):
            step = statistics.median(one[name]["seconds_per_step"] for one in rounds)
            memory = max(one[name]["peak_memory_mb"] for one in rounds)
            set_up = [one[name]["set_up_seconds"] for one in rounds if name == "ours"]
            engine = {"compile": rounds[0]["ours"]["compile"], "set_up_seconds_of_each_round": set_up} if set_up else {}
            found["networks"][network][name] = {
                "ms_per_step": step * 1e3,
                "ms_per_step_of_each_round": [one[name]["seconds_per_step"] * 1e3 for one in rounds],
                "images_per_second": batch / step, "share_of_peak": flops / step / peak, "peak_memory_mb": memory,
            } | engine  # fmt: skip
            print(
                f"{network:<13}{name:<7}{step * 1e3:>9.1f}{batch / step:>10.0f}{flops / step / peak:>9.1%}"
                f"{memory:>11.0f}{f'{max(set_up):.1f}' if set_up else '':>10}{ratio if name == 'plain' else 1:>8.2f}",
                flush=True,
            )
        if args.side_by_side > 1:
            several = in_processes("ours", network, args, args.side_by_side)
            each = statistics.median(one["seconds_per_step"] for one in several)
            alone = statistics.median(one["ours"]["seconds_per_step"] for one in rounds)
            gain = args.side_by_side * alone / each
            found["networks"][network]["side_by_side"] = {
                "number": args.side_by_side, "ms_per_step_of_each": [one["seconds_per_step"] * 1e3 for one in several],
                "gain": gain,
            }  # fmt: skip
            print(
                f"{network:<13}{args.side_by_side} at a time: {each * 1e3:.1f} ms a step each, {gain:.2f} times the work"
            )
        if args.out:
            write_whole(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
