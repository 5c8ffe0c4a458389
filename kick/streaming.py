"""Models whose blocks are read from disk when they run and let go afterwards: memory for two blocks at any depth.

    model = open_streamed(path, "float16", scratch)
    with resident(block.module, changed=True):      # its weights are there; on leaving, what they have become is kept
        ...
    save_streamed(model, directory)

A block that runs without `resident` is read for that one run. Everything outside the blocks stays in memory. Changed
blocks are kept as safetensors files in `scratch`, one file a block, which must be there until the model is saved.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kick import adapters, heap
from kick.blocks import largest_block_list
from kick.errors import ModelError
from kick.loading import belongs, check_configuration, without_a_place

INDEX = "model.safetensors.index.json"


class _Storage:
    """Where the tensors of a streamed model are, and which of its blocks are in memory."""

    def __init__(self, model: Any, path: Path, dtype: torch.dtype, scratch: Path) -> None:
        self.dtype = dtype
        self.scratch = scratch
        self.files = _tensor_files(path)
        self.blocks: dict[nn.Module, str] = {}  # block -> the beginning of its tensors' names
        self.held: dict[nn.Module, int] = {}
        self._check_names(model, path)

    def _check_names(self, model: Any, path: Path) -> None:
        twice = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
        wanted = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        if missing := sorted(wanted - self.files.keys() - twice):
            raise ModelError(
                f"{path} cannot be streamed: its files hold no tensor '{missing[0]}'.",
                "Streaming reads files that name tensors as the model does. Try without it.",
            )
        if lost := sorted(name for name in self.files.keys() - wanted if belongs(model, name)):
            raise without_a_place(path, lost)
        if buffers := sorted(model.state_dict().keys() - wanted):
            raise ModelError(f"{path} cannot be streamed: it stores the buffer '{buffers[0]}'.", "Try without it.")

    def read(self, names: list[str]) -> dict[str, Tensor]:
        found = {}
        for file in sorted({self.files[name] for name in names}):
            with safe_open(file, framework="pt") as tensors:
                for name in names:
                    if self.files[name] == file:
                        tensor = tensors.get_tensor(name)
                        found[name] = tensor.to(self.dtype, copy=True) if tensor.is_floating_point() else tensor.clone()
        return found

    def load(self, block: nn.Module) -> None:
        self.held[block] = self.held.get(block, 0) + 1
        if self.held[block] == 1:
            prefix = self.blocks[block]
            names = [name for name, _ in block.named_parameters()]
            found = self.read([prefix + name for name in names])
            for name in names:
                _put(block, name, found[prefix + name])

    def release(self, block: nn.Module) -> None:
        self.held[block] -= 1
        if self.held[block] == 0:
            for name, weight in list(block.named_parameters()):
                _put(block, name, torch.empty_like(weight, device="meta"))
            heap.trim()

    def keep(self, block: nn.Module) -> None:
        """Write what the block's weights are now; from here on they are read from there."""
        prefix = self.blocks[block]
        file = self.scratch / f"{prefix.rstrip('.')}.safetensors"
        tensors = {prefix + name: weight.detach().contiguous() for name, weight in block.named_parameters()}
        partial = file.with_suffix(".partial")
        save_file(tensors, partial, {"format": "pt"})
        partial.replace(file)
        self.files |= dict.fromkeys(tensors, file)


def open_streamed(path: Path, dtype: str, scratch: Path) -> nn.Module:
    """The causal language model in the directory `path`, in evaluation mode, its blocks on disk."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if not path.is_dir():
        raise ModelError(f"{path.name} cannot be streamed.", "Streaming reads a directory with safetensors.")
    heap.release_at_once()
    check_configuration(path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    kind = getattr(torch, dtype)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=kind, trust_remote_code=False)
    model.tie_weights()
    storage = _Storage(model, path, kind, scratch)
    name, blocks = largest_block_list(model)
    storage.blocks = {block: f"{name}.{index}." for index, block in enumerate(blocks)}
    outside = [key for key, _ in model.named_parameters() if not key.startswith(f"{name}.")]
    for key, tensor in storage.read(outside).items():
        _put(model, key, tensor)
    model.tie_weights()
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: storage.load(module))
        block.register_forward_hook(lambda module, args, output: storage.release(module), always_call=True)
        block._kick_storage = storage  # type: ignore[assignment]
    model._kick_storage = storage
    adapters.attach(model, adapters.load(path))
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def storage_of(module: nn.Module) -> _Storage | None:
    return getattr(module, "_kick_storage", None)


@contextmanager
def resident(block: nn.Module, changed: bool = False) -> Iterator[None]:
    """The block's weights are in memory. With `changed`, what has become of them is kept. Nothing for other models."""
    storage = storage_of(block)
    if storage is None:
        yield
        return
    storage.load(block)
    try:
        yield
        if changed:
            storage.keep(block)
    finally:
        storage.release(block)


def save_streamed(model: Any, out: Path) -> None:
    """Write a streamed model as save_pretrained would: one file for each block, one for the rest, and an index."""
    storage = storage_of(model)
    assert storage is not None
    model.config.save_pretrained(out)
    if model.can_generate():
        model.generation_config.save_pretrained(out)
    weight_map: dict[str, str] = {}
    total = 0
    count = len(storage.blocks) + 1
    inside = {id(weight) for block in storage.blocks for weight in block.parameters()}
    rest = {name: weight.detach().contiguous() for name, weight in model.named_parameters() if id(weight) not in inside}
    for index, block in enumerate([*storage.blocks, None], start=1):
        shard = f"model-{index:05d}-of-{count:05d}.safetensors"
        if block is None:
            tensors = rest
        else:
            tensors = storage.read([storage.blocks[block] + name for name, _ in block.named_parameters()])
        save_file(tensors, out / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index_json, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter called `name` inside `module`."""
    owner, _, last = name.rpartition(".")
    expected = module.get_submodule(owner)._parameters[last]
    if expected is None or expected.shape != tensor.shape:
        raise ModelError(
            f"the tensor '{name}' has the shape {list(tensor.shape)}.",
            f"The configuration expects {None if expected is None else list(expected.shape)}.",
        )
    module.get_submodule(owner)._parameters[last] = nn.Parameter(tensor, requires_grad=False)


def _tensor_files(path: Path) -> dict[str, Path]:
    """The file of each tensor."""
    if (path / INDEX).is_file():
        weight_map = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise ModelError(f"{path / INDEX} looks for '{name}' outside its directory.", "Do not trust it.")
        return {name: path / file for name, file in weight_map.items()}
    files: dict[str, Path] = {}
    for file in sorted(path.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file)
    return files
