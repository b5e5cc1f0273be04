"""Shuffled batches of activations, streamed from files that need not fit in memory.

The rows of all files form one list. It is cut into blocks of neighbouring rows (whole HDF5 chunks,
about 1 MiB). An epoch takes the blocks in a random order and gathers as many as fit
the buffer into a group; the rows of a group are shuffled, and batches are cut from the groups, one
after the other, across their borders. All of it follows from numbers known in advance:

* the order of the blocks, from ``(seed, epoch)``;
* the order of the rows in a group, from ``(seed, epoch, group)``.

So a batch is a pure function of ``(seed, epoch, number of the batch)``, and a training run resumes
exactly from the number of the batch it stopped at: nothing else needs saving. The files and their
order, ``batch_size``, ``buffer_rows``, ``nonfinite``, ``max_norm`` and ``held_out`` have to stay
the same. The order of the rows does not depend on ``batch_size``, ``device``, ``dtype`` or
``prefetch``.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..prefetch import prefetched
from .activation_file import ACTIVATIONS, ActivationFile
from .batching import cut_batches
from .opening import open_activations
from .order import EpochPlan, plan_epoch
from .origins import Origins, origins_of
from .rows import (
    NO_ROWS,
    drop_rows,
    find_unusable_rows,
    held_out_blocks,
    nonfinite_error,
    nonfinite_rows,
)
from .statistics import ActivationStatistics, statistics_of

NONFINITE = ("refuse", "skip")
BATCHES_AHEAD = 2
STATISTICS_ROWS = 4096  # taken together
# Attributes that a pickle keeps beside the names of the files: rows are not looked for again.
_PICKLED = (
    "nonfinite", "max_norm", "features", "dtype", "tokens", "skipped", "outliers", "_left_out",
    "held_out", "_held_out", "_unusable",
)  # fmt: skip


class ActivationStore:
    """Activations ``[tokens, D]`` in one file or many, read as shuffled batches.

    A store can be pickled, for the workers of a DataLoader as well: the copy opens the same files
    by their absolute names. A forked process can use its parent's store; iterators of batches
    belong to the process that made them.

    Args:
        paths: ``.h5``, ``.hdf5``, ``.npy`` or ``.safetensors``; one, or several of one width and
            dtype, which follow each other.
        dataset: name of the dataset in HDF5 files and of the tensor in safetensors files.
        nonfinite: what to do about rows that hold NaN or infinities. ``"refuse"``: an error when
            such a row is read. ``"skip"``: leave them out. For that all files are read once when
            the store is opened, which takes as long as an epoch that computes nothing.
        max_norm: rows whose L2 norm exceeds it are left out; None leaves out none. For that, too,
            all files are read once when the store is opened, and a row that is not finite is
            refused then. :meth:`statistics` tells the norms.
        held_out: rows that batches do not have, to measure what is trained on the others; at most a
            tenth of all. They lie in pieces of neighbours, spread evenly over the files, so that
            few of them are neighbours of rows that batches have. :meth:`held_out_rows` reads them.

    Raises:
        DataError: a file is missing, damaged, locked by a writer, empty or laid out otherwise, or
            the files differ in width or dtype; all rows are left out; with ``max_norm`` and
            ``"refuse"``: a row is not finite.
        ModuleNotFoundError: h5py is needed and not installed.
        ValueError: no path, another ``nonfinite``, or ``max_norm`` is not above 0 and finite.

    Attributes:
        tokens: rows that batches are made of.
        skipped: rows left out because they are not finite.
        outliers: finite rows left out because their norm exceeds ``max_norm``.
        held_out: rows held out, without skipped ones and outliers.
        features: D.
        dtype: as stored: float32, float16 or bfloat16.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        dataset: str = ACTIVATIONS,
        nonfinite: str = "refuse",
        max_norm: float | None = None,
        held_out: int = 0,
    ) -> None:
        if nonfinite not in NONFINITE:
            raise ValueError(
                f"ActivationStore: nonfinite must be one of {', '.join(NONFINITE)}, "
                f"got {nonfinite!r}"
            )
        if not (max_norm is None or (isinstance(max_norm, Real) and 0 < max_norm < math.inf)):
            raise ValueError(
                f"ActivationStore: max_norm must be above 0 and finite, got {max_norm!r}"
            )
        paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
        if not paths:
            raise ValueError("ActivationStore: paths must name at least one file, got none")
        self._dataset, self.nonfinite, self.max_norm = dataset, nonfinite, max_norm
        self._files: list[ActivationFile] = []
        try:
            for path in paths:
                self._files.append(open_activations(path, dataset))
                self._check_same(self._files[-1])
            self.features, self.dtype = self._files[0].features, self._files[0].dtype
            _check_count("ActivationStore", "held_out", held_out, 0)
            self._leave_out()
            self._hold_out(held_out)
        except BaseException:
            self.close()
            raise

    def _leave_out(self) -> None:
        """Find the rows that no batch takes, for each file, and count those that remain."""
        if self.nonfinite == "skip" or self.max_norm is not None:
            unusable = [
                find_unusable_rows(file, self.nonfinite, self.max_norm) for file in self._files
            ]
        else:
            unusable = [(NO_ROWS, NO_ROWS)] * len(self._files)
        self.skipped = sum(len(nonfinite) for nonfinite, _ in unusable)
        self.outliers = sum(len(longer) for _, longer in unusable)
        self._left_out = [np.union1d(nonfinite, longer) for nonfinite, longer in unusable]
        self.tokens = sum(file.tokens for file in self._files) - self.skipped - self.outliers
        if self.tokens == 0:
            limit = "" if self.max_norm is None else f" of a norm up to {self.max_norm:g}"
            raise DataError(
                f"activation files hold no finite row{limit}: {', '.join(map(str, self.paths))}"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Keep what opens the same files again in another process: no rows, nothing open."""
        paths, stamps = zip(
            *((file.path.absolute(), file.stamp) for file in self._files), strict=True
        )
        settings = {name: getattr(self, name) for name in ("_dataset", *_PICKLED)}
        return {"paths": paths, "stamps": stamps, **settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._dataset, self._files = state["_dataset"], []
        try:
            for path, stamp in zip(state["paths"], state["stamps"], strict=True):
                self._files.append(open_activations(path, self._dataset))
                if self._files[-1].stamp != stamp:
                    raise DataError(f"activation file has changed since it was pickled: {path}")
        except BaseException:
            self.close()
            raise
        self.__dict__.update({name: state[name] for name in _PICKLED})

    def _hold_out(self, rows: int) -> None:
        """Take rows out of the batches, after those that are left out altogether."""
        lengths = [file.tokens for file in self._files]
        self._held_out = held_out_blocks(lengths, min(rows, self.tokens // 10))
        self._unusable, ranges = self._left_out, [[NO_ROWS] for _ in self._files]
        for number, start, stop in self._held_out:
            ranges[number].append(np.arange(start, stop))
        self._left_out = [
            np.union1d(unusable, np.concatenate(held))
            for unusable, held in zip(self._unusable, ranges, strict=True)
        ]
        self.held_out = sum(map(len, self._left_out)) - sum(map(len, self._unusable))
        self.tokens -= self.held_out

    def held_out_rows(self) -> Tensor:
        """Read the rows held out, float32 ``[held_out, D]``, in the order of the files.

        Raises:
            DataError: as :meth:`batches`.
        """
        size = sum(stop - start for _, start, stop in self._held_out)
        buffer = torch.empty(size, self.features, dtype=self.dtype)
        return self._read(self._held_out, buffer, self._unusable).float()

    def _check_same(self, file: ActivationFile) -> None:
        first = self._files[0]
        for name in ("features", "dtype"):
            expected, got = getattr(first, name), getattr(file, name)
            if expected != got:
                raise DataError(
                    f"activation files differ in {name}: {expected} in {first.path}, "
                    f"{got} in {file.path}"
                )

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, in their order."""
        return tuple(file.path for file in self._files)

    @cached_property
    def directions(self) -> Tensor | None:
        """The true directions, float32 ``[n, D]``; None when no file holds any.

        Raises:
            DataError: the files hold different ones.
        """
        first: tuple[Path, Tensor] | None = None
        for file in self._files:
            directions = file.directions()
            if directions is None:
                continue
            if first is not None and not torch.equal(first[1], directions):
                raise DataError(
                    f"activation files differ in their directions: {first[0]} and {file.path}"
                )
            first = (file.path, directions)
        return None if first is None else first[1]

    def statistics(self, rows: int = 65536, *, seed: int = 0) -> ActivationStatistics:
        """Measure mean, deviations and norms of a random sample of the rows that batches have.

        Args:
            rows: how many rows are sampled; all, where there are fewer. They are the first of
                ``batches(seed=seed, buffer_rows=rows)``: about 1 MiB of neighbours at each of many
                random places.
            seed: determines the sample; 0 or larger.

        Returns:
            An :class:`ActivationStatistics`: ``rows``, ``mean [D]``, ``deviation [D]``,
            ``mean_norm``, ``median_norm``, ``largest_norm``, and what follows from them.

        Raises:
            ValueError: an argument is out of range.
            DataError: as :meth:`batches`.
        """
        _check_count("statistics", "rows", rows, 1)
        _check_count("statistics", "seed", seed, 0)
        rows = min(rows, self.tokens)
        sample = self.batches(
            min(rows, STATISTICS_ROWS), seed=seed, buffer_rows=rows, dtype=self.dtype,
            prefetch=False,
        )  # fmt: skip
        with closing(sample):
            return statistics_of(sample, rows)

    def stored_rows(self, start: int, stop: int) -> Tensor:
        """Read rows ``[stop - start, D]`` of the files one after the other, as they are stored.

        Those that batches leave out count and are read, too.
        """
        rows = torch.empty(stop - start, self.features, dtype=self.dtype)
        first = 0
        for file in self._files:
            low, high = max(start, first), min(stop, first + file.tokens)
            if low < high:
                file.read(low - first, rows[low - start : high - start])
            first += file.tokens
        return rows

    def origins(self, start: int = 0, stop: int | None = None) -> Origins | None:
        """Tell where rows ``start`` to ``stop`` of a pass without shuffling come from.

        None unless all files hold it, as those of :func:`capture` do.
        """
        last = self.tokens if stop is None else stop
        return origins_of(self._files, self._left_out, start, last)

    def count_batches(self, batch_size: int) -> int:
        """Count the batches of an epoch, the last and smaller one included."""
        _check_count("count_batches", "batch_size", batch_size, 1)
        return math.ceil(self.tokens / batch_size)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int = 0,
        start: int = 0,
        buffer_rows: int = 65536,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        shuffle: bool = True,
        prefetch: bool = True,
    ) -> Generator[Tensor]:
        """Start an epoch of batches: each row once, in an order that the arguments determine.

        Args:
            batch_size: rows of a batch; the last one of an epoch may have fewer.
            seed: with ``epoch`` determines the order; 0 or larger.
            epoch: 0 or larger.
            start: number of the first batch. The batches are those of a pass from 0 without its
                first ``start``; groups before it are not read. The number of batches is allowed
                and gives none.
            buffer_rows: rows of a group, at most. Two groups are in memory, in the stored dtype;
                the larger, the closer the order comes to a shuffle of everything.
            device: where the batches go. To a GPU they are copied from pinned memory, in the
                stored dtype, without waiting for the copy.
            dtype: floating dtype of the batches.
            shuffle: False gives the rows in the order of the files.
            prefetch: read and cut in threads while the consumer works. They end with the iterator:
                when it is exhausted, closed or deleted, or has raised.

        Returns:
            An iterator of tensors ``[<= batch_size, D]``, each its own memory.

        Raises:
            ValueError: an argument is out of range. At once; the rest while iterating:
            DataError: a file is damaged, or ``nonfinite="refuse"`` and a row is not finite. The
                message names the files and rows.
        """
        if not self._files:
            raise ValueError("batches: the store is closed")
        for name, value, least in (
            ("batch_size", batch_size, 1), ("seed", seed, 0), ("epoch", epoch, 0),
            ("start", start, 0), ("buffer_rows", buffer_rows, 1),
        ):  # fmt: skip
            _check_count("batches", name, value, least)
        if start > self.count_batches(batch_size):
            raise ValueError(
                f"batches: start must lie in 0..{self.count_batches(batch_size)} (the number of "
                f"batches of {batch_size}), got {start}"
            )
        if not dtype.is_floating_point:
            raise ValueError(f"batches: dtype must be floating, got {dtype}")
        epoch_plan = plan_epoch(
            self._files, self._left_out, buffer_rows, (seed, epoch) if shuffle else None
        )
        return self._stream(epoch_plan, batch_size, start, torch.device(device), dtype, prefetch)

    def _stream(
        self,
        epoch_plan: EpochPlan,
        batch_size: int,
        start: int,
        device: torch.device,
        dtype: torch.dtype,
        prefetch: bool,
    ) -> Generator[Tensor]:
        on_gpu = device.type == "cuda"
        skip = start * batch_size
        group = epoch_plan.group_of(skip)
        groups = self._groups(epoch_plan, group, skip - int(epoch_plan.first_rows[group]))
        # One group ahead, so that the reader may use two buffers in turn.
        groups = prefetched(groups, ahead=1) if prefetch else groups
        stored = self.dtype if on_gpu else dtype  # to a GPU as stored: fewer bytes
        batches = cut_batches(groups, self.tokens - skip, batch_size, stored, pin=on_gpu)
        batches = prefetched(batches, ahead=BATCHES_AHEAD) if prefetch else batches
        try:
            for batch in batches:
                # torch does not use pinned memory again before the copy out of it has ended.
                yield batch.to(device, non_blocking=True).to(dtype) if on_gpu else batch
                del batch
        finally:
            batches.close()

    def _groups(
        self, epoch_plan: EpochPlan, group: int, skip: int
    ) -> Generator[tuple[Tensor, Tensor]]:
        """Yield the rows ``[n, D]`` of each group from ``group`` on, and the order to take them in.

        The rows of a group are valid until the group after the next is asked for. The order of
        the first one starts after its first ``skip`` rows.
        """
        shape = (epoch_plan.capacity, self.features)
        buffers = [torch.empty(shape, dtype=self.dtype) for _ in range(2)]
        for number in range(group, epoch_plan.groups):
            rows = self._read(epoch_plan.blocks_of(number), buffers[number % 2], self._left_out)
            yield rows, epoch_plan.rows_of(number)[skip:]
            skip = 0

    def _read(self, blocks: list[list[int]], buffer: Tensor, left_out: list[np.ndarray]) -> Tensor:
        """Fill the buffer with the blocks' rows, without those left out, and return that part."""
        if not self._files:
            raise ValueError("batches: the store is closed")
        filled, nonfinite = 0, []
        for number, start, stop in blocks:
            file = self._files[number]
            rows = buffer[filled : filled + stop - start]
            file.read(start, rows)
            if self.nonfinite == "refuse":
                nonfinite += [(file, start + row) for row in nonfinite_rows(rows).tolist()]
            filled += len(drop_rows(rows, start, left_out[number]))
        if nonfinite:
            raise nonfinite_error(nonfinite, filled)
        return buffer[:filled]

    def close(self) -> None:
        """Release the files; iterators of batches have to be closed before."""
        for file in self._files:
            file.close()
        self._files = []

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check_count(function: str, name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(
            f"{function}: {name} must be an integer of at least {least}, got {value!r}"
        )
