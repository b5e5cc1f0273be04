"""Checkpoints of sparse autoencoders, ours and other libraries': a module for each format.

A format's module has ``NAME``, ``recognises(path)`` and ``read(path)``, and ``write(checkpoint,
folder)`` where its library has a reader. None of them imports the library that it is named after.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import dictionary_learning, gemma_scope, openai, own, sae_lens, sparsify
from .contents import Checkpoint

__all__ = ["WRITTEN", "Checkpoint", "read", "write"]


class _Format(NamedTuple):
    recognises: Callable[[Path], bool]
    read: Callable[[Path], Checkpoint]


_WRITABLE = (own, sparsify, sae_lens, dictionary_learning, openai)
_FORMATS = {
    module.NAME: _Format(module.recognises, module.read)
    # OpenAI's last: an npz file, too, begins as its torch file does.
    for module in (own, sparsify, sae_lens, dictionary_learning, gemma_scope, openai)
}
_WRITERS: dict[str, Callable[[Checkpoint, Path], None]] = {
    module.NAME: module.write for module in _WRITABLE
}
WRITTEN = tuple(_WRITERS)
"""Names of the formats that can be written."""


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a sparse autoencoder's checkpoint of any known format.

    Args:
        path: its folder, or its one file.

    Raises:
        FileNotFoundError: there is nothing there.
        OSError: a file cannot be read.
        ValueError: it is of no known format, is damaged, or has a key or an option that
            `SparseAutoencoder` lacks.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"from_pretrained: path must exist, got {path}")
    for name, known in _FORMATS.items():
        if known.recognises(path):
            try:
                return known.read(path)
            except RecursionError as error:
                raise ValueError(f"{path} is a damaged checkpoint of {name}: {error}") from error
    raise ValueError(
        f"from_pretrained: path must be a checkpoint of one of {', '.join(_FORMATS)}, got {path}"
    )


def write(checkpoint: Checkpoint, path: str | os.PathLike[str], to: str = own.NAME) -> None:
    """Write a sparse autoencoder's checkpoint.

    Args:
        checkpoint: what to write.
        path: a folder, new or empty.
        to: one of `WRITTEN`.

    Raises:
        ValueError: an unknown format, one that cannot express the autoencoder, or a folder that is
            not empty.
        OSError: the folder cannot be written.
    """
    if to not in _WRITERS:
        raise ValueError(f"write: format must be one of {', '.join(_WRITERS)}, got {to!r}")
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"write: path must be a folder, new or empty, got {folder}")
    _WRITERS[to](checkpoint, folder)
