"""Measures jobs in a process of its own: ``python -m sparsekern.benchmarks.worker``.

Reads a request, a line of JSON, from standard input, and ends when that is closed; writes a line
for each row, the mark and JSON. Whatever else an imported package prints is not a row.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

import torch

from . import peers
from .measure import BUILDERS, SERVED_BY, Comparison, measure
from .timing import Effort, automatic
from .workload import Workload

MARK = "sparsekern row: "


def main() -> int:
    """Measure what the request asks for, until its time is over."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(request["threads"])
    began = time.monotonic()
    for job in request["jobs"]:
        workload = Workload(**job["workload"])
        if time.monotonic() - began > request["limit"]:
            _tell({"left_out": f"{workload}: no time was left"})
            continue
        reasons = [peers.trouble(name) for name in job["others"]]
        if any(reasons):
            _tell({"left_out": f"{', '.join(job['others'])}: {next(filter(None, reasons))}"})
            return 0  # the jobs of a group have the same peer
        effort = Effort(request["seconds"], request["least"])
        backend = automatic(SERVED_BY.get(workload.op, workload.op), workload.device)
        comparisons = [Comparison(backend, name) for name in job["others"]]
        _tell({"begun": str(workload)})
        for row in measure(BUILDERS[workload.op](workload), workload, comparisons, effort):
            _tell(row)
        if workload.device == "cuda":
            torch.cuda.empty_cache()
    return 0


def _end_with_parent() -> None:
    """End this process when the one that asked is gone, and with it the other end of the pipe."""
    sys.stdin.read()
    os._exit(1)


def _tell(message: dict[str, object]) -> None:
    """Write one line for the process that asked."""
    sys.stdout.write(f"{MARK}{json.dumps(message)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
