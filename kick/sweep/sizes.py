"""Levels that are said by the size of another model: so sparse that a large model is worth the bytes of a small one.

    settings:
      - {compressor: sparsegpt, same_size: {models: [Qwen/Qwen2.5-0.5B], by: bytes}}

Counted on shapes: no weight is read.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from kick import loading, models, plugins, shapes
from kick.blocks import count_block_weights, parameter_count
from kick.compressor import LayerwiseCompressor
from kick.config import Grid, SameSize, SweepConfig
from kick.errors import ConfigError, ModelError
from kick.levels import Knob
from kick.settings import DENSE

_DIGITS = 4  # of a sparsity, which stands in the setting's name


def with_sizes_as_levels(config: SweepConfig, dtype: str) -> SweepConfig:
    """`config`, of one model in `dtype`, with the sparsity for each size that is asked for and can be reached.

    A size that is not below the model's own, or that zeros alone do not reach, has none; `remarks` says so.
    Raises ConfigError for a compressor to which a sparsity is not the share of zeros, and ModelError for a model whose
    shapes do not say how many weights it has.
    """
    unknown = [grid for grid in config.settings if grid.same_size is not None and grid.same_size.levels is None]
    if not unknown:
        return config
    for grid in unknown:
        _check(grid)
    assert isinstance(config.model, str)
    own = _skeleton(config.model)
    parameters, prunable = parameter_count(own), count_block_weights(own)

    @cache
    def size(name: str) -> int:
        return parameter_count(_skeleton(name))

    def reached(asked: SameSize) -> SameSize:
        mask = 1 / (8 * getattr(torch, dtype).itemsize) if asked.by == "bytes" else 0.0
        smaller = [name for name in asked.models if size(name) < parameters]
        found = {name: round(sparsity_for(size(name), parameters, prunable, mask), _DIGITS) for name in smaller}
        return asked.model_copy(
            update={"levels": {name: f"{level:g}" for name, level in found.items() if 0 < level < 1}}
        )

    grids = (
        grid.model_copy(update={"same_size": reached(grid.same_size)}) if grid in unknown and grid.same_size else grid
        for grid in config.settings
    )
    return config.model_copy(update={"settings": tuple(grids)})


def sparsity_for(size: int, parameters: int, prunable: int, mask: float) -> float:
    """The share of the `prunable` weights that must become zero for `parameters` to be worth `size`.

    mask: what says of each prunable weight whether it is zero, as a share of what a weight takes; 0 to count weights.
    """
    return (parameters - size) / prunable + mask


def remarks(config: SweepConfig) -> Iterator[str]:
    """What became of the sizes that were asked for."""
    for grid in config.settings:
        if grid.same_size is None or grid.same_size.levels is None:
            continue
        for name in grid.same_size.models:
            level, by = grid.same_size.levels.get(name), grid.same_size.by
            if level is None:
                yield f"{grid.compressor}: no share of zeros makes {config.model} the size of {name} ({by})"
            else:
                yield f"{grid.compressor}@{level} is worth the {by} of {name}"


def _check(grid: Grid) -> None:
    kind = None if grid.compressor == DENSE else plugins.compressor(grid.compressor)
    if kind is None or not issubclass(kind, LayerwiseCompressor) or Knob.SPARSITY not in kind.knob:
        raise ConfigError(
            f"same_size is given to '{grid.compressor}', whose level is not the share of weights that become zero.",
            "It is for compressors such as magnitude, wanda and sparsegpt.",
        )
    if not grid.is_uniform or grid.then:
        raise ConfigError(
            f"same_size is given to '{grid.compressor}' beside layers, allocation or then.",
            "It counts on the same sparsity in all linears, and on nothing after it: leave these out.",
        )


def _skeleton(name: str) -> torch.nn.Module:
    """The model called `name` without its weights, in its own shapes."""
    path = models.fetch(models.find_source(name), weights=False)
    skeleton = loading.load_skeleton(path, "float32")
    if loading.is_quantized(path):
        raise ModelError(
            f"same_size: {path} holds quantised weights, whose bytes its shapes do not tell.", "Name its dense model."
        )
    if path.is_dir():
        shapes.resize(skeleton, {key: _nothing(size) for key, size in shapes.read_table(path).items()})
    return skeleton


def _nothing(size: list[int]) -> Tensor:
    return torch.empty(size, device="meta")
