"""The rows of a generation batch: their keys and values, which of them are visible, and where each row is.

`RoomyRows` writes each new token into tensors that have room for some to come, and moves the last row into the place of
one that has ended: little is copied from step to step. `NativeRows` holds the model's own cache, for models
whose cache is something else than keys and values of all tokens; `RereadRow` none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from kick.lm import attention

_GROWTH = 8
"""Columns are added in steps of one eighth of those already there: rows that end early never take the memory of what
they could become.

On a CPU: a GPU's allocator keeps freed blocks of every size, and has all room at once.
"""


class RoomyLayer(DynamicLayer):
    """Keys and values [rows, key heads, capacity, d]; the first `n_rows` rows and `length` columns are in use.

    shared: keys and values [1, key heads, prefix, d] of what all rows begin with, which stand before them.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int, shared: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.shared = shared
        self.lazy_initialization(keys, values)
        self.all_keys, self.all_values = keys, values
        self.n_rows, self.length = len(keys), length
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = slice(self.length, self.length + key_states.shape[-2])
        self.all_keys[: self.n_rows, :, new] = key_states
        self.all_values[: self.n_rows, :, new] = value_states
        self.length = new.stop
        self._show()
        if self.shared is not None:
            attention.share(self.keys, *self.shared)
        return self.keys, self.values

    def move(self, first: int, capacity: int) -> None:
        """Into tensors of `capacity` columns, for the rows in use alone, without the columns before `first`."""
        self.all_keys, self.all_values = (
            torch.cat([old, _empty(old, self.n_rows, first + capacity - self.length)], dim=2)
            for old in (self.keys[:, :, first:], self.values[:, :, first:])
        )
        self.length -= first
        self._show()

    def drop(self, row: int) -> None:
        """The last row takes its place."""
        self.n_rows -= 1
        for tensor in (self.all_keys, self.all_values):
            tensor[row, :, : self.length] = tensor[self.n_rows, :, : self.length]
        self._show()

    def _show(self) -> None:
        self.keys = self.all_keys[: self.n_rows, :, : self.length]
        self.values = self.all_values[: self.n_rows, :, : self.length]


class RoomyRows:
    """Rows of at most `width` tokens, aligned at the right, of which each can grow by `room` tokens.

    like: a cache whose layers have the shapes, dtype and device of this model's keys and values. shared: the cache of
    what all rows begin with, where the model attends to it without a copy for each row.
    """

    def __init__(
        self, n_rows: int, width: int, room: int, like: DynamicCache, shared: DynamicCache | None = None
    ) -> None:
        self._width = width
        self._before = shared.get_seq_length() if shared is not None else 0
        self._cache = DynamicCache()
        some = room if like.layers[0].keys.device.type == "cuda" else _more(width, room)
        self._room = room - some  # for which there are no columns yet
        shape = n_rows, width + some
        prefixes = [(own.keys, own.values) for own in shared.layers] if shared is not None else None
        self._layers = [
            RoomyLayer(
                _empty(own.keys, *shape), _empty(own.values, *shape), width, prefixes[index] if prefixes else None
            )
            for index, own in enumerate(like.layers)
        ]
        self._cache.layers = list(self._layers)
        device = like.layers[0].keys.device
        self._mask = torch.zeros(shape, dtype=torch.long, device=device)
        self._mask[:, width:] = 1
        self._places = torch.zeros(n_rows, 1, dtype=torch.long, device=device)  # of the last token read

    def fill(self, row: int, cache: DynamicCache, columns: Sequence[int]) -> None:
        """A row's own tokens, after what is shared, are those at `columns` of the one row in `cache`.

        Before the first `inputs`.
        """
        start = self._width - len(columns)
        index = torch.tensor(columns, device=self._mask.device)
        for layer, read in zip(self._layers, cache.layers, strict=True):
            layer.all_keys[row, :, start : self._width] = read.keys[0][:, index]
            layer.all_values[row, :, start : self._width] = read.values[0][:, index]
        self._mask[row, start : self._width] = 1
        self._places[row] = self._before + len(columns) - 1

    def drop(self, row: int) -> None:
        """A row has ended; the last row takes its place."""
        for layer in self._layers:
            layer.drop(row)
        last = len(self._places) - 1
        self._mask[row], self._places[row] = self._mask[last], self._places[last]
        self._mask, self._places = self._mask[:last], self._places[:last]

    def inputs(self, tokens: Sequence[int]) -> dict[str, Any]:
        """What the model is called with to read one more token in each row."""
        if self._layers[0].length == self._mask.shape[1]:
            self._make_room()
        self._places = self._places + 1
        return {
            "input_ids": torch.tensor(tokens, device=self._mask.device)[:, None],
            "attention_mask": self._mask[:, : self._layers[0].length + 1],
            "position_ids": self._places,
            "past_key_values": self._cache,
            "use_cache": True,
        }

    def _make_room(self) -> None:
        """For some more tokens, without the columns that none of the rows left sees."""
        first = int(self._mask.amax(dim=0).argmax())
        seen = self._mask[:, first:]
        more = _more(seen.shape[1], self._room)
        assert more, "more tokens than there was to be room for"
        self._room -= more
        for layer in self._layers:
            layer.move(first, seen.shape[1] + more)
        self._mask = torch.cat([seen, seen.new_ones(len(seen), more)], dim=1)


class NativeRows:
    """Rows in the model's own cache, padded at the left. mask [rows, tokens read]."""

    def __init__(self, cache: Any, mask: Tensor) -> None:
        self._cache, self._mask = cache, mask
        self._places = mask.sum(dim=1, keepdim=True) - 1

    def drop(self, row: int) -> None:
        """A row has ended; the last row takes its place."""
        order = list(range(len(self._mask) - 1))
        if row < len(order):
            order[row] = len(order)
        index = torch.tensor(order, dtype=torch.long, device=self._mask.device)
        self._cache.reorder_cache(index)  # every kind of layer has it
        self._mask, self._places = self._mask[index], self._places[index]

    def inputs(self, tokens: Sequence[int]) -> dict[str, Any]:
        """What the model is called with to read one more token in each row."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        self._places = self._places + 1
        return {
            "input_ids": torch.tensor(tokens, device=self._mask.device)[:, None],
            "attention_mask": self._mask,
            "position_ids": self._places,
            "past_key_values": self._cache,
            "use_cache": True,
        }


class RereadRow:
    """One row of a model that keeps nothing between calls: it is read again for every token."""

    def __init__(self, tokens: Sequence[int], device: Any) -> None:
        self._tokens, self._device = list(tokens), device

    def drop(self, row: int) -> None:
        """The only one has ended."""

    def inputs(self, tokens: Sequence[int]) -> dict[str, Any]:
        self._tokens += tokens
        return {"input_ids": torch.tensor([self._tokens], device=self._device), "use_cache": False}


def _more(columns: int, room: int) -> int:
    """How many of the `room` columns to add to those that are there."""
    return min(room, max(1, columns // _GROWTH))


def _empty(states: Tensor, n_rows: int, capacity: int) -> Tensor:
    return states.new_zeros(n_rows, states.shape[1], capacity, states.shape[3])
