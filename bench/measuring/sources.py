"""Which sources a row was measured with."""

from __future__ import annotations

import functools
import hashlib
import subprocess

from measuring.checkout import ROOT

SOURCES = ("sparsekern/**/*.py", "csrc/**/*")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@functools.cache
def commit() -> str:
    """The commit of the sources, "+ changes" where they differ from it, or "unknown"."""
    head = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", "sparsekern", "csrc", "setup.py")
    return f"{head} + changes" if head and changed else head or "unknown"


@functools.cache
def sources_digest() -> str:
    """Twelve hex digits over the library's sources: says which code it was without git."""
    digest = hashlib.sha256()
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh"}
    files = {path for pattern in SOURCES for path in ROOT.glob(pattern) if path.suffix in suffixes}
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
