"""Where the time of traced steps went: GPU kernels by kind, and the time in which none ran.

    python -m benchmarks.trace runs/notus/profile/trace-0.json.gz    # written by train.py --profile

Kernels are told apart by name. Those of several streams may run at once, so the kinds may sum to
more than the step. A trace of the CPU has no kernels: it is read as matrix products and copies.
"""

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

KINDS = {  # the first that matches
    "attention": "flex|flash|fmha",
    "products": "gemm|nvjet|cutlass|xmma|aten::(mm|addmm|bmm)$",
    "head": "partial_statistics|merge_kernel|logit_gradient",
    "communication": "nccl",
    "fused": "^triton_",
    "optimizer": "adam|multi_tensor",
    "copies": "memcpy|copy|cat",
    "other": "",
}
ON_CPU = ("aten::mm", "aten::addmm", "aten::bmm", "aten::copy_")  # none of them calls another


def summarize_trace(path: Path) -> dict[str, Any]:
    """Seconds of all traced steps, by kind, and idle; "words": the same for people.

    path: a Chrome trace of torch.profiler, compressed by gzip.
    """
    with gzip.open(path) as handle:
        events = [event for event in json.load(handle)["traceEvents"] if event.get("ph") == "X"]
    steps = sum(e["dur"] for e in events if re.match(r"ProfilerStep#\d+$", e["name"])) / 1e6
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels = kernels or [event for event in events if event["name"] in ON_CPU]
    by_kind = dict.fromkeys(KINDS, 0.0)
    busy = end = 0.0
    for event in sorted(kernels, key=lambda event: event["ts"]):
        kind = next(k for k, names in KINDS.items() if re.search(names, event["name"], re.I))
        by_kind[kind] += event["dur"] / 1e6
        stop = event["ts"] + event["dur"]
        busy += max(0.0, stop - max(end, event["ts"])) / 1e6
        end = max(end, stop)
    found = {"step": steps} | by_kind | {"idle": steps - busy}
    shares = [f"{name} {value / steps:.1%}" for name, value in list(found.items())[1:] if value]
    return found | {"words": f"{steps:.3f} s: {', '.join(shares)}"}


if __name__ == "__main__":
    print(summarize_trace(Path(sys.argv[1]))["words"])
