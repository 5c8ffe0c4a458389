"""The judge's endpoint, by the openai library: retries with backoff, structured output where there is some, usage.

A question is asked until its reply can be read, at most `asks` times, each request within the budget. What an endpoint
does not understand (a JSON schema, `max_tokens`, a temperature) is left out from then on, and the record says so.
"""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import openai

from kick.endpoint import said, without_key
from kick.errors import KickError
from kick.judge.budget import Bound, Budget, BudgetSpent
from kick.judge.questions import Answer, Form, Question
from kick.judge.replies import read_reply
from kick.judge.spec import JudgeSpec

LONGEST_BACKOFF, LONGEST_WAIT = 60.0, 600.0  # seconds: of our own accord, and when the endpoint asks for it
TOKENS_AROUND_A_MESSAGE = 64  # what a server may put around each: an upper bound, for the budget
STRUCTURED, MAX_TOKENS, TEMPERATURE = "structured output", "max_tokens", "temperature"
_MAY_HAVE_ANSWERED = (408, 502, 504, 520, 522, 524)  # of a gateway, whose model may have gone on
_DISLIKES_SCHEMAS = ("response_format", "json_schema", "structured", "grammar", "extra")


@dataclass
class Verdict:
    """What came of one question. `failed` says why there is no answer; the tokens are those of all its requests."""

    judge: str
    answer: Answer | None = None
    failed: str | None = None
    reply: str = ""
    asks: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


class Judge:
    """Asks questions of the endpoint that `spec` names; safe to call from several threads.

    missing: what the endpoint was found not to understand; retries: requests that were repeated.
    """

    def __init__(self, spec: JudgeSpec, budget: Budget, sleep: Callable[[float], object] | None = None) -> None:
        self.spec, self.budget = spec, budget
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self.missing = {STRUCTURED} if spec.structured == "off" else set()
        self.retries = 0
        self._lock = threading.Lock()
        self._key = spec.key()
        self._client = openai.OpenAI(
            api_key=self._key,
            base_url=spec.base_url,
            default_query=dict(spec.query) or None,
            default_headers={"api-key": self._key} if "api-version" in spec.query else None,  # Azure's own
            timeout=spec.timeout,
            max_retries=0,  # `_complete` retries, within the budget
        )

    def stop(self) -> None:
        """Let questions under way end with the request that they are in: no more retries, no more waiting."""
        self._stopped.set()

    def ask(self, question: Question) -> Verdict:
        """Raises BudgetSpent before a request that might not fit, and KickError where no question can succeed."""
        verdict = self._ask(question)
        verdict.reply = without_key(verdict.reply, self._key)
        verdict.failed = None if verdict.failed is None else without_key(verdict.failed, self._key)
        return verdict

    def _ask(self, question: Question) -> Verdict:
        verdict = Verdict(judge=self.spec.model)
        instruction = how_to_answer(question.form)
        messages = question.messages()
        messages[-1]["content"] += f"\n\n{instruction}"
        asked = list(messages)
        while verdict.asks < self.spec.asks:
            verdict.asks += 1
            try:
                completion = self._complete(asked, question.form, verdict)
            except _Unanswered as error:
                verdict.failed = str(error)
                break
            except BudgetSpent:
                if verdict.prompt_tokens == 0:
                    raise
                verdict.failed = "the budget is spent"  # after a reply that could not be read: its cost is kept
                break
            message = completion.choices[0].message
            content = (message.content or "").encode("utf-8", "replace").decode("utf-8")  # half characters
            verdict.reply, verdict.judge = content, self._version(completion)
            refusal = getattr(message, "refusal", None)
            if refusal or completion.choices[0].finish_reason == "content_filter":
                verdict.failed = f"refused: {refusal or 'content filter'}"
                break
            verdict.answer = read_reply(verdict.reply, question.form)
            if verdict.answer is not None:
                verdict.failed = None
                break
            verdict.failed = f"unreadable, asked {verdict.asks} times"
            objection = {"role": "user", "content": f"That could not be read. {instruction}"}
            asked = [*messages, {"role": "assistant", "content": verdict.reply}, objection]
        return verdict

    def _complete(self, messages: list[dict[str, str]], form: Form, verdict: Verdict) -> Any:
        """A completion; a request that failed in a way that may pass is repeated. Raises _Unanswered in the end."""
        for attempt in range(self.spec.retries + 1):
            try:
                return self._request(messages, form, verdict)
            except _MayPass as error:
                failure = error
            if self._stopped.is_set():
                raise _Unanswered(f"{failure}; stopped")
            if attempt < self.spec.retries:
                with self._lock:
                    self.retries += 1
                backoff = min(LONGEST_BACKOFF, 2.0**attempt) * random.uniform(0.5, 1.0)
                self._sleep(backoff if failure.wait is None else failure.wait)
        raise _Unanswered(f"{failure}, {self.spec.retries + 1} times")

    def _request(self, messages: list[dict[str, str]], form: Form, verdict: Verdict) -> Any:
        """One request. What may have been answered without our seeing it is counted at its worst case."""
        options = self._options(form)
        worst = Bound(most_tokens(messages, options), self.spec.max_tokens)
        self.budget.reserve(worst)
        nothing, used = Bound(0, 0), worst
        try:
            completion: Any = self._client.chat.completions.create(
                model=self.spec.model,
                messages=messages,  # type: ignore[arg-type]
                **options,
            )
            if not _is_completion(completion):
                raise _MayPass("the reply is no chat completion")
            used = _usage(completion) or worst
            return completion
        except openai.APITimeoutError:
            raise _MayPass(f"no reply in {self.spec.timeout:g} s") from None
        except openai.APIConnectionError as error:
            if type(error.__cause__).__name__ == "ConnectError":
                used = nothing
                raise _MayPass(f"{self.spec.base_url} cannot be reached") from None
            raise _MayPass("the connection was cut") from None
        except openai.APIStatusError as error:
            if error.status_code not in _MAY_HAVE_ANSWERED:
                used = nothing
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                if not self._leave_out(error, options):
                    raise _MayPass(f"HTTP {error.status_code}", _asked_to_wait(error)) from None
            elif not self._leave_out(error, options):
                self._stop_if_hopeless(error)
                raise _Unanswered(f"HTTP {error.status_code}: {said(error)[:200]}") from None
        except (openai.APIResponseValidationError, ValueError):
            raise _MayPass("the reply is not JSON") from None
        finally:
            self.budget.settle(worst, used.prompt_tokens, used.output_tokens)
            verdict.prompt_tokens += used.prompt_tokens
            verdict.output_tokens += used.output_tokens
        return self._request(messages, form, verdict)  # without what was left out: at most three times

    def _options(self, form: Form) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if TEMPERATURE not in self.missing:
            options["temperature"] = self.spec.temperature
        options["max_completion_tokens" if MAX_TOKENS in self.missing else "max_tokens"] = self.spec.max_tokens
        if STRUCTURED not in self.missing:
            schema = {"name": "judgment", "schema": form.schema(), "strict": True}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        return options

    def _leave_out(self, error: openai.APIStatusError, options: dict[str, Any]) -> bool:
        """Whether the endpoint objects to something that it can do without; it is left out from now on."""
        if error.status_code not in (400, 404, 415, 422, 501):
            return False
        text = said(error).lower()
        objections = {
            STRUCTURED: self.spec.structured == "auto"
            and "response_format" in options
            and any(word in text for word in _DISLIKES_SCHEMAS),
            MAX_TOKENS: "max_tokens" in options and "max_completion_tokens" in text,
            TEMPERATURE: "temperature" in options and "temperature" in text,
        }
        with self._lock:
            self.missing |= {name for name, objected in objections.items() if objected}
        return any(objections.values())

    def _stop_if_hopeless(self, error: openai.APIStatusError) -> None:
        if error.status_code in (401, 403):
            raise KickError(
                f"{self.spec.base_url} does not accept the key (HTTP {error.status_code}).",
                f"The key is read from the environment variable {self.spec.key_env}.",
            ) from None
        if error.status_code == 404:
            raise KickError(
                f"{self.spec.base_url} knows no model '{self.spec.model}' (HTTP 404).",
                "Check --judge and --base-url; the URL usually ends in /v1.",
            ) from None

    def _version(self, completion: Any) -> str:
        """What the endpoint calls the model that answered."""
        fingerprint = getattr(completion, "system_fingerprint", None)
        name = completion.model or self.spec.model
        return f"{name} ({fingerprint})" if fingerprint else name


class _Unanswered(Exception):  # noqa: N818
    """A question that got no reply."""


class _MayPass(Exception):  # noqa: N818
    """A request that failed in a way that may not last. `wait`: seconds that the endpoint asks to wait."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def how_to_answer(form: Form) -> str:
    return f"End your reply with one JSON object of this form and nothing after it:\n{form.example()}"


def most_tokens(messages: list[dict[str, str]], options: dict[str, Any]) -> int:
    """An upper bound of a request's prompt tokens: no token is shorter than a byte."""
    text = sum(len(message["content"].encode("utf-8", "replace")) for message in messages)
    return text + TOKENS_AROUND_A_MESSAGE * len(messages) + len(str(options.get("response_format", "")))


def _is_completion(reply: Any) -> bool:
    """Whether an endpoint sent what the protocol promises: the library does not check."""
    choices = getattr(reply, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    return message is not None and isinstance(getattr(message, "content", None), str | None)


def _usage(completion: Any) -> Bound | None:
    """The tokens as the endpoint counts them; None where it does not."""
    usage = getattr(completion, "usage", None)
    prompt, output = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
    return Bound(prompt, output) if isinstance(prompt, int) and isinstance(output, int) else None


def _asked_to_wait(error: openai.APIStatusError) -> float | None:
    """Seconds of the Retry-After header, where it gives some."""
    try:
        return max(0.0, min(LONGEST_WAIT, float(error.response.headers.get("retry-after", ""))))
    except ValueError:
        return None
