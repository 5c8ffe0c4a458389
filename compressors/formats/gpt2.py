"""GPT-2 as nanoGPT writes it, which AST's own training does: linears [out, in] where transformers stores [in, out],
names of a compiled model, and no biases where there are none.
"""

import re

import torch

from .files import Foreign

_LINEAR = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")


def turn_around(model: Foreign) -> None:
    """Names and orientation as transformers has them; a missing bias becomes zero."""
    if model.config.get("model_type") != "gpt2":
        return
    model.tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in model.tensors.items()}
    model.adapters = {name.removeprefix("_orig_mod."): adapter for name, adapter in model.adapters.items()}
    first = next((t for name, t in model.tensors.items() if name.endswith("h.0.attn.c_attn.weight")), None)
    if first is None or first.shape[0] != 3 * first.shape[1]:  # queries, keys and values are its outputs
        return
    for name in [name for name in model.tensors if _LINEAR.search(name)]:
        outputs = model.tensors[name].shape[0]
        model.tensors[name] = model.tensors[name].T.contiguous()
        model.tensors.setdefault(name.removesuffix("weight") + "bias", torch.zeros(outputs))
    for name in [name for name in model.tensors if re.search(r"(ln_1|ln_2|ln_f)\.weight$", name)]:
        model.tensors.setdefault(name.removesuffix("weight") + "bias", torch.zeros_like(model.tensors[name]))
    model.notes.append("its linears were stored [out, in], as nanoGPT does, and were turned around")
