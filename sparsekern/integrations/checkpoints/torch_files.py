"""Tensors in the files of torch.save, whose pickles may hold tensors and plain values alone."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._system import open_plain, replaced


def open_torch_file(path: Path) -> dict[str, Any]:
    """Open a torch file that holds a dictionary.

    Its tensors are mapped from the file, which is read where they are: keep copies of them.

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged, or holds code or anything else but tensors and plain values.
    """
    open_plain(path).close()
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (EOFError, LookupError, OSError, RuntimeError, ValueError, pickle.PickleError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path}: the file must be an intact torch file of tensors and plain values (it is "
            f"opened with weights_only=True): {reason}"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        kind = type(content).__name__
        raise ValueError(f"{path}: the file must hold a dictionary with names, got {kind}")
    return content


def write_torch_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state_dict under a temporary name, and give the file its own."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replaced(path) as file:
        torch.save(plain, file)
