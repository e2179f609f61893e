"""Convolutional networks of torch.nn in their published form, of any width: the tests and the benchmark use them."""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.downsample(x)
        return self.relu(y)


def residual_stages(width: int) -> nn.Sequential:
    """The eight blocks of ResNet-18; the published width is 64."""
    widths = [width, width, 2 * width, 4 * width, 8 * width]
    stages = [
        nn.Sequential(BasicBlock(inputs, outputs, 1 + (i > 0)), BasicBlock(outputs, outputs, 1))
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths))
    ]
    return nn.Sequential(*stages)


class ResNet18(nn.Module):
    """ResNet-18 with the stem for images of 32 x 32 (CIFAR) or of 224 x 224 (ImageNet)."""

    def __init__(self, width: int = 64, imagenet: bool = False, classes: int = 10) -> None:
        super().__init__()
        kernel, stride, padding = (7, 2, 3) if imagenet else (3, 1, 1)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        self.stages = residual_stages(width)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.stages(x)), 1))


class FunctionalBlock(BasicBlock):
    """The same, with F.relu."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x), inplace=True)


class FunctionalResNet(nn.Module):
    """A small residual network whose forward calls functions instead of layers without parameters."""

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.block1, self.block2 = FunctionalBlock(width, width, 1), FunctionalBlock(width, 2 * width, 2)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = F.adaptive_avg_pool2d(self.block2(self.block1(x)), 1)
        return self.fc(torch.flatten(x, 1))


class LayerNorm2d(nn.LayerNorm):
    """A norm over the channels of an image; a subclass, which `swap` leaves, so its forward calls the function."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm over the channels, MLP on every pixel, scale, and a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(self.act(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """A stem that cuts the image into patches, two blocks with a reduction between them, and a head."""

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, 4), LayerNorm2d(width, eps=1e-6))
        self.reduce = nn.Sequential(LayerNorm2d(width, eps=1e-6), nn.Conv2d(width, 2 * width, 2, 2))
        self.block1, self.block2 = ConvNeXtBlock(width), ConvNeXtBlock(2 * width)
        self.norm, self.head = nn.LayerNorm(2 * width, eps=1e-6), nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.reduce(self.block1(self.stem(x))))
        return self.head(self.norm(x.mean([-2, -1])))


def convolved(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions, each with a norm and an activation."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.GroupNorm(2, outputs), nn.SiLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Two levels down and up again: up by a transposed convolution and by interpolation; classes for every pixel."""

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        self.down1, self.down2 = convolved(3, width), convolved(width, 2 * width)
        self.middle, self.pool = convolved(2 * width, 4 * width), nn.MaxPool2d(2)
        self.rise2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.up2 = convolved(4 * width, 2 * width)
        self.rise1 = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), nn.Conv2d(2 * width, width, 1)
        )
        self.up1, self.head = convolved(2 * width, width), nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(self.pool(fine))
        y = self.rise2(self.middle(self.pool(coarse)))
        y = self.up2(torch.cat([coarse, y], 1))
        return self.head(self.up1(torch.cat([fine, self.rise1(y)], 1)))


class DenseLayer(nn.Module):
    """Norm, ReLU and convolution, twice; its output joins all the inputs before it."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = (
            nn.BatchNorm2d(4 * growth),
            nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False),
        )
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseBlock(nn.ModuleList):
    """Layers of which each sees all outputs before it."""

    def __init__(self, inputs: int, growth: int, depth: int) -> None:
        super().__init__(DenseLayer(inputs + i * growth, growth) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self:
            features.append(layer(features))
        return torch.cat(features, 1)


def densenet(growth: int, depth: int = 3, classes: int = 10) -> nn.Sequential:
    """DenseNet: two dense blocks with a transition between them, which halves channels and image."""
    inner = 2 * growth + depth * growth
    outer = inner // 2 + depth * growth
    return nn.Sequential(
        *(nn.Conv2d(3, 2 * growth, 3, 1, 1, bias=False), DenseBlock(2 * growth, growth, depth)),
        *(nn.BatchNorm2d(inner), nn.ReLU(inplace=True), nn.Conv2d(inner, inner // 2, 1, bias=False)),
        *(nn.AvgPool2d(2, 2), DenseBlock(inner // 2, growth, depth)),
        *(nn.BatchNorm2d(outer), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(outer, classes)),
    )


class InvertedResidual(nn.Module):
    """Wide 1 x 1 convolution, depthwise 3 x 3, narrow 1 x 1; around them if the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *(normed(inputs, wide, 1) if expansion > 1 else ()),
            *normed(wide, wide, 3, stride, groups=wide),
            *normed(wide, outputs, 1)[:2],
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def normed(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, norm, ReLU6."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


def mobilenet(width: int, classes: int = 10) -> nn.Sequential:
    """The layers of MobileNetV2, with three inverted residuals."""
    return nn.Sequential(
        *normed(3, width, 3, 2),
        InvertedResidual(width, width, 1, 1),
        InvertedResidual(width, 2 * width, 2, 6),
        InvertedResidual(2 * width, 2 * width, 1, 6),
        *normed(2 * width, 8 * width, 1),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8 * width, classes)),
    )


# A small one of each, and the sides of its images.
SMALL: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-18, 32 x 32": (lambda: ResNet18(4), 16),
    "ResNet-18, 224 x 224": (lambda: ResNet18(4, imagenet=True), 40),
    "ResNet of functions": (lambda: FunctionalResNet(4), 24),
    "ConvNeXt": (lambda: ConvNeXt(6), 16),
    "U-Net": (lambda: UNet(4), 8),
    "DenseNet": (lambda: densenet(4), 8),
    "MobileNet": (lambda: mobilenet(4), 16),
}
