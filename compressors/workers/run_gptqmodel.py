"""One quantisation by GPTQModel, in an interpreter that has it and not kick.

    PYTHON compressors/workers/run_gptqmodel.py JOB.json

JOB names a model directory, a file of calibration tokens [n, s] (safetensors) and what to do; the result goes to the
directory `out` in GPTQ's format, and `out/result.json` tells version, wall and CPU seconds and peak resident bytes of
the compression alone.
"""

import json
import os
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(min(2, os.cpu_count() or 1)))

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file


def main():
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    config = QuantizeConfig(
        bits=int(job["level"]),
        group_size=job["group_size"],
        sym=job["symmetric"],
        desc_act=job["act_order"],
        damp_percent=job["damping"],
    )
    model = GPTQModel.load(job["model"], config, dtype=getattr(torch, job["dtype"]))
    tokens = load_file(job["tokens"])["tokens"]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    start, cpu = time.perf_counter(), time.process_time()
    model.quantize(rows, batch_size=job["batch"])
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    model.save(job["out"])
    result = {"version": version("gptqmodel"), "wall": wall, "cpu": cpu, "peak": peak}
    (Path(job["out"]) / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
