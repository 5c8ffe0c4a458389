"""LLM-Pruner: structured pruning by what removing a head or a channel does to the loss.

    kick compress MODEL llm_pruner@0.2 --out DIR        kick compress MODEL "llm_pruner@0.2 > tune" --out DIR

Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models", arXiv 2305.11627. Scores come from
gradients on a few calibration samples (importance.py). Block-wise: key heads with their query heads, and MLP channels,
in all but the first and last layers; channel-wise: dimensions of the hidden state; layer-wise: the last layers. What is
left has its own width in each layer unless `uniform`, which plain transformers loads. `tune` recovers by LoRA.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kick import shapes
from kick.blocks import parameter_count
from kick.calibration import Calibration
from kick.compressor import Compressor, Cost, Knob, Progress, no_progress
from kick.errors import ConfigError, LevelError
from kick.levels import Level, Sparsity
from kick.policy import Policy
from kick.spec import Spec

from ..llama import ModelShape, keep_layers, layers_of, parts, refuse_remains
from .gradients import collect
from .importance import TAYLOR, Aggregation, Importance, aggregate, unit_scores
from .widths import channels_removed, heads_removed, ratio_for, rounded

_NEAR = 0.02  # of the level: farther off is worth a warning
Sums = dict[nn.Module, tuple[Tensor, Tensor | None]]  # (g, F) of each linear
Kept = tuple[Tensor, Tensor]  # of a layer: the key heads and the MLP channels that stay, in order
_OF_GRADIENTS = {"samples", "sample_length"}
_WITH_SQUARES = ("element2", "mixed")


class LLMPruner(Compressor):
    name = "llm_pruner"
    knob = Knob.SPARSITY
    needs_calibration = True
    _gone: int  # parameters that go, by the widths that were chosen

    class Params(Spec):
        structure: Literal["block", "channel", "layer"] = "block"
        importance: Importance = Field(default="element1", description="l2 and random are what Taylor scores must beat")
        aggregation: Aggregation = Field(default="sum", description="over the tensors of a group")
        ratio_of: Literal["model", "layers"] = Field(
            default="model",
            description="what the level is a share of: all parameters, or the units of each pruned layer (authors')",
        )
        skip_first: int = Field(default=4, ge=0, description="layers that stay whole, at the beginning")
        skip_last: int = Field(default=2, ge=0, description="and at the end")
        uniform: bool = Field(default=False, description="all layers alike, none skipped: plain transformers loads it")
        multiple: int = Field(default=1, ge=1, description="MLP widths are multiples of this")
        samples: int = Field(default=10, ge=1, description="of the calibration, for gradients")
        sample_length: int = Field(default=128, ge=2, description="tokens of each")
        blocks_at_once: int = Field(default=0, ge=0, description="whose gradients are held together; 0: all")

        @model_validator(mode="after")
        def _says_nothing_in_vain(self) -> "LLMPruner.Params":
            given = self.model_fields_set
            of_blocks = {"skip_first", "skip_last", "uniform", "multiple", "blocks_at_once"}
            if self.structure != "block" and (unread := sorted(given & of_blocks)):
                raise ValueError(f"{unread[0]} is about structure: block, and structure: {self.structure} is asked for")
            if self.structure == "layer" and (unread := sorted(given & {"importance", "aggregation", *_OF_GRADIENTS})):
                raise ValueError(f"{unread[0]} is about scores, and structure: layer takes the last layers")
            if self.importance not in TAYLOR and (unread := sorted(given & _OF_GRADIENTS)):
                raise ValueError(f"{unread[0]} is about gradients, and importance: {self.importance} takes none")
            if self.uniform and (unread := sorted(given & {"skip_first", "skip_last"})):
                raise ValueError(f"{unread[0]} protects layers, and uniform: true prunes all alike")
            return self

        @property
        def takes_gradients(self) -> bool:
            return self.structure != "layer" and self.importance in TAYLOR

    def follow(self, policy: Policy, level: Level | None) -> None:
        super().follow(policy, level)
        self.needs_calibration = self.params.takes_gradients

    def cost(self, level: Level | None, skeleton: nn.Module) -> Cost | None:
        """Of the gradients: forward and backward through all of it for each part whose sums are held together.

        As of training (training/spec.py), 2 operations for each weight and token forwards, 2 backwards and 2 more where
        a gradient is asked for; 4 bytes a weight, and as many for each of its sums.
        """
        params, whole = self.params, parameter_count(skeleton)
        if not params.takes_gradients or self.stages_before:  # a stage before may have taken it apart
            return None
        asked, parts_, at_once = whole, 1, whole
        if params.structure == "block":
            layers = layers_of(skeleton)
            chosen = self._chosen(len(layers))
            sizes = [sum(linear.weight.numel() for linear in _linears(layers[index])) for index in chosen]
            step = params.blocks_at_once or len(chosen)
            held = [sum(sizes[start : start + step]) for start in range(0, len(sizes), step)]
            asked, parts_, at_once = sum(sizes), len(held), max(held)
        sums = 2 if params.importance in _WITH_SQUARES else 1
        operations = params.samples * params.sample_length * (4.0 * whole * parts_ + 2.0 * asked)
        return Cost(0, operations, 4 * whole + 4 * sums * at_once)

    def compress(
        self,
        model: nn.Module,
        level: Level | None,
        calibration: Calibration | None,
        *,
        progress: Progress = no_progress,
    ) -> nn.Module:
        if not isinstance(level, Sparsity):
            raise LevelError(f"llm_pruner takes a share to remove, not '{level}'.", "For example llm_pruner@0.2.")
        llama: Any = model
        refuse_remains(model, "llm_pruner")
        layers = layers_of(llama)
        dtype, whole = llama.dtype, parameter_count(llama)
        if dtype == torch.float16:  # its gradients would vanish or overflow
            llama = llama.float()
        tokens = self._tokens(calibration)
        self.facts = {"tokens": tokens.numel(), "structure": self.params.structure}
        if self.params.structure == "layer":
            self._drop_layers(llama, level.fraction, whole)
        elif self.params.structure == "channel":
            self._drop_hidden(llama, level.fraction, tokens, whole)
        else:
            self._drop_units(llama, layers, level.fraction, tokens, progress)
        self.expected_parameters = whole - self._gone
        removed = self._gone / whole
        self.facts["removed"] = removed
        if self.params.ratio_of == "model" and abs(removed - level.fraction) > _NEAR:
            self.warn(f"{removed:.1%} of the parameters went where {level} was asked: units are that large.")
        return llama.to(dtype).eval()

    def _tokens(self, calibration: Calibration | None) -> Tensor:
        """[samples, length] what gradients are of; none where none are needed."""
        params = self.params
        if not params.takes_gradients:
            return torch.empty((0, 0), dtype=torch.long)
        if calibration is None:
            raise LevelError("llm_pruner needs calibration text.", "Give a calibration source.")
        tokens = calibration.tokens[: params.samples, : params.sample_length]
        if tokens.shape != (wanted := (params.samples, params.sample_length)):
            asked, there = (f"{n} calibration samples of {length} tokens" for n, length in (wanted, tokens.shape))
            self.warn(f"{asked} were asked for; there are {there}.")
        return tokens

    # Block-wise

    def _drop_units(self, model: Any, layers: Any, share: float, tokens: Tensor, progress: Progress) -> None:
        shape = ModelShape.of(model.config)
        chosen = self._chosen(len(layers))
        sizes = [_unit_sizes(layers[index], shape) for index in chosen]

        def parameters(heads: int, channels: int) -> int:
            return sum(heads * head + channels * channel for head, channel in sizes)

        def gone(ratio: float) -> int:
            return parameters(*self._removed(shape, ratio))

        whole = parameter_count(model)
        ratio = share if self.params.ratio_of == "layers" else ratio_for(share, lambda ratio: gone(ratio) / whole)
        heads, channels = self._removed(shape, ratio)
        fitting = admissible_heads(shape, shape.kv_heads - heads) if self.params.uniform else shape.kv_heads - heads
        if fitting != shape.kv_heads - heads:  # channels make up for it
            heads = shape.kv_heads - fitting
            base = whole if self.params.ratio_of == "model" else parameters(shape.kv_heads, shape.intermediate)
            wanted = (share * base - parameters(heads, 0)) / max(1, parameters(0, 1))
            channels = shape.intermediate - self._width(shape, shape.intermediate - round(max(0.0, wanted)))
        self._gone = parameters(heads, channels)
        kept_heads, kept_channels = shape.kv_heads - heads, shape.intermediate - channels
        if kept_heads < 1 or kept_channels < 1:
            raise LevelError(
                f"level {share:g} leaves {kept_heads} key heads and {kept_channels} MLP channels in a layer.",
                "Ask for less, or protect fewer layers.",
            )
        self.facts |= {"ratio": ratio, "layers": chosen, "key_heads": kept_heads, "mlp_channels": kept_channels}
        for index, scores in self._scored(model, layers, chosen, shape, tokens, progress):
            kept = tuple(
                score.topk(count_).indices.sort().values
                for score, count_ in zip(scores, (kept_heads, kept_channels), strict=True)
            )
            slice_layer(model, index, (kept[0], kept[1]), shape)
        if self.params.uniform:
            model.config.num_attention_heads = kept_heads * shape.queries_per_key
            model.config.num_key_value_heads = kept_heads
            model.config.head_dim = shape.head_dim
            model.config.intermediate_size = kept_channels

    def _chosen(self, layers: int) -> list[int]:
        if self.params.uniform:
            return list(range(layers))
        chosen = list(range(self.params.skip_first, layers - self.params.skip_last))
        if not chosen:
            raise ConfigError(
                f"llm_pruner: skip_first {self.params.skip_first} and skip_last {self.params.skip_last} protect all "
                f"{layers} layers.",
                "Protect fewer.",
            )
        return chosen

    def _removed(self, shape: ModelShape, ratio: float) -> tuple[int, int]:
        """(key heads, MLP channels) that go from each layer."""
        kept = self._width(shape, shape.intermediate - channels_removed(shape.intermediate, ratio))
        return heads_removed(shape.kv_heads, shape.head_dim, ratio), shape.intermediate - kept

    def _width(self, shape: ModelShape, kept: int) -> int:
        """Of an MLP of which so many channels should stay."""
        return rounded(kept, self.params.multiple, shape.intermediate)

    def _scored(
        self, model: Any, layers: Any, chosen: list[int], shape: ModelShape, tokens: Tensor, progress: Progress
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Of each chosen layer the scores of its key heads and MLP channels; all before the first layer is changed."""
        at_once = self.params.blocks_at_once or len(chosen)
        generator = torch.Generator().manual_seed(self.seed)
        found = []
        for start in range(0, len(chosen), at_once):
            progress(start, len(chosen), f"gradients of layer {chosen[start]}")
            part = chosen[start : start + at_once]
            modules = [module for index in part for module in _linears(layers[index])]
            sums: Sums = {}
            if self.params.importance in TAYLOR:
                sums = collect(model, modules, tokens, self.params.importance in _WITH_SQUARES)
            found += [(index, self.layer_scores(layers[index], shape, sums, generator)) for index in part]
        yield from found

    def layer_scores(
        self, layer: Any, shape: ModelShape, sums: Sums, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """([key heads], [MLP channels]) how much each matters. `sums`: (g, F) of the linears."""
        attention, mlp = parts(layer)
        groups = (
            (
                [(attention.q_proj, 0), (attention.k_proj, 0), (attention.v_proj, 0), (attention.o_proj, 1)],
                shape.kv_heads,
            ),
            ([(mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)], shape.intermediate),
        )
        return tuple(self._group_scores(tensors, units, sums, generator) for tensors, units in groups)  # type: ignore[return-value]

    def _group_scores(
        self, tensors: list[tuple[Any, int]], units: int, sums: Sums, generator: torch.Generator
    ) -> Tensor:
        if self.params.importance == "random":
            return torch.rand(units, generator=generator)
        scores = [
            unit_scores(self.params.importance, linear.weight.detach(), *_sums(sums, linear), axis, units)
            for linear, axis in tensors
        ]
        return aggregate(scores, self.params.aggregation)

    # Channel-wise and layer-wise

    def _drop_hidden(self, model: Any, share: float, tokens: Tensor, whole: int) -> None:
        """Dimensions of the hidden state, through everything."""
        hidden, heads = model.config.hidden_size, model.config.num_attention_heads
        modules = [module for layer in model.model.layers for module in _linears(layer)]
        modules.append(model.get_input_embeddings())
        if not model.config.tie_word_embeddings:
            modules.append(model.get_output_embeddings())
        if self.params.importance == "random":
            scores = torch.rand(hidden, generator=torch.Generator().manual_seed(self.seed))
        else:
            taylor = self.params.importance in TAYLOR
            squares = self.params.importance in _WITH_SQUARES
            sums = collect(model, modules, tokens, squares) if taylor else {}
            outputs = {id(linear) for layer in model.model.layers for linear in _outputs(layer)}
            each = [
                unit_scores(
                    self.params.importance,
                    module.weight.detach(),
                    *_sums(sums, module),
                    0 if id(module) in outputs else 1,
                    hidden,
                )
                for module in modules
            ]
            scores = aggregate(each, self.params.aggregation)
        ratio = share
        if self.params.ratio_of == "model":
            ratio = ratio_for(share, lambda ratio: channels_removed(hidden, ratio) * _per_dimension(model) / whole)
        kept = hidden - channels_removed(hidden, ratio)
        kept = max(heads, heads * round(kept / heads))  # transformers wants a multiple of the heads
        dims = scores.topk(kept).indices.sort().values
        self._gone = round((hidden - kept) * _per_dimension(model))
        self.facts |= {"ratio": ratio, "hidden": kept}
        _slice_hidden(model, dims)

    def _drop_layers(self, model: Any, share: float, whole: int) -> None:
        """The last layers go: as many as come nearest to the share."""
        layers = model.model.layers
        each = parameter_count(layers[0])
        base = whole if self.params.ratio_of == "model" else each * len(layers)
        kept = len(layers) - round(share * base / each)
        if not 0 < kept < len(layers):
            raise LevelError(f"level {share:g} leaves {kept} of {len(layers)} layers.", "Choose another share.")
        self._gone = (len(layers) - kept) * each
        model.model.layers = layers[:kept]
        keep_layers(model.config, range(kept))
        self.facts["layers"] = kept


def admissible_heads(shape: ModelShape, wanted: int) -> int:
    """The number of key heads nearest to `wanted` that plain transformers takes: query heads divide the hidden size.

    Of two that are as near the larger. Raises LevelError if there is none.
    """
    fitting = [n for n in range(shape.kv_heads, 0, -1) if shape.hidden % (n * shape.queries_per_key) == 0]
    if not fitting:
        raise LevelError(
            f"uniform: no number of heads divides the hidden size {shape.hidden}, which transformers asks for.",
            "Leave out uniform.",
        )
    return min(fitting, key=lambda heads: abs(heads - wanted))


def _sums(sums: Sums, module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return sums.get(module, (None, None))


def _linears(layer: Any) -> list[Any]:
    attention, mlp = parts(layer)
    names = [f"{part}_proj" for part in "qkvo"]
    return [*(getattr(attention, name) for name in names), mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _outputs(layer: Any) -> tuple[Any, Any]:
    attention, mlp = parts(layer)
    return attention.o_proj, mlp.down_proj


def _unit_sizes(layer: Any, shape: ModelShape) -> tuple[int, int]:
    """Parameters of a key head with its query heads, and of an MLP channel."""
    attention, mlp = parts(layer)
    inner = [attention.q_proj, attention.k_proj, attention.v_proj]
    head = sum(parameter_count(linear) for linear in inner) + attention.o_proj.weight.numel()
    channel = parameter_count(mlp.gate_proj) + parameter_count(mlp.up_proj) + mlp.down_proj.weight.numel()
    return head // shape.kv_heads, channel // shape.intermediate


def _per_dimension(model: Any) -> float:
    """Parameters that go with one dimension of the hidden state."""
    layers = model.model.layers
    inside = sum(linear.weight.numel() for layer in layers for linear in _linears(layer))
    inside += sum(linear.bias.numel() for layer in layers for linear in _outputs(layer) if linear.bias is not None)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    embeddings = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    return (inside + norms + sum(embeddings.values())) / model.config.hidden_size


@torch.no_grad()
def slice_layer(model: Any, index: int, kept: Kept, shape: ModelShape) -> None:
    """Leave a layer the key heads and MLP channels of `kept`; query heads go with the key head that they read."""
    prefix = f"model.layers.{index}"
    attention, mlp = parts(model.model.layers[index])
    places = torch.arange(shape.kv_heads * shape.head_dim).reshape(shape.kv_heads, shape.head_dim)
    keys = places[kept[0].cpu()].flatten()
    queries = torch.arange(shape.heads * shape.head_dim).reshape(shape.kv_heads, -1)[kept[0].cpu()].flatten()
    channels = kept[1].cpu()
    tensors = {}
    for owner, name, rows in (
        (attention, "q", queries),
        (attention, "k", keys),
        (attention, "v", keys),
        (mlp, "gate", channels),
        (mlp, "up", channels),
    ):
        linear = getattr(owner, f"{name}_proj")
        path = f"{prefix}.{'self_attn' if owner is attention else 'mlp'}.{name}_proj"
        rows = rows.to(linear.weight.device)
        tensors[f"{path}.weight"] = linear.weight[rows].clone()
        if linear.bias is not None:
            tensors[f"{path}.bias"] = linear.bias[rows].clone()
    columns = queries.to(attention.o_proj.weight.device)
    tensors[f"{prefix}.self_attn.o_proj.weight"] = attention.o_proj.weight[:, columns].clone()
    tensors[f"{prefix}.mlp.down_proj.weight"] = mlp.down_proj.weight[
        :, channels.to(mlp.down_proj.weight.device)
    ].clone()
    shapes.resize(model, tensors)


@torch.no_grad()
def _slice_hidden(model: Any, dims: Tensor) -> None:
    outputs = {id(linear) for layer in model.model.layers for linear in _outputs(layer)}
    tensors = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or not isinstance(weight, Tensor):
            continue
        at = dims.to(weight.device)
        if weight.ndim == 1:  # a norm
            tensors[f"{name}.weight"] = weight[at].clone()
        elif id(module) in outputs:
            tensors[f"{name}.weight"] = weight[at].clone()
            if module.bias is not None:
                tensors[f"{name}.bias"] = module.bias[at].clone()
        elif not (model.config.tie_word_embeddings and module is model.get_output_embeddings()):
            tensors[f"{name}.weight"] = weight[:, at].clone()
    shapes.resize(model, tensors)
    model.config.head_dim = ModelShape.of(model.config).head_dim  # where it was left to hidden_size by heads
    model.config.hidden_size = len(dims)
    model.tie_weights()
