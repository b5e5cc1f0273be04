"""The libraries that can be accelerated, with the versions that the tests ran with."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from torch import nn

from . import dictionary_learning, openai, overcomplete, sae_lens, sparsify
from .replacement import Replacement


class Peer(NamedTuple):
    """A library.

    Attributes:
        module: name of its package in Python.
        package: name under which pip knows it; None if it has no versions.
        oldest, newest: the range of versions in which its methods are known.
        replacements: what is known of its classes.
    """

    module: str
    package: str | None
    oldest: str
    newest: str
    replacements: tuple[Replacement, ...]

    def trouble(self) -> str | None:
        """Return why the installed version cannot be accelerated; None if it can."""
        if self.package is None:
            return None
        try:
            installed = version(self.package)
        except PackageNotFoundError:
            return f"{self.package} has no version that could be read"
        if _numbers(self.oldest) <= _numbers(installed) <= _numbers(self.newest):
            return None
        return f"{self.package} must be {self._range()} (the versions tested), got {installed}"

    def _range(self) -> str:
        return self.oldest if self.oldest == self.newest else f"{self.oldest} to {self.newest}"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text.split("+")[0]))


PEERS = (
    Peer("sae_lens", "sae-lens", "6.44.0", "6.54.12", sae_lens.REPLACEMENTS),
    Peer("sparsify", "eai-sparsify", "1.3.3", "1.3.3", sparsify.REPLACEMENTS),
    Peer(
        "dictionary_learning", "dictionary-learning", "0.1.0", "0.1.0",
        dictionary_learning.REPLACEMENTS,
    ),
    Peer("overcomplete", "overcomplete", "0.3.0", "0.3.0", overcomplete.REPLACEMENTS),
    Peer("sparse_autoencoder", None, "", "", openai.REPLACEMENTS),
)  # fmt: skip


def find(own: type[nn.Module]) -> tuple[Replacement | None, str]:
    """Return what stands in for a class, or None with the reason, empty for unknown libraries."""
    peer = peer_of(own)
    if peer is None:
        return None, ""
    trouble = peer.trouble()
    if trouble is not None:
        return None, trouble
    for base in own.__mro__:
        for replacement in peer.replacements:
            if base is replacement.upstream():
                overridden = _overridden(own, base, replacement)
                if overridden is None:
                    return replacement, ""
                return None, f"{overridden} is its own"
    return None, "no faster form of this class is known"


def peer_of(own: type) -> Peer | None:
    """Return the library whose class a class is, or is derived from."""
    packages = {base.__module__.partition(".")[0] for base in own.__mro__}
    return next((peer for peer in PEERS if peer.module in packages), None)


def _overridden(own: type, base: type, replacement: Replacement) -> str | None:
    """Return the name of a replaced method that a subclass has of its own; None if there is none.

    Own methods come before ours: so the module would stay as slow as it is.
    """
    for name in replacement.replaced:
        if getattr(own, name) is not getattr(base, name):
            return name
    return None
