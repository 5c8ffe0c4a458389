"""Models that are not Llamas behind the fast LM: what may be packed or shared, and what is asked row by row."""

import pytest
import torch
from conftest import make_tiny_llama
from lm_reference import ask, greedy, one_by_one
from transformers import BertConfig, BertLMHeadModel, BloomConfig, GPT2Config, MptConfig

from kick.errors import ModelError
from kick.lm import generate, memory
from kick.lm.base import context_length
from kick.lm.fast import FastLM
from kick.lm.generation import Decoding


def check_scores(lm, pairs, within=1e-4):
    for (value, _), pair in zip(ask(lm, pairs), pairs, strict=True):
        assert value == pytest.approx(one_by_one(lm.model, *pair)[0], abs=within)


def check_texts(lm, prompts):
    """Eight tokens after each, all asked at once, are those that greedy decoding gives row by row."""
    for prompt, text in zip(prompts, generate(lm, prompts, [], 8), strict=True):
        tokens = greedy(lm.model, lm.tokenizer(prompt)["input_ids"], 8, lm.tokenizer.eos_token_id)
        assert text == lm.tokenizer.decode(tokens, skip_special_tokens=True)


def with_head(kind):
    """Tiny models whose logits are no plain product, and what becomes of the product."""
    import transformers as t

    torch.manual_seed(0)
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 600, "initializer_range": 0.2,
    }  # fmt: skip
    if kind == "gemma2":
        own = {"head_dim": 8, "final_logit_softcapping": 1.0, "layer_types": ["full_attention"] * 2}
        config = t.Gemma2Config(**shape, **own, attn_implementation="eager")
        return t.Gemma2ForCausalLM(config).eval(), torch.tanh
    if kind == "granite":
        return t.GraniteForCausalLM(t.GraniteConfig(**shape, logits_scaling=4.0)).eval(), lambda logits: logits / 4
    return t.CohereForCausalLM(t.CohereConfig(**shape, logit_scale=0.25)).eval(), lambda logits: logits / 4


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere"])
def test_a_head_that_scales_or_caps_runs_where_logits_count(kind, tokenizer):
    model, behind = with_head(kind)
    lm = FastLM(model, tokenizer)
    assert lm.runner.plain_head
    pairs = [([11, 12, 13], [4, 5]), ([11, 12], [13, 6]), ([20], [21])]
    check_scores(lm, pairs)

    half = FastLM(model.to(torch.bfloat16), tokenizer)
    found = torch.randn(5, 32).bfloat16()
    exact = behind(found.float() @ model.get_output_embeddings().weight.float().T)
    targets = torch.tensor([3, 599, 0, 17, 256])
    at_targets = half.runner.logits(found, targets).gather(1, targets[:, None])
    assert torch.allclose(at_targets, exact.gather(1, targets[:, None]), atol=1e-6)
    assert torch.allclose(half.runner.exact_logits(found), exact, atol=1e-6)


@pytest.mark.parametrize("heeds", [True, False])
def test_a_head_that_is_something_else_is_left_to_the_model(tokenizer, heeds):
    """Which may give the logits that are asked for, or all of them whatever is asked."""
    from transformers import LlamaForCausalLM

    class Bent(LlamaForCausalLM):
        def forward(self, *args, logits_to_keep=0, **kwargs):
            found = super().forward(*args, logits_to_keep=logits_to_keep if heeds else 0, **kwargs)
            found.logits = found.logits.sinh()
            return found

    model = make_tiny_llama()
    model.__class__ = Bent
    lm = FastLM(model, tokenizer)
    assert not lm.runner.plain_head
    assert lm.no_sharing is None
    pairs = [([11, 12, 13], [4, 5]), ([11, 12], [13, 6]), ([20], [21])]
    check_scores(lm, pairs)


def sliding():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=600, sliding_window=8, initializer_range=0.2,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def test_a_model_with_a_sliding_window_is_asked_row_by_row_and_says_so(tokenizer):
    lm = FastLM(sliding(), tokenizer)
    assert lm.record()["shares_prefixes"] is False
    assert "DynamicSlidingWindowLayer" in lm.record()["why_not"]
    pairs = [(list(range(10, 40)), [4, 5]), (list(range(10, 30)), [6]), ([3], [4])]
    check_scores(lm, pairs)
    check_texts(lm, ["The river ran", "A"])


def test_memory_is_bounded_whatever_the_length_where_nothing_is_shared(tokenizer, monkeypatch):
    lm = FastLM(sliding(), tokenizer, params=FastLM.Params(row_tokens=16))
    assert lm.runner.takes_pieces
    widths, forward = [], lm.runner._body.forward
    monkeypatch.setattr(
        lm.runner._body, "forward", lambda *a, **own: widths.append(own["input_ids"].shape) or forward(*a, **own)
    )
    long = [10 + place % 90 for place in range(300)]
    pairs = [(long, [4, 5]), (long, [4, 6]), (long[:50], [7]), ([3], [4])]
    found = ask(lm, pairs)
    assert max(rows * width for rows, width in widths) <= 4 * 16
    for (value, _), pair in zip(found, pairs, strict=True):
        assert value == pytest.approx(one_by_one(lm.model, *pair)[0], abs=1e-4)
    widths.clear()
    text = lm.complete([long], Decoding((), most=6))
    assert max(rows * width for rows, width in widths) <= 16
    expected = greedy(lm.model, long, 6, tokenizer.eos_token_id)
    assert text == [tokenizer.decode(expected, skip_special_tokens=True)]


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neox", "phi", "qwen2", "gemma"])
def test_other_architectures_score_like_one_by_one(kind, tokenizer):
    from test_blocks import tiny

    lm = FastLM(tiny(kind, vocab_size=600), tokenizer)
    stem = [10 + place % 7 for place in range(40)]
    pairs = [([11, 12, 13], [4, 5]), ([11, 12], [13, 6]), ([20], [21]), ([*stem, 8], [5]), ([*stem, 9], [5, 6])]
    check_scores(lm, pairs)


def recurrent(kind):
    """Tiny models whose state is no keys and values of all tokens."""
    import transformers as t

    torch.manual_seed(0)
    common = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 600, "initializer_range": 0.2}
    if kind == "mamba":
        return t.MambaForCausalLM(t.MambaConfig(**common, state_size=8, use_mambapy=False)).eval()
    attention = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = t.Lfm2Config(**common, **attention, layer_types=["conv", "full_attention"], max_position_embeddings=512)
    return t.Lfm2ForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["mamba", "lfm2"])
def test_models_with_recurrent_states_are_asked_row_by_row(kind, tokenizer):
    lm = FastLM(recurrent(kind), tokenizer, params=FastLM.Params(row_tokens=16))
    assert not lm.record()["shares_prefixes"]
    long = [10 + place % 90 for place in range(100)]  # more than is read at once
    pairs = [([11, 12, 13], [4, 5]), (list(range(10, 40)), [13, 6]), ([20], [21]), (long, [5, 6])]
    check_scores(lm, pairs)
    check_texts(lm, ["The river ran", "A", "Bread is made of flour, water"])


def counting_otherwise(kind):
    """Tiny models that go wrong after kept tokens: one counts places from 2, one keeps a state of its own."""
    import transformers as t

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 600}
    if kind == "rwkv":
        return t.RwkvForCausalLM(t.RwkvConfig(**shape, attention_hidden_size=32, context_length=128)).eval()
    more = {"num_attention_heads": 4, "max_position_embeddings": 130, "is_decoder": True, "initializer_range": 0.2}
    return t.RobertaForCausalLM(t.RobertaConfig(**shape, **more)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["roberta", "rwkv"])
def test_rounding_hides_no_model_that_goes_wrong_after_kept_tokens(kind, dtype, tokenizer):
    lm = FastLM(counting_otherwise(kind).to(dtype), tokenizer)
    assert not lm.record()["shares_prefixes"]
    assert lm.record()["generates"] == "one row at a time"
    pairs = [([11, 12, 13], [4, 5]), (list(range(10, 40)), [13, 6]), ([20], [21])]
    check_scores(lm, pairs, 1e-4 if dtype == torch.float32 else 0.05)
    check_texts(lm, ["The river ran", "A", "Bread is made of flour, water"])


def test_a_model_that_was_being_trained_answers_without_dropout(tokenizer):
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=600)).train()
    lm = FastLM(model, tokenizer)
    assert lm.record()["shares_prefixes"]
    assert ask(lm, [([11, 12], [4])]) == ask(lm, [([11, 12], [4])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_depends_on_places_in_memory_is_not_packed(tokenizer, dtype):
    from transformers import MptConfig, MptForCausalLM

    torch.manual_seed(0)
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=600, max_seq_len=256, initializer_range=0.2)
    lm = FastLM(MptForCausalLM(config).eval().to(dtype), tokenizer)  # its ALiBi counts columns, not tokens
    assert "packed rows differ" in lm.record()["why_not"]
    stem = list(range(10, 40))
    pairs = [([*stem, *range(100 + 40 * n, 140 + 40 * n)], [5]) for n in range(3)]
    check_scores(lm, pairs, 1e-4 if dtype == torch.float32 else 0.1)


def test_a_window_in_memory_is_not_packed(tokenizer):
    assert "a window of 256 tokens" in FastLM(make_tiny_llama(window_size=256), tokenizer).record()["why_not"]


def test_rows_on_both_sides_of_a_change_of_rotary_frequencies_are_never_together(tokenizer):
    """Longrope turns all frequencies of a call over where its longest row passes the original length."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}  # fmt: skip
    config = Phi3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=600, max_position_embeddings=256, rope_parameters=rope, initializer_range=0.2, pad_token_id=1,
        bos_token_id=0, eos_token_id=1, sliding_window=None, original_max_position_embeddings=64,
    )  # fmt: skip
    lm = FastLM(Phi3ForCausalLM(config).eval(), tokenizer)
    assert lm.record()["alone_beyond"] == 64
    assert lm.no_sharing is None
    stem = [10 + place % 50 for place in range(62)]
    pairs = [([*stem[:n], 200 + n], [4]) for n in (20, 30, 61, 62)] + [(stem * 2, [7, 8]), ([*stem, 9, 9, 9], [5])]
    check_scores(lm, pairs)
    prompts = [
        "The river ran",
        "A",
        "The river ran to the sea and the boats lay still in the harbour. " * 3,
        "Wind and " * 18,
    ]
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    assert lengths[0] + 16 < 64 < lengths[2]
    assert lengths[3] <= 64 < lengths[3] + 16  # grows out of it
    for prompt, made in zip(prompts, generate(lm, prompts, [], 16), strict=True):
        expected = greedy(lm.model, tokenizer(prompt)["input_ids"], 16, tokenizer.eos_token_id)
        assert made == tokenizer.decode(expected, skip_special_tokens=True)


def test_frequencies_that_grow_beyond_the_models_own_context_are_nothing_to_fear(tokenizer):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    record = FastLM(make_tiny_llama(rope_parameters=rope), tokenizer).record()
    assert record["shares_prefixes"]
    assert "alone_beyond" not in record


def test_prompts_that_are_padded_to_one_length_are_of_about_one_length(tokenizer, monkeypatch):
    lm = FastLM(sliding(), tokenizer)
    padded, read = [], lm.decoder.read_padded

    def note(contexts, *more):
        padded.append((len(contexts) * max(map(len, contexts)), sum(map(len, contexts))))
        return read(contexts, *more)

    monkeypatch.setattr(lm.decoder, "read_padded", note)
    monkeypatch.setattr(lm.runner, "most_cached_tokens", lambda: 310)
    contexts = [[20 + number, *range(30, 30 + length)] for number, length in enumerate([100, 9, 100, 9, 100, 9, 100])]
    lm.complete(contexts, Decoding((), most=1))
    whole, own = map(sum, zip(*padded, strict=True))
    assert whole == own == 4 * 101 + 3 * 10


def test_the_width_of_layers_that_differ_and_of_experts():
    from transformers import Gemma3nTextConfig, Qwen3MoeConfig

    assert memory._intermediate(Gemma3nTextConfig(intermediate_size=[64, 128], num_hidden_layers=2)) == 128
    sizes = {"intermediate_size": 64, "moe_intermediate_size": 48, "num_experts_per_tok": 8}
    assert memory._intermediate(Qwen3MoeConfig(**sizes)) == 8 * 48


def test_the_context_of_a_model_of_several_kinds_of_input_is_that_of_its_text_part():
    from transformers import Gemma3Config, GPT2Config

    assert context_length(Gemma3Config(text_config={"max_position_embeddings": 8192})) == 8192
    assert context_length(GPT2Config(n_positions=1024)) == 1024


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(n_positions=77), 77),
        (MptConfig(max_seq_len=88), 88),
        (BloomConfig(), 2048),  # has none: its attention sees any distance
    ],
)
def test_the_context_is_known_by_several_names(config, expected):
    assert context_length(config) == expected


def test_a_model_that_looks_ahead_is_refused(tokenizer):
    config = BertConfig(
        vocab_size=600, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="bert model looks at the tokens after"):
        FastLM(BertLMHeadModel(config).eval(), tokenizer)
    config.is_decoder = True
    assert FastLM(BertLMHeadModel(config).eval(), tokenizer).finite


def test_options_of_one_token_share_a_row_where_nothing_else_is_shared(tokenizer):
    lm = FastLM(sliding(), tokenizer)
    forward, seen = lm.model.model.forward, []

    def count(*arguments, **options):
        seen.append(tuple(options["input_ids"].shape))
        return forward(*arguments, **options)

    lm.model.model.forward = count
    context = [10 + place % 50 for place in range(100)]
    pairs = [(context, [option]) for option in (3, 4, 5, 6)] + [(context[:-1], [context[-1], 3])]
    found = ask(lm, pairs)
    assert seen == [(1, 100)]
    for (value, _), pair in zip(found, pairs, strict=True):
        assert value == pytest.approx(one_by_one(sliding(), *pair)[0], abs=1e-4)
