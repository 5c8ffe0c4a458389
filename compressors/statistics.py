"""What calibrated compressors gather from the inputs of linears."""

import torch
from torch import Tensor

from kick.compressor import Statistic


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
