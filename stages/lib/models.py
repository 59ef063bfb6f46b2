"""The three victim networks, in the variants for 32 x 32 images; from 64 pixels a side on, the first convolution takes every
second pixel as its centre (stride 2), so that what follows sees half the pixels a side at a quarter of the cost.

Each has ``forward_features(x) -> (B, D)``, the penultimate vector, and ``forward_head(features) -> (B, C)``, the
logits; ``forward`` is the two in a row. Input: float (B, channels, H, W), normalised.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stages.lib.errors import UserError


class _ClampTo6(torch.autograd.Function):
    """ReLU6 whose derivative is read off its result, which the next convolution keeps anyway. Inductor's own computes the
    batch normalisation before it once more, writes it out in float32 and reads it twice."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        result = x.clamp(0, 6)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return torch.where((result <= 0) | (result >= 6), 0, gradient)


class _ReLU6(nn.ReLU6):
    def __init__(self):
        super().__init__(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return _ClampTo6.apply(x) if torch.compiler.is_compiling() else super().forward(x)


class _Conv3x3(nn.Conv2d):
    """3 x 3, padding 1, no bias. Compiled for a GPU, a narrow one (under 32 channels in and out) is computed on four columns
    at a time: the same sums, in matrix products of a width that the tensor cores are made for."""

    COLUMNS = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__(in_channels, channels, 3, stride, 1, bias=False)
        self.narrow = stride == 1 and max(in_channels, channels) < 32

    def forward(self, x: Tensor) -> Tensor:
        if self.narrow and x.is_cuda and torch.compiler.is_compiling() and x.shape[3] % self.COLUMNS == 0:
            return self.forward_folded(x)
        return super().forward(x)

    def forward_folded(self, x: Tensor) -> Tensor:
        """What `forward` gives. In channels-last memory neighbouring columns lie one after the other, so that a view makes
        channels of them: (B, C, H, W) is (B, 4C, H, W / 4), and the kernel over them is the same taps and zeros."""
        columns = self.COLUMNS
        # Per column that is written: the taps where they lie among the 3 x 4 columns that are read.
        kernel = torch.stack([F.pad(self.weight, (columns - 1 + c, 2 * columns - 2 - c)) for c in range(columns)])
        kernel = kernel.unflatten(4, (3, columns)).permute(0, 1, 5, 2, 3, 4).flatten(2, 3).flatten(0, 1)
        batch, channels, height, width = x.shape
        x = x.permute(0, 2, 3, 1).reshape(batch, height, width // columns, columns * channels).permute(0, 3, 1, 2)
        out = F.conv2d(x, kernel.contiguous(memory_format=torch.channels_last), padding=1)
        return out.permute(0, 2, 3, 1).reshape(batch, height, width, -1).permute(0, 3, 1, 2)


class _Network(nn.Module):
    n_features: int

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, features: Tensor) -> Tensor:
        return self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = _Conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _Conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu_(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.new_channels:  # option A of the paper: subsample, pad with zero channels
            half = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.new_channels - half))
        return F.relu_(out + x)


class ResNet20(_Network):
    """ResNet-20 for CIFAR with zero-padded shortcuts (He et al. 2016, arXiv:1512.03385, section 4.2).

    269,722 parameters for 3 channels and 10 classes; 64 features.
    """

    n_features = 64

    def __init__(self, in_channels: int, n_classes: int):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        blocks, width = [], 16
        for channels, stride in ((16, 1), (32, 2), (64, 2)):
            for i in range(3):
                blocks.append(_BasicBlock(width, channels, stride if i == 0 else 1))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(self.n_features, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.head.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


class VGG16BN(_Network):
    """VGG-16 (configuration D) with batch normalisation and one linear layer on 512 features.

    Simonyan & Zisserman 2015 (arXiv:1409.1556) with the two hidden linear layers left out, as is usual for CIFAR;
    convolutions keep their bias. 14,728,266 parameters for 3 channels and 10 classes.
    """

    n_features = 512

    def __init__(self, in_channels: int, n_classes: int):
        super().__init__()
        layers, width = [], in_channels
        for channels in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            if channels == 0:
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(width, channels, 3, 1, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
                width = channels
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(self.n_features, n_classes)
        _init_fan_out(self)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))  # 1 x 1 for 32 x 32 images


class _Bottleneck(nn.Sequential):
    """Convolutions with batch normalisation and ReLU6 between them. Trained on a CPU, what they make on the way to the
    depthwise convolution and on to the last one is not kept for the backward pass, but computed again, bit for bit."""

    def forward(self, x: Tensor) -> Tensor:
        recomputes = x.device.type == "cpu" and self.training and torch.is_grad_enabled()
        if not recomputes or torch.compiler.is_compiling():
            return super().forward(x)
        *layers, last = self
        for part in filter(None, (layers[:4], layers[4:])):
            x = checkpoint(_Twice(part), x, use_reentrant=False, preserve_rng_state=False)
        return last(x)


class _Twice:
    """Layers in a row that are run once more by the backward pass, which leaves running statistics as they are."""

    def __init__(self, layers: list[nn.Module]):
        self.layers, self.again = layers, False

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.again and isinstance(layer, nn.BatchNorm2d):
                running = layer.running_mean, layer.running_var
                x = F.batch_norm(x, *running, layer.weight, layer.bias, training=True, momentum=0, eps=layer.eps)
            else:
                x = layer(x)
        self.again = True
        return x


class _InvertedResidual(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        layers = []
        if expansion > 1:
            layers += [nn.Conv2d(in_channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), _ReLU6()]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            _ReLU6(),
        ]
        layers += [nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)]
        self.layers = _Bottleneck(*layers)
        self.identity = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.identity else self.layers(x)


class MobileNetV2(_Network):
    """MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) with the first two strides set to 1 for 32 x 32 images.

    No dropout. 2,236,682 parameters for 3 channels and 10 classes; 1,280 features.
    """

    n_features = 1280

    def __init__(self, in_channels: int, n_classes: int):
        super().__init__()
        layers, width = (
            [nn.Conv2d(in_channels, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), _ReLU6()],
            32,
        )
        for expansion, channels, repeats, stride in (
            (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ):  # fmt: skip
            for i in range(repeats):
                layers.append(_InvertedResidual(width, channels, stride if i == 0 else 1, expansion))
                width = channels
        layers += [
            nn.Conv2d(width, self.n_features, 1, bias=False),
            nn.BatchNorm2d(self.n_features),
            _ReLU6(),
        ]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(self.n_features, n_classes)
        _init_fan_out(self)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


def _init_fan_out(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


NETWORKS = {"resnet20": ResNet20, "vgg16bn": VGG16BN, "mobilenetv2": MobileNetV2}
MIN_IMAGE_SIZE = {"resnet20": 4, "vgg16bn": 32, "mobilenetv2": 8}  # pixels a side that survive all strides
HALVED_FROM = 64  # pixels a side from which the first convolution has stride 2


def side_in_full(image_size: int) -> int:
    """Pixels a side after the first convolution."""
    return (image_size + 1) // 2 if image_size >= HALVED_FROM else image_size


def build(network: str, in_channels: int, n_classes: int, image_size: int, seed: int) -> _Network:
    """New network with weights drawn from `seed` on the CPU (the same on every device); in training mode."""
    if network not in NETWORKS:
        raise UserError(f"network {network!r} is not known; use one of {', '.join(NETWORKS)}")
    if image_size < MIN_IMAGE_SIZE[network]:
        raise UserError(
            f"{network} needs images of at least {MIN_IMAGE_SIZE[network]} pixels a side, got {image_size}; "
            "raise data.pad_to or data.image_size, or choose another model.network"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[network](in_channels, n_classes)
    if image_size >= HALVED_FROM:
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        first.stride = (2, 2)
    return model
