"""SAELens' own trainer on stored activations, as it is and on an accelerated model.

    python bench/saelens_trainer.py ACTIVATIONS      writes results/saelens-trainer.json

ACTIVATIONS is a file of the activation store (see real_activations.py). Three runs see the same
batches from the same weights: SAELens in float64, SAELens, and SAELens with an accelerated model.
The error rule is held to the whole curve: the largest distance of the accelerated run's loss from
the float64 run's is at most twice that of SAELens' own, plus 4 eps of the loss. The time of a step
is the median of SAETrainer.step.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import sae_lens
import torch
from measuring.checkout import RESULTS, sparsekern
from sae_lens.config import LoggingConfig, SAETrainerConfig

from sparsekern.data import ActivationStore

KINDS = {
    "TopK": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig),
    "BatchTopK": (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig),
}


def train(sae: torch.nn.Module, batches: list[torch.Tensor], options: argparse.Namespace) -> dict:
    """Losses and milliseconds of every step."""
    config = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=options.batch_size,
        lr=options.learning_rate, lr_end=options.learning_rate, dead_feature_window=50,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = sae_lens.SAETrainer(config, sae, iter(()))
    losses, times, dead = [], [], 0
    for batch in batches:
        rows = batch.to(sae.dtype)
        start = time.perf_counter()
        output = trainer.step(rows)
        times.append(1e3 * (time.perf_counter() - start))
        trainer.n_training_steps += 1
        losses.append(output.loss.item())
        dead = max(dead, int(trainer.dead_neurons.sum()))
    return {"losses": losses, "median_ms": statistics.median(times), "most_dead": dead}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("activations", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--latents", type=int, default=3072)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with ActivationStore(options.activations) as store:
        stream = store.batches(options.batch_size, seed=0, prefetch=False)
        batches = [next(stream).float() for _ in range(options.steps)]
    scale = (
        batches[0].shape[1] ** 0.5 / torch.stack([b.norm(dim=-1).mean() for b in batches]).mean()
    )
    batches = [batch * scale for batch in batches]
    written = {
        "steps": options.steps, "batch_size": options.batch_size, "latents": options.latents,
        "features": batches[0].shape[1], "k": options.k, "threads": options.threads,
        "sae-lens": version("sae-lens"), "torch": torch.__version__, "runs": {},
    }  # fmt: skip
    for kind, (cls, config) in KINDS.items():
        torch.manual_seed(0)
        sae = cls(config(d_in=batches[0].shape[1], d_sae=options.latents, k=options.k))
        runs = {
            "float64": train(copy.deepcopy(sae).to(torch.float64), batches, options),
            "upstream": train(copy.deepcopy(sae), batches, options),
            "accelerated": train(sparsekern.accelerate(sae), batches, options),
        }
        truth = torch.tensor(runs["float64"]["losses"], dtype=torch.float64)
        apart = {
            name: ((torch.tensor(runs[name]["losses"]).double() - truth).abs() / truth).max().item()
            for name in ("upstream", "accelerated")
        }
        allowed = 2 * apart["upstream"] + 4 * torch.finfo(torch.float32).eps
        written["runs"][kind] = {
            "relative distance from float64": apart,
            "within the error rule": apart["accelerated"] <= allowed,
            "times as fast": runs["upstream"]["median_ms"] / runs["accelerated"]["median_ms"],
            **runs,
        }
        sys.stdout.write(
            f"{kind}: {runs['upstream']['median_ms']:.0f} ms, accelerated "
            f"{runs['accelerated']['median_ms']:.0f} ms; apart from float64 {apart}; loss "
            f"{truth[0]:.4g} to {truth[-1]:.4g}, dead {runs['accelerated']['most_dead']}\n"
        )
    (options.results / "saelens-trainer.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
