"""What calibrated compressors gather from the inputs of linears."""

import torch
from torch import Tensor

from kick.compressor import Statistic

from .obs import Factor, check_finite, inverse_factor

_SPLITS = 6  # the share of a full product that a symmetric update costs is (1 + 1/6) / 2


class InputNorm(Statistic):
    """The L2 norm of each input feature over all calibration tokens."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.sum_of_squares = torch.zeros(in_features, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor) -> None:
        self.sum_of_squares += inputs.float().square().sum(dim=0)

    def output_error(self, weight: Tensor, change: Tensor) -> float:
        """||change diag(l2)|| / ||weight diag(l2)||: the error of the outputs if input features were uncorrelated."""
        size = (weight * self.l2).norm()
        return float((change * self.l2).norm() / size) if size else 0.0

    @property
    def l2(self) -> Tensor:
        """[in], float32. Ones if no token came by."""
        if self.tokens == 0:
            return torch.ones(self.in_features, device=self.device)
        return self.sum_of_squares.sqrt().float()


class Hessian(Statistic):
    """H = X X^T / tokens, the second moments of the inputs: half the Hessian of a linear's mean squared error."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self.sum = torch.zeros(in_features, in_features, device=device)  # its upper triangle is kept up to date
        self._factors: dict[float, Factor] = {}

    def add(self, inputs: Tensor) -> None:
        inputs = inputs.float()
        step = -(-self.in_features // _SPLITS)
        for start in range(0, self.in_features, step):
            self.sum[start : start + step, start:].addmm_(inputs[:, start : start + step].T, inputs[:, start:])

    @property
    def matrix(self) -> Tensor:
        """[in, in], float32. The identity if no token came by: every input counts the same. Raises KickError."""
        if self.tokens == 0:
            return torch.eye(self.in_features, device=self.device)
        check_finite(self.sum.diagonal())
        upper = self.sum.triu()
        return (upper + upper.triu(1).T) / self.tokens

    def factor(self, damping: float) -> Factor:
        """U with U^T U = H^-1, damped. Computed once for all linears that share these inputs."""
        if damping not in self._factors:
            self._factors[damping] = inverse_factor(self.matrix, damping)
        return self._factors[damping]

    def output_error(self, weight: Tensor, change: Tensor) -> float:
        """||change X|| / ||weight X||, exactly, for the calibration inputs."""
        matrix = self.matrix
        size = float(((weight @ matrix) * weight).sum())
        return (max(float(((change @ matrix) * change).sum()), 0.0) / size) ** 0.5 if size > 0 else 0.0
