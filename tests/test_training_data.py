"""The data modules, the networks of the recipes, and the plot of a history."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from test_training import trainer
from torch import nn

import manualprop
from manualprop.descent import Batch
from manualprop.training import (
    ConvolutionalNetwork,
    DescentModule,
    DigitsDataModule,
    LinearRegressionDataModule,
    MultilayerPerceptron,
    TensorDataModule,
    plots,
)


def test_digits_split() -> None:
    data = DigitsDataModule()
    parts = [data.train, data.val, data.test]
    assert all(part is not None for part in parts)
    assert [len(part[0]) for part in parts if part] == [1297, 200, 300]
    rows = torch.cat([torch.cat([part[0], part[1][:, None]], dim=1) for part in parts if part])
    assert len(rows.unique(dim=0)) == 1797  # no image twice, so none in two parts
    for part in parts:
        shares = torch.bincount(part[1], minlength=10) / len(part[1])  # type: ignore[index]
        assert (shares - 0.1).abs().max() < 0.01
    assert (float(data.train[0].min()), float(data.train[0].max())) == (0.0, 1.0)
    assert torch.equal(data.train[0], DigitsDataModule().train[0])


def test_digits_standardised_by_the_training_set() -> None:
    x = DigitsDataModule(standardise=True).train[0]
    assert (x.mean().abs() < 1e-5, abs(x.std() - 1) < 1e-5) == (True, True)


def test_network_is_made_of_hand_derived_layers() -> None:
    model = MultilayerPerceptron([4, 8, 8, 2], activation="GELU", dropout=0.5)
    names = [type(layer).__module__.split(".")[0] for layer in model if not isinstance(layer, nn.Dropout)]
    assert set(names) == {"manualprop"}
    assert [name for name, _ in model.named_children()][:3] == ["linear1", "activation1", "dropout1"]
    assert isinstance(MultilayerPerceptron([2, 2, 2], activation="torch.nn.Tanh")[1], nn.Tanh)


def test_convolutional_network_is_made_of_hand_derived_layers() -> None:
    model = ConvolutionalNetwork([2, 4, 8], classes=3, image=(9, 4), activation="Tanh", dropout=0.5)
    assert {type(layer).__module__.split(".")[0] for layer in model} == {"manualprop"}
    assert [name for name, _ in model.named_children()][:5] == [
        "image", "convolution1", "norm1", "activation1", "pool1"
    ]  # fmt: skip
    assert [name for name, _ in model.named_children()][-3:] == ["flatten", "dropout", "linear"]
    assert model(torch.randn(5, 2 * 9 * 4)).shape == (5, 3)
    assert model.linear.in_features == 8 * 2 * 1
    assert isinstance(ConvolutionalNetwork(activation="torch.nn.Tanh").activation1, nn.Tanh)


def test_linear_regression_arrives_at_the_normal_equation() -> None:
    data = LinearRegressionDataModule(examples=64, features=3)
    module = DescentModule(
        manualprop.nn.Linear(3, 1), manualprop.nn.MSELoss(), Batch(learning_rate=0.3)
    ).double()
    data.train = (data.train[0].double(), data.train[1].double())
    trainer(max_epochs=150).fit(module, TensorDataModule(data.train))
    x = torch.cat([data.train[0], torch.ones(64, 1)], dim=1)
    solution = torch.linalg.solve(x.T @ x, x.T @ data.train[1])
    found = torch.cat([module.model.weight.T, module.model.bias[:, None]])  # type: ignore[union-attr,operator]
    torch.testing.assert_close(found.detach(), solution, rtol=0, atol=1e-10)


def test_accuracy_of_100_percent_has_a_place_in_the_plot(tmp_path: Path) -> None:
    figure = Figure()
    ax = figure.subplots()
    plots._curve(
        ax, [{"update": 1, "val_accuracy": 0.5}, {"update": 2, "val_accuracy": 1.0}], "update", "val_accuracy"
    )
    plots._label(ax, "updates", "accuracy")
    low, high = ax.get_ylim()
    assert low < 0.5 < 0.999 < high < 1
    plots.plot_history(
        [{"update": 1, "train_loss": 1.0}, {"update": 2, "train_loss": 0.5}], tmp_path / "a.png", "a"
    )
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
