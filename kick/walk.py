"""Calibration inputs on their way through the blocks, one block after the other.

Each block runs twice: once to gather what reaches its linears, once, compressed, to give the next block its inputs.

Shapes: n samples, s sequence length, h hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from kick.blocks import Block, Decoder, Group, Linear
from kick.errors import ModelError

Listener = Callable[[Tensor], None]


class BlockWalk:
    """walk = BlockWalk(model, decoder, tokens, torch.bfloat16)
    for block in decoder.blocks:
        walk.collect(block, {group: listener, ...})    # listeners are called with [tokens, in], a batch at a time
        ...change the block's weights...
        walk.propagate(block)                          # the next block sees what the changed block gives

    Blocks run in `precision`, `batch` samples at a time; between the calls they are in the model's own.
    """

    def __init__(
        self, model: nn.Module, decoder: Decoder, tokens: Tensor, precision: torch.dtype, batch: int = 4
    ) -> None:
        """tokens: [n, s], all rows of one length and without padding."""
        self.batch = batch
        self.precision = precision
        tokens = tokens.to(next(model.parameters()).device)
        arguments = _block_arguments(model, decoder, tokens)
        self._arguments = {module: _cast(given, precision) for module, given in arguments.items()}
        self.hidden = _first_inputs(model, decoder.blocks[0].module, tokens, batch, precision)  # [n, s, h]

    @torch.no_grad()
    def collect(self, block: Block, listeners: dict[Group, Listener]) -> None:
        """Run `block` over all samples, as far as its last group; each listener is called with its group's inputs."""
        unheard: set[Group] = set()

        def hear(group: Group) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def listen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                if group in unheard:
                    listeners[group](args[0].reshape(-1, args[0].shape[-1]))
                    unheard.discard(group)
                if not unheard:
                    raise _Stop  # what comes after the last group is of no use

            return listen

        handles = [group.linears[0].module.register_forward_pre_hook(hear(group)) for group in listeners]
        try:
            with self.working(block, self.precision):
                for rows in self.hidden.split(self.batch):
                    unheard |= listeners.keys()
                    with suppress(_Stop):
                        self._run(block, rows)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def propagate(self, block: Block) -> None:
        """Replace the inputs by what `block` makes of them."""
        with self.working(block, self.precision):
            for rows in self.hidden.split(self.batch):
                rows.copy_(self._run(block, rows))

    @torch.no_grad()
    def added(self, block: Block) -> Tensor:
        """What `block`, as it is and in its own precision, adds to the first sample: [1, s, h] float32."""
        own = next(block.module.parameters()).dtype
        args, kwargs = _cast(self._arguments[block.module], own)
        hidden = self.hidden[:1].to(own)
        output = block.module(hidden, *args, **kwargs)
        return (output[0] if isinstance(output, tuple) else output).float() - hidden.float()

    def _run(self, block: Block, rows: Tensor) -> Tensor:
        args, kwargs = self._arguments[block.module]
        output = block.module(rows, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def working(self, block: Block, precision: torch.dtype) -> Iterator[None]:
        """The block's parameters in `precision`; afterwards they are again what they were."""
        own = {parameter: parameter.data for parameter in block.module.parameters()}
        for parameter, data in own.items():
            parameter.data = data.to(precision)
        try:
            yield
        finally:
            for parameter, data in own.items():
                parameter.data = data


@torch.no_grad()
def collect_head(model: nn.Module, head: Linear, tokens: Tensor, listener: Listener, batch: int = 4) -> None:
    """Run the whole of `model` over `tokens` [n, s]; `listener` is called with what reaches `head`: [tokens, in]."""

    def hear(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        listener(args[0].reshape(-1, args[0].shape[-1]))
        raise _Stop  # the logits would cost more memory than all the rest

    handle = head.module.register_forward_pre_hook(hear)
    try:
        for rows in tokens.to(next(model.parameters()).device).split(batch):
            with suppress(_Stop):
                model(rows, use_cache=False)
    finally:
        handle.remove()


class _Stop(Exception):  # noqa: N818 (not an error)
    """Ends a forward pass once what was wanted has been seen."""


@torch.no_grad()
def _first_inputs(model: nn.Module, first: nn.Module, tokens: Tensor, batch: int, precision: torch.dtype) -> Tensor:
    """What reaches the first block: [n, s, h] in `precision`."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        caught.append((args[0] if args else kwargs["hidden_states"]).to(precision, copy=True))
        raise _Stop

    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for rows in tokens.split(batch):
            with suppress(_Stop):
                model(rows, use_cache=False)
    finally:
        handle.remove()
    return torch.cat(caught)


Arguments = tuple[tuple, dict[str, Any]]


@torch.no_grad()
def _block_arguments(model: nn.Module, decoder: Decoder, tokens: Tensor) -> dict[nn.Module, Arguments]:
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


def _arguments_of(model: nn.Module, decoder: Decoder, row: Tensor) -> dict[nn.Module, Arguments]:
    found: dict[nn.Module, Arguments] = {}

    def catch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found[module] = (args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"})
        if module is decoder.blocks[-1].module:
            raise _Stop  # the head would cost more memory than all the rest

    handles = [block.module.register_forward_pre_hook(catch, with_kwargs=True) for block in decoder.blocks]
    try:
        with suppress(_Stop):
            model(row, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _cast(value: Any, precision: torch.dtype) -> Any:
    """Floating tensors in `value`, however nested, in another precision."""
    if isinstance(value, Tensor):
        return value.to(precision) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, precision) for item in value)
    if type(value) is dict:
        return {key: _cast(item, precision) for key, item in value.items()}
    return value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and (a == b or not isinstance(a, int | float | str | bool))
