"""Training of one dictionary in several processes of this machine: steps, bytes, and a model.

    python bench/several_processes.py            writes results/several-processes.json
    python bench/several_processes.py --quick [--results FOLDER]    a tiny size

A step is loss, gradients and Adam with dictionary rows of norm 1, on the same B rows in all:

    one            one process
    latents        `ShardedAutoencoder`: each process has N / W latents and sees all rows
    replicas       DistributedDataParallel of `SparseAutoencoder`: each sees B / W rows
    dense replicas DistributedDataParallel of torch's own layers, top-k as a masked dense matrix,
                   with torch's fused Adam

Processes meet over gloo on this machine. The jobs take turns, `ROUNDS` times. Machines that are
lent give less at times (two cores become the halves of one), so each process does a product of
fixed size before each step: the time of a step is the median of those steps, of all rounds, whose
product took at most `AT_REST` times the least of the job. Collectives alone are measured, too:
alpha is the time of one of 4 bytes, 1 / beta the time of each further byte that a process sends in
a ring. The model's step is the one of a process alone with its share of the work, and
alpha + sent / beta for each collective.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from measuring.checkout import RESULTS, sparsekern
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from sparsekern._system import replaced
from sparsekern.distributed import ShardedAutoencoder, count_traffic
from sparsekern.models import SparseAutoencoder
from sparsekern.optim import Adam

NAME = "several-processes.json"
ROUNDS = 4
AT_REST = 1.2
PRODUCT = 512  # rows, columns and terms of the product before a step
SIZES = (4, 65_536, 1_048_576, 8_388_608)  # bytes that each process gives


class Problem(NamedTuple):
    """B rows of D features, N latents, k of them active."""

    rows: int
    features: int
    latents: int
    k: int


class Job(NamedTuple):
    """How many processes do which kind of step, with how many threads each.

    `share`: one process alone with this share of the rows or of the latents, for the model.
    """

    kind: str
    processes: int
    threads: int
    share: int = 1


FULL, QUICK = Problem(1024, 768, 16384, 32), Problem(64, 32, 256, 4)
JOBS = (
    Job("one", 1, 2),
    Job("one", 1, 1),
    Job("rows of one", 1, 1, 2),
    Job("latents of one", 1, 1, 2),
    Job("latents", 2, 1),
    Job("replicas", 2, 1),
    Job("dense replicas", 2, 1),
    Job("latents", 4, 1),
    Job("replicas", 4, 1),
)


class DenseAutoencoder(nn.Module):
    """A top-k autoencoder of torch's layers; its forward pass returns the loss."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.encoder = nn.Linear(problem.features, problem.latents)
        self.decoder = nn.Linear(problem.latents, problem.features)
        self.k = problem.k

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean squared error over the variance."""
        scores = self.encoder(x - self.decoder.bias)
        values, indices = scores.topk(self.k, dim=-1)
        codes = torch.zeros_like(scores).scatter(-1, indices, values.relu())
        return (self.decoder(codes) - x).square().sum() / (x - x.mean(0)).square().sum()


class Losses(nn.Module):
    """A model whose forward pass is its loss, as DistributedDataParallel needs it."""

    def __init__(self, model: SparseAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the loss."""
        total: Tensor = self.model.loss(x)[1].total
        return total


def optimizer_of(model: SparseAutoencoder) -> Adam:
    """Adam that keeps the dictionary's rows at norm 1."""
    others = [p for name, p in model.named_parameters() if name != "dictionary"]
    return Adam([{"params": [model.dictionary], "unit_rows": True}, {"params": others}], lr=1e-4)


def step_of(job: Job, problem: Problem) -> Callable[[], None]:
    """Make the model of a job in this process, and its step."""
    torch.manual_seed(0)
    rows, features, latents, k = problem
    x = torch.randn(rows, features)
    model: nn.Module
    if job.kind == "dense replicas":
        model = DistributedDataParallel(DenseAutoencoder(problem))
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    elif job.kind == "latents":
        mesh = init_device_mesh("cpu", (job.processes,), mesh_dim_names=("latents",))
        sharded = ShardedAutoencoder(features, latents, k=k, mesh=mesh)
        model, optimizer = Losses(sharded), optimizer_of(sharded)
    else:
        share = job.share if job.kind == "latents of one" else 1
        own = SparseAutoencoder(features, latents // share, k=k)
        model, optimizer = Losses(own), optimizer_of(own)
        if job.kind == "replicas":
            model = DistributedDataParallel(model)
    if "replicas" in job.kind:
        x = x.chunk(job.processes)[dist.get_rank()].clone()
    elif job.kind == "rows of one":
        x = x[: rows // job.share]

    def step() -> None:
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()

    return step


class Timed(NamedTuple):
    """Seconds of a call, and of the product before it."""

    call: float
    product: float


def timed(function: Callable[[], object], seconds: float) -> list[Timed]:
    """Call for so many seconds, as the first process counts them; return the times of the calls."""
    times: list[Timed] = []
    going = torch.ones(1)
    factor = torch.ones(PRODUCT, PRODUCT)
    product = torch.empty_like(factor)
    while going.item():
        before = time.perf_counter()
        torch.mm(factor, factor, out=product)
        begin = time.perf_counter()
        function()
        end = time.perf_counter()
        times.append(Timed(end - begin, begin - before))
        going[0] = float(sum(one.call for one in times) < seconds or len(times) < 3)
        if dist.is_initialized():
            dist.broadcast(going, 0)
    return times


def at_rest(times: list[Timed]) -> list[float]:
    """Return the seconds of the calls before which the machine gave what it can."""
    least = min(one.product for one in times)
    return [one.call for one in times if one.product <= AT_REST * least]


def measured_step(job: Job, problem: Problem, seconds: float) -> dict[str, Any]:
    """Measure steps in this process of a job."""
    step = step_of(job, problem)
    for _ in range(3):
        step()
    with count_traffic() as traffic:
        step()
    times = timed(step, seconds)
    sent = traffic.sent
    if "replicas" in job.kind:  # all gradients, which DistributedDataParallel reduces
        parameters = 2 * problem.latents * problem.features + problem.latents + problem.features
        sent = 2 * (job.processes - 1) / job.processes * 4 * parameters
    return {
        "times": times, "sent": sent,
        "collectives": [[t.kind, t.sent] for t in traffic.transfers],
    }  # fmt: skip


def measured_collectives(count: int, seconds: float) -> dict[str, Any]:
    """Measure collectives of several sizes in this process."""
    found: dict[str, Any] = {}
    for kind in ("all_reduce", "all_gather"):
        lines = []
        for size in SIZES:
            given = torch.zeros(size // 4)
            results = list(torch.zeros(count, size // 4))
            call = {
                "all_reduce": lambda x=given: dist.all_reduce(x),
                "all_gather": lambda x=given, y=results: dist.all_gather(y, x),
            }[kind]
            call()
            sent = (count - 1) * size * (2 / count if kind == "all_reduce" else 1)
            lines.append([sent, statistics.median(at_rest(timed(call, seconds / len(SIZES))))])
        alpha = lines[0][1]
        (sent, slowest) = lines[-1]
        found[kind] = {"alpha": alpha, "beta": sent / max(slowest - alpha, 1e-9), "lines": lines}
    return found


def _process(rank: int, job: Job, problem: Problem, seconds: float, folder: str) -> None:
    torch.set_num_threads(job.threads)
    if job.processes > 1:
        store = dist.FileStore(f"{folder}/meeting", job.processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job.processes)
    if job.kind == "collectives":
        result = measured_collectives(job.processes, seconds)
    else:
        result = measured_step(job, problem, seconds)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    if job.processes > 1:
        dist.barrier()
    os._exit(0)  # threads of gloo may abort the end of an interpreter


def run(job: Job, problem: Problem, seconds: float) -> dict[str, Any]:
    """Run a job in processes of its own; return what its first one says."""
    os.environ |= {"OMP_NUM_THREADS": str(job.threads), "OMP_WAIT_POLICY": "passive"}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (job, problem, seconds, folder)
        torch.multiprocessing.spawn(_process, arguments, nprocs=job.processes)
        result: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
    return result


def modelled(job: Job, steps: dict[Job, dict[str, Any]], links: Any) -> float | None:
    """Compute the seconds of a step of a job of 2 processes; None where its parts are unknown.

    Gradients of replicas are reduced as one message; dense replicas are not modelled.
    """
    alone = {"latents": Job("latents of one", 1, 1, 2), "replicas": Job("rows of one", 1, 1, 2)}
    if job.processes != 2 or alone.get(job.kind) not in steps:
        return None
    collectives = steps[job]["collectives"] or [["all_reduce", steps[job]["sent"]]]
    costs = (links[kind]["alpha"] + sent / links[kind]["beta"] for kind, sent in collectives)
    return float(steps[alone[job.kind]]["seconds"] + sum(costs))


def main() -> None:
    """Measure, and write what was measured."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, help="folder; a tiny size is not written without")
    options = parser.parse_args()
    folder = options.results or (None if options.quick else RESULTS)
    problem, seconds = (QUICK, 0.1) if options.quick else (FULL, 1.5)
    jobs = [Job("one", 1, 2), Job("latents", 2, 1)] if options.quick else JOBS
    every: dict[Job, list[dict[str, Any]]] = {job: [] for job in jobs}
    for number in range(1 if options.quick else ROUNDS):
        for job in jobs:
            every[job].append(run(job, problem, seconds))
            one = statistics.median(call for call, _ in every[job][-1]["times"])
            print(number, job, f"{one * 1e3:.1f} ms", flush=True)
    steps: dict[Job, dict[str, Any]] = {}
    for job, found in every.items():
        times = [Timed(*pair) for one in found for pair in one["times"]]
        kept = at_rest(times)
        facts = {"seconds": statistics.median(kept), "steps": len(times), "at_rest": len(kept)}
        steps[job] = {**found[0], **facts}
    counts = () if options.quick else (2, 4)
    links = {n: run(Job("collectives", n, 1), problem, seconds) for n in counts}
    rows = [
        {
            **job._asdict(), "milliseconds": 1e3 * one["seconds"], "sent": one["sent"],
            "steps": one["steps"], "at_rest": one["at_rest"],
            "rows_per_second": problem.rows / one["seconds"],
            "modelled": None if (m := modelled(job, steps, links.get(2))) is None else 1e3 * m,
        }
        for job, one in steps.items()
    ]  # fmt: skip
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "torch": torch.__version__,
        "sparsekern": sparsekern.__version__, "problem": problem._asdict(), "steps": rows,
        "links": links,
    }  # fmt: skip
    if folder is not None:
        with replaced(folder / NAME) as file:
            file.write(json.dumps(result, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
