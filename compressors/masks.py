"""Masks: which weights stay. Pure functions on tensors; a mask is True where the weight is kept.

Shapes: weight and score [out, in]; M neighbours of a pattern lie along `in`.
"""

from typing import Literal

import torch
from torch import Tensor

from kick.errors import KickError, LevelError
from kick.levels import Level, Pattern, Sparsity


def keep_largest(score: Tensor, level: Level, dim: Literal["row", "matrix"]) -> Tensor:
    """Boolean mask [out, in]: True where the weight stays, which is where `score` [out, in] is largest.

    A sparsity removes exactly round(fraction * n) entries of each row (`dim="row"`), or of the whole matrix. A pattern
    N:M keeps exactly N of each M neighbours along `in`, whatever `dim` says. Among equal scores the first stays.

    >>> keep_largest(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), Sparsity(fraction=0.25), dim="row")
    tensor([[ True, False,  True,  True]])

    Raises LevelError if M does not divide `in`, KickError if a score is NaN.
    """
    if torch.isnan(score).any():
        raise KickError(
            "a score is not a number: the weights or the activations are not finite.",
            "Is the model whole? In float16 activations overflow: try dtype bfloat16 or float32.",
        )
    if isinstance(level, Pattern):
        return _keep_pattern(score, level)
    if not isinstance(level, Sparsity):
        raise LevelError(f"level '{level}' is neither a sparsity nor an N:M pattern.", "For example 0.5 or 2:4.")
    rows = score if dim == "row" else score.reshape(1, -1)
    return keep_count(rows, rows.shape[1] - round(level.fraction * rows.shape[1])).reshape(score.shape)


def keep_count(score: Tensor, count: int) -> Tensor:
    """Mask [rows, n] of the `count` largest entries of each row; among equal ones the first stay."""
    remove = score.shape[1] - count
    if remove == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = score.kthvalue(remove, dim=1, keepdim=True).values  # the largest of those to remove
    above = score > threshold
    tied = score == threshold
    room = count - above.sum(dim=1, keepdim=True)  # how many of the tied stay
    return above | (tied & (tied.cumsum(dim=1) <= room))


def _keep_pattern(score: Tensor, pattern: Pattern) -> Tensor:
    """The rank of each score among its M neighbours by counting who beats it: exact and without sorting."""
    out_features, in_features = score.shape
    if in_features % pattern.of:
        raise LevelError(
            f"pattern {pattern} does not fit {in_features} inputs: {pattern.of} does not divide them.",
            "Choose an M that divides the input dimension.",
        )
    neighbours = score.reshape(out_features, in_features // pattern.of, pattern.of)
    rank = torch.zeros_like(neighbours, dtype=torch.int16)
    for other in range(pattern.of):
        rival = neighbours[..., other : other + 1]
        rank += rival > neighbours
        rank[..., other + 1 :] += rival == neighbours[..., other + 1 :]  # an equal that stands earlier goes first
    return (rank < pattern.keep).reshape(score.shape)
