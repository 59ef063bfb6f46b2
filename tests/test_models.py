"""Golden facts of the networks."""

import copy

import pytest
import torch
from torch import nn

from stages.lib import models
from stages.lib.errors import UserError

FACTS = {  # parameters for 3 channels and 10 classes, features, convolutions
    "resnet20": (269_722, 64, 19),
    "vgg16bn": (14_728_266, 512, 13),
    "mobilenetv2": (2_236_682, 1280, 52),
}


@pytest.mark.parametrize("network", models.NETWORKS)
def test_facts(network):
    parameters, width, convolutions = FACTS[network]
    model = models.build(network, 3, 10, 32, seed=0).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == convolutions
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = model.forward_features(x.clone())
        assert features.shape == (4, width) and width == model.n_features
        assert torch.equal(model.forward_head(features), model(x.clone()))
        assert features.min() >= 0, "penultimate features come out of a rectifier"


@pytest.mark.parametrize("network", models.NETWORKS)
def test_input_is_left_untouched(network):
    """Rectifiers work in place, the input must not be among what they touch."""
    model = models.build(network, 1, 10, 32, seed=0)
    x = torch.randn(4, 1, 32, 32)
    before = x.clone()
    model(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("network", models.NETWORKS)
def test_weights_follow_the_seed_alone(network):
    one, two, other = (models.build(network, 3, 10, 32, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    models.build(network, 3, 10, 32, seed=1)
    assert torch.equal(torch.rand(3), expected), "building must not touch the global generator"


def test_zero_padded_shortcut():
    """Option A: with the residual branch at zero, a block of stride 2 subsamples and pads with zero channels."""
    block = models._BasicBlock(2, 4, 2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 2, 4, 4)
    expected = torch.zeros(1, 4, 2, 2)
    expected[:, 1:3] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


def test_spatial_sizes_of_mobilenetv2():
    """Strides for 32 x 32: 32, 32, 16, 8, 8, 4, 4 after the seven groups of the paper's table 2."""
    model, sizes = models.build("mobilenetv2", 3, 10, 32, seed=0).eval(), []
    x = torch.zeros(1, 3, 32, 32)
    for layer in model.layers:
        x = layer(x)
        sizes.append((x.shape[1], x.shape[2]))
    assert [size for i, size in enumerate(sizes) if i == 0 or size != sizes[i - 1]] == [
        (32, 32), (16, 32), (24, 32), (32, 16), (64, 8), (96, 8), (160, 4), (320, 4), (1280, 4),
    ]  # fmt: skip


@pytest.mark.parametrize("network", models.NETWORKS)
@pytest.mark.parametrize("size, first", [(32, 32), (63, 63), (64, 32), (96, 48)])
def test_large_images_are_halved_by_the_first_convolution(network, size, first):
    model, sizes = models.build(network, 3, 10, size, seed=0).eval(), []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, given, out: sizes.append((*given[0].shape[2:], *out.shape[2:])))
    with torch.inference_mode():
        model(torch.zeros(1, 3, size, size))
    assert sizes[0] == (size, size, first, first)
    assert sizes[1] == (first, first, first, first), "it alone"


@pytest.mark.parametrize("in_channels, channels, size", [(16, 16, 32), (3, 8, 4)])
def test_a_convolution_on_four_columns_at_a_time_is_the_convolution(in_channels, channels, size):
    conv = models._Conv3x3(in_channels, channels).double()
    assert conv.narrow and not models._Conv3x3(32, 32).narrow and not models._Conv3x3(16, 16, stride=2).narrow
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, in_channels, 5, size, generator=generator, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    direction = torch.randn(2, channels, 5, size, generator=generator, dtype=torch.float64)
    results = []
    for forward in (conv.forward, conv.forward_folded):
        out = forward(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        results.append([out, *torch.autograd.grad(out, [x, conv.weight], direction)])
    for plain, folded in zip(*results, strict=True):
        torch.testing.assert_close(folded, plain, rtol=1e-12, atol=1e-12)


def test_the_compiled_rectifier_keeps_its_result_and_gives_the_same_derivative():
    rectifier, graphs = models._ReLU6(), []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(rectifier, backend=backend)
    values = torch.tensor([-float("inf"), -1, 0, 1e-9, 3, 6 - 1e-6, 6, 7, float("inf"), float("nan")])
    results = []
    for forward in (rectifier, compiled):
        x = values.clone().requires_grad_()
        out = forward(x * 1)  # it works in place, and a leaf must not be written to
        out.backward(torch.arange(1.0, 11))
        results.append((out.detach(), x.grad))
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=0, atol=0, equal_nan=True)
    assert len(graphs) == 1 and "relu6" not in graphs[0] and "hardtanh" not in graphs[0]


@pytest.mark.parametrize("expansion", [1, 6])
def test_a_bottleneck_computed_again_gives_the_same_bits_and_keeps_less(expansion):
    torch.manual_seed(0)
    again = models._InvertedResidual(4, 4, 1, expansion).train()
    kept = copy.deepcopy(again)
    kept.layers = nn.Sequential(*kept.layers)
    x, direction = torch.randn(8, 4, 6, 6), torch.randn(8, 4, 6, 6)
    results, sizes = [], []
    for block in (kept, again):
        leaf, saved = x.clone().requires_grad_(), []

        def remember(tensor, saved=saved):
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            out = block(leaf)
        out.backward(direction)
        gradients = [parameter.grad for parameter in block.parameters()]
        results.append([out, leaf.grad, *gradients, *block.state_dict().values()])
        sizes.append(sum(saved))
    for plain, other in zip(*results, strict=True):
        assert torch.equal(other, plain)
    # Autograd's part; beside it the inputs of the parts, the first of which the block before keeps anyway.
    assert sizes[1] < sizes[0] / 2


def test_too_small_images_are_refused():
    with pytest.raises(UserError, match="vgg16bn needs images of at least 32 pixels a side, got 16"):
        models.build("vgg16bn", 3, 10, 16, seed=0)
    for network, size in models.MIN_IMAGE_SIZE.items():
        assert models.build(network, 3, 10, size, seed=0)(torch.zeros(2, 3, size, size)).shape == (2, 10)


def test_unknown_network():
    with pytest.raises(UserError, match="use one of resnet20, vgg16bn, mobilenetv2"):
        models.build("resnet18", 3, 10, 32, seed=0)
