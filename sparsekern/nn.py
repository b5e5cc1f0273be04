"""Layers: top-k activation and the counter of dead neurons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .ops.activity import count_active
from .ops.checks import check_codes, check_count, check_floating
from .ops.topk import Codes, codes_to_dense, mask_with_codes, topk

Post = Callable[[torch.Tensor], torch.Tensor]

_UNSET: Any = object()
_POSTS: dict[str, Callable[[], nn.Module]] = {"ReLU": nn.ReLU, "Identity": nn.Identity}


class TopK(nn.Module):
    """Keep the k largest entries of the last dimension; everything else becomes zero.

    Equivalent PyTorch::

        values, indices = sparsekern.topk(x, k)
        y = torch.zeros_like(x).scatter(-1, indices, values.relu())

    Args:
        k: how many to keep, at least 1. The attribute may be changed at any time during training.
        post: function of the selected values, applied after the selection; None keeps them as they
            are. The default is ReLU, or None with abs=True. A bool here is taken as
            `use_sparse_activations`.
        abs: select by magnitude; values keep their sign.
        counter: a `DeadNeuronCounter` that is updated by each forward pass in training mode, from
            counts that the top-k kernel makes on its way.
        use_sparse_activations: return a sparse COO tensor (SAELens' form of the constructor).
        postact_fn: another name of `post` (OpenAI's form of the constructor).

    Shape: x [..., n] floating point -> [..., n] of the same dtype.

    Raises:
        TypeError, ValueError: k is not an integer or not in 1..n; post is neither callable nor
        None.

    Note:
        A selected value that ReLU sets to zero keeps its slot, gets no gradient and does not count
        as firing. The layer adds nothing to a state_dict; `k` and `postact_fn` entries of an OpenAI
        state_dict are accepted.

    Example:
        >>> import torch, sparsekern
        >>> sparsekern.TopK(2)(torch.tensor([3.0, -1.0, 2.0, 1.0])).tolist()
        [3.0, 0.0, 2.0, 0.0]
    """

    def __init__(
        self,
        k: int,
        post: Post | bool | None = _UNSET,
        *,
        abs: bool = False,
        counter: DeadNeuronCounter | None = None,
        use_sparse_activations: bool = False,
        postact_fn: Post | None = _UNSET,
    ) -> None:
        super().__init__()
        if isinstance(post, bool):
            use_sparse_activations = post
            post = _UNSET
        if postact_fn is not _UNSET:
            if post is not _UNSET:
                raise TypeError("TopK: give post or postact_fn, not both")
            post = postact_fn
        if post is _UNSET:
            post = None if abs else nn.ReLU()
        if post is not None and not callable(post):
            raise TypeError(f"TopK: post must be callable or None, got {post!r}")
        if counter is not None and not isinstance(counter, DeadNeuronCounter):
            raise TypeError(f"TopK: counter must be a DeadNeuronCounter or None, got {counter!r}")
        self.k = k
        self.post = post
        self.abs = abs
        self.counter = counter
        self.use_sparse_activations = use_sparse_activations

    @property
    def k(self) -> int:
        """How many entries a row keeps."""
        return self._kept.shape[1]

    @k.setter
    def k(self, k: int) -> None:
        # The width of an empty tensor: torch.compile takes the integers of modules as constants,
        # and would compile again for every k of a schedule.
        self._kept = torch.empty(0, check_count("TopK", "k", k, 2**31 - 1, "the largest index"))

    @property
    def _fused_relu(self) -> bool:
        return isinstance(self.post, nn.ReLU) or self.post in (torch.relu, nn.functional.relu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] -> [..., n], dense (or sparse COO with use_sparse_activations)."""
        if self.use_sparse_activations:
            return _coalesced(self.codes(x), x.shape)
        fused = self._fused_relu
        post = None if fused else self.post
        counter = self._active_counter(x)
        masked, values, indices, counts = mask_with_codes(
            x,
            self.k,
            relu=fused,
            abs=self.abs,
            return_counts=counter is not None and post is None,
        )
        if post is not None:
            values = post(values)
            masked = codes_to_dense(values, indices, x.shape[-1])
        if counter is not None:
            rows = x.numel() // x.shape[-1]
            if post is not None:
                counts = count_active(indices, x.shape[-1], values.detach())
            counter.update(counts=counts, rows=rows)
        return masked

    def codes(self, x: torch.Tensor, *, sorted: bool = False) -> Codes:
        """x [..., n] -> values [..., k] after `post` and indices int64 [..., k], ascending unless
        sorted."""
        counter = self._active_counter(x)
        values, indices = topk(x, self.k, sorted=sorted, relu=self._fused_relu, abs=self.abs)
        if self.post is not None and not self._fused_relu:
            values = self.post(values)
        if counter is not None:
            counter.update(indices=indices, values=values.detach())
        return Codes(values, indices)

    def _active_counter(self, x: torch.Tensor) -> DeadNeuronCounter | None:
        """The counter, if this pass has to be counted."""
        counter = self.counter if self.training else None
        if counter is not None and isinstance(x, torch.Tensor) and x.shape[-1:] != (counter.n,):
            raise ValueError(
                f"TopK: the last dimension of x must be the counter's n = {counter.n}, "
                f"got {list(x.shape)}"
            )
        return counter

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any], strict: bool = True) -> TopK:
        """Build the layer from OpenAI's state_dict: {"k": int, "postact_fn": name of a class,
        ...}."""
        if "k" not in state_dict:
            raise ValueError(f"TopK: state_dict must have an entry k, got {sorted(state_dict)}")
        layer = cls(int(state_dict["k"]), _post_named(state_dict.get("postact_fn", "ReLU")))
        unknown = set(state_dict) - {"k", "postact_fn"}
        if strict and unknown:
            raise ValueError(f"TopK: unexpected entries in state_dict: {sorted(unknown)}")
        return layer

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if (k := state_dict.pop(prefix + "k", None)) is not None:
            self.k = int(k)
        if (name := state_dict.pop(prefix + "postact_fn", None)) is not None:
            self.post = _post_named(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"k={self.k}, abs={self.abs}, post={self.post}"


def _post_named(name: str) -> nn.Module:
    """The function that OpenAI's state_dict names."""
    if name not in _POSTS:
        raise ValueError(f"TopK: postact_fn must be one of {', '.join(_POSTS)}, got {name!r}")
    return _POSTS[name]()


def _coalesced(codes: Codes, shape: torch.Size) -> torch.Tensor:
    """Ascending codes as a coalesced sparse COO tensor of the dense shape."""
    k = codes.indices.shape[-1]
    rows = torch.arange(codes.indices.numel() // k, device=codes.indices.device)
    coordinates = [codes.indices.reshape(-1)]
    rows = rows.repeat_interleave(k)
    for size in reversed(shape[:-1]):
        coordinates.append(rows % size)
        rows = rows // size
    return torch.sparse_coo_tensor(
        torch.stack(coordinates[::-1]),
        codes.values.reshape(-1),
        size=shape,
        is_coalesced=True,
        check_invariants=False,
    )


class DeadNeuronCounter(nn.Module):
    """Count, for each of n latents, the rows (tokens) since it last fired.

    A latent fires in a row when its activation there is not zero. An update with B rows sets the
    count of every latent that fired in one of them to 0 and adds B to all others. Nothing waits for
    the device.

    Args:
        n: number of latents, at least 1.
        device: where the buffers live.

    Attributes:
        rows_since_fired: [n] int64, saved with the model. A new latent starts at 0.

    Example:
        >>> import torch, sparsekern
        >>> counter = sparsekern.DeadNeuronCounter(3)
        >>> counter.update(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
        >>> counter.dead(1).tolist()
        [False, False, True]
    """

    rows_since_fired: torch.Tensor

    def __init__(self, n: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.n = check_count("DeadNeuronCounter", "n", n, 2**31 - 1, "the number of latents")
        self.register_buffer(
            "rows_since_fired", torch.zeros(self.n, dtype=torch.int64, device=device)
        )

    @torch.no_grad()
    def update(
        self,
        activations: torch.Tensor | None = None,
        *,
        indices: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        rows: int | None = None,
    ) -> None:
        """Take in a batch: dense activations [..., n], or codes, or counts [n] with their number of
        rows.

        Args:
            activations: [..., n] floating point; a row is everything but the last dimension.
            indices: [..., k] int64 or int32, with values: [..., k]; zero values do not fire.
            counts: [n] int64 (see `count_active`), with rows: how many rows they were counted over.

        Raises:
            TypeError, ValueError: not exactly one of the three forms, or shapes that do not fit.
        """
        op = "DeadNeuronCounter.update"
        if sum(form is not None for form in (activations, indices, counts)) != 1:
            raise TypeError(f"{op}: give exactly one of activations, indices or counts")
        if values is not None and indices is None:
            raise TypeError(f"{op}: values belong to indices, which are not given")
        if rows is not None and counts is None:
            raise TypeError(f"{op}: rows belong to counts, which are not given")
        if activations is not None:
            check_floating(op, "activations", activations)
            self._check_width(activations, "activations")
            fired = (activations != 0).reshape(-1, self.n).any(0)
            rows = activations.numel() // self.n
        elif indices is not None:
            check_codes(op, values, indices)
            fired = count_active(indices, self.n, values) > 0
            rows = indices.numel() // max(indices.shape[-1], 1)
        else:
            if counts is None or rows is None:
                raise TypeError(f"{op}: counts need rows, the number of rows counted over")
            if not isinstance(rows, int | torch.SymInt) or isinstance(rows, bool) or rows < 0:
                raise ValueError(f"{op}: rows must be an integer of at least 0, got {rows!r}")
            if counts.shape != (self.n,) or counts.is_floating_point():
                raise ValueError(
                    f"{op}: counts must be [{self.n}] integers, got {list(counts.shape)} of "
                    f"{counts.dtype}"
                )
            fired = counts > 0
        self.rows_since_fired += rows
        self.rows_since_fired.masked_fill_(fired, 0)

    def _check_width(self, tensor: torch.Tensor, name: str) -> None:
        if tensor.shape[-1] != self.n:
            raise ValueError(
                f"DeadNeuronCounter.update: the last dimension of {name} must be n = {self.n}, "
                f"got {list(tensor.shape)}"
            )

    def dead(self, threshold: int) -> torch.Tensor:
        """[n] bool: True where a latent has not fired for more than `threshold` rows."""
        if isinstance(threshold, bool) or not isinstance(threshold, int) or threshold < 0:
            raise ValueError(
                "DeadNeuronCounter.dead: threshold must be a number of rows >= 0, "
                f"got {threshold!r}"
            )
        return self.rows_since_fired > threshold

    def fraction(self, threshold: int) -> torch.Tensor:
        """0-d float32 tensor in 0..1: the share of latents that are dead at `threshold` rows."""
        return self.dead(threshold).float().mean()

    def reset(self, latents: torch.Tensor | None = None) -> None:
        """Start counting anew for all latents, or for those where the [n] bool mask is True."""
        if latents is None:
            self.rows_since_fired.zero_()
        else:
            self.rows_since_fired.masked_fill_(latents, 0)

    def extra_repr(self) -> str:
        return f"n={self.n}"
