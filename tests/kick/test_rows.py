"""The rows of a generation batch grow as they are decoded, and hold no more than those that are left need."""

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from kick.lm.rows import RoomyRows


def cache_of(*tokens: float) -> DynamicCache:
    """One layer of one head of width 1, whose keys are the tokens and whose values are their negatives."""
    keys = torch.tensor(tokens, dtype=torch.float)[None, None, :, None]
    layer = DynamicLayer()
    layer.lazy_initialization(keys, -keys)
    layer.keys, layer.values = keys, -keys
    cache = DynamicCache()
    cache.layers = [layer]
    return cache


def step(rows: RoomyRows, *tokens: int) -> tuple[list[list[float]], torch.Size]:
    """What each row sees once it has read a token more, and the shape of all keys."""
    inputs = rows.inputs(list(tokens))
    states = torch.tensor(tokens, dtype=torch.float)[:, None, None, None]
    keys, values = inputs["past_key_values"].update(states, -states, 0)
    assert torch.equal(keys, -values)
    assert keys.shape[2] == inputs["attention_mask"].shape[1]
    seen = [row[mask.bool()].tolist() for row, mask in zip(keys[:, 0, :, 0], inputs["attention_mask"], strict=True)]
    assert inputs["position_ids"][:, 0].tolist() == [len(own) - 1 for own in seen]
    return seen, keys.shape


def test_rows_grow_by_as_much_as_they_may_and_see_all_of_their_own_tokens():
    rows = RoomyRows(2, width=3, room=20, like=cache_of(0))
    rows.fill(0, cache_of(1, 2, 3), [0, 1, 2])
    rows.fill(1, cache_of(8, 9), [1])
    expected: list[list[float]] = [[1, 2, 3], [9]]
    for token in range(10, 30):
        expected[0].append(token)
        expected[1].append(-token)
        assert step(rows, token, -token)[0] == expected


def test_columns_that_only_a_row_saw_that_has_ended_are_given_up_when_room_is_made():
    rows = RoomyRows(2, width=40, room=10, like=cache_of(0))
    rows.fill(0, cache_of(*range(1, 41)), range(40))
    rows.fill(1, cache_of(7, 8), [0, 1])
    for token in range(100, 105):  # an eighth of forty
        seen, shape = step(rows, token, token)
    assert shape[2] == 45
    rows.drop(0)
    for token in range(105, 110):
        seen, shape = step(rows, token)
        assert seen == [[7, 8, *range(100, token + 1)]]
    assert shape[2] == 12
