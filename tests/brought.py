"""Checkpoints as others write them, and the way in."""

import json

from safetensors.torch import save_file

from kick.calibration import CalibrationSpec
from kick.compress import Recipe, compress
from kick.models import find_source
from kick.settings import Setting

GPTQ_V1 = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16}}},
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}


def write(path, config, tensors, tokenizer=None, **more):
    """A model directory. `config`: a model's configuration, changed by `more`; None removes a key."""
    path.mkdir()
    found = {**json.loads(config.to_json_string()), **more}
    (path / "config.json").write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / "model.safetensors")
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path


def bring(path, dense, out, then=(), **params):
    """The checkpoint of the setting `external` with `path`, beside the directory `dense`."""
    source = find_source(str(dense))
    setting = Setting(compressor="external", params={"path": str(path), **params}, then=then)
    spec = CalibrationSpec(samples=4, sequence_length=32)
    return compress(Recipe.of(source, setting, spec), out)


def is_linear(name):
    return name.endswith(".weight") and name.split(".")[-2] in PROJECTIONS
