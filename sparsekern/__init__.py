"""sparsekern: fused kernels for networks with extremely sparse activations."""

import importlib as _importlib
import sys as _sys
from typing import Any as _Any

from ._renamed import RenamedModules as _RenamedModules
from ._system import torch_missing as _torch_missing

try:
    import torch as _torch  # first: the native modules then share its OpenMP runtime
except ModuleNotFoundError as error:
    raise _torch_missing(error) from None

from .dispatch.backends import BackendUnavailableError, backend
from .dispatch.information import describe
from .dispatch.kept_memory import empty_cache
from .nn import BatchTopK, DeadNeuronCounter, JumpReLU, SparseLinear, SpatialSparsity, TopK
from .ops import (
    ChannelCodes,
    Codes,
    RoundedWeight,
    Transposition,
    batch_topk,
    channel_threshold,
    count_active,
    gather_dot,
    keep_rounded,
    linear_at,
    linear_topk,
    linear_topk_transposed,
    pointwise_conv,
    screening,
    sparse_matmul,
    threshold_codes,
    threshold_relu,
    topk,
    topk_counts,
    topk_mask,
    transpose_codes,
)

__version__ = "0.2.0"  # and in pyproject.toml; the test of the sdist compares them

__all__ = [
    "BackendUnavailableError",
    "BatchTopK",
    "ChannelCodes",
    "Codes",
    "DeadNeuronCounter",
    "JumpReLU",
    "RoundedWeight",
    "SparseLinear",
    "SpatialSparsity",
    "TopK",
    "Transposition",
    "accelerate",
    "backend",
    "batch_topk",
    "channel_threshold",
    "count_active",
    "describe",
    "empty_cache",
    "gather_dot",
    "keep_rounded",
    "linear_at",
    "linear_topk",
    "linear_topk_transposed",
    "pointwise_conv",
    "restore",
    "screening",
    "sparse_matmul",
    "threshold_codes",
    "threshold_relu",
    "topk",
    "topk_counts",
    "topk_mask",
    "transpose_codes",
]

_sys.meta_path.append(_RenamedModules())

del _torch, _torch_missing

# Imported when they are first used: some of them read files, draw or train.
_SUBMODULES = (
    "benchmarks",
    "cli",
    "data",
    "distributed",
    "integrations",
    "measures",
    "models",
    "optim",
    "sae",
    "studies",
    "testing",
    "training",
)
# They need no other library, but few programs need them.
_FUNCTIONS = ("accelerate", "restore")


def __getattr__(name: str) -> _Any:
    if name in _SUBMODULES:
        return _importlib.import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        return getattr(_importlib.import_module(f"{__name__}.integrations.acceleration"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES, *_FUNCTIONS})
