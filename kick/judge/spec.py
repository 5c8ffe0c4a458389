"""Which judge, how it is asked, and what it may cost: the `judge` section of a sweep file."""

import os
from typing import Any, Literal

from pydantic import Field

from kick.endpoint import check_url
from kick.errors import ConfigError
from kick.spec import Spec

OPENAI = "https://api.openai.com/v1"


class JudgeSpec(Spec):
    """A model behind an endpoint that speaks the OpenAI chat protocol. Prices are in USD per million tokens."""

    model: str
    base_url: str = Field(default=OPENAI, description="of the endpoint: OpenAI, Azure, vLLM, a local server ...")
    query: dict[str, str] = Field(default_factory=dict, description="added to every URL, e.g. Azure's api-version")
    key_env: str = Field(default="OPENAI_API_KEY", description="the environment variable that holds the key")
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=1024, ge=16, description="the longest reply")
    structured: Literal["auto", "on", "off"] = Field(
        default="auto", description="ask for JSON of a fixed schema; auto: where the endpoint supports it"
    )
    asks: int = Field(default=3, ge=1, description="how often a question is asked until its reply can be read")
    retries: int = Field(default=6, ge=0, description="after 429, 5xx, timeouts and cut connections")
    timeout: float = Field(default=120.0, gt=0, description="seconds for one reply")
    concurrency: int = Field(default=8, ge=1, description="questions under way at once")
    price_in: float | None = Field(default=None, ge=0)
    price_out: float | None = Field(default=None, ge=0)
    budget_usd: float | None = Field(default=None, gt=0)
    budget_tokens: int | None = Field(default=None, gt=0)
    repeats: int = Field(default=0, ge=0, description="questions of each suite asked twice, for the calibration table")
    verdicts: str | None = Field(
        default=None, description="a .jsonl file of reference verdicts: setting, suite, id, answer"
    )
    suites: dict[str, dict[str, Any]] = Field(default_factory=dict, description="what each suite is judged by")

    def check(self) -> None:
        """Raise ConfigError for a budget that cannot be kept, and for a key in the URL."""
        check_url("the judge's", self.base_url, self.key_env, self.query)
        if self.budget_usd is not None and (self.price_in is None or self.price_out is None):
            raise ConfigError(
                f"a budget of {self.budget_usd:g} USD for '{self.model}' without its prices.",
                "Give what the endpoint asks per million tokens: price_in and price_out, or --price 2.5,10.",
            )

    def key(self) -> str:
        """The API key, from the environment alone. Endpoints other than OpenAI's may want none."""
        key = os.environ.get(self.key_env, "")
        if not key and self.base_url == OPENAI:
            raise ConfigError(
                f"the environment variable {self.key_env} is not set.",
                f"{OPENAI} wants a key. For a server of your own, give --base-url, e.g. http://localhost:8000/v1.",
            )
        return key or "none"

    def identity(self) -> dict[str, Any]:
        """What decides a reply, besides the question."""
        return {
            "model": self.model,
            "base_url": self.base_url,
            "query": self.query,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "structured": self.structured,
        }

    def usd(self, prompt_tokens: int, output_tokens: int) -> float | None:
        if self.price_in is None or self.price_out is None:
            return None
        return (prompt_tokens * self.price_in + output_tokens * self.price_out) / 1e6
