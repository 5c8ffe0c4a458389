"""What is counted on the weights of a model, whatever was asked for: zeros, violations, bits, coverage."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kick.adapters import LowRank
from kick.blocks import Decoder, find_decoder
from kick.levels import Pattern
from kick.quantization import Grid
from kick.streaming import resident

STRAY_ZEROS = 0.05  # share of a linear's weights; fewer zeros are no mask


@dataclass
class Structure:
    """What linears are asked or known to be, by name: counted against, and stored beside the weights.

    stored_bits: bits a weight takes in a format that no Grid describes, as the one who wrote it stored it.
    """

    patterns: dict[str, Pattern] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    stored_bits: dict[str, float] = field(default_factory=dict)
    adapters: dict[str, LowRank] = field(default_factory=dict)
    head: bool = False  # it is compressed too, and counted with the linears of the blocks

    def count(self, name: str, weight: Tensor) -> dict[str, Any]:
        """What `count_weight` finds for the linear called `name`."""
        return count_weight(
            weight,
            self.patterns.get(name),
            self.grids.get(name),
            self.stored_bits.get(name),
            self.adapters.get(name),
        )


@dataclass
class Measured:
    """What was counted on the weights of a model, whatever was asked for.

    `layers`: for each linear its shape [out, in], weights, zeros, sparsity and bits_per_weight; under a pattern also
    pattern_violations, groups of M neighbours that keep more than N; if quantised also bits and grid_violations,
    weights that are not on their grid; with an adapter also its rank and parameters, which count as bits of the weight.
    """

    layers: dict[str, dict[str, Any]]
    uncovered: list[str]
    uncovered_weights: int  # inside the blocks, in no linear: the experts of a mixture, say
    uncovered_bits: int  # as stored
    coverage: float
    parameters: int
    broken: list[str]  # tensors that hold values that are not finite

    @property
    def sparsity(self) -> float:
        """Share of zeros over all linears inside the blocks, and over the head if it is compressed."""
        return self._zeros / self._weights if self._weights else 0.0

    @property
    def sparsity_of_blocks(self) -> float:
        """The same over all weights of the blocks: what no compressor reached counts as dense."""
        weights = self._weights + self.uncovered_weights
        return self._zeros / weights if weights else 0.0

    @property
    def _weights(self) -> int:
        return sum(layer["weights"] for layer in self.layers.values())

    @property
    def _zeros(self) -> int:
        return sum(layer["zeros"] for layer in self.layers.values())

    @property
    def violations(self) -> int:
        return sum(layer.get("pattern_violations", 0) for layer in self.layers.values())

    @property
    def grid_violations(self) -> int:
        return sum(layer.get("grid_violations", 0) for layer in self.layers.values())

    @property
    def bits_per_weight(self) -> float:
        """Mean over all weights of the blocks: packed where they are quantised, as stored where they are not."""
        bits = sum(layer["weights"] * layer["bits_per_weight"] for layer in self.layers.values()) + self.uncovered_bits
        return bits / (self._weights + self.uncovered_weights)


def measure(model: nn.Module, decoder: Decoder | None = None, structure: Structure | None = None) -> Measured:
    """Count zeros, coverage and violations over the linears of `model`'s blocks."""
    decoder = decoder or find_decoder(model)
    structure = structure or Structure()
    layers = {}
    parameters = dict(model.named_parameters())
    inside = {f"{block.name}.{name}" for block in decoder.blocks for name, _ in block.module.named_parameters()}
    broken = [name for name in parameters.keys() - inside if not bool(parameters[name].isfinite().all())]
    for block in decoder.blocks:
        with resident(block.module):
            for linear in block.linears:
                counted = structure.count(linear.name, linear.weight)
                layers[linear.name] = {**counted, "transposed": linear.transposed}
            broken += [
                f"{block.name}.{name}"
                for name, weight in block.module.named_parameters()
                if not bool(weight.isfinite().all())
            ]
    covered = sum(layer["weights"] for layer in layers.values())
    if structure.head and decoder.head is not None:
        head = decoder.head
        layers[head.name] = {**structure.count(head.name, head.weight), "transposed": head.transposed}
    outside = [parameters[name] for name in decoder.uncovered]
    missed = sum(weight.numel() for weight in outside)
    return Measured(
        layers=layers,
        uncovered=list(decoder.uncovered),
        uncovered_weights=missed,
        uncovered_bits=sum(8 * weight.numel() * weight.itemsize for weight in outside),
        coverage=covered / (covered + missed) if covered else 0.0,
        parameters=sum(parameter.numel() for parameter in parameters.values())
        + sum(adapter.size for adapter in structure.adapters.values()),
        broken=sorted(broken),
    )


def count_weight(
    weight: Tensor,
    pattern: Pattern | None = None,
    grid: Grid | None = None,
    stored_bits: float | None = None,
    adapter: LowRank | None = None,
) -> dict[str, Any]:
    """Shape, weights, zeros, sparsity and bits of one weight [out, in]; violations of a pattern and of a grid."""
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    counted: dict[str, Any] = {
        "shape": list(weight.shape),
        "weights": weight.numel(),
        "zeros": zeros,
        "sparsity": zeros / weight.numel(),
        "bits_per_weight": 8 * weight.dtype.itemsize,  # dense storage: a zero takes the room of any other weight
    }
    if pattern is not None:
        counted |= {"pattern": str(pattern), "pattern_violations": pattern_violations(weight, pattern)}
    if grid is not None:
        counted |= {"bits": grid.bits, "grid_violations": grid.violations(weight)}
        if not counted["grid_violations"]:  # else it cannot be packed
            counted["bits_per_weight"] = grid.storage_bits(weight.shape[1])
    elif stored_bits is not None:
        counted |= {"stored_bits": stored_bits, "bits_per_weight": stored_bits}
    if adapter is not None:
        counted |= {"adapter_rank": adapter.rank, "adapter_parameters": adapter.size}
        counted["bits_per_weight"] += adapter.bits / weight.numel()
    return counted


def pattern_violations(weight: Tensor, pattern: Pattern) -> int:
    """How many groups of M neighbours along `in` hold more than N non-zeros."""
    groups = weight.reshape(weight.shape[0], -1, pattern.of)
    return int(((groups != 0).sum(dim=-1) > pattern.keep).sum())


def is_pruned(weight: Tensor) -> bool:
    """Whether so many weights are zero that they are a mask."""
    return float((weight == 0).float().mean()) > STRAY_ZEROS


def packed_bytes(record: dict[str, Any]) -> float:
    """Bytes with each linear as codes and scales, or as its non-zero weights and a bit mask, whichever is smaller."""
    stored = 8 * getattr(torch, record["dtype"]).itemsize
    bits = 0.0
    for layer in record["layers"].values():
        weights, each = layer["weights"], layer["bits_per_weight"]
        bits += min(weights * each, (weights - layer["zeros"]) * each + weights) - weights * stored
    return record["bytes"] + bits / 8
