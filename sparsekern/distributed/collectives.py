"""The collectives of sharded training, their gradients, and what they move.

A value that every process of a group holds alike is called shared. A loss is shared: each process
computes all of it, so the gradient of what is shared is shared, too. Hence two rules:

* `Group.total` adds what differs among the processes to something shared; its gradient is handed
  back as it is.
* `Group.shared` marks something shared that each process uses for its own part; its gradient is
  the sum of those of all parts.

Every collective of this package is called here, so that `count_traffic` sees all of them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Transfer(NamedTuple):
    """One collective: its kind, the bytes that each process gives, and the number of processes."""

    kind: str
    given: int
    processes: int

    @property
    def sent(self) -> float:
        """Bytes that each process sends, in a ring."""
        share = (self.processes - 1) / self.processes
        return {"all_reduce": 2 * share, "all_gather": self.processes * share}[
            self.kind
        ] * self.given


@dataclass
class Traffic:
    """What this process gave to collectives."""

    transfers: list[Transfer] = field(default_factory=list)

    @property
    def sent(self) -> float:
        """Bytes that this process sent, as rings do it."""
        return sum(transfer.sent for transfer in self.transfers)


_counting: list[Traffic] = []
# On a CPU what all processes give is gathered and added up, if it has no more bytes: gloo takes
# longer to reduce it.
GATHERED = 65_536
# Seconds in which a thread of gloo lets go of what it reduced last.
_LETTING_GO = 0.1
# torch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count the collectives of this package, in this process and all of its threads.

    Example::

        with sparsekern.distributed.count_traffic() as traffic:
            output, loss = model.loss(x)
            loss.total.backward()
        print(traffic.sent / 1e6, "MB")
    """
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


class Group:
    """Processes that work together along one dimension of a mesh.

    Args:
        group: of torch.distributed; None stands for this process alone, for which nothing is sent.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self._looking: tuple[Any, Callable[[], None]] | None = None
        if self.size > 1:
            _let_go_at_exit()

    def __deepcopy__(self, memo: Any) -> Group:
        return self

    def total(self, part: Tensor) -> Tensor:
        """Return the sum of all processes' parts, which is shared. Differentiable."""
        if self.size == 1:
            return part
        result: Tensor = _Total.apply(part, self)  # type: ignore[no-untyped-call]
        return result

    def shared(self, tensor: Tensor) -> Tensor:
        """Return a shared tensor, whose gradient is the sum of all processes'."""
        if self.size == 1 or not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        result: Tensor = _Shared.apply(tensor, self)  # type: ignore[no-untyped-call]
        return result

    def gather(self, part: Tensor) -> Tensor:
        """Return the parts of all processes, [size, ...], which are shared. Differentiable."""
        if self.size == 1:
            return part.unsqueeze(0)
        result: Tensor = _Gather.apply(part, self)  # type: ignore[no-untyped-call]
        return result

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, without a gradient."""
        return self._reduce(tensor, dist.ReduceOp.SUM, torch.sum)

    def largest(self, tensor: Tensor) -> Tensor:
        """Return the largest of all processes, element by element, without a gradient."""
        return self._reduce(tensor, dist.ReduceOp.MAX, torch.amax)

    def _reduce(
        self, tensor: Tensor, operation: Any, of_gathered: Callable[[Tensor, int], Tensor]
    ) -> Tensor:
        if self.size == 1:
            return tensor
        # Sums of 16-bit parts would round once for each process.
        wide = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
        if tensor.is_cpu and self.size * wide.numel() * wide.element_size() <= GATHERED:
            return of_gathered(self._gather(wide.detach()), 0).to(tensor.dtype)
        result = wide.detach().clone(memory_format=torch.contiguous_format)
        self._look_first()
        self._note("all_reduce", result)
        dist.all_reduce(result, operation, group=self._group)
        return result.to(tensor.dtype)

    def gather_bytes(self, *tensors: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, each [size, ...], without gradients, in one message.

        Shapes and dtypes must be the same in all processes.
        """
        if self.size == 1:
            return [tensor.detach().unsqueeze(0) for tensor in tensors]
        flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
        everything = self._gather(flat[0] if len(flat) == 1 else torch.cat(flat))
        results, begin = [], 0
        for tensor, part in zip(tensors, flat, strict=True):
            piece = everything[:, begin : begin + len(part)].reshape(-1)
            results.append(piece.view(tensor.dtype).view(self.size, *tensor.shape))
            begin += len(part)
        return results

    def look_later(self, numbers: Tensor, look: Callable[[Tensor], None]) -> None:
        """Gather some numbers while this process works on, and look at them before it sends more.

        Args:
            numbers: [count], the same count in all processes.
            look: called with those of all processes, [size, count]; it may raise. Not called if
                this is called again first, after an error.
        """
        self._look_first(forget=True)
        result = numbers.new_empty(self.size * numbers.numel())
        self._note("all_gather", numbers)
        work = _all_gather(result, numbers, group=self._group, async_op=True)
        self._looking = (work, lambda: look(result.view(self.size, -1)))

    def _look_first(self, *, forget: bool = False) -> None:
        looking, self._looking = self._looking, None
        if looking is not None:
            work, look = looking
            work.wait()
            if not forget:
                look()

    def _gather(self, tensor: Tensor) -> Tensor:
        if self.size == 1:
            return tensor.unsqueeze(0)
        self._look_first()
        result = tensor.new_empty(self.size * tensor.numel())
        self._note("all_gather", tensor)
        _all_gather(result, tensor.contiguous().view(-1), group=self._group)
        return result.view(self.size, *tensor.shape)

    def _note(self, kind: str, tensor: Tensor) -> None:
        for traffic in _counting:
            traffic.transfers.append(
                Transfer(kind, tensor.numel() * tensor.element_size(), self.size)
            )


@functools.cache
def _let_go_at_exit() -> None:
    """Give the threads of process groups time before the interpreter ends.

    Such a thread drops its last tensor, for which it needs the interpreter, after the process that
    waited for the result has gone on. In torch 2.13 a mesh keeps the threads alive beyond
    destroy_process_group, and one that finds the interpreter gone aborts the process.
    """
    atexit.register(time.sleep, _LETTING_GO)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(part: Tensor, group: Group) -> Tensor:
        return group.sum(part)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor, group: Group) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.group.sum(grad), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(part: Tensor, group: Group) -> Tensor:
        return group._gather(part)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.rank = inputs[1].rank

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad[ctx.rank], None
