"""The bottleneck of Sparling: few activations in space, by a threshold for each channel."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.batch_norm import batch_norm, quicker_than_torch
from ..ops.channel_threshold import channel_threshold, check_density
from ..ops.channels import check_channels
from ..ops.checks import check_count
from ..ops.threshold_relu import ChannelCodes, threshold_codes, threshold_relu
from ..ops.topk import topk
from .averages import keep_dtype
from .recomputation import RecentStates, recomputing, take

EPS = 1e-5  # of torch.nn.BatchNorm2d, whose statistics and formula the layer uses


class _Update(NamedTuple):
    """New state after a batch, and a key of the batch."""

    threshold: Tensor
    """[C] or [1]."""
    key: Tensor
    """[C] or [1], numbers that follow from the batch alone (see `RecentStates`)."""
    largest: Tensor | None = None
    """[C or 1, capacity], the largest activations, where batches are accumulated."""
    rows: int | None = None
    """Number of activations per channel that the largest were taken from."""


class SpatialSparsity(nn.Module):
    """Keep the share `density` of the activations over batch and space; everything else is zero.

    In training, with z the batch-normalised x and q_c its (1 - density) quantile over batch and
    space (see :func:`sparsekern.channel_threshold`)::

        threshold = (1 - momentum) * threshold + momentum * q     # first
        y = relu(z - threshold)

    In evaluation normalisation and threshold stand still, and both are one pass with the ReLU.
    Thresholds are constants to the gradient.

    Args:
        channels: C.
        density: share of the activations to keep, above 0 and at most 1. The attribute may be
            changed at any time during training.
        momentum: weight of the newest quantile in the running threshold, above 0 and at most 1.
        per_channel: a threshold for each channel (Sparling's MT); otherwise a single one over all
            of them (ST).
        accumulate: number of motifs, at least 1: update the threshold only when so many activations
            are expected above the quantile, from as many batches as that takes; a batch that is
            enough by itself is taken alone. For densities at which a batch holds less than one
            activation; costs memory for 2 * accumulate + 2 activations per channel.
        affine: give the normalisation a trained scale and shift; None for no normalisation.
        channel_dim: which dimension of x holds the channels: 1, or -1 for channels last.

    Attributes:
        threshold: [C], or [1] for a single one; 0 at first, saved with the model. Like the other
            averages it stays float32 in a layer that is converted to 16 bits.
        counts: int64 [C], activations of each channel in the last forward pass.

    Shape: x [B, C, ...] floating point -> the same.

    Raises:
        TypeError, ValueError: an argument is out of its range; x has another number of channels,
            or, on a CPU in training, is not finite. (On a GPU, where looking would make the host
            wait, in evaluation and when compiled, NaN passes through to the loss, but not
            into the statistics.) A batch that raises leaves the layer as it was.

    Note:
        Under gradient checkpointing a batch is taken in once: see `DeadNeuronCounter`.

    Source: Gupta et al., Sparling (arXiv 2302.01976), section 3, and the authors' public code.

    Example:
        >>> import torch, sparsekern
        >>> layer = sparsekern.SpatialSparsity(4, density=0.1)
        >>> layer(torch.randn(8, 4, 16, 16)).shape
        torch.Size([8, 4, 16, 16])
    """

    channels: int
    momentum: float
    per_channel: bool
    accumulate: int | None
    affine: bool | None
    channel_dim: int
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    threshold: Tensor
    running_mean: Tensor
    running_var: Tensor
    largest: Tensor
    rows: Tensor
    counts: Tensor

    def __init__(
        self,
        channels: int,
        density: float,
        momentum: float = 0.1,
        per_channel: bool = True,
        accumulate: int | None = None,
        *,
        affine: bool | None = True,
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        op = "SpatialSparsity"
        self.channels = check_count(op, "channels", channels, 2**31 - 1, "the number of channels")
        check_density(op, density)
        self._density = float(density)
        self._elements, self._warned = 0, False
        self._rows: int | None = None
        self._recent = RecentStates()
        if isinstance(momentum, bool) or not isinstance(momentum, numbers.Real):
            raise TypeError(f"{op}: momentum must be a number, got {momentum!r}")
        if not 0 < momentum <= 1:
            raise ValueError(f"{op}: momentum must be above 0 and at most 1, got {momentum}")
        for name, value, allowed in (
            ("per_channel", per_channel, (True, False)), ("affine", affine, (True, False, None)),
        ):  # fmt: skip
            if not any(value is option for option in allowed):
                raise TypeError(f"{op}: {name} must be one of {allowed}, got {value!r}")
        if channel_dim not in (1, -1):
            raise ValueError(f"{op}: channel_dim must be 1 or -1, got {channel_dim}")
        self.momentum, self.per_channel, self.affine = momentum, per_channel, affine
        self.channel_dim = channel_dim
        columns = self.channels if per_channel else 1
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("threshold", torch.zeros(columns, dtype=dtype))
        self.register_buffer("counts", torch.zeros(self.channels, dtype=torch.int64), False)
        if affine:
            self.weight = nn.Parameter(torch.ones(self.channels))
            self.bias = nn.Parameter(torch.zeros(self.channels))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        if affine is not None:
            self.register_buffer("running_mean", torch.zeros(self.channels, dtype=dtype))
            self.register_buffer("running_var", torch.ones(self.channels, dtype=dtype))
        self.accumulate = accumulate
        if accumulate is not None:
            motifs = check_count(op, "accumulate", accumulate, 2**31 - 1, "a number of motifs")
            capacity = 2 * motifs + 2
            self.register_buffer("largest", torch.full((columns, capacity), -math.inf, dtype=dtype))
            self.register_buffer("rows", torch.zeros((), dtype=torch.int64))

    @property
    def density(self) -> float:
        """Share of the activations to keep."""
        return self._density

    @density.setter
    def density(self, value: float) -> None:
        check_density("SpatialSparsity", value)
        self._density = float(value)

    def forward(self, x: Tensor) -> Tensor:
        """Return y, like x [B, C, ...]."""
        y: Tensor
        y, counts = self._apply_operation(threshold_relu, x)
        self._record_counts(counts, x)
        return y

    def codes(self, x: Tensor) -> ChannelCodes:
        """Return the codes of y: values, flat indices into x's shape, counts per channel.

        See :func:`sparsekern.threshold_codes`.
        """
        codes: ChannelCodes = self._apply_operation(threshold_codes, x)
        self._record_counts(codes.counts, x)
        return codes

    def measured_density(self) -> float:
        """Return the share of activations kept by the last forward pass; the host waits for it."""
        return int(self.counts.sum()) / max(self._elements, 1)

    # -- steps of a forward pass -------------------------------------------------------------------

    def _apply_operation(self, operation: Callable[..., Any], x: Tensor) -> Any:
        """Normalise x and apply an operation; in evaluation the operation normalises x itself.

        In training the state changes at the end, after everything that may raise. It does not
        change in a pass that gradient checkpointing runs again, which uses the thresholds of the
        first pass.
        """
        dim = self._check(x)
        if not self.training or x.numel() == 0:
            scale, shift = (None, None) if self.affine is None else self._evaluation_constants()
            return operation(x, self._channel_thresholds(self.threshold), scale=scale, shift=shift,
                             channel_dim=dim)  # fmt: skip
        z, statistics = self._normalise(x, dim)
        second_pass = recomputing()
        with torch.no_grad():
            update = self._new_threshold(z, dim)
            threshold = update.threshold
            if second_pass:
                threshold = self._recent.recall(update.key, threshold)
        result = operation(
            z, self._channel_thresholds(threshold), scale=None, shift=None, channel_dim=dim
        )
        if not second_pass:
            self._recent.remember(update.key, threshold)
            self._update_state(statistics, update)
        return result

    def _check(self, x: Tensor) -> int:
        dim = check_channels("SpatialSparsity", x, self.channel_dim)
        if x.shape[dim] != self.channels:
            raise ValueError(
                f"SpatialSparsity: x must have {self.channels} channels in dimension "
                f"{self.channel_dim}, got shape {list(x.shape)}"
            )
        return dim

    def _normalise(self, x: Tensor, dim: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return x normalised with the statistics of the batch, and the new running ones."""
        if self.affine is None:
            self._check_finite(x, x)
            return x, None
        if x.numel() == self.channels:
            raise ValueError(
                "SpatialSparsity: x must have more than one activation per channel in training, "
                f"which its normalisation needs, got shape {list(x.shape)}"
            )
        running = self.running_mean.clone(), self.running_var.clone()
        if not quicker_than_torch(x, dim):
            z = self._normalise_with_torch(x, dim, *running)
            self._check_finite(z.detach(), z)
            return z, running
        z, mean, var = batch_norm(x, self.weight, self.bias, eps=EPS, channel_dim=dim)
        with torch.no_grad():
            numbers = (t for t in (mean, var, self.weight, self.bias) if t is not None)
            self._check_finite(torch.cat(list(numbers)), z)
            elements = x.numel() // self.channels
            unbiased = var * (elements / (elements - 1))
            for old, new in zip(running, (mean, unbiased), strict=True):
                old.lerp_(new.to(old.dtype), 0.1)
        return z, running

    def _normalise_with_torch(self, x: Tensor, dim: int, mean: Tensor, var: Tensor) -> Tensor:
        """Return the batch normalisation of x; update the running mean and variance in place."""
        columns = x if dim == 1 else x.reshape(-1, self.channels)
        weight, bias = (
            None if vector is None else vector.to(mean.dtype) for vector in (self.weight, self.bias)
        )
        return F.batch_norm(columns, mean, var, weight, bias, True, 0.1).view(x.shape)

    def _evaluation_constants(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift of the normalisation in evaluation mode."""
        scale = (self.running_var + EPS).rsqrt()
        if self.weight is not None and self.bias is not None:
            scale = scale * self.weight
            return scale, self.bias - self.running_mean * scale
        return scale, -self.running_mean * scale

    def _channel_thresholds(self, threshold: Tensor) -> Tensor:
        """Return the threshold of each channel."""
        return threshold if self.per_channel else threshold.expand(self.channels)

    @torch.no_grad()
    def _update_state(self, statistics: tuple[Tensor, Tensor] | None, update: _Update) -> None:
        """Copy the new state into the buffers, except NaN (on a CPU NaN has raised before)."""
        new = {"threshold": update.threshold}
        if statistics is not None:
            new["running_mean"], new["running_var"] = statistics
        if update.rows is not None and update.largest is not None:
            self._rows = update.rows
            self.rows.fill_(update.rows)
            new["largest"] = update.largest
        for name, tensor in new.items():
            buffer = getattr(self, name)
            take(buffer, torch.where(tensor.isnan(), buffer, tensor))

    def _record_counts(self, counts: Tensor, x: Tensor) -> None:
        if not recomputing():
            # The buffer is not in a state_dict, so it may still be on "meta".
            if self.counts.device != counts.device:
                self.counts = torch.zeros_like(counts)
            take(self.counts, counts)
            self._elements = x.numel()

    # -- thresholds --------------------------------------------------------------------------------

    def _new_threshold(self, z: Tensor, dim: int) -> _Update:
        if not self.per_channel:  # all channels as one
            z, dim = z.movedim(dim, -1).reshape(-1, 1), 1
        elements = z.numel() // z.shape[dim]
        if self.accumulate is not None and elements * self.density < self.accumulate:
            return self._accumulate(z, dim, elements)
        self._warn_of_few_activations(elements)
        quantile = channel_threshold(z, self.density, channel_dim=dim)
        update = _Update(self._move_towards(quantile), quantile)
        if self.accumulate is not None:  # this batch suffices
            return update._replace(largest=torch.full_like(self.largest, -math.inf), rows=0)
        return update

    def _move_towards(self, quantile: Tensor) -> Tensor:
        """Return the threshold after a step towards a quantile."""
        return torch.lerp(self.threshold, quantile.to(self.threshold.dtype), self.momentum)

    def _check_finite(self, numbers: Tensor, z: Tensor) -> None:
        """Raise on a CPU if z is not finite.

        numbers: any tensor that is not finite if z is not; a small one saves time.
        """
        if numbers.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if bool(numbers.sum().isfinite()):
            return
        if count := int(z.isfinite().logical_not().sum()):
            raise ValueError(
                f"SpatialSparsity: x must be finite, as must weight and bias, got {count} "
                "activations that are NaN or infinite after the normalisation"
            )

    def _warn_of_few_activations(self, elements: int) -> None:
        if self._warned or self.accumulate is not None or elements * self.density >= 1:
            return
        self._warned = True
        warnings.warn(
            f"SpatialSparsity: a batch of {elements} positions is expected to hold "
            f"{elements * self.density:.2g} activations per channel at density {self.density:.3g}, "
            "less than one, so its largest activation becomes the threshold; use larger batches or "
            "accumulate=10",
            UserWarning,
            stacklevel=2,
        )

    def _accumulate(self, z: Tensor, dim: int, elements: int) -> _Update:
        """Return the update of a batch that is accumulated with earlier ones.

        The threshold moves once the batches together are expected to hold `accumulate` activations
        per channel. Of n elements so far, their quantile is among the n * density + 2 largest of a
        channel, and n * density stays below 2 * accumulate: so many are kept. They are too few only
        if the density was raised in the meantime; then the earlier batches are dropped.
        """
        enough = self.accumulate or 0
        capacity = self.largest.shape[1]
        rows = int(self.rows) if self._rows is None else self._rows
        empty = torch.full_like(self.largest, -math.inf)
        earlier = self.largest
        if (rows + elements) * self.density >= 2 * enough:
            rows, earlier = 0, empty
        newest = self._largest_of(z, dim, capacity)
        largest = topk(torch.cat((earlier, newest), 1), capacity).values
        rows += elements
        if rows * self.density < enough:
            return _Update(self.threshold.clone(), newest[:, 0], largest, rows)
        rank = rows - max(1, int(rows * (1 - self.density)))
        return _Update(self._move_towards(largest[:, rank]), newest[:, 0], empty, 0)

    def _largest_of(self, z: Tensor, dim: int, count: int) -> Tensor:
        """Return the `count` largest of each channel of z, or more: [C, at least count].

        Fewer if a channel has fewer. The dtype is that of the buffer.
        """
        if dim == z.dim() - 1:
            largest = topk(
                z.reshape(-1, z.shape[dim]).t(), min(count, z.numel() // z.shape[dim])
            ).values
        else:
            planes = z.flatten(2)
            largest = topk(planes, min(count, planes.shape[2])).values.transpose(0, 1).flatten(1)
        return largest.to(self.largest.dtype)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._rows = None  # read from the buffer again

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> SpatialSparsity:
        before = dict(self._buffers)
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            old = before[name]
            if old is not None and buffer is not None and buffer.itemsize == 2:
                self._buffers[name] = keep_dtype(old, buffer)
        return self

    def extra_repr(self) -> str:
        """Return the arguments for repr."""
        parts = [f"{self.channels}, density={self.density:.4g}, momentum={self.momentum}"]
        if not self.per_channel:
            parts.append("per_channel=False")
        if self.accumulate is not None:
            parts.append(f"accumulate={self.accumulate}")
        if self.affine is not True:
            parts.append(f"affine={self.affine}")
        if self.channel_dim != 1:
            parts.append(f"channel_dim={self.channel_dim}")
        return ", ".join(parts)
