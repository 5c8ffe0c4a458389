"""Do the trained compressors do what their papers say, on a real model with little training?

    python benchmarks/train.py --data DIR [--only ast]... [--seeds 3] [--precision bfloat16] [--out train.json]

SmolLM2-135M and the seven domains of RedPajama's sample in DIR (calibration/redpajama to train, ppl/redpajama to
measure). Every arm of a comparison sees the same number of tokens. Prints tables of perplexity over held-out text, mean
and spread over seeds, and writes each run to --out as JSON as it ends; runs that are already there are not repeated.

--check measures nothing: it says in how many seeds of --out each of the papers' claims holds, and exits with 1 where
one does not hold in all of them.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from tempfile import mkdtemp
from typing import Any

import torch
from kick_compressors.training.objective import Objective, mean_loss
from kick_compressors.training.text import document_tokens, find_domains

from kick import loading, models
from kick.calibration import CalibrationSpec, read_documents
from kick.compress import Recipe, compress
from kick.settings import Setting

MODEL = "smollm2-135m"
LENGTH, BATCH = 128, 4
HELD = 12  # sequences of 256 tokens a domain


def arms(data: str, steps: int, precision: str) -> dict[str, dict[str, dict[str, Any]]]:
    """comparison -> arm -> setting."""
    text = {"data": f"{data}/calibration/redpajama"}
    short = {"batch_size": BATCH, "sequence_length": LENGTH, "precision": precision, "checkpoint_every": 10_000}
    ast = {"compressor": "ast", "level": "2:4"}
    trained = {**text, **short, "steps": steps, "learning_rate": 1e-4, "weight_decay": 0.0}
    lora = {**text, **short, "steps": steps // 3, "learning_rate": 1e-3}
    shear = {"compressor": "sheared", "level": "24x384x1024x6"}
    sheared = {
        **text,
        "held_out": 8,  # of the text to train on: the other is what is measured
        "continuing_every": 40,
    }
    stage = {**short, "learning_rate": 5e-4}
    pruning, continuing = {**stage, "steps": steps, "learning_rate": 1e-4, "warmup": 0.1}, {**stage, "steps": steps}
    long = {**stage, "steps": 2 * steps}  # the tokens of both stages
    taylor = ("vector", "element1", "element2", "mixed")
    return {
        "llm_pruner": {
            "dense": {"compressor": "dense"},
            **{
                kind: {"compressor": "llm_pruner", "level": "0.2", "params": {"importance": kind}}
                for kind in (*taylor, "random", "l2")
            },
            **{
                f"{kind}, LoRA": {
                    "compressor": "llm_pruner",
                    "level": "0.2",
                    "params": {"importance": kind},
                    "then": ({"compressor": "tune", "params": lora},),
                }
                for kind in ("element1", "random")
            },
        },
        "ast": {
            "wanda": {"compressor": "wanda", "level": "2:4"},
            "sparsegpt": {"compressor": "sparsegpt", "level": "2:4"},
            "fixed masks, cross-entropy": {
                **ast,
                "params": {**trained, "masks": "fixed", "distillation": 0.0, "decay": "none"},
            },
            "fixed masks of Wanda, cross-entropy": {
                "compressor": "wanda",
                "level": "2:4",
                "then": ({**ast, "params": {**trained, "masks": "fixed", "distillation": 0.0, "decay": "none"}},),
            },
            "fixed masks, distilled": {**ast, "params": {**trained, "masks": "fixed", "decay": "none"}},
            **{
                f"naive but {change}": {**ast, "params": {**trained, **other}}
                for change, other in {
                    "cross-entropy": {"distillation": 0.0},
                    "no decay": {"decay": "none"},
                    "static SR-STE": {"decay": "constant"},
                    "iterative magnitude": {"masks": "iterative", "decay": "none"},
                    "gradual magnitude": {"masks": "gradual", "decay": "none"},
                }.items()
            },
            "naive": {**ast, "params": trained},
            "boosted": {**ast, "params": {**trained, "slorb": 16}},
        },
        "sheared": {
            "random masks": {
                **shear,
                "params": {**sheared, "masks": "random", "pruning": pruning, "continuing": long},
            },
            "learned masks": {
                **shear,
                "params": {**sheared, "pruning_every": 20, "pruning": pruning, "continuing": continuing},
            },
        },
    }


WITHOUT_CHANCE = ("dense", "l2")

CLAIMS = (  # comparison, what loses less, than what
    ("llm_pruner", "element1", "random"),
    ("llm_pruner", "random", "l2"),
    ("llm_pruner", "element1, LoRA", "element1"),
    ("ast", "boosted", "wanda"),
    ("ast", "boosted", "sparsegpt"),
    ("ast", "boosted", "naive"),
    ("ast", "boosted", "fixed masks, cross-entropy"),
    ("ast", "naive", "fixed masks, cross-entropy"),
    ("ast", "naive", "naive but cross-entropy"),
    ("ast", "naive", "naive but static SR-STE"),
    ("ast", "naive", "naive but no decay"),
    ("sheared", "learned masks", "random masks"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="needed to measure")
    parser.add_argument("--only", action="append", choices=["llm_pruner", "ast", "sheared"], default=[])
    parser.add_argument("--arm", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16", help="of the products")
    parser.add_argument("--out", type=Path, default=Path("train.json"))
    parser.add_argument("--check", action="store_true", help="which of the papers' claims hold in --out?")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out.is_file() else []
    if options.check:
        return check(runs)
    for comparison, settings in arms(options.data, options.steps, options.precision).items():
        if options.only and comparison not in options.only:
            continue
        for arm, seed in order(settings, options.seeds):
            key = {
                "comparison": comparison,
                "arm": arm,
                "seed": seed,
                "steps": options.steps,
                "precision": options.precision,
            }
            if any(key.items() <= run.items() for run in runs) or (options.arm and arm not in options.arm):
                continue
            runs.append(key | run(settings[arm], seed, options.data))
            options.out.write_text(json.dumps(runs, indent=1))
            print(f"{comparison} | {arm} | seed {seed} | ppl {runs[-1]['perplexity']:.2f}", flush=True)
        print_table(comparison, runs)
    return 0


def check(runs: list[dict[str, Any]]) -> int:
    """Print each claim with the seeds, of runs in one precision, in which it holds; 1 if one fails anywhere."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for run in runs:
        found.setdefault((run["precision"], run["comparison"], run["arm"]), {})[run["seed"]] = run["perplexity"]
    failed = False
    for precision in dict.fromkeys(run["precision"] for run in runs):
        for comparison, better, worse in CLAIMS:
            ours = found.get((precision, comparison, better), {})
            theirs = found.get((precision, comparison, worse), {})
            if worse in WITHOUT_CHANCE and theirs:  # its one run stands for every seed
                theirs = dict.fromkeys(ours, *theirs.values())
            seeds = sorted(ours.keys() & theirs.keys())
            if seeds:
                held = [seed for seed in seeds if ours[seed] < theirs[seed]]
                print(f"{precision} | {comparison}: {better} < {worse} | in {len(held)} of {len(seeds)} seeds")
                failed = failed or len(held) < len(seeds)
    return int(failed)


def order(settings: dict[str, Any], seeds: int) -> Iterator[tuple[str, int]]:
    """Seed by seed, so that a run that is cut short has compared something; what knows no chance runs once."""
    for seed in range(seeds):
        for arm in settings:
            if seed == 0 or arm not in WITHOUT_CHANCE:
                yield arm, seed


def run(setting: dict[str, Any], seed: int, data: str) -> dict[str, Any]:
    source = models.find_source(MODEL)
    folder = Path(mkdtemp())
    # calibration from the training text; another seed draws another sample of it
    calibration = CalibrationSpec(source=f"{data}/calibration/redpajama", samples=32, sequence_length=512, seed=seed)
    recipe = Recipe.of(source, Setting(**setting, seed=seed), calibration)
    begun = time.perf_counter()
    made = compress(recipe, folder / "made")
    seconds = time.perf_counter() - begun
    losses = domain_losses(folder / "made", data)
    facts = [stage["facts"] for stage in made.record["stages"]]
    shutil.rmtree(folder)
    return {
        "perplexity": math.exp(mean(losses.values())),
        "losses": losses,
        "parameters": made.record["parameters"],
        "sparsity": made.record["sparsity"],
        "seconds": seconds,
        "facts": facts,
    }


def domain_losses(path: Path, data: str) -> dict[str, float]:
    """Nats per token over text of each domain that is not trained on, in float32."""
    model, tokenizer = loading.load_model(path, "float32", "cpu"), loading.load_tokenizer(path)
    return {
        name: mean_loss(Objective(model).eval(), beginning(source, tokenizer))
        for name, source in find_domains(f"{data}/ppl/redpajama").items()
    }


def beginning(source: str, tokenizer: Any) -> torch.Tensor:
    """[HELD, 256] the first tokens of a domain: what every run is measured on, whatever kick holds out in training."""
    tokens: list[int] = []
    for document in read_documents(source):
        tokens += document_tokens(document, tokenizer)
        if len(tokens) >= HELD * 256:
            break
    return torch.tensor(tokens[: HELD * 256]).reshape(HELD, 256)


def print_table(comparison: str, runs: list[dict[str, Any]]) -> None:
    print(f"\n{comparison}: perplexity, mean over domains of the loss\n")
    print(
        "| arm | products in | seeds | perplexity | spread | parameters | tokens trained | minutes |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    here = [run for run in runs if run["comparison"] == comparison]
    for arm, precision in dict.fromkeys((run["arm"], run["precision"]) for run in here):
        own = [run for run in here if (run["arm"], run["precision"]) == (arm, precision)]
        values = [run["perplexity"] for run in own]
        spread = f"{stdev(values):.2f}" if len(values) > 1 else "–"
        tokens = sum(facts["training"]["tokens"] for facts in own[0]["facts"] if "training" in facts)
        minutes = mean(run["seconds"] for run in own) / 60
        print(
            f"| {arm} | {precision} | {len(own)} | {mean(values):.2f} | {spread} | {own[0]['parameters']:,} "
            f"| {tokens:,} | {minutes:.1f} |"
        )
    print()


if __name__ == "__main__":
    sys.exit(main())
