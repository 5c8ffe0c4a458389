"""A Llama-like model that runs under masks, by hooks on its own modules: masked it gives what the cut model will give.

z_hidden: embeddings, the outputs of attention and MLP, norms over kept dimensions only. z_head: what o_proj is given.
z_intermediate: what up_proj gives, before it meets the gate. z_layer: the outputs of attention and MLP.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from ..llama import ModelShape, parts, spread


class MaskedModel:
    """`model` runs under `z` from now on, until `remove`: layer [1, layers], hidden [1, hidden], head and intermediate
    [layers, units]; None: as it is.

    The hooks stay while it trains, so that blocks that are computed twice (gradient checkpointing) meet the same z.
    """

    def __init__(self, model: Any, within: bool = False) -> None:
        self.z: dict[str, Tensor] | None = None
        self.within = within
        self.shape = (
            model.config.num_attention_heads // model.config.num_key_value_heads,
            model.config.num_key_value_heads,
        )
        self.head_dim = ModelShape.of(model.config).head_dim
        decoder = model.model
        norms = [decoder.norm]
        self.hooks = [decoder.embed_tokens.register_forward_hook(self._embedding)]
        for index, layer in enumerate(decoder.layers):
            attention, mlp = parts(layer)
            norms += [layer.input_layernorm, layer.post_attention_layernorm]
            out = partial(self._block_output, index)
            self.hooks += [
                attention.o_proj.register_forward_pre_hook(partial(self._context, index)),
                attention.o_proj.register_forward_hook(out),
                mlp.up_proj.register_forward_hook(partial(self._intermediate, index)),
                mlp.down_proj.register_forward_hook(out),
            ]
        self.hooks += [norm.register_forward_hook(self._norm) for norm in norms]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _embedding(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if self.z is None else output * (self.z["hidden"][0] > 0)

    def _context(self, index: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.z is None:
            return args
        scale = spread(self.z["head"][index], *self.shape, self.head_dim, self.within)
        return (args[0] * scale.to(args[0].dtype), *args[1:])

    def _block_output(self, index: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self.z is None:
            return output
        return output * (self.z["layer"][0, index] * self.z["hidden"][0]).to(output.dtype)

    def _intermediate(self, index: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if self.z is None else output * self.z["intermediate"][index].to(output.dtype)

    def _norm(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """RMS over the kept dimensions alone: a masked mean, so that no shape depends on the masks."""
        if self.z is None:
            return output
        hidden = self.z["hidden"][0]
        kept = (hidden > 0).to(hidden.dtype)
        x = args[0].float()
        variance = (x.square() * kept).sum(dim=-1, keepdim=True) / kept.sum()
        scaled = x * (variance + module.variance_epsilon).rsqrt() * hidden
        return module.weight * scaled.to(output.dtype)
