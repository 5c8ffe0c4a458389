"""The fast LM against a one-by-one reference and against lm-eval's own HFLM."""

import copy
import threading
import weakref

import numpy as np
import pytest
import torch
from conftest import make_tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_reference import ask, one_by_one

from kick.errors import KickError, ModelError
from kick.lm import find_lm, generate, loglikelihoods, memory, rolling_loglikelihoods
from kick.lm.fast import FastLM
from kick.lm.generation import Decoding
from kick.lm.packing import PREFIX_STEP, Packed
from kick.lm.runner import Runner

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


def test_a_long_request_asked_twice_whose_targets_lie_in_two_pieces_of_a_row_scores_like_one_by_one(tokenizer):
    lm = FastLM(make_tiny_llama(), tokenizer, params=FastLM.Params(row_tokens=16))
    pair = [10 + place for place in range(30)], [2, 3, 4, 5, 6]
    expected, expected_greedy = one_by_one(lm.model, *pair)
    for value, is_greedy in ask(lm, [pair, pair]):
        assert value == pytest.approx(expected, abs=1e-4)
        assert is_greedy == expected_greedy


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
    assert lm.runner.halved == 1
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


def test_where_a_prefix_and_its_copies_do_not_fit_each_request_is_asked_without(tokenizer):
    """Memory for 330 tokens of keys, values and activations: one sequence fits, a kept prefix beside a row does not."""
    head = [10 + place % 50 for place in range(3 * PREFIX_STEP)]
    pairs = [(head + [100 + number] * 20, [number % 7 + 2, 3]) for number in range(8)]
    lm = FastLM(make_tiny_llama(), tokenizer, params=FastLM.Params(row_tokens=256))
    forward = lm.model.model.forward

    def held(cache):
        return cache.get_seq_length() if cache is not None else 0

    def bounded(*arguments, **options):
        kept = sum(held(cache) for *_, cache in lm.runner._prefixes)
        if kept + held(options["past_key_values"]) + options["input_ids"].shape[1] > 330:
            raise torch.OutOfMemoryError("no room")
        return forward(*arguments, **options)

    lm.model.model.forward = bounded
    expected = [one_by_one(make_tiny_llama(), *pair)[0] for pair in pairs]
    assert [value for value, _ in ask(lm, pairs)] == pytest.approx(expected, abs=1e-4)
    assert lm.runner.halved


def test_prefixes_are_kept_as_far_as_they_fit(tokenizer, monkeypatch):
    """Three nested stems of 64, 128 and 192 tokens: with room for 200 the first two are kept, with less the first."""
    stem = [10 + place % 50 for place in range(3 * PREFIX_STEP)]
    pairs = []
    for depth in (1, 2, 3):
        for number in range(6):
            pairs.append(([*stem[: depth * PREFIX_STEP], 100 + depth, number, *range(200, 240)], [5]))
    expected = [one_by_one(make_tiny_llama(), *pair)[0] for pair in pairs]
    for room, most in ((1000, 384), (200, 192), (100, 64)):
        lm = FastLM(make_tiny_llama(), tokenizer, params=FastLM.Params(row_tokens=64))
        monkeypatch.setattr(lm.runner, "most_cached_tokens", lambda room=room: room)
        kept, original = [], lm.runner.keys_and_values

        def note(tokens, prefixes, most, kept=kept, original=original):
            kept.append(sum(prefixes))
            return original(tokens, prefixes, most)

        monkeypatch.setattr(lm.runner, "keys_and_values", note)
        assert [value for value, _ in ask(lm, pairs)] == pytest.approx(expected, abs=1e-4)
        assert max(kept) == most


def test_a_model_that_gives_no_numbers_is_not_one_without_a_cache(tokenizer):
    model = make_tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    lm = FastLM(model, tokenizer)
    assert lm.no_sharing is None
    assert lm.record()["not_finite"] == "log-likelihoods of a few tokens"
    assert "not_finite" not in FastLM(make_tiny_llama(), tokenizer).record()


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("most", [16, 64, 1024])
def test_contexts_as_long_as_a_kept_prefix(tokenizer, more, most):
    """The last token of a context predicts the first target: it is never part of what is only kept."""
    lm = FastLM(make_tiny_llama(), tokenizer, params=FastLM.Params(row_tokens=most))
    context = [10 + place % 50 for place in range(PREFIX_STEP + more)]
    pairs = [(context, [5, 6]), (context, [7]), (context, [5])]
    for (value, _), pair in zip(ask(lm, pairs), pairs, strict=True):
        assert value == pytest.approx(one_by_one(lm.model, *pair)[0], abs=1e-4)


def row_lengths(lm):
    """How many tokens each row has that passes the model from now on."""
    forward, seen = lm.model.model.forward, []

    def count(*arguments, **options):
        seen.append(options["input_ids"].shape[1])
        return forward(*arguments, **options)

    lm.model.model.forward = count
    return seen


def test_long_questions_of_one_subject_are_computed_once_for_all_options(tokenizer):
    """Tokens that pass the model: the few-shot part once, each stem once, each option's own tokens."""
    lm = FastLM(make_tiny_llama(), tokenizer, params=FastLM.Params(row_tokens=64))
    head = [10 + place % 50 for place in range(2 * PREFIX_STEP)]
    stems = [[100 + question, *(60 + place % 30 for place in range(99))] for question in range(3)]
    pairs = [(head + stem, [option]) for stem in stems for option in (2, 3, 4, 5)]
    seen = row_lengths(lm)
    ask(lm, pairs)
    assert sum(seen) == len(head) + sum(map(len, stems))


@pytest.mark.parametrize("preamble", [0, 80])
def test_examples_after_a_common_preamble_are_computed_once_a_subject(tokenizer, preamble):
    """Three subjects with few-shot examples of 700 tokens, ten questions each: a row holds one question of them."""
    lm = FastLM(make_tiny_llama(), tokenizer, params=FastLM.Params(row_tokens=1024))
    head = [10 + place % 50 for place in range(preamble)]
    pairs = []
    for subject in range(3):
        shots = [100 + subject, *(60 + place % (30 + subject) for place in range(699))]
        stems = [[200 + number, *(150 + place % 20 for place in range(60))] for number in range(10)]
        pairs += [(head + shots + stem, [option]) for stem in stems for option in (2, 3, 4, 5)]
    seen = row_lengths(lm)
    ask(lm, pairs)
    distinct = len({tuple(context[: end + 1]) for context, _ in pairs for end in range(len(context))})
    assert sum(seen) < 1.1 * distinct


def test_a_continuation_longer_than_the_context_is_refused(tokenizer):
    lm = FastLM(make_tiny_llama(max_position_embeddings=16), tokenizer)
    assert ask(lm, [([5], [*range(20, 36)])])[0][0] < 0
    with pytest.raises(KickError, match="a continuation of 17 tokens in a context of 16"):
        ask(lm, [([5], [*range(20, 37)])])


def test_empty_texts_are_scored_too(lm):
    empty = loglikelihoods(lm, [("", ""), ("The sea", ""), ("  ", "is"), ("", "is")])
    assert empty[:2] == [(0.0, True), (0.0, True)]
    for (value, _), text in zip(empty[2:], ("  is", "is"), strict=True):  # the spaces belong to what is scored
        tokens = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert value == pytest.approx(one_by_one(lm.model, [lm.tokenizer.bos_token_id], tokens)[0], abs=1e-4)
    assert rolling_loglikelihoods(lm, ["", "Rain"])[0] == 0.0


@pytest.mark.parametrize(("context", "more"), [("The riv", "er"), ("a", "n"), ("The riv", "ers run")])
def test_a_continuation_that_melts_into_the_context_is_scored_by_the_tokens_of_the_whole(lm, context, more):
    def tokens(text):
        return lm.tokenizer(text, add_special_tokens=False)["input_ids"]

    before, whole = tokens(context), tokens(context + more)
    assert whole[: len(before)] != before
    ((value, _),) = loglikelihoods(lm, [(context, more)])
    if len(whole) > len(before):  # as lm-eval has it: after the context's own tokens
        expected = before, whole[len(before) :]
    else:  # lm-eval has nothing to score
        expected = whole[:-1] or [lm.tokenizer.bos_token_id], whole[-1:]
    assert value == pytest.approx(one_by_one(lm.model, *expected)[0], abs=1e-4)
    assert value < 0


def test_a_text_is_tokenised_once_for_all_models(tokenizer, monkeypatch):
    texts = []
    original = type(tokenizer).__call__

    def spy(self, text, *arguments, **options):
        texts.extend([text] if isinstance(text, str) else text)
        return original(self, text, *arguments, **options)

    lms = [FastLM(make_tiny_llama(), tokenizer) for _ in range(2)]
    monkeypatch.setattr(type(tokenizer), "__call__", spy)
    pairs = [("A question met once", f" option {number}") for number in range(3)]
    first = loglikelihoods(lms[0], pairs)
    assert sorted(texts) == sorted(["A question met once", *("A question met once" + option for _, option in pairs)])
    assert loglikelihoods(lms[1], pairs) == first
    assert len(texts) == 4


def test_no_more_than_some_positions_have_logits_at_a_time(tokenizer):
    lm = FastLM(make_tiny_llama(), tokenizer)
    sizes = []
    lm.model.lm_head.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[0]))
    text = "Rivers carve valleys over thousands of years and carry sand to the sea. " * 30
    assert rolling_loglikelihoods(lm, [text])[0] < 0
    assert sum(sizes) == len(lm.tok_encode(text, add_special_tokens=False))
    assert max(sizes) <= 128


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


def test_bfloat16_on_a_cpu_says_so_in_the_record_and_scores_nearly_alike(tokenizer):
    exact = FastLM(make_tiny_llama(), tokenizer)
    half = FastLM(make_tiny_llama().bfloat16(), tokenizer)
    assert (half.record()["dtype"], half.record()["attention"]) == ("bfloat16", "kick")
    assert half.no_sharing is None
    head = "Rivers carve valleys over thousands of years and carry sand to the sea. " * 8
    pairs = [(head, f" {word}") for word in ("Rain", "Snow", "Wind", "Fog")]
    for (a, _), (b, _) in zip(loglikelihoods(exact, pairs), loglikelihoods(half, pairs), strict=True):
        assert b == pytest.approx(a, abs=0.25)


def test_a_model_that_rounds_coarsely_in_half_precision_shares_what_it_may(tokenizer):
    """Its packed rows are off by half a nat, as its whole rows are when they are computed in another way."""
    lm = FastLM(make_tiny_llama(num_hidden_layers=12, initializer_range=0.5).bfloat16(), tokenizer)
    assert lm.no_sharing is None
    assert lm.decoder.shares


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


def test_a_tokenizer_that_adds_a_token_in_front_scores_like_hflm(tokenizer):
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    adding = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    assert adding("Rain")["input_ids"][0] == tokenizer.bos_token_id
    lm = FastLM(make_tiny_llama(), adding)
    peer = HFLM(pretrained=make_tiny_llama(), tokenizer=adding, batch_size=2)
    pairs = [("The sea is", " wide"), ("", "Rain"), ("A ", "b"), ("<s>The sea is", " wide")]
    for ours, theirs in zip(loglikelihoods(lm, pairs), loglikelihoods(peer, pairs), strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
    assert generate(lm, ["Tides rise"], ["."], 12) == generate(peer, ["Tides rise"], ["."], 12)
    # lm-eval scores the added token as if it were text; here it only stands in front
    tokens = adding("Tides rise.")["input_ids"]
    expected = one_by_one(lm.model, tokens[:1], tokens[1:])[0]
    assert rolling_loglikelihoods(lm, ["Tides rise."]) == [pytest.approx(expected, abs=1e-4)]


def test_what_a_tokenizer_puts_at_the_end_stands_in_no_context(tokenizer):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    def adding(template):
        inner = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
        inner.post_processor = TemplateProcessing(single=template, special_tokens=ends)
        return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")

    ending, plain = adding("<s> $A </s>"), adding("<s> $A")
    assert ending("Rain")["input_ids"][-1] == tokenizer.eos_token_id
    lm, expected = FastLM(make_tiny_llama(), ending), FastLM(make_tiny_llama(), plain)
    assert lm.tok_encode("Rain") == expected.tok_encode("Rain")
    pairs = [("The sea is", " wide"), ("The sea is", " deep"), ("", "Rain"), ("A ", "b")]
    assert loglikelihoods(lm, pairs) == loglikelihoods(expected, pairs)
    assert len({value for value, _ in loglikelihoods(lm, pairs)}) == 4
    assert generate(lm, ["Tides rise"], ["."], 12) == generate(expected, ["Tides rise"], ["."], 12)


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
def test_rows_side_by_side_take_a_tenth_of_what_the_weights_leave(free_mb, lanes, expected, monkeypatch):
    model = make_tiny_llama()
    config = model.config
    values = 8 * config.hidden_size + 3 * config.intermediate_size
    monkeypatch.setattr(memory, "lane_count", lambda device: lanes)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(memory, "total_bytes", lambda device: weights + free_mb * 1_000_000 * values // 512)
    # as if a token took 512 values of 4 bytes: a tenth of 10 MB holds 488 tokens
    assert memory.row_tokens(model) == expected


def test_a_worker_has_its_part_of_the_memory(monkeypatch):
    model = make_tiny_llama()
    leave(monkeypatch, model, 1000)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert memory.bytes_beside(model) == 1000
    monkeypatch.setattr(memory, "total_bytes", lambda device: 4 * (weights + 1000))
    monkeypatch.setenv("KICK_WORKERS_HERE", "4")
    assert memory.bytes_beside(model) == 1000


def test_as_many_rows_at_a_time_as_copies_of_the_prefix_fit(monkeypatch):
    model = make_tiny_llama()
    monkeypatch.setattr(memory, "lane_count", lambda device: 4)
    leave(monkeypatch, model, 1000)  # 300 for copies
    assert [memory.lanes_beside(model, size) for size in (0, 10, 75, 76, 150, 151, 1000)] == [4, 4, 4, 3, 2, 1, 1]


def leave(monkeypatch, model, size):
    """As if the weights left so many bytes of all memory."""
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(memory, "total_bytes", lambda device: weights + size)


def test_rows_that_hold_caches_of_their_own_are_fewer_at_a_time(tokenizer, monkeypatch):
    lm = FastLM(make_tiny_llama(), tokenizer, params=FastLM.Params(row_tokens=64))
    monkeypatch.setattr(memory, "lane_count", lambda device: 4)
    token = 2 * 2 * 2 * 8 * 4 + 64 * 5  # keys and values; what 64 queries see of it, as a number and as yes or no
    leave(monkeypatch, lm.model, 640 * 2 * token / memory.PREFIX_SHARE)
    long, short = Packed.chain([3] * 640), Packed.chain([3] * 64)
    assert [lm.runner.lanes((), rows) for rows in ([short] * 9, [short, long])] == [4, 2]
    assert [lm.runner.lanes((320, 640), [row]) for row in (short, long)] == [2, 1]


def test_a_generation_batch_holds_no_more_than_its_share(tokenizer, monkeypatch):
    lm = FastLM(make_tiny_llama(), tokenizer)
    leave(monkeypatch, lm.model, 100 * lm.runner.bytes_per_token / memory.CACHE_SHARE)
    sizes, read = [], lm.decoder.read_packed
    monkeypatch.setattr(
        lm.decoder, "read_packed", lambda contexts, *more: sizes.append(len(contexts)) or read(contexts, *more)
    )
    lm.complete([[20 + number] * 38 for number in range(5)], Decoding((), most=2))
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no room"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_memory_that_runs_out_while_a_model_is_looked_at_is_no_trait_of_the_model(tokenizer, error):
    assert memory.is_out_of_memory(error)
    for call in range(5):  # of those that find out what the model can do
        model = make_tiny_llama()
        forward, calls = model.model.forward, []

        def fails(*arguments, forward=forward, calls=calls, call=call, **options):
            calls.append(None)
            if len(calls) == call + 1:
                raise error
            return forward(*arguments, **options)

        model.model.forward = fails
        with pytest.raises(type(error)):
            FastLM(model, tokenizer)


def test_what_a_token_takes_in_the_cache_is_known_from_the_configuration(lm):
    assert memory.key_value_bytes(lm.model) == lm.runner.bytes_per_token == 2 * 2 * 2 * 8 * 4


def test_free_memory_is_no_more_than_all_of_it():
    device = torch.device("cpu")
    assert 0 < memory.free_bytes(device) <= memory.total_bytes(device)


def test_a_tokenizer_without_a_beginning_and_an_end_says_what_it_lacks(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = bare.eos_token = None
    lm = FastLM(make_tiny_llama(), bare)
    assert loglikelihoods(lm, [("The sea", " is")])
    with pytest.raises(ModelError, match="no token for the beginning or the end of a text"):
        rolling_loglikelihoods(lm, ["The sea"])
