"""Do kick's likelihoods equal those of lm-eval's own HFLM on the same prompts?

    python benchmarks/agree_with_hflm.py --data DIR [--questions 200] [--shots 1] [--model smollm2-135m]

Asks MMLU questions of the dense model through kick's `fast` LM and through stock `HFLM`, and prints the largest
difference of an option's log-likelihood, how many answers differ, and the wall seconds of each. Exit code 1 if a
difference exceeds 1e-3 or an answer differs.
"""

import argparse
import sys
import time

from kick_tasks.mmlu import MMLU
from lm_eval.models.huggingface import HFLM

from kick.lm.fast import FastLM
from kick.loading import load_model, load_tokenizer
from kick.models import fetch, find_source
from kick.suite import DataSource, subset

TOLERANCE = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--shots", type=int, default=1)
    options = parser.parse_args()

    path = fetch(find_source(options.model))
    model, tokenizer = load_model(path, "float32", "cpu"), load_tokenizer(path)
    lms = {"kick": FastLM(model, tokenizer), "HFLM": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)}
    agreed = True
    for form in ("letters", "cloze"):
        suite = MMLU(MMLU.Params(shots=options.shots, format=form))
        examples = subset(suite.examples(DataSource.parse(options.data)), options.questions, None, seed=0)
        answers, seconds = {}, {}
        for name, lm in lms.items():
            start = time.perf_counter()
            answers[name] = [s for batch in suite.batches(examples, 32) for s in suite.answer(lm, batch)]
            seconds[name] = time.perf_counter() - start
        pairs = list(zip(answers["kick"], answers["HFLM"], strict=True))
        largest = max(
            abs(a["loglikelihood"] - b["loglikelihood"])
            for ours, theirs in pairs
            for a, b in zip(ours.choices, theirs.choices, strict=True)
        )
        different = sum(ours.output != theirs.output for ours, theirs in pairs)
        agreed &= largest <= TOLERANCE and different == 0
        print(
            f"{form}: {len(pairs)} questions, {options.shots}-shot: largest difference {largest:.2e}, "
            f"{different} answers differ; kick {seconds['kick']:.0f} s, HFLM {seconds['HFLM']:.0f} s"
        )
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
