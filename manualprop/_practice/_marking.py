"""Mark an attempt: run it, ask `verify`, and put into a learner's words what it says."""

from __future__ import annotations

import ast
import inspect
import re
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manualprop._practice._exercise import Asked, Exercise
from manualprop._practice._mark import Mark, Verdict
from manualprop.verify import Outcome, Report, check

# What a probe's finding means, once the first order is right.
BEYOND_WORDS = {
    "linearity": "Right for some g only: the gradient must be proportional to the g that arrives.",
    "ties": "Right, but wrong at a kink or at a tie.",
    "extremes": "Right for ordinary numbers, but not for very large or very small ones.",
    "grad_output_layout": "Right, but not for every g: one that is a view of other numbers gives something else.",
    "mutation": "The numbers are right, but it writes into what it was given.",
    "sizes": "Right at the sizes of the first check, and at no others.",
    "random_state": "It draws random numbers where it must not.",
}
FIRST = ("first_order", "linearity", "reference", "random_state")
ONLY_FIRST: Verdict = "first order only"
NONE = "no simple explanation"
DETACHED = (
    "is something in backward detached, taken as .data, or computed under no_grad? Is something saved that forward "
    "has computed on the way, and that is neither an input nor an output?"
)
# What a diagnosis means, where the exercise has nothing of its own to say: a pattern of it, and a sentence.
ADVICE = {
    r"\| transposed": "Write the product with indices: which letter is summed over, which is the row of the result?",
    "factor of its own|a factor too many|no simple explanation": "Take this one number: what does your formula say there, and how "
    "steep is the function?",
    "g is ignored": "The chain rule multiplies by what arrives.",
    "g of ones": "Added up over all outputs it is right. One by one, what does an output send back?",
    "only for sizes": "Which number in it is the size of a tensor, written out?",
    "extreme values": "Which part of the formula is infinite there, though the whole is not?",
    "zero: no gradient": "What is returned stands in the order of the arguments of forward.",
}
BORROWED = re.compile(
    r"autograd\.(grad|functional|backward)\b|\.backward\(|torch\.func\b|\b(vjp|jvp|jacrev)\("
)


def marked(exercise: Exercise, thing: Any, isolate: bool = False) -> Mark:
    """The mark of the class or function that an exercise asks for.

    Args:
        exercise: which one.
        thing: the learner's.
        isolate: verify it in child processes, as `verify.check` does.
    """
    if exercise.is_class and not (isinstance(thing, type) and issubclass(thing, torch.autograd.Function)):
        text = f"{exercise.entry} must be a class derived from torch.autograd.Function, as in the file that was handed out."
        return Mark(exercise.name, "error", f"{exercise.entry} is no autograd.Function", text)
    for asked in exercise.asked(thing):
        mark = _unrunnable(exercise, asked) or _differs(exercise, asked, isolate)
        if mark:
            return mark
    return Mark(exercise.name, "right")


def marked_source(exercise: Exercise, source: str, file: str) -> Mark:
    """The mark of a learner's file, which is run in this process."""
    try:
        tree = ast.parse(source, file)
        code = compile(tree, file, "exec")
    except SyntaxError as error:
        text = "".join(traceback.format_exception_only(error))
        return Mark(exercise.name, "error", f"{type(error).__name__}: {error.msg}", text)
    except ValueError as error:  # of a null byte, before Python 3.12
        return Mark(exercise.name, "error", f"ValueError: {error}", f"ValueError: {error}")
    if _same(exercise.entry, tree, ast.parse(exercise.template())):
        return Mark(exercise.name, "not started", text=f"Write what stands at the dots in {file}.")
    borrowed = BORROWED.search(_spoken(tree))
    if borrowed:
        text = f"The derivative is autograd's, and not yours: `{borrowed[0].strip('(')}` stands in the file."
        return Mark(exercise.name, "wrong", "borrowed from autograd", text)
    names: dict[str, Any] = {"__name__": f"practice_{exercise.name}", "__file__": file}
    try:
        exec(code, names)
    except Exception as error:  # whatever the learner's file raises
        return _raised(exercise, error)
    if exercise.entry not in names:
        text = f"The file must define {exercise.entry}, which is what is marked."
        return Mark(exercise.name, "error", f"{exercise.entry} is not there", text)
    return marked(exercise, names[exercise.entry])


def _same(entry: str, *trees: ast.Module) -> bool:
    """Whether what is marked is the same in both files."""
    found = [
        ast.dump(node)
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == entry
    ]
    return len(found) == 2 and found[0] == found[1]


def _spoken(tree: ast.Module) -> str:
    """The code without its strings, among which the docstrings are."""
    bare = ast.parse(ast.unparse(tree))
    for node in ast.walk(bare):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(bare)


# ----- does it run -----


_WRONG_SHAPE = re.compile(
    r"invalid gradient at index (\d+) - got (\[.*?\]) but expected shape compatible with (\[.*?\])"
)
_WRONG_NUMBER = re.compile(r"incorrect number of gradients \(expected (\d+), got (\d+)\)")


def _unsummed(exercise: Exercise, asked: Asked) -> Mark | None:
    """The mark of a gradient that is larger than its tensor: autograd sums it without a word, and it may be right."""
    cls = getattr(asked.fn, "__self__", None)
    if not isinstance(cls, type):
        return None
    returned: list[Any] = []

    def backward(ctx: Any, *g: Tensor) -> Any:
        made = cls.backward(ctx, *g)  # type: ignore[attr-defined]
        returned[:] = made if isinstance(made, tuple) else (made,)
        return made

    args = [_fresh(a) for a in asked.args]
    y = type(cls.__name__, (cls,), {"backward": staticmethod(backward)}).apply(*args)  # type: ignore[attr-defined]
    torch.autograd.backward(y, torch.ones_like(y))
    for k, (t, d) in enumerate(zip(args, returned, strict=False)):  # more Nones are allowed
        if isinstance(d, Tensor) and t.requires_grad and d.shape != t.shape:
            name = _argument(asked, k)
            summed = d.numel() != t.numel()
            how = "missing sum over a broadcast dimension" if summed else "an axis of length 1 too many"
            think = "Which sum is it?" if summed else "A bias, say, must come back in its own shape."
            text = (
                f"The gradient of {name} has shape {list(d.shape)}, where {name} has {list(t.shape)}.\nHow: {how}.\n"
                f"Think: autograd mends it for you here, without a word. {think}"
            )
            return Mark(exercise.name, "wrong", how, text)
    return None


def _argument(asked: Asked, index: int) -> str:
    """The name of an argument of a learner's forward."""
    cls = getattr(asked.fn, "__self__", None)
    if not isinstance(cls, type):
        return f"argument {index}"
    names = list(inspect.signature(cls.forward).parameters)  # type: ignore[attr-defined]
    with_ctx = cls.setup_context is torch.autograd.Function.setup_context  # type: ignore[attr-defined]
    return names[index + with_ctx]


def _unrunnable(exercise: Exercise, asked: Asked) -> Mark | None:
    """The mark of what raises in a plain forward and backward, as Python shows it; None if it runs."""
    args = [_fresh(a) for a in asked.args]
    try:
        made = asked.fn(*args)
        outputs = made if isinstance(made, tuple) else (made,)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    except Exception as error:  # whatever the learner's code raises
        if "ellipsis" in str(error).lower():
            return Mark(
                exercise.name,
                "not finished",
                "dots are left",
                "Dots (...) are left in it. Write what stands there.",
            )
        if _theirs(error) or "must" in str(error):
            return _raised(exercise, error)
        return None  # what autograd itself refuses, such as a gradient of a wrong shape, verify explains
    return _other_value(exercise, asked, outputs) or _unsummed(exercise, asked)


def _other_value(exercise: Exercise, asked: Asked, outputs: tuple[Tensor, ...]) -> Mark | None:
    """The mark of a value that is not what the exercise states."""
    if asked.reference is None:
        return None
    right = asked.reference(*[_fresh(a) for a in asked.args])
    for k, (y, want) in enumerate(zip(outputs, right if isinstance(right, tuple) else (right,), strict=True)):
        if y.shape == want.shape and torch.allclose(y, want, rtol=1e-9):
            continue
        name = spoken(exercise, f"output {k}")
        off = (
            f"off by up to {(y - want).abs().max().item():.4g}"
            if y.shape == want.shape
            else f"of shape {list(y.shape)}"
        )
        text = f"The value is wrong: {name} is {off}. It must be what the exercise states."
        return Mark(exercise.name, "wrong", "wrong value", text)
    return None


def _fresh(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _raised(exercise: Exercise, error: Exception) -> Mark:
    how = "".join(traceback.format_exception_only(error)).strip()
    frames = _theirs(error)
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(frames)] if frames else []
    return Mark(exercise.name, "error", how.splitlines()[0], "".join(lines) + how)


def _theirs(error: Exception) -> list[traceback.FrameSummary]:
    """The lines of the learner's that led to an exception: none of torch's, none of ours."""
    ours = (str(Path(__file__).parent.parent), str(Path(torch.__file__).parent))
    return [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]


# ----- is it right -----


def _differs(exercise: Exercise, asked: Asked, isolate: bool) -> Mark | None:
    """The mark of the first thing that verify finds; None if it finds nothing."""
    try:
        report = _verified(asked, FIRST, isolate)
    except (ValueError, TypeError) as error:  # that is, what verify cannot ask
        return Mark(exercise.name, "wrong", str(error), str(error))
    mark = _of_first_order(exercise, asked, _found(report))
    if mark or not (asked.beyond or asked.second):
        return mark
    more = [*asked.beyond, *["saved_bytes"] * bool(asked.keeps), *["second_order"] * asked.second]
    report = _verified(asked, list(dict.fromkeys(more)), isolate)
    found = _found(report)
    return (
        _of_memory(exercise, asked, report)
        or _of_second_order(exercise, asked, found)
        or _of_the_rest(exercise, asked, found)
    )


def _verified(asked: Asked, only: Sequence[str], isolate: bool) -> Report:
    second = {"second_order": True} if "second_order" in only else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return check(
            asked.fn,
            *asked.args,
            reference=asked.reference,
            only=only,
            declare=second,
            isolate=isolate,
            time_limit=20.0,
        )


def _found(report: Report) -> dict[str, Outcome]:
    """The findings by their probe.  How many axes its tensors have, an exercise says: a learner may rely on it."""
    return {o.probe: o for o in report.findings if o.diagnosis != "only for 0-d inputs"}


def _of_first_order(exercise: Exercise, asked: Asked, found: dict[str, Outcome]) -> Mark | None:
    for probe in ("call", "random_state", "first_order", "linearity", "reference"):
        if probe in found:
            return _told(exercise, asked, found[probe], "wrong", _heading(exercise, asked, found[probe]))
    return None


def _heading(exercise: Exercise, asked: Asked, outcome: Outcome) -> str:
    """Which gradients are wrong, and which are right."""
    shape, number = _WRONG_SHAPE.search(outcome.evidence), _WRONG_NUMBER.search(outcome.evidence)
    if shape:
        name = _argument(asked, int(shape[1]))
        return f"The gradient of {name} has shape {shape[2]}, where {name} has {shape[3]}."
    if number:
        return f"backward must return {number[1]} values, one for each argument of forward. Got {number[2]}."
    wrong, right = _wrong_and_right(outcome)
    if not wrong:
        return BEYOND_WORDS.get(outcome.probe, outcome.evidence[:1].upper() + outcome.evidence[1:])
    many = ", " in wrong
    of = exercise.words.get("gradient of", "gradient of")
    rest = f"; {right} {'are' if ', ' in right else 'is'} right" if right else ""
    return f"The {of.replace(' ', 's ', 1) if many else of} {wrong} {'are' if many else 'is'} wrong{rest}."


def _wrong_and_right(outcome: Outcome) -> tuple[str, str]:
    """The names of the tensors whose gradients are wrong, and of those whose are right."""
    parts = re.match(r"wrong for ([^()]*?)(?: \(right for (.*?)\))?; worst", outcome.evidence)
    return (parts[1], parts[2] or "") if parts else ("", "")


def _of_memory(exercise: Exercise, asked: Asked, report: Report) -> Mark | None:
    if not asked.keeps:
        return None
    kept = re.findall(r"([a-z ]+) \d+[,)]", report["saved_bytes"].evidence)
    more = [name.strip() for name in kept if name.strip() not in asked.keeps]
    if not more:
        return None
    what = " and ".join("tensors of its own" if name == "others" else f"its {name}" for name in more)
    text = f"The gradients are right, but it keeps {what} for backward. Nothing but its {asked.keeps[0]} may be kept."
    return Mark(exercise.name, "wrong", f"keeps {what}", text)


def _of_second_order(exercise: Exercise, asked: Asked, found: dict[str, Outcome]) -> Mark | None:
    if "second_order" not in found:
        return None
    outcome = found["second_order"]
    wrong, _ = _wrong_and_right(outcome)
    where = f", in {wrong.replace('grad_output', 'g')}" if wrong else ""
    heading = f"Right to first order only: when autograd differentiates your backward, what it gets is wrong{where}."
    return _told(exercise, asked, outcome, ONLY_FIRST, heading)


def _of_the_rest(exercise: Exercise, asked: Asked, found: dict[str, Outcome]) -> Mark | None:
    for outcome in found.values():
        return _told(exercise, asked, outcome, "wrong", BEYOND_WORDS.get(outcome.probe, outcome.evidence))
    return None


def _told(exercise: Exercise, asked: Asked, outcome: Outcome, verdict: Verdict, heading: str) -> Mark:
    how = spoken(exercise, outcome.diagnosis) if _says_something(asked, outcome) else ""
    lines = [heading, f"How: {how}." if how else "", _where(exercise, outcome)]
    lines.append(f"Think: {_advice(exercise, outcome, verdict)}")
    short = how or (BEYOND_WORDS[outcome.probe] if outcome.probe in BEYOND_WORDS else heading)
    text = "\n".join(line for line in lines if line and line != "Think: ")
    return Mark(exercise.name, verdict, short.rstrip("."), text)


def _says_something(asked: Asked, outcome: Outcome) -> bool:
    """Whether a diagnosis helps here."""
    if outcome.diagnosis == NONE:
        return False
    shape = _WRONG_SHAPE.search(outcome.evidence)
    if shape:
        got, expected = (tuple(map(int, re.findall(r"\d+", text))) for text in (shape[2], shape[3]))
        others = [a.shape for a in asked.args if isinstance(a, Tensor) and a.shape != expected]
        if "missing sum" in outcome.diagnosis:
            return got[len(got) - len(expected) :] == expected
        return "exchanged" not in outcome.diagnosis or got in others
    if "only for a grad_output of ones" in outcome.diagnosis and asked.reference is not None:
        # A softmax or a norm hands back 0 for it, and so does nearly every mistake.
        args = [_fresh(a) for a in asked.args]
        y = asked.reference(*args)
        of_ones = torch.autograd.grad(
            y, [a for a in args if isinstance(a, Tensor) and a.requires_grad], torch.ones_like(y)
        )
        return all(float(g.abs().max()) > 1e-9 for g in of_ones)
    return True


def _advice(exercise: Exercise, outcome: Outcome, verdict: Verdict) -> str:
    """What to think about: by the exercise, or by the diagnosis alone."""
    if verdict == ONLY_FIRST:
        return DETACHED
    wrong, _ = _wrong_and_right(outcome)
    key = f"{wrong}| {spoken(exercise, outcome.diagnosis or outcome.evidence)}"
    both = (*exercise.advice.items(), *ADVICE.items())
    return next((text for pattern, text in both if re.search(pattern, key)), "")


def _where(exercise: Exercise, outcome: Outcome) -> str:
    """The number whose gradient is furthest off, in one line; of the other probes their evidence."""
    if outcome.probe in BEYOND_WORDS:
        return f"Where: {spoken(exercise, outcome.evidence)}."
    y = exercise.words.get("y", "y")
    for worst in outcome.details.get("worst", [])[:1] if y and outcome.probe == "first_order" else ():
        if "index" not in worst:
            return ""
        entry = f"{worst['input']}{worst['index']}"
        kink = f"; the nearest kink is at {round(worst['kink'], 4) + 0.0:g}" if "kink" in worst else ""
        return (
            f"Where: d{y}/d{entry}, where {entry} = {worst['value']:.4g}: yours is {worst['hand']:.4g}, "
            f"measured {worst['numeric']:.4g}{kink}."
        )
    return ""


def spoken(exercise: Exercise, text: str) -> str:
    """A diagnosis in the letters of the exercise."""
    text = (
        text.replace(" (in all paths)", "")
        .replace("grad_output", "g")
        .replace("the reference", "the right one")
    )
    text = text.replace(": one path of a sum inside the formula, or a wrong formula", "")
    text = re.sub(r"the error has rank \d+ where the Jacobian has \d+, as (.*?) has$", r"\1", text)
    text = re.sub(r"an extra factor .*", "a factor too many, or one too few", text)  # which one is the answer
    text = re.sub(r"factor (-?)(\S+) = \2", r"factor \1\2", text)
    for theirs, ours in {"output 0": exercise.words.get("y", "y"), **exercise.words}.items():
        text = text if theirs == "y" else text.replace(theirs, ours)
    return text.rstrip(".?")
