"""The hard concrete distribution (Louizos et al., arXiv 1712.01312): values in [0, 1] that are often exactly 0 or 1.

    s = sigmoid((log u - log(1 - u) + a) / beta)        z = clip((zeta - gamma) s + gamma, 0, 1)

`a` (log alpha) learns; u is uniform. Shapes are those of `a`, any.
"""

import math

import torch
from torch import Tensor

ZETA, GAMMA = 1.1, -0.1
LOW, HIGH = math.log(0.01), math.log(100.0)  # log alpha stays between these
_EDGE = 1e-6
_SOFT = 0.8  # Sheared LLaMA's factor before the deterministic value


def sample(log_alpha: Tensor, uniform: Tensor, beta: float) -> Tensor:
    """z for `uniform` in (0, 1), with a gradient to `log_alpha` where 0 < z < 1."""
    uniform = uniform.clamp(_EDGE, 1 - _EDGE)
    soft = torch.sigmoid((uniform.log() - (1 - uniform).log() + log_alpha) / beta)
    return ((ZETA - GAMMA) * soft + GAMMA).clamp(0, 1)


def open_probability(log_alpha: Tensor, beta: float) -> Tensor:
    """P(z > 0) = 1 - sigmoid(beta log(-gamma / zeta) - a)."""
    return (1 - torch.sigmoid(beta * math.log(-GAMMA / ZETA) - log_alpha)).clamp(_EDGE, 1 - _EDGE)


def deterministic(log_alpha: Tensor, keep: int, beta: float) -> Tensor:
    """z without chance [rows, units]: sigmoid(0.8 a / beta), and exactly `keep` of each row above 0, the largest.

    Among equal ones the first stay. A kept unit is a little below 1: its value is folded into the weights.
    """
    soft = torch.sigmoid(_SOFT * log_alpha / beta)
    order = log_alpha.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(soft, dtype=torch.bool).scatter(-1, order[..., :keep], True)
    return soft * kept
