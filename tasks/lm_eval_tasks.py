"""Any task or group of lm-eval as a suite, question by question, with paired statistics.

    kick evaluate MODEL --suite lm_eval:arc_easy,lm_eval:hellaswag --data DIR --out RUN

lm-eval makes the prompts and scores the answers; kick asks, keeps every sample, and compares. With a folder as data,
its datasets are read from local files (`NAME/CONFIG/SPLIT.jsonl` and the like), nothing from the hub. What a metric of
lm-eval adds up otherwise than question by question (BLEU over a corpus, F1 of a classifier) has no paired test and is
left out; the record names it.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from kick.errors import ConfigError, DataError, first_line, unknown_name
from kick.jsonl import read_jsonl
from kick.judge.questions import Judgment
from kick.lm.generation import Decoding
from kick.settings import digest
from kick.spec import Spec
from kick.statistics import wilson
from kick.suite import NOT_A_NUMBER, DataSource, Example, Metric, Sample, Score, Suite

FEWSHOT_SEED = 1234  # lm-eval's own
_SPLITS = ("train", "validation", "test")
_LAYOUT = "SPLIT is " + ", ".join(_SPLITS) + "; a file is .jsonl, .jsonl.gz or .parquet."


class LMEval(Suite):
    name = "lm_eval"
    argument = "task"
    description = "any task or group of lm-eval, as lm_eval:TASK"
    metrics: tuple[Metric, ...] = ()

    class Params(Spec):
        task: str = Field(description="a task or group of lm-eval; stands after the colon")
        shots: int | None = Field(default=None, ge=0, description="solved questions in front; None: what the task says")
        metric: str | None = Field(default=None, description="the primary one; None: the task's first")
        chat_template: Literal["on", "off"] = "off"
        include_path: str | None = Field(default=None, description="a folder with more task files")

    def __init__(self, params: BaseModel | None = None) -> None:
        super().__init__(params)
        self._tasks: dict[str, Any] = {}
        self._made: dict[str, Any] = {}  # the documents of each task
        self._shares: dict[str, float] = {}  # of each task, see _commonest
        self._left_out: set[str] = set()

    # Questions

    def examples(self, source: DataSource) -> list[Example]:
        """Prompts are made here, in the order of the documents: few-shot examples are drawn in that order."""
        self._tasks, self._made = self._load(source), {}
        self.metrics = self._metrics()
        found = []
        for name, task in self._tasks.items():
            for number, doc in enumerate(self._docs(name)):
                if number == 0 and task.OUTPUT_TYPE == "multiple_choice":
                    _check_label(name, task, doc)
                instances = self._instances(task, doc, number)
                content = {
                    "task": name,
                    "number": number,
                    "requests": [[each.request_type, _plain(each.arguments)] for each in instances],
                    "doc": digest(_plain(doc)),
                }
                found.append(Example(f"{name}-{number}", name, content))
        return found

    def _load(self, source: DataSource) -> dict[str, Any]:
        if source.kind == "embedded":
            raise DataError("lm-eval's tasks do not come with kick.", "Set data to hub or to a folder of local files.")
        manager = _manager_of(self.params.task, self.params.include_path)
        if self.params.task not in manager.all_tasks:
            raise unknown_name(
                "lm-eval task", self.params.task, _near(self.params.task, manager), "And thousands more."
            )
        try:
            if source.kind == "directory":
                with local_datasets(source.directory):
                    tasks = manager.load(self.params.task)["tasks"]
            else:
                tasks = manager.load(self.params.task)["tasks"]
        except DataError:
            raise
        except IndexError as error:
            raise DataError(f"{source} holds no rows of the split that '{self.params.task}' asks.", _LAYOUT) from error
        except Exception as error:  # whatever a task's code or a dataset does wrong
            raise DataError(
                f"lm-eval cannot load '{self.params.task}' from {source}: {first_line(error)}", "--debug shows where."
            ) from error
        for name, task in tasks.items():
            if task.OUTPUT_TYPE not in ("loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until"):
                raise ConfigError(
                    f"'{name}' asks for {task.OUTPUT_TYPE}, which kick does not answer.",
                    "Stock lm-eval does, with the same LM: python -m kick.lm.for_lm_eval run --model kick.",
                )
            if (task.config.repeats or 1) > 1:
                raise ConfigError(
                    f"'{name}' wants {task.config.repeats} answers a question; kick asks for one.",
                    "Give a task of your own with repeats: 1.",
                )
            if self.params.shots is not None:
                task.set_config("num_fewshot", self.params.shots)
            task.set_fewshot_seed(FEWSHOT_SEED)
            shots = task.config.num_fewshot or 0
            available = len(getattr(getattr(task, "sampler", None), "df", None) or ()) if shots else 0
            if available < shots:
                raise DataError(f"{shots} shots asked for; {source} has {available} rows for '{name}'.", _LAYOUT)
        return tasks

    def _instances(self, task: Any, doc: Any, number: int) -> list[Any]:
        """lm-eval's requests for one document. With a chat template, contexts are messages as JSON for now."""
        chat = self.params.chat_template == "on"
        options = {"apply_chat_template": chat, "chat_template": _messages_as_json if chat else None}
        context = task.fewshot_context(
            doc,
            num_fewshot=task.config.num_fewshot or 0,
            fewshot_as_multiturn=chat,
            gen_prefix=task.doc_to_prefix(doc),
            **options,
        )
        metadata = (task.task_name, number, 1)
        made = task.construct_requests(doc=doc, ctx=context, metadata=metadata, **options)
        return made if isinstance(made, list) else [made]

    def record(self, lm: Any) -> dict[str, Any]:
        versions = {name: getattr(task, "VERSION", None) for name, task in self._tasks.items()}
        return {"task_versions": versions, "not_by_question": sorted(self._left_out)}

    def length(self, example: Example) -> int:
        return sum(len(str(arguments)) for _, arguments in example.content["requests"])

    def _docs(self, name: str) -> Any:
        """A task's questions; lm-eval makes all of them anew each time it is asked for them."""
        if name not in self._made:
            self._made[name] = self._tasks[name].eval_docs
        return self._made[name]

    # Answers

    def answer(self, lm: Any, examples: Sequence[Example]) -> Iterator[Sample]:
        from lm_eval.api.instance import Instance

        instances: list[list[Any]] = []
        by_kind: dict[str, list[Any]] = {}
        for example in examples:
            doc = self._docs(example.content["task"])[example.content["number"]]
            own = []
            for index, (kind, arguments) in enumerate(example.content["requests"]):
                # only contexts are conversations: not a rolling text, nor the empty context of an unconditional score
                context = kind != "loglikelihood_rolling" and arguments[0] != ""
                shown = (self._rendered(lm, arguments[0]) if context else arguments[0], *arguments[1:])
                metadata = (example.content["task"], example.content["number"], 1)
                own.append(Instance(kind, doc, shown, index, metadata=metadata))
                by_kind.setdefault(kind, []).append(own[-1])
            instances.append(own)
        for kind, requests in by_kind.items():
            for instance, response in zip(requests, getattr(lm, kind)(requests, disable_tqdm=True), strict=True):
                instance.resps.append(response)
        for example, own in zip(examples, instances, strict=True):
            yield self._sample(lm, example, own)

    def _rendered(self, lm: Any, context: str) -> str:
        if self.params.chat_template == "off":
            return context
        messages, add_generation_prompt = json.loads(context)
        return lm.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)

    def _sample(self, lm: Any, example: Example, instances: list[Any]) -> Sample:
        task = self._tasks[example.content["task"]]
        for each in task._filters:
            each.apply(instances)
        several = len(task._filters) > 1
        scores: dict[str, float] = {}
        for filter in task._filters:
            responses = [instance.filtered_resps[filter.name] for instance in instances]
            for metric, value in task.process_results(instances[0].doc, responses).items():
                name = f"{metric},{filter.name}" if several else metric
                scores |= _numbers(name, value, _kind_of(task, metric))
        generated = instances[0].request_type == "generate_until"
        ranked = task.OUTPUT_TYPE == "multiple_choice"
        output, choices = (instances[0].resps[0] if generated else None), None
        if ranked:
            options = [str(option) for option in task.doc_to_choice(instances[0].doc)]
            scores["chance"] = max(1.0 / len(options), self._commonest(task))
            likelihoods = [instance.resps[0][0] for instance in instances]
            output = options[_chosen(options, likelihoods, self.metrics[0].name.partition(",")[0])]
            # beyond the options stand their likelihoods without a context
            rows = zip(options, likelihoods[: len(options)], strict=True)
            choices = [{"text": option, "loglikelihood": value} for option, value in rows]
        tokens = len(lm.tok_encode(instances[0].args[0]))
        room = Decoding.of(dict(instances[0].args[1])).most if generated else 0
        return Sample(
            id=example.id,
            group=example.group,
            prompt=instances[0].args[0],
            output=output,
            choices=choices,
            scores=scores,
            truncated=_is_truncated(lm, instances, room),
            shots=task.config.num_fewshot or 0,
            n_prompt_tokens=tokens,
            n_output_tokens=len(lm.tok_encode(instances[0].resps[0], add_special_tokens=False)) if generated else 0,
            error=None if generated or not any(map(_is_not_a_number, instances)) else NOT_A_NUMBER,
        )

    def _commonest(self, task: Any) -> float:
        """What always the same answer gets where all questions have the same options (yes and no), if that is clearly
        more than guessing; else 0. A group's answers may differ by task: of one that is asked alone.
        """
        if task.task_name not in self._shares:
            docs = self._docs(task.task_name)
            options = {tuple(task.doc_to_choice(doc)) for doc in docs} if len(self._tasks) == 1 else set()
            golds = Counter(str(task.doc_to_target(doc)) for doc in docs) if len(options) == 1 else Counter[str]()
            most, n = max(golds.values(), default=0), golds.total()
            clearly = n > 0 and wilson(float(most), n).low > 1 / len(next(iter(options)))
            self._shares[task.task_name] = most / n if clearly else 0.0
        return self._shares[task.task_name]

    # Scores

    def score(self, samples: Iterable[Sample], judgments: Sequence[Judgment] = ()) -> list[Score]:
        """As every suite; what guessing gives is counted over the questions, whose options differ in number."""
        samples = list(samples)
        chances = {
            group: float(np.mean([s.scores["chance"] for s in members]))
            for group, members in self.members(samples).items()
            if members and all("chance" in s.scores for s in members)
        }
        return [
            replace(score, metric=replace(score.metric, chance=chances[score.group]))
            if score.group in chances and score.metric.name.partition(",")[0] in ("acc", "acc_norm", "acc_bytes")
            else score
            for score in super().score(samples)
        ]

    def _metrics(self) -> tuple[Metric, ...]:
        """The metrics of all tasks that are added up question by question, the primary one first."""
        found: dict[str, Metric] = {}
        for task in self._tasks.values():
            several = len(task._filters) > 1
            for metric in task.aggregation():
                kind = _kind_of(task, metric)
                for filter in task._filters:
                    name = f"{metric},{filter.name}" if several else metric
                    if kind is None:
                        self._left_out.add(name)
                    else:
                        found.setdefault(name, _metric(name, kind, task.higher_is_better().get(metric, True)))
        wanted = self.params.metric or next(iter(found), "")
        if wanted not in found:
            left_out = f" Not by question: {', '.join(sorted(self._left_out))}." if self._left_out else ""
            raise ConfigError(
                f"'{self.params.task}' has no metric '{wanted}' that is counted question by question.",
                f"Known: {', '.join(found) or 'none'}.{left_out}",
            )
        return (found.pop(wanted), *found.values())


def _chosen(options: list[str], likelihoods: list[float], metric: str) -> int:
    """Which option lm-eval's `metric` takes for the answer. likelihoods: of mutual information then those alone."""
    found = np.array(likelihoods[: len(options)])
    if metric == "acc_mutual_info":
        found = found - likelihoods[len(options) :]
    elif metric == "acc_norm":
        found = found / [max(1, len(option)) for option in options]
    elif metric == "acc_bytes":
        found = found / [max(1, len(option.encode("utf-8"))) for option in options]
    return int(found.argmax())


def _is_truncated(lm: Any, instances: list[Any], room: int) -> bool:
    """Whether any of a document's requests is longer than the context; rolling texts are cut into windows instead."""
    if instances[0].request_type == "loglikelihood_rolling":
        return False
    if instances[0].request_type == "generate_until":
        return len(lm.tok_encode(instances[0].args[0])) + room > lm.max_length
    return any(len(lm.tok_encode(i.args[0] + i.args[1])) > lm.max_length + 1 for i in instances)


def _is_not_a_number(instance: Any) -> bool:
    """Whether the log-likelihood that was found, of a pair or of a text, is none that can be compared or added up."""
    value = instance.resps[0]
    return not math.isfinite(value[0] if isinstance(value, tuple | list) else value)


Kind = Literal["mean", "perplexity", "weighted_perplexity", "bits_per_byte"]


def _kind_of(task: Any, metric: str) -> Kind | None:
    """How lm-eval adds up `metric`, if question by question."""
    from lm_eval.api import metrics

    known: dict[Any, Kind] = {
        metrics.mean: "mean",
        metrics.nanmean: "mean",
        metrics.perplexity: "perplexity",
        metrics.weighted_perplexity: "weighted_perplexity",
        metrics.bits_per_byte: "bits_per_byte",
    }
    return known.get(task.aggregation().get(metric))


def _metric(name: str, kind: Kind, higher_is_better: bool) -> Metric:
    per = f"{name} per" if kind in ("weighted_perplexity", "bits_per_byte") else None
    share = kind == "mean" and name.partition(",")[0] in ("acc", "acc_norm", "acc_bytes", "exact_match", "em")
    return Metric(
        name,
        value=name,
        per=per,
        transform="exp" if kind in ("perplexity", "weighted_perplexity") else "mean",
        higher_is_better=higher_is_better,
        unit="share of questions" if share else "",
    )


def _numbers(name: str, value: Any, kind: Kind | None) -> dict[str, float]:
    """What a sample keeps of a result of lm-eval's: a number, or the two that a ratio adds up."""
    if kind is None:
        return {}
    if kind in ("weighted_perplexity", "bits_per_byte"):
        loglikelihood, weight = value
        return {
            name: -loglikelihood / (math.log(2) if kind == "bits_per_byte" else 1.0),
            f"{name} per": float(weight),
        }
    if math.isnan(value):  # lm-eval's nanmean leaves it out
        return {}
    return {name: -float(value) if kind == "perplexity" else float(value)}


def _check_label(name: str, task: Any, doc: Any) -> None:
    """Raise DataError where lm-eval would take every answer for wrong: the row's label is none of its options."""
    options = task.doc_to_choice(doc)
    label = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    for own in label if isinstance(label, list) else [label]:
        if not (own in options if isinstance(own, str) else isinstance(own, int) and own < len(options)):
            columns = ", ".join(map(str, doc)) if isinstance(doc, dict) else "unknown"
            raise DataError(
                f"the first row of '{name}' says that {own!r} is right, which is none of its {len(options)} options.",
                f"Are these rows in the form that the task reads? Their columns: {columns}.",
            )


def _manager_of(task: str, include_path: str | None) -> Any:
    """A manager that knows `task`: for a single task, one of its own folder alone.

    lm-eval reads some fourteen thousand task files, with what each of them includes, before it loads one. A group and
    a tag can name tasks of any folder, and an unknown name is answered with similar ones: they get the whole index.
    """
    for folder in (include_path, _task_folders().get(task)):
        if folder and task in (own := _manager(folder, include_defaults=False)).all_subtasks:
            return own
    return _manager(include_path)


@cache
def _manager(include_path: str | None, include_defaults: bool = True) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


@cache
def _task_folders() -> dict[str, str]:
    """Where the file of each single task that comes with lm-eval lies, by the line that names the task.

    Of two files that name a task, the first in the order of paths counts, as in lm-eval's own index.
    """
    import lm_eval.tasks

    found: dict[str, str] = {}
    for path in sorted(Path(lm_eval.tasks.__file__).parent.glob("**/*.yaml"), key=Path.as_posix):
        if named := _TASK_LINE.search(path.read_bytes()):
            found.setdefault(named[1].decode(), str(path.parent))
    return found


_TASK_LINE = re.compile(rb"""^["']?task["']?:[ \t]*["']?([\w.:/+-]+)["']?[ \t]*\r?$""", re.MULTILINE)


def _near(name: str, manager: Any) -> list[str]:
    """A few of lm-eval's thousands of names."""
    from difflib import get_close_matches

    return get_close_matches(name, manager.all_tasks, n=8, cutoff=0.5) or ["arc_easy", "hellaswag", "piqa"]


def _messages_as_json(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    return json.dumps([messages, add_generation_prompt], ensure_ascii=False)


def _plain(value: Any) -> Any:
    """As JSON: tuples become lists, and what JSON cannot hold its text."""
    return json.loads(json.dumps(value, default=str, ensure_ascii=False))


# Local files in place of the hub


@contextmanager
def local_datasets(root: Path | None) -> Iterator[None]:
    """While it lasts, `datasets.load_dataset` reads local files.

    lm-eval has no other place for this that holds for groups, inherited configurations and Python tasks alike.
    """
    import datasets

    assert root is not None
    original: Callable[..., Any] = datasets.load_dataset
    datasets.load_dataset = lambda path, name=None, **options: read_local(root, path, name)
    try:
        yield
    finally:
        datasets.load_dataset = original


def read_local(root: Path, path: str, config: str | None) -> Any:
    """The splits of the dataset `owner/NAME` that lie under `root` in NAME/CONFIG/, NAME/ or CONFIG/."""
    import datasets

    if not root.is_dir():
        raise DataError(f"no data folder {root}.", "--data takes a folder, 'embedded' or 'hub'.")
    name = path.rpartition("/")[2]
    wanted = [Path(name) / config, Path(name)] if config else [Path(name)]
    if config and config.lower() not in ("main", "default", "all", "en"):
        wanted.append(Path(config))  # a configuration with a name of its own, as boolq of super_glue
    folders = [base / place for place in wanted for base in (root, *sorted(p for p in root.iterdir() if p.is_dir()))]
    for folder in folders:
        splits = _splits(folder) if folder.is_dir() else {}
        if splits:
            found = {split: _read(file) for split, file in splits.items()}
            empty = next(iter(found.values())).select([])  # tasks name a train split even where they show no examples
            return datasets.DatasetDict({split: found.get(split, empty) for split in _SPLITS})
    raise DataError(
        f"{root} holds no files of the dataset '{path}'" + (f", configuration '{config}'." if config else "."),
        f"Expected {wanted[0]}/SPLIT.jsonl. {_LAYOUT}",
    )


def _splits(folder: Path) -> Mapping[str, Path]:
    """Files whose names have a split among their words: test.jsonl, winogrande_xl.validation.jsonl."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
            words = file.name.replace("-", ".").replace("_", ".").split(".")
            for split in _SPLITS:
                if split in words:
                    found.setdefault(split, file)
    return found


def _read(file: Path) -> Any:
    import datasets

    if file.suffix == ".parquet":
        import pyarrow.parquet

        return datasets.Dataset(pyarrow.parquet.read_table(file))
    return datasets.Dataset.from_list([row for _, row in read_jsonl(file)])
