"""Activation files made of other files, or of a mixture made up here."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn

from ..hdf5_writing import check_space
from .activation_file import ACTIVATIONS, DOCUMENTS, POSITIONS, TOKEN_IDS
from .origins import origin_columns
from .store import ActivationStore
from .writing import check_new, with_progress, write_activations, write_pieces

CONVERT_ROWS = 16384
# The sampling keys of a piece, [rows, latents] in float32, take 64 MiB.
SYNTHETIC_KEYS = 1 << 24
# Latent i is drawn with weight (1 + i) ** -SKEW: of 512, the first 5 times as often as the last.
SKEW = 0.25
COEFFICIENTS = (0.5, 1.5)


def convert(
    paths: str | Path | Sequence[str | Path],
    path: str | Path,
    *,
    dataset: str = ACTIVATIONS,
    dtype: torch.dtype | None = None,
    nonfinite: str = "refuse",
    chunk_rows: int | None = None,
) -> int:
    """Put activation files of any kind one after the other into a new HDF5 file.

    Args:
        paths: see :class:`~sparsekern.data.ActivationStore`.
        path: see :func:`write_activations`.
        dataset: see :class:`~sparsekern.data.ActivationStore`.
        dtype: stored; by default that of the files, which keeps every bit.
        nonfinite: see :class:`~sparsekern.data.ActivationStore`.
        chunk_rows: see :func:`write_activations`.

    Returns:
        The number of rows.

    Raises:
        DataError, ValueError: as those two.
    """
    check_new(path)
    with ActivationStore(paths, dataset=dataset, nonfinite=nonfinite) as store:
        stored = store.dtype if dtype is None else dtype
        check_space(Path(path), store.tokens * store.features * stored.itemsize, "convert")
        pieces = with_progress(_read_rows(store), "converting", _row_count, store.tokens)
        with closing(pieces):
            return write_pieces(
                path, pieces, dtype=stored, default=lambda given: given, chunk_rows=chunk_rows,
                directions=store.directions,
            )  # fmt: skip


def _row_count(piece: tuple[Tensor, dict[str, Tensor]]) -> int:
    return len(piece[0])


def _read_rows(store: ActivationStore) -> Generator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield all rows of a store in their order, and where they come from, if it is known."""
    first, column_names = 0, origin_columns(store._files)
    batches = store.batches(
        CONVERT_ROWS, seed=0, shuffle=False, buffer_rows=CONVERT_ROWS, dtype=store.dtype
    )
    with closing(batches):
        for rows in batches:
            columns: dict[str, Tensor] = {}
            origins = store.origins(first, first + len(rows)) if column_names else None
            if origins is not None:
                columns = {DOCUMENTS: origins.documents, POSITIONS: origins.positions.int()}
                if TOKEN_IDS in column_names and origins.token_ids is not None:
                    columns[TOKEN_IDS] = origins.token_ids.int()
            yield rows, columns
            first += len(rows)


def synthetic(
    path: str | Path,
    *,
    features: int = 128,
    latents: int = 512,
    active: int = 4,
    tokens: int = 1_000_000,
    seed: int = 0,
    noise: float = 0.01,
    dtype: torch.dtype = torch.float16,
    chunk_rows: int | None = None,
) -> int:
    """Write sparse mixtures of known directions, so that a dictionary can be scored.

    ``x = sum_j c_j * directions[i_j] + noise * normal``: ``active`` different latents ``i_j``,
    drawn with weights ``(1 + i) ** -0.25``, and coefficients ``c_j`` uniform in 0.5..1.5. The
    directions are random unit vectors, stored in the file as ``directions [latents, features]``.

    Args:
        path: see :func:`write_activations`.
        features: D.
        latents: how many directions.
        active: how many of them each row mixes. At the defaults the 4 largest scalar products of
            a row with the directions name 93 % of its latents; with 8 of them, 80 %.
        tokens: rows.
        seed: determines the file, for a version of torch.
        noise: standard deviation of the noise in each feature.
        dtype: see :func:`write_activations`.
        chunk_rows: see :func:`write_activations`.

    Returns:
        The number of rows.

    Raises:
        ValueError: an argument is out of range.
        DataError: as :func:`write_activations`.
    """
    check_new(path)
    for name, value in (("features", features), ("latents", latents), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"synthetic: {name} must be at least 1, got {value}")
    if not 1 <= active <= latents:
        raise ValueError(
            f"synthetic: active must lie in 1..{latents} (the number of latents), got {active}"
        )
    if not 0 <= noise < float("inf"):
        raise ValueError(f"synthetic: noise must be at least 0 and finite, got {noise}")
    check_space(Path(path), tokens * features * dtype.itemsize, "synthetic")
    generator = torch.Generator().manual_seed(seed)
    directions = nn.functional.normalize(torch.randn(latents, features, generator=generator), dim=1)
    mixtures = _mixtures(directions, active, tokens, noise, generator)
    with closing(with_progress(mixtures, "synthesising", len, tokens)) as batches:
        return write_activations(
            path, batches, dtype=dtype, chunk_rows=chunk_rows, directions=directions
        )


def _mixtures(
    directions: Tensor, active: int, tokens: int, noise: float, generator: torch.Generator
) -> Generator[Tensor]:
    latents, features = directions.shape
    weights = torch.arange(1, latents + 1, dtype=torch.float32) ** -SKEW
    low, high = COEFFICIENTS
    step = min(tokens, max(1, SYNTHETIC_KEYS // latents), 1 << 16)
    for start in range(0, tokens, step):
        rows = min(step, tokens - start)
        # The first to ring of exponential clocks: draws by weight without replacement.
        clocks = torch.empty(rows, latents).exponential_(generator=generator) / weights
        chosen = clocks.topk(active, largest=False).indices
        coefficients = low + (high - low) * torch.rand(rows, active, generator=generator)
        mixed = nn.functional.embedding_bag(
            chosen, directions, per_sample_weights=coefficients, mode="sum"
        )
        if noise:
            mixed += noise * torch.randn(rows, features, generator=generator)
        yield mixed
