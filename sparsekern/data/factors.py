"""What the image data sets with known factors have in common.

:class:`Factors` numbers the combinations of the factors, :class:`FactorImages` holds images with
their factors, draws, reads and saves them. A data set adds what a combination looks like and how
the fields of its files are called.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from . import image_files
from .image_files import NPZ, Column, Fields

if TYPE_CHECKING:
    from typing_extensions import Self

VALUE_TOLERANCE = 1e-5  # values in a file may have passed through float32


class DataError(ValueError):
    """A data file is missing, damaged, or not laid out as expected."""


class CountError(DataError):
    """A data set has fewer images than were asked for."""


@dataclass(frozen=True)
class Factors:
    """Factors of variation, each with finitely many values, and the order of their combinations.

    Combination number ``sum(class * bases)``: the last factor changes fastest.

    Attributes:
        names: of the f factors.
        tables: the values of each, float64, by class.
    """

    names: tuple[str, ...]
    tables: tuple[np.ndarray, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of classes of each factor."""
        return tuple(len(table) for table in self.tables)

    @property
    def bases(self) -> np.ndarray:
        """What one class more of each factor adds to the number: int64 ``[f]``."""
        return np.cumprod((1, *self.sizes[:0:-1]))[::-1].copy()

    @property
    def count(self) -> int:
        """Number of combinations."""
        return int(np.prod(self.sizes))

    def classes_of(self, indices: np.ndarray) -> np.ndarray:
        """Classes int64 ``[..., f]`` of combination numbers ``[...]``.

        Raises:
            ValueError: a number is out of range.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= self.count):
            raise ValueError(
                f"classes_of: indices must lie in 0..{self.count - 1}, "
                f"got {indices.min()}..{indices.max()}"
            )
        return np.stack(np.unravel_index(indices, self.sizes), axis=-1).astype(np.int64)

    def index_of(self, classes: np.ndarray) -> np.ndarray:
        """Combination numbers int64 ``[...]`` of classes ``[..., f]``.

        Raises:
            ValueError: the classes are not integers of that shape, or out of range.
        """
        return self.checked("index_of", np.asarray(classes)).numpy() @ self.bases

    def values_of(self, classes: np.ndarray) -> np.ndarray:
        """Values float64 ``[..., f]`` of classes ``[..., f]``; raises as :meth:`index_of`."""
        classes = self.checked("values_of", np.asarray(classes)).numpy()
        return np.stack([table[classes[..., i]] for i, table in enumerate(self.tables)], axis=-1)

    def nearest(self, values: np.ndarray, where: str) -> np.ndarray:
        """Classes int64 ``[n, f]`` of values ``[n, f]`` on evenly spaced tables.

        Raises:
            DataError: a value is not in its table; ``where`` begins the message.
        """
        classes = np.empty(values.shape, np.int64)
        for i, (name, table) in enumerate(zip(self.names, self.tables, strict=True)):
            step = table[1] - table[0] if len(table) > 1 else 1.0
            near = np.nan_to_num(np.rint((values[:, i] - table[0]) / step))
            classes[:, i] = np.clip(near, 0, len(table) - 1)
            wrong = ~(np.abs(values[:, i] - table[classes[:, i]]) <= VALUE_TOLERANCE)
            if wrong.any():
                raise DataError(
                    f"{where} of {name} must lie on {table[0]:g}, {table[1]:g}, ..., "
                    f"{table[-1]:g}, got {values[wrong, i][0]:g}"
                )
        return classes

    def checked(self, function: str, classes: np.ndarray | Tensor) -> Tensor:
        """The classes as int64 ``[..., f]``, of a tensor on its device.

        Raises:
            ValueError: they are not integers ``[..., f]`` below the sizes.
        """
        if isinstance(classes, Tensor):
            kinds = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
            integers = classes.dtype in kinds
        else:
            integers = classes.dtype.kind in "iu"
        if classes.ndim == 0 or classes.shape[-1] != len(self.names) or not integers:
            raise ValueError(
                f"{function}: classes must be integers of shape [..., {len(self.names)}], "
                f"got {str(classes.dtype).removeprefix('torch.')} {list(classes.shape)}"
            )
        if isinstance(classes, Tensor):
            found = classes.long()
        else:
            # A copy, since torch refuses to share memory that is read-only or runs backwards.
            found = torch.from_numpy(np.array(classes, np.int64))
        sizes = torch.tensor(self.sizes, device=found.device)
        if bool(((found < 0) | (found >= sizes)).any()):
            raise ValueError(f"{function}: classes must lie below {list(self.sizes)} per factor")
        return found


def check_seed(function: str, seed: int) -> None:
    """ValueError if the seed is negative."""
    if seed < 0:
        raise ValueError(f"{function}: seed must be at least 0, got {seed}")


def subset(function: str, available: int, count: int | None, seed: int) -> np.ndarray | None:
    """Numbers of a random subset; ``None`` for all. That of n images is the front of n + 1's.

    Raises:
        CountError: count is out of range.
        ValueError: seed is negative.
    """
    check_seed(function, seed)
    if count is None:
        return None
    if not 1 <= count <= available:
        raise CountError(
            f"{function}: count must lie in 1..{available} (the number of images), got {count}"
        )
    return np.random.default_rng(seed).permutation(available)[:count]


def gather(
    blocks: Iterator[np.ndarray],
    wanted: np.ndarray | None,
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> np.ndarray:
    """The wanted rows, in the wanted order, of an array ``shape`` that comes in blocks of rows.

    Memory is needed for the result and one block, also when all rows are wanted.
    """
    out, start = np.empty((shape[0] if wanted is None else len(wanted), *shape[1:]), dtype), 0
    if wanted is not None:
        order = np.argsort(wanted, kind="stable")
        ascending = wanted[order]
    for block in blocks:
        if wanted is None:
            out[start : start + len(block)] = block
        else:
            first, last = np.searchsorted(ascending, [start, start + len(block)])
            out[order[first:last]] = block[ascending[first:last] - start]
        start += len(block)
    return out


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Runs torch's operations on the CPU in the calling thread alone.

    Drawing takes many operations of some 20 us, each on what fits a core's cache. To share those
    out gains nothing, and where another process keeps a core busy, each waits for the slowest.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class FactorImages:
    """Images with their factors; the data sets derive from it.

    Attributes:
        images: uint8 ``[n, 64, 64]`` or ``[n, 64, 64, 3]``.
        classes: int64 ``[n, f]``, one column per factor.
        source: where the images come from, for reports.
    """

    images: np.ndarray
    classes: np.ndarray
    source: str

    title: ClassVar[str]
    factors: ClassVar[Factors]
    image_shape: ClassVar[tuple[int, ...]]
    largest: ClassVar[int]  # value of a pixel
    fields: ClassVar[Mapping[str, Fields]]  # by kind of file
    metadata: ClassVar[Mapping[str, Any]]  # of files that are written whole

    @staticmethod
    def draw(classes: Tensor) -> Tensor:
        """Images uint8 ``[n, *image_shape]`` of valid classes int64 ``[n, f]``, on their device."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.images)

    @property
    def values(self) -> np.ndarray:
        """Factor values, float64 ``[n, f]``."""
        return self.factors.values_of(self.classes)

    def split(self, *sizes: int) -> tuple[Self, ...]:
        """Consecutive, disjoint parts of the given sizes, from the front.

        Raises:
            ValueError: a size is negative, or they add up to more than there is.
        """
        name = type(self).__name__
        if any(size < 0 for size in sizes):
            raise ValueError(f"{name}.split: sizes must be at least 0, got {min(sizes)}")
        if sum(sizes) > len(self):
            raise ValueError(
                f"{name}.split: sizes must add up to at most {len(self)} (the number of images), "
                f"got {' + '.join(map(str, sizes))} = {sum(sizes)}"
            )
        ends = np.cumsum(sizes)
        return tuple(
            type(self)(self.images[end - size : end], self.classes[end - size : end], self.source)
            for size, end in zip(sizes, ends, strict=True)
        )

    def save(self, path: str | Path) -> None:
        """Writes the published fields but for metadata, compressed; ``load`` reads them back.

        Args:
            path: the file, replaced if it exists; see :attr:`fields` for the suffixes.

        Raises:
            ValueError: the suffix is another.
        """
        path = Path(path)
        kind = self.checked_suffix(f"{type(self).__name__}.save", path)
        images = Column(self.images.shape, self.images.dtype, [self.images])
        image_files.pack(path, kind, self.arrays(kind, images, lambda: [self.classes]), None)

    @classmethod
    def checked_suffix(cls, function: str, path: Path) -> str:
        """The kind of file that a path names; ValueError if the set has no such files."""
        kind = image_files.suffix_kind(path)
        if kind not in cls.fields:
            known = ".npz, .h5 or .hdf5" if NPZ in cls.fields else ".h5 or .hdf5"
            raise ValueError(f"{function}: path must end in {known}, got {path}")
        return kind

    @classmethod
    def arrays(
        cls, kind: str, images: Column, classes: Callable[[], Iterable[np.ndarray]]
    ) -> dict[str, Column]:
        """The arrays of a file by name; classes come in blocks ``[b, f]``."""
        fields, shape = cls.fields[kind], (images.shape[0], len(cls.factors.names))
        found = {fields.images: images}
        if fields.values is not None:
            values = (cls.factors.values_of(block) for block in classes())
            found[fields.values] = Column(shape, np.dtype(np.float64), values)
        if fields.classes is not None:
            found[fields.classes] = Column(shape, np.dtype(np.int64), classes())
        return found

    @classmethod
    def render(cls, classes: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Draws the images uint8 ``[..., *image_shape]`` of classes ``[..., f]``; see the sets."""
        as_tensor = isinstance(classes, Tensor)
        found = cls.factors.checked("render", classes if as_tensor else np.asarray(classes))
        with torch.no_grad(), _one_thread(found.device):
            images = cls.draw(found.reshape(-1, found.shape[-1]))
        images = images.view(*found.shape[:-1], *cls.image_shape)
        return images if as_tensor else images.numpy()

    @classmethod
    def rendered(cls, count: int | None, seed: int) -> Self:
        """A random subset of the images, drawn, or all of them; see the sets."""
        indices = subset("rendered", cls.factors.count, count, seed)
        classes = cls.factors.classes_of(
            np.arange(cls.factors.count) if indices is None else indices
        )
        source = f"rendered {cls.title}-compatible images (calibrated)"
        return cls(np.asarray(cls.render(classes)), classes, source)

    @classmethod
    def load(cls, path: str | Path, count: int | None, seed: int) -> Self:
        """Images from a file, or a random subset of them; see the sets."""
        path = Path(path)
        check_seed("load", seed)
        if not path.is_file():
            raise DataError(f"data file not found: {path}")
        another = f"data file has another layout: {path}"
        try:
            kind = image_files.kind_of(path)
            if kind is None or kind not in cls.fields:
                rule = "neither .npz nor HDF5" if NPZ in cls.fields else "not HDF5"
                raise DataError(f"{another} is {rule}")
            with image_files.READERS[kind](path) as reader:
                return cls._read(path, reader, cls.fields[kind], count, seed)
        except KeyError as error:
            raise DataError(f"{another} has no field {error}") from error
        except (DataError, ModuleNotFoundError):
            raise
        # RuntimeError: an archive that is encrypted or packed in an unknown way.
        except (
            OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error
        ) as error:  # fmt: skip
            raise DataError(f"data file is truncated or damaged: {path} ({error})") from error

    @classmethod
    def _read(
        cls,
        path: Path,
        reader: image_files.NpzFields | image_files.Hdf5Fields,
        fields: Fields,
        count: int | None,
        seed: int,
    ) -> Self:
        another = f"data file has another layout: {path}: "
        shape, dtype = reader.header(fields.images)
        # The classes where the file holds them: they need no rounding.
        name = fields.classes or fields.values
        assert name is not None
        factor_shape, factor_dtype = reader.header(name)
        if shape[1:] != cls.image_shape or dtype != np.uint8:
            sides = ", ".join(map(str, cls.image_shape))
            raise DataError(
                f"{another}{fields.images} must be uint8 [n, {sides}], got {dtype} {list(shape)}"
            )
        expected = (shape[0], len(cls.factors.names))
        kinds, said = ("iu", "integers") if fields.classes else ("f", "floats")
        if factor_shape != expected or factor_dtype.kind not in kinds:
            raise DataError(
                f"{another}{name} must be {said} {list(expected)}, "
                f"got {factor_dtype} {list(factor_shape)}"
            )
        wanted = subset(f"data file {path}", shape[0], count, seed)
        classes = gather(reader.blocks(name), wanted, factor_shape, factor_dtype)
        if fields.classes is None:
            classes = cls.factors.nearest(classes, f"{another}{name}")
        elif ((classes < 0) | (classes >= np.array(cls.factors.sizes))).any():
            raise DataError(f"{another}{name} must lie below {list(cls.factors.sizes)}")
        images = gather(reader.blocks(fields.images), wanted, shape, dtype)
        if images.size and images.max() > cls.largest:
            raise DataError(f"{another}{fields.images} must hold 0 and 1, got {images.max()}")
        return cls(images, classes.astype(np.int64, copy=False), str(path))
