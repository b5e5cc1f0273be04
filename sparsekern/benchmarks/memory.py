"""Peak memory of one call beyond what was allocated before it.

Two figures, because neither tells all. `allocated`: torch's allocations and releases in order,
exact, but blind to what native code takes by itself, large outputs among it. `resident`: how far
the resident set rose, which sees everything the call touched for the first time (Linux only), in
whole pages and without what the C library could take from memory freed earlier.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import sparsekern

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak of a call; None where this machine cannot tell."""

    allocated: int | None
    resident: int | None


def peak(call: Callable[[], object], device: str) -> Peak:
    """Peak extra memory of a call that has run before (its one-time costs are paid)."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return Peak(torch.cuda.max_memory_allocated() - before, None)
    return Peak(_allocated(call), _resident(call))


def _allocated(call: Callable[[], object]) -> int | None:
    """Return the highest running sum of torch's allocations (positive) and releases (negative)."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports on stderr that it starts
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    if not events:
        return None
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def _resident(call: Callable[[], object]) -> int | None:
    """How far the resident set's high-water mark rises above where it stood."""
    try:
        # Outputs of earlier calls whose memory is kept would not be counted.
        sparsekern.empty_cache()
        CLEAR.write_text("5")  # resets the high-water mark to the present size
        before = _kilobytes("VmRSS")
        result = call()
        after = _kilobytes("VmHWM")
    except OSError:
        return None
    del result
    return max(after - before, 0) * 1024


def _kilobytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS} has no {field}")
    return int(found[1])
