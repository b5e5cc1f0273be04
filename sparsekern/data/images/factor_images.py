"""What the image data sets with known factors have in common.

:class:`FactorImages` holds images with their factors, draws, reads and saves them. A data set adds
what a combination of factors looks like and how the fields of its files are called.
"""

from __future__ import annotations

import os
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

from ..._system import sync
from ..errors import DataError
from ..hdf5 import DAMAGE, one_line
from . import files as image_files
from .factors import Factors, check_count, check_seed, gather, subset
from .files import NPZ, Column, Fields

if TYPE_CHECKING:
    from typing_extensions import Self

Reader = image_files.NpzFields | image_files.Hdf5Fields


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Run torch's operations on the CPU in the calling thread alone.

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
        """Draw uint8 ``[n, *image_shape]`` of valid classes int64 ``[n, f]``, on their device."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.images)

    @property
    def values(self) -> np.ndarray:
        """Factor values, float64 ``[n, f]``."""
        return self.factors.values_of(self.classes)

    def split(self, *sizes: int) -> tuple[Self, ...]:
        """Split off consecutive, disjoint parts of the given sizes, from the front.

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
        """Write the published fields but for metadata, compressed; ``load`` reads them back.

        Args:
            path: the file, replaced if it exists; see :attr:`fields` for the suffixes.

        Raises:
            ValueError: the suffix is another.
            DataError: the file cannot be written; one that was there is left as it was.
        """
        path, function = Path(path), f"{type(self).__name__}.save"
        kind = self.checked_suffix(function, path)
        images = Column(self.images.shape, self.images.dtype, [self.images])
        arrays = self.arrays(kind, images, lambda: [self.classes])
        temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
        try:
            image_files.pack(temporary, kind, arrays, None)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        # RuntimeError: what HDF5 raises when it cannot write as it closes a file.
        except (OSError, RuntimeError) as error:
            raise DataError(f"{function}: cannot write {path}: {one_line(error)}") from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def checked_suffix(cls, function: str, path: Path) -> str:
        """Tell the kind of file that a path names; ValueError if the set has no such files."""
        kind = image_files.suffix_kind(path)
        if kind not in cls.fields:
            known = ".npz, .h5 or .hdf5" if NPZ in cls.fields else ".h5 or .hdf5"
            raise ValueError(f"{function}: path must end in {known}, got {path}")
        return kind

    @classmethod
    def arrays(
        cls, kind: str, images: Column, classes: Callable[[], Iterable[np.ndarray]]
    ) -> dict[str, Column]:
        """Name the arrays of a file; classes come in blocks ``[b, f]``.

        Args:
            kind: NPZ or HDF5.
            images: uint8 ``[n, *image_shape]``.
            classes: makes int64 blocks ``[b, f]``.
        """
        fields, shape = cls.fields[kind], (images.shape[0], len(cls.factors.names))
        columns = {fields.images: images}
        if fields.values is not None:
            values = (cls.factors.values_of(block) for block in classes())
            columns[fields.values] = Column(shape, np.dtype(np.float64), values)
        if fields.classes is not None:
            columns[fields.classes] = Column(shape, np.dtype(np.int64), classes())
        return columns

    @classmethod
    def render(cls, classes: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Draw the images uint8 ``[..., *image_shape]`` of classes ``[..., f]``; see the sets."""
        as_tensor = isinstance(classes, Tensor)
        numbers = cls.factors.checked("render", classes if as_tensor else np.asarray(classes))
        with torch.no_grad(), _one_thread(numbers.device):
            images = cls.draw(numbers.reshape(-1, numbers.shape[-1]))
        images = images.view(*numbers.shape[:-1], *cls.image_shape)
        return images if as_tensor else images.numpy()

    @classmethod
    def rendered(cls, count: int | None, seed: int) -> Self:
        """Draw a random subset of the images, or all of them; see the sets."""
        indices = subset("rendered", cls.factors.count, count, seed)
        classes = cls.factors.classes_of(
            np.arange(cls.factors.count) if indices is None else indices
        )
        source = f"rendered {cls.title}-compatible images (calibrated)"
        return cls(np.asarray(cls.render(classes)), classes, source)

    @classmethod
    def load(cls, path: str | Path, count: int | None, seed: int) -> Self:
        """Read images from a file, or a random subset of them; see the sets."""
        path = Path(path)
        check_seed("load", seed)
        with cls._opened(path) as (reader, fields):
            return cls._read(path, reader, fields, count, seed)

    @classmethod
    def check(cls, path: str | Path, count: int | None = None) -> None:
        """Check everything but the images themselves, which is quick.

        Args:
            path: the file.
            count: images that will be asked for.

        Raises:
            DataError: the file is missing, damaged, laid out otherwise, or has too few images.
        """
        path = Path(path)
        with cls._opened(path) as (reader, fields):
            (available, *_), _ = cls._images_header(path, reader, fields)
            if count is not None:
                check_count(f"data file {path}", available, count)
            cls._classes(path, reader, fields, available, None)

    @classmethod
    @contextmanager
    def _opened(cls, path: Path) -> Iterator[tuple[Reader, Fields]]:
        """Open the file; whatever goes wrong with it becomes a DataError."""
        if not path.is_file():
            raise DataError(f"data file not found: {path}")
        another = f"data file has another layout: {path}"
        try:
            kind = image_files.kind_of(path)
            if kind is None or kind not in cls.fields:
                rule = "neither .npz nor HDF5" if NPZ in cls.fields else "not HDF5"
                raise DataError(f"{another} is {rule}")
            with image_files.READERS[kind](path) as reader:
                yield reader, cls.fields[kind]
        except KeyError as error:
            raise DataError(f"{another} has no field {error}") from error
        except (DataError, ModuleNotFoundError):
            raise
        # RuntimeError also: an archive that is encrypted or packed in an unknown way.
        except (*DAMAGE, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(
                f"data file is truncated or damaged: {path} ({one_line(error)})"
            ) from error

    @classmethod
    def _images_header(
        cls, path: Path, reader: Reader, fields: Fields
    ) -> tuple[tuple[int, ...], np.dtype]:
        """Read shape and dtype of the images, and check them."""
        shape, dtype = reader.header(fields.images)
        if shape[1:] != cls.image_shape or dtype != np.uint8:
            sides = ", ".join(map(str, cls.image_shape))
            raise DataError(
                f"data file has another layout: {path}: {fields.images} must be uint8 "
                f"[n, {sides}], got {dtype} {list(shape)}"
            )
        return shape, dtype

    @classmethod
    def _read(
        cls, path: Path, reader: Reader, fields: Fields, count: int | None, seed: int
    ) -> Self:
        shape, dtype = cls._images_header(path, reader, fields)
        wanted = subset(f"data file {path}", shape[0], count, seed)
        classes = cls._classes(path, reader, fields, shape[0], wanted)
        images = gather(reader.blocks(fields.images), wanted, shape, dtype)
        if images.size and images.max() > cls.largest:
            raise DataError(
                f"data file has another layout: {path}: {fields.images} must hold 0 and 1, got "
                f"{images.max()}"
            )
        return cls(images, classes, str(path))

    @classmethod
    def _classes(
        cls, path: Path, reader: Reader, fields: Fields, count: int, wanted: np.ndarray | None
    ) -> np.ndarray:
        """Read the classes int64 [w, f] of the wanted ones of `count` images, or of all."""
        another = f"data file has another layout: {path}: "
        # The classes where the file holds them: they need no rounding.
        name = fields.classes or fields.values
        assert name is not None
        shape, dtype = reader.header(name)
        expected = (count, len(cls.factors.names))
        kind_codes, kind_name = ("iu", "integers") if fields.classes else ("f", "floats")
        if shape != expected or dtype.kind not in kind_codes:
            raise DataError(
                f"{another}{name} must be {kind_name} {list(expected)}, got {dtype} {list(shape)}"
            )
        classes = gather(reader.blocks(name), wanted, shape, dtype)
        if fields.classes is None:
            classes = cls.factors.nearest(classes, f"{another}{name}")
        elif ((classes < 0) | (classes >= np.array(cls.factors.sizes))).any():
            raise DataError(f"{another}{name} must lie below {list(cls.factors.sizes)}")
        return classes.astype(np.int64, copy=False)
