"""How much memory a call takes."""

from __future__ import annotations

import tracemalloc

import torch


def memory(function):
    """Bytes that a call takes at most, those of Python and those of torch together."""
    with torch.profiler.profile(profile_memory=True) as profile:
        tracemalloc.start()
        try:
            function()
            python = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return python + most
