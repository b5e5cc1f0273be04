"""Training steps of other libraries before and after `sparsekern.accelerate`.

    python bench/accelerated.py                append the lines of the table
    python bench/accelerated.py --only sae-lens --dry-run

A step is the library's own, from a batch to the updated weights where its trainer has one function
for it (SAELens: SAETrainer.step; dictionary_learning: TopKTrainer.update), else its forward pass
and loss, the gradients, and torch's fused Adam (sparsify). "forward+backward" ends with the
gradients. AuxK sees no dead latents. Both models have the same weights, and before anything is
timed their losses and gradients are compared on a small case. Each library is measured in a process
of its own; those that are not installed are left out. `peak` is what a step takes beyond what was
there before it: the gradients among it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from measuring.checkout import RESULTS, sparsekern
from rows import append
from targets import ACCELERATED_TARGETS, Workload
from workloads import describe, measure_workload

from sparsekern.benchmarks import peers
from sparsekern.benchmarks.problem import Problem
from sparsekern.benchmarks.timing import Effort

Step = Callable[[], torch.Tensor]
Model = tuple[torch.nn.Module, Step, Step]


def sae_lens(workload: Workload, x: torch.Tensor) -> Model:
    """A TopKTrainingSAE at its defaults, its training pass, and SAETrainer.step."""
    import sae_lens as library
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import TrainStepInput

    config = library.TopKTrainingSAEConfig(d_in=workload.d, d_sae=workload.n, k=workload.k)
    sae = library.TopKTrainingSAE(config)
    settings = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=workload.rows, lr=1e-4, lr_end=1e-4,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = library.SAETrainer(settings, sae, iter(()))
    batch = TrainStepInput(
        sae_in=x, coefficients={}, dead_neuron_mask=trainer.dead_neurons, n_training_steps=0,
        is_logging_step=False,
    )  # fmt: skip
    return sae, lambda: sae.training_forward_pass(batch).loss, lambda: trainer.step(x).loss


def dictionary_learning(workload: Workload, x: torch.Tensor) -> Model:
    """A TopKTrainer's dictionary, its loss and its update."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10**6, activation_dim=workload.d, dict_size=workload.n, k=workload.k, layer=0,
        lm_name="none", device="cpu",
    )  # fmt: skip
    return (
        trainer.ae,
        lambda: trainer.loss(x, step=1),
        lambda: torch.tensor(trainer.update(1, x)),
    )


def sparsify(workload: Workload, x: torch.Tensor) -> Model:
    """A SparseCoder, its FVU, and a step that keeps the decoder's rows at norm 1."""
    import sparsify as library

    config = library.SparseCoderConfig(num_latents=workload.n, k=workload.k)
    coder = library.SparseCoder(workload.d, config)
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=True)

    def step() -> torch.Tensor:
        coder.set_decoder_norm_to_unit_norm()
        loss = coder(x).fvu
        loss.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return coder, lambda: coder(x).fvu, step


MODELS = {
    "sae-lens": sae_lens,
    "dictionary-learning": dictionary_learning,
    "eai-sparsify": sparsify,
}


def problem(name: str, workload: Workload) -> Problem:
    """One step of an accelerated model and of one that is not."""
    small = replace(workload, rows=64, n=512, d=32, k=8)
    ours, theirs = _calls(name, workload)
    return Problem(
        ours=ours,
        peers={name: theirs},
        check=lambda backend: _compare(name, small),
        traffic=8 * workload.n * workload.d * 4,
        formula="both matrices read once in each pass, their gradients written once, read once",
        roof=None,
        flops=2 * workload.rows * workload.n * workload.d,
        grad=True,
    )


def _calls(name: str, workload: Workload) -> tuple[Step, Step]:
    calls = []
    for fast in (True, False):
        torch.manual_seed(0)
        x = torch.randn(workload.rows, workload.d)
        model, loss, step = MODELS[name](workload, x)
        if fast:
            sparsekern.accelerate(model)
        if workload.mode == "forward+backward":
            step = _gradients(model, loss)
        calls.append(step)
    return calls[0], calls[1]


def _gradients(model: torch.nn.Module, loss: Step) -> Step:
    def step() -> torch.Tensor:
        value = loss()
        value.backward()
        model.zero_grad(set_to_none=True)  # so that the next step's peak counts its gradients
        return value.detach()

    return step


def _compare(name: str, workload: Workload) -> float:
    """How far losses and gradients are apart, in units of what is allowed (1e-5 of the largest)."""
    found = []
    for fast in (True, False):
        torch.manual_seed(0)
        x = torch.randn(workload.rows, workload.d)
        model, loss, _ = MODELS[name](workload, x)
        if fast:
            sparsekern.accelerate(model)
        value = loss()
        value.backward()
        found.append([value.detach(), *(parameter.grad for parameter in model.parameters())])
    return max(
        ((one - two).abs().max() / two.abs().max() / 1e-5).item()
        for one, two in zip(*found, strict=True)
    )


def measure(options: argparse.Namespace) -> None:
    """Measure one library."""
    for target in ACCELERATED_TARGETS:
        if target.peer != options.peer or options.only not in f"{target.workload} {target.peer}":
            continue
        effort = Effort(options.seconds, options.least)
        found = measure_workload(
            target.workload, [target], effort, problem=problem(target.peer, target.workload)
        )
        if not options.dry_run:
            append(options.results, found)
        for row in found:
            sys.stdout.write(f"{describe(row)}\n")
            sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the libraries that are installed, one process after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=tuple(MODELS), help="measure this one, in this process")
    parser.add_argument("--only", default="", metavar="TEXT", help="lines that contain this text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--least", type=int, default=5, help="rounds of each loop at least")
    parser.add_argument("--dry-run", action="store_true", help="append no rows")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.peer:
        trouble = peers.trouble(options.peer)
        if trouble:
            sys.stdout.write(f"the lines of {options.peer} are left out: {trouble}\n")
            return 0
        measure(options)
        return 0
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = [[sys.executable, __file__, "--peer", peer, *given] for peer in MODELS]
    return max(subprocess.run(command, check=False).returncode for command in commands)


if __name__ == "__main__":
    sys.exit(main())
