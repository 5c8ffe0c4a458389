"""The inside of a decoder: its blocks, the linears in them, and which of these share an input.

Found by watching one forward pass, not by names, so that a new architecture needs no entry here. Then walked block by
block, so that only one block's activations are collected at a time.

Shapes: n samples, s sequence length, h hidden size; a weight is [out, in].
"""

from collections import Counter
from collections.abc import Callable, Iterator
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
    """`uncovered` names the weights with two or more dimensions inside the blocks that belong to no linear layer."""

    blocks: tuple[Block, ...]
    uncovered: tuple[str, ...]

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

    name, layers = _block_list(model, order)
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
    return Decoder(tuple(blocks), tuple(uncovered))


def _block_list(model: nn.Module, order: list[nn.Module]) -> tuple[str, nn.ModuleList]:
    times = Counter(order)
    place = {module: position for position, module in enumerate(order)}
    candidates = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or not _has_linear(module):
            continue
        ran_once = all(times[child] == 1 for child in module)
        if ran_once and sorted(module, key=place.__getitem__) == list(module):
            size = sum(parameter.numel() for parameter in module.parameters())
            candidates.append((size, -len(name), name, module))
    if not candidates:
        raise ModelError(
            f"no decoder blocks found in {type(model).__name__}.",
            "kick looks for a ModuleList with linear layers whose children run once each, in order.",
        )
    _, _, name, layers = max(candidates, key=lambda candidate: candidate[:2])
    return name, layers


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


Listener = Callable[[Tensor], None]


class BlockWalk:
    """Calibration inputs on their way through the blocks, one block after the other.

    walk = BlockWalk(model, decoder, tokens)
    for block in decoder.blocks:
        walk.collect(block, {linear: listener, ...})   # listeners get the inputs [tokens, in] of that linear
        ...change the block's weights...
        walk.propagate(block)                          # the next block sees what the changed block gives

    Blocks run in the model's own precision, `batch` samples at a time.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, tokens: Tensor, batch: int = 4) -> None:
        """tokens: [n, s], all rows of one length and without padding."""
        self.batch = batch
        device = next(model.parameters()).device
        tokens = tokens.to(device)
        self._arguments = _block_arguments(model, decoder, tokens)
        self.hidden = _first_inputs(model, decoder.blocks[0].module, tokens, batch)  # [n, s, h]

    @torch.inference_mode()
    def collect(self, block: Block, listeners: dict[Linear, Listener]) -> None:
        """Run `block` once over all samples; each listener is called with its linear's inputs [tokens, in]."""

        def listening(listener: Listener) -> Callable[[nn.Module, tuple], None]:
            return lambda module, args: listener(args[0].reshape(-1, args[0].shape[-1]))

        handles = [
            linear.module.register_forward_pre_hook(listening(listener)) for linear, listener in listeners.items()
        ]
        try:
            for rows in self.hidden.split(self.batch):
                self._run(block, rows)
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode()
    def propagate(self, block: Block) -> None:
        """Replace the inputs by what `block` makes of them."""
        for rows in self.hidden.split(self.batch):
            rows.copy_(self._run(block, rows))

    def _run(self, block: Block, rows: Tensor) -> Tensor:
        args, kwargs = self._arguments[block.module]
        output = block.module(rows, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


class _Stop(Exception):  # noqa: N818 (not an error)
    """Ends a forward pass once the first block's input is known."""


@torch.inference_mode()
def _first_inputs(model: nn.Module, first: nn.Module, tokens: Tensor, batch: int) -> Tensor:
    """What reaches the first block: [n, s, h]."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        caught.append((args[0] if args else kwargs["hidden_states"]).clone())
        raise _Stop

    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for rows in tokens.split(batch):
            try:
                model(rows, use_cache=False)
            except _Stop:
                continue
    finally:
        handle.remove()
    return torch.cat(caught)


@torch.inference_mode()
def _block_arguments(model: nn.Module, decoder: Decoder, tokens: Tensor) -> dict[nn.Module, tuple[tuple, dict]]:
    """Everything but the hidden states that each block is called with (masks, rotary tables): one row, broadcast later.

    Two different rows must give equal arguments: a block that is told something about its tokens cannot be walked.
    """
    other = tokens[1:2] if len(tokens) > 1 else tokens[:1].roll(1, dims=1)
    seen = [_arguments_of(model, decoder, row) for row in (tokens[:1], other)]
    for block in decoder.blocks:
        if not _equal(seen[0][block.module], seen[1][block.module]):
            raise ModelError(
                f"{type(model).__name__} hands {block.name} something that depends on the tokens.",
                "Calibrated compressors cannot walk such a model; magnitude can prune it.",
            )
    return seen[0]


def _arguments_of(model: nn.Module, decoder: Decoder, row: Tensor) -> dict[nn.Module, tuple[tuple, dict]]:
    found: dict[nn.Module, tuple[tuple, dict]] = {}

    def catch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found[module] = (args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"})

    handles = [block.module.register_forward_pre_hook(catch, with_kwargs=True) for block in decoder.blocks]
    try:
        model(row, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and (a == b or not isinstance(a, int | float | str | bool))
