"""Data in memory, given to a `DescentModule` in the order and in the portions that its descent needs.

The loaders are plain iterables over tensors, not torch DataLoaders. So nothing is collated example by
example. No random number comes from the global generator: with one, a resumed run would not be the same bit
for bit. And Lightning does not replace the sampler by a padded one on several devices.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.tuner.lr_finder import _LRCallback
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from manualprop.descent import Batch, Descent, MiniBatch
from manualprop.training import digits
from manualprop.training._checks import check_examples
from manualprop.training._errors import InputValueError
from manualprop.training._trainable import Trainable

Examples = tuple[Tensor, Tensor]

# Stochastic descent gets this many examples at a time and makes one update for each.  So Lightning's own cost
# of about 0.4 ms per batch occurs once per 256 updates.
CHUNK = 256


class Rows(Iterable[Examples]):
    """Examples in their own order, in portions.

    Args:
        examples: inputs and targets.
        size: examples in a portion, over all devices.
        rank: the number of this device.
        devices: the number of devices that share each portion.
    """

    def __init__(self, examples: Examples, size: int, rank: int = 0, devices: int = 1) -> None:
        self.x, self.target = examples
        self.size, self.rank, self.devices = size, rank, devices

    def __len__(self) -> int:
        return -(-len(self.x) // self.size)

    @property
    def dataset(self) -> Tensor:
        """A tensor with one entry per example; `Tuner.scale_batch_size` needs its length."""
        return self.x

    def __iter__(self) -> Iterator[Examples]:
        for rows in torch.arange(len(self.x)).split(self.size):
            yield self.take(rows)

    def take(self, rows: Tensor) -> Examples:
        """Return this device's share of some rows; each row is in the share of exactly one device."""
        mine = rows[self.rank :: self.devices].to(self.x.device)
        return self.x[mine], self.target[mine]


class TrainingRows(Rows):
    """Training examples in the order of a module's descent, from the current point of its training.

    The order depends only on the seed and the number of updates made.

    Args:
        examples: inputs and targets.
        module: its descent, seed and `trainer` decide.
    """

    def __init__(self, examples: Examples, module: Trainable) -> None:
        self.module, self.descent = module, module.descent
        n = len(examples[0])
        try:
            self.descent.updates_per_epoch(n)
        except ValueError as error:  # batch_size is larger than the data
            raise InputValueError(str(error)) from error
        portion = _portion(self.descent, n, module.trainer)
        super().__init__(examples, portion, module.global_rank, module.trainer.world_size)
        self._first_row = 0
        self._first_update: int | None = None  # the number of this epoch's first update, once it has begun

    def __iter__(self) -> Iterator[Examples]:
        # This body runs when the first batch of an epoch is needed, after a checkpoint has been restored.
        # Portions that an interrupted epoch has already used come again without rows, so that Lightning's
        # count of portions is right.
        trainer = self.module.trainer
        self._first_update, self._first_row = trainer.global_step, self.module.rows_before
        self.module.rows_before = 0
        skip = self._first_row
        for rows in self._portions(self.module.epochs_made):
            yield self.take(rows[skip:])
            skip = max(0, skip - len(rows))

    def rows_per_epoch(self) -> int:
        """Return the number of rows in an epoch; Trainer(limit_train_batches) may reduce it."""
        limit = int(min(self.module.trainer.num_training_batches, len(self)))
        return min(len(self.x), limit * self.size)

    def rows_done(self) -> int:
        """Return the number of rows of this epoch that updates have already used."""
        if self._first_update is None:
            return self.module.rows_before
        updates = self.module.trainer.global_step - self._first_update
        if not updates:
            return self._first_row
        per_update = self._rows_per_update()
        # If an epoch continues with another batch size, its first update ends where the next one would begin.
        return min(self.rows_per_epoch(), (self._first_row // per_update + updates) * per_update)

    def _rows_per_update(self) -> int:
        if isinstance(self.descent, Batch):
            return self.rows_per_epoch()
        return self.descent.batch_size if isinstance(self.descent, MiniBatch) else 1

    def _portions(self, epoch: int) -> Iterator[Tensor]:
        updates = self.descent.updates(len(self.x), seed=self.module.seed, epoch=epoch)
        yield from torch.cat([rows for pieces in updates for rows in pieces]).split(self.size)


def _portion(descent: Descent, n: int, trainer: Trainer) -> int:
    if isinstance(descent, MiniBatch):
        return descent.batch_size
    if isinstance(descent, Batch):
        return descent.micro_batch_size or n
    return 1 if searches_rate(trainer) else CHUNK


def searches_rate(trainer: Trainer) -> bool:
    """Return whether `Tuner.lr_find` is running; it reads the loss after every portion.

    Args:
        trainer: the trainer of the module.
    """
    return any(isinstance(callback, _LRCallback) for callback in trainer.callbacks)  # type: ignore[attr-defined]


class TensorDataModule(LightningDataModule):
    """Your own tensors for training, validation, test and prediction.

    A `DescentModule` gets the examples as its descent needs them. Any other LightningModule gets shuffled
    batches from a torch DataLoader.

    Args:
        train: (inputs, targets), one example per row.
        val: the same for validation; optional.
        test: the same for the final test and for prediction; optional.
        evaluation_batch_size: examples evaluated at once outside training, at least 1.
        batch_size: examples in a training batch, at least 1, of a module that is not a `DescentModule`.

    Raises:
        ValueError: for an empty set, inputs and targets of different lengths, nan and infinite numbers.
        TypeError: for anything but pairs of tensors, and for inputs that are not floating point.
    """

    def __init__(
        self,
        train: Examples,
        val: Examples | None = None,
        test: Examples | None = None,
        evaluation_batch_size: int = 1024,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        for name, size in (("evaluation_batch_size", evaluation_batch_size), ("batch_size", batch_size)):
            if size < 1:
                raise InputValueError(
                    f"TensorDataModule: {name} must be a positive integer. Got {name}={size}."
                )
        check_examples("train", train)
        for split, examples in (("val", val), ("test", test)):
            if examples is not None:
                check_examples(split, examples)
        self.train, self.val, self.test = train, val, test
        self.evaluation_batch_size, self._batch_size = evaluation_batch_size, batch_size

    @property
    def batch_size(self) -> int:
        """The examples in a training batch of a module that is no `DescentModule`; `Tuner` sets it."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self._batch_size = min(size, len(self.train[0]))

    def train_dataloader(self) -> TrainingRows | DataLoader[tuple[Tensor, ...]]:
        """Return the training examples as the module in training needs them."""
        module = _descent_module(self.trainer)
        if module is not None:
            return TrainingRows(self.train, module)
        return DataLoader(TensorDataset(*self.train), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> Iterable[Examples]:
        """Return the validation examples."""
        return self._rows(self.val)

    def test_dataloader(self) -> Iterable[Examples]:
        """Return the test examples."""
        return self._rows(self.test)

    def predict_dataloader(self) -> Iterable[Examples]:
        """Return the test examples; predictions are made from their inputs."""
        return self._rows(self.test)

    def _rows(self, examples: Examples | None) -> Iterable[Examples]:
        if examples is None:
            return iter(())  # no length: Lightning warns of a loader of length 0
        trainer = self.trainer
        rank, devices = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        return Rows(examples, self.evaluation_batch_size, rank, devices)


def _descent_module(trainer: Trainer | None) -> Trainable | None:
    module = trainer.lightning_module if trainer is not None else None
    return module if isinstance(module, Trainable) else None


class DigitsDataModule(TensorDataModule):
    """The UCI handwritten digits: 1,797 images of 8 x 8 pixels, ten classes, contained in this package.

    The split is fixed, with the same share of every class in each part: 1,297 examples to train, 200 to
    validate and 300 to test.

    Args:
        standardise: shift and scale by mean and deviation of all training pixels (else they are in [0, 1]).
        split_seed: seed of the split; results are comparable only between runs with the same one.
        evaluation_batch_size: examples evaluated at once outside training, at least 1.
    """

    image = digits.IMAGE  # height and width of an input

    def __init__(
        self, standardise: bool = False, split_seed: int = 0, evaluation_batch_size: int = 1024
    ) -> None:
        super().__init__(*digits.parts(standardise, split_seed), evaluation_batch_size)


class LinearRegressionDataModule(TensorDataModule):
    """Generated data for linear regression: y = X w + b + noise, with standard normal X, w, b and noise.

    Args:
        examples: training examples, at least 1; a quarter as many, at least 1, to validate and to test.
        features: columns of X, at least 1.
        noise: standard deviation of the noise, at least 0.
        data_seed: seed of the data.
        evaluation_batch_size: examples evaluated at once outside training, at least 1.

    Raises:
        ValueError: for sizes or a noise out of their range.
    """

    def __init__(
        self,
        examples: int = 256,
        features: int = 8,
        noise: float = 0.1,
        data_seed: int = 0,
        evaluation_batch_size: int = 1024,
    ) -> None:
        if examples < 1 or features < 1 or noise < 0:
            raise InputValueError(
                "LinearRegressionDataModule: examples and features must be at least 1 and noise at least 0. Got "
                f"examples={examples}, features={features}, noise={noise}."
            )
        generator = torch.Generator().manual_seed(data_seed)
        draw = functools.partial(torch.randn, generator=generator)
        held_out = max(1, examples // 4)
        x, w, b = draw(examples + 2 * held_out, features), draw(features, 1), draw(1)
        y = x @ w + b + noise * draw(len(x), 1)
        sizes = [examples, held_out, held_out]
        parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
        super().__init__(parts[0], parts[1], parts[2], evaluation_batch_size)
