"""Calibration inputs on their way through the blocks: every linear runs once, and sees what compressed linears give.

A block's forward pass is stopped in front of each group of linears, for all samples, so that the group's weights can be
changed before it goes on. Forward passes are greenlets: they wait inside the model's own code, whatever that is.

Shapes: n samples, s sequence length, h hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from greenlet import greenlet
from torch import Tensor, nn

from kick.blocks import Block, Decoder, Group
from kick.errors import ModelError


class BlockWalk:
    """walk = BlockWalk(model, decoder, tokens, torch.bfloat16)
    for block in decoder.blocks:
        for group, inputs in walk.visit(block):    # a list of [tokens, in]: what the group's linears will be given
            ...change the weights of group.linears...

    Blocks run in `precision`, `batch` samples at a time; the weights that the caller sees stay in the model's own.
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
        self.hidden = _first_inputs(model, decoder.blocks[0].module, tokens, batch).to(precision)  # [n, s, h]

    @torch.no_grad()
    def visit(self, block: Block) -> Iterator[tuple[Group, list[Tensor]]]:
        """Run `block`, stopping in front of each group. A group that no token reached comes last, with no inputs."""
        place = {linear.module: index for index, group in enumerate(block.groups) for linear in group.linears}
        unvisited = set(range(len(block.groups)))
        waiting: dict[int, list[tuple[greenlet, Tensor, Tensor]]] = {}
        walker = greenlet.getcurrent()

        def pause(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if place[module] in unvisited:
                walker.switch((place[module], args[0].reshape(-1, args[0].shape[-1])))

        def advance(run: greenlet, rows: Tensor) -> None:
            result = run.switch()
            if run.dead:
                rows.copy_(result)
            else:
                index, inputs = result
                waiting.setdefault(index, []).append((run, rows, inputs))

        with _Working(block, self.precision) as working:
            handles = [module.register_forward_pre_hook(pause) for module in place]
            try:
                for rows in self.hidden.split(self.batch):
                    advance(greenlet(partial(self._run, block, rows)), rows)
                while waiting:
                    index = min(waiting)  # groups stand in the order in which they run
                    stopped = waiting.pop(index)
                    with working.own_weights(block.groups[index]):
                        yield block.groups[index], [inputs for _, _, inputs in stopped]
                    unvisited.discard(index)
                    while stopped:
                        run, rows, _ = stopped.pop(0)
                        advance(run, rows)
            finally:
                for handle in handles:
                    handle.remove()
        for index in sorted(unvisited):
            yield block.groups[index], []

    def _run(self, block: Block, rows: Tensor) -> Tensor:
        args, kwargs = self._arguments[block.module]
        output = block.module(rows, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


class _Working:
    """A block in the precision that it runs in; its own weights are kept aside and put back at the end."""

    def __init__(self, block: Block, precision: torch.dtype) -> None:
        self.precision = precision
        self.own = {parameter: parameter.data for parameter in block.module.parameters()}

    def __enter__(self) -> "_Working":
        for parameter, own in self.own.items():
            parameter.data = own.to(self.precision)
        return self

    def __exit__(self, *_: object) -> None:
        for parameter, own in self.own.items():
            parameter.data = own

    @contextmanager
    def own_weights(self, group: Group) -> Iterator[None]:
        """The group's linears hold their own weights, and afterwards run with what these have become."""
        parameters = [parameter for linear in group.linears for parameter in linear.module.parameters()]
        for parameter in parameters:
            parameter.data = self.own[parameter]
        yield
        for parameter in parameters:
            self.own[parameter] = parameter.data
            parameter.data = parameter.data.to(self.precision)


class _Stop(Exception):  # noqa: N818 (not an error)
    """Ends a forward pass once the first block's input is known."""


@torch.no_grad()
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
        model(row, use_cache=False)
    except _Stop:
        pass
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
