"""From plain tensors to a model, and what is known of its linears to the compressor that brings it."""

from typing import Any

import torch
from torch import nn

from kick import shapes
from kick.adapters import LowRank, attach
from kick.blocks import find_decoder
from kick.compressor import Compressor
from kick.errors import INCOMPLETE, ModelError, on_one_line
from kick.loading import check_config

from .files import Foreign


def build(foreign: Foreign, dtype: str) -> nn.Module:
    """The model of `foreign`. Raises ModelError for an unknown architecture and for tensors missing or left over."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    check_config(foreign.config, foreign.path)
    given = dict(foreign.config)
    kind = given.pop("model_type", None)
    try:
        config = AutoConfig.for_model(kind, **given)
        with init_empty_weights():
            architecture: Any = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{foreign.path} has a configuration that transformers does not take: {on_one_line(error)}",
            "Code that comes with a model is never run.",
        ) from error
    model, found = architecture.from_pretrained(
        None,
        config=config,
        state_dict=foreign.tensors,
        dtype=getattr(torch, dtype),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{foreign.path} holds no tensor '{missing[0]}' ({len(missing)} missing).",
            INCOMPLETE,
        )
    if extra := sorted(found["unexpected_keys"]):
        raise ModelError(
            f"{foreign.path} holds '{extra[0]}' ({len(extra)} such tensors): no place in {architecture.__name__}.",
            "If they do not count, leave them out by the parameter ignore, for example ignore: ['*.mask'].",
        )
    _resize(foreign, model, {name for name, *_ in found["mismatched_keys"]})
    if (foreign.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(foreign.path)
    return model.eval()


def _resize(foreign: Foreign, model: nn.Module, names: set[str]) -> None:
    """Give single layers the widths that their tensors have. Anything outside the blocks must fit."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    tensors = {}
    for name in names:
        tensor = foreign.tensors.get(name, foreign.tensors.get(name.removeprefix(prefix)))
        if tensor is None or ".layers." not in name:
            given = "fused from others" if tensor is None else list(tensor.shape)
            raise ModelError(
                f"{foreign.path}: '{name}' is {given}, its configuration says {list(model.get_parameter(name).shape)}.",
                "The configuration belongs to another model.",
            )
        tensors[name] = tensor
    shapes.resize(model, tensors)
    if tensors:
        try:
            find_decoder(model)
        except RuntimeError as error:
            raise ModelError(
                f"{foreign.path}: its layers do not fit together: {error}", "Are all its files there?"
            ) from error


def adopt(compressor: Compressor, foreign: Foreign, model: Any) -> None:
    """Tell `compressor` grids and bits by the linears' names in `model`, and attach adapters to it in its precision."""
    kind = next(model.parameters()).dtype
    decoder = find_decoder(model)
    known = {linear.name for linear in (*decoder.linears, decoder.head) if linear is not None}
    prefix = getattr(model, "base_model_prefix", "") + "."

    def name(given: str) -> str:
        return given if given in known else prefix + given

    compressor.grids = {name(key): grid for key, grid in foreign.grids.items() if name(key) in known}
    compressor.stored_bits = {name(key): bits for key, bits in foreign.stored_bits.items() if name(key) in known}
    adapters = {
        name(key): LowRank(adapter.down.to(kind), adapter.up.to(kind)) for key, adapter in foreign.adapters.items()
    }
    attach(model, adapters)
