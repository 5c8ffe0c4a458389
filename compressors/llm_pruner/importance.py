"""How much a unit (a channel, a head) matters: from its weights w, their gradients g and squared gradients F.

    vector    |sum w g|                      element2  sum |w^2 F|
    element1  sum |w g|                      mixed     sum |w g - 1/2 w^2 F|

g is the gradient of the mean loss, F the mean over samples of squared gradients (equations 3 to 5). Sums run over the
weights of one row or column, and then over the rows that make a unit.
"""

from typing import Literal

import torch
from torch import Tensor

Importance = Literal["vector", "element1", "element2", "mixed", "l2", "random"]
Aggregation = Literal["sum", "prod", "max", "last"]
TAYLOR = ("vector", "element1", "element2", "mixed")


def unit_scores(
    kind: Importance, weight: Tensor, gradient: Tensor | None, fisher: Tensor | None, axis: int, units: int
) -> Tensor:
    """[units] the scores of the `units` equal slices of `weight` [out, in] along `axis`: 0 rows, 1 columns."""
    weight = weight.float()
    if kind == "l2":
        scores = weight.square()
    elif kind == "element2":
        assert fisher is not None
        scores = weight.square() * fisher
    else:
        assert gradient is not None
        scores = weight * gradient
        if kind == "mixed":
            assert fisher is not None
            scores = scores - weight.square() * fisher / 2
        if kind != "vector":
            scores = scores.abs()
    lines = scores.sum(dim=1 - axis)
    if kind == "vector":
        lines = lines.abs()
    return lines.reshape(units, -1).sum(dim=1)


def aggregate(scores: list[Tensor], how: Aggregation) -> Tensor:
    """[units] of a group, from the scores of its tensors in the order in which the data runs through them.

    Only their order means anything.
    """
    if how == "last":
        return scores[-1]
    stacked = torch.stack(scores)
    if how == "sum":
        return stacked.sum(dim=0)
    if how == "prod":  # as a sum of logarithms: the same order, and 200 small factors do not come out as 0
        return stacked.double().log().sum(dim=0)
    return stacked.amax(dim=0)
