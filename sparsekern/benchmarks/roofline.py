"""What this machine can do at most, measured in the session that measures the kernels.

copy: bytes read plus written by a large copy. read: bytes read by a large sum. product:
floating-point operations of a large matrix product, per dtype.
"""

from __future__ import annotations

import functools
import json
import sys

import torch

from .timing import Effort, Subject, interleave

# Larger than any cache; a GPU needs more to reach its rate.
BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
PRODUCT = {"cpu": (2048, ("float32",)), "cuda": (8192, ("float32", "bfloat16"))}
EFFORT = Effort(seconds=1.0, least=5, most=50)


def _bandwidths(device: str) -> dict[str, float]:
    source = torch.ones(BYTES[device] // 4, device=device)
    target = torch.zeros_like(source)
    copy = Subject("copy", functools.partial(target.copy_, source))
    timings = interleave([copy, Subject("read", source.sum)], device, EFFORT)
    moved = {"copy": 2 * BYTES[device], "read": BYTES[device]}
    return {name: moved[name] / timings[name].median_ms / 1e6 for name in moved}


@functools.cache
def roofline(device: str) -> dict[str, float]:
    """GB/s of `copy` and `read`, TFLOP/s of `product <dtype>`, rounded."""
    rates = _bandwidths(device)
    size, dtypes = PRODUCT[device]
    for dtype in dtypes:
        a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        b = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        timing = interleave([Subject("product", functools.partial(torch.mm, a, b))], device, EFFORT)
        rates[f"product {dtype}"] = 2 * size**3 / timing["product"].median_ms / 1e9
    return {name: float(f"{rate:.4g}") for name, rate in rates.items()}


if __name__ == "__main__":
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    figures = {device: roofline(device) for device in devices}
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
