"""Finds sparsekern: the installed package, else the source tree that these benchmarks lie in.

`PYTHONPATH=.` from the repository root makes the source tree win over an installed package.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"

sys.path.append(str(ROOT))

sparsekern = importlib.import_module("sparsekern")
testing = importlib.import_module("sparsekern.testing")
