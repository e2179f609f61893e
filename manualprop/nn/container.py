"""Containers for branches, which the tape-free step can run."""

from torch import Tensor, nn

__all__ = ["Parallel", "Residual"]


class Residual(nn.Sequential):
    """$y = x + f(x)$, where f is the layers in sequence: the gradient takes both ways, $dx = g + g f'(x)$.

    Shape:
        f must return the shape of its input.

    Raises:
        ValueError: if it does not; broadcasting would add elements that do not belong together.
    """

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = super().forward(input)
        check_alike("Residual", input, output)
        return input + output


class Parallel(nn.Sequential):
    r"""$y = \sum_k f_k(x)$, where each $f_k$ is one of the layers: the gradient goes into every branch.

    Shape:
        all f_k must return one shape.

    Raises:
        ValueError: if they do not, or if there is no branch.
    """

    def forward(self, input: Tensor) -> Tensor:
        outputs = [branch(input) for branch in self]
        if not outputs:
            raise ValueError("Parallel: there must be at least one branch. Got none.")
        total: Tensor = outputs[0]
        for output in outputs[1:]:
            check_alike("Parallel", total, output)
            total = total + output
        return total


def check_alike(name: str, first: Tensor, second: Tensor) -> None:
    """Refuse to add tensors of different shapes."""
    if first.shape != second.shape:
        raise ValueError(
            f"{name}: what is added must have one shape. Got {tuple(first.shape)} and {tuple(second.shape)}; "
            "change the sizes of the layers within."
        )
