"""The activations of a run: which rows it trains on, which it measures, and in which units.

* `outlier_filter` M leaves out rows longer than M times the median norm of a sample.
* `normalize` "dataset" multiplies all rows by sqrt(D) / their mean norm, in a sample: a row then
  has a norm of sqrt(D) on average. `SparseAutoencoder.fold_normalization` takes the factor into
  the weights. "token" multiplies each row by sqrt(D) / its own norm.
* What is measured was not trained on: rows held out, or files of their own.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from ...data import ActivationStatistics, ActivationStore, DataError
from ..configs import SettingError
from .config import SAEConfig

STATISTICS_SEED = 0
# What FVU says is about one feature, or about the mean, from these shares and ratios on.
LARGEST_SHARE = 0.5
LARGEST_OFFSET = 30.0
LONGEST_ROW = 30.0
# Of the longest row: sums of squares of many rows are float32 numbers, with digits to spare.
NORMS = (1e-15, 1e16)


class Rows:
    """The rows of a config's files, normalised.

    Args:
        config: which files, and what to do with them.
        fixed: of an earlier run, `facts`: its factor and limit instead of those of these files.

    Attributes:
        store: the files without outliers, and without the rows held out.
        scale: the factor of `normalize` "dataset", else 1.
        max_norm: rows beyond it are left out; None: none are.
        statistics: of a sample of the rows, in the units of the files.

    Raises:
        DataError, ValueError: as `ActivationStore`; rows are so long or short that float32 cannot
            hold their squares.
        SettingError: a file is given twice and rows are to be held out; the median norm is 0, and
            outliers are to be left out.
    """

    def __init__(self, config: SAEConfig, fixed: dict[str, Any] | None = None) -> None:
        self.config = config
        self.max_norm: float | None = None
        held_out = 0 if config.eval_activations else config.eval_tokens
        if held_out and fixed is None:
            _check_given_once(config.activations)
        if fixed is not None:
            self.max_norm = fixed["max_norm"]
        elif config.outlier_filter:
            with _open_store(config, config.activations) as store:
                median = store.statistics(seed=STATISTICS_SEED).median_norm
            if median == 0:
                raise SettingError(
                    "outlier_filter", "must be 0 for these activations: their median norm is 0"
                )
            self.max_norm = config.outlier_filter * median
        self.store = _open_store(
            config, config.activations, max_norm=self.max_norm, held_out=held_out
        )
        try:
            self.statistics = self.store.statistics(seed=STATISTICS_SEED)
            self.tokens, self.features = self.store.tokens, self.store.features
            largest = self.statistics.largest_norm
            if largest > 0 and not NORMS[0] <= largest <= NORMS[1]:
                raise DataError(
                    f"activations must have norms of {NORMS[0]:g} to {NORMS[1]:g} (squares of "
                    f"others are no float32 numbers), got up to {largest:g}: "
                    f"{', '.join(map(str, self.store.paths))}"
                )
            self.scale = 1.0
            if fixed is not None:
                self.scale = fixed["scale"]
            elif config.normalize == "dataset" and self.statistics.mean_norm > 0:
                self.scale = math.sqrt(self.features) / self.statistics.mean_norm
        except BaseException:
            self.store.close()
            raise

    @property
    def facts(self) -> dict[str, Any]:
        """What follows from the files and decides a run; JSON types."""
        return {
            "tokens": self.tokens,
            "features": self.features,
            "scale": self.scale,
            "max_norm": self.max_norm,
        }

    @property
    def directions(self) -> Tensor | None:
        """The true directions, where the files hold them."""
        return self.store.directions

    def count_batches(self, batch_size: int) -> int:
        """Count the batches of an epoch."""
        return self.store.count_batches(batch_size)

    @property
    def mean_token_factor(self) -> float:
        """What `normalize` "token" multiplies a row of mean norm by."""
        norm = self.statistics.mean_norm
        return math.sqrt(self.features) / norm if norm > 0 else 1.0

    @property
    def mean_factor(self) -> float:
        """What a row of mean norm is multiplied by."""
        return self.mean_token_factor if self.config.normalize == "token" else self.scale

    def batches(self, epoch: int, start: int, device: torch.device) -> Generator[Tensor]:
        """Start an epoch at batch `start`, normalised."""
        config = self.config
        batches = self.store.batches(
            config.batch_size, seed=config.seed, epoch=epoch, start=start,
            buffer_rows=config.buffer_rows, device=device,
        )  # fmt: skip
        return batches if config.normalize == "none" else self._normalize(batches)

    def _normalize(self, batches: Generator[Tensor]) -> Generator[Tensor]:
        """Normalise batches."""
        with contextlib.closing(batches):
            for batch in batches:
                yield batch * self.factors(batch)

    def factors(self, rows: Tensor) -> Tensor | float:
        """Compute what rows [n, D] are multiplied by: one number, or [n, 1]."""
        if self.config.normalize == "token":
            norms = rows.norm(dim=1, keepdim=True)
            return torch.where(norms > 0, math.sqrt(rows.shape[1]) / norms, 1.0)
        return self.scale

    def sample(self, rows: int, device: torch.device) -> Tensor:
        """Take some rows in the order of an epoch that training does not use, normalised."""
        sample = self._sample(self.store, rows).to(device)
        return sample * self.factors(sample)

    def measured(self, device: torch.device) -> Tensor:
        """Take the rows to measure, in the units of the files."""
        config = self.config
        if config.eval_activations:
            with _open_store(config, config.eval_activations, max_norm=self.max_norm) as store:
                if store.features != self.features:
                    raise ValueError(
                        f"eval_activations must be {self.features} wide, as the activations, "
                        f"got {store.features}"
                    )
                return self._sample(store, config.eval_tokens).to(device)
        if self.store.held_out:
            return self.store.held_out_rows().to(device)
        return self._sample(self.store, config.eval_tokens).to(device)

    @property
    def measured_on(self) -> str:
        """Where the rows to measure come from."""
        if self.config.eval_activations:
            return "files of their own"
        return "rows held out" if self.store.held_out else "rows of the files"

    def _sample(self, store: ActivationStore, rows: int) -> Tensor:
        """Take the first rows of that epoch."""
        config = self.config
        batches = store.batches(
            min(rows, store.tokens), seed=config.seed, epoch=config.epochs,
            buffer_rows=config.buffer_rows, prefetch=False,
        )  # fmt: skip
        with contextlib.closing(batches):
            return next(batches)

    def warnings(self) -> list[str]:
        """Say what about the activations makes results say less than they seem to."""
        sentences = dominance_warnings(self.statistics) + overlap_warnings(self.config)
        if self.config.eval_tokens == 1 or self.store.held_out == 1:
            sentences.append(
                "one token is measured, which has no variance: its FVU is relative to its own "
                "squares, and says little"
            )
        return sentences

    def close(self) -> None:
        """Release the files."""
        self.store.close()

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _open_store(config: SAEConfig, paths: tuple[str, ...], **options: Any) -> ActivationStore:
    """Open files as the config says."""
    return ActivationStore(
        list(paths), dataset=config.dataset, nonfinite=config.nonfinite, **options
    )


def _check_given_once(paths: tuple[str, ...]) -> None:
    """Refuse a file that is given twice: its rows would be held out and trained on."""
    path_by_real_path: dict[str, str] = {}
    for path in paths:
        real_path = os.path.realpath(path)
        if real_path in path_by_real_path:
            names = " and ".join(dict.fromkeys([path_by_real_path[real_path], path]))
            raise SettingError("activations", f"must name each file once, got twice: {names}")
        path_by_real_path[real_path] = path


def overlap_warnings(config: SAEConfig) -> list[str]:
    """Say which files are both trained on and measured, in a sentence, if any are."""
    real_paths = set(map(os.path.realpath, config.activations))
    shared = [path for path in config.eval_activations if os.path.realpath(path) in real_paths]
    if not shared:
        return []
    return [f"tokens are measured that are trained on: those of {', '.join(shared)}"]


def dominance_warnings(statistics: ActivationStatistics) -> list[str]:
    """Say in sentences which feature, mean or rows outgrow all others."""
    sentences = []
    variances = statistics.deviation.square()
    share = float(variances.max() / variances.sum()) if statistics.variance > 0 else 0.0
    if share > LARGEST_SHARE and len(variances) > 2:
        sentences.append(
            f"feature {int(variances.argmax())} holds {share:.1%} of the variance of the "
            "activations: FVU says how well this feature is reconstructed, and little of the rest"
        )
    if statistics.offset > LARGEST_OFFSET:
        sentences.append(
            f"the mean of the activations is {statistics.offset:.4g} times as long as a typical "
            "distance from it: nearly all of a row is the same in every row"
        )
    longest = statistics.largest_norm / max(statistics.median_norm, 1e-300)
    if longest > LONGEST_ROW:
        sentences.append(
            f"the longest of {statistics.rows} sampled rows is {longest:.4g} times as long as the "
            "median: such rows decide the loss of their batch; --outlier-filter leaves them out"
        )
    return sentences
