"""A class statement of a rule that is not understood raises when it is made: one row a mistake."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from manualprop.functions import Elementwise, Rule
from manualprop.functions._elementwise_loss import ElementwiseLoss
from manualprop.functions._rule import recording


def f(x: Any, a: Any) -> Any:
    return a * torch.tanh(x)


def df_x(x: Any, a: Any) -> Any:
    return a * (1 - torch.tanh(x) ** 2)


def df_y(y: Any, a: Any) -> Any:
    return a * (1 - (y / a) ** 2)


def loss(x: Any, t: Any) -> Any:
    return (x - t) ** 2


def dx(x: Any, t: Any) -> Any:
    return 2 * (x - t)


def dt(x: Any, t: Any) -> Any:
    return 2 * (t - x)


def with_g(x: Any, t: Any, g: Any = None) -> Any:
    return 2 * (x - t) * (1 if g is None else g)


def bends(x: Any, t: Any) -> Any:
    return (2, -2), (-2, 2)


def forward(x: Any, a: Any) -> Any:
    return a * x


def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.a = inputs[1]


def backward(ctx: Any, g: Any) -> Any:
    return ctx.a * g, None


ELEMENTWISE = {"f": f, "df": df_x}
LOSS = {"f": loss, "output_gradient": dx, "target_gradient": dt, "curvature": bends}
RULE = {"forward": forward, "setup_context": setup_context, "backward": backward}


def made(base: type, stated: dict[str, Any], **changes: Any) -> type:
    """A class of this base, stated with some changes; a change to ``...`` leaves it out."""
    names = {k: v for k, v in (stated | changes).items() if v is not ...}
    return type("Mistaken", (base,), {k: staticmethod(v) if callable(v) else v for k, v in names.items()})


E, L, R = (Elementwise, ELEMENTWISE), (ElementwiseLoss, LOSS), (Rule, RULE)
MISTAKES: list[tuple[tuple[type, dict[str, Any]], dict[str, Any], type[Exception], str]] = [
    (
        E,
        {"saves": "outputs"},
        ValueError,
        r"Mistaken: saves must be 'input' or 'output'. Got saves = 'outputs'",
    ),
    (E, {"saves": None}, ValueError, r"saves must be"),
    (
        E,
        {"save": "output"},
        TypeError,
        r"Mistaken: 'save' is no declaration of a rule. Did you mean 'saves'\?",
    ),
    (E, {"f": ...}, TypeError, r"Mistaken: f must be a static method of the class. Got none"),
    (E, {"df": ...}, TypeError, r"Mistaken: df must be a static method"),
    (E, {"df": 2.0}, TypeError, r"df must be a static method of the class. Got 2.0"),
    (E, {"ddf": 1}, TypeError, r"ddf must be a static method of the class. Got 1"),
    (
        E,
        {"df": lambda x: x},
        TypeError,
        r"df must have as many parameters as f\(x, a\). Got df\(x\)",
    ),
    (E, {"df": lambda x, a, b: x}, TypeError, r"Got df\(x, a, b\)"),
    (E, {"df": lambda y, a, x: y, "saves": "output"}, TypeError, r"f\(x, a\). Got df\(y, a, x\)"),
    (E, {"ddf": lambda x: x}, TypeError, r"ddf must have as many parameters as f\(x, a\). Got ddf\(x\)"),
    (
        E,
        {"df": df_y},
        ValueError,
        r"df is written in the tensor that is saved. Got df\(y, a\) and saves = 'input'",
    ),
    (E, {"saves": "output"}, ValueError, r"Got df\(x, a\) and saves = 'output'"),
    (E, {"ddf": df_y}, ValueError, r"ddf is written in the tensor that is saved. Got ddf\(y, a\)"),
    (E, {"chooses": 1}, ValueError, r"chooses must be False or True. Got chooses = 1"),
    (E, {"exact": "yes"}, ValueError, r"exact must be False or True"),
    (L, {"f": ...}, TypeError, r"Mistaken: f must be a static method"),
    (L, {"curvature": ...}, TypeError, r"Mistaken: curvature must be a static method"),
    (
        L,
        {"target_gradient": ...},
        TypeError,
        r"target_gradient must be a static method of the class. Got none",
    ),
    (
        L,
        {"partials": ("output_gradient", "label_gradient")},
        TypeError,
        r"label_gradient must be a static method",
    ),
    (
        L,
        {"partials": ["output_gradient", None]},
        TypeError,
        r"partials must be a tuple of a method's name, or None",
    ),
    (L, {"partials": "output_gradient"}, TypeError, r"Got partials = 'output_gradient'"),
    (L, {"partials": ()}, TypeError, r"partials must be a tuple"),
    (L, {"partials": ("output_gradient", 1)}, TypeError, r"partials must be a tuple"),
    (
        L,
        {"partials": ("output_gradient", None, None)},
        TypeError,
        r"f must have a parameter for each of 3 partials",
    ),
    (
        L,
        {"partial": ("output_gradient", None)},
        TypeError,
        r"'partial' is no declaration of a rule. Did you mean 'partials'",
    ),
    (
        L,
        {"output_gradient": lambda x: x},
        TypeError,
        r"output_gradient must have as many parameters as f\(x, t\)",
    ),
    (L, {"curvature": lambda x: ()}, TypeError, r"curvature must have as many parameters as f\(x, t\)"),
    (
        L,
        {"curvature": lambda x, t: ((2, -2),)},
        ValueError,
        r"curvature must have a row for each of 2 .* Got rows of \[2\]",
    ),
    (L, {"curvature": lambda x, t: ((2,), (-2, 2))}, ValueError, r"Got rows of \[1, 2\]"),
    (L, {"curvature": lambda x, t: ((2, -2, 0), (-2, 2, 0))}, ValueError, r"Got rows of \[3, 3\]"),
    (L, {"chooses": None}, ValueError, r"chooses must be False or True"),
    (R, {"forward": ...}, TypeError, r"Mistaken: forward must be a static method of the class. Got none"),
    (R, {"setup_context": ...}, TypeError, r"Mistaken: setup_context must be"),
    (R, {"backward": ...}, TypeError, r"Mistaken: backward must be"),
    (R, {"backward": 3}, TypeError, r"Mistaken: backward must be a static method of the class. Got 3"),
    (
        R,
        {"jvp": lambda ctx, t: t},
        TypeError,
        r"jvp must have ctx and a tangent for each of forward\(x, a\). Got jvp\(ctx, t\)",
    ),
]


@pytest.mark.parametrize(
    ("of", "changes", "error", "text"),
    MISTAKES,
    ids=[f"{i}-{'-'.join(m[1])}" for i, m in enumerate(MISTAKES)],
)
def test_a_mistake_raises(
    of: tuple[type, dict[str, Any]], changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        made(*of, **changes)


@pytest.mark.parametrize(
    ("of", "changes"),
    [
        (E, {}),
        (E, {"df": df_y, "ddf": df_y, "saves": "output"}),
        (E, {"ddf": df_x, "LIMIT": 3, "_helper": f}),
        (E, {"f": torch.tanh, "df": lambda x: x}),
        (L, {"helper": loss}),
        (L, {"output_gradient": with_g}),
        (L, {"partials": ("output_gradient", None), "curvature": lambda x, t: ((2,),)}),
        (R, {"jvp": lambda ctx, t, _: t}),
        (R, {"jvp": lambda ctx, t, *_: t}),
    ],
)
def test_what_is_understood_does_not(of: tuple[type, dict[str, Any]], changes: dict[str, Any]) -> None:
    assert issubclass(made(*of, **changes), Rule)


def test_recording_needs_a_function() -> None:
    recorder: Callable[..., Any] = 3  # type: ignore[assignment]
    with (
        pytest.raises(
            TypeError, match=r"recording: recorder must be a function of a rule and its arguments. Got 3"
        ),
        recording(recorder),
    ):
        pass
