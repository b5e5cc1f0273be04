"""The top-k activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..ops.checks import check_count
from ..ops.codes import Codes
from ..ops.codes_to_dense import codes_to_dense
from ..ops.count_active import count_active
from ..ops.topk import mask_with_codes, topk
from .counter import DeadNeuronCounter, check_counter
from .saved_k import SavedK

Post = Callable[[torch.Tensor], torch.Tensor]


class _Default:
    def __repr__(self) -> str:  # in signatures
        return "ReLU, or None with abs"


_DEFAULT: Any = _Default()


class TopK(SavedK):
    """Keep the k largest entries of the last dimension; everything else becomes zero.

    Equivalent PyTorch::

        values, indices = sparsekern.topk(x, k)
        y = torch.zeros_like(x).scatter(-1, indices, values.relu())

    Args:
        k: how many to keep, at least 1. The attribute may be changed at any time during training.
        post: function of the selected values, applied after the selection; None keeps them as they
            are. The default is ReLU, or None with abs=True.
        abs: select by magnitude; values keep their sign.
        groups: select in so many groups of neighbouring entries separately, k / groups in each;
            must divide k and n.
        counter: a `DeadNeuronCounter` that is updated by each forward pass in training mode, from
            counts that the top-k kernel makes on its way.

    Shape: x [..., n] floating point -> [..., n] of the same dtype.

    Raises:
        TypeError, ValueError: k is not an integer or not in 1..n; post is neither callable nor
        None.

    Note:
        A selected value that ReLU sets to zero keeps its slot, gets no gradient and does not count
        as firing. A state_dict holds k, as `current_k`, once it was changed, and nothing else. The
        constructors and state_dicts of other libraries are in `sparsekern.integrations`.

    Example:
        >>> import torch, sparsekern
        >>> sparsekern.TopK(2)(torch.tensor([3.0, -1.0, 2.0, 1.0])).tolist()
        [3.0, 0.0, 2.0, 0.0]
    """

    def __init__(
        self,
        k: int,
        post: Post | None = _DEFAULT,
        *,
        abs: bool = False,
        groups: int = 1,
        counter: DeadNeuronCounter | None = None,
    ) -> None:
        super().__init__()
        if post is _DEFAULT:
            post = None if abs else nn.ReLU()
        if post is not None and not callable(post):
            raise TypeError(f"TopK: post must be callable or None, got {post!r}")
        self.groups = check_count("TopK", "groups", groups, 2**31 - 1, "the largest index")
        self.k = k
        self.post = post
        self.abs = abs
        self.counter = check_counter("TopK", counter)

    @property
    def k(self) -> int:
        """Number of entries that a row keeps."""
        k: int = self._stored_k()
        return k

    @k.setter
    def k(self, k: int) -> None:
        k = check_count("TopK", "k", k, 2**31 - 1, "the largest index")
        if k % self.groups:
            raise ValueError(f"TopK: k must be a multiple of groups = {self.groups}, got {k}")
        self._store_k(k)

    @property
    def _fused_relu(self) -> bool:
        return isinstance(self.post, nn.ReLU) or self.post in (torch.relu, nn.functional.relu)

    @property
    def is_plain(self) -> bool:
        """True if values are selected by size, not magnitude, and then go through ReLU."""
        return self._fused_relu and not self.abs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [..., n] for x [..., n]."""
        fused = self._fused_relu
        post = None if fused else self.post
        counter = self._active_counter(x)
        single = self.groups == 1
        grouped = x if single else self._split_groups(x)
        masked, values, indices, counts = mask_with_codes(
            grouped,
            self.k // self.groups,
            relu=fused,
            abs=self.abs,
            return_counts=counter is not None and post is None and single,
        )
        if post is not None:
            values = post(values)
            masked = codes_to_dense(values, indices, grouped.shape[-1])
        if counter is not None and single:
            rows = x.numel() // x.shape[-1]
            if post is not None:
                counts = count_active(indices, x.shape[-1], values.detach())
            counter.update(counts=counts, rows=rows)
        elif counter is not None:
            counter.update(masked.detach().flatten(-2))
        return masked if single else masked.flatten(-2)

    def _split_groups(self, x: torch.Tensor) -> torch.Tensor:
        """Reshape x [..., n] to [..., groups, n / groups]."""
        if x.shape[-1] % self.groups:
            raise ValueError(
                f"TopK: groups must divide the last dimension of x, {x.shape[-1]}, "
                f"got {self.groups}"
            )
        grouped: torch.Tensor = x.unflatten(-1, (self.groups, x.shape[-1] // self.groups))
        return grouped

    def codes(self, x: torch.Tensor, *, sorted: bool = False) -> Codes:
        """Return the codes of x [..., n]: values [..., k] after `post`, indices int64 [..., k].

        Indices ascend; with sorted, the largest of a group come first.
        """
        counter = self._active_counter(x)
        grouped = x if self.groups == 1 else self._split_groups(x)
        values, indices = topk(
            grouped, self.k // self.groups, sorted=sorted, relu=self._fused_relu, abs=self.abs
        )
        if self.groups > 1:
            starts = torch.arange(self.groups, device=x.device).unsqueeze(1) * grouped.shape[-1]
            values, indices = values.flatten(-2), (indices + starts).flatten(-2)
        if self.post is not None and not self._fused_relu:
            values = self.post(values)
        if counter is not None:
            counter.update(indices=indices, values=values.detach())
        return Codes(values, indices)

    def _active_counter(self, x: torch.Tensor) -> DeadNeuronCounter | None:
        """Return the counter if this pass has to be counted, else None."""
        counter = self.counter if self.training else None
        if counter is not None:
            counter.check_columns("TopK", x)
        return counter

    def extra_repr(self) -> str:
        """Return the arguments for repr."""
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return f"k={self.k}{groups}, abs={self.abs}, post={self.post}"
