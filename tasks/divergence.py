"""How far a compressed model's next-token distribution moved from the dense one's, over a fixed text.

    kick sweep CONFIG.yaml       with a suite `divergence`

KL(dense || compressed) in nats a token, and the share of positions whose likeliest token is the same. Both models read
the same windows; it sees changes that accuracy hides (Dutta et al., "Accuracy is Not All You Need", arXiv 2407.09141).
Flips of right and wrong answers stand beside every score, whatever the suite.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field

from kick.errors import KickError
from kick.lm import next_token_logprobs
from kick.spec import Spec
from kick.suite import DataSource, Example, Metric, Sample, Suite

from .perplexity import Perplexity


class Divergence(Suite):
    name = "divergence"
    description = "KL to the dense model's next-token distribution, and top-1 agreement, on running text"
    needs_dense = True
    scores_text = True
    metrics = (
        Metric("top1_agreement", value="agree", per="tokens", unit="share of tokens", descriptive=True),
        Metric("kl", value="kl", per="tokens", unit="nats a token", higher_is_better=False, descriptive=True),
    )

    class Params(Spec):
        text: str = Field(default="auto", description="as of the suite perplexity")
        window_bytes: int = Field(default=1024, ge=64, description="size of a window")

    def examples(self, source: DataSource) -> list[Example]:
        return Perplexity(Perplexity.Params(**self.params.model_dump())).examples(source)

    def answer(self, lm: Any, examples: Sequence[Example]) -> Iterator[Sample]:
        raise KickError("the suite 'divergence' needs the dense model beside.", "Ask it in a sweep.")

    def answer_beside(self, lm: Any, dense: Any, examples: Sequence[Example]) -> Iterator[Sample]:
        for example in examples:
            text = example.content["text"]
            expected, given = next_token_logprobs(dense, text), next_token_logprobs(lm, text)
            if expected.shape != given.shape:
                raise KickError(
                    f"distributions of shape {tuple(given.shape)} beside dense ones of {tuple(expected.shape)}.",
                    "Divergence compares models with one vocabulary.",
                )
            kl = (expected.exp() * (expected - given)).sum(dim=1)  # [tokens]
            yield Sample(
                id=example.id,
                group=example.group,
                prompt=text,
                scores={
                    "kl": float(kl.double().sum()),
                    "agree": float((expected.argmax(dim=1) == given.argmax(dim=1)).sum()),
                    "tokens": float(len(kl)),
                },
                n_prompt_tokens=len(kl),
                error=None if bool(kl.isfinite().all()) else "a log-probability is not finite",
            )
