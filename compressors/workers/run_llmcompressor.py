"""One compression by llm-compressor, in an interpreter that has it and not kick.

    PYTHON compressors/workers/run_llmcompressor.py JOB.json

JOB names a model directory, a file of calibration tokens [n, s] (safetensors) and what to do; the result goes to the
directory `out` in llm-compressor's own format, and `out/result.json` tells version, wall and CPU seconds and peak
resident bytes of the compression alone.
"""

import json
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def modifier(job):
    method, level = job["method"], job["level"]
    if method in ("wanda", "sparsegpt"):
        from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

        kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
        kept, _, of = level.partition(":")
        sparsity = 1 - int(kept) / int(of) if of else float(level)
        # its patterns count the weights that go, kick's those that stay
        structure = f"{int(of) - int(kept)}:{of}" if of else "0:0"
        return kind(sparsity=sparsity, mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"])
    group = job["group_size"]
    weights = {
        "num_bits": int(level),
        "type": "int",
        "symmetric": job["symmetric"],
        **({"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}),
    }
    common = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if method == "rtn":
        from llmcompressor.modifiers.quantization import QuantizationModifier

        return QuantizationModifier(**common)
    if method == "awq":
        from llmcompressor.modifiers.awq import AWQModifier

        return AWQModifier(**common)
    from llmcompressor.modifiers.gptq import GPTQModifier

    return GPTQModifier(**common, actorder="static" if job["act_order"] else None, dampening_frac=job["damping"])


def main():
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    tokens = load_file(job["tokens"])["tokens"]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    start, cpu = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=modifier(job),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
        batch_size=job["batch"],
    )
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    pruned = job["method"] in ("wanda", "sparsegpt")
    model.save_pretrained(job["out"], **({} if pruned else {"save_compressed": True}))
    result = {"version": version("llmcompressor"), "wall": wall, "cpu": cpu, "peak": peak}
    (Path(job["out"]) / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
