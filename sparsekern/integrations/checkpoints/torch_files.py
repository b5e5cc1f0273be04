"""Tensors in the files of torch.save, whose pickles may hold tensors and plain values alone."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..._system import open_plain
from .configs import refuse, shortened
from .contents import WriteFile

# First bytes of a zip archive, which torch.save writes, and of the pickle before version 1.6.
_ZIP = b"PK\x03\x04"
_STARTS = (_ZIP, b"\x80\x02")


def is_torch_file(path: Path) -> bool:
    """Tell whether this is a plain file that begins as torch.save's do."""
    return path.is_file() and _start(path).startswith(_STARTS)


def _start(path: Path) -> bytes:
    with open_plain(path) as file:
        return file.read(4)


def open_torch_file(path: Path) -> dict[str, Any]:
    """Open a torch file that holds a dictionary.

    Its tensors are mapped from the file, which is read where they are: keep copies of them. Files
    from before version 1.6 are read whole.

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged, or holds code or anything else but tensors and plain values.
    """
    mapped = _start(path).startswith(_ZIP)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (
        ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError,
        RuntimeError, TypeError, ValueError, pickle.PickleError,
    ) as error:  # fmt: skip
        # Of a refused pickle torch says first how to run its code.
        reason = shortened(str(error).rpartition("WeightsUnpickler error:")[2].strip())
        reason = reason or type(error).__name__
        raise ValueError(
            f"{path}: the file must be an intact torch file of tensors and plain values (it is "
            f"opened with weights_only=True): {reason}"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        kind = type(content).__name__
        raise ValueError(f"{path}: the file must hold a dictionary with names, got {kind}")
    return content


def tensors_of(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Check that a file holds tensors alone."""
    for name, value in content.items():
        if not isinstance(value, Tensor):
            refuse(path, name, value, "must be a tensor")
    return dict(content)


def torch_file(tensors: Mapping[str, Tensor], others: Mapping[str, Any] | None = None) -> WriteFile:
    """Make what writes a state_dict.

    Args:
        tensors: any device and layout in memory.
        others: plain values beside them.
    """

    def write(file: BinaryIO) -> None:
        plain: dict[str, Any] = {
            name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()
        }
        try:
            torch.save(plain | dict(others or {}), file)
        except RuntimeError as error:  # torch's, for one where the disk is full
            raise OSError(f"cannot write {file.name}: {shortened(error)}") from error

    return write
