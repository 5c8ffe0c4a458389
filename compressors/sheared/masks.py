"""The masks of a model: which layers, hidden dimensions, heads and intermediate dimensions are open, and how the
constraint brings their number to the target.

Shapes of log alpha: layer [1, layers]; hidden [1, hidden]; head [layers, groups]; intermediate [layers, width]. Under
grouped-query attention a head is a key head with its query heads; with `within`, a place inside every group.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..llama import ModelShape
from . import hard_concrete

Constraint = Literal["counts", "shares"]

_SETTLED = 0.005  # of a structure's units: so near does a long enough pruning come to its target


class Masks(nn.Module):
    """Log alphas, multipliers, and the values that the model runs under.

    lambdas: of the linear and the quadratic term of each structure, begun at 0; made large against the loss.
    """

    def __init__(self, source: ModelShape, target: ModelShape, beta: float, seed: int, within: bool = False) -> None:
        super().__init__()
        self.source, self.target, self.beta, self.within = source, target, beta, within
        heads = source.queries_per_key if within else source.kv_heads
        self.keep = {
            "layer": target.layers,
            "hidden": target.hidden,
            "head": target.queries_per_key if within else target.kv_heads,
            "intermediate": target.intermediate,
        }
        sizes = {
            "layer": (1, source.layers),
            "hidden": (1, source.hidden),
            "head": (source.layers, heads),
            "intermediate": (source.layers, source.intermediate),
        }
        generator = torch.Generator().manual_seed(seed)
        self.log_alphas = nn.ParameterDict(
            {name: nn.Parameter(5 + 0.01 * torch.randn(size, generator=generator)) for name, size in sizes.items()}
        )
        self.lambdas = nn.ParameterDict({name: nn.Parameter(torch.zeros(2)) for name in sizes})

    @torch.no_grad()
    def clamp(self) -> None:
        """Log alphas stay where the gradient can still move them."""
        for log_alpha in self.log_alphas.values():
            log_alpha.clamp_(hard_concrete.LOW, hard_concrete.HIGH)

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """One z for each unit, drawn alike on every process."""
        return {
            name: hard_concrete.sample(
                log_alpha, torch.rand(log_alpha.shape, generator=generator).to(log_alpha.device), self.beta
            )
            for name, log_alpha in self.log_alphas.items()
        }

    @torch.no_grad()
    def final(self, keep: dict[str, int] | None = None) -> dict[str, Tensor]:
        """z without chance, with exactly `keep` units open in each row: by default the target's."""
        keep = keep or self.keep
        return {
            name: hard_concrete.deterministic(log_alpha, keep[name], self.beta)
            for name, log_alpha in self.log_alphas.items()
        }

    def expected_open(self) -> dict[str, Tensor]:
        """[rows] the number of units that are expected to be open, for each structure."""
        return {
            name: hard_concrete.open_probability(log_alpha, self.beta).sum(dim=-1)
            for name, log_alpha in self.log_alphas.items()
        }

    def lagrangian(self, progress: float, kind: Constraint) -> Tensor:
        """What is added to the loss: lambda (n - T) + phi (n - T)^2, over all rows of all structures.

        n is the expected number of open units. T comes down from all of them to the target as `progress` goes from 0 to
        1. `counts` is the paper's equation 2; `shares` the authors' code: both divided by the row's size, with its mean
        over rows.
        """
        total = torch.zeros((), device=next(self.parameters()).device)
        for name, expected in self.expected_open().items():
            size = self.log_alphas[name].shape[1]
            target = size - (size - self.keep[name]) * min(1.0, progress)
            linear, quadratic = self.lambdas[name]
            if kind == "counts":
                over = expected - target
                total = total + (linear * over + quadratic * over.square()).sum()
            else:
                over = (expected - target) / size
                total = total + linear * over.mean() + quadratic * over.square().mean()
        return total

    @torch.no_grad()
    def off(self) -> dict[str, tuple[float, int, int, int]]:
        """What is not within 0.5 % of the whole of its target in some row.

        By structure, of the row that is farthest off: (expected open units, asked for, which row, of how many).
        """
        found = {}
        for name, expected in self.expected_open().items():
            asked, (rows, size) = self.keep[name], self.log_alphas[name].shape
            row = int((expected - asked).abs().argmax())
            if abs(float(expected[row]) - asked) > _SETTLED * size:
                found[name] = (float(expected[row]), asked, row, rows)
        return found

    @torch.no_grad()
    def record(self) -> dict[str, Any]:
        """For the history: expected open units, mean over rows, and the multipliers."""
        told: dict[str, Any] = {}
        for name, expected in self.expected_open().items():
            told[f"open_{name}"] = float(expected.mean())
            told[f"lambda_{name}"], told[f"phi_{name}"] = self.lambdas[name].tolist()
        return told
