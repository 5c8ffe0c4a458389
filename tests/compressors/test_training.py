"""The training loop: it resumes to the same weights, two processes are one, and what goes wrong is said."""

import json
import math
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import make_tiny_llama
from kick_compressors.training.domains import Domains, Loading, _parts, updated_weights
from kick_compressors.training.history import History
from kick_compressors.training.loop import TrainingError, train
from kick_compressors.training.objective import Objective
from kick_compressors.training.spec import Training
from kick_compressors.training.text import Batch, Stream, find_domains, open_mixture
from loopback import free_port
from pydantic import ValidationError

from kick.errors import ConfigError, DataError

SPEC = Training(
    steps=12, batch_size=4, sequence_length=24, learning_rate=1e-3, weight_decay=0.1, warmup=0.2, checkpoint_every=4
)


@pytest.fixture
def domains(tmp_path):
    for name, words in (("animals", "cat dog cow"), ("numbers", "one two three four")):
        (tmp_path / "data" / name).mkdir(parents=True)
        rows = [{"text": f"{name} {index} {words} " * 3} for index in range(30)]
        (tmp_path / "data" / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data"


def run(tokenizer, domains, folder, spec=SPEC, objective=None, seed=0):
    objective = objective or Objective(make_tiny_llama(attention_dropout=0.1))  # chance, to be resumed too
    mixture = open_mixture(str(domains), tokenizer, spec.sequence_length, seed)
    history = train(objective, mixture, spec, folder, seed=seed, device="cpu", progress=lambda *_: None, what="test")
    return objective.model, history


class Dies(Objective):
    """Killed in the middle of a step."""

    def end_step(self, step, spec):
        if step == 9:
            raise KeyboardInterrupt
        return {}


def test_it_learns_and_tells_of_every_step(tokenizer, domains, tmp_path):
    _, history = run(tokenizer, domains, tmp_path / "run", SPEC.model_copy(update={"steps": 40}))
    losses = history.column("loss")[1]
    assert len(losses) == 40
    assert losses[-1] < 0.8 * losses[0]
    totals = history.totals()
    assert totals["tokens"] == 40 * 4 * 24
    assert totals["tokens_per_second"] > 0
    assert history.rows[0]["learning_rate"] == pytest.approx(1e-3 / 8)  # a fifth of 40 steps is the warm-up


def test_a_run_that_was_killed_ends_with_the_same_weights(tokenizer, domains, tmp_path):
    whole, history = run(tokenizer, domains, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, domains, tmp_path / "cut", objective=Dies(make_tiny_llama(attention_dropout=0.1)))
    assert [path.name for path in (tmp_path / "cut").glob("state-*")] == ["state-00000008"]
    with open(tmp_path / "cut" / "history.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # the line that was being written
    resumed, again = run(tokenizer, domains, tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert again.column("loss") == history.column("loss")
    once_more, _ = run(tokenizer, domains, tmp_path / "cut")  # nothing is left to do
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), once_more.parameters(), strict=True))


def test_micro_batches_are_one_batch(tokenizer, domains, tmp_path):
    spec = SPEC.model_copy(update={"steps": 4})
    dense = [
        run(
            tokenizer,
            domains,
            tmp_path / str(size),
            spec.model_copy(update={"micro_batch": size}),
            Objective(make_tiny_llama()),
        )
        for size in (0, 1)
    ]
    torch.testing.assert_close(dense[0][1].column("loss")[1], dense[1][1].column("loss")[1], rtol=1e-5, atol=1e-6)
    twice, _ = run(
        tokenizer,
        domains,
        tmp_path / "twice",
        spec.model_copy(update={"gradient_checkpointing": True}),
        Objective(make_tiny_llama()),
    )
    for a, b in zip(dense[0][0].parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


SCRIPT = """
import copy, sys, torch
import kick  # before the tests' own folder of that name
sys.path.append({tests!r})
from pathlib import Path
from conftest import make_tiny_llama
from transformers import AutoTokenizer
from kick import distributed
from kick.blocks import find_decoder
from kick.measured import pattern_violations
from kick.levels import Pattern
from kick_compressors.ast.objective import Method, SparseTraining
from kick_compressors.llama import ModelShape
from kick_compressors.sheared.compressor import Sheared, Shearing
from kick_compressors.training.domains import Domains
from kick_compressors.sheared.cut import cut
from kick_compressors.sheared.masks import Masks
from kick_compressors.sheared.shape import find_shape
from kick_compressors.training.loop import train
from kick_compressors.training.spec import Training
from kick_compressors.training.objective import Objective
from kick_compressors.training.pairs import Pairs
from kick_compressors.training.text import open_mixture
from kick_compressors.tune import Tune, add_lora, take_lora
torch.set_num_threads(1)
sharding, what, stop = sys.argv[1], sys.argv[2], int(sys.argv[3])
spec = Training(steps=6, batch_size=8, micro_batch=2, sequence_length=24, learning_rate=1e-3, sharding=sharding,
                checkpoint_every=4)
model = make_tiny_llama()
mixture = open_mixture({data!r}, AutoTokenizer.from_pretrained({model!r}), 24, 0, held_out=2)
if what == "ast":
    teacher = copy.deepcopy(model).requires_grad_(False)
    method = Method(mask_every=2, slorb=16)
    objective = SparseTraining(model, find_decoder(model), Pattern(keep=2, of=4), method, teacher)
elif what == "tune":
    torch.manual_seed(0)
    texts = [(str(n), " ".join(map(str, range(n)))) for n in range(1, 7)]
    rows = [("a row", dict(instruction=asked, output=answer)) for asked, answer in texts]
    mixture = Pairs(rows, AutoTokenizer.from_pretrained({model!r}), 24, 0)  # answers of unequal length
    tuned = add_lora(model, find_decoder(model).linears, Tune.Params(dropout=0.0))
    objective = Objective(tuned)
else:
    source = ModelShape.of(model.config)
    target = find_shape("1x16x24x2", source)
    params = Sheared.Params(pruning_every=2)
    losses = Domains(mixture, params, model, 1)
    objective = Shearing(model, Masks(source, target, 0.83, 0), params, losses, 0)
own_end = objective.end_step
objective.end_step = lambda step, spec: sys.exit(0) if step == stop else own_end(step, spec)
history = train(objective, mixture, spec, Path({folder!r}), seed=0, device="cpu", progress=lambda *_: None, what="")
if what == "ast":
    objective.finish()
    assert all(pattern_violations(linear.weight, Pattern(keep=2, of=4)) == 0 for linear in find_decoder(model).linears)
elif what == "tune":
    model = take_lora(tuned, True)
else:
    objective.masked.remove()
    model = cut(model, objective.masks.final(), target)
model.config.use_cache = False
logits = model(torch.arange(20)[None]).logits  # an ordinary model again, on every process
assert type(model).__name__ == "LlamaForCausalLM" and type(model.model.layers[0]).__name__ == "LlamaDecoderLayer"
if distributed.is_main():
    torch.save(logits.detach(), {folder!r} + "/logits.pt")
"""


def launch(folder, processes, sharding, what, tiny_model, domains, stop=-1):
    """The history's columns and the logits; nothing where all processes end within step `stop`."""
    script = folder.parent / f"{folder.name}.py"
    names = {"tests": os.path.dirname(os.path.dirname(__file__)), "data": str(domains), "model": str(tiny_model)}
    script.write_text(SCRIPT.format(**names, folder=str(folder)))
    port = free_port()
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), sharding, what, str(stop)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    if stop >= 0:
        return {}, None
    history = History(folder)
    columns = {
        "ast": ("loss", "flip_rate"),
        "sheared": ("cross_entropy", "constraint", "lambda_hidden", "open_head"),
        "tune": ("loss",),
    }
    return {name: history.column(name)[1] for name in columns[what]}, torch.load(folder / "logits.pt")


@pytest.mark.parametrize("what", ["ast", "sheared", "tune"])
def test_two_processes_give_the_losses_of_one(what, tiny_model, domains, tmp_path):
    """Under torchrun with gloo: copies of the model (DDP), and parts of it (FSDP2)."""
    alone, logits = launch(tmp_path / "alone", 1, "ddp", what, tiny_model, domains)
    assert all(len(values) == 6 for name, values in alone.items() if name != "flip_rate")
    for sharding in ("ddp", "fsdp"):
        both, theirs = launch(tmp_path / sharding, 2, sharding, what, tiny_model, domains)
        for name, values in alone.items():
            assert both[name] == pytest.approx(values, abs=1e-5), (sharding, name)
        torch.testing.assert_close(theirs, logits, atol=1e-3, rtol=1e-3)


def test_a_run_in_parts_goes_on_with_another_number_of_processes(tiny_model, domains, tmp_path):
    whole, logits = launch(tmp_path / "whole", 2, "fsdp", "ast", tiny_model, domains)
    launch(tmp_path / "stopped", 2, "fsdp", "ast", tiny_model, domains, stop=5)
    assert [path.name for path in (tmp_path / "stopped").glob("state-*")] == ["state-00000004"]
    resumed, theirs = launch(tmp_path / "stopped", 1, "ddp", "ast", tiny_model, domains)
    for name, values in whole.items():
        assert resumed[name] == pytest.approx(values, abs=1e-5), name
    torch.testing.assert_close(theirs, logits, atol=1e-3, rtol=1e-3)


def test_a_loss_that_is_no_number_stops_with_the_step_the_batch_and_the_last_state(tokenizer, domains, tmp_path):
    class Breaks(Objective):
        def end_step(self, step, spec):
            if step == 5:
                with torch.no_grad():
                    self.model.model.norm.weight.fill_(float("nan"))
            return {}

    with pytest.raises(
        TrainingError, match=r"step 6: loss is not finite. The batch was (animals|numbers) \d+"
    ) as caught:
        run(tokenizer, domains, tmp_path, objective=Breaks(make_tiny_llama()))
    assert "state-00000004" in caught.value.hint
    assert sorted(path.name for path in tmp_path.glob("state-*")) == ["state-00000004"]


@pytest.mark.parametrize(("every", "left"), [(4, []), (2, ["state-00000002"])])
def test_a_state_that_leads_to_no_loss_is_not_the_last_good_one(tokenizer, domains, tmp_path, every, left):
    class Explodes(Objective):
        def end_step(self, step, spec):
            if step == 3:  # after the update, and before the state is saved
                with torch.no_grad():
                    self.model.model.norm.weight.fill_(float("nan"))
            return {}

    spec = SPEC.model_copy(update={"checkpoint_every": every})
    with pytest.raises(TrainingError, match="step 4: loss is not finite") as caught:
        run(tokenizer, domains, tmp_path, spec, Explodes(make_tiny_llama()))
    assert (left[0] if left else "No state was saved before") in caught.value.hint
    assert [path.name for path in tmp_path.glob("state-*")] == left


def test_the_batch_that_is_named_is_the_one_that_was_drawn(tokenizer, domains):
    mixture = open_mixture(str(domains), tokenizer, 16, 0)
    again = open_mixture(str(domains), tokenizer, 16, 0)
    named = []
    for step in range(3):
        batch = mixture.batch(step, 8)
        named += batch.origin
        for origin, tokens in zip(batch.origin, batch.tokens, strict=True):
            name, place = origin.split()
            assert again.streams[name].taken == int(place)
            assert again.streams[name].take().tolist() == tokens.tolist()
    assert len(set(named)) == 24


@pytest.mark.parametrize("at", [4, 5])  # the state before step 4 has just led to a finite loss
def test_a_domain_loss_that_is_no_number_stops_before_it_becomes_a_weight_or_a_state(tokenizer, domains, tmp_path, at):
    class Diverges(Objective):
        def end_step(self, step, spec):
            return {"domain_loss": {"animals": 1.0, "numbers": float("nan") if step == at else 1.0}}

    with pytest.raises(TrainingError, match=f"step {at}: domain_loss of numbers is not finite") as caught:
        run(tokenizer, domains, tmp_path, objective=Diverges(make_tiny_llama()))
    assert "state-00000004" in caught.value.hint
    assert sorted(path.name for path in tmp_path.glob("state-*")) == ["state-00000004"]


def test_weights_stay_where_losses_are_no_numbers(tokenizer, domains):
    mixture = open_mixture(str(domains), tokenizer, 16, 0, held_out=2)
    followed = Domains(mixture, Loading(), make_tiny_llama(), 1000)
    broken = make_tiny_llama()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("inf"))
    told = followed.update(Objective(broken))
    assert not all(map(math.isfinite, told["domain_loss"].values()))
    assert mixture.weights == {"animals": 0.5, "numbers": 0.5}
    huge = updated_weights({"a": 0.5, "b": 0.5}, {"a": 2000.0, "b": 2001.0}, {"a": 0.0, "b": 0.0})
    assert huge == pytest.approx({"a": 1 / (1 + math.e), "b": math.e / (1 + math.e)})


@pytest.mark.parametrize("between", ["", '{"text": ""}\n'])
def test_a_stream_goes_on_where_it_was_and_never_gives_what_was_held_out(tokenizer, tmp_path, between):
    """Rows without text, which some collections are full of, are rows as well."""
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(between + json.dumps({"text": f"number {index} " * 6}) for index in range(40)))
    stream = Stream("x", str(file), tokenizer, 16, 0, held_out=6)
    held = {tuple(row) for row in stream.held.tolist()}
    first = [stream.take().tolist() for _ in range(700)]  # more than a window, several epochs
    state = json.loads(json.dumps(stream.state()))
    rest = [stream.take().tolist() for _ in range(700)]
    other = Stream("x", str(file), tokenizer, 16, 0, held_out=6)
    other.restore(state)
    assert [other.take().tolist() for _ in range(700)] == rest
    assert not held & {tuple(row) for row in first + rest}
    assert stream.taken == 1400
    assert tokenizer.decode(stream.held[0]).startswith("number 0 ")


def test_held_out_text_is_of_as_many_documents_as_there_are(tokenizer, tmp_path):
    """No document gives more than a sequence, unless nothing would be left to train on."""
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"number{index} " * 60}) for index in range(8)))
    apart = Stream("x", str(file), tokenizer, 16, 0, held_out=4)
    seen = [{index for index in range(8) if f"number{index} " in tokenizer.decode(row)} for row in apart.held]
    assert seen == [{0}, {1}, {2}, {3}]
    trained = tokenizer.decode([token for _ in range(60) for token in apart.take().tolist()])
    assert all((f"number{index} " in trained) == (index >= 4) for index in range(8))
    of_few = Stream("x", str(file), tokenizer, 16, 0, held_out=8)  # one would be left to nobody: two of each
    seen = [{index for index in range(8) if f"number{index} " in tokenizer.decode(row)} for row in of_few.held]
    assert seen == [{0}, {0}, {1}, {1}, {2}, {2}, {3}, {3}]
    of_fewer = Stream("x", str(file), tokenizer, 16, 0, held_out=20)
    shares = Counter(index for row in of_fewer.held for index in range(8) if f"number{index} " in tokenizer.decode(row))
    assert sorted(shares.values()) == [4] * 5
    (tmp_path / "book.txt").write_text("word " * 400)
    with pytest.raises(DataError, match="holds no text beside the 4 sequences that are held out"):
        Stream("book", str(tmp_path / "book.txt"), tokenizer, 16, 0, held_out=4).take()


def test_a_domain_without_text_is_found_before_it_is_drawn(tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 9)
    with pytest.raises(DataError, match="the domain 'empty' holds no text"):
        Stream("empty", str(tmp_path / "empty.jsonl"), tokenizer, 16, 0)


def test_documents_are_read_forward_and_never_over_again(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"number {n} " * 20}) for n in range(3000)))
    read = []
    monkeypatch.setattr(Stream, "_tokens", lambda self, text: read.append(text) or [1] * 8)
    stream = Stream("x", str(tmp_path / "text.jsonl"), tokenizer, 8, 0)
    for _ in range(4 * 512):
        stream.take()
    assert read == [f"number {n} " * 20 for n in range(len(read))]
    assert len(read) <= 4 * 512 + 1


def test_one_long_document_is_read_again_and_again(tokenizer, tmp_path):
    """A window may end inside the only document: what is left of it is still to be given."""
    words = [f"w{index}" for index in range(3000)]
    (tmp_path / "book.txt").write_text(" ".join(words))
    stream = Stream("book", str(tmp_path / "book.txt"), tokenizer, 8, 0)
    ids = tokenizer(" ".join(words))["input_ids"] + [tokenizer.eos_token_id]
    endless = torch.tensor(ids).repeat(8)
    for window in range(3):  # each holds 512 sequences in an order of its own
        taken = sorted(stream.take().tolist() for _ in range(512))
        wanted = endless[window * 4096 : (window + 1) * 4096].reshape(512, 8).tolist()
        assert taken == sorted(wanted)


def test_domains_are_folders_or_names_or_one(tokenizer, tmp_path, domains):
    assert list(find_domains(str(domains))) == ["animals", "numbers"]
    assert find_domains("embedded") == {"text": "embedded"}
    assert find_domains({"a": "x"}) == {"a": "x"}
    (domains / "README.md").write_text("About this text.")
    (domains / ".cache").mkdir()
    assert list(find_domains(str(domains))) == ["animals", "numbers"]
    (domains / "more.jsonl").write_text('{"text": "more"}')
    with pytest.raises(DataError, match=r"beside them, text: more.jsonl"):
        find_domains(str(domains))
    (domains / "more.jsonl").unlink()
    (domains / "empty").mkdir()
    with pytest.raises(DataError, match="holds no"):
        open_mixture(str(domains), tokenizer, 8, 0)


def test_processes_read_equal_shares_of_what_is_held_out_and_know_the_mean_of_all():
    """Seven sequences on three processes: two each, and the seventh on all of them."""
    held = torch.arange(7.0)[:, None]
    shares = [_parts(held, rank, 3) for rank in range(3)]
    assert [[part.flatten().tolist() for part, _ in own] for own in shares] == [
        [[0, 3], [6]],
        [[1, 4], [6]],
        [[2, 5], [6]],
    ]
    means = [sum(weight * float(part.mean()) for part, weight in own) for own in shares]
    assert sum(means) / 3 == pytest.approx(3.0)
    ((alone, weight),) = _parts(held, 0, 1)
    assert (len(alone), weight) == (7, 1.0)
    assert [weight for _, weight in _parts(held[:2], 1, 3)] == [1.0]  # fewer than processes: all read all


def test_what_a_spec_cannot_be(tokenizer, domains, tmp_path):
    with pytest.raises(ValidationError, match="micro_batch 3 does not divide"):
        Training(batch_size=4, micro_batch=3)
    with pytest.raises(ConfigError, match="not all zero"):
        open_mixture(str(domains), tokenizer, 8, 0, weights={"animals": 0.0})
    assert Batch(torch.zeros(2, 3), torch.tensor([[1, -100, 2], [1, 2, 3]]), ["", ""], [3, 3]).counted == 3
