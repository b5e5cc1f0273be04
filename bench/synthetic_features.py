"""Known features found again: our autoencoders beside SAELens' on its own synthetic benchmark.

    python bench/synthetic_features.py --work FOLDER    writes results/synthetic-features.json
    python bench/synthetic_features.py --work FOLDER --quick --results FOLDER    a tiny size

SynthSAEBench (Chanin and Garriga-Alonso 2026, arXiv 2602.14687; sae_lens.synthetic) makes rows of
known features: a hierarchy, correlations, firing probabilities by Zipf's law, more features than
the autoencoder has latents. It has 16384 features of 768 numbers, 4096 latents, k = 25, batches of
1024, 200 million rows. Here features, width, latents, trees of the hierarchy, active features and
latents of a row, and batch are an eighth (the largest firing probability is divided by the root of
8, by which as many features are active per dimension as there), and rows a 64th, so that the
learning rate is larger than its 3e-4.

Every run sees the same rows in the same order (our activation store's, by seed), one epoch, on one
thread. SAELens' autoencoders are trained by its SAETrainer with the settings of its runner. Ours
are trained by `sparsekern.studies.sae.run`: with its defaults, with these and SAELens' weight of
AuxK, and with SAELens' settings wherever they differ (constant learning rate, AuxK's size and
weight, when a latent is dead, dictionary rows of any norm, no revival; first weights and the
clipping of gradients stay each library's own). SAELens' evaluation judges all on the same rows,
which nothing was trained on: its own autoencoders as its benchmark does, before they are saved, and
once more as they are loaded; ours after `save_pretrained(..., to="saelens")`, loaded by SAELens.
`seconds` are of the processor, since other programs may run beside.

What is in FOLDER is not made again.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import sae_lens
import torch
from measuring.checkout import RESULTS, sparsekern
from sae_lens import synthetic
from sae_lens.config import LoggingConfig, SAETrainerConfig

from sparsekern.studies import sae
from sparsekern.studies.sae.rows import Rows

BENCHMARK = {"features": 16384, "width": 768, "latents": 4096, "roots": 128, "batch": 1024, "k": 25}
LARGEST_PROBABILITY = 0.4
MODEL_SEED, TRAINING_SEED, HELD_OUT_SEED = 42, 1, 2
DEAD_WINDOW = 1000  # steps, of SAELens' runner
ROWS_AT_A_TIME = 1024  # made, and judged
LEVELS = (1 / 32, 1 / 8, 1 / 2)  # of the latents, for Matryoshka
KINDS = ("TopK", "BatchTopK", "Matryoshka")
SAELENS, OURS = "SAELens", "sparsekern"
OURS_WITH_AUXK, OURS_LIKE_SAELENS = "sparsekern, AuxK's weight 1", "sparsekern, SAELens' settings"
ARMS = (SAELENS, OURS, OURS_WITH_AUXK, OURS_LIKE_SAELENS)
MEASURES = ("f1_score", "precision", "recall", "mcc", "uniqueness", "explained_variance",
            "shrinkage", "sae_l0", "true_l0", "dead_latents")  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much of the benchmark: sizes divided by `factor`, rows to train on and to judge by."""

    factor: int
    rows: int
    judged_rows: int

    def of(self, name: str) -> int:
        return max(1, round(BENCHMARK[name] / self.factor))

    @property
    def prefixes(self) -> tuple[int, ...]:
        return tuple(round(level * self.of("latents")) for level in LEVELS)


FULL = Size(factor=8, rows=200_000_000 // 64, judged_rows=100_000)
QUICK = Size(factor=32, rows=20_000, judged_rows=2048)


def known_features(size: Size) -> synthetic.SyntheticModel:
    """The benchmark's own configuration, scaled."""
    return synthetic.SyntheticModel(
        synthetic.SyntheticModelConfig(
            num_features=size.of("features"),
            hidden_dim=size.of("width"),
            firing_probability=synthetic.ZipfianFiringProbabilityConfig(
                exponent=0.5, max_prob=LARGEST_PROBABILITY / size.factor**0.5, min_prob=5e-4
            ),
            hierarchy=synthetic.HierarchyConfig(
                total_root_nodes=size.of("roots"), branching_factor=4, max_depth=3,
                mutually_exclusive_portion=1.0, mutually_exclusive_min_depth=0,
                compensate_probabilities=True, scale_children_by_parent=True,
            ),
            orthogonalization=synthetic.OrthogonalizationConfig(num_steps=100, lr=3e-4),
            correlation=synthetic.LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
            mean_firing_magnitudes=synthetic.LinearMagnitudeConfig(start=5.0, end=4.0),
            std_firing_magnitudes=synthetic.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
            bias=0.5,
            seed=MODEL_SEED,
        )
    )  # fmt: skip


def write_rows(model: synthetic.SyntheticModel, size: Size, path: Path) -> None:
    """Write the rows to train on."""
    unfinished = path.with_suffix(".part")
    rows = np.lib.format.open_memmap(
        unfinished, mode="w+", dtype=np.float32, shape=(size.rows, size.of("width"))
    )
    torch.manual_seed(TRAINING_SEED)
    for start in range(0, size.rows, ROWS_AT_A_TIME):
        stop = min(size.rows, start + ROWS_AT_A_TIME)
        rows[start:stop] = model.sample(ROWS_AT_A_TIME)[: stop - start].numpy()
    rows.flush()
    unfinished.rename(path)


def config_of(
    arm: str, kind: str, seed: int, size: Size, options: argparse.Namespace
) -> sae.Config:
    """The settings of a run of ours; SAELens takes its rows and their order from them."""
    settings: dict[str, Any] = {}
    if arm in (OURS_WITH_AUXK, OURS_LIKE_SAELENS):
        settings["auxk_weight"] = 1.0
    if arm == OURS_LIKE_SAELENS:
        settings |= {
            "warmup": 0.0, "decay": 0.0, "revival": 0.0, "scale_scores": True,
            "auxk": size.of("width") // 2, "dead_after": DEAD_WINDOW * size.of("batch"),
        }  # fmt: skip
    return sae.Config(
        activations=(str(options.work / "rows.npy"),),
        latents=size.of("latents"),
        activation="topk" if kind == "TopK" else "batchtopk",
        k=size.of("k"),
        prefixes=size.prefixes if kind == "Matryoshka" else (),
        batch_size=size.of("batch"),
        learning_rate=options.learning_rate,
        seed=seed,
        progress=False,
        **settings,
    )


def judge(
    autoencoder: torch.nn.Module, model: synthetic.SyntheticModel, size: Size
) -> dict[str, float]:
    """What SAELens' evaluation says, on the same rows for every autoencoder."""
    torch.manual_seed(HELD_OUT_SEED)
    found = synthetic.eval_sae_on_synthetic_data(
        autoencoder, model.feature_dict, model.activation_generator, size.judged_rows,
        ROWS_AT_A_TIME,
    ).to_dict()  # fmt: skip
    found |= found.pop("classification")
    return {name: found[name] for name in MEASURES}


def train_theirs(
    kind: str, config: sae.Config, model: synthetic.SyntheticModel, size: Size, folder: Path
) -> dict[str, Any]:
    """Train with SAELens."""
    name = {"Matryoshka": "MatryoshkaBatchTopK"}.get(kind, kind)
    more = {"matryoshka_widths": [*size.prefixes, config.latents]} if kind == "Matryoshka" else {}
    torch.manual_seed(config.seed)
    autoencoder = getattr(sae_lens, f"{name}TrainingSAE")(
        getattr(sae_lens, f"{name}TrainingSAEConfig")(
            d_in=size.of("width"), d_sae=config.latents, k=config.k, **more
        )
    )
    with Rows(config) as rows:
        settings = SAETrainerConfig(
            total_training_samples=rows.tokens, train_batch_size_samples=config.batch_size,
            lr=config.learning_rate, lr_end=config.learning_rate, dead_feature_window=DEAD_WINDOW,
            logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        stream = rows.batches(0, 0, torch.device("cpu"))
        trainer = sae_lens.SAETrainer(settings, autoencoder, stream)
        start = time.process_time()
        trainer.fit()
        seconds = time.process_time() - start
    autoencoder.save_inference_model(str(folder))
    return {
        "seconds": seconds,
        **judge(autoencoder, model, size),
        "loaded": judge(sae_lens.SAE.load_from_disk(folder), model, size),
    }


def train_ours(
    config: sae.Config, model: synthetic.SyntheticModel, size: Size, folder: Path
) -> dict[str, Any]:
    """Train with our engine, and hand the result to SAELens."""
    start = time.process_time()
    sae.run(config, folder / "run")
    seconds = time.process_time() - start
    trained = sae.load_run(folder / "run").model
    trained.fold_norms()
    trained.save_pretrained(folder / "saelens", to="saelens")
    loaded = sae_lens.SAE.load_from_disk(folder / "saelens")
    return {"seconds": seconds, **judge(loaded, model, size)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for rows and runs")
    parser.add_argument("--quick", action="store_true", help="a tiny size, which shows nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # SAELens' notes on clamped probabilities
    size = QUICK if options.quick else FULL
    options.work.mkdir(parents=True, exist_ok=True)
    model = known_features(size)
    if not (options.work / "rows.npy").exists():
        write_rows(model, size, options.work / "rows.npy")
    runs = []
    for seed in options.seeds:
        for kind in options.kinds:
            for arm in ARMS:
                folder = options.work / re.sub(r"\W+", "-", f"{kind} {arm} {seed}")
                done = folder / "judged.json"
                if not done.exists():
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                    config = config_of(arm, kind, seed, size, options)
                    if arm == SAELENS:
                        found = train_theirs(kind, config, model, size, folder)
                    else:
                        found = train_ours(config, model, size, folder)
                    done.write_text(json.dumps(found))
                run = {"arm": arm, "kind": kind, "seed": seed, **json.loads(done.read_text())}
                runs.append(run)
                sys.stdout.write(
                    f"{kind}, {arm}, seed {seed}: F1 {run['f1_score']:.3f}, MCC {run['mcc']:.3f}, "
                    f"explained {run['explained_variance']:.4f}, L0 {run['sae_l0']:.2f}, "
                    f"dead {run['dead_latents']}, {run['seconds']:.0f} s\n"
                )
                sys.stdout.flush()
    written = {
        "size": {**asdict(size), **{name: size.of(name) for name in BENCHMARK}},
        "learning_rate": options.learning_rate, "seeds": options.seeds, "threads": 1,
        "sae-lens": version("sae-lens"), "torch": torch.__version__,
        "sparsekern": sparsekern.__version__, "runs": runs,
    }  # fmt: skip
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "synthetic-features.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
