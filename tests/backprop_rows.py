"""Networks, losses and descents that the step without a tape is held against autograd on."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import manualprop
from manualprop import descent, functions, nn

FEATURES, CLASSES = 6, 4


@dataclass(frozen=True)
class Row:
    """A network, a loss and a descent; ``steps`` steps on ``rows`` examples."""

    name: str
    layers: Callable[[], list[torch.nn.Module]] = lambda: mlp(nn.Tanh())
    loss: Callable[[], torch.nn.Module] = nn.CrossEntropyLoss
    descent: dict[str, Any] = field(default_factory=dict)
    rows: int = 16
    steps: int = 120  # fewer where only the structure differs, so that the suite stays quick
    within: float = 1e-10  # relative; anything else has its reason beside it

    def __str__(self) -> str:
        return self.name


def mlp(activation: torch.nn.Module) -> list[torch.nn.Module]:
    return [
        nn.Linear(FEATURES, 8),
        activation,
        nn.Linear(8, 8),
        copy.deepcopy(activation),
        nn.Linear(8, CLASSES),
    ]


def convnet() -> list[torch.nn.Module]:
    """A residual network with batch norms, a strided shortcut, pools and a block."""

    def normed(*numbers: int, **options: int) -> list[torch.nn.Module]:
        return [nn.Conv2d(*numbers, **options, bias=False), nn.BatchNorm2d(numbers[1])]

    return [
        nn.Linear(FEATURES, 16),
        nn.Unflatten(1, (1, 4, 4)),
        nn.Sequential(*normed(1, 3, 3, padding=1), nn.ReLU()),
        nn.Residual(*normed(3, 3, 3, padding=1), nn.ReLU(), *normed(3, 3, 3, padding=1)),
        nn.ReLU(),
        nn.Parallel(
            nn.Sequential(*normed(3, 4, 3, stride=2, padding=1), nn.ReLU(), *normed(4, 4, 1)),
            nn.Sequential(*normed(3, 4, 1, stride=2)),
        ),
        nn.Tanh(),
        torch.nn.Sequential(nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 2)),
        nn.MaxPool2d(1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    ]


def perceptron() -> torch.nn.Sequential:
    """Every activation begins layers that run as one; some write over their input, and some are kept anyway."""
    return torch.nn.Sequential(
        *(nn.Linear(FEATURES, 8), nn.ReLU(inplace=True), nn.Dropout(0.2)),
        *(nn.Linear(8, 8), nn.SiLU(inplace=True)),
        *(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, CLASSES)),
    )


def fused(layers: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """The layers as ``swap(fuse=True)`` leaves them."""
    model = torch.nn.Sequential(*layers)
    manualprop.unswap(model)
    manualprop.swap(model, fuse=True)
    return list(model)


def head() -> list[torch.nn.Module]:
    return [nn.Tanh(), nn.Linear(8, CLASSES)]


def sgd(**options: Any) -> dict[str, Any]:
    """A descent by any options of torch.optim.SGD."""
    return {"optimizer": lambda parameters: torch.optim.SGD(parameters, **options)}


# Layers of one rule y = f(x), without options that must be given.
ACTIVATIONS = [
    name
    for name, rule in vars(functions).items()
    if isinstance(rule, type) and issubclass(rule, functions.Elementwise) and name in vars(nn)
    if name != "Threshold"
]
OFF = {"Hardsigmoid": 1e-7}  # torch multiplies by a 1/6 rounded to float32

ROWS = [
    *(
        Row(
            f"activation-{name}",
            lambda name=name: mlp(getattr(nn, name)()),
            steps=50,
            within=OFF.get(name, 1e-10),
        )
        for name in ACTIVATIONS
    ),
    Row("activation-LeakyReLU-negative", lambda: mlp(nn.LeakyReLU(-0.3)), steps=50),
    Row("activation-Threshold", lambda: mlp(nn.Threshold(0.1, -0.4)), steps=50),
    Row("activation-in-place", lambda: mlp(nn.ReLU(inplace=True)), steps=50),
    Row("loss-MSE", loss=nn.MSELoss),
    Row("loss-MSE-sum", loss=lambda: nn.MSELoss(reduction="sum"), descent={"learning_rate": 0.003}),
    Row("loss-cross-entropy-sum", loss=lambda: nn.CrossEntropyLoss(reduction="sum")),
    Row(
        "loss-weighted",
        loss=lambda: nn.CrossEntropyLoss(torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)),
    ),
    Row("loss-smoothed", loss=lambda: nn.CrossEntropyLoss(label_smoothing=0.1)),
    Row("loss-ignoring", loss=lambda: nn.CrossEntropyLoss(ignore_index=2)),
    Row("descent-plain"),
    Row("descent-momentum", descent={"momentum": 0.9}),
    Row("descent-nesterov", descent={"momentum": 0.9, "nesterov": True}),
    Row("descent-decay", descent={"weight_decay": 0.05}),
    Row("descent-momentum-decay", descent={"momentum": 0.8, "weight_decay": 0.05}),
    Row("descent-nesterov-decay", descent={"momentum": 0.8, "nesterov": True, "weight_decay": 0.05}),
    Row("descent-dampened", descent=sgd(lr=0.05, momentum=0.8, dampening=0.3, weight_decay=0.01)),
    Row("descent-maximize", descent=sgd(lr=1e-3, maximize=True, momentum=0.5, weight_decay=0.01), steps=50),
    Row("descent-maximize-plain", descent=sgd(lr=1e-3, maximize=True), steps=50),
    Row("descent-Adam", descent={"optimizer": lambda p: torch.optim.Adam(p, lr=1e-2)}),
    Row("descent-RMSprop", descent={"optimizer": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9)}),
    Row("descent-clip-norm", descent={"learning_rate": 0.1, "clip_gradient_norm": 0.05}),
    Row("descent-clip-value", descent={"learning_rate": 0.1, "momentum": 0.9, "clip_gradient_value": 0.01}),
    Row("rows-1", rows=1),
    Row("rows-2", rows=2),
    Row("rows-257", rows=257),
    Row(
        "no-bias", lambda: [nn.Linear(FEATURES, 8, bias=False), nn.ReLU(), nn.Linear(8, CLASSES, bias=False)]
    ),
    Row("one-layer", lambda: [nn.Linear(FEATURES, CLASSES)]),
    Row(
        "nested",
        lambda: [nn.Sequential(nn.Sequential(*mlp(nn.GELU())), nn.Tanh()), nn.Linear(CLASSES, CLASSES)],
    ),
    Row("identity", lambda: [nn.Identity(), *mlp(nn.Tanh()), torch.nn.Identity()], steps=50),
    Row(
        "residual", lambda: [nn.Residual(nn.Linear(FEATURES, FEATURES), nn.Tanh()), *mlp(nn.ReLU())], steps=50
    ),
    Row(
        "residual-last",
        lambda: [*mlp(nn.Tanh()), nn.Residual(nn.Tanh(), nn.Linear(CLASSES, CLASSES))],
        steps=50,
    ),
    Row("residual-of-nothing", lambda: [*mlp(nn.Tanh()), nn.Residual()], steps=50),
    Row(
        "parallel",
        lambda: [
            nn.Linear(FEATURES, 5),
            nn.Parallel(nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Identity(), nn.Linear(5, 5)),
            nn.Linear(5, CLASSES),
        ],
    ),
    Row("softmax", lambda: [*mlp(nn.Tanh()), nn.LogSoftmax(-1)], loss=nn.MSELoss),
    Row("flatten", lambda: [torch.nn.Unflatten(1, (2, 3)), nn.Tanh(), torch.nn.Flatten(), *mlp(nn.Tanh())]),
    Row(
        "image",
        lambda: [
            nn.Linear(FEATURES, 8),
            nn.Unflatten(1, (2, 2, 2)),
            nn.ReflectionPad2d(1),
            nn.AvgPool2d(3, 2, 1),
            nn.LocalResponseNorm(2, alpha=0.5),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.UpsamplingNearest2d((5, 3)),
            nn.AdaptiveAvgPool2d(1),
            nn.ConstantPad2d((0, 1, 0, 1), 0.3),
            nn.Flatten(),
            *head(),
        ],
        steps=20,
    ),
    Row(
        "MaxPool",
        lambda: [
            nn.Linear(FEATURES, 12),
            torch.nn.Unflatten(1, (2, 3, 2)),
            nn.MaxPool2d(2, stride=1),
            torch.nn.Flatten(),
            nn.Linear(4, CLASSES),
        ],
        steps=50,
    ),
    *(
        # Normalising magnifies the rounding of what it divides by a small deviation.
        Row(
            f"norm-{name}",
            lambda layer=layer: [nn.Linear(FEATURES, 8), layer(), *head()],
            steps=30,
            within=1e-9,
        )
        for name, layer in {
            "LayerNorm": lambda: nn.LayerNorm(8),
            "LayerNorm-without-bias": lambda: nn.LayerNorm(8, bias=False),
            "RMSNorm": lambda: nn.RMSNorm(8, eps=1e-6),
            "GroupNorm": lambda: nn.GroupNorm(2, 8),
            "BatchNorm": lambda: nn.BatchNorm1d(8),
            "BatchNorm-plain": lambda: nn.BatchNorm1d(8, affine=False, track_running_stats=False),
        }.items()
    ),
    Row(
        "convolution",
        lambda: [
            torch.nn.Unflatten(1, (1, 2, 3)),
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(4, 4, (1, 3), padding="same", groups=2, bias=False),
            nn.GroupNorm(2, 4),
            nn.ConvTranspose2d(4, 2, 2, stride=(2, 1)),
            torch.nn.Flatten(),
            nn.Linear(32, CLASSES),
        ],
        steps=30,
        within=1e-9,  # the norm, as above
    ),
    Row("convnet", lambda: convnet(), steps=50, within=1e-9),  # the norms, as above
    Row("convnet-fused", lambda: fused(convnet()), steps=50, within=1e-9),
    Row("dropout-fused", lambda: fused([perceptron()]), steps=20),
    Row("PReLU", lambda: mlp(nn.PReLU()), steps=50),
    Row("GLU", lambda: [nn.Linear(FEATURES, 8), nn.GLU(), nn.Linear(4, CLASSES)], steps=50),
    Row("Softmax", lambda: [nn.Linear(FEATURES, 8), nn.Softmax(-1), nn.Linear(8, CLASSES)], steps=50),
    Row("our-dropout", lambda: [nn.Linear(FEATURES, 8), nn.Dropout(0.3), *head()], steps=50),
    Row(
        "dropout-in-place",
        lambda: [
            *(nn.Linear(FEATURES, 8), nn.Dropout(0.3, inplace=True), nn.RReLU(inplace=True)),
            *(nn.Linear(8, 8), torch.nn.Dropout(0.2, inplace=True), *head()),
        ],
        steps=20,
    ),
    *(
        Row(f"loss-{loss.__name__}", loss=loss, steps=50)
        for loss in (nn.L1Loss, nn.HuberLoss, nn.SmoothL1Loss, nn.BCEWithLogitsLoss)
    ),
    Row("loss-MultiMargin", loss=nn.MultiMarginLoss, steps=50),
    Row("loss-MultiMargin-squares-sum", loss=lambda: nn.MultiMarginLoss(p=2, reduction="sum"), steps=5),
    Row(
        "loss-BCE-weighted",
        lambda: [*mlp(nn.Tanh()), nn.Sigmoid()],
        loss=lambda: nn.BCELoss(torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)),
        steps=5,
    ),
    Row("loss-MultiLabelSoftMargin", loss=lambda: nn.MultiLabelSoftMarginLoss(reduction="sum"), steps=5),
    Row(
        "loss-MultiLabelSoftMargin-weighted",
        loss=lambda: nn.MultiLabelSoftMarginLoss(torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)),
        steps=5,
    ),
    Row(
        "loss-weighted-smoothed",
        loss=lambda: nn.CrossEntropyLoss(
            torch.linspace(0.5, 2, CLASSES, dtype=torch.float64), label_smoothing=0.1
        ),
        steps=5,
    ),
    Row(
        "loss-MultiMargin-weighted",
        loss=lambda: nn.MultiMarginLoss(weight=torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)),
        steps=5,
    ),
    Row(
        "loss-BCEWithLogits-weighted",
        loss=lambda: nn.BCEWithLogitsLoss(
            torch.linspace(0.5, 2, CLASSES, dtype=torch.float64), pos_weight=torch.ones(CLASSES).double() / 3
        ),
        steps=5,
    ),
    Row(
        "loss-NLL-weighted",
        lambda: [*mlp(nn.Tanh()), nn.LogSoftmax(-1)],
        loss=lambda: nn.NLLLoss(torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)),
        steps=5,
    ),
    Row("loss-NLL", lambda: [*mlp(nn.Tanh()), nn.LogSoftmax(-1)], loss=nn.NLLLoss, steps=50),
    Row(
        "loss-KLDiv",
        lambda: [*mlp(nn.Tanh()), nn.LogSoftmax(-1)],
        loss=lambda: nn.KLDivLoss(reduction="batchmean"),
        steps=50,
    ),
    Row("dropout", lambda: [nn.Linear(FEATURES, 8), torch.nn.Dropout(0.3), nn.Linear(8, CLASSES)]),
]


def twins(row: Row, dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(1)
    ours = nn.Sequential(*row.layers()).to(dtype)
    theirs = copy.deepcopy(ours)
    for module in theirs.modules():  # the same structure, torch's own layers
        manualprop.unswap(module)
    return ours, theirs


def examples(row: Row, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(row.rows, FEATURES, generator=generator, dtype=dtype)
    of_classes = torch.nn.CrossEntropyLoss | torch.nn.NLLLoss | torch.nn.MultiMarginLoss
    if not isinstance(row.loss(), of_classes):
        target = torch.randn(row.rows, CLASSES, generator=generator, dtype=dtype)
        of_probabilities = torch.nn.BCELoss | torch.nn.BCEWithLogitsLoss | torch.nn.KLDivLoss
        probabilities = isinstance(row.loss(), of_probabilities)
        return x, target.softmax(-1) if probabilities else target
    return x, torch.randint(CLASSES, (row.rows,), generator=generator)


def made_descent(row: Row, kind: type[descent.Descent] = descent.MiniBatch) -> descent.Descent:
    options = row.descent if "optimizer" in row.descent else {"learning_rate": 0.05} | row.descent
    return kind(**options)


def autograd_step(model: torch.nn.Module, row: Row) -> Callable[[Tensor, Tensor], float]:
    plan = made_descent(row)
    optimizer, loss = plan.make_optimizer(model.parameters()), manualprop.unswap(row.loss()).model

    def step(x: Tensor, t: Tensor) -> float:
        optimizer.zero_grad()
        value = loss(model(x), t)
        value.backward()
        plan.clip_gradients(model.parameters())
        optimizer.step()
        return value.item()

    return step


def distance(ours: torch.nn.Module, theirs: torch.nn.Module) -> float:
    """The largest difference of two parameters, relative to the parameter."""
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return max(((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs)
