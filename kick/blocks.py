"""The inside of a decoder: its blocks, the linears in them, and which of these share an input.

Found by watching one forward pass, not by names, so that a new architecture needs no entry here. A weight is [out, in].
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kick.errors import ModelError


@dataclass(frozen=True)
class Linear:
    """A linear layer inside a block. GPT-2's Conv1D stores [in, out]; `weight` gives [out, in] for both kinds."""

    name: str
    module: nn.Module
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """The weight as [out, in]: a view, so that writing into it changes the model."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.data.T if self.transposed else weight.data


@dataclass(frozen=True)
class Group:
    """Linears that are given the same input tensor (q, k and v; gate and up): they share one statistic."""

    linears: tuple[Linear, ...]


@dataclass(frozen=True)
class Block:
    name: str
    module: nn.Module
    groups: tuple[Group, ...]

    @property
    def linears(self) -> list[Linear]:
        return [linear for group in self.groups for linear in group.linears]


@dataclass(frozen=True)
class Decoder:
    """`uncovered` names the weights with two or more dimensions inside the blocks that belong to no linear layer.

    `head` gives the logits; it is compressed only where a layer rule asks for it. `head_is_tied`: it is the embedding.
    """

    blocks: tuple[Block, ...]
    uncovered: tuple[str, ...]
    head: Linear | None = None
    head_is_tied: bool = False

    @property
    def linears(self) -> list[Linear]:
        return [linear for block in self.blocks for linear in block.linears]


def find_decoder(model: nn.Module) -> Decoder:
    """Blocks and groups of `model`, from one forward pass over a few tokens.

    The blocks are the children of the ModuleList with the most parameters among those whose children each ran once, in
    order. Linears of a block that were handed the same tensor form a group; one that did not run (an expert that got no
    token) is a group of its own. Raises ModelError if there is no such list.
    """
    order: list[nn.Module] = []
    inputs: dict[nn.Module, Tensor] = {}  # held until the pass ends, so that no address is used twice
    versions: dict[nn.Module, int] = {}  # tells a tensor from itself after a change in place

    def watch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        order.append(module)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if given:
            inputs[module], versions[module] = given[0], given[0]._version

    handles = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in model.modules()]
    try:
        device = next(model.parameters()).device
        vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        with torch.no_grad():
            model(torch.arange(8, device=device)[None] % vocabulary, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return _decoder(model, order, inputs, versions)


def outline(model: nn.Module) -> Decoder:
    """As `find_decoder`, of a model without weights, which cannot run: by its structure, each linear by itself."""
    return _decoder(model, None, {}, {})


def _decoder(
    model: nn.Module, order: list[nn.Module] | None, inputs: dict[nn.Module, Tensor], versions: dict[nn.Module, int]
) -> Decoder:
    name, layers = largest_block_list(model, order)
    blocks = []
    uncovered = []
    for index, layer in enumerate(layers):
        block = Block(f"{name}.{index}", layer, tuple(_groups(f"{name}.{index}", layer, inputs, versions)))
        covered = {id(linear.module.weight) for linear in block.linears}
        blocks.append(block)
        uncovered += [
            f"{block.name}.{key}"
            for key, weight in layer.named_parameters()
            if weight.dim() >= 2 and id(weight) not in covered
        ]
    return Decoder(tuple(blocks), tuple(uncovered), *_find_head(model))


def _find_head(model: Any) -> tuple[Linear | None, bool]:
    """The linear that gives the logits, and whether its weight is that of the embedding."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(module, nn.Linear | Conv1D):
        return None, False
    name = next(name for name, other in model.named_modules() if other is module)
    return Linear(name, module, isinstance(module, Conv1D)), module.weight is model.get_input_embeddings().weight


def largest_block_list(model: nn.Module, order: list[nn.Module] | None = None) -> tuple[str, nn.ModuleList]:
    """The ModuleList with the most parameters, and its name. `order`: of the calls, if the children must have run."""
    times = Counter(order)
    place = {module: position for position, module in enumerate(order or ())}
    candidates = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or not _has_linear(module):
            continue
        ran_once = all(times[child] == 1 for child in module)
        if order is None or (ran_once and sorted(module, key=place.__getitem__) == list(module)):
            size = parameter_count(module)
            candidates.append((size, -len(name), name, module))
    if not candidates:
        raise ModelError(
            f"no decoder blocks found in {type(model).__name__}.",
            "kick looks for a ModuleList with linear layers whose children run once each, in order.",
        )
    _, _, name, layers = max(candidates, key=lambda candidate: candidate[:2])
    return name, layers


def parameter_count(module: nn.Module) -> int:
    """Each once, also where the head is the embedding."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_block_weights(model: nn.Module) -> int:
    """Weights of the linears inside the decoder blocks, also of a model on the meta device."""
    return sum(
        module.weight.numel()
        for module in largest_block_list(model)[1].modules()
        if isinstance(module, nn.Linear | Conv1D)
    )


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear | Conv1D) for child in module.modules())


def _groups(
    prefix: str, layer: nn.Module, inputs: dict[nn.Module, Tensor], versions: dict[nn.Module, int]
) -> Iterator[Group]:
    by_input: dict[Any, list[Linear]] = {}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            linear = Linear(f"{prefix}.{name}", module, isinstance(module, Conv1D))
            given = inputs.get(module)
            key = id(module) if given is None else (given.data_ptr(), given.shape, given.stride(), versions[module])
            by_input.setdefault(key, []).append(linear)
    yield from (Group(tuple(linears)) for linears in by_input.values())
