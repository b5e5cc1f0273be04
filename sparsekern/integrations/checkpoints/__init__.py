"""Checkpoints of sparse autoencoders, ours and other libraries': a module for each format.

A format's module has ``NAME``, ``recognises(path)`` and ``read(path)``, and, where its library has
a reader, ``files(checkpoint)``, which makes what to write, by name. None of them imports the
library that it is named after.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..._system import replaced
from . import (
    dictionary_learning,
    gemma_scope,
    openai,
    openmoss,
    overcomplete,
    own,
    qwen_scope,
    sae_lens,
    sparsify,
)
from .contents import Checkpoint, Unstated, WriteFile

__all__ = ["WRITTEN", "Checkpoint", "read", "write"]


class _Format(NamedTuple):
    recognises: Callable[[Path], bool]
    read: Callable[[Path], Checkpoint]


_FORMATS = {
    module.NAME: _Format(module.recognises, module.read)
    # openmoss before sae_lens, whose file of tensors has the same name.
    for module in (
        own, sparsify, openmoss, sae_lens, dictionary_learning, gemma_scope, qwen_scope,
        overcomplete, openai,
    )
}  # fmt: skip
_WRITERS: dict[str, Callable[[Checkpoint], dict[str, WriteFile]]] = {
    module.NAME: module.files
    for module in (own, sparsify, sae_lens, dictionary_learning, openmoss, overcomplete, openai)
}
WRITTEN = tuple(_WRITERS)
"""Names of the formats that can be written."""


def read(path: str | os.PathLike[str], activation: nn.Module | None = None) -> Checkpoint:
    """Read a sparse autoencoder's checkpoint of any known format.

    Args:
        path: its folder, or its one file.
        activation: the layer, for files that do not say it: Qwen-Scope's and overcomplete's.

    Raises:
        FileNotFoundError: there is nothing there.
        OSError: a file cannot be read.
        ValueError: it is of no known format, is damaged, or has a key or an option that
            `SparseAutoencoder` lacks; or its activation is neither in it nor given, or both.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"from_pretrained: path must exist, got {path}")
    name = next((name for name in _FORMATS if _FORMATS[name].recognises(path)), None)
    if name is None:
        raise ValueError(
            f"from_pretrained: path must be a checkpoint of one of {', '.join(_FORMATS)}, "
            f"got {path}"
        )
    try:
        checkpoint = _FORMATS[name].read(path)
    except RecursionError as error:
        raise ValueError(f"{path} is a damaged checkpoint of {name}: {error}") from error
    if isinstance(checkpoint.activation, Unstated) == (activation is None):
        rule = "be given, it is not in" if activation is None else "be None, it is in"
        raise ValueError(
            f"from_pretrained: the activation (or k) must {rule} a checkpoint of {name}, "
            f"got {activation}"
        )
    return replace(checkpoint, activation=activation) if activation else checkpoint


def write(checkpoint: Checkpoint, path: str | os.PathLike[str], to: str = own.NAME) -> None:
    """Write a sparse autoencoder's checkpoint; after an error the destination is as it was.

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
    files = _WRITERS[to](checkpoint)
    made = [new for new in (folder, *folder.parents) if not new.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, write_to in files.items():
            with replaced(folder / name) as file:
                write_to(file)
    except BaseException:
        for name in files:
            (folder / name).unlink(missing_ok=True)
        for new in made:
            new.rmdir()
        raise
