"""The models on which swap(fuse=True) is tested, with what runs as one in each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import manualprop


class MLP(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor], drop: float = 0.3) -> None:
        super().__init__()
        self.fc1, self.act, self.drop, self.fc2 = nn.Linear(6, 16), act, nn.Dropout(drop), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.drop(self.act(self.fc1(x))))
        return y


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 6)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class Block(nn.Module):
    """The residual block of ResNet-18 and 34, with one axis of positions or two."""

    def __init__(self, channels: int, out: int, stride: int = 1, axes: int = 1) -> None:
        super().__init__()
        conv, batch_norm = getattr(nn, f"Conv{axes}d"), getattr(nn, f"BatchNorm{axes}d")
        self.conv1, self.bn1 = conv(channels, out, 3, stride, 1, bias=False), batch_norm(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(out, out, 3, 1, 1, bias=False), batch_norm(out)
        self.downsample = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(conv(channels, out, 1, stride, bias=False), batch_norm(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        y: Tensor = self.relu(out)
        return y


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(5, 3, 1), nn.BatchNorm1d(3)
        self.conv2, self.bn2 = nn.Conv1d(3, 3, 3, padding=1, groups=3), nn.BatchNorm1d(3)
        self.conv3, self.bn3, self.act = nn.Conv1d(3, 5, 1), nn.BatchNorm1d(5), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        y: Tensor = self.act(x + self.bn3(self.conv3(out)))
        return y


class Excited(Bottleneck):
    """The block of SENet: a product with gates, over which the sum with the skip connection is written."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Conv1d(5, 5, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.act(self.bn2(self.conv2(out)))))
        out = out * self.gate(out)
        out += x
        return out


class PreActivation(nn.Module):
    """Its shortcut starts at the first activation, which a function computes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm1d(5), nn.Conv1d(5, 5, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm1d(5), nn.Conv1d(5, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nn.functional.relu(self.bn1(x), inplace=True)
        out = self.conv2(torch.relu(self.bn2(self.conv1(h))))
        y: Tensor = out + h
        return y


class ConvNorm(nn.Sequential):
    def __init__(self, channels: int, out: int, kernel: int, groups: int = 1) -> None:
        conv = nn.Conv1d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm1d(out), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """The block of MobileNetV2: the neighbours are in containers of their own."""

    def __init__(self) -> None:
        super().__init__()
        last = nn.Conv1d(10, 5, 1, bias=False), nn.BatchNorm1d(5)
        self.conv = nn.Sequential(ConvNorm(5, 10, 1), ConvNorm(10, 10, 3, groups=10), *last)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv(x)
        return y


class Dense(nn.Module):
    """Two layers of DenseNet; each reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm1d(5), nn.Conv1d(5, 3, 1)
        self.norm2, self.relu, self.conv2 = nn.BatchNorm1d(8), nn.Hardswish(), nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv1(self.relu(self.norm1(x)))
        second = self.conv2(self.relu(self.norm2(torch.cat([x, first], 1))))
        return torch.cat([x, first, second], dim=1)


class ResNet(nn.Module):
    """ResNet-18 with the stem for small images, after the class of torchvision."""

    def __init__(self, width: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        for n in range(4):
            before, out = max(width, width * 2 ** (n - 1)), width * 2**n
            first = Block(int(before), out, 1 if n == 0 else 2, axes=2)
            setattr(
                self,
                f"layer{n + 1}",
                nn.Sequential(first, *(Block(out, out, axes=2) for _ in range(blocks - 1))),
            )
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(out, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        y: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return y


class ConvNeXt(nn.Module):
    """Its norm and MLP see the channels last; a parameter of its own scales what they add."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(5, 5, 3, padding=1, groups=5), nn.LayerNorm(5)
        self.up, self.act, self.down = nn.Linear(5, 10), nn.GELU(), nn.Linear(10, 5)
        self.scale = nn.Parameter(torch.linspace(-1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.act(self.up(self.norm(self.conv(x).permute(0, 2, 1)))))
        return x + (self.scale * y).permute(0, 2, 1)


class Pooled(nn.Module):
    """Functions of pooling, padding and interpolation, after which the neighbours come."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm1d(5), nn.Conv1d(5, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = torch.nn.functional.pad(x, (1, 1))
        h = torch.relu(self.norm(torch.nn.functional.max_pool1d(fine, 2)))
        coarse = self.conv(h).reshape(h.shape)
        return fine + torch.nn.functional.interpolate(coarse, size=fine.size()[-1:])


def layer(kind: type[nn.Module], **options: Any) -> nn.Module:
    module = kind(6, 2, 16, batch_first=True, **options)
    return module


class Decoder(nn.TransformerDecoderLayer):
    """Its class is not torch's own, but the method that holds the MLP is."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x, x)


# {name: (model, what runs as one)}
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "gelu, linear": (lambda: nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6)), ["1+2"]),
    "dropout between": (
        lambda: nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Dropout(0.5), nn.Linear(16, 6)),
        ["1+2+3"],
    ),
    "activation first": (lambda: nn.Sequential(nn.Mish(), nn.Linear(6, 16)), ["0+1"]),
    "relu, dropout": (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Dropout(0.5)), ["1+2"]),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 16)), ["0+1"]),
    "rms norm": (lambda: nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 16, bias=False)), ["0+1"]),
    "several": (
        lambda: nn.Sequential(
            nn.LayerNorm(6), nn.Linear(6, 16), nn.GELU("tanh"), nn.Linear(16, 6), nn.Tanh(), nn.Dropout(0.1),
            nn.Linear(6, 6),
        ),
        ["0+1, 2+3, 4+5+6"],
    ),
    "nested": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.GELU(), nn.Linear(6, 6))), ["0+1"]),
    "batch norm": (lambda: nn.Sequential(nn.Conv1d(5, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 5, 1)), ["1+2+3"]),
    "residual": (
        lambda: manualprop.nn.Residual(nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5), nn.ReLU(), nn.Conv1d(5, 5, 1)),
        ["1+2+3"],
    ),
    "block": (lambda: Block(5, 5), ["bn1+relu+conv2"]),
    "strided block": (lambda: Block(5, 7, 2), ["bn1+relu+conv2"]),
    "bottleneck": (Bottleneck, ["bn1+act+conv2, bn2+act+conv3"]),
    "bottleneck with gates": (Excited, ["bn1+act+conv2, bn2+act+conv3"]),
    "shortcut from an activation": (PreActivation, ["bn1+conv1, bn2+conv2"]),
    "inverted residual": (InvertedResidual, ["conv.0.1+conv.0.2+conv.1.0, conv.1.1+conv.1.2+conv.2"]),
    "dense": (Dense, ["norm1+relu+conv1, norm2+relu+conv2"]),
    "convnext": (ConvNeXt, ["norm+up, act+down"]),
    "functions between": (Pooled, ["norm+conv"]),
    "mlp": (lambda: MLP(nn.GELU()), ["act+drop+fc2"]),
    "mlp, function": (lambda: MLP(torch.nn.functional.silu), ["drop+fc2"]),
    "gated": (Gated, ["act_fn+down_proj"]),
    "encoder": (lambda: layer(nn.TransformerEncoderLayer, activation=nn.GELU()), ["activation+dropout+linear2"]),
    "encoder, function": (lambda: layer(nn.TransformerEncoderLayer), ["dropout+linear2"]),
    "decoder": (lambda: layer(Decoder, activation=nn.GELU()), ["activation+dropout+linear2"]),
}  # fmt: skip
X = (2, 5, 6)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]()


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def fused_rows(report: Any) -> list[Any]:
    return [row for row in report.swapped if "Fused" in row.after]
