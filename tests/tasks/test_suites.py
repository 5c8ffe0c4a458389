"""The three suites with a scripted LM: prompts, scores, and rows that are wrong."""

import csv
import json
import math
from dataclasses import replace

import pytest
from kick_tasks.factoid_qa import FactoidQA
from kick_tasks.mmlu import MMLU, read_letter
from kick_tasks.mmlu_subjects import CATEGORY
from kick_tasks.perplexity import Perplexity, cut

from kick.errors import ConfigError, DataError
from kick.suite import DataSource, Example, Sample, data_fingerprint, subset

EMBEDDED = DataSource.parse("embedded")


class ScriptedLM:
    """An LM that answers from functions; a token is a word."""

    def __init__(
        self, complete=lambda prompt: "", likelihood=lambda context, continuation: 0.0, max_length=10_000, chat=False
    ):
        self.complete, self.likelihood, self.max_length, self.has_chat_template = complete, likelihood, max_length, chat
        self.prompts = []

    def tok_encode(self, text, add_special_tokens=None):
        return text.split()

    def generate_until(self, requests, disable_tqdm=False):
        self.prompts += [request.args[0] for request in requests]
        self.options = requests[0].args[1]
        return [self.complete(request.args[0]) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        self.prompts += [request.args[0] for request in requests]
        return [(self.likelihood(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [self.likelihood("", request.args[0]) for request in requests]

    def apply_chat_template(self, history, add_generation_prompt=True):
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in history) + "<assistant>"


def suite(kind, **params):
    return kind(kind.Params(**params))


def example(question="Who wrote Emma?", answers=("Jane Austen",), shots=()):
    return Example(
        "q1", "books", {"question": question, "answers": list(answers), "shots": [list(shot) for shot in shots]}
    )


# Factoid QA


def test_zero_shot_prompt():
    lm = ScriptedLM(lambda prompt: " Jane Austen")
    (sample,) = suite(FactoidQA).answer(lm, [example()])
    assert lm.prompts == ["Answer the question with a name or a few words.\n\nQuestion: Who wrote Emma?\nAnswer:"]
    assert lm.options["until"] == ["\n"]
    assert sample.scores == {"contains": 1.0, "exact_match": 1.0, "f1": 1.0}
    assert (sample.shots, sample.truncated, sample.output) == (0, False, " Jane Austen")


def test_shots_stand_in_front():
    lm = ScriptedLM()
    list(suite(FactoidQA, shots=2).answer(lm, [example(shots=[("1+1?", "2"), ("2+2?", "4")])]))
    assert lm.prompts == [
        "Question: 1+1?\nAnswer: 2\n\nQuestion: 2+2?\nAnswer: 4\n\nQuestion: Who wrote Emma?\nAnswer:"
    ]


def test_shots_are_dropped_until_the_prompt_fits_and_counted():
    shots = [("one two three", "four")] * 3  # six words each
    lm = ScriptedLM(max_length=5 + 32 + 12)  # the question has five words, the answer room for 32
    (sample,) = suite(FactoidQA, shots=3).answer(lm, [example(shots=shots)])
    assert (sample.shots, sample.truncated) == (2, False)
    lm.max_length = 20  # not even the question alone
    (sample,) = suite(FactoidQA, shots=3).answer(lm, [example(shots=shots)])
    assert (sample.shots, sample.truncated) == (0, True)


def test_the_prompt_is_never_scored():
    lm = ScriptedLM(lambda prompt: " I do not know")
    (sample,) = suite(FactoidQA).answer(lm, [example("Did Jane Austen write Emma?", ["Jane Austen"])])
    assert sample.scores["contains"] == 0.0


def test_chat_template():
    lm = ScriptedLM(chat=True)
    list(suite(FactoidQA, shots=1, chat_template="on").answer(lm, [example(shots=[("1+1?", "2")])]))
    assert lm.prompts == [
        "<user>Question: 1+1?\nAnswer:<assistant>2<user>Question: Who wrote Emma?\nAnswer:<assistant>"
    ]
    list(suite(FactoidQA, chat_template="auto").answer(ScriptedLM(chat=False), [example()]))
    with pytest.raises(ConfigError, match="no chat template"):
        list(suite(FactoidQA, chat_template="on").answer(ScriptedLM(chat=False), [example()]))


def write_freebase(folder, questions, name="FreebaseQA-eval.json"):
    (folder / name).write_text(json.dumps({"Dataset": "x", "Version": "1", "Questions": questions}))


def freebase(id="q-1", question="Who?", names=("me",)):
    return {
        "Question-ID": id,
        "RawQuestion": question,
        "Parses": [{"Answers": [{"AnswersMid": "m", "AnswersName": list(names)}]}],
    }


def test_freebase_rows(tmp_path):
    row = freebase(names=["jane austen", "austen"])
    row["Parses"].append({"Answers": [{"AnswersMid": "n", "AnswersName": ["austen"]}]})
    write_freebase(tmp_path, [row])
    (found,) = suite(FactoidQA).examples(DataSource.parse(str(tmp_path)))
    assert found.content["answers"] == ["jane austen", "austen"]
    # the hub gives records as columns
    from kick_tasks.factoid_qa import _from_freebase

    columns = {**row, "Parses": {"Answers": [{"AnswersMid": ["m"], "AnswersName": [["jane austen", "austen"]]}]}}
    assert _from_freebase(columns, "row 1")["answers"] == ["jane austen", "austen"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([freebase(), freebase("q-2", names=[])], "question 2 of .* has no answer"),
        ([freebase(names=["?!"])], "question 1 of .* has no answer"),
        ([freebase(question=" ")], "has no question"),
        ([{"Question-ID": "q", "RawQuestion": "Who?"}], "'Parses'. is missing"),
    ],
)
def test_wrong_freebase_rows_are_named(tmp_path, rows, says):
    write_freebase(tmp_path, rows)
    with pytest.raises(DataError, match=says):
        suite(FactoidQA).examples(DataSource.parse(str(tmp_path)))


def test_missing_data_says_what_was_expected(tmp_path):
    for kind in (FactoidQA, MMLU, Perplexity):
        with pytest.raises(DataError, match="holds no data for the suite"):
            suite(kind).examples(DataSource.parse(str(tmp_path)))
        with pytest.raises(DataError, match="no data folder"):
            suite(kind).examples(DataSource.parse(str(tmp_path / "none")))


def test_the_hub_out_of_reach_is_said():
    with pytest.raises(DataError, match="cannot be read from the hub"):
        suite(FactoidQA).examples(DataSource.parse("hub"))


def test_rows_from_the_hub_have_their_own_schemas(monkeypatch):
    """The hub gives FreebaseQA's records as columns and MMLU's subjects in one table: scripted rows of that form."""
    from kick_tasks import mmlu, sources

    answers = {"AnswersMid": ["m1"], "AnswersName": [["jane austen", "austen"]]}
    freebase_row = {
        "Question-ID": "FreebaseQA-eval-0",
        "RawQuestion": "Who wrote Emma?",
        "Parses": {"Answers": [answers]},
    }
    mmlu_row = {"question": "2+2?", "subject": "elementary_mathematics", "choices": ["3", "4", "5", "6"], "answer": 1}
    asked = []

    def hub_rows(name, config=None, split="test", **options):
        asked.append((name, config, split))
        return [freebase_row] if "freebase" in name else [mmlu_row] * 5

    monkeypatch.setattr(sources, "hub_rows", hub_rows)
    mmlu._hub_split.cache_clear()
    (found,) = suite(FactoidQA).examples(DataSource.parse("hub"))
    assert found.content["answers"] == ["jane austen", "austen"]
    questions = suite(MMLU, shots=2, subjects=("elementary_mathematics",)).examples(DataSource.parse("hub"))
    assert [q.content["answer"] for q in questions] == [1] * 5
    assert len(questions[0].content["shots"]) == 2
    assert set(asked) == {
        ("microsoft/freebase_qa", None, "test"),
        ("cais/mmlu", "all", "test"),
        ("cais/mmlu", "all", "dev"),
    }
    mmlu._hub_split.cache_clear()


def test_real_freebaseqa_rows(mirror):
    found = suite(FactoidQA, shots=3).examples(DataSource.parse(str(mirror)))
    held = json.loads((mirror / "freebaseqa/FreebaseQA-eval.json").read_text(encoding="utf-8"))["Questions"]
    assert len(found) == len({e.id for e in found}) == len(held) > 1000
    assert all(len(e.content["shots"]) == 3 for e in found)


# MMLU


def mmlu_example(answer=1):
    content = {
        "question": "2+2?",
        "choices": ["3", "four", "5", "22"],
        "answer": answer,
        "subject": "elementary_mathematics",
    }
    shot = {"question": "1+1?", "choices": ["2", "3", "4", "5"], "answer": 0}
    return Example("elementary_mathematics-0", "elementary_mathematics", {**content, "shots": [shot]})


def test_letters_prompt_is_hendrycks():
    lm = ScriptedLM(likelihood=lambda context, continuation: {" A": -3, " B": -1, " C": -2, " D": -4}[continuation])
    (sample,) = suite(MMLU, shots=1).answer(lm, [mmlu_example()])
    assert lm.prompts[0] == (
        "The following are multiple choice questions (with answers) about elementary mathematics.\n\n"
        "1+1?\nA. 2\nB. 3\nC. 4\nD. 5\nAnswer: A\n\n2+2?\nA. 3\nB. four\nC. 5\nD. 22\nAnswer:"
    )
    assert (sample.output, sample.scores) == ("B", {"correct": 1.0})
    assert [choice["loglikelihood"] for choice in sample.choices] == [-3, -1, -2, -4]


def test_cloze_ranks_texts_by_likelihood_per_character():
    values = {" 3": -2.0, " four": -4.0, " 5": -3.0, " 22": -9.0}  # per character: -2, -1, -3, -4.5
    lm = ScriptedLM(likelihood=lambda context, continuation: values[continuation])
    (sample,) = suite(MMLU, shots=1, format="cloze").answer(lm, [mmlu_example()])
    assert lm.prompts[0] == (
        "The following are questions (with answers) about elementary mathematics.\n\n"
        "Question: 1+1?\nAnswer: 2\n\nQuestion: 2+2?\nAnswer:"
    )
    assert (sample.output, sample.scores) == ("four", {"correct": 1.0})
    (raw,) = suite(MMLU, shots=1, format="cloze", normalization="none").answer(lm, [mmlu_example()])
    assert (raw.output, raw.scores) == ("3", {"correct": 0.0})


def test_a_letter_that_is_written_is_read_and_anything_else_is_wrong():
    answers = iter([" B", "The answer is B.", " C. 5", " four"])
    lm = ScriptedLM(lambda prompt: next(answers))
    examples = [replace(mmlu_example(), id=f"elementary_mathematics-{n}") for n in range(4)]
    samples = list(suite(MMLU, shots=1, format="generated").answer(lm, examples))
    assert lm.prompts[0].endswith("Answer: A\n\n2+2?\nA. 3\nB. four\nC. 5\nD. 22\nAnswer:")
    assert lm.options["until"] == ["\n"]
    scores = {s.metric.name: s.point for s in suite(MMLU).score(samples) if s.group == "overall"}
    assert scores == {"accuracy": 0.5, "no_letter": 0.25}
    ranked = list(suite(MMLU, shots=1).answer(ScriptedLM(), [mmlu_example()]))
    assert {s.metric.name for s in suite(MMLU).score(ranked)} == {"accuracy"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (" B", "B"),
        ("(D)", "D"),
        ("C. Paris", "C"),
        ("A: the first", "A"),
        ("B because", "B"),
        ("The answer is (D).", "D"),
        ("Answer: A", "A"),
        ("A river runs. The answer is C", "C"),
        ("A\n\nThe capital", "A"),
        ("A (4)", "A"),
        ("**B**", "B"),
        ("[C] five", "C"),
        ("The answer is B because", "B"),
        ("The answer is A.", "A"),
        ("The answer is A river", None),
        ("A river", None),
        ("Bees", None),
        ("b", None),
        ("E", None),
        ("", None),
    ],
)
def test_reading_letters(text, letter):
    assert read_letter(text) == letter


@pytest.mark.parametrize("form", ["letters", "cloze"])
def test_options_that_cannot_be_ranked_are_no_answer(form):
    lm = ScriptedLM(likelihood=lambda context, continuation: float("nan"))
    (sample,) = suite(MMLU, shots=1, format=form).answer(lm, [mmlu_example()])
    assert sample.error == "a log-likelihood is not a number"
    score = suite(MMLU).score([sample])[0]
    assert (score.n, score.failed) == (0, 1)


def test_scores_by_subject_category_and_overall():
    rows = [("astronomy", 1), ("astronomy", 0), ("philosophy", 1)]
    samples = [Sample(f"{i}", subject, "", scores={"correct": float(c)}) for i, (subject, c) in enumerate(rows)]
    found = {score.group: (score.n, score.point) for score in suite(MMLU).score(samples)}
    assert found == {
        "overall": (3, pytest.approx(2 / 3)),
        "STEM": (2, 0.5),
        "astronomy": (2, 0.5),
        "humanities": (1, 1.0),
        "philosophy": (1, 1.0),
    }


def test_batches_hold_one_subject_each():
    groups = ["a", "a", "a", "b", "b"]
    examples = [Example(str(i), group, {}) for i, group in enumerate(groups)]
    assert [[e.id for e in batch] for batch in suite(MMLU).batches(examples, 2)] == [["0", "1"], ["2"], ["3", "4"]]


def write_mmlu(folder, rows, subject="astronomy", split="test"):
    (folder / "mmlu" / split).mkdir(parents=True, exist_ok=True)
    with open(folder / "mmlu" / split / f"{subject}_{split}.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_none_is_a_word(tmp_path):
    write_mmlu(tmp_path, [["How many?", "None", "One", "nan", "", "A"]])
    (found,) = suite(MMLU, shots=0).examples(DataSource.parse(str(tmp_path)))
    assert found.content["choices"] == ["None", "One", "nan", ""]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (["q", "a", "b", "c", "d", ""], "row 1 of .* has no answer"),
        (["q", "a", "b", "c", "d", "E"], "the answer 'E'"),
        (["q", "a", "b", "c", "A"], "has 5 columns"),
    ],
)
def test_wrong_mmlu_rows_are_named(tmp_path, row, says):
    write_mmlu(tmp_path, [row])
    with pytest.raises(DataError, match=says):
        suite(MMLU, shots=0).examples(DataSource.parse(str(tmp_path)))


def test_a_subject_without_enough_shots(tmp_path):
    write_mmlu(tmp_path, [["q", "a", "b", "c", "d", "A"]])
    with pytest.raises(DataError, match=r"astronomy_dev\.csv is missing"):
        suite(MMLU, shots=5).examples(DataSource.parse(str(tmp_path)))
    write_mmlu(tmp_path, [["q", "a", "b", "c", "d", "A"]], split="dev")
    with pytest.raises(DataError, match="astronomy has 1 dev questions"):
        suite(MMLU, shots=5).examples(DataSource.parse(str(tmp_path)))


def test_real_mmlu_rows(mirror):
    found = suite(MMLU, shots=5).examples(DataSource.parse(str(mirror)))
    files = list((mirror / "mmlu/test").glob("*.csv"))
    assert len({e.group for e in found}) == len(files) > 40
    rows = 0
    for path in files:
        with open(path, encoding="utf-8", newline="") as file:
            rows += len(list(csv.reader(file)))
    assert len(found) == rows


def test_there_are_57_subjects_in_four_categories():
    assert len(CATEGORY) == 57
    assert {c: list(CATEGORY.values()).count(c) for c in set(CATEGORY.values())} == {
        "STEM": 19, "humanities": 13, "social sciences": 12, "other": 13,
    }  # fmt: skip


# Perplexity


def test_windows_join_to_the_text_and_stay_within_size():
    text = "Ebb and flow.\n\n  The tide, " * 40 + "x" * 100 + " end\n"
    windows = cut(text, 64)
    assert "".join(windows) == text
    assert all(len(w.encode()) <= 64 for w in windows if "xxx" not in w)
    assert all(w[0].isspace() for w in windows[1:])
    assert cut("  \n ", 64) == []
    assert cut("é" * 50 + " " + "é" * 50, 64) == ["é" * 50, " " + "é" * 50]


def test_perplexity_and_bits_per_byte_by_hand():
    lm = ScriptedLM(likelihood=lambda context, text: -2.0 * len(text.split()))
    examples = [Example("w0", "t", {"text": "ab cd"}), Example("w1", "t", {"text": "efgh"})]
    samples = list(suite(Perplexity).answer(lm, examples))
    scores = {s.metric.name: s.point for s in suite(Perplexity).score(samples) if s.group == "overall"}
    assert scores["perplexity"] == pytest.approx(math.exp(2.0))  # 6 nats over 3 tokens
    assert scores["bits_per_byte"] == pytest.approx(6 / math.log(2) / 9)


def test_a_likelihood_that_is_no_number_fails_and_is_not_counted():
    lm = ScriptedLM(likelihood=lambda context, text: float("nan") if text == "bad" else -1.0)
    samples = list(
        suite(Perplexity).answer(lm, [Example("a", "t", {"text": "bad"}), Example("b", "t", {"text": "good"})])
    )
    overall = suite(Perplexity).score(samples)[0]
    assert (overall.n, overall.failed) == (1, 1)


def test_wikitext_and_c4_are_found(mirror):
    source = DataSource.parse(str(mirror))
    wiki = suite(Perplexity).examples(source)
    assert sum(len(e.content["text"].encode()) for e in wiki) == 1_290_590  # the official size of wiki.test.raw
    assert len(suite(Perplexity, text="c4").examples(source)) > 50


def test_a_text_of_ones_own(tmp_path):
    with pytest.raises(DataError, match="c4 does not come with kick"):
        suite(Perplexity, text="c4").examples(EMBEDDED)
    path = tmp_path / "mine.txt"
    path.write_text("some words of mine")
    (found,) = suite(Perplexity, text=str(path)).examples(EMBEDDED)
    assert found.content["text"] == "some words of mine"
    with pytest.raises(DataError, match="no text at"):
        suite(Perplexity, text=str(tmp_path / "none.txt")).examples(EMBEDDED)


# Subsets


def test_a_limit_is_a_seeded_stratified_choice():
    examples = [
        Example(f"{group}{i}", group, {}) for group, size in (("a", 60), ("b", 30), ("c", 10)) for i in range(size)
    ]
    chosen = subset(examples, 20, None, seed=0)
    assert [sum(e.group == group for e in chosen) for group in "abc"] == [12, 6, 2]
    assert chosen == subset(examples, 20, None, seed=0)
    assert chosen != subset(examples, 20, None, seed=1)
    assert chosen != [*examples[:12], *examples[60:66], *examples[90:92]]  # not the first rows
    assert [e.id for e in chosen] == [e.id for e in examples if e in chosen]  # in the original order
    per_group = subset(examples, None, 15, seed=0)
    assert [sum(e.group == group for e in per_group) for group in "abc"] == [15, 15, 10]
    assert subset(examples, 1000, None, seed=0) == examples


def test_the_data_fingerprint_is_of_the_rows_alone():
    one = [Example("a", "g", {"question": "x"})]
    assert data_fingerprint(one) == data_fingerprint([Example("a", "g", {"question": "x"})])
    assert data_fingerprint(one) != data_fingerprint([Example("a", "g", {"question": "y"})])
