"""The training engine: the whole data set on the device, no loader processes, one synchronisation an epoch.

The mathematics is the plain recipe (SGD with momentum, cosine to 0, cross-entropy, random crop and flip); the tests hold
this engine to a slow, obvious loop that makes the same random draws.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config

from stages.lib import models
from stages.lib.device import Device
from stages.lib.errors import UserError
from stages.lib.progress import EpochProgress
from stages.lib.scratch import Scratch
from stages.lib.seeds import stream

MAX_ATTEMPTS = 3  # one training and two repetitions after a collapse
# The share of its activations that a network compiled for a CPU keeps for the backward pass; the others are computed again.
KEPT_ON_CPU = {"resnet20": 1.0, "vgg16bn": 1.0, "mobilenetv2": 0.4}
GRAPH_WARM_UP_STEPS = 3  # CUDA graphs: enough for cuDNN and the allocator to settle


@dataclass(frozen=True)
class Recipe:
    """What the training computes. `crop_padding` in pixels; `flip` is the horizontal one, with probability 1/2."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    crop_padding: int
    flip: bool


@dataclass(frozen=True)
class Architecture:
    """What is needed to build a network again and to feed it: the part of a checkpoint that is not weights.

    `image_size`: pixels a side after zero-padding; `mean` and `std` per channel in units of [0, 1].
    """

    network: str
    n_classes: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def build(self, seed: int = 0) -> torch.nn.Module:
        return models.build(self.network, len(self.mean), self.n_classes, self.image_size, seed)


class Collapse(Exception):
    """The network answers with one class, or its loss is not a number."""


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """Cosine from `lr` to 0, constant within an epoch: ``lr / 2 * (1 + cos(pi * epoch / epochs))``, `epoch` from 0."""
    return recipe.lr / 2 * (1 + math.cos(math.pi * epoch / recipe.epochs))


def draws(n: int, recipe: Recipe, seed: int, attempt: int, epoch: int) -> Tensor:
    """The random choices of one epoch, (4, n) int64 in the order of the steps: row, crop top, crop left, flipped.

    Drawn on the CPU from the epoch's own stream: the same on every device, and nothing to save for a resumed training.
    """
    generator = torch.Generator().manual_seed(stream(seed, "training", attempt, epoch))
    rows = torch.randperm(n, generator=generator)
    offsets = torch.randint(0, 2 * recipe.crop_padding + 1, (2, n), generator=generator)
    flip = torch.randint(0, 2, (1, n), generator=generator) * int(recipe.flip)
    return torch.cat([rows[None], offsets, flip])


def split(choices: Tensor, batch_size: int) -> list[Tensor]:
    """Batches of one epoch, the last one short. A last batch of a single row joins the one before it: batch
    normalisation over one value is not defined."""
    batches = list(choices.split(batch_size, dim=1))
    if len(batches) > 1 and batches[-1].shape[1] == 1:
        batches[-2:] = [torch.cat(batches[-2:], dim=1)]
    return batches


def crops(images: np.ndarray, padding: int, device: torch.device) -> Tensor:
    """All crops of all images as one uint8 view (N, 2p+1, 2p+1, H, W, C) of the zero-padded images on the device."""
    images = torch.from_numpy(images).to(device)
    height, width = images.shape[1:3]
    images = F.pad(images, (0, 0, padding, padding, padding, padding))
    return images.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (B, H, W, C) to float (B, C, H, W) in channels-last memory; `mean` and `std` in units of 255."""
    return ((images.to(mean.dtype) - mean) / std).permute(0, 3, 1, 2)


def compiled(model: torch.nn.Module, where: torch.device, kept: float = 1.0) -> Callable[[Tensor], Tensor]:
    """`model`, compiled for batches of one shape. Hundreds of casts, counters and sums are less work than a launch each:
    several of them share a kernel. kept: the share of activations, by their size, that wait in memory for the backward pass,
    which computes the others again."""
    options: dict[str, bool | int] = {"combo_kernels": True}
    if where.type == "cpu":
        # Inductor's cache does not tell processors apart (torch 2.11: nor numbers of threads). Code for vectors of another width
        # computes wrong numbers.
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        options |= {"cpp.simdlen": pick_vec_isa().bit_width(), "cpp.threads": torch.get_num_threads()}
    forward = torch.compile(model, dynamic=False, options=options)

    def run(inputs: Tensor) -> Tensor:
        with functorch_config.patch(activation_memory_budget=kept):  # the first call compiles
            return forward(inputs)

    return run


class Trainer:
    """One attempt at one training; its state can be saved after any epoch and loaded again.

    images: (N, H, W, C) uint8, trigger applied, padded to the architecture's size. labels: (N,) int64 in [0, C).
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        architecture: Architecture,
        recipe: Recipe,
        device: Device,
        seed: int,
        attempt: int = 0,
    ):
        self.recipe, self.device, self.seed, self.attempt = recipe, device, seed, attempt
        self.n, self.n_classes = len(labels), architecture.n_classes
        if min(self.n, recipe.batch_size) < 2:
            raise UserError(
                f"{self.n} rows in batches of {recipe.batch_size}: batch normalisation needs two rows at least; "
                "raise train.batch_size, or keep more rows"
            )
        target = device.device
        self.crops = crops(images, recipe.crop_padding, target)
        self.labels = torch.from_numpy(labels).to(target)
        self.mean = torch.tensor(architecture.mean, device=target) * 255
        self.std = torch.tensor(architecture.std, device=target) * 255
        model = architecture.build(stream(seed, "training", attempt, "weights"))
        self.model = model.to(target, memory_format=torch.channels_last).train()
        on_gpu = target.type == "cuda"
        self.lr = torch.tensor(recipe.lr, device=target) if on_gpu else recipe.lr  # a graph reads it from memory
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), self.lr, recipe.momentum, weight_decay=recipe.weight_decay, fused=True
        )
        for parameter in self.model.parameters():  # zeros are what SGD starts from; here from the outset, to be loaded
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.totals = torch.zeros(2, dtype=torch.float64, device=target)  # summed loss, correct answers
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        # The short last batch has a shape of its own: it runs as it is, since compiling it again would cost more.
        self.full_step: Callable[[Tensor], None] = self._step
        if device.compile:
            forward = compiled(self.model, target, 1.0 if on_gpu else KEPT_ON_CPU[architecture.network])
            self.full_step = lambda batch: self._step(batch, forward)
        if on_gpu and self.n >= recipe.batch_size:
            self.full_step = self._graphed(self.full_step)

    def _step(self, batch: Tensor, model: Callable[[Tensor], Tensor] | None = None) -> None:
        rows, top, left, flip = batch
        images = self.crops[rows, top, left]
        images = torch.where(flip.bool()[:, None, None, None], images.flip(2), images)
        labels = self.labels[rows]
        inputs = normalise(images, self.mean, self.std)
        with torch.autocast(
            self.device.device.type, torch.bfloat16, self.device.precision == "bf16", cache_enabled=False
        ):
            logits = (self.model if model is None else model)(inputs)
        logits = logits.to(inputs.dtype)  # the loss is taken in full precision
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
            self.totals += torch.stack([loss.double() * len(labels), correct.double()])

    def _graphed(self, step: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        """Record the whole step once as a CUDA graph; the warm-up steps are undone."""
        static = torch.zeros(4, self.recipe.batch_size, dtype=torch.int64, device=self.device.device)
        before = [tensor.clone() for tensor in self._tensors()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(GRAPH_WARM_UP_STEPS):
                step(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(static)
        for tensor, value in zip(self._tensors(), before, strict=True):
            tensor.copy_(value)

        def replay(batch: Tensor) -> None:
            static.copy_(batch)
            graph.replay()

        return replay

    @torch.no_grad()
    def _tensors(self) -> list[Tensor]:
        momentum = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return [*(tensor.detach() for tensor in self.model.state_dict().values()), *momentum, self.totals]

    def run_epoch(self) -> dict[str, float]:
        """Train one epoch; return and remember its mean loss and accuracy over the augmented training images.

        Raises `Collapse`.
        """
        lr = learning_rate(self.recipe, self.epoch)
        if isinstance(self.lr, Tensor):
            self.lr.fill_(lr)
        else:
            self.optimizer.param_groups[0]["lr"] = lr
        self.totals.zero_()
        batches = draws(self.n, self.recipe, self.seed, self.attempt, self.epoch).to(self.device.device)
        for batch in split(batches, self.recipe.batch_size):
            (self.full_step if batch.shape[1] == self.recipe.batch_size else self._step)(batch)
        loss, correct = (self.totals / self.n).tolist()  # the epoch's one device-to-host synchronisation
        self.epoch += 1
        self.history.append({"epoch": self.epoch, "lr": lr, "loss": loss, "accuracy": correct})
        self._check()
        return self.history[-1]

    def _check(self) -> None:
        last = self.history[-1]
        if not math.isfinite(last["loss"]):
            raise Collapse(f"loss {last['loss']} in epoch {self.epoch}")
        if self.epoch in (collapse_epoch(self.recipe.epochs), max(self.recipe.epochs, 5)):
            floor = collapse_accuracy(self.labels.cpu().numpy(), self.n_classes, self.epoch == self.recipe.epochs)
            if last["accuracy"] < floor:
                raise Collapse(f"training accuracy {last['accuracy']:.3f} under {floor:.3f} after epoch {self.epoch}")

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "momentum": [state["momentum_buffer"] for state in self.optimizer.state.values()],
            "epoch": self.epoch,
            "history": self.history,
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        for own, saved in zip(self.optimizer.state.values(), state["momentum"], strict=True):
            own["momentum_buffer"].copy_(saved)
        self.epoch, self.history = state["epoch"], list(state["history"])


def collapse_epoch(epochs: int) -> int:
    """After which epoch a training is judged first: 10 % of them, but not before the fifth (short ones start slowly).

    It is judged again after the last. A training of fewer than five epochs is a smoke test and is not judged.
    """
    return max(math.ceil(epochs / 10), 5)


def collapse_accuracy(labels: np.ndarray, n_classes: int, at_the_end: bool) -> float:
    """Training accuracy under which a training has collapsed: twice chance, and more than the largest class gives.

    The second matters where poison swells the target class (5 % of CIFAR-100 make it 6 % of the rows: a constant answer
    is right three times as often as 2/C). A class with most of the rows is learnt first, with the others still to come: so
    it counts at the end alone. At most 1/2 from the first, so that it stays a sign of collapse for C < 4.
    """
    majority = np.bincount(labels).max() / len(labels)
    floor = min(2 / n_classes, 0.5)
    return max(floor, majority + 0.02 * (1 - majority)) if at_the_end or majority <= 0.5 else floor


@dataclass(frozen=True)
class Trained:
    """The result: the network's tensors, one dict an epoch (epoch, lr, loss, accuracy), and why attempts failed."""

    state: dict[str, Tensor]
    history: list[dict[str, float]]
    collapses: list[str]


def train(
    images: np.ndarray,
    labels: np.ndarray,
    architecture: Architecture,
    recipe: Recipe,
    device: Device,
    seed: int,
    title: str,
    scratch: Scratch | None = None,
) -> Trained:
    """Train a new network from scratch, going on from `scratch` if that holds a state.

    images (N, H, W, C) uint8 and labels (N,) int64. A training that collapses is repeated with the next training seed,
    at most twice. Raises `UserError` when all three collapse.
    """
    state = scratch.load() if scratch else None
    collapses = list(state["collapses"]) if state else []
    while len(collapses) < MAX_ATTEMPTS:
        trainer = Trainer(images, labels, architecture, recipe, device, seed, attempt=len(collapses))
        if state:
            trainer.load_state_dict(state)
            print(f"{title}: going on after epoch {trainer.epoch}", file=sys.stderr, flush=True)
            state = None
        progress = EpochProgress(title, recipe.epochs, trainer.epoch)
        try:
            while trainer.epoch < recipe.epochs:
                last = trainer.run_epoch()
                progress.update(last["epoch"], last["loss"], last["accuracy"])
                if scratch:
                    scratch.offer(lambda trainer=trainer: trainer.state_dict() | {"collapses": collapses})
            return Trained(trainer.model.state_dict(), trainer.history, collapses)
        except Collapse as error:
            collapses.append(str(error))
            print(f"{title}: collapsed ({error})", file=sys.stderr, flush=True)
        finally:
            progress.close()
    raise UserError(
        f"{title} collapsed {MAX_ATTEMPTS} times ({'; '.join(collapses)}); lower train.lr or take another seed"
    )
