"""What the synthetic preset recovers, trained by one, two and four processes.

    python bench/several_recoveries.py --runs FOLDER    writes results/several-recoveries.json

Each run is `sparsekern train sae --preset synthetic`, under torchrun where it has more than one
process, with one thread each, on the same file that `sparsekern data activations synthetic` makes.
Data and runs lie in FOLDER; a run that was interrupted goes on, and a finished one is only read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from measuring.checkout import RESULTS, sparsekern

from sparsekern._system import replaced

NAME = "several-recoveries.json"
COUNTS = (1, 2, 4)
MEASURED = ("recovered", "fvu", "l0", "dead", "cosine", "steps", "tokens")


def train(count: int, tokens: Path, folder: Path) -> dict[str, Any]:
    """Train in so many processes, or go on; return what the run measured at its end."""
    results = folder / "results.json"
    if not results.exists():
        words = ["-m", "sparsekern", "train", "sae", "--no-progress"]
        if count > 1:
            launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            words = ["-m", *launcher, *words]
        if (folder / "config.json").exists():
            words += ["--resume", str(folder)]
        else:
            words += ["--activations", str(tokens), "--preset", "synthetic", "--out", str(folder)]
        threads = {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *words], check=True, env=os.environ | threads)
    measured = json.loads(results.read_text())
    return {"processes": count, **{name: measured[name] for name in MEASURED}}


def main() -> None:
    """Train, and write what was recovered."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    tokens = options.runs / "tokens.h5"
    if not tokens.exists():
        words = ["data", "activations", "synthetic", "--out", str(tokens)]
        subprocess.run([sys.executable, "-m", "sparsekern", *words], check=True)
    rows = [train(count, tokens, options.runs / f"processes-{count}") for count in COUNTS]
    result = {"torch": torch.__version__, "sparsekern": sparsekern.__version__, "runs": rows}
    with replaced(options.results / NAME) as file:
        file.write(json.dumps(result, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
