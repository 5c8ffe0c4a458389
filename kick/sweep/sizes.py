"""Levels that are said by the size of another model: so sparse that a large model is worth the bytes of a small one.

    settings:
      - {compressor: sparsegpt, same_size: {models: [Qwen/Qwen2.5-0.5B], by: bytes}}

Counted from configurations and headers: no weight is read.
"""

from pathlib import Path

import torch

from kick import loading, models, plugins
from kick.blocks import count_block_weights
from kick.compressor import LayerwiseCompressor
from kick.config import Grid, SweepConfig
from kick.errors import ConfigError
from kick.levels import Knob

_DIGITS = 4  # of a sparsity, which stands in the setting's name


def with_sizes_as_levels(config: SweepConfig, dtype: str) -> SweepConfig:
    """`config`, of one model in `dtype`, with a sparsity for each size that is asked for and can be reached.

    A size that is not below the model's own, or that zeros alone do not reach, is left out.
    Raises ConfigError for a compressor to which a sparsity is not the share of zeros.
    """
    if all(grid.same_size is None for grid in config.settings):
        return config
    assert isinstance(config.model, str)
    path = _path(config.model)
    parameters = loading.count_parameters(path)
    prunable = count_block_weights(loading.load_skeleton(path, dtype))
    grids = []
    for grid in config.settings:
        if grid.same_size is None:
            grids.append(grid)
            continue
        _check(grid)
        mask = 1 / (8 * getattr(torch, dtype).itemsize) if grid.same_size.by == "bytes" else 0.0
        sizes = [loading.count_parameters(_path(name)) for name in grid.same_size.models]
        found = [sparsity_for(size, parameters, prunable, mask) for size in sizes if size < parameters]
        if levels := tuple(f"{level:.{_DIGITS}g}" for level in found if level < 1):
            grids.append(grid.model_copy(update={"levels": levels, "same_size": None}))
    return config.model_copy(update={"settings": tuple(grids)})


def sparsity_for(size: int, parameters: int, prunable: int, mask: float) -> float:
    """The share of the `prunable` weights that must become zero for `parameters` to be worth `size`.

    mask: what says of each prunable weight whether it is zero, as a share of what a weight takes; 0 to count weights.
    """
    return (parameters - size) / prunable + mask


def _check(grid: Grid) -> None:
    kind = plugins.compressor(grid.compressor)
    if not issubclass(kind, LayerwiseCompressor) or Knob.SPARSITY not in kind.knob:
        raise ConfigError(
            f"same_size is given to '{grid.compressor}', whose level is not the share of weights that become zero.",
            "It is for compressors such as magnitude, wanda and sparsegpt.",
        )
    if not grid.is_uniform or grid.then:
        raise ConfigError(
            f"same_size is given to '{grid.compressor}' beside layers, allocation or then.",
            "It counts on the same sparsity in all linears, and on nothing after it: leave these out.",
        )


def _path(model: str) -> Path:
    return models.fetch(models.find_source(model), weights=False)
