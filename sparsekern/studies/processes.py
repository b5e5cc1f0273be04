"""Runs in several processes, as torchrun starts them, and how they end together.

Each process that fails says why to the others, through the store that they met at. The first one
reports it, once. A process that is gone without a word was killed: the others notice that its
connections are closed.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..training import RunError
from ..training.processes import Processes
from .configs import SettingError

# After which a process gives up waiting for another one.
TIMEOUT = datetime.timedelta(minutes=5)
# Seconds to wait for what others have to say, and for the first to report it.
LAST_WORDS, REPORT = 3.0, 20.0
DATA, LATENTS = "data", "latents"
_POLL = 0.05
# Of the runs of this process, whose entries in the store must not meet.
_jobs = itertools.count()


class FirstProcessLostError(RunError):
    """The process that reports errors is gone; raised in one of the others."""


def process_count() -> int:
    """Return the number of processes that torchrun started, or 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Tell whether this is the process that reports: the only one, or torchrun's first."""
    return process_count() == 1 or os.environ.get("RANK", "0") == "0"


def should_report() -> bool:
    """Tell whether this process should say why it ends; wait in one that leaves it to the first.

    torchrun ends all processes when one has ended, so the others wait until the first has spoken.
    Where it does not within some seconds, it knows nothing of this error.
    """
    if is_first_process():
        return True
    if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:  # `job` has told the first
        return False
    time.sleep(REPORT)
    return True


def was_restarted() -> bool:
    """Tell whether torchrun started this process anew, after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def mesh_sizes(text: str | None) -> dict[str, int]:
    """Read a mesh such as "data=1,latents=2"; None puts all processes along the latents.

    Raises:
        SettingError: it is another text, or does not multiply to the number of processes.
    """
    count = process_count()
    if text is None:
        return {DATA: 1, LATENTS: count}
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in (DATA, LATENTS) or name in sizes or not number.isdecimal():
            raise SettingError("mesh", f"must be like data=1,latents=2, got {text!r}")
        sizes[name] = int(number)
    sizes = {DATA: sizes.get(DATA, 1), LATENTS: sizes.get(LATENTS, 1)}
    if sizes[DATA] * sizes[LATENTS] != count:
        raise SettingError(
            "mesh", f"must multiply to the number of processes {count} (torchrun), got {text!r}"
        )
    return sizes


class JobProcesses(Processes):
    """The processes that torchrun started.

    Args:
        mesh: processes along "data" and along "latents".
        store: at which all of them met.
    """

    def __init__(self, mesh: Mapping[str, int], store: Any) -> None:
        from ..distributed import collectives, state

        self._state, self._store = state, store
        self._everyone = collectives.Group(dist.group.WORLD)
        self.sizes = mesh
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.first = self.rank == 0

    def device_mesh(self, device: torch.device) -> Any:
        """Make the mesh of these processes on a type of device; all must call it."""
        from torch.distributed.device_mesh import init_device_mesh

        from ..distributed import collectives

        names = tuple(name for name in (DATA, LATENTS) if self.sizes[name] > 1 or name == LATENTS)
        shape = tuple(self.sizes[name] for name in names)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        self._sharing = collectives.Group(mesh[LATENTS].get_group())
        return mesh

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise RunError, naming the first of some facts (JSON types) that differs from others'.

        All processes raise it, that of the first one that differs from process 0.
        """
        self._store.set(f"facts/{self.rank}", json.dumps(facts))
        theirs = json.loads(self._store.get("facts/0"))
        own = json.loads(json.dumps(facts))
        name = next((name for name, value in own.items() if value != theirs.get(name)), None)
        if name is not None:
            self._store.set(
                f"differs/{self.rank}",
                f"process {self.rank}: all processes must have the same {name}, got {own[name]!r} "
                f"in process {self.rank} and {theirs.get(name)!r} in process 0",
            )
        (first,) = self.largest(0 if name is None else self.count - self.rank)
        if first:
            raise RunError(self._store.get(f"differs/{self.count - first}").decode())

    # -- what training asks ------------------------------------------------------------------------

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """Return the largest that any process gave, for each of the numbers."""
        # On the CPU, so that no process waits for its GPU.
        given = torch.tensor(numbers, device="cpu")
        return tuple(self._everyone.largest(given).tolist())

    def flags(self, flags: Tensor) -> Tensor:
        """Return True where any process has True, of bool tensors of one shape."""
        return torch.tensor(self.largest(*flags.int().tolist()), device="cpu").bool()

    def share_of_norm(self, tensors: list[Tensor]) -> Tensor:
        """Compute the squares of the norms of what all processes have alike, and of the own parts.

        Returns:
            float64 [2]: squares overflow in float32 before their root would.
        """
        parts: list[list[Tensor]] = [[], []]
        for tensor in tensors:
            parts[self._state.is_cut(tensor)].append(self._state.local_part(tensor))
        return torch.stack([torch.nn.utils.get_total_norm(p).double().square() for p in parts])

    def norms(self, shares: list[Tensor], *numbers: int) -> tuple[Tensor, tuple[int, ...]]:
        """Compute norms of all tensors, and the largest of numbers; on a CPU in one message."""
        squares = torch.stack(shares)  # [norms, 2]
        if squares.is_cuda:
            own, largest = self._sharing.sum(squares[:, 1]), self.largest(*numbers)
        else:
            own, others = squares[:, 1], squares.new_tensor(numbers)
            everything = self._everyone.gather_bytes(torch.cat((own, others)))[0]
            largest = tuple(map(int, everything[:, len(own) :].amax(0).tolist()))
            # Those that have the same rows and other latents.
            first = self.rank - self.rank % self.sizes[LATENTS]
            own = everything[first : first + self.sizes[LATENTS], : len(own)].sum(0)
        return (own + squares[:, 0]).sqrt().float(), largest

    def local(self, tensor: Tensor) -> Tensor:
        """Return what this process holds of a tensor."""
        return self._state.local_part(tensor)

    def saved_shape(self, tensor: Tensor) -> list[int]:
        """Return the shape that a tensor has in a checkpoint."""
        return self._state.whole_shape(tensor)

    def whole(self, tensor: Tensor) -> Tensor:
        """Return a tensor as a checkpoint has it, in the first process."""
        return self._state.gather_to_first(tensor)

    def part(self, saved: Tensor, like: Tensor) -> Tensor:
        """Return what belongs in place of `like` from a tensor of a checkpoint."""
        return self._state.part_like(saved, like)

    # -- the end -----------------------------------------------------------------------------------

    def explained(self, error: BaseException) -> BaseException:
        """Tell the others why this process ends; return what it should raise.

        For the first process that is the error of another one where there is one.
        """
        lost = _is_of_connections(error) or isinstance(error, SystemExit)
        message = "" if lost else " ".join(str(error).split()) or type(error).__name__
        try:
            self._store.set(f"end/{self.rank}", message)
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()  # which wakes those that wait for this one
            if self.first:
                return self._explained_by_others(error) if lost else error
            self._wait_for(["end/0"], LAST_WORDS)
            if self._store.check(["end/0"]):
                self._wait_for(["reported"], REPORT)
            elif not any(self._store.check([f"end/{rank}"]) for rank in range(1, self.rank)):
                return FirstProcessLostError(_lost("0", self.count))
        except RuntimeError:
            pass  # torchrun, which keeps the store, is gone
        return error

    def _explained_by_others(self, error: BaseException) -> BaseException:
        """Return the error of another process, or that one is lost."""
        keys = {rank: f"end/{rank}" for rank in range(1, self.count)}
        self._wait_for(list(keys.values()), LAST_WORDS)
        silent = [str(rank) for rank, key in keys.items() if not self._store.check([key])]
        for rank, key in keys.items():
            if str(rank) not in silent and (text := self._store.get(key).decode()):
                return RunError(f"process {rank}: {text}")
        if isinstance(error, SystemExit):
            return error
        if silent:
            return RunError(_lost(", ".join(silent), self.count))
        return RunError(f"the processes lost each other: {str(error).splitlines()[0]}")

    def reported(self) -> None:
        """Tell the others that the first process says what there is to say."""
        with contextlib.suppress(RuntimeError):
            self._store.set("reported", "")

    def _wait_for(self, keys: list[str], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._store.check(keys) and time.monotonic() < until:
            time.sleep(_POLL)


def _lost(which: str, count: int) -> str:
    return (
        f"process {which} of {count} was lost (killed, or its connection was): the last checkpoint "
        "stays, and --resume goes on from it"
    )


def _is_of_connections(error: BaseException) -> bool:
    """Tell whether an error says no more than that another process does not answer."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "nccl", "connection", "timed out", "timeout")
    return type(error) is RuntimeError and any(word in str(error).lower() for word in words)


@contextlib.contextmanager
def job(mesh: str | None, device: str) -> Iterator[JobProcesses | None]:
    """Meet the other processes of torchrun's; yield None where this is the only one.

    What one of them raises ends all. The first process raises it; the others raise what they can.

    Args:
        mesh: see `mesh_sizes`.
        device: name of the device that the run asks for.

    Raises:
        SettingError: the mesh does not fit.
        RunError: in the first process: another one failed, or was lost.
    """
    sizes = mesh_sizes(mesh)
    if process_count() == 1:
        yield None
        return
    with_gpu = torch.device("cuda" if device == "auto" else device).type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if with_gpu and torch.cuda.is_available() else "gloo"
    store, rank, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # torchrun keeps the store when it starts processes anew: they must not meet those before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"sparsekern/{attempt}/{next(_jobs)}", store)
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=rank, world_size=count,
        timeout=TIMEOUT,
    )  # fmt: skip
    processes = JobProcesses(sizes, store)
    before = _on_sigterm(_end)
    try:
        yield processes
        processes.largest(0)  # none leaves while another may still fail
        dist.destroy_process_group()
    except BaseException as error:
        # torchrun ends the others when one has ended; they still have something to say.
        _on_sigterm(signal.SIG_IGN)
        reason = processes.explained(error)
        if processes.first:
            processes.reported()
        if reason is error:
            raise
        raise reason from error
    _on_sigterm(before)


def _end(number: int, _: Any) -> None:
    """End by an exception, which others can be told."""
    raise SystemExit(128 + number)


def _on_sigterm(handler: Any) -> Any:
    """Set what SIGTERM does; return what it did. Threads cannot."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, handler)
