"""How fast and how well does kick compress, beside llm-compressor on the same model, text and settings?

    python benchmarks/compress.py --text FILE --held-out FILE --peer PYTHON [--only gptq@4]...

PYTHON is an interpreter that has llmcompressor. Each compression runs alone in a process of its own: kick in its
default precision, kick in float32, and the peer (float32), one after the other. Time and peak resident memory are those
of the compression alone, without imports, loading and saving. Perplexity is kick's, on the first held-out tokens.

Single draws of the calibration rows differ by about one percent in perplexity, so take several (`--seeds 0 1 2 3`).

Prints a line for each run and the ratios, and writes them to --out as JSON; runs that are already there are not
repeated. Linux only.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.resources import files as package_files
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
from kick_compressors.formats import files, quantized
from kick_compressors.formats.build import build
from safetensors.torch import load_file, save_file

from kick import loading, models
from kick.blocks import find_decoder
from kick.calibration import Calibration, CalibrationSpec, draw
from kick.compress import prepare
from kick.meter import Meter
from kick.settings import parse_setting

SETTINGS = ("wanda@0.5", "wanda@2:4", "sparsegpt@0.5", "sparsegpt@2:4", "gptq@4")
GRID = {
    "group_size": 64,
    "symmetric": False,
}  # SmolLM2 came from a grid with groups of 32, which would flatter rounding
BATCH = {"kick": 4, "llm-compressor": 1}  # each one's own default


def run_kick(job: dict) -> None:
    """One compression by kick in this process."""
    setting = parse_setting(job["setting"])
    if setting.compressor == "gptq":
        setting = setting.model_copy(update={"params": GRID})
    (step,) = prepare(setting)
    tokens = load_file(job["tokens"])["tokens"]
    calibration = Calibration(tokens, "benchmark", CalibrationSpec(), job["precision"])
    model = loading.load_model(Path(job["model"]), "float32", "cpu")
    cpu = time.process_time()
    with Meter() as meter:
        model = step.compressor.compress(model, step.level, calibration)
    cpu = time.process_time() - cpu
    model.save_pretrained(job["out"])
    result = {"wall": meter.seconds, "cpu": cpu, "peak": meter.peak_bytes}
    (Path(job["out"]) / "result.json").write_text(json.dumps(result))


def perplexity(path: Path, tokens: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood over rows of `tokens` [n, s], each from its second token on."""
    foreign = files.read(path, allow_pickle=False)
    quantized.unpack_all(foreign)
    model = build(foreign, "float32")
    total = 0.0
    with torch.inference_mode():
        for row in tokens:
            logits = model(row[None], use_cache=False).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return math.exp(total / (tokens.numel() - len(tokens)))


def flops_of_one_pass(path: Path, tokens: int) -> float:
    """Multiply-adds of the blocks' linears, counted double: what a single forward pass cannot do without."""
    decoder = find_decoder(loading.load_model(path, "float32", "cpu"))
    return 2.0 * tokens * sum(linear.weight.numel() for linear in decoder.linears)


def product_speed(dtype: torch.dtype, size: int = 1536, seconds: float = 2.0) -> float:
    """FLOP/s of a plain matrix product on this machine."""
    a, b = torch.randn(4096, size).to(dtype), torch.randn(size, size).to(dtype)
    a @ b
    times, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ b
        times += 1
    return times * 2 * 4096 * size * size / (time.perf_counter() - start)


def jobs_of(setting: str, seed: int, options: argparse.Namespace, work: Path, default: str) -> list[dict]:
    tokens = work / f"calibration-{seed}.safetensors"
    common = {"setting": setting, "seed": seed, "model": str(work / "dense"), "tokens": str(tokens)}
    precisions = (default,) if options.default_precision_only else (default, "float32")
    jobs = [{**common, "by": "kick", "precision": precision} for precision in dict.fromkeys(precisions)]
    if options.peer:
        name, _, level = setting.partition("@")
        peer = {"method": name, "level": level, "dtype": "float32", "batch": BATCH["llm-compressor"]}
        peer |= {"act_order": False, "damping": 0.01}
        jobs.append({**common, **GRID, **peer, "by": "llm-compressor", "precision": "float32"})
    name = f"{setting}-{seed}".replace(":", "of")
    return [{**job, "out": str(work / f"{name}-{job['by']}-{job['precision']}")} for job in jobs]


def carry_out(job: dict, options: argparse.Namespace) -> dict:
    """Run `job` in a process of its own; what it tells is in out/result.json."""
    out = Path(job["out"])
    shutil.rmtree(out, ignore_errors=True)
    request = out.with_suffix(".json")
    request.write_text(json.dumps(job))
    if job["by"] == "kick":
        command = [sys.executable, __file__, "--job", str(request)]
    else:
        command = [options.peer, str(package_files("kick_compressors") / "workers/run_llmcompressor.py"), str(request)]
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{job['by']} failed on {job['setting']}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads((out / "result.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", help="calibration text, as kick's calibration.source")
    parser.add_argument("--held-out", help="text for perplexity")
    parser.add_argument("--peer", help="an interpreter with llmcompressor")
    parser.add_argument("--only", action="append", help="a setting; may be repeated")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="draws of the calibration rows")
    parser.add_argument("--default-precision-only", action="store_true", help="leave kick's float32 run out")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-compress"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        run_kick(json.loads(Path(options.job).read_text()))
        return
    work: Path = options.out
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = prepare_inputs(options, work)
    default = draw(CalibrationSpec(samples=1, sequence_length=8), tokenizer).precision
    held_out = load_file(work / "held-out.safetensors")["tokens"]
    found = json.loads((work / "results.json").read_text()) if (work / "results.json").is_file() else {}
    for setting, seed in product(options.only or SETTINGS, options.seeds):
        for job in jobs_of(setting, seed, options, work, default):
            key = Path(job["out"]).name
            if key not in found:
                found[key] = {**job, **carry_out(job, options), "perplexity": perplexity(Path(job["out"]), held_out)}
                (work / "results.json").write_text(json.dumps(found, indent=1))
            show(found[key])
    bound(work, options, default, found)


def prepare_inputs(options: argparse.Namespace, work: Path) -> object:
    """The dense model in float32 and both texts as tokens, in `work`."""
    source = models.find_source(options.model)
    path = models.fetch(source)
    tokenizer = loading.load_tokenizer(path)
    if not (work / "dense" / "config.json").is_file():
        loading.load_model(path, "float32", "cpu").save_pretrained(work / "dense")
        tokenizer.save_pretrained(work / "dense")
    inputs = [(f"calibration-{seed}", options.text, options.samples, seed) for seed in options.seeds]
    for name, text, samples, seed in [*inputs, ("held-out", options.held_out, 16, 0)]:
        if not (work / f"{name}.safetensors").is_file():
            spec = CalibrationSpec(source=text, samples=samples, sequence_length=options.length, seed=seed)
            save_file({"tokens": draw(spec, tokenizer).tokens}, work / f"{name}.safetensors")
    return tokenizer


def show(run: dict) -> None:
    print(
        f"{run['setting']:14} draw {run['seed']} {run['by']:15} {run['precision']:9} wall {run['wall']:6.1f} s  "
        f"cpu {run['cpu']:6.1f} s  peak {run['peak'] / 2**30:.2f} GiB  perplexity {run['perplexity']:.3f}",
        flush=True,
    )


def bound(work: Path, options: argparse.Namespace, default: str, found: dict) -> None:
    """Ratios, and the share of the time that one forward pass of the blocks needs at the speed of plain products."""
    flops = flops_of_one_pass(work / "dense", options.samples * options.length)
    speeds = {precision: product_speed(getattr(torch, precision)) for precision in (default, "float32")}
    print(f"\n{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for precision, speed in speeds.items():
        print(f"one pass: {flops / 1e12:.2f} TFLOP at {speed / 1e9:.0f} GFLOP/s ({precision}) = {flops / speed:.0f} s")
    peers = {(run["setting"], run["seed"]): run for run in found.values() if run["by"] != "kick"}
    own: dict[tuple[str, str], list[dict]] = {}
    for run in found.values():
        if run["by"] == "kick":
            own.setdefault((run["setting"], run["precision"]), []).append(run)
    for (setting, precision), runs in own.items():
        share = flops / speeds[precision] / mean([run["wall"] for run in runs])
        pairs = [(run, peers[setting, run["seed"]]) for run in runs if (setting, run["seed"]) in peers]
        print(f"{setting} in {precision}: {beside(pairs)}one pass is {share:.0%} of its time")


def beside(pairs: list[tuple[dict, dict]]) -> str:
    """Mean ratios over draws of the calibration rows; perplexity with its standard error."""
    if not pairs:
        return ""
    faster, memory = (mean([a[key] / b[key] for a, b in pairs]) for key in ("wall", "peak"))
    worse = [a["perplexity"] / b["perplexity"] - 1 for a, b in pairs]
    error = f" (standard error {stdev(worse) / len(worse) ** 0.5:.2%}, {len(worse)} draws)" if len(worse) > 1 else ""
    return f"{1 / faster:.2f} times as fast, {memory:.2f} of the memory, perplexity {mean(worse):+.2%}{error}, "


if __name__ == "__main__":
    main()
