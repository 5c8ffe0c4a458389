"""How much memory a model takes: run in a process of its own, which loads a checkpoint, answers once and says so.

python -m kick.lm.footprint '{"path": ..., "dtype": ..., "device": ..., "prompt": ..., "new_tokens": ...}'
"""

import json
import sys
from pathlib import Path
from typing import Any

from kick.lm import generate, load_lm
from kick.lm.spec import LMSpec
from kick.meter import Meter


def footprint(request: dict[str, Any]) -> int:
    """Peak bytes: resident memory of the process on a CPU, allocated memory on CUDA."""
    with Meter(request["device"]) as meter:
        lm = load_lm(LMSpec(), Path(request["path"]), request["dtype"], request["device"])
        generate(lm, [request["prompt"]], [], request["new_tokens"], min_new_tokens=request["new_tokens"])
    return meter.peak_bytes


if __name__ == "__main__":
    print(json.dumps({"peak_bytes": footprint(json.loads(sys.argv[1]))}))
