"""Writing a rendered image set to one file that is either complete or not there.

Neither HDF5 nor zip survives a kill in the middle of a write, so neither is written until all
images are drawn. Until then a folder ``.<name>.parts`` beside the file holds::

    settings.json   what is being written
    lock            held by the process that writes
    <start>.z       compressed images, start .. start + chunk_rows - 1
    whole           the finished file, about to be moved to its place
    moved           says that it was, should a kill leave the folder behind

A chunk gets its name when it is complete and on the disk, so that after a kill all that bear a name
count, and the rest is drawn again. Packing the chunks into ``whole`` takes about a minute for a
whole set and starts again from the first chunk when it was cut short. The images are a function of
the settings, so a file is the same to the bit however often its writing was interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..._system import lock_file, require, stop_signals, sync
from ..errors import DataError
from . import files as image_files
from .factor_images import FactorImages
from .factors import subset

CHUNK_ROWS = 1024  # 4 MB of dSprites, 13 MB of Shapes3D
LEVEL = 1  # of the chunks, which are soon gone
BLOCK_ROWS = 65536  # of the factors, which are small
SPARE_BYTES = 1 << 20  # what a file holds beside its arrays
SETTINGS, LOCK, WHOLE, MOVED = "settings.json", "lock", "whole", "moved"
# Of this folder's layout and of what the images look like; another number starts anew.
FORMAT = 1


class WritingInterrupted(Exception):  # noqa: N818  # it is no error
    """A signal ended the writing; ``signal`` is its number. The same call goes on."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def write(
    kind: type[FactorImages],
    path: str | Path,
    count: int | None,
    *,
    seed: int,
    chunk_rows: int,
) -> int:
    """Draw a set and write it; see :func:`sparsekern.data.images.dsprites.write`."""
    path, function = Path(path), f"{kind.title.lower()}.write"
    suffix = kind.checked_suffix(function, path)
    if chunk_rows < 1:
        raise ValueError(f"{function}: chunk_rows must be at least 1, got {chunk_rows}")
    indices = subset(function, kind.factors.count, count, seed)
    if indices is None:
        indices, seed = np.arange(kind.factors.count), 0
    if suffix == image_files.HDF5:
        require("h5py", f"writing {path}")
    if not path.parent.is_dir():
        raise DataError(f"{function}: folder not found: {path.parent}")
    settings = {
        "set": kind.title, "images": len(indices), "seed": seed, "chunk_rows": chunk_rows,
        "format": FORMAT,
    }  # fmt: skip
    try:
        _Writer(kind, function, path, suffix, indices, settings).run()
    except OSError as error:
        raise DataError(f"{function}: cannot write {path}: {error}") from error
    return len(indices)


class _Writer:
    """One call of :func:`write`: the set, the file and the images' numbers [n] in order."""

    def __init__(
        self,
        kind: type[FactorImages],
        function: str,
        path: Path,
        suffix: str,
        indices: np.ndarray,
        settings: dict[str, Any],
    ) -> None:
        self.kind, self.function, self.path, self.suffix = kind, function, path, suffix
        self.indices, self.settings = indices, settings
        self.chunk_rows: int = settings["chunk_rows"]
        self.parts = path.with_name(f".{path.name}.parts")
        self.stop: list[int] = []

    def run(self) -> None:
        """Do everything that is still to be done."""
        # Before a folder is made for nothing.
        if self.path.exists() and not self.parts.exists():
            raise self._exists_error()
        with self._hold_lock(), stop_signals() as self.stop:
            if self.path.exists():
                self._keep_finished()
                return
            # Of an earlier file, which was taken away.
            (self.parts / MOVED).unlink(missing_ok=True)
            self._check_settings()
            if not (self.parts / WHOLE).exists():
                self._draw_chunks()
                self._pack()
            self._write_durably(self.parts / MOVED, self._settings_note())
            os.replace(self.parts / WHOLE, self.path)
            sync(self.path.parent)
            self._remove_parts()

    def _exists_error(self) -> DataError:
        return DataError(f"{self.function}: {self.path} exists already (remove it or name another)")

    def _keep_finished(self) -> None:
        """Keep the file that is there if the folder beside it says that it is this one."""
        moved = self.parts / MOVED
        if moved.exists() and not (self.parts / WHOLE).exists():
            same = moved.read_bytes() == self._settings_note()
            self._remove_parts()
            if same:
                return
        elif {path.name for path in self.parts.iterdir()} <= {LOCK}:
            self._remove_parts()
        raise self._exists_error()

    def _settings_note(self) -> bytes:
        return (json.dumps(self.settings) + "\n").encode()

    @contextmanager
    def _hold_lock(self) -> Iterator[None]:
        self.parts.mkdir(exist_ok=True)
        unlock = lock_file(self.parts / LOCK)
        if unlock is None:
            raise DataError(f"{self.function}: another process is writing {self.path}")
        try:
            yield
        finally:
            unlock()

    def _check_settings(self) -> None:
        """Note the settings of a new file, or compare them with those that it was begun with."""
        note = self.parts / SETTINGS
        if not note.exists():
            self._write_durably(note, self._settings_note())
            return
        try:
            begun = json.loads(note.read_text())
            differs = [name for name in self.settings if begun[name] != self.settings[name]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.function}: {self.parts} holds no part of an image set (remove it)"
            ) from error
        if differs:
            name = differs[0]
            raise DataError(
                f"{self.function}: a part of {self.path} was written with {name} "
                f"{begun[name]}, it cannot be completed with {self.settings[name]} (use the same "
                f"settings, or remove {self.parts})"
            )

    def _write_durably(self, path: Path, content: bytes) -> None:
        """Write a file that has its name only when its content is on the disk."""
        temporary = path.with_name("new")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        os.replace(temporary, path)
        sync(path.parent)

    def _chunk_path(self, start: int) -> Path:
        return self.parts / f"{start}.z"

    def _chunk_starts(self, what: str) -> Iterator[int]:
        """Yield where the chunks start, with a progress bar where somebody watches."""
        tqdm = require("tqdm", what).tqdm
        unit = {"unit": " images", "unit_scale": True, "dynamic_ncols": True}
        # disable=None: no bar where nobody watches.
        with tqdm(total=len(self.indices), desc=what, disable=None, **unit) as bar:
            for start in range(0, len(self.indices), self.chunk_rows):
                self._stop_if_asked()
                yield start
                bar.update(min(self.chunk_rows, len(self.indices) - start))

    def _stop_if_asked(self) -> None:
        if self.stop:
            raise WritingInterrupted(
                f"interrupted; what is complete is kept in {self.parts}, and the same command "
                "goes on from there",
                self.stop[0],
            )

    def _draw_chunks(self) -> None:
        for start in self._chunk_starts("rendering"):
            if not self._chunk_path(start).exists():
                self._write_durably(self._chunk_path(start), self._compressed_chunk(start))

    def _compressed_chunk(self, start: int) -> bytes:
        numbers = self.indices[start : start + self.chunk_rows]
        images = np.asarray(self.kind.render(self.kind.factors.classes_of(numbers)))
        return zlib.compress(images.data, LEVEL)

    def _pack(self) -> None:
        """Make the file of the chunks."""
        self._check_space()
        shape = (len(self.indices), *self.kind.image_shape)
        images = image_files.Column(shape, np.dtype(np.uint8), self._read_images())
        arrays = self.kind.arrays(self.suffix, images, self._read_classes)
        temporary = self.parts / "packed"
        try:
            image_files.pack(temporary, self.suffix, arrays, self.kind.metadata)
            self._stop_if_asked()
        except RuntimeError as error:
            # What HDF5 raises when a disk is full as it closes a file.
            temporary.unlink(missing_ok=True)
            raise OSError(str(error)) from error
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(temporary)
        os.replace(temporary, self.parts / WHOLE)
        sync(self.parts)

    def _check_space(self) -> None:
        """Raise OSError where the packed file may not fit: HDF5 can crash on a full disk."""
        factors = 2 * 8 * len(self.kind.factors.names) * len(self.indices)
        # The chunks are packed less tightly than the file will be.
        held = sum(chunk.stat().st_size for chunk in self.parts.glob("*.z"))
        needed, free = held + factors + SPARE_BYTES, shutil.disk_usage(self.parts).free
        if free < needed:
            raise OSError(
                errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: packing needs {needed / 1e6:.0f} MB, "
                f"{free / 1e6:.0f} MB are free",
            )  # fmt: skip

    def _read_classes(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self.indices), BLOCK_ROWS):
            yield self.kind.factors.classes_of(self.indices[start : start + BLOCK_ROWS])

    def _read_images(self) -> Iterator[np.ndarray]:
        for start in self._chunk_starts("packing"):
            chunk = self._chunk_path(start)
            try:
                data = zlib.decompress(chunk.read_bytes())
                yield np.frombuffer(data, np.uint8).reshape(-1, *self.kind.image_shape)
            except (zlib.error, ValueError) as error:
                raise DataError(
                    f"{self.function}: {chunk} is damaged (remove it, and start again)"
                ) from error

    def _remove_parts(self) -> None:
        """Remove the folder; the note that the file is complete goes last."""
        for path in self.parts.iterdir():
            if path.name != MOVED:
                path.unlink(missing_ok=True)
        # Whatever another process puts there now belongs to it.
        shutil.rmtree(self.parts, ignore_errors=True)
