"""The UCI handwritten digits as tensors; this file needs only torch."""

from __future__ import annotations

import gzip
from importlib import resources

import torch
from torch import Tensor

Examples = tuple[Tensor, Tensor]

IMAGE = (8, 8)  # height and width of a digit


def parts(standardise: bool = False, split_seed: int = 0) -> tuple[Examples, Examples, Examples]:
    """Return 1,297 examples to train, 200 to validate and 300 to test; see `DigitsDataModule`."""
    x, label = load_digits()
    held_out = _stratified(label, 500, split_seed)
    test = held_out[_stratified(label[held_out], 300, split_seed)]
    train, val = _without(torch.arange(len(x)), held_out), _without(held_out, test)
    if standardise:
        x = (x - x[train].mean()) / x[train].std()
    return (x[train], label[train]), (x[val], label[val]), (x[test], label[test])


def load_digits() -> Examples:
    """Return all 1,797 digits: pixels in [0, 1] of shape (1797, 64), and labels 0 to 9 of shape (1797,)."""
    packed = resources.files("manualprop.training").joinpath("data", "digits.gz").read_bytes()
    table = torch.frombuffer(bytearray(gzip.decompress(packed)), dtype=torch.uint8).view(-1, 65)
    return table[:, :64].float() / 16, table[:, 64].long()


def _stratified(label: Tensor, count: int, seed: int) -> Tensor:
    # Put each class in a random order. Then order all examples by their rank in their class, with ties in a
    # random order. So the first `count` examples contain every class in proportion, within one example.
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(label), generator=generator)
    place = torch.empty(len(label))
    for value in label.unique():
        rows = order[label[order] == value]
        place[rows] = torch.arange(len(rows)) / len(rows)
    return order[torch.argsort(place[order], stable=True)][:count].sort().values


def _without(rows: Tensor, removed: Tensor) -> Tensor:
    return rows[~torch.isin(rows, removed)]
