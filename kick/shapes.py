"""Models whose blocks differ in width: structured pruning may leave each layer heads and channels of its own.

A configuration holds one width for all layers, so such a checkpoint carries a table of the tensors that differ from
it, `shapes.json`. kick loads by it; plain `from_pretrained` refuses the checkpoint and names the tensors.
"""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kick.errors import INCOMPLETE, CheckpointError, ModelError
from kick.files import read_json, write_json

TABLE = "shapes.json"


def resize(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Make `tensors` parameters of `model`, whatever shape its configuration gave them."""
    for name, tensor in tensors.items():
        owner_name, _, last = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        before = owner.get_parameter(last)
        owner._parameters[last] = nn.Parameter(tensor.to(before.dtype), requires_grad=False)
        if last == "weight" and isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = tensor.shape
        elif last == "weight" and isinstance(owner, Conv1D):
            owner.nx, owner.nf = tensor.shape


def table_of(model: Any) -> dict[str, list[int]]:
    """The tensors of `model` whose shape is not what its configuration says."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        expected = dict(type(model)(model.config).named_parameters())
    return {
        name: list(weight.shape)
        for name, weight in model.named_parameters()
        if name in expected and expected[name].shape != weight.shape
    }


def padded(model: Any) -> Any:
    """The same function in the widths that the configuration gives: what is missing is zero, at the end of each tensor.

    Right for Llama-like blocks, where a channel or a group of heads that is zero all over adds nothing.
    """
    whole = type(model)(model.config).to(model.dtype).eval()
    state = {}
    for name, expected in whole.state_dict().items():
        given = model.state_dict()[name]
        missing = [size for long, short in zip(expected.shape, given.shape, strict=True) for size in (long - short, 0)]
        if min(missing, default=0) < 0:
            raise ModelError(
                f"'{name}' is {list(given.shape)}, wider than the configuration's {list(expected.shape)}.",
                "Only layers that became narrower can be filled up.",
            )
        state[name] = nn.functional.pad(given, missing[::-1])
    whole.load_state_dict(state)
    return whole


def save_table(directory: Path, table: dict[str, list[int]]) -> None:
    write_json(directory / TABLE, table)


def read_table(directory: Path) -> dict[str, list[int]]:
    """The table in `directory`, empty if it has none."""
    path = directory / TABLE
    try:
        table = read_json(path) if path.is_file() else {}
        return {str(name): [int(size) for size in shape] for name, shape in table.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", INCOMPLETE) from error


def read_tensors(directory: Path, table: dict[str, list[int]]) -> dict[str, Tensor]:
    """The tensors that `table` names. Raises ModelError if one is missing or of another shape."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in table.keys() & stored.keys():
                found[name] = stored.get_tensor(name)
    for name, shape in table.items():
        if name not in found or list(found[name].shape) != shape:
            given = list(found[name].shape) if name in found else "missing"
            raise ModelError(f"{directory / TABLE} says that '{name}' is {shape}; it is {given}.", "Compress again.")
    return found
