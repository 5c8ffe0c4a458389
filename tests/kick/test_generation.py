"""What the fast LM writes: batches, stop strings, sampling, against one row at a time."""

import copy

import numpy as np
import pytest
import torch
from conftest import make_tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_reference import greedy
from transformers import AddedToken

from kick.errors import KickError
from kick.lm import generate, loglikelihoods
from kick.lm.fast import FastLM
from kick.lm.generation import Decoding, batches_within, sample
from kick.lm.packing import PREFIX_STEP


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


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.integers(2, 300), min_size=1, max_size=12)), min_size=1, max_size=9
    ),
    st.integers(1, 7),
    st.sampled_from([(), ("e",), (" t", "a"), ("s, ",)]),
    st.sampled_from([16, 50, 200]),
    st.sampled_from([40, 250, 10_000]),
    st.integers(0, 3),
)
@settings(max_examples=25, deadline=None, derandomize=True)  # of near ties rounding decides: always the same ones
def test_any_mix_of_prompts_is_completed_as_alone(tokenizer, asked, most, stops, row_tokens, room, failures):
    """Shared beginnings, repeated prompts, lengths, stop strings, sizes of rows and batches, memory that runs out."""
    stem = [10 + place % 50 for place in range(2 * PREFIX_STEP + 5)]
    heads = ([], stem[:PREFIX_STEP], stem)
    contexts = [heads[head] + own for head, own in asked]
    lm = FastLM(make_tiny_llama(initializer_range=0.2), tokenizer, params=FastLM.Params(row_tokens=row_tokens))
    lm.runner.most_cached_tokens = lambda: room
    forward, left = lm.model.model.forward, [failures]

    def fails_at_first(*arguments, **options):
        if options["input_ids"].shape[0] > 1 and left[0] > 0:
            left[0] -= 1
            raise torch.OutOfMemoryError("no room")
        return forward(*arguments, **options)

    lm.model.model.forward = fails_at_first
    decoding = Decoding(stops, most)
    alone = make_tiny_llama(initializer_range=0.2)
    for context, text in zip(contexts, lm.complete(contexts, decoding), strict=True):
        tokens = greedy(alone, context, most, tokenizer.eos_token_id)
        assert text == decoding.cut(tokenizer.decode(tokens, skip_special_tokens=True))


def test_a_shared_prefix_stands_once_for_all_rows_of_a_batch(lm, monkeypatch):
    assert lm.decoder.shares
    head = "Question: what runs but never walks? Answer: a river.\n\n" * 6
    prompts = [head + f"Question: {word}?" for word in ("Who", "Where", "When", "Why")]
    together = generate(lm, prompts, [], 6)
    sizes = []
    original = lm.decoder.read_packed
    monkeypatch.setattr(lm.decoder, "read_packed", lambda *a: sizes.append(read := original(*a)) or read)
    assert generate(lm, prompts, [], 6) == together
    layer = sizes[0][0]._layers[0]
    tokens = [len(lm.tok_encode(prompt)) for prompt in prompts]
    assert layer.all_keys.shape[2] == max(tokens) - layer.shared[0].shape[2] + 6
    monkeypatch.setattr(lm.decoder, "shares", False)
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
    monkeypatch.setattr(lm.decoder, "ends", set(tokens[:1]))  # as if the likeliest first token ended a text
    assert generate(lm, ["Rain and"], [], 8) == [""]
    (text,) = generate(lm, ["Rain and"], [], 8, min_new_tokens=8)
    prompt = tokenizer("Rain and", return_tensors="pt")
    expected = lm.model.generate(  # that the end comes later, not that it is passed over
        **prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=tokens[0], pad_token_id=0
    )
    assert text == tokenizer.decode(expected[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


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
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    uniform = torch.from_numpy(np.random.default_rng(0).random(20_000))

    def draw(top_k, top_p, n=20_000):
        return sample(p.expand(n, 4), top_k, top_p, uniform[:n])

    assert (draw(0, 1.0).bincount(minlength=4) / 20_000).tolist() == pytest.approx(p.tolist(), abs=0.012)
    assert set(draw(2, 1.0, 100).tolist()) == {2, 3}
    assert set(draw(0, 0.65, 100).tolist()) == {2, 3}  # .4 is too little, .7 is enough
    nearly_all = torch.tensor([0.9999999999999999], dtype=torch.float64)
    assert sample(p[None], 0, 1.0, nearly_all).item() == 3
    assert sample(torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64), 0, 1.0, nearly_all).item() == 1  # never a zero


def choose_slowly(p, top_k, top_p, uniform):
    """One row, token by token."""
    order = sorted(range(len(p)), key=lambda token: (-p[token], token))[: top_k or None]
    if not top_k and top_p >= 1:
        order = range(len(p))
    whole = sum(p[token] for token in order) if top_k else 1.0
    kept, mass = [], 0.0
    for token in order:
        if mass >= top_p * whole * (1 - 1e-12):
            break
        kept.append(token)
        mass += p[token]
    sums = np.cumsum([p[token] for token in kept])
    return next(token for token, until in zip(kept, sums, strict=True) if until > uniform * sums[-1])


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.6), (7, 0.8), (0, 0.999999)])
def test_sampling_a_batch_is_sampling_each_row_token_by_token(top_k, top_p):
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(size=(40, 3000)) * np.linspace(0.1, 4, 40)[:, None])
    if not top_k:  # of equals at the edge of the top_k any may be kept
        logits = logits.round(decimals=1)
    p, uniform = logits.softmax(-1), torch.from_numpy(rng.random(40))
    expected = [choose_slowly(row.numpy(), top_k, top_p, float(u)) for row, u in zip(p, uniform, strict=True)]
    assert sample(p, top_k, top_p, uniform).tolist() == expected


def test_where_memory_runs_out_the_batch_is_halved_and_the_texts_are_the_same(lm, monkeypatch):
    prompts = [f"{word} is" for word in ("Rain", "Snow", "Wind", "Fog", "Hail")]
    expected = generate(lm, prompts, [], 8)
    original = lm.decoder.read_packed

    def small(contexts, *more):
        if len(contexts) > 2:
            raise torch.OutOfMemoryError("no room")
        return original(contexts, *more)

    monkeypatch.setattr(lm.decoder, "read_packed", small)
    assert generate(lm, prompts, [], 8) == expected
    assert lm.runner.halved == 2  # five into two and three, three into one and two

    def fails(contexts, *more):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(lm.decoder, "read_packed", fails)
    with pytest.raises(torch.OutOfMemoryError):
        generate(lm, prompts, [], 8)


def test_a_prompt_that_does_not_fit_is_read_by_fewer_tokens_at_a_time(lm, monkeypatch):
    prompt = "The sea is wide. " * 20
    (expected,) = generate(lm, [prompt], [], 8)
    original, tried, before = lm.runner.run, [], lm.runner.halved

    def run(row, cache, length, places, most):
        tried.append(most)
        if most > 32:
            raise torch.OutOfMemoryError("no room")
        return original(row, cache, length, places, most)

    monkeypatch.setattr(lm.runner, "run", run)
    assert generate(lm, [prompt], [], 8) == [expected]
    assert tried == [1024, 512, 256, 128, 64, 32]
    assert lm.record()["out_of_memory"] == before + 5


def test_prompts_that_are_padded_are_read_in_parts(lm, monkeypatch):
    monkeypatch.setattr(lm, "no_sharing", "for a test")
    monkeypatch.setattr(lm.runner, "row_tokens", 16)
    prompts = [f"{word} is " * 20 for word in ("Rain", "Snow", "Wind", "Fog", "Hail", "Sun", "Mist", "Dew")]
    expected = [generate(lm, [prompt], [], 4)[0] for prompt in prompts]
    read, original = [], lm.decoder.read_padded
    monkeypatch.setattr(
        lm.decoder, "read_padded", lambda contexts, *more: read.append(contexts) or original(contexts, *more)
    )
    assert generate(lm, prompts, [], 4) == expected
    assert len(read) > 1
    assert all(len(own) * max(map(len, own)) <= 16 * 16 or len(own) == 1 for own in read)


def test_the_vocabulary_of_a_large_batch_comes_in_parts(lm, monkeypatch):
    expected = generate(lm, [f"number {n}" for n in range(20)], [], 4, temperature=1.0, seed=3)
    seen, original = [], lm.runner.logits
    monkeypatch.setattr("kick.lm.decoder.LOGITS_AT_ONCE", 8)
    monkeypatch.setattr(lm.runner, "logits", lambda found: seen.append(len(found)) or original(found))
    assert generate(lm, [f"number {n}" for n in range(20)], [], 4, temperature=1.0, seed=3) == expected
    assert max(seen) == 8


@pytest.mark.parametrize("wrong", [{"top_p": 0.0}, {"top_p": 1.5}, {"temperature": -1.0}])
def test_sampling_that_means_nothing_is_refused(wrong):
    with pytest.raises(KickError, match="is asked for"):
        Decoding.of({"do_sample": True, "temperature": 0.5, "until": [], "max_gen_toks": 4, **wrong})


def test_batches_stay_within_a_number_of_cached_tokens():
    assert list(batches_within([5, 5, 9, 1], [0, 1, 2, 3], 18)) == [[0, 1], [2, 3]]
    assert list(batches_within([50, 1], [0, 1], 18)) == [[0], [1]]  # a long one is a batch by itself


def test_a_batch_that_runs_out_of_memory_on_its_way_samples_the_same_texts(lm, monkeypatch):
    prompts = [f"{word} is" for word in ("Rain", "Snow", "Wind", "Fog")]
    expected = generate(lm, prompts, [], 8, temperature=1.0, seed=5)
    original, steps = lm.decoder.last, []

    def fails_later(inputs):
        steps.append(inputs["input_ids"].shape[0])
        if len(steps) == 4:
            raise torch.OutOfMemoryError("no room")
        return original(inputs)

    monkeypatch.setattr(lm.decoder, "last", fails_later)
    assert generate(lm, prompts, [], 8, temperature=1.0, seed=5) == expected
    assert steps[3] == 4


def test_an_empty_prompt_follows_a_prefix_token(lm, tokenizer):
    tokens = greedy(lm.model, [tokenizer.bos_token_id], 6, tokenizer.eos_token_id)
    expected = tokenizer.decode(tokens, skip_special_tokens=True)
    assert generate(lm, [""], [], 6) == [expected]
    assert generate(lm, ["The sea is", "", "A"], [], 6)[1] == expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_beams": 4}, "beam search"),
        ({"repetition_penalty": 1.2}, r"repetition_penalty=1\.2"),
        ({"bad": 1}, "bad=1"),
    ],
)
def test_what_is_not_decoded_here_is_refused(lm, options, says):
    with pytest.raises(KickError, match=says):
        lm.generate_until([asked("x", **options)])


def asked(prompt, **options):
    return type("Request", (), {"args": (prompt, {"until": [], **options})})


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_every_name_of_the_number_of_tokens_counts(lm, name):
    (text,) = lm.generate_until([asked("The lighthouse", **{name: 3})])
    assert text == generate(lm, ["The lighthouse"], [], 3)[0]
    assert len(text) < len(generate(lm, ["The lighthouse"], [], 16)[0])


def test_what_changes_nothing_may_be_said(lm):
    neutral = {"repetition_penalty": 1.0, "num_beams": 1, "top_k": -1, "do_sample": True, "temperature": 0.7, "seed": 3}
    plain = {"do_sample": True, "temperature": 0.7, "seed": 3}
    assert Decoding.of({"until": "", **neutral}) == Decoding.of({"until": [], **plain})
    assert lm.generate_until([asked("The lighthouse", max_gen_toks=0)]) == [""]


def test_a_special_token_as_stop_string_ends_a_completion(lm, tokenizer, monkeypatch):
    """Decoded without special tokens no text ever shows it."""
    (third,) = greedy(lm.model, tokenizer("The lighthouse")["input_ids"], 3, tokenizer.eos_token_id)[2:]
    marked = copy.deepcopy(tokenizer)
    added = {third: AddedToken("<|im_end|>", special=True)}
    monkeypatch.setattr(type(marked), "added_tokens_decoder", added)
    (whole,) = generate(lm, ["The lighthouse"], [], 8)
    monkeypatch.setattr(lm.decoder, "tokenizer", marked)
    assert generate(lm, ["The lighthouse"], ["<|im_end|>"], 8) == generate(lm, ["The lighthouse"], [], 2)
    assert generate(lm, ["The lighthouse"], ["<|other|>"], 8) == [whole]


def test_a_tokenizer_without_an_end_of_text(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = endless.pad_token = None
    lm = FastLM(make_tiny_llama(), endless)
    assert [len(loglikelihoods(lm, [("The sea", " is"), ("A", " long way off")])), *generate(lm, [""], [], 0)] == [
        2,
        "",
    ]
