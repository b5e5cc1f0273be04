"""What screening of the encoder saves, and what it could at most: results/screening-speed.json.

    python bench/screening_speed.py [--activations FILE] [--rounds 3]

Encoders in turn with torch's float32 layer, and with the product in bfloat16 alone, of rows that
are rounded already: no screening can take less time. With FILE, a file of the activation store
(real_activations.py makes one), `sparsekern train sae` runs on it for an epoch, with screening and
without, in turn. Nothing else shall run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pages
import torch
from measuring.checkout import RESULTS, sparsekern

from sparsekern._system import replaced

NAME = "screening-speed.json"
MANY_ROWS = ((1024, 768, 16384, 32), (128, 768, 131072, 64), (512, 2048, 32768, 64))
FEW_ROWS = ((1, 768, 65536, 64), (8, 768, 65536, 64), (32, 768, 65536, 64))
REPEATS = 15
TRAINED_LATENTS, K, BATCH = (6144, 16384), 32, 2048


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--activations", type=Path, help="file of activations")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    with torch.no_grad():
        encoders = [encoder(*size) for size in MANY_ROWS + FEW_ROWS]
    found = {
        "encoders": encoders,
        "training": training(options) if options.activations else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    with replaced(options.results / NAME) as file:
        file.write((json.dumps(found, indent=1) + "\n").encode())
    if options.results == RESULTS:
        pages.main([])


def encoder(rows: int, d: int, n: int, k: int) -> dict:
    """Milliseconds of an encoder's calls; of few rows with a copy of the weight that is kept."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, d), torch.randn(n, d) / d**0.5, torch.randn(n) / 10
    few = rows <= FEW_ROWS[-1][0]
    kept = sparsekern.keep_rounded(weight) if few else None
    rounded_x, rounded_weight = x.bfloat16(), weight.bfloat16()
    scores = torch.empty(rows, n, dtype=torch.bfloat16)
    calls = {
        "F.linear": lambda: torch.nn.functional.linear(x, weight, bias),
        "F.linear, topk": lambda: torch.nn.functional.linear(x, weight, bias).topk(k),
        "product alone": lambda: torch.mm(rounded_x, rounded_weight.t(), out=scores),
        "linear_topk": lambda: sparsekern.linear_topk(x, weight, bias, k),
    }
    times = in_turn(calls)
    if kept is not None:
        kept.release()
    return {"rows": rows, "d": d, "n": n, "k": k, "kept copy": few, "milliseconds": times}


def in_turn(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of calls that take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(REPEATS + 2):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if repeat >= 2:
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(numbers) for name, numbers in times.items()}


def training(options: argparse.Namespace) -> list[dict]:
    """Tokens per second and fraction of variance unexplained of runs with and without screening."""
    found = []
    for latents in TRAINED_LATENTS:
        runs: dict[str, list[dict]] = {"with": [], "without": []}
        for seed in range(options.rounds):
            for name, asked in (("with", "1"), ("without", "0")):
                runs[name].append(trained(options.activations, latents, seed, asked))
        found.append({
            "latents": latents, "k": K, "rows": BATCH,
            **{
                key: {name: [run[key] for run in of] for name, of in runs.items()}
                for key in ("tokens_per_second", "fvu")
            },
        })  # fmt: skip
    return found


def trained(file: Path, latents: int, seed: int, screening: str) -> dict:
    """The results of one run."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "train", "sae", "--activations", file, "--out", f"{folder}/run", "--latents", latents,
            "--k", K, "--batch-size", BATCH, "--epochs", 1, "--seed", seed, "--no-progress",
        ]  # fmt: skip
        subprocess.run(
            [sys.executable, "-m", "sparsekern", *map(str, words)],
            check=True, stdout=subprocess.DEVNULL,
            env={**os.environ, "SPARSEKERN_SCREENING": screening},
        )  # fmt: skip
        results: dict = json.loads(Path(folder, "run", "results.json").read_text())
    return results


if __name__ == "__main__":
    main()
