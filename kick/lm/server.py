"""A model that is served elsewhere, behind any endpoint of the OpenAI protocol: vLLM, SGLang, llama.cpp, TGI ...

Completions always; likelihoods where the endpoint gives log-probabilities of the prompt (`echo` of the completions
protocol, as vLLM and SGLang do), else what needs them is refused. Prompts go as token ids of the checkpoint's own
tokenizer, so that both sides mean the same tokens; as text where an endpoint takes nothing else.
"""

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeVar

import openai
from pydantic import Field
from transformers import AutoConfig

from kick.calibration import begin_of_text
from kick.endpoint import check_url, said, without_key
from kick.errors import ConfigError, EngineError, KickError, NotGivenError
from kick.lm.base import Scored, TokenLM, context_length, room_of_engine
from kick.lm.generation import Decoding, row_seeds, stop_tokens
from kick.loading import load_tokenizer
from kick.spec import Spec

_UNDO = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""What an engine may have defaults for that change texts, with the values that change nothing."""

_ROUNDING = 0.9, 8
"""A server may tokenise a text differently: it must have read at least this share of our tokens, less this many."""

_MAY_GO = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)

A = TypeVar("A")
B = TypeVar("B")


class ServerLM(TokenLM):
    """The served counterpart of a checkpoint, whose tokenizer and record it uses."""

    class Params(Spec):
        base_url: str = Field(description="of the endpoint, for example http://localhost:8000/v1")
        models: dict[str, str] = Field(description="for each setting the name that the endpoint has for it")
        api: Literal["completions", "chat"] = "completions"
        prompt: Literal["tokens", "text"] = Field(default="tokens", description="how completions are asked")
        key_env: str = Field(default="OPENAI_API_KEY", description="the environment variable that holds the key")
        concurrency: int = Field(default=8, ge=1, description="requests under way at once")
        retries: int = Field(default=6, ge=0, description="after 429, 5xx, timeouts and cut connections")
        timeout: float = Field(default=600.0, gt=0, description="seconds for one reply")
        max_model_len: int | None = Field(default=None, ge=16, description="tokens; default: the model's own context")

    def __init__(self, path: Path, params: Params, setting: str) -> None:
        context = params.max_model_len or context_length(AutoConfig.from_pretrained(path))
        super().__init__(load_tokenizer(path), room_of_engine(context))
        self.params = params
        self.check(params, [setting])
        self._model = params.models[setting]
        self._neutral = True  # whether the endpoint takes what undoes its own defaults
        self._begin = begin_of_text(self.tokenizer)
        self._without_text: list[str] = []  # why replies were empty that did not end by themselves
        self._key = os.environ.get(params.key_env) or "none"
        self._client = self._connect()

    def _connect(self) -> openai.OpenAI:
        own = self.params
        return openai.OpenAI(api_key=self._key, base_url=own.base_url, timeout=own.timeout, max_retries=own.retries)

    def close(self) -> None:
        self._client.close()

    @classmethod
    def from_checkpoint(cls, path: Path, params: Params, dtype: str, device: str, setting: str) -> "ServerLM":
        del dtype, device  # the server's business
        return cls(path, params, setting)

    @classmethod
    def check(cls, params: Any, settings: Iterable[str]) -> dict[str, str]:
        check_url("lm 'server': the endpoint's", params.base_url, params.key_env)
        missing = [setting for setting in settings if setting not in params.models]
        if missing:
            raise ConfigError(
                f"lm 'server': no served model is named for the setting '{missing[0]}'.",
                f"For example models: {{'{missing[0]}': NAME}}, with NAME as the endpoint calls it.",
            )
        return {}

    def record(self) -> dict[str, Any]:
        return {
            "name": "server",
            "model": self._model,
            **self.params.model_dump(include={"base_url", "api", "prompt"}),
            **({} if self._neutral else {"decoding": f"the endpoint's own defaults of {', '.join(_UNDO)}"}),
            **({"empty_replies": dict(Counter(self._without_text))} if self._without_text else {}),
        }

    @property
    def applies_a_template(self) -> bool:
        """Whether what it answers is not the prompt itself, but a conversation that begins with it."""
        return self.params.api == "chat"

    @property
    def has_chat_template(self) -> bool:
        return self.params.api == "chat" or super().has_chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.params.api == "chat":  # the server applies its own
            if not add_generation_prompt:
                raise NotGivenError(
                    "a chat endpoint ends the assistant's turn: it does not go on with an answer that is begun for it.",
                    "Use api: completions, or a task that begins no answer (gen_prefix).",
                )
            return json.dumps(chat_history, ensure_ascii=False)
        return super().apply_chat_template(chat_history, add_generation_prompt)

    # Likelihoods

    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, bool]]:
        if self.params.api == "chat" or self.params.prompt == "text":
            kind = "a chat endpoint" if self.params.api == "chat" else "an endpoint that takes no token ids"
            raise NotGivenError(
                f"{kind} gives no log-probabilities of the prompt, which this suite ranks by.",
                "Use api: completions with prompt: tokens, or ask suites that generate.",
            )
        return self._all(self._score, sequences)

    def _score(self, sequence: Scored) -> tuple[float, bool]:
        reply = self._ask(
            lambda: self._client.completions.create(
                model=self._model, prompt=sequence.tokens, max_tokens=1, temperature=0, echo=True, logprobs=1
            )
        )
        found = reply.choices[0].logprobs
        values = (found.token_logprobs or []) if found else []
        best = (found.top_logprobs or []) if found else []
        scored = slice(len(sequence.tokens) - sequence.n_targets, len(sequence.tokens))
        expected = (len(sequence.tokens), len(sequence.tokens) + 1)  # with the generated token, or without
        if len(values) not in expected or len(best) not in expected or None in values[scored] or not all(best[scored]):
            raise NotGivenError(
                f"the endpoint {self.params.base_url} gives no log-probabilities of the prompt (echo), which this "
                "suite ranks by.",
                "vLLM and SGLang give them; elsewhere ask suites that generate.",
            )
        pairs = zip(values[scored], best[scored], strict=True)
        return float(sum(values[scored])), all(value >= max(top.values()) for value, top in pairs)

    # Generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        if self.params.api == "completions":
            return super().generate_until(requests)
        asked = [(r.args[0], Decoding.of(dict(r.args[1]))) for r in requests]
        seeds = row_seeds([prompt.encode() for prompt, _ in asked], 0)
        return self._all(self._chat, [(*own, own[1].seed ^ seed) for own, seed in zip(asked, seeds, strict=True)])

    def complete(self, contexts: Sequence[list[int]], decoding: Decoding) -> list[str]:
        rows = zip(contexts, row_seeds(contexts, decoding.seed), strict=True)
        stops = sorted(stop_tokens(self.tokenizer, decoding))
        return self._all(lambda row: self._complete(*row, decoding, stops), list(rows))

    def _complete(self, context: list[int], seed: int, decoding: Decoding, stops: list[int]) -> str:
        prompt: list[int] | str = context
        if self.params.prompt == "text":  # what a tokenizer puts in front of every text, the server puts there itself
            prompt = self.tokenizer.decode(context[len(self._begin) if context[:1] == self._begin else 0 :])
        more = {"stop_token_ids": stops} if stops and self.params.prompt == "tokens" else {}
        reply = self._ask_for_text(
            lambda **options: self._client.completions.create(model=self._model, prompt=prompt, **options),
            decoding,
            seed,
            more,
        )
        self._check_read(reply, len(context), exactly=isinstance(prompt, list))
        text = getattr(reply.choices[0], "text", None)
        if not isinstance(text, str):
            raise KickError(*self._no_completion)
        return self._cut(reply, text, decoding)

    def _chat(self, request: tuple[str, Decoding, int]) -> str:
        prompt, decoding, seed = request
        if decoding.most < 1:  # endpoints refuse to generate nothing
            return ""
        messages: Any = _messages(prompt)
        reply = self._ask_for_text(
            lambda **options: self._client.chat.completions.create(model=self._model, messages=messages, **options),
            decoding,
            seed,
            {},
        )
        contents = self._encoder([(message["content"], False) for message in messages])
        self._check_read(reply, sum(map(len, contents)), exactly=False)
        message = getattr(reply.choices[0], "message", None)
        text = getattr(message, "content", None) or ""  # a model that only thought has said nothing
        if message is None or not isinstance(text, str):
            raise KickError(*self._no_completion)
        return self._cut(reply, text, decoding)

    def _check_read(self, reply: Any, sent: int, exactly: bool) -> None:
        """Raise KickError where the endpoint read another prompt than the one of `sent` tokens, or less of a text."""
        read = getattr(reply.usage, "prompt_tokens", None)
        share, some = _ROUNDING
        if read and (read != sent if exactly else read < share * sent - some):
            raise KickError(
                f"the endpoint {self.params.base_url} read {read} tokens where {sent} were sent.",
                "It cuts prompts, or adds to them: give it the whole context of the model, and no template.",
            )

    def _cut(self, reply: Any, text: str, decoding: Decoding) -> str:
        """`text` up to a stop string; where there is none at all for a reason of the endpoint's, that is counted."""
        reason = getattr(reply.choices[0], "finish_reason", None)
        if not text and reason not in (None, "stop"):
            self._without_text.append(reason)
        return decoding.cut(text)

    def _ask_for_text(self, create: Callable[..., Any], decoding: Decoding, seed: int, more: dict[str, Any]) -> Any:
        """A completion by `create`, without the endpoint's own defaults where it lets itself be told so.

        Engines take penalties and top_k from the model's generation_config.json unless a request says otherwise;
        an endpoint that knows the plain protocol alone refuses to be told, and has none.
        """
        if self._neutral:
            try:
                return self._ask(lambda: create(**_options(decoding, seed, {**_UNDO, **more})))
            except KickError as error:
                if not isinstance(error.__cause__, openai.BadRequestError | openai.UnprocessableEntityError):
                    raise
        reply = self._ask(lambda: create(**_options(decoding, seed, more)))
        self._neutral = False
        return reply

    def _all(self, work: Callable[[A], B], items: Sequence[A]) -> list[B]:
        """`work` on all items, several at once; the first error ends it, whatever else is under way."""
        try:
            return _side_by_side(work, items, self.params.concurrency)
        except BaseException:  # Ctrl-C too: what is under way is not tried again
            self._client.close()
            self._client = self._connect()
            raise

    def _ask(self, request: Callable[[], Any]) -> Any:
        """A reply with a choice in it. Raises KickError once the retries are used up."""
        try:
            reply = self._whole(request)
        except openai.OpenAIError as error:
            may_go = isinstance(error, _MAY_GO) and getattr(error, "code", None) != "insufficient_quota"
            kind = EngineError if may_go else KickError
            raise kind(
                f"the endpoint {self.params.base_url} failed: {without_key(said(error), self._key)[:300]}",
                f"Is '{self._model}' served there? prompt: text is for endpoints that take no token ids.",
            ) from error
        if not getattr(reply, "choices", None):
            raise KickError(*self._no_completion)
        return reply

    def _whole(self, request: Callable[[], Any]) -> Any:
        """A reply that is JSON to its end: where it ends early, the client itself does not try again."""
        for _ in range(self.params.retries):
            with suppress(ValueError):
                return request()
        try:
            return request()
        except ValueError as error:
            raise KickError(*self._no_completion) from error

    @property
    def _no_completion(self) -> tuple[str, str]:
        return (
            f"the endpoint {self.params.base_url} answered with something that is no completion.",
            "Is its path right? Most end in /v1.",
        )


def _side_by_side(work: Callable[[A], B], items: Sequence[A], most: int) -> list[B]:
    """`work` of each item, in order, in `most` threads. Raises the first error, and waits for none of the others.

    A process waits for the threads of a pool before it ends; for these, which may wait for a reply for long, it does
    not.
    """
    todo: SimpleQueue[tuple[int, A]] = SimpleQueue()
    done: SimpleQueue[tuple[int, B] | BaseException] = SimpleQueue()
    given_up = threading.Event()
    for place in enumerate(items):
        todo.put(place)

    def go_on() -> None:
        while not given_up.is_set():
            try:
                index, item = todo.get_nowait()
            except Empty:
                return
            try:
                done.put((index, work(item)))
            except BaseException as error:  # raised by who waits
                given_up.set()
                done.put(error)

    for _ in range(min(most, len(items))):
        threading.Thread(target=go_on, daemon=True).start()
    found: dict[int, B] = {}
    try:
        while len(found) < len(items):
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            found |= [result]
        return [found[index] for index in range(len(items))]
    finally:
        given_up.set()


def _options(decoding: Decoding, seed: int, more: dict[str, Any]) -> dict[str, Any]:
    """What the protocol has for a decoding; what only some servers have (`more`, min_tokens) goes along beside it."""
    more = dict(more)
    if decoding.least:
        more["min_tokens"] = decoding.least
    if decoding.top_k:
        more["top_k"] = decoding.top_k
    return {
        "max_tokens": decoding.most,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        **({"stop": list(decoding.until[:4])} if decoding.until else {}),  # the protocol takes four
        **({"seed": seed} if decoding.temperature else {}),
        **({"extra_body": more} if more else {}),
    }


def _messages(prompt: str) -> list[dict[str, str]]:
    """The conversation that `apply_chat_template` wrote, or one turn of it."""
    try:
        messages = json.loads(prompt)
    except ValueError:
        messages = None
    if (
        messages
        and isinstance(messages, list)
        and all(isinstance(m, dict) and m.keys() == {"role", "content"} for m in messages)
    ):
        return messages
    return [{"role": "user", "content": prompt}]
