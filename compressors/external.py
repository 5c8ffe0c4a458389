"""A compressed model made elsewhere, measured and asked like those made here.

    {compressor: external, label: sheared-1.3b, params: {path: princeton-nlp/Sheared-LLaMA-1.3B}}

Reads plain Hugging Face models, GGUF files, GPTQ, AWQ and compressed-tensors checkpoints, AST's with their low-rank
branch, Sheared LLaMA's under composer's names, and pruned models whose layers differ in width. Quantised weights are
unpacked to what they mean; sparsity, patterns, bits and shape are counted on them, whatever the checkpoint claims.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import nn

from kick import adapters
from kick.blocks import Decoder, find_decoder, parameter_count
from kick.calibration import Calibration
from kick.compressor import Compressor, Knob, Progress, no_progress
from kick.errors import ConfigError, ModelError
from kick.levels import Level, Pattern, parse_pattern
from kick.loading import count_parameters, load_model
from kick.measured import is_pruned, pattern_violations
from kick.models import fetch, find_source, fingerprint
from kick.spec import Spec

from .formats import files, gpt2, llama, quantized, slorb
from .formats.build import adopt, build
from .formats.files import Foreign
from .masks import keep_largest

_PATTERNS = tuple(Pattern(keep=keep, of=of) for keep, of in ((1, 4), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32)))
_NEARLY_ALL = 0.8  # of the pruned linears must keep a pattern for it to be taken as meant
_STRAY = 0.01  # of the groups may hold more than a pattern allows, and it still counts as meant
_NO_TENSORS = ("*.masked_bias", "*.attn.bias", "*.position_ids")  # constants that older transformers stored


class External(Compressor):
    name = "external"
    knob = Knob.NONE
    brings_a_model = True

    class Params(Spec):
        path: str = Field(description="a directory, a .gguf file, a Hugging Face id or a packaged model")
        pattern: str | None = Field(
            default=None, description="N:M to count violations of; found by itself if not given"
        )
        mask: str | None = Field(default=None, description="N:M to apply by magnitude, where masks were not stored")
        allow_pickle: bool = Field(default=False, description="also read .bin and .pt files, their tensors only")
        ignore: tuple[str, ...] = Field(default=(), description="globs of tensors to leave out")

        @field_validator("pattern", "mask")
        @classmethod
        def _is_pattern(cls, text: str | None) -> str | None:
            if text is not None:
                parse_pattern(text)
            return text

    @cached_property
    def _path(self) -> Path:
        """Where the model is; what its configuration and the headers of its files rule out is an error at once."""
        source = find_source(self.params.path, allow_pickle=self.params.allow_pickle)
        path = fetch(source, allow_pickle=self.params.allow_pickle)
        if path.is_file():
            count_parameters(path)
        else:
            quantized.format_of(files.configuration(path), path)
            files.check_weights(path, self.params.allow_pickle)
        return path

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._path, self.params.allow_pickle)

    def inputs(self) -> dict[str, str]:
        return {"model": self._fingerprint}

    def compress(
        self,
        model: Any,
        level: Level | None,
        calibration: Calibration | None,
        *,
        progress: Progress = no_progress,
    ) -> nn.Module:
        path = self._path
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        if path.is_file():
            if self.params.mask or self.params.ignore:
                raise ConfigError(f"{self.params.path}: mask and ignore with a .gguf file.", "It is read as it is.")
            brought: Any = load_model(path, dtype, "cpu")
            kind = "gguf"
            self.stored_bits = gguf_bits(path, brought)
        else:
            foreign = files.read(path, self.params.allow_pickle)
            kind = self._make_plain(foreign, _head_dim(model.config))
            brought = build(foreign, dtype)
            adopt(self, foreign, brought)
            self._apply_mask(brought)
        if path.is_file() or _has_tokenizer(path):
            self.tokenizer_path = path
        elif brought.get_input_embeddings().weight.shape[0] != model.get_input_embeddings().weight.shape[0]:
            raise ModelError(f"{path} holds no tokenizer, and its vocabulary is not the dense model's.", "Add one.")
        self._find_pattern(find_decoder(brought))
        self.facts = {
            "path": self.params.path,
            "fingerprint": self._fingerprint,
            "format": kind,
            "shape": shape_of(brought),
            "dense_shape": shape_of(model),
            "bytes_as_brought": sum(file.stat().st_size for file in self._weight_files(path)),
            "pattern": str(next(iter(self.patterns.values()))) if self.patterns else None,
        }
        return brought

    def _weight_files(self, path: Path) -> list[Path]:
        return [path] if path.is_file() else files.weight_files(path, self.params.allow_pickle)

    def _make_plain(self, foreign: Foreign, dense_head_dim: int | None) -> str:
        """Every step that a foreign checkpoint may need; gives the name of its format."""
        llama.rename_composer(foreign)
        kind = quantized.unpack_all(foreign)
        has_branch = slorb.take_adapters(foreign)
        gpt2.turn_around(foreign)
        llama.fit_configuration(foreign, dense_head_dim)
        dropped = foreign.drop(self.params.ignore)
        foreign.drop(_NO_TENSORS)
        if dropped:
            foreign.notes.append(f"{len(dropped)} tensors were left out as asked: {', '.join(dropped[:3])}")
        for note in foreign.notes:
            self.warn(f"{self.params.path}: {note}")
        return kind or ("slorb" if has_branch else "hf")

    def _apply_mask(self, model: nn.Module) -> None:
        """Keep the largest N of M of each weight with a low-rank branch; if none has one, of every linear."""
        linears = find_decoder(model).linears
        boosted = [linear for linear in linears if adapters.of(linear.module) is not None]
        if self.params.mask is None:
            for linear in boosted:
                if not is_pruned(linear.weight):
                    raise ModelError(
                        f"{self.params.path}: '{linear.name}' has a low-rank branch, but its weight is dense: its mask "
                        "was not stored.",
                        "Say which mask it was trained with, for example mask: '2:4'.",
                    )
            return
        pattern = parse_pattern(self.params.mask)
        for linear in boosted or linears:
            linear.weight.mul_(keep_largest(linear.weight.float().abs(), pattern, dim="row"))
        self.warn(f"{self.params.path}: {pattern} was applied to {len(boosted or linears)} linears by magnitude")

    def _find_pattern(self, decoder: Decoder) -> None:
        """The pattern to count violations of: the one asked for, of every linear; else the tightest that nearly all
        pruned linears keep, of those. What is left out or breaks it is told.
        """
        if self.params.pattern is not None:
            asked = parse_pattern(self.params.pattern)
            self.patterns = {linear.name: asked for linear in decoder.linears if linear.weight.shape[1] % asked.of == 0}
            return
        pruned = [linear for linear in decoder.linears if is_pruned(linear.weight)]
        for pattern in _PATTERNS:
            kept = [linear for linear in pruned if keeps(linear.weight, pattern)]
            if pruned and len(kept) > _NEARLY_ALL * len(pruned):
                divisible = [linear for linear in pruned if linear.weight.shape[1] % pattern.of == 0]
                self.patterns = {linear.name: pattern for linear in divisible}
                if left := [linear.name for linear in decoder.linears if linear.name not in self.patterns]:
                    self.warn(f"{len(left)} linears are not pruned, and not counted under {pattern}: {left[0]}, ...")
                return


def _head_dim(config: Any) -> int | None:
    """Channels of one head of a model with this configuration."""
    heads = getattr(config, "num_attention_heads", None)
    return getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)


def keeps(weight: torch.Tensor, pattern: Pattern) -> bool:
    """Whether all but a few stray groups of `weight` [out, in] are as `pattern` says."""
    if weight.shape[1] % pattern.of:
        return False
    return pattern_violations(weight, pattern) <= _STRAY * weight.numel() / pattern.of


def shape_of(model: Any) -> dict[str, Any]:
    """The dimensions that structured pruning changes, and the number of parameters."""
    config = model.config
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    found = {key: getattr(config, key, None) for key in (*keys, "head_dim", "vocab_size")}
    return {**found, "parameters": parameter_count(model)}


def gguf_bits(path: Path, model: Any) -> dict[str, float]:
    """Bits a weight of the blocks takes in the .gguf file, by the names of `model`'s linears."""
    from gguf import GGUFReader, get_tensor_name_map
    from gguf.constants import MODEL_ARCH_NAMES

    reader = GGUFReader(path)
    stored = {tensor.name: 8 * tensor.n_bytes / tensor.n_elements for tensor in reader.tensors}
    field = reader.fields["general.architecture"]
    name = bytes(field.parts[field.data[0]]).decode()
    arch = next((arch for arch, known in MODEL_ARCH_NAMES.items() if known == name), None)
    if arch is None:
        return {}
    names = get_tensor_name_map(arch, model.config.num_hidden_layers)
    found = {}
    for linear in find_decoder(model).linears:
        own = names.get_name(linear.name)
        if own and f"{own}.weight" in stored:
            found[linear.name] = stored[f"{own}.weight"]
    return found


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))
