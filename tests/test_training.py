"""The engine against a slow, obvious loop; determinism, interruption and collapse."""

import contextlib
import copy
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from stages.lib import models, scratch, training
from stages.lib.device import Device, what_a_cpu_lacks
from stages.lib.errors import UserError
from stages.lib.seeds import stream
from stages.lib.training import Architecture, Recipe, Trainer, learning_rate

CPU = Device(torch.device("cpu"), "fp32", False, "tests")
RECIPE = Recipe(epochs=3, batch_size=16, lr=0.05, momentum=0.9, weight_decay=5e-4, crop_padding=2, flip=True)
ARCHITECTURE = Architecture("resnet20", 3, 8, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def images_and_labels(n=40, size=8, channels=3, n_classes=3, seed=0):
    """Learnable: the brightness of the image's upper half tells the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    images = rng.integers(0, 80, (n, size, size, channels), dtype=np.uint8)
    images[:, : size // 2] += (labels * 80).astype(np.uint8)[:, None, None, None]
    return images, labels


class ReferenceSet(Dataset):
    """Pad, crop, flip and normalise one image at a time, as one would write it down from the paper."""

    def __init__(self, images, labels, architecture, recipe, choices):
        self.images, self.labels, self.architecture, self.p = images, labels, architecture, recipe.crop_padding
        self.choices = choices.T.tolist()

    def __len__(self):
        return len(self.choices)

    def __getitem__(self, i):
        row, top, left, flip = self.choices[i]
        image = torch.from_numpy(self.images[row]).permute(2, 0, 1)
        padded = F.pad(image, (self.p,) * 4)
        image = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
        if flip:
            image = torch.flip(image, (2,))
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.architecture.mean, self.architecture.std))
        return (image / torch.tensor(255.0) - mean) / std, self.labels[row]


def reference_weights(images, labels, architecture, recipe, seed, epochs):
    model = architecture.build(stream(seed, "training", 0, "weights")).train()
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, foreach=False
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    sizes = []
    for epoch in range(epochs):
        choices = training.draws(len(labels), recipe, seed, 0, epoch)
        for inputs, targets in DataLoader(
            ReferenceSet(images, labels, architecture, recipe, choices), recipe.batch_size
        ):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            sizes.append(len(targets))
        schedule.step()
    return model.state_dict(), sizes


@pytest.mark.parametrize("network, size, epochs", [("resnet20", 8, 2), ("mobilenetv2", 8, 2), ("vgg16bn", 32, 1)])
def test_same_weights_as_the_plain_loop(network, size, epochs, request):
    """Two steps an epoch, the second short. In double precision: batch normalisation over so few values amplifies
    rounding from step to step, and what is compared is the arithmetic."""
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    images, labels = images_and_labels(n=24, size=size)
    architecture = Architecture(network, 3, size, ARCHITECTURE.mean, ARCHITECTURE.std)
    recipe = Recipe(**{**vars(RECIPE), "epochs": 20, "lr": 0.01})
    expected, sizes = reference_weights(images, labels, architecture, recipe, 3, epochs)
    assert sizes == [16, 8] * epochs
    trainer = Trainer(images, labels, architecture, recipe, CPU, seed=3)
    for _ in range(epochs):
        trainer.run_epoch()
    found = trainer.model.state_dict()
    start = architecture.build(stream(3, "training", 0, "weights")).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")
        if tensor.ndim > 1:
            assert (tensor - start[name]).abs().max() > 1e-4, f"{name} has not moved by more than the tolerance"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision, compiled", [("fp32", False), ("bf16", False), ("bf16", True)])
def test_the_graph_of_a_step_does_what_the_step_does(precision, compiled, monkeypatch):
    """Two graphed steps an epoch and a short one, of a resumed training too."""
    # Algorithms that add in any order, or are chosen by the clock, would move bf16 weights by more than the tolerance.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    gpu = Device(torch.device("cuda"), precision, compiled, "tests")
    images, labels = images_and_labels(n=40)
    recipe = Recipe(**{**vars(RECIPE), "lr": 0.01})
    graphed, eager, resumed = (Trainer(images, labels, ARCHITECTURE, recipe, gpu, seed=3) for _ in range(3))
    assert graphed.full_step != graphed._step
    eager.full_step = eager._step
    for epoch in range(3):
        if epoch == 1:
            resumed.load_state_dict(graphed.state_dict())
        for trainer in (graphed, eager, resumed)[: 3 if epoch else 2]:
            trainer.run_epoch()
    # Compiled code rounds otherwise, which these few rows amplify: by 0.065 in the second epoch on an H200.
    losses = [[row["loss"] for row in trainer.history] for trainer in (graphed, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=0.2 if compiled else 0.05)
    for other in (resumed,) if compiled else (eager, resumed):
        for name, tensor in graphed.model.state_dict().items():
            torch.testing.assert_close(
                other.model.state_dict()[name], tensor, rtol=1e-2, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
            )
    start = ARCHITECTURE.build(stream(3, "training", 0, "weights")).state_dict()["stem.0.weight"]
    moved = (graphed.model.state_dict()["stem.0.weight"].cpu() - start).abs().max()
    assert moved > 5e-3, "by no more than the tolerance"


@pytest.fixture(scope="module")
def inductor():
    if lacking := what_a_cpu_lacks():
        pytest.skip(f"Inductor does not work here: {lacking}")


def test_compiled_code_is_not_taken_over_from_another_processor(inductor, tmp_path):
    """Inductor's cache has no word of the width of vectors, which is in the code. The other one here has none."""
    script = """
import sys, torch
from torch._dynamo.utils import counters
from torch._inductor import cpu_vec_isa
from stages.lib import training
if sys.argv[1] == "other":
    cpu_vec_isa.pick_vec_isa = lambda: cpu_vec_isa.invalid_vec_isa
training.compiled(torch.nn.Softmax(1), torch.device("cpu"))(torch.rand(64, 64))
print(counters["inductor"]["fxgraph_cache_hit"])
"""
    command, root = [sys.executable, "-c", script], os.path.dirname(os.path.dirname(__file__))
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    hits = [
        subprocess.run([*command, which], cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
        for which in ("this", "this", "other")
    ]
    assert [int(hit) for hit in hits] == [0, 1, 0]


def gradient(network, x, labels, dtype, kept=None):
    """Of the loss by all weights, one vector in float64. kept: of the compiled network, see `training.compiled`."""
    model = models.build(network, 3, 10, x.shape[2], seed=0).to(x.device, dtype, memory_format=torch.channels_last)
    forward = model if kept is None else training.compiled(model, x.device, kept)
    F.cross_entropy(forward(x.to(dtype)), labels).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()


def batch(n, size, where):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    return x.to(where), torch.randint(0, 10, (n,), generator=generator).to(where)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("network", models.NETWORKS)
def test_compiled_for_a_gpu_has_the_gradient_of_eager(network, monkeypatch):
    """Float32 rounds, and a deep network amplifies it: on an H200 eager's gradient is 3e-4 (ResNet-20) to 7e-3 (MobileNetV2) of
    its length away from the one in float64. The compiled one is about as far off; its order of sums is another."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    data = batch(128, 32, "cuda")
    exact = gradient(network, *data, torch.float64)
    eager, compiled = (
        (gradient(network, *data, torch.float32, kept) - exact).norm() / exact.norm() for kept in (None, 1.0)
    )
    assert compiled < 4 * eager + 1e-5


@pytest.mark.parametrize("network", ["resnet20", pytest.param("mobilenetv2", marks=pytest.mark.slow)])
def test_compiled_for_a_cpu_has_the_gradient_of_eager(network, inductor):
    """In double precision: see `test_same_weights_as_the_plain_loop`."""
    data = batch(16, 8, "cpu")
    exact, compiled = (gradient(network, *data, torch.float64, kept) for kept in (None, training.KEPT_ON_CPU[network]))
    assert 0 < (compiled - exact).norm() / exact.norm() < 1e-9


class StandInStream:
    def wait_stream(self, other): ...


def graphed_on_a_cpu(trainer, monkeypatch):
    """`trainer` with its learning rate in a tensor and its full steps through `_graphed`, as on a GPU: what is recorded is
    not executed, and a replay does it with what then stands in the recorded input."""
    inputs = []

    class Graph:
        def replay(self):
            trainer._step(inputs[-1])

    @contextlib.contextmanager
    def recording(graph):
        before = [tensor.clone() for tensor in trainer._tensors()]
        yield
        for tensor, value in zip(trainer._tensors(), before, strict=True):
            tensor.copy_(value)

    stand_ins = {"Stream": StandInStream, "current_stream": StandInStream, "CUDAGraph": Graph, "graph": recording}
    for name, stand_in in {**stand_ins, "stream": lambda _: contextlib.nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    trainer.lr = trainer.optimizer.param_groups[0]["lr"] = torch.tensor(trainer.recipe.lr)
    trainer.full_step = trainer._graphed(lambda batch: (inputs.append(batch), trainer._step(batch)))


def test_all_about_the_graph_but_the_graph_does_what_the_step_does(monkeypatch):
    """Without a GPU: warm-up undone, learning rate and rows as they are at replay, the short batch, a resumed training."""
    images, labels = images_and_labels(n=40)
    plain, graphed, resumed = (Trainer(images, labels, ARCHITECTURE, RECIPE, CPU, seed=3) for _ in range(3))
    for trainer in (graphed, resumed):
        graphed_on_a_cpu(trainer, monkeypatch)
    addresses = [tensor.data_ptr() for tensor in graphed._tensors()]
    for epoch in range(3):
        expected = plain.run_epoch()
        if epoch == 1:
            resumed.load_state_dict(graphed.state_dict())
        for trainer in (graphed, resumed)[: 2 if epoch else 1]:
            assert trainer.run_epoch() == expected
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(graphed.model.state_dict()[name], tensor), name
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert addresses == [tensor.data_ptr() for tensor in graphed._tensors()], "a graph writes to where it was recorded"


def test_learning_rate_is_the_closed_form():
    recipe = Recipe(**{**vars(RECIPE), "epochs": 100, "lr": 0.1})
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    for epoch in range(100):
        assert learning_rate(recipe, epoch) == pytest.approx(0.05 * (1 + math.cos(math.pi * epoch / 100)), rel=1e-12)
        assert learning_rate(recipe, epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()
    assert learning_rate(recipe, 100) == pytest.approx(0, abs=1e-15)


def test_history_tells_loss_accuracy_and_rate():
    images, labels = images_and_labels(n=200)
    trainer = Trainer(images, labels, ARCHITECTURE, Recipe(**{**vars(RECIPE), "epochs": 6}), CPU, seed=0)
    for _ in range(6):
        trainer.run_epoch()
    assert [row["epoch"] for row in trainer.history] == [1, 2, 3, 4, 5, 6]
    assert trainer.history[0]["lr"] == 0.05 and trainer.history[-1]["lr"] < 0.01
    assert trainer.history[0]["loss"] > trainer.history[-1]["loss"] > 0
    assert trainer.history[-1]["accuracy"] > 0.9


def test_one_seed_gives_one_model_bit_for_bit():
    images, labels = images_and_labels()
    states = []
    for seed in (7, 7, 8):
        trainer = Trainer(images, labels, ARCHITECTURE, RECIPE, CPU, seed)
        trainer.run_epoch()
        states.append(trainer.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_draws_are_a_permutation_with_all_offsets_and_half_flipped():
    recipe = Recipe(**{**vars(RECIPE), "crop_padding": 4})
    n = 81 * 400
    rows, top, left, flip = training.draws(n, recipe, seed=0, attempt=0, epoch=0)
    assert torch.equal(rows.sort().values, torch.arange(n))
    counts = torch.bincount(top * 9 + left, minlength=81)
    # Chi-squared with 80 degrees of freedom: 99.99 % of the time under 136.
    assert len(counts) == 81 and ((counts - 400.0) ** 2 / 400).sum() < 136
    assert abs(flip.double().mean() - 0.5) < 4 * 0.5 / math.sqrt(n)
    assert abs(torch.corrcoef(torch.stack([top, left, flip]).double()).fill_diagonal_(0)).max() < 4 / math.sqrt(n)
    assert not torch.equal(rows, training.draws(n, recipe, 0, 0, epoch=1)[0])
    assert training.draws(n, Recipe(**{**vars(recipe), "flip": False}), 0, 0, 0)[3].sum() == 0


def test_crops_are_what_numpy_cuts_out():
    images, _ = images_and_labels(n=5, size=6)
    view = training.crops(images, 2, torch.device("cpu"))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    assert view.shape == (5, 5, 5, 6, 6, 3)
    for top in range(5):
        for left in range(5):
            np.testing.assert_array_equal(view[:, top, left], padded[:, top : top + 6, left : left + 6])


def test_crops_take_no_memory_of_their_own():
    images, _ = images_and_labels(n=5, size=6)
    assert training.crops(images, 2, torch.device("cpu")).untyped_storage().nbytes() == 5 * 10 * 10 * 3


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.set_num_threads(1)
from stages.lib import scratch, training
from test_training import ARCHITECTURE, CPU, RECIPE, images_and_labels
scratch.MAX_COST = 1e9  # save after every epoch
images, labels = images_and_labels(n=400)
recipe = training.Recipe(**{{**vars(RECIPE), "epochs": 25}})
with scratch.Scratch({{}}, {folder!r}, min_seconds=0) as saved:
    trained = training.train(images, labels, ARCHITECTURE, recipe, CPU, 1, "test", saved)
    torch.save([trained.state, trained.history], {out!r})
saved.remove()
"""


def interrupted(tmp_path, name, signals):
    """Run the training as a process, interrupted after so many seconds by such a signal each; return its result."""
    here = os.path.dirname(__file__)
    script = SCRIPT.format(
        tests=here, root=os.path.dirname(here), folder=str(tmp_path / name), out=str(tmp_path / f"{name}.pt")
    )
    resumed = 0
    for after, how in signals:
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
        # From the first epoch on, so that the kill falls into the training and not into the imports.
        line = process.stderr.readline()
        while line and "epoch" not in line:
            line = process.stderr.readline()
        time.sleep(after)
        process.send_signal(how)
        process.communicate(timeout=60)
    final = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, check=True, timeout=120)
    resumed = "going on after epoch" in final.stderr
    return torch.load(tmp_path / f"{name}.pt", weights_only=True), resumed


def test_killed_training_goes_on_and_ends_bit_equal(tmp_path):
    (state, history), resumed = interrupted(tmp_path, "through", [])
    assert not resumed
    rng = random.Random(0)
    signals = [(rng.uniform(0, 0.5), how) for how in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL)]
    (again, history_again), resumed = interrupted(tmp_path, "killed", signals)
    assert resumed, "the kills came too late to be a test"
    assert history == history_again
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not list((tmp_path / "killed").glob("*.pt")), "a finished training leaves no scratch checkpoint"


def test_saving_takes_at_most_one_percent(tmp_path, monkeypatch):
    clock, saves = [0.0], []
    monkeypatch.setattr(scratch.time, "monotonic", lambda: clock[0])
    keeper = scratch.Scratch({}, tmp_path)

    def state():
        saves.append(clock[0])
        clock[0] += 3.0  # a slow disk
        return {}

    for _ in range(5000):
        clock[0] += 1.0
        keeper.offer(state)
    assert len(saves) > 10
    assert 3.0 * len(saves) / clock[0] < 0.0101
    assert saves[0] >= keeper.min_seconds


def test_a_full_disk_does_not_end_a_training(tmp_path, small_disk, capsys):
    keeper = scratch.Scratch({}, small_disk.folder, 0)
    keeper.offer(lambda: {"epoch": 1})
    small_disk.leave(4096)
    for _ in range(2):
        keeper.saved -= 100
        keeper.offer(lambda: {"weights": torch.zeros(10_000)})
    assert capsys.readouterr().err.count(f"{keeper.path}: No space left on device; training goes on") == 1
    assert keeper.load() == {"epoch": 1} and not list(small_disk.folder.glob("*.tmp"))


def test_scratch_belongs_to_one_training(tmp_path):
    one, same, other = (scratch.Scratch({"seed": seed}, tmp_path, 0) for seed in (1, 1, 2))
    monotonic = time.monotonic() - 100
    one.saved = monotonic
    one.offer(lambda: {"epoch": 4})
    assert same.load() == {"epoch": 4}
    assert other.load() is None
    one.path.write_bytes(one.path.read_bytes()[:50])
    assert same.load() is None, "a damaged scratch checkpoint is as good as none"


def test_second_process_waits_for_the_same_training(tmp_path, capsys):
    import threading

    first, second = scratch.Scratch({}, tmp_path), scratch.Scratch({}, tmp_path)
    with first:
        waiting = threading.Thread(target=second.__enter__)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
    waiting.join(5)
    assert not waiting.is_alive()
    second.__exit__()
    assert "waiting" in capsys.readouterr().err


def test_a_collapse_is_recorded_and_repeated_with_another_seed(monkeypatch):
    """The first network answers with one class whatever it sees; the second is as it should be."""
    images, labels = images_and_labels(n=120)
    build, seeds = models.build, []

    def first_is_dead(network, in_channels, n_classes, image_size, seed):
        model = build(network, in_channels, n_classes, image_size, seed)
        seeds.append(seed)
        if len(seeds) == 1:
            for parameter in model.parameters():
                torch.nn.init.zeros_(parameter)
        return model

    monkeypatch.setattr(models, "build", first_is_dead)
    recipe = Recipe(**{**vars(RECIPE), "epochs": 8})
    trained = training.train(images, labels, ARCHITECTURE, recipe, CPU, 0, "test")
    assert len(trained.collapses) == 1 and "accuracy" in trained.collapses[0]
    assert len(set(seeds)) == 2
    assert len(trained.history) == 8 and trained.history[-1]["accuracy"] > 0.8
    assert torch.isfinite(next(iter(trained.state.values()))).all()


def test_three_collapses_end_in_one_line():
    images, labels = images_and_labels()
    with pytest.raises(UserError, match=r"test collapsed 3 times \(loss nan.*lower train.lr") as error:
        training.train(images, labels, ARCHITECTURE, Recipe(**{**vars(RECIPE), "lr": 1e20}), CPU, 0, "test")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "counts, n_classes, early, late",
    [
        ([100] * 10, 10, 0.2, 0.2),  # balanced: twice chance
        ([595] + [95] * 99, 100, *[595 / 10000 + 0.02 * (1 - 595 / 10000)] * 2),  # CIFAR-100, 5 % poison: 2/C is 0.02
        ([50, 50], 2, 0.51, 0.51),  # 2/C would ask for 1.0
        ([90, 10], 2, 0.5, 0.902),  # the larger class is learnt first
    ],
)
def test_collapse_floor(counts, n_classes, early, late):
    labels = np.repeat(np.arange(len(counts)), counts)
    assert training.collapse_accuracy(labels, n_classes, at_the_end=False) == pytest.approx(early, abs=1e-12)
    assert training.collapse_accuracy(labels, n_classes, at_the_end=True) == pytest.approx(late, abs=1e-12)
    assert late > max(counts) / sum(counts), "a constant answer must count as a collapse in the end"


def test_collapse_is_judged_after_a_tenth_but_not_before_the_fifth_epoch():
    assert [training.collapse_epoch(epochs) for epochs in (1, 30, 50, 100, 101)] == [5, 5, 5, 10, 11]


def test_a_collapse_late_in_the_training_is_seen(monkeypatch):
    """A network that answers with one class after a good start is not scored in silence."""
    images, labels = images_and_labels(n=120)
    recipe = Recipe(**{**vars(RECIPE), "epochs": 7})
    trainer = Trainer(images, labels, ARCHITECTURE, recipe, CPU, seed=0)
    for _ in range(6):
        trainer.run_epoch()
    for parameter in trainer.model.parameters():
        torch.nn.init.zeros_(parameter)
    with pytest.raises(training.Collapse, match="after epoch 7"):
        trainer.run_epoch()


def test_a_last_batch_of_one_row_joins_the_one_before():
    choices = training.draws(33, RECIPE, seed=0, attempt=0, epoch=0)
    batches = training.split(choices, 16)
    assert [batch.shape[1] for batch in batches] == [16, 17]
    assert torch.equal(torch.cat(batches, 1), choices)
    assert [batch.shape[1] for batch in training.split(choices, 32)] == [33]
    assert [batch.shape[1] for batch in training.split(choices, 31)] == [31, 2]
    images, labels = images_and_labels(n=33)
    with pytest.raises(UserError, match="two rows at least"):
        Trainer(images[:1], labels[:1], ARCHITECTURE, RECIPE, CPU, seed=0)


def test_bf16_keeps_weights_and_statistics_in_fp32():
    images, labels = images_and_labels(n=64)
    device = Device(torch.device("cpu"), "bf16", False, "tests")
    trainer = Trainer(images, labels, ARCHITECTURE, RECIPE, device, seed=0)
    half = trainer.run_epoch()
    assert {t.dtype for t in trainer.model.state_dict().values()} == {torch.float32, torch.int64}
    full = Trainer(images, labels, ARCHITECTURE, RECIPE, CPU, seed=0).run_epoch()
    assert half["loss"] == pytest.approx(full["loss"], rel=0.05) and half["loss"] != full["loss"]


def test_a_compiled_training_is_the_eager_one_and_resumed_the_same_bit_for_bit(inductor):
    """Full steps compiled, the short one eager."""
    images, labels = images_and_labels(n=40)
    how = Device(torch.device("cpu"), "fp32", True, "tests")
    eager, compiled, resumed = (Trainer(images, labels, ARCHITECTURE, RECIPE, which, 0) for which in (CPU, how, how))
    assert compiled.full_step != compiled._step
    losses = [trainer.run_epoch()["loss"] for trainer in (eager, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    resumed.load_state_dict(copy.deepcopy(compiled.state_dict()))
    for trainer in (compiled, resumed):
        trainer.run_epoch()
    state = resumed.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in compiled.model.state_dict().items())
