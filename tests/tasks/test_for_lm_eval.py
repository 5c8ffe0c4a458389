"""kick's suites asked by stock lm-eval give kick's own scores."""

from importlib.resources import files

import pytest
from conftest import make_tiny_llama
from kick_tasks.factoid_qa import FactoidQA
from kick_tasks.mmlu import MMLU
from kick_tasks.retrieval_qa import RetrievalQA

from kick.errors import ConfigError
from kick.lm.fast import FastLM
from kick.suite import DataSource, subset

LIMIT = 24


@pytest.fixture(scope="module")
def lm(tokenizer):
    return FastLM(make_tiny_llama(max_position_embeddings=8192), tokenizer)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (FactoidQA, {"shots": 2}),
        (RetrievalQA, {"evidence": "retrieved", "shots": 1}),
        (RetrievalQA, {"evidence": "none"}),
        (MMLU, {"shots": 1}),
        (MMLU, {"shots": 2, "format": "cloze"}),
    ],
)
def test_equal_scores(lm, tiny_model, kind, params):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    suite = kind(kind.Params(**params))
    examples = subset(suite.examples(DataSource.parse("embedded")), LIMIT, None, 0)
    samples = [sample for batch in suite.batches(examples, 8) for sample in suite.answer(lm, batch)]
    assert not any(sample.truncated for sample in samples)
    own = {score.metric.name: score.point for score in suite.score(samples) if score.group == "overall"}

    manager = TaskManager(
        include_path=str(files("kick_tasks").joinpath("for_lm_eval")),
        include_defaults=False,
        metadata={"data": "embedded", "limit": LIMIT, "pretrained": str(tiny_model), **params},
    )
    name = f"kick_{suite.name}"
    found = simple_evaluate(lm, tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=True)
    theirs = [row["arguments"][0][0] for row in found["samples"][name]]
    assert theirs == [sample.prompt for sample in samples]  # the same questions in the same words
    if kind is not MMLU:
        assert [row["resps"][0][0] for row in found["samples"][name]] == [sample.output for sample in samples]
    results = found["results"][name]
    for metric in ("accuracy",) if kind is MMLU else ("contains", "exact_match", "f1"):
        assert results[f"{metric},none"] == pytest.approx(own[metric]), metric


def test_what_the_model_of_lm_eval_takes(tiny_model, monkeypatch):
    from kick.lm.for_lm_eval import Kick

    lm = Kick(str(tiny_model), dtype="float32", device="cpu", max_length=64, trust_remote_code=False)
    assert lm.max_length == 64
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    turn = {"role": "user", "content": "Hi"}
    assert lm.apply_chat_template([{"role": "system", "content": "Be brief."}, turn]) == "user: Hi\n"
    with pytest.raises(ConfigError, match="takes no 'add_bos_token'"):
        Kick(str(tiny_model), add_bos_token=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="several processes"):
        Kick(str(tiny_model))


def test_the_fast_lm_is_a_model_of_stock_lm_eval(lm, tiny_model):
    """`--model kick`, as lm-eval's own command line makes it; the scores are those of the LM asked by itself."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import kick.lm.for_lm_eval  # noqa: F401 (registers the model)

    manager = TaskManager(
        include_path=str(files("kick_tasks").joinpath("for_lm_eval")),
        include_defaults=False,
        metadata={"data": "embedded", "limit": LIMIT, "pretrained": str(tiny_model), "shots": 1},
    )
    options = {"tasks": ["kick_mmlu"], "task_manager": manager, "bootstrap_iters": 0, "log_samples": True}
    arguments = f"pretrained={tiny_model},dtype=float32,row_tokens=64"
    named = simple_evaluate("kick", model_args=arguments, batch_size=4, device="cpu", **options)
    given = simple_evaluate(lm, **options)
    pairs = zip(named["samples"]["kick_mmlu"], given["samples"]["kick_mmlu"], strict=True)
    for a, b in pairs:
        assert [float(r[0][0]) for r in a["resps"]] == pytest.approx([float(r[0][0]) for r in b["resps"]], abs=1e-4)
