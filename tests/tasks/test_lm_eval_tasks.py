"""lm-eval's tasks as suites: the numbers of stock lm-eval on the same local rows, and errors for what it cannot ask."""

import json
from importlib.resources import files
from types import SimpleNamespace

import pytest
from conftest import make_tiny_llama
from kick_tasks import lm_eval_tasks
from kick_tasks.lm_eval_tasks import LMEval, _manager, _manager_of, read_local
from test_suites import ScriptedLM

from kick import cli, plugins
from kick.errors import ConfigError, DataError, KickError
from kick.lm.fast import FastLM
from kick.suite import DataSource

ROWS = 12
SOURCES = {
    "ai2_arc/ARC-Easy/test.jsonl": "multiple_choice/ai2_arc/ARC-Easy/test.jsonl",
    "hellaswag/validation.jsonl": "multiple_choice/hellaswag/validation.subset1000.jsonl",
    "lambada_openai/test.jsonl": "multiple_choice/lambada_openai/test.jsonl",
    "sciq/test.jsonl": "multiple_choice/sciq/test.jsonl",
}


@pytest.fixture(scope="module")
def local(mirror, tmp_path_factory):
    """The first rows of four real data sets, laid out as a local mirror, with train splits of others."""
    root = tmp_path_factory.mktemp("mirror")
    for place, source in SOURCES.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        with open(mirror / source, encoding="utf-8", newline="\n") as file:
            lines = [next(file) for _ in range(3 * ROWS)]
        (root / place).write_text("".join(lines[:ROWS]), encoding="utf-8")
        if not place.startswith("lambada"):
            (root / place).with_name("train.jsonl").write_text("".join(lines[ROWS:]), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def lm(tokenizer):
    return FastLM(make_tiny_llama(max_position_embeddings=8192), tokenizer)  # nothing is truncated, and so left out


def stock(local, lm, tmp_path, name, path, **options):
    """lm-eval's own evaluation of its own task file, with the local rows read by `datasets` itself."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = local / path
    splits = {file.stem: str(file) for file in folder.glob("*.jsonl")}
    task = {
        "include": str(files("lm_eval").joinpath(f"tasks/{_FILES[name]}")),
        "task": f"stock_{name}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits, "cache_dir": str(tmp_path / "cache")},
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "task.yaml").write_text(json.dumps(task))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = simple_evaluate(
        lm, tasks=[f"stock_{name}"], task_manager=manager, bootstrap_iters=0, verbosity="ERROR", **options
    )
    return found["results"][f"stock_{name}"]


_FILES = {
    "arc_easy": "arc/arc_easy.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "sciq": "sciq/sciq.yaml",
}


def kicks(local, lm, **params):
    suite = LMEval(LMEval.Params(**params))
    examples = suite.examples(DataSource.parse(str(local)))
    samples = [sample for batch in suite.batches(examples, 5) for sample in suite.answer(lm, batch)]
    return suite, samples, {score.metric.name: score for score in suite.score(samples) if score.group == "overall"}


@pytest.mark.parametrize(
    ("task", "path", "metrics", "options"),
    [
        ("arc_easy", "ai2_arc/ARC-Easy", ["acc", "acc_norm"], {}),
        ("hellaswag", "hellaswag", ["acc", "acc_norm"], {}),
        ("lambada_openai", "lambada_openai", ["perplexity", "acc"], {}),
        ("sciq", "sciq", ["acc", "acc_norm"], {"shots": 2}),
    ],
)
def test_the_numbers_of_stock_lm_eval(local, lm, tmp_path, task, path, metrics, options):
    suite, samples, scores = kicks(local, lm, task=task, **options)
    expected = stock(local, lm, tmp_path, task, path, **({"num_fewshot": 2} if options else {}))
    assert [metric.name for metric in suite.metrics] == metrics
    assert len(samples) == ROWS
    for metric in metrics:
        assert scores[metric].point == pytest.approx(expected[f"{metric},none"], rel=1e-5), metric
    assert {sample.shots for sample in samples} == {options.get("shots", 0)}


def test_what_guessing_gives_is_counted_over_the_options(local, lm):
    _, samples, scores = kicks(local, lm, task="arc_easy")
    chance = sum(1 / len(sample.choices) for sample in samples) / len(samples)
    assert scores["acc"].metric.chance == pytest.approx(chance)
    assert scores["acc"].metric.chance == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(("task", "metric"), [("arc_easy", "acc"), ("hellaswag", "acc_norm"), ("hellaswag", "acc")])
def test_the_answer_is_the_option_that_the_metric_takes(local, lm, task, metric):
    suite, samples, _ = kicks(local, lm, task=task, metric=metric)
    examples = {example.id: example for example in suite.examples(DataSource.parse(str(local)))}
    lm_evals = suite._tasks[task]
    for sample in samples:
        doc = suite._docs(task)[examples[sample.id].content["number"]]
        options, gold = lm_evals.doc_to_choice(doc), lm_evals.doc_to_target(doc)
        assert [choice["text"] for choice in sample.choices] == options
        gold = gold if isinstance(gold, int) else options.index(gold)
        assert (sample.output == options[gold]) == bool(sample.scores[metric])


def test_mutual_information_is_what_the_context_adds():
    chosen = lm_eval_tasks._chosen
    likelihoods = [-2.0, -3.0, -1.5, -5.0]  # of two options after the context, then without it
    assert [chosen(["a", "b"], likelihoods, metric) for metric in ("acc", "acc_mutual_info")] == [0, 1]
    assert [chosen(["a", "bbb"], [-2.0, -3.0], metric) for metric in ("acc", "acc_norm", "acc_bytes")] == [0, 1, 1]
    assert chosen(["ab", "é"], [-2.0, -2.5], "acc_norm") == 0
    assert chosen(["ab", "éé"], [-2.0, -2.5], "acc_bytes") == 1


def test_another_primary_metric(local, lm):
    suite, _, _ = kicks(local, lm, task="arc_easy", metric="acc_norm")
    assert suite.metrics[0].name == "acc_norm"
    with pytest.raises(ConfigError, match="no metric 'bleu'"):
        kicks(local, lm, task="arc_easy", metric="bleu")


def test_a_chat_template_is_applied_when_the_model_is_known(local):
    suite = LMEval(LMEval.Params(task="sciq", chat_template="on", shots=1))
    examples = suite.examples(DataSource.parse(str(local)))[:1]
    lm = ScriptedLM(likelihood=lambda context, continuation: float(-len(continuation)), chat=True)
    (sample,) = suite.answer(lm, examples)
    assert sample.prompt.startswith("<user>")
    assert sample.prompt.count("<assistant>") == 2  # the solved example's, and the one to be answered


def own_task(root, rows, generation, more=""):
    """A task of one's own that generates, as a suite, and its examples."""
    (root / "sums").mkdir()
    (root / "sums/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "mine").mkdir()
    (root / "mine/sums.yaml").write_text(f"""
task: my_sums
dataset_path: me/sums
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["\\n"], {generation}}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
{more}""")
    suite = LMEval(LMEval.Params(task="my_sums", include_path=str(root / "mine")))
    return suite, suite.examples(DataSource.parse(str(root)))


def test_a_task_of_ones_own_with_generation_and_two_filters(tmp_path, lm):
    rows = [{"q": f"{n} + 1 =", "a": str(n + 1)} for n in range(4)]
    filters = """
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: number, filter: [{function: regex, regex_pattern: "(\\\\d+)"}, {function: take_first}]}
"""
    suite, examples = own_task(tmp_path, rows, "max_gen_toks: 5", filters)
    answers = {"0 + 1 =": "1", "1 + 1 =": "it is 2", "2 + 1 =": "four", "3 + 1 =": "4"}
    samples = list(suite.answer(ScriptedLM(lambda prompt: answers[prompt]), examples))
    scores = {score.metric.name: score.point for score in suite.score(samples) if score.group == "overall"}
    assert scores == {"exact_match,whole": 0.5, "exact_match,number": 0.75}
    assert [sample.output for sample in samples] == ["1", "it is 2", "four", "4"]


def test_room_for_an_answer_is_what_the_task_generates_under_whatever_name(tmp_path):
    suite, examples = own_task(tmp_path, [{"q": "one two three four five six", "a": "7"}], "max_new_tokens: 4")
    for context, cut in ((10, False), (9, True)):
        (sample,) = suite.answer(ScriptedLM(lambda prompt: "7", max_length=context), examples)
        assert sample.truncated is cut


def test_options_that_cannot_be_ranked_are_no_answer(local):
    suite = LMEval(LMEval.Params(task="arc_easy"))
    examples = suite.examples(DataSource.parse(str(local)))[:2]
    samples = list(suite.answer(ScriptedLM(likelihood=lambda context, continuation: float("nan")), examples))
    assert [sample.error for sample in samples] == ["a log-likelihood is not a number"] * 2


def test_a_task_twice_is_refused(local, tmp_path, tiny_model, capsys):
    (tmp_path / "sweep.yaml").write_text(
        f"model: {tiny_model}\ndata: {local}\nsuites: [{{suite: 'lm_eval:arc_easy', params: {{task: sciq}}}}]\n"
    )
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert "'task' stands in its name and in its params" in capsys.readouterr().err


def test_in_a_run_with_the_task_in_the_suites_name(local, tmp_path, tiny_model, capsys):
    names = "lm_eval:arc_easy,lm_eval:lambada_openai"
    arguments = ["evaluate", str(tiny_model), "--suite", names, "--data", str(local), "--out", str(tmp_path / "run")]
    assert cli.main([*arguments, "--json"]) == 0
    board = json.loads(capsys.readouterr().out)["leaderboard"][0]
    assert 0 <= board["lm_eval:arc_easy"] <= 1
    assert board["lm_eval:lambada_openai"] > 1  # a perplexity
    assert cli.main(["report", str(tmp_path / "run")]) == 0  # without loading lm-eval's tasks again


@pytest.mark.parametrize("name", ["arc_easy", "mmlu_astronomy", "gsm8k", "boolq", "wikitext"])
def test_a_single_task_needs_no_index_of_all(name):
    """From the folder of its file comes what lm-eval's whole index has, in a hundredth of the time."""
    own, whole = _manager_of(name, None), _manager(None)
    assert len(own.all_tasks) < 1000 < len(whole.all_tasks)
    entry, expected = own.task_index[name], whole.task_index[name]
    assert (entry.yaml_path, entry.kind, entry.cfg) == (expected.yaml_path, expected.kind, expected.cfg)


def test_groups_and_tags_and_a_folder_of_ones_own_have_what_they_name(tmp_path):
    assert _manager_of("mmlu", None) is _manager_of("no such task", None) is _manager(None)
    (tmp_path / "mine.yaml").write_text("task: arc_easy\ndataset_path: mine\n")
    own = _manager_of("arc_easy", str(tmp_path))
    assert own.task_index["arc_easy"].cfg["dataset_path"] == "mine"
    assert "hellaswag" not in own.all_tasks
    assert "hellaswag" in _manager_of("hellaswag", str(tmp_path)).all_tasks


def test_files_are_found_in_several_layouts(tmp_path):
    row = json.dumps({"x": 1}) + "\n"
    for place in ("set/cfg/test.jsonl", "deep/other/other_xl.validation.jsonl", "third/test-00000.jsonl"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(row)
    assert read_local(tmp_path, "me/set", "cfg")["test"][0] == {"x": 1}
    assert {k: len(v) for k, v in read_local(tmp_path, "me/other", "other_xl").items()} == {
        "train": 0, "validation": 1, "test": 0,
    }  # fmt: skip
    assert len(read_local(tmp_path, "nobody/glue", "third")["test"]) == 1
    with pytest.raises(DataError, match="no files of the dataset 'me/absent'"):
        read_local(tmp_path, "me/absent", None)


@pytest.mark.parametrize(
    ("task", "message"),
    [("arc_eazy", "Did you mean 'arc_easy'"), ("piqa", "no files of the dataset 'baber/piqa'")],
)
def test_tasks_that_cannot_be_had(local, task, message):
    with pytest.raises(KickError, match=message):
        LMEval(LMEval.Params(task=task)).examples(DataSource.parse(str(local)))


def test_a_mirror_without_examples_or_without_the_split_that_is_asked(local, lm, tmp_path):
    (tmp_path / "sciq").mkdir()
    rows = (local / "sciq/test.jsonl").read_text(encoding="utf-8")
    (tmp_path / "sciq/test.jsonl").write_text(rows, encoding="utf-8")
    assert len(kicks(tmp_path, lm, task="sciq")[1]) == ROWS
    with pytest.raises(DataError, match=r"2 shots asked for; .* has 0 rows"):
        kicks(tmp_path, lm, task="sciq", shots=2)
    (tmp_path / "sciq/test.jsonl").rename(tmp_path / "sciq/train.jsonl")
    with pytest.raises(DataError, match="no rows of the split that 'sciq' asks"):
        kicks(tmp_path, lm, task="sciq")


def test_a_suite_with_and_without_something_after_the_colon():
    assert plugins.suite_of("lm_eval:arc_easy")[1] == {"task": "arc_easy"}
    with pytest.raises(ConfigError, match="names no task"):
        plugins.suite_of("lm_eval")
    with pytest.raises(ConfigError, match="takes nothing after a colon"):
        plugins.suite_of("mmlu:letters")
    with pytest.raises(DataError, match="do not come with kick"):
        LMEval(LMEval.Params(task="arc_easy")).examples(DataSource.parse("embedded"))


def test_answering_makes_no_documents_anew(local, lm, monkeypatch):
    from lm_eval.api.task import Task

    made = []
    original = Task.eval_docs.fget
    monkeypatch.setattr(Task, "eval_docs", property(lambda task: made.append(task.task_name) or original(task)))
    suite = LMEval(LMEval.Params(task="hellaswag"))
    examples = suite.examples(DataSource.parse(str(local)))
    before = list(made)
    assert len(list(suite.answer(lm, examples))) == ROWS
    assert made == before


@pytest.mark.parametrize(
    ("label", "right"),
    [(1, True), (2, False), ("no", True), ("label", False), ([0, 1], True), (["yes", "label"], False), (None, False)],
)
def test_rows_whose_label_is_no_option_are_refused(label, right):
    """As google/boolq's rows are to a task that reads super_glue's: lm-eval would count every answer as wrong."""
    from types import SimpleNamespace

    from kick_tasks.lm_eval_tasks import _check_label

    from kick.errors import DataError

    task = SimpleNamespace(
        multiple_input=False, doc_to_choice=lambda doc: ["yes", "no"], doc_to_target=lambda doc: label
    )
    if right:
        _check_label("boolq", task, {"question": "q", "answer": True})
    else:
        with pytest.raises(DataError, match="which is none of its 2 options") as caught:
            _check_label("boolq", task, {"question": "q", "answer": True})
        assert "question, answer" in caught.value.hint


def test_always_yes_is_what_guessing_gives_where_most_answers_are():
    suite = LMEval(LMEval.Params(task="yes_or_no"))
    task = SimpleNamespace(
        task_name="yes_or_no", doc_to_choice=lambda doc: ["no", "yes"], doc_to_target=lambda doc: doc["right"]
    )

    def commonest(*right, tasks=1):
        suite._tasks = {f"task {n}": task for n in range(tasks)}
        suite._made, suite._shares = {"yes_or_no": [{"right": own} for own in right]}, {}
        return suite._commonest(task)

    assert commonest(*[1] * 620 + [0] * 380) == 0.62
    assert commonest(*[1] * 12 + [0] * 8) == 0.0  # of twenty by chance
    assert commonest(1) == 0.0
    assert commonest(*[1] * 620 + [0] * 380, tasks=2) == 0.0  # one answer for all of a group's tasks is another matter
    task.doc_to_choice = lambda doc: [f"{doc['right']} apples", "pears"]
    assert commonest(*[1] * 620 + [0] * 380) == 0.0
