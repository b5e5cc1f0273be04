"""Where activation files come from: other files, a hook in a model, or a mixture made up here."""

from __future__ import annotations

import difflib
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._system import require
from .activation_format import ACTIVATIONS
from .activation_writing import check_new, write_activations
from .activations import ActivationStore
from .factors import DataError
from .hdf5_writing import check_space

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
    """Puts activation files of any kind one after the other into a new HDF5 file.

    Args:
        paths, dataset, nonfinite: see :class:`~sparsekern.data.ActivationStore`.
        path, chunk_rows: see :func:`write_activations`.
        dtype: stored; by default that of the files, which keeps every bit.

    Returns:
        The number of rows.

    Raises:
        DataError, ValueError: as those two.
    """
    check_new(path)
    with ActivationStore(paths, dataset=dataset, nonfinite=nonfinite) as store:
        stored = store.dtype if dtype is None else dtype
        check_space(Path(path), store.tokens * store.features * stored.itemsize, "convert")
        rows = store.batches(
            CONVERT_ROWS, seed=0, shuffle=False, buffer_rows=CONVERT_ROWS, dtype=store.dtype
        )
        with closing(_with_progress(rows, "converting", store.tokens)) as batches:
            return write_activations(
                path,
                batches,
                dtype=stored,
                chunk_rows=chunk_rows,
                directions=store.directions,
            )


def _with_progress(
    batches: Generator[Tensor], what: str, tokens: int | None = None
) -> Generator[Tensor]:
    """The batches, with a progress bar in tokens where somebody watches; closes them."""
    tqdm = require("tqdm", what).tqdm
    unit = {"unit": " tokens", "unit_scale": True}
    # disable=None: no bar where nobody watches.
    with closing(batches), tqdm(total=tokens, desc=what, disable=None, **unit) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def capture(
    module: nn.Module,
    hook_point: str,
    inputs: Iterable[Any],
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float16,
    chunk_rows: int | None = None,
) -> int:
    """Runs a module and writes what one of its submodules returns.

    The module runs without gradients and in evaluation mode; its mode is restored.

    Args:
        module: runs on the device of its parameters; the inputs are moved there.
        hook_point: name of the submodule, as in ``module.named_modules()``; ``""`` for the module
            itself. It returns ``[..., D]``, or a tuple whose first element is that.
        inputs: what the module is called with: a tensor, a tuple of positional or a mapping of
            keyword arguments.
        path, dtype, chunk_rows: see :func:`write_activations`.

    Returns:
        The number of rows: the leading dimensions are flattened.

    Raises:
        ValueError: there is no such submodule.
        DataError: it was not called or returned something else; as :func:`write_activations`.
    """
    names = [name for name, _ in module.named_modules()]
    if hook_point not in names:
        names = names[1:]  # the first is the module itself
        near = difflib.get_close_matches(hook_point, names, 5, 0.4) or names[:5]
        raise ValueError(
            f"capture: hook_point must name a submodule, got {hook_point!r}; there are "
            f"{', '.join(map(repr, near))}{', ...' if len(names) > len(near) else ''}"
        )
    check_new(path)
    outputs = _captured(module, hook_point, inputs)
    with closing(_with_progress(outputs, "capturing")) as batches:
        return write_activations(path, batches, dtype=dtype, chunk_rows=chunk_rows)


def _captured(module: nn.Module, hook_point: str, inputs: Iterable[Any]) -> Generator[Tensor]:
    """What the submodule returns for each input, [rows, D]."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(output, Tensor) or output.dim() == 0:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise DataError(f"capture: {hook_point!r} must return a tensor [..., D], got {got}")
        outputs.append(output.detach().reshape(-1, output.shape[-1]))

    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    modes = [(m, m.training) for m in module.modules()]
    handle = module.get_submodule(hook_point).register_forward_hook(keep)
    try:
        module.eval()
        for given in inputs:
            with torch.no_grad():
                _call(module, given, device)
            if not outputs:
                raise DataError(f"capture: {hook_point!r} was not called by the module's forward")
            yield from outputs
            outputs.clear()
    finally:
        handle.remove()
        for part, mode in modes:
            part.training = mode


def _call(module: nn.Module, given: Any, device: torch.device) -> None:
    def moved(value: Any) -> Any:
        value = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(given, Mapping):
        module(**{name: moved(value) for name, value in given.items()})
    elif isinstance(given, (tuple, list)):
        module(*map(moved, given))
    else:
        module(moved(given))


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
    """Writes sparse mixtures of known directions, so that a dictionary can be scored.

    ``x = sum_j c_j * directions[i_j] + noise * normal``: ``active`` different latents ``i_j``,
    drawn with weights ``(1 + i) ** -0.25``, and coefficients ``c_j`` uniform in 0.5..1.5. The
    directions are random unit vectors, stored in the file as ``directions [latents, features]``.

    Args:
        path, dtype, chunk_rows: see :func:`write_activations`.
        features: D.
        latents: how many directions.
        active: how many of them each row mixes. At the defaults the 4 largest scalar products of
            a row with the directions name 93 % of its latents; with 8 of them, 80 %.
        tokens: rows.
        seed: determines the file, for a version of torch.
        noise: standard deviation of the noise in each feature.

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
    with closing(_with_progress(mixtures, "synthesising", tokens)) as batches:
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
