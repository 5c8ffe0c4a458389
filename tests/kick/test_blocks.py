"""Blocks, groups and coverage on tiny random models of many architectures."""

import pytest
import torch
from kick_compressors.awq import AWQ
from kick_compressors.gptq import GPTQ
from kick_compressors.magnitude import Magnitude
from kick_compressors.rtn import RTN
from kick_compressors.sparsegpt import SparseGPT
from kick_compressors.wanda import Wanda
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kick.blocks import find_decoder
from kick.calibration import Calibration, CalibrationSpec
from kick.errors import ModelError
from kick.levels import Bits, Pattern, Sparsity
from kick.measured import Structure, measure
from kick.walk import BlockWalk

LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "head_dim": 8,
}
# linears of one block by the input they share, worked out from each architecture's published diagram
GATED = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
ARCHITECTURES = {
    "llama": (LLAMA_LIKE, GATED),
    "mistral": (LLAMA_LIKE, GATED),
    "qwen2": (LLAMA_LIKE, GATED),
    "qwen3": (LLAMA_LIKE, GATED),
    "gemma": (LLAMA_LIKE, GATED),
    "gemma2": ({**LLAMA_LIKE, "sliding_window": 8}, GATED),
    "phi": (
        {k: v for k, v in LLAMA_LIKE.items() if k != "head_dim"},
        [{"q_proj", "k_proj", "v_proj", "fc1"}, {"dense"}, {"fc2"}],  # attention and MLP read the same norm
    ),
    "opt": (
        {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128,
         "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}],
    ),
    "gpt2": (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64},
        [{"attn.c_attn"}, {"attn.c_proj"}, {"c_fc"}, {"mlp.c_proj"}],
    ),
    "gpt_neox": (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 128, "max_position_embeddings": 64},
        [{"query_key_value"}, {"attention.dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}],
    ),
}  # fmt: skip


def tiny(kind, **changes):
    settings, _ = ARCHITECTURES.get(kind, (LLAMA_LIKE, None))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**settings, **changes})).eval()


def text(samples=5, length=16):
    tokens = torch.randint(2, 128, (samples, length), generator=torch.Generator().manual_seed(1))
    return Calibration(tokens, "test", CalibrationSpec(samples=samples, sequence_length=length))


def patterns_of(model, level):
    return {linear.name: level for linear in find_decoder(model).linears} if isinstance(level, Pattern) else {}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_groups_are_the_linears_that_share_an_input(kind):
    decoder = find_decoder(tiny(kind))
    assert len(decoder.blocks) == 2
    expected = {frozenset(names) for names in ARCHITECTURES[kind][1]}
    for block in decoder.blocks:
        suffixes = set().union(*expected)

        def short(linear, suffixes=suffixes):
            return max((s for s in suffixes if linear.name.endswith(s)), key=len)

        assert {frozenset(map(short, group.linears)) for group in block.groups} == expected
    assert decoder.uncovered == ()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_walking_the_blocks_gives_what_the_model_gives(kind):
    model, calibration = tiny(kind), text()
    decoder = find_decoder(model)
    last = decoder.blocks[-1]
    inputs = []
    handle = last.linears[0].module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    with torch.no_grad():
        for row in calibration.tokens:
            model(row[None], use_cache=False)
    handle.remove()
    whole = torch.cat(inputs).reshape(-1, inputs[0].shape[-1])

    walk = BlockWalk(model, decoder, calibration.tokens, torch.float32, batch=2)
    walk.propagate(decoder.blocks[0])
    collected = []
    walk.collect(last, {last.groups[0]: collected.append})
    assert torch.allclose(torch.cat(collected), whole, atol=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("compressor", [Magnitude, Wanda])
def test_every_architecture_is_pruned_exactly(kind, compressor):
    for level in (Sparsity(fraction=0.5), Pattern(keep=2, of=4)):
        model = compressor().compress(tiny(kind), level, text())
        measured = measure(model, structure=Structure(patterns_of(model, level)))
        assert measured.sparsity == 0.5
        assert measured.violations == 0
        assert measured.coverage == 1.0


EVERYWHERE = [*ARCHITECTURES, "mixtral"]  # mixtral's experts are stacked and stay dense; its attention is treated
GROUPS = {"group_size": 16}


def logits_of(model, calibration):
    with torch.no_grad():
        return model(calibration.tokens).logits


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_every_architecture_is_pruned_with_compensation(kind):
    for level in (Sparsity(fraction=0.5), Pattern(keep=2, of=4)):
        dense, calibration = tiny(kind), text()
        errors = {}
        for compressor in (Magnitude(), SparseGPT()):
            model = compressor.compress(tiny(kind), level, calibration)
            measured = measure(model, structure=Structure(patterns_of(model, level)))
            assert (measured.sparsity, measured.violations) == (0.5, 0)
            errors[compressor.name] = (logits_of(model, calibration) - logits_of(dense, calibration)).norm()
        assert errors["sparsegpt"] < errors["magnitude"]


@pytest.mark.parametrize("kind", EVERYWHERE)
@pytest.mark.parametrize("compressor", [RTN, GPTQ, AWQ])
def test_every_architecture_is_quantised(kind, compressor):
    """At 8 bits next to nothing changes: a scale that was folded into the wrong place would show."""
    dense, calibration = tiny(kind), text()
    quantiser = compressor(compressor.Params(**GROUPS))
    model = quantiser.compress(tiny(kind), Bits(width=8), calibration)
    measured = measure(model, structure=Structure(grids=quantiser.grids))
    assert quantiser.grids.keys() == measured.layers.keys()
    assert measured.grid_violations == 0
    expected = logits_of(dense, calibration)
    assert (logits_of(model, calibration) - expected).norm() < 0.02 * expected.norm()


def test_conv1d_is_pruned_along_its_inputs():
    # GPT-2 stores [in, out]: four neighbours along the input dimension are four rows of the stored weight
    model = Magnitude().compress(tiny("gpt2"), Pattern(keep=2, of=4), None)
    stored = model.transformer.h[0].attn.c_attn.weight.data  # [32, 96]
    kept = (stored != 0).reshape(8, 4, 96).sum(dim=1)
    assert (kept == 2).all()


def test_stacked_experts_are_reported_as_not_covered():
    model = tiny("mixtral", num_local_experts=4, num_experts_per_tok=2)
    decoder = find_decoder(model)
    assert any("experts" in name for name in decoder.uncovered)
    pruned = Magnitude().compress(model, Sparsity(fraction=0.5), None)
    measured = measure(pruned)
    covered = sum(layer["weights"] for layer in measured.layers.values())
    inside = sum(w.numel() for w in model.model.layers.parameters() if w.dim() >= 2)
    assert measured.coverage == pytest.approx(covered / inside)
    assert 0 < measured.coverage < 0.5
    assert measured.sparsity == pytest.approx(0.5)  # of the linears
    assert measured.sparsity_of_blocks == pytest.approx(0.5 * measured.coverage)  # of what there is
    assert measured.bits_per_weight == pytest.approx(32)


def test_a_model_without_blocks_is_refused():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(8, 4), nn.Linear(4, 8)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, tokens, use_cache=False):
            return self.head(self.embedding(tokens))

    with pytest.raises(ModelError, match="no decoder blocks"):
        find_decoder(Flat())


def test_a_block_that_is_told_something_about_its_tokens_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, hidden, memory):
            return self.linear(hidden) + memory

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layers = nn.Embedding(8, 4), nn.ModuleList([Block(), Block()])

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, tokens, use_cache=False):
            hidden = start = self.embedding(tokens)
            for layer in self.layers:
                hidden = layer(hidden, start)
            return hidden

    model = Model()
    with pytest.raises(ModelError, match="depends on the tokens"):
        BlockWalk(model, find_decoder(model), torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]), torch.float32)
