"""The fast LM against a one-by-one reference and against lm-eval's own HFLM."""

import threading
import weakref

import numpy as np
import pytest
import torch
from conftest import make_tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from kick.errors import KickError
from kick.lm import find_lm, generate, loglikelihoods, memory, rolling_loglikelihoods
from kick.lm.fast import FastLM
from kick.lm.generation import batches_within, sample
from kick.lm.packing import PREFIX_STEP
from kick.lm.runner import Runner


def one_by_one(model, context, continuation):
    """The definition: one plain forward pass, all logits, log-softmax in double precision."""
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    chosen = logits[list(places)]
    value = chosen.gather(1, torch.tensor(continuation)[:, None]).sum().item()
    return value, chosen.argmax(-1).tolist() == continuation


def greedy(model, context, count, end):
    made = []
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([context + made])).logits[0, -1].argmax())
        if token == end:
            break
        made.append(token)
    return made


def ask(lm, pairs):
    return lm._loglikelihood_tokens([(("", ""), context, continuation) for context, continuation in pairs])


@pytest.fixture(scope="module")
def lm(tokenizer):
    return FastLM(make_tiny_llama(), tokenizer)


# Scores


def test_prefixes_are_shared_by_a_llama(lm):
    assert lm.no_sharing is None
    assert lm.record()["shares_prefixes"] is True


words = st.lists(st.integers(2, 9), min_size=1, max_size=12)


@given(
    st.lists(
        st.tuples(st.integers(0, 2), words, st.lists(st.integers(2, 9), min_size=1, max_size=5)),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=25, deadline=None)
def test_any_mix_of_requests_scores_like_one_by_one(lm, requests):
    heads = ([], list(range(10, 10 + PREFIX_STEP)), list(range(100, 100 + 2 * PREFIX_STEP + 3)))
    pairs = [(heads[head] + context, continuation) for head, context, continuation in requests]
    for (value, is_greedy), (context, continuation) in zip(ask(lm, pairs), pairs, strict=True):
        expected, expected_greedy = one_by_one(lm.model, context, continuation)
        assert value == pytest.approx(expected, abs=1e-4)
        assert is_greedy == expected_greedy


@given(
    st.lists(
        st.tuples(st.integers(0, 3), words, st.lists(st.integers(2, 9), min_size=0, max_size=5)),
        min_size=1,
        max_size=10,
    ),
    st.sampled_from([16, 33, 64, 200]),
    st.integers(0, 6),
)
@settings(max_examples=25, deadline=None)
def test_any_number_of_tokens_in_a_row_and_any_lack_of_memory_give_the_same_scores(tokenizer, requests, most, failures):
    """Stems longer than a row, nested; empty continuations; forward passes that run out of memory on their way."""
    stem = [10 + place % 50 for place in range(150)]
    heads = ([], stem[:PREFIX_STEP], stem, [*stem, *range(100, 100 + PREFIX_STEP + 3)])
    pairs = [(heads[head] + context, continuation) for head, context, continuation in requests]
    lm = FastLM(make_tiny_llama(), tokenizer, params=FastLM.Params(row_tokens=most))
    forward, left, lock = lm.model.model.forward, [failures], threading.Lock()

    def fails_at_first(*arguments, **options):
        with lock:  # rows run side by side
            fails = options["input_ids"].shape[1] > 20 and left[0] > 0
            left[0] -= fails
        if fails:
            raise torch.OutOfMemoryError("no room")
        return forward(*arguments, **options)

    lm.model.model.forward = fails_at_first
    try:
        found = ask(lm, pairs)
    except torch.OutOfMemoryError:
        assert failures > int(np.log2(most / 16))  # halved down to sixteen tokens at least
        return
    for (value, is_greedy), (context, continuation) in zip(found, pairs, strict=True):
        expected = one_by_one(make_tiny_llama(), context, continuation) if continuation else (0.0, True)
        assert value == pytest.approx(expected[0], abs=1e-4)
        assert is_greedy == expected[1]


@pytest.fixture
def threads():
    """How many there are, to be changed."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def many_rows():
    """Requests after one prefix that fill several rows of 64 tokens."""
    head = [10 + place % 50 for place in range(PREFIX_STEP)]
    return [(head + [100 + number] * 20, [number % 7 + 2, 3]) for number in range(12)]


def test_any_number_of_threads_gives_the_same_scores_and_each_the_same_bits(tokenizer, threads):
    pairs = many_rows()
    lm = FastLM(make_tiny_llama(), tokenizer, params=FastLM.Params(row_tokens=64))
    expected = [one_by_one(lm.model, *pair)[0] for pair in pairs]
    for count in (1, 2, 3, 4):
        threads(count)
        first, again = (ask(FastLM(lm.model, tokenizer, params=FastLM.Params(row_tokens=64)), pairs) for _ in range(2))
        assert [value for value, _ in first] == pytest.approx(expected, abs=1e-4)
        assert first == again


def test_a_row_that_runs_out_of_memory_leaves_the_others_their_results(tokenizer, threads):
    threads(4)
    pairs = many_rows()
    lm = FastLM(make_tiny_llama(), tokenizer, params=FastLM.Params(row_tokens=64))
    forward, calls = lm.model.model.forward, []

    def fails_once(*arguments, **options):
        size = options["input_ids"].shape[1]
        calls.append(size)
        if len(calls) == 3:  # the first is the prefix
            raise torch.OutOfMemoryError("no room")
        return forward(*arguments, **options)

    lm.model.model.forward = fails_once
    found = ask(lm, pairs)
    assert [value for value, _ in found] == pytest.approx(
        [one_by_one(make_tiny_llama(), *p)[0] for p in pairs], abs=1e-4
    )
    assert lm.halved == 1
    full = [size for size in calls if size > 32]
    assert len(full) == 1 + 4  # the prefix and four rows of three requests, each asked once


def test_nothing_of_a_prefix_is_in_memory_when_rows_are_tried_again(tokenizer, monkeypatch):
    lm = FastLM(make_tiny_llama(), tokenizer, params=FastLM.Params(row_tokens=64))
    forward, kept, forget = lm.model.model.forward, [], lm.runner.forget

    def rows_fail(*arguments, **options):
        found = forward(*arguments, **options)
        if options["input_ids"].shape[1] == PREFIX_STEP and not kept:
            kept.append(weakref.ref(options["past_key_values"].layers[0].keys))
        elif len(kept) == 1:
            raise torch.OutOfMemoryError("no room")
        return found

    def look():
        forget()
        kept.append(kept[0]())

    monkeypatch.setattr(lm.model.model, "forward", rows_fail)
    monkeypatch.setattr(lm.runner, "forget", look)
    ask(lm, many_rows())
    assert kept[1:] == [None]


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("most", [16, 64, 1024])
def test_contexts_as_long_as_a_kept_prefix(tokenizer, more, most):
    """The last token of a context predicts the first target: it is never part of what is only kept."""
    lm = FastLM(make_tiny_llama(), tokenizer, params=FastLM.Params(row_tokens=most))
    context = [10 + place % 50 for place in range(PREFIX_STEP + more)]
    pairs = [(context, [5, 6]), (context, [7]), (context, [5])]
    for (value, _), pair in zip(ask(lm, pairs), pairs, strict=True):
        assert value == pytest.approx(one_by_one(lm.model, *pair)[0], abs=1e-4)


def test_long_questions_of_one_subject_are_computed_once_for_all_options(tokenizer):
    """Tokens that pass the model: the few-shot part once, each stem once, each option's own tokens."""
    lm = FastLM(make_tiny_llama(), tokenizer, params=FastLM.Params(row_tokens=64))
    head = [10 + place % 50 for place in range(2 * PREFIX_STEP)]
    stems = [[100 + question, *(60 + place % 30 for place in range(99))] for question in range(3)]
    pairs = [(head + stem, [option]) for stem in stems for option in (2, 3, 4, 5)]
    forward, seen = lm.model.model.forward, []

    def count(*arguments, **options):
        seen.append(options["input_ids"].shape[1])
        return forward(*arguments, **options)

    lm.model.model.forward = count
    ask(lm, pairs)
    assert sum(seen) == len(head) + sum(map(len, stems))


def test_empty_texts_are_scored_too(lm):
    empty = loglikelihoods(lm, [("", ""), ("The sea", ""), ("  ", "is"), ("", "is")])
    assert empty[:2] == [(0.0, True), (0.0, True)]
    assert empty[2][0] != empty[3][0]  # the spaces belong to what is scored
    assert rolling_loglikelihoods(lm, ["", "Rain"])[0] == 0.0


def test_a_text_is_tokenised_once_for_all_models(tokenizer, monkeypatch):
    texts = []
    original = type(tokenizer).__call__

    def spy(self, text, *arguments, **options):
        texts.extend([text] if isinstance(text, str) else text)
        return original(self, text, *arguments, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", spy)
    pairs = [("A question met once", f" option {number}") for number in range(3)]
    first = loglikelihoods(FastLM(make_tiny_llama(), tokenizer), pairs)
    assert sorted(texts) == sorted(["A question met once", *("A question met once" + option for _, option in pairs)])
    assert loglikelihoods(FastLM(make_tiny_llama(), tokenizer), pairs) == first
    assert len(texts) == 4


def test_no_more_than_some_positions_have_logits_at_a_time(tokenizer):
    lm = FastLM(make_tiny_llama(), tokenizer)
    sizes = []
    lm.model.lm_head.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[0]))
    text = "Rivers carve valleys over thousands of years and carry sand to the sea. " * 30
    assert rolling_loglikelihoods(lm, [text])[0] < 0
    assert sum(sizes) == len(lm.tok_encode(text, add_special_tokens=False))
    assert max(sizes) <= 128


def test_a_model_that_caps_its_logits_scores_like_one_by_one(tokenizer):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=600, final_logit_softcapping=1.0, layer_types=["full_attention"] * 2,
        initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    lm = FastLM(Gemma2ForCausalLM(config).eval(), tokenizer)
    assert not lm.runner.plain_head
    pairs = [([11, 12, 13], [4, 5]), ([11, 12], [13, 6]), ([20], [21])]
    for (value, _), pair in zip(ask(lm, pairs), pairs, strict=True):
        assert value == pytest.approx(one_by_one(lm.model, *pair)[0], abs=1e-4)


def test_half_precision_does_not_round_the_logits_that_count():
    model = make_tiny_llama(tie_word_embeddings=False).bfloat16()
    runner = Runner(model)
    torch.manual_seed(0)
    hidden = (torch.randn(5, 32) * 8).bfloat16()
    targets = torch.tensor([3, 4, 5, 6, 7])
    exact = hidden.float() @ model.lm_head.weight.float().T
    found = runner.logits(hidden, targets)
    assert found.dtype == torch.float32
    assert torch.allclose(found.gather(1, targets[:, None]), exact.gather(1, targets[:, None]), atol=1e-4)
    assert torch.equal(found.argmax(1), exact.argmax(1))
    rounded = model.lm_head(hidden).float()
    assert not torch.allclose(rounded.gather(1, targets[:, None]), exact.gather(1, targets[:, None]), atol=1e-3)


def test_a_kept_prefix_gives_the_same_numbers_as_a_recomputed_one(tokenizer):
    head = list(range(10, 10 + PREFIX_STEP))
    pairs = [([*head, 3], [4, 5]), ([*head, 6], [7])]
    warm = FastLM(make_tiny_llama(), tokenizer)
    ask(warm, [([*head, 8], [9]), ([*head, 9], [9])])
    long = [*head, *range(20, 20 + PREFIX_STEP)]
    longer = [(long, [5]), (long, [6])]
    assert ask(warm, longer) == ask(FastLM(make_tiny_llama(), tokenizer), longer)  # not continued from the shorter one
    assert ask(warm, pairs) == ask(FastLM(make_tiny_llama(), tokenizer), pairs)  # to the last bit


def test_a_prompt_longer_than_the_context_is_cut_on_the_left(tokenizer):
    lm = FastLM(make_tiny_llama(max_position_embeddings=16), tokenizer)
    context, continuation = list(range(20, 60)), [7, 8]
    (value, _) = ask(lm, [(context, continuation)])[0]
    assert value == pytest.approx(one_by_one(lm.model, context[-15:], continuation)[0], abs=1e-4)


def test_a_model_with_a_sliding_window_is_asked_row_by_row_and_says_so(tokenizer):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=600, sliding_window=8, initializer_range=0.2,
    )  # fmt: skip
    lm = FastLM(MistralForCausalLM(config).eval(), tokenizer)
    assert lm.record()["shares_prefixes"] is False
    assert "DynamicSlidingWindowLayer" in lm.record()["why_not"]
    pairs = [(list(range(10, 40)), [4, 5]), (list(range(10, 30)), [6]), ([3], [4])]
    for (value, _), pair in zip(ask(lm, pairs), pairs, strict=True):
        assert value == pytest.approx(one_by_one(lm.model, *pair)[0], abs=1e-4)
    text = generate(lm, ["The river ran", "A"], [], 8)
    for prompt, made in zip(["The river ran", "A"], text, strict=True):
        expected = greedy(lm.model, tokenizer(prompt)["input_ids"], 8, tokenizer.eos_token_id)
        assert made == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neox", "phi", "qwen2", "gemma"])
def test_other_architectures_score_like_one_by_one(kind, tokenizer):
    from test_blocks import tiny

    lm = FastLM(tiny(kind, vocab_size=600), tokenizer)
    stem = [10 + place % 7 for place in range(40)]
    pairs = [([11, 12, 13], [4, 5]), ([11, 12], [13, 6]), ([20], [21]), ([*stem, 8], [5]), ([*stem, 9], [5, 6])]
    for (value, _), pair in zip(ask(lm, pairs), pairs, strict=True):
        assert value == pytest.approx(one_by_one(lm.model, *pair)[0], abs=1e-4)


def test_rolling_likelihood_counts_every_token_once(tokenizer):
    lm = FastLM(make_tiny_llama(max_position_embeddings=8), tokenizer)
    text = "Rivers carve valleys over thousands of years and carry sand to the sea."
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) > 16
    stream = [tokenizer.bos_token_id, *tokens]  # stream[i] comes before tokens[i]
    expected = 0.0
    for start in range(0, len(tokens), 8):
        end = min(start + 8, len(tokens))
        first = end - 8 if end == len(tokens) else start  # the last window has eight inputs like all others
        expected += one_by_one(lm.model, stream[max(0, first) : start + 1], tokens[start:end])[0]
    assert rolling_loglikelihoods(lm, [text])[0] == pytest.approx(expected, abs=1e-3)


# Generation


def test_generation_in_a_batch_is_generation_alone(lm, tokenizer):
    prompts = ["The lighthouse", "A", "Bread is made of flour, water, salt and", "One two three four five six"]
    together = generate(lm, prompts, [], 12)
    for prompt, text in zip(prompts, together, strict=True):
        tokens = greedy(lm.model, tokenizer(prompt)["input_ids"], 12, tokenizer.eos_token_id)
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_generation_after_a_shared_prefix_is_generation_alone(lm, tokenizer):
    head = "Question: what runs but never walks? Answer: a river.\n\n" * 6
    prompts = [head + end for end in ("Who?", "Where does it go?", "When")]
    assert len(tokenizer(head)["input_ids"]) > PREFIX_STEP
    for prompt, text in zip(prompts, generate(lm, prompts, [], 10), strict=True):
        tokens = greedy(lm.model, tokenizer(prompt)["input_ids"], 10, tokenizer.eos_token_id)
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_shared_prefix_stands_once_for_all_rows_of_a_batch(lm, monkeypatch):
    assert lm._shares_in_decoding
    head = "Question: what runs but never walks? Answer: a river.\n\n" * 6
    prompts = [head + f"Question: {word}?" for word in ("Who", "Where", "When", "Why")]
    together = generate(lm, prompts, [], 6)
    sizes = []
    original = lm._read
    monkeypatch.setattr(lm, "_read", lambda *a: sizes.append(read := original(*a)) or read)
    assert generate(lm, prompts, [], 6) == together
    layer = sizes[0][0]._layers[0]
    tokens = [len(lm.tok_encode(prompt)) for prompt in prompts]
    assert layer.all_keys.shape[2] == max(tokens) - layer.shared[0].shape[2] + 6
    monkeypatch.setattr(lm, "_shares_in_decoding", False)
    assert generate(lm, prompts, [], 6) == together


def test_a_stop_string_ends_a_completion_and_is_not_part_of_it(lm):
    (whole,) = generate(lm, ["The lighthouse"], [], 16)
    stop = whole[3:5]
    (cut,) = generate(lm, ["The lighthouse"], [stop], 16)
    assert cut == whole[: whole.index(stop)]


def test_prompts_of_many_lengths_are_read_in_groups_and_completed_as_alone(lm, tokenizer):
    words = ["the", "harbour", "was", "quiet", "and", "boats", "lay", "still", "in", "morning", "light"]
    lengths = [200, 3, 40, 1, 90, 35, 3]
    prompts = [" ".join(words[(7 * row + i) % len(words)] for i in range(n)) for row, n in enumerate(lengths)]
    for prompt, text in zip(prompts, generate(lm, prompts, [], 8), strict=True):
        tokens = greedy(lm.model, tokenizer(prompt)["input_ids"], 8, tokenizer.eos_token_id)
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_text_of_a_wanted_length_is_not_ended_by_an_end_token(lm, tokenizer, monkeypatch):
    tokens = greedy(lm.model, tokenizer("Rain and")["input_ids"], 8, tokenizer.eos_token_id)
    monkeypatch.setattr(lm, "_end_tokens", lambda: set(tokens[:1]))  # as if the likeliest first token ended a text
    assert generate(lm, ["Rain and"], [], 8) == [""]
    (text,) = generate(lm, ["Rain and"], [], 8, min_new_tokens=8)
    assert text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_sampling_depends_on_the_seed_and_the_rows_own_prompt_alone(lm):
    prompts = ["The lighthouse", "Bread is made of flour", "A"]
    together = generate(lm, prompts, [], 12, temperature=1.0, seed=3)
    alone = [generate(lm, [prompt], [], 12, temperature=1.0, seed=3)[0] for prompt in prompts]
    assert together == alone
    assert generate(lm, prompts[::-1], [], 12, temperature=1.0, seed=3) == together[::-1]
    assert generate(lm, prompts, [], 12, temperature=1.0, seed=4) != together
    first, second = generate(lm, ["A", "A"], [], 12, temperature=1.0, seed=3)
    assert first == together[2]
    assert second != first  # asked twice in one call: another draw


def test_sampled_tokens_have_the_probabilities_of_the_model():
    rng = np.random.default_rng(0)
    p = np.array([0.1, 0.2, 0.3, 0.4])
    draws = np.bincount([sample(p, 0, 1.0, rng.random()) for _ in range(20_000)], minlength=4) / 20_000
    assert draws == pytest.approx(p, abs=0.012)  # three standard errors and a little
    assert {sample(p, 2, 1.0, rng.random()) for _ in range(100)} == {2, 3}
    assert {sample(p, 0, 0.65, rng.random()) for _ in range(100)} == {2, 3}  # .4 is too little, .7 is enough
    assert sample(p, 0, 1.0, 0.9999999999999999) == 0


def test_where_memory_runs_out_the_batch_is_halved_and_the_texts_are_the_same(lm, monkeypatch):
    prompts = [f"{word} is" for word in ("Rain", "Snow", "Wind", "Fog", "Hail")]
    expected = generate(lm, prompts, [], 8)
    original = lm._read

    def small(contexts, room):
        if len(contexts) > 2:
            raise torch.OutOfMemoryError("no room")
        return original(contexts, room)

    monkeypatch.setattr(lm, "_read", small)
    assert generate(lm, prompts, [], 8) == expected
    assert lm.halved == 2  # five into two and three, three into one and two
    monkeypatch.setattr(lm, "_read", lambda contexts, room: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(torch.OutOfMemoryError):
        generate(lm, prompts, [], 8)


def test_batches_stay_within_a_number_of_cached_tokens():
    assert list(batches_within([5, 5, 9, 1], [0, 1, 2, 3], 18)) == [[0, 1], [2, 3]]
    assert list(batches_within([50, 1], [0, 1], 18)) == [[0], [1]]  # a long one is a batch by itself


def test_a_batch_that_runs_out_of_memory_on_its_way_samples_the_same_texts(lm, monkeypatch):
    prompts = [f"{word} is" for word in ("Rain", "Snow", "Wind", "Fog")]
    expected = generate(lm, prompts, [], 8, temperature=1.0, seed=5)
    original, steps = lm._last, []

    def fails_later(inputs):
        steps.append(inputs["input_ids"].shape[0])
        if len(steps) == 4:
            raise torch.OutOfMemoryError("no room")
        return original(inputs)

    monkeypatch.setattr(lm, "_last", fails_later)
    assert generate(lm, prompts, [], 8, temperature=1.0, seed=5) == expected
    assert steps[3] == 4


def test_an_empty_prompt_follows_a_prefix_token(lm, tokenizer):
    tokens = greedy(lm.model, [tokenizer.bos_token_id], 6, tokenizer.eos_token_id)
    expected = tokenizer.decode(tokens, skip_special_tokens=True)
    assert generate(lm, [""], [], 6) == [expected]
    assert generate(lm, ["The sea is", "", "A"], [], 6)[1] == expected


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
    lm = FastLM(recurrent(kind), tokenizer)
    assert not lm.record()["shares_prefixes"]
    pairs = [([11, 12, 13], [4, 5]), (list(range(10, 40)), [13, 6]), ([20], [21])]
    for (value, _), pair in zip(ask(lm, pairs), pairs, strict=True):
        assert value == pytest.approx(one_by_one(lm.model, *pair)[0], abs=1e-4)
    prompts = ["The river ran", "A", "Bread is made of flour, water"]
    for prompt, text in zip(prompts, generate(lm, prompts, [], 8), strict=True):
        tokens = greedy(lm.model, tokenizer(prompt)["input_ids"], 8, tokenizer.eos_token_id)
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"window_size": 256}, "a window of 256 tokens"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "depend on the longest row"),
    ],
)
def test_what_depends_on_places_in_memory_is_not_packed(tokenizer, change, says):
    assert says in FastLM(make_tiny_llama(**change), tokenizer).record()["why_not"]


def test_beams_are_refused(lm):
    request = type("Request", (), {"args": ("x", {"until": [], "num_beams": 4})})
    with pytest.raises(KickError, match="beam search"):
        lm.generate_until([request])


def test_bfloat16_on_a_cpu_says_so_in_the_record_and_scores_nearly_alike(tokenizer):
    exact = FastLM(make_tiny_llama(), tokenizer)
    half = FastLM(make_tiny_llama().bfloat16(), tokenizer)
    assert (half.record()["dtype"], half.record()["attention"]) == ("bfloat16", "kick")
    assert half.no_sharing is None
    head = "Rivers carve valleys over thousands of years and carry sand to the sea. " * 8
    pairs = [(head, f" {word}") for word in ("Rain", "Snow", "Wind", "Fog")]
    for (a, _), (b, _) in zip(loglikelihoods(exact, pairs), loglikelihoods(half, pairs), strict=True):
        assert b == pytest.approx(a, abs=0.25)


def test_an_unknown_lm_lists_the_known_ones():
    with pytest.raises(KickError, match="Did you mean 'fast'"):
        find_lm("fats")


# Against lm-eval


def test_scores_are_those_of_hflm(lm, tokenizer):
    from lm_eval.models.huggingface import HFLM

    peer = HFLM(pretrained=make_tiny_llama(), tokenizer=tokenizer, batch_size=2)  # its own attention, not kick's
    pairs = [
        ("The sea is", " wide"),
        ("The sea is", " deep and cold"),
        ("", "Rain"),
        ("A ", "b"),
        ("Salt comes from the sea.", " Yes"),
    ]
    for ours, theirs in zip(loglikelihoods(lm, pairs), loglikelihoods(peer, pairs), strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
        assert ours[1] == theirs[1]
    texts = ["Rivers carve valleys.", "Tides rise and fall twice a day."]
    assert rolling_loglikelihoods(lm, texts) == pytest.approx(rolling_loglikelihoods(peer, texts), abs=1e-3)
    assert generate(lm, texts, ["."], 12) == generate(peer, texts, ["."], 12)


@pytest.mark.real_model
@pytest.mark.parametrize(("form", "shots"), [("letters", 2), ("cloze", 0)])
def test_mmlu_on_the_real_model_scores_like_stock_hflm(real_checkpoint, mirror, form, shots):
    from kick_tasks.mmlu import MMLU
    from lm_eval.models.huggingface import HFLM

    from kick.suite import DataSource, subset

    lm = FastLM.from_checkpoint(real_checkpoint.path, FastLM.Params(), "float32", "cpu")
    peer = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=4)
    suite = MMLU(
        MMLU.Params(shots=shots, format=form, subjects=("astronomy", "global_facts", "high_school_psychology"))
    )
    examples = subset(suite.examples(DataSource.parse(str(mirror))), None, 3, seed=0)
    for ours, theirs in zip(suite.answer(lm, examples), suite.answer(peer, examples), strict=True):
        assert ours.output == theirs.output
        for a, b in zip(ours.choices, theirs.choices, strict=True):
            assert a["loglikelihood"] == pytest.approx(b["loglikelihood"], abs=1e-3)


# How much at once


@pytest.mark.parametrize(
    ("free_mb", "lanes", "expected"), [(100_000, 1, 1024), (10, 1, 256), (10, 2, 128), (1, 1, 32), (0, 1, 16)]
)
def test_rows_side_by_side_take_a_tenth_of_the_free_memory(free_mb, lanes, expected, monkeypatch):
    model = make_tiny_llama()
    config = model.config
    values = 8 * config.hidden_size + 3 * config.intermediate_size
    monkeypatch.setattr(memory, "lane_count", lambda device: lanes)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free_mb * 1_000_000 * values // 512)
    # as if a token took 512 values of 4 bytes: a tenth of 10 MB holds 488 tokens
    assert memory.row_tokens(model) == expected


def test_as_many_rows_at_a_time_as_copies_of_the_prefix_fit(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(memory, "lane_count", lambda device: 4)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)  # 300 for copies
    assert [memory.lanes_beside(device, size) for size in (0, 10, 75, 76, 150, 151, 1000)] == [4, 4, 4, 3, 2, 1, 1]


def test_what_a_token_takes_in_the_cache_is_known_from_the_configuration(lm):
    from kick.lm.runner import cached_bytes

    assert memory.key_value_bytes(lm.model) == cached_bytes(lm._like) // 15 == 2 * 2 * 2 * 8 * 4


def test_free_memory_is_no_more_than_all_of_it():
    device = torch.device("cpu")
    assert 0 < memory.free_bytes(device) <= memory.total_bytes(device)
