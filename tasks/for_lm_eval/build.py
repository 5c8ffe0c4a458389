"""kick's questions as lm-eval tasks: `lm_eval ... --include_path FOLDER_OF_THIS_FILE --tasks kick_factoid_qa`.

`--metadata '{"data": "DIR", "shots": 5}'` gives where rows come from (embedded if not said), how many are asked
(`limit`, `seed`), and the suite's own parameters. Prompts and scoring are the suites'; what kick drops or cuts for a
model's context (shots, truncated prompts) is left to lm-eval.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from kick_tasks import scoring
from kick_tasks.factoid_qa import FactoidQA
from kick_tasks.mmlu import LETTERS, MMLU
from kick_tasks.prompts import Prompt
from kick_tasks.retrieval_qa import RetrievalQA

from kick.errors import ConfigError
from kick.loading import load_tokenizer
from kick.suite import DataSource, Example, Suite, subset


def factoid_qa(**metadata: Any) -> Any:
    suite, examples = _questions(FactoidQA, metadata)
    return _dataset(examples, [suite.prompt(None, False, example)(suite.params.shots) for example in examples])


def retrieval_qa(**metadata: Any) -> Any:
    suite, examples = _questions(RetrievalQA, metadata)
    tokenizer = _Tokenizer(metadata)
    prompts = [suite.prompt(None, False, e, suite.evidence(tokenizer, e))(suite.params.shots) for e in examples]
    return _dataset(examples, prompts, rule=suite.rule)


def mmlu(**metadata: Any) -> Any:
    suite, examples = _questions(MMLU, metadata)
    prompts = [suite.prompt(None, False, example)(suite.params.shots) for example in examples]
    options = [list(LETTERS) if suite.params.format == "letters" else e.content["choices"] for e in examples]
    params = suite.params.model_dump_json()
    return _dataset(examples, prompts, options=options, params=[params] * len(examples))


def score_answer(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """One generated answer, as kick scores it."""
    answers = json.loads(doc["example"])["answers"]
    rule = doc["rule"]
    return {
        "contains": scoring.contains(results[0], answers, rule),
        "exact_match": scoring.exact_match(results[0], answers, rule),
        "f1": scoring.token_f1(results[0], answers, rule),
    }


def score_options(doc: Mapping[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """The likelihoods of one question's options, as kick ranks them."""
    suite = MMLU(MMLU.Params.model_validate_json(doc["params"]))
    content = json.loads(doc["example"])
    choices = [
        {"text": text, "loglikelihood": value, "correct": index == content["answer"]}
        for index, (text, (value, _)) in enumerate(zip(doc["options"], results, strict=True))
    ]
    example = Example(doc["id"], content["subject"], content)
    return {"accuracy": suite.sample(example, Prompt(doc["prompt"], 0, 0, False), choices).scores["correct"]}


def _questions(kind: Any, metadata: Mapping[str, Any]) -> tuple[Any, list[Example]]:
    for name in ("max_new_tokens", "chat_template"):
        if name in metadata:
            raise ConfigError(f"'{name}' stands in the metadata, but lm-eval decides it.", "Use lm-eval's own options.")
    given = {key: value for key, value in metadata.items() if key in kind.Params.model_fields}
    suite: Suite = kind(kind.Params(**given))
    everything = suite.examples(DataSource.parse(metadata.get("data", "embedded")))
    limit, per_group = metadata.get("limit"), metadata.get("limit_per_group")
    return suite, subset(everything, limit, per_group, metadata.get("seed", 0))


def _dataset(examples: list[Example], prompts: list[str], rule: str = "triviaqa", **columns: list[Any]) -> Any:
    rows = [
        {"id": example.id, "prompt": prompt, "rule": rule, "example": json.dumps(example.content, ensure_ascii=False)}
        for example, prompt in zip(examples, prompts, strict=True)
    ]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return {"test": datasets.Dataset.from_list(rows)}


class _Tokenizer:
    """What counts tokens for the evidence budget: the tokenizer of the model that lm-eval was given."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        name = metadata.get("tokenizer") or metadata.get("pretrained")
        if not name:
            raise ConfigError(
                "retrieval_qa cuts evidence by tokens, and no tokenizer is named.",
                'Add --metadata \'{"tokenizer": "PATH"}\'; with --model_args pretrained=PATH it is that model\'s.',
            )
        self.tokenizer = load_tokenizer(Path(name))

    def tok_encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
