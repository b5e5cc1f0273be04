"""Count the conformance tests that pass on other libraries' models, as they are and accelerated.

    python bench/conformance.py            writes results/conformance.json
    python bench/conformance.py --dry-run

Runs python_tests/integrations/test_conformance.py with the Python that runs this, and keeps what
the file already says of libraries that are not installed here: so it may be run in an environment
for each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from measuring.checkout import RESULTS

ROOT = Path(__file__).resolve().parents[1]
TESTS = "python_tests/integrations/test_conformance.py"
PACKAGES = {
    "TestSAELens": "sae-lens",
    "TestSparsify": "eai-sparsify",
    "TestDictionaryLearning": "dictionary-learning",
    "TestOvercomplete": "overcomplete",
    "TestOpenAI": "a stand-in for OpenAI's sparse_autoencoder",
}


def count() -> dict[str, dict[str, int | str]]:
    """The numbers of tests that passed and failed, by package; those that were skipped are not."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider",
             f"--junitxml={report}", TESTS],
            cwd=ROOT, check=False, stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        cases = ElementTree.parse(report).getroot().iter("testcase")
        found: dict[str, dict[str, int | str]] = defaultdict(lambda: defaultdict(int))
        for case in cases:
            kind = "accelerated" if "accelerated" in str(case.get("name")) else "upstream"
            package = PACKAGES[str(case.get("classname")).rpartition(".")[2]]
            if case.find("skipped") is None:
                bad = case.find("failure") is not None or case.find("error") is not None
                found[package][f"{kind} {'failed' if bad else 'passed'}"] += 1  # type: ignore[operator]
    for package, counts in found.items():
        try:
            counts["version"] = version(package)
        except PackageNotFoundError:
            counts["version"] = "none"
        counts["torch"] = torch.__version__
    return {package: dict(counts) for package, counts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    path = options.results / "conformance.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    text = json.dumps(dict(sorted({**known, **count()}.items())), indent=2) + "\n"
    if not options.dry_run:
        path.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
