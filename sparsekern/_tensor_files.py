"""Tensors in safetensors files, written and read one at a time.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of a header, the
header in JSON, and the tensors without gaps. The package of that name serialises all tensors into
one block of memory, twice; these functions need memory for one tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ._system import open_plain

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64,
    "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = 8
# Of the package; a header beyond it is damage.
_LARGEST_HEADER = 100_000_000
_METADATA = "__metadata__"


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Args:
        file: open for writing, empty.
        tensors: any shape, device and layout in memory; two may share theirs, each is written.
        metadata: kept in the header.

    Raises:
        ValueError: a tensor has a dtype that the format lacks.
    """
    # The widest first: every tensor begins at a multiple of its elements' size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"write_tensors: {name} has a dtype without a name: {tensor.dtype}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH)
    file.write(len(text).to_bytes(_LENGTH, "little"))
    file.write(text)
    for name in order:
        if tensors[name].numel():
            # No copy of what lies on the CPU in one piece already.
            plain = tensors[name].detach().to("cpu").contiguous()
            file.write(plain.view(-1).view(torch.uint8).numpy().data)


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, by name; each is read when it is asked for, to the CPU.

    The file stays open until :meth:`close`, so that the tensors are those of the file that was
    opened, also when it is replaced or removed.

    Raises:
        OSError: there is no such file, or it is no plain file.
        ValueError: it is damaged.

    Attributes:
        metadata: of the header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_plain(path)
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        """Read where each tensor lies, and check that they fill the file."""
        size = self._file.seek(0, 2)
        self._file.seek(0)
        length = int.from_bytes(self._file.read(_LENGTH), "little")
        self._start = _LENGTH + length
        if size < _LENGTH or length > _LARGEST_HEADER or self._start > size:
            raise ValueError(f"{self.path.name} is truncated or no safetensors file")
        header = json.loads(self._file.read(length))
        if not isinstance(header, dict) or not isinstance(header.get(_METADATA, {}), dict):
            raise ValueError(f"{self.path.name} has a header that is no object")
        self.metadata: dict[str, str] = header.pop(_METADATA, {})
        self._entries = {name: self._checked_entry(name, entry) for name, entry in header.items()}
        end = 0
        for _, _, start, stop in sorted(self._entries.values(), key=lambda place: place[2:]):
            if start != end:
                raise ValueError(f"{self.path.name} has tensors with gaps between them")
            end = stop
        if self._start + end != size:
            raise ValueError(f"{self.path.name} is truncated or longer than its header says")

    def _checked_entry(self, name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
        """Check an entry of the header: dtype, shape, first byte and the byte after the last."""
        try:
            dtype, shape, (start, stop) = (
                DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"],
            )  # fmt: skip
            intact = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, stop))
        except (KeyError, TypeError, ValueError):
            intact = False
        if not intact or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{self.path.name} has a damaged header: {name}")
        return dtype, shape, start, stop

    def shape(self, name: str) -> list[int]:
        """Look up the shape of a tensor, without reading it."""
        return self._entries[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """Look up the dtype of a tensor, without reading it."""
        return self._entries[name][0]

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, start, stop = self._entries[name]
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            self._file.seek(self._start + start)
            target = tensor.view(-1).view(torch.uint8).numpy().data
            if self._file.readinto(target) != stop - start:
                raise ValueError(f"{self.path.name} was truncated while it was read")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        """Release the file."""
        self._file.close()
