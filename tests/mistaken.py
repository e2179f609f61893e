"""Data modules and models with the mistakes that people make, for the table of mistakes in test_command.py."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from manualprop.training import TensorDataModule

X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
LABEL = torch.arange(64) % 10


def with_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x[5, 7] = float("nan")
    return x


def _data(train: Any, val: Any = None, test: Any = None) -> type[TensorDataModule]:
    class Data(TensorDataModule):
        def __init__(self) -> None:
            super().__init__(train, val, test)

    return Data


FloatLabels = _data((X, LABEL.float()))
Int32Labels = _data((X, LABEL.int()))
OneHot = _data((X, nn.functional.one_hot(LABEL)))
Column = _data((X, LABEL[:, None]))
FromOne = _data((X, LABEL + 1))
Negative = _data((X, LABEL - 1))
NumPy = _data((X.numpy(), LABEL.numpy()))
Nan = _data((with_nan(X), LABEL))
NanInValidation = _data((X, LABEL), (with_nan(X), LABEL))
Ignored = _data((X, torch.full((64,), -100)))
Images = _data((X.reshape(64, 8, 8), LABEL))
Double = _data((X.double(), LABEL))
Integers = _data((X.long(), LABEL))
Three = _data((X, LABEL, LABEL))
Shorter = _data((X, LABEL[:60]))
WideValidation = _data((X, LABEL), (X[:, :32], LABEL))
LabelsOfValidation = _data((X, LABEL), (X, LABEL + 5))
LabelsOfTest = _data((X, LABEL), (X, LABEL), (X, LABEL + 5))


class Loader(LightningDataModule):
    """A data loader of one's own, whose data nobody sees before they come."""

    examples: tuple[Tensor, Tensor] = X, LABEL.float()

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*self.examples), batch_size=16)


class NanLoader(Loader):
    examples = with_nan(X), LABEL


class NanValidationLoader(Loader):
    examples = X, LABEL

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(with_nan(X), LABEL), batch_size=16)


class EmptyLoader(Loader):
    examples = X[:0], LABEL[:0]


class Dicts(LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(
            [{"x": x, "label": label} for x, label in zip(X, LABEL, strict=True)], batch_size=16
        )  # type: ignore[arg-type]


class NoFile(LightningDataModule):
    def __init__(self, path: str = "nosuch.pt") -> None:
        super().__init__()
        self.examples = torch.load(path)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x)


class TwoOutputs(Model):
    def forward(self, x: Tensor) -> Any:
        return self.linear(x), x


class OneOutput(Model):
    def forward(self, x: Tensor) -> Any:
        return self.linear(x)[:, 0]


class Misshapen(Model):
    def forward(self, x: Tensor) -> Any:
        return self.linear(x).view(3, 1000)


class Frozen(Model):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class NoParameters(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :10]


class ManyNumbers(nn.Module):
    """A loss that is not one number."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return output.mean(dim=1) - target
