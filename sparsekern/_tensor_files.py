"""Tensors in safetensors files, written and read one at a time.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of a header, the
header in JSON, and the tensors without gaps. The package of that name serialises all tensors into
one block of memory, twice; these functions need memory for one tensor at most.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
# Elements of a tensor that are put in order together.
_PART = 1 << 20


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Args:
        file: open for writing, empty.
        tensors: any shape, device and layout in memory; two may share theirs, each is written.
            Those of a `TensorsOfFile` are asked for once each, as `in_order` has them.
        metadata: kept in the header.

    Raises:
        ValueError: a tensor has a dtype that the format lacks.
    """
    order = in_order(tensors)
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        shape, dtype = shape_and_dtype(tensors, name)
        if dtype not in _NAMES:
            raise ValueError(f"write_tensors: {name} has a dtype without a name: {dtype}")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH)
    file.write(len(text).to_bytes(_LENGTH, "little"))
    file.write(text)
    for name in order:
        tensor = tensors[name].detach().to("cpu")
        if tensor.numel():
            # No copy of what lies on the CPU in one piece, and of others a part at a time.
            rows = len(tensor) if tensor.dim() else 1
            rows = rows if tensor.is_contiguous() else max(1, rows * _PART // tensor.numel())
            for part in tensor.split(rows) if tensor.dim() else (tensor,):
                file.write(part.contiguous().view(-1).view(torch.uint8).numpy().data)


def in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names in the order of a file.

    The widest dtype comes first: every tensor begins at a multiple of its elements' size.
    """
    return sorted(tensors, key=lambda name: (-shape_and_dtype(tensors, name)[1].itemsize, name))


def shape_and_dtype(tensors: Mapping[str, Tensor], name: str) -> tuple[list[int], torch.dtype]:
    """Look up shape and dtype, without asking for a tensor that is not there yet."""
    if isinstance(tensors, TensorsOfFile):
        return tensors.shape(name), tensors.dtype(name)
    return list(tensors[name].shape), tensors[name].dtype


class Entry(NamedTuple):
    """Where a tensor lies in a file.

    kind: its dtype as the format names it. start, stop: its first byte of the file, and the one
    after its last.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(stream: BinaryIO) -> tuple[dict[str, str], dict[str, Entry]]:
    """Read metadata and entries of a safetensors file, and check that the tensors fill it.

    Args:
        stream: the whole file, which can be sought.

    Raises:
        ValueError: it is truncated, damaged or of another format; also where a kind is in `DTYPES`
            and its tensor has another number of bytes.
    """
    size = stream.seek(0, 2)
    stream.seek(0)
    length = int.from_bytes(stream.read(_LENGTH), "little")
    if not 2 <= length <= min(size - _LENGTH, _LARGEST_HEADER):
        raise ValueError(
            f"its header claims {length} bytes, the file has {size}: it is truncated or no "
            "safetensors file"
        )
    text = stream.read(length)
    while len(text) < length:  # an unbuffered stream may return less
        if not (more := stream.read(length - len(text))):
            raise ValueError("it was truncated while it was read")
        text += more
    header = json.loads(text, object_pairs_hook=_unique_keys)
    if not isinstance(header, dict) or not isinstance(header.get(_METADATA, {}), dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop(_METADATA, {})
    first = _LENGTH + length
    entries = {name: _checked_entry(name, entry, first) for name, entry in header.items()}
    end = first
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != end:
            raise ValueError(f"bytes {end} to {entry.start} belong to no tensor, or to two")
        end = entry.stop
    if end != size:
        raise ValueError(
            f"its tensors end at byte {end}, the file at {size}: it is truncated, or longer than "
            "its header says"
        )
    return metadata, entries


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("its header names something twice")
    return unique


def _checked_entry(name: str, entry: Any, first: int) -> Entry:
    """Check an entry of the header; tensors begin at byte ``first``."""
    try:
        kind, (*shape,), (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        intact = isinstance(kind, str) and start <= stop
        intact = intact and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        intact = False
    if not intact:
        raise ValueError(f"its entry of {name!r} is {entry}")
    if kind in DTYPES and stop - start != math.prod(shape) * DTYPES[kind].itemsize:
        raise ValueError(f"{name!r} is {kind} {shape} in {stop - start} bytes")
    return Entry(kind, tuple(shape), first + start, first + stop)


class TensorsOfFile(Mapping[str, Tensor]):
    """The tensors of a file, by name; each is read when it is asked for, to the CPU."""

    @abstractmethod
    def shape(self, name: str) -> list[int]:
        """Look up the shape of a tensor, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Look up the dtype of a tensor, without reading it."""

    @abstractmethod
    def close(self) -> None:
        """Release the file."""


class SavedTensors(TensorsOfFile):
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
            self.metadata, self._entries = read_header(self._file)
            for name, entry in self._entries.items():
                if entry.kind not in DTYPES:
                    raise ValueError(f"{name!r} has a dtype that is not known: {entry.kind}")
        except (RecursionError, ValueError) as error:
            self._file.close()
            raise ValueError(
                f"{path}: the file must be an intact safetensors file: {error}"
            ) from error
        except BaseException:
            self._file.close()
            raise

    def shape(self, name: str) -> list[int]:
        """Look up the shape of a tensor, without reading it."""
        return list(self._entries[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Look up the dtype of a tensor, without reading it."""
        return DTYPES[self._entries[name].kind]

    def __getitem__(self, name: str) -> Tensor:
        kind, shape, start, stop = self._entries[name]
        tensor = torch.empty(shape, dtype=DTYPES[kind])
        if tensor.numel():
            self._file.seek(start)
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
