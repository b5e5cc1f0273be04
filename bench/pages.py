"""Rewrite what the README and the documentation show of the committed rows.

    python bench/pages.py           after new rows; bench/run.py does it, too
    python bench/pages.py --check   change nothing; exit code 1 where something is out of date

The tables stand between marks in README.md and in docs/benchmarks.md, distributed.md and
studies.md, the figures in docs/figures.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from figures import dead_units, motif_errors, ratios, training_step
from prediction import predicted_steps, prediction_table
from rows import load
from table import Line, newest, origins, provenance
from targets import CPU_TARGETS, GPU_TARGETS

from sparsekern.benchmarks.cases.topk import ITSELF

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# The lines of the README's table: operation, mode, and peer, each with the reader's words for both.
HEADLINES = (
    ("topk", "forward", "torch.topk", "k largest of a row"),
    ("TopK", "forward+backward", "torch.topk, relu, scatter", "top-k layer, with gradient"),
    (
        "sparse_matmul",
        "forward+backward",
        "embedding_bag",
        "codes times dictionary, and gradients",
    ),
    ("SparseAutoencoder", "forward+backward", "eai-sparsify", "SAE training step"),
    ("accelerate", "forward+backward", "sae-lens", "SAELens' own training step"),
    ("adam_step", "forward", "fused Adam, projection, normalization", "Adam, unit-norm dictionary"),
    ("channel_threshold", "forward", "torch.kthvalue", "quantile of each channel"),
    ("pointwise_conv", "forward+backward", "F.conv2d", "1x1 convolution of few activations"),
)
SECTIONS = (
    ("Top-k, masks and counts", ("topk", "topk_mask", "TopK", "count_active")),
    ("Products of codes", ("sparse_matmul",)),
    ("Encoder, autoencoder, optimizer", ("linear_topk", "SparseAutoencoder", "adam_step")),
    ("Other libraries, before and after accelerate", ("accelerate",)),
    ("Sparse bottleneck and VAE-SAE", ("SparseBottleneck", "VAE-SAE step")),
    ("Sparsity in space", ("channel_threshold", "SpatialSparsity", "pointwise_conv")),
    ("Reading activations", ("ActivationStore",)),
)

# Arms of the studies, from the worst to the best: name in the rows, in the page, and what it is.
VAE_SAE_ARMS = (
    ("fixed", "fixed k", "k = 50 from the first step on"),
    ("topk", "Top-k", "k falls from 500 to 50"),
    ("l1", "L1", "steered to 50 active units"),
    ("auxk", "Top-k and AuxK", "dead units explain the rest"),
    ("dense", "never sparsified", "all 500 units"),
    ("homeostasis", "homeostasis", "dead units' biases rise"),
    ("standardize", "standardized scores", "each unit's, over the batch"),
)
SPARLING_ARMS = (
    ("sparling", "threshold per channel", "the density falls while accuracy holds"),
    ("l1-1", "L1, weight 1", ""),
    ("l1-3", "L1, weight 3", ""),
    ("l1-10", "L1, weight 10", ""),
    ("l1-30", "L1, weight 30", ""),
)


# What SAELens' evaluation says of an autoencoder: name in the rows, in the page, and digits.
FEATURE_MEASURES = (
    ("mcc", "MCC", 3),
    ("f1_score", "F1", 3),
    ("uniqueness", "uniqueness", 3),
    ("explained_variance", "explained variance", 4),
    ("sae_l0", "L0", 2),
    ("dead_latents", "dead", 1),
    ("seconds", "seconds", 0),
)


# Kinds of steps of bench/several_processes.py that the page shows.
PROCESS_KINDS = {
    "one": "one process",
    "latents": "latents shared out",
    "replicas": "replicas (DistributedDataParallel)",
    "dense replicas": "replicas of torch's dense layers",
}


# -- tables ----------------------------------------------------------------------------------------


def measured(lines: Iterable[Line], op: str, mode: str, peer: str) -> list[Line]:
    """The lines of an operation and a peer that have a time."""
    return [
        line
        for line in lines
        if line.row
        and not line.row["refused"]
        and (line.target.workload.op, line.target.workload.mode, line.target.peer)
        == (op, mode, peer)
    ]


def spread(ratios: Sequence[float]) -> str:
    """The least and the largest ratio, or the only one."""
    least, largest = (f"{ratio:.{1 if ratio < 10 else 0}f}" for ratio in (min(ratios), max(ratios)))
    return f"{least}x" if least == largest else f"{least}x to {largest}x"


def headlines(lines: Sequence[Line]) -> str:
    """The README's table: the range of the ratios over the sizes and dtypes measured."""
    text = ["| | compared with | times as fast |", "| --- | --- | --- |"]
    for op, mode, peer, words in HEADLINES:
        ratios = [line.row["ratio"] for line in measured(lines, op, mode, peer) if line.row]
        text.append(f"| {words} (`{op}`) | {peer} | {spread(ratios)} |")
    (where,) = {provenance(lines)[0].split(", commit")[0]}
    return "\n".join([*text, "", f"Over all sizes and dtypes measured; {where}."])


def gpu_headline(lines: Sequence[Line]) -> str:
    """The README's sentence on the CUDA kernels."""
    native = [line for line in lines if line.target.backend == "native"]
    topk = measured(native, "topk", "forward", "torch.topk")
    step = measured(native, "training step", "forward+backward+optimizer", "eai-sparsify")
    fast = [spread([line.row["ratio"] for line in found if line.row]) for found in (topk, step)]
    (gpu,) = {line.row["gpu"] for line in (*topk, *step) if line.row}
    return (
        f"On one {gpu}: `topk` {fast[0]} as fast as torch.topk ({topk[0].target.workload.case}), a "
        f"training step {fast[1]} as fast as eai-sparsify's ({step[0].target.workload.case})."
    )


def section(title: str, lines: Sequence[Line]) -> str:
    """A table of the documentation's page, with a heading."""
    header = (
        "operation", "case", "ours", "compared with", "its time", "ratio", "required", "roofline",
        "peak memory", "its peak",
    )  # fmt: skip
    text = [f"### {title}", "", f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    for line in lines:
        cells = list(line.cells())
        verdict = cells.pop(7)
        cells[6] += ": **missed**" * (verdict == "MISSED")
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def gpu_section(lines: Sequence[Line]) -> str:
    """What is waiting for a GPU, or what was measured there."""
    if any(line.row for line in lines):
        return section("On a GPU", lines)
    text = [
        "### On a GPU: not measured",
        "",
        "| operation | case | to be compared with | required |",
    ]
    text.append("| --- | --- | --- | --- |")
    for line in lines:
        operation, case, _, peer, _, _, required, *_ = line.cells()
        text.append(f"| {operation} | {case} | {peer} | {required} |")
    return "\n".join(text)


def speed(cpu: Sequence[Line], gpu: Sequence[Line]) -> str:
    """All tables of docs/benchmarks.md."""
    parts = []
    for title, operations in SECTIONS:
        chosen = [line for line in cpu if line.target.workload.op in operations]
        parts.append(section(title, [line for line in chosen if line.target.peer != ITSELF]))
        hard = [line for line in chosen if line.target.peer == ITSELF]
        if hard:
            parts.append(section("Hard inputs", hard))
    barred = [line for line in (*cpu, *gpu) if line.target.required and line.row is not None]
    reached = sum(line.good for line in barred)
    sources = [*provenance([*cpu, *gpu]), *origins([*cpu, *gpu])]
    sources.append(f"{reached} of {len(barred)} requirements are met.")
    return "\n\n".join([*parts, gpu_section(gpu), " ".join(sources)])


# -- studies ---------------------------------------------------------------------------------------


def cells_of(results: Path, study: str) -> list[dict[str, str]]:
    """The committed rows of a study: one for each network trained."""
    with (results / study / "cells.csv").open() as file:
        return list(csv.DictReader(file))


def mean(cells: Iterable[dict[str, str]], column: str, scale: float = 1) -> str:
    """Mean and standard deviation over the seeds."""
    values = [scale * float(cell[column]) for cell in cells]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def dead_table(cells: Sequence[dict[str, str]]) -> str:
    """Dead units and reconstruction of each arm of the VAE-SAE study."""
    sets = ("dSprites", "Shapes3D")
    header = [*(f"dead, {name} (%)" for name in sets), *(f"error, {name} (nats)" for name in sets)]
    text = [f"| | {' | '.join(header)} |", "| --- " * 5 + "|"]
    for arm, title, _ in VAE_SAE_ARMS:
        chosen = [
            [cell for cell in cells if (cell["arm"], cell["dataset"]) == (arm, name.lower())]
            for name in sets
        ]
        columns = [mean(seeds, "dead_never", 100) for seeds in chosen]
        columns += [mean(seeds, "reconstruction") for seeds in chosen]
        text.append(f"| {title} | {' | '.join(columns)} |")
    return "\n".join(text)


def features_table(results: Path) -> str:
    """How well known features are found again, for each kind of autoencoder and its trainer."""
    written = json.loads((results / "synthetic-features.json").read_text())
    seeds = len(written["seeds"])
    header = ["autoencoder", "trained by", *(title for _, title, _ in FEATURE_MEASURES)]
    text = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    arms: dict[tuple[str, str], list[dict[str, float]]] = {}
    for run in written["runs"]:
        arms.setdefault((run["kind"], run["arm"]), []).append(run)
    for (kind, arm), runs in arms.items():
        if len(runs) != seeds:
            raise ValueError(f"features_table: {kind} of {arm} must have {seeds} runs")
        cells = []
        for name, _, digits in FEATURE_MEASURES:
            values = [run[name] for run in runs]
            half = (max(values) - min(values)) / 2
            cells.append(f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}")
        text.append(f"| {kind} | {arm} | {' | '.join(cells)} |")
    versions = f"sae-lens {written['sae-lens']}, torch {written['torch']}"
    text += ["", f"Means and half ranges of {seeds} seeds; {versions}, one thread."]
    return "\n".join(text)


def processes_table(results: Path) -> str:
    """Steps of several processes on one machine, and what the model says of them."""
    written = json.loads((results / "several-processes.json").read_text())
    problem, steps = written["problem"], written["steps"]
    (whole,) = (s for s in steps if (s["kind"], s["processes"], s["threads"]) == ("one", 1, 2))
    text = [
        "| step | processes | threads of each | ms | modelled | speed | each sends, MB |",
        "| --- " * 7 + "|",
    ]
    for step in steps:
        if step["kind"] in PROCESS_KINDS:
            share = whole["milliseconds"] / step["milliseconds"]
            modelled = "" if step["modelled"] is None else f"{step['modelled']:.0f}"
            text.append(
                f"| {PROCESS_KINDS[step['kind']]} | {step['processes']} | {step['threads']} | "
                f"{step['milliseconds']:.0f} | {modelled} | {share:.2f}x | "
                f"{step['sent'] / 1e6:.1f} |"
            )
    size = "B = {rows}, D = {features}, N = {latents}, k = {k}".format(**problem)
    links = "; ".join(
        f"{count} processes: " + ", ".join(
            f"{kind} {1e3 * link['alpha']:.1f} ms and {link['beta'] / 1e9:.2f} GB/s"
            for kind, link in kinds.items()
        )
        for count, kinds in written["links"].items()
    )  # fmt: skip
    beside = "Speed: rows per second beside one process with two threads"
    beside += ". Of the steps, those count before which both cores were free"
    text += ["", f"{size}; gloo, two cores, torch {written['torch']}. {beside}. {links}."]
    return "\n".join(text)


def recoveries_table(results: Path) -> str:
    """What the synthetic preset recovers in one, two and four processes."""
    written = json.loads((results / "several-recoveries.json").read_text())
    text = ["| processes | recovered | FVU | dead | steps |", "| --- " * 5 + "|"]
    for run in written["runs"]:
        text.append(
            f"| {run['processes']} | {run['recovered']:.1%} | {run['fvu']:.4f} | "
            f"{run['dead']:.1%} | {run['steps']} |"
        )
    return "\n".join(text)


def screening_table(results: Path) -> str:
    """How many candidates rows have, and what was compared with the truth."""
    written = json.loads((results / "screening.json").read_text())
    text = ["| encoder | D | latents | k | candidates a row | most |", "| --- " * 6 + "|"]
    for row in written["candidates"]:
        crowded = f", {row['crowded']} of {row['rows']} rows have no room" * bool(row["crowded"])
        text.append(
            f"| {row['name']} | {row['d']} | {row['n']} | {row['k']} | {row['mean']:.0f} | "
            f"{row['most']}{crowded} |"
        )
    search, truths = written["search"], written["double precision"]
    compared = " and ".join(f"{row['rows']:,} rows ({row['name']})" for row in truths)
    lost = sum(row["lost"] for row in truths)
    close = sum(row["closer than float32 tells"] for row in truths)
    beside = (
        f"Selections of {compared} beside those of double precision: {lost} latents differ by "
        f"more than float32 can tell, {close} by less."
    )
    searched = (
        f"Codes of {search['rows']:,} rows, half of them random and half made to deceive the "
        f"bound, beside those of all float32 scores: {search['lost']} rows differ."
    )
    text += ["", beside, searched]
    if run := written["training"]:
        far, time = run["distance"], run["milliseconds"]
        text.append(
            f"The loss of {run['steps']} steps on that layer's activations ({run['rows']} rows, "
            f"{run['latents']} latents) is {far['with']:.1e} from the loss in float64 at most, "
            f"{far['without']:.1e} without screening; a step, with torch's Adam, takes "
            f"{time['with']:.0f} ms, {time['without']:.0f} without."
        )
    return "\n".join(text)


def screening_speed_table(results: Path) -> str:
    """Encoders beside torch's and beside the product alone, and training runs."""
    written = json.loads((results / "screening-speed.json").read_text())
    head = ("rows", "D", "latents", "k", "F.linear, ms", "with topk, ms", "product alone, ms")
    text = [f"| {' | '.join(head)} | linear_topk, ms |", "| --- " * 8 + "|"]
    for row in written["encoders"]:
        times = row["milliseconds"]
        kept = ", copy kept" * row["kept copy"]
        numbers = " | ".join(f"{times[name]:.3g}" for name in times)
        text.append(f"| {row['rows']}{kept} | {row['d']} | {row['n']} | {row['k']} | {numbers} |")
    text += ["", f"{written['threads']} threads, medians, in turn.", ""]
    for run in written["training"] or ():
        speeds, fvu = run["tokens_per_second"], run["fvu"]
        ratio = statistics.median(
            a / b for a, b in zip(speeds["with"], speeds["without"], strict=True)
        )
        least, most = (
            [f"{pick(fvu[name]):.4f}" for name in ("with", "without")] for pick in (min, max)
        )
        text.append(
            f"* `train sae` on a sentence model's layer, {run['latents']:,} latents, "
            f"k = {run['k']}, batches of {run['rows']}, {len(fvu['with'])} seeds: "
            f"{statistics.median(speeds['with']):,.0f} tokens/s, "
            f"{statistics.median(speeds['without']):,.0f} without screening, {ratio:.2f}x; "
            "fraction of variance unexplained "
            f"{least[0]} to {most[0]}, {least[1]} to {most[1]} without."
        )
    return "\n".join(text)


# -- files -----------------------------------------------------------------------------------------


def between_marks(text: str, name: str, content: str) -> str:
    """A page with what stands between `<!-- rows: name -->` and the next end mark replaced."""
    pattern = re.compile(rf"(<!-- rows: {name} -->\n).*?(<!-- end rows -->)", re.DOTALL)
    changed, count = pattern.subn(lambda m: f"{m[1]}\n{content}\n\n{m[2]}", text)
    if count != 1:
        raise ValueError(f"between_marks: the page must have the marks of {name} once, got {count}")
    return changed


def pages(root: Path = ROOT, results: Path = RESULTS) -> dict[Path, str]:
    """Every file that shows rows, with the content that it should have."""
    rows = load(results)
    found, one_gpu = newest(rows), [row for row in rows if row["machine"] == "nvidia-h200"]
    cpu = [Line(target, found.get(target.key)) for target in CPU_TARGETS]
    gpu = [Line(target, found.get(target.key)) for target in GPU_TARGETS]
    vae_sae, sparling = cells_of(results, "vae-sae-small"), cells_of(results, "sparling-tiny")
    docs = root / "docs"
    readme, benchmarks, studies = root / "README.md", docs / "benchmarks.md", docs / "studies.md"
    distributed, exact = docs / "distributed.md", docs / "how-encoding-is-exact.md"
    return {
        readme: between_marks(
            between_marks(readme.read_text(), "headlines", headlines(cpu)),
            "gpu",
            gpu_headline(gpu),
        ),
        benchmarks: between_marks(
            between_marks(benchmarks.read_text(), "speed", speed(cpu, gpu)),
            "known features",
            features_table(results),
        ),
        distributed: between_marks(
            between_marks(
                between_marks(
                    distributed.read_text(), "several processes", processes_table(results)
                ),
                "prediction",
                prediction_table(one_gpu),
            ),
            "several recoveries",
            recoveries_table(results),
        ),
        exact: between_marks(
            between_marks(exact.read_text(), "screening", screening_table(results)),
            "screening speed",
            screening_speed_table(results),
        ),
        studies: between_marks(studies.read_text(), "dead units", dead_table(vae_sae)),
        docs / "figures" / "training-step.svg": training_step(cpu),
        docs / "figures" / "ratios.svg": ratios(cpu),
        docs / "figures" / "predicted-steps.svg": predicted_steps(one_gpu),
        docs / "figures" / "dead-units.svg": dead_units(VAE_SAE_ARMS, vae_sae),
        docs / "figures" / "motif-errors.svg": motif_errors(SPARLING_ARMS, sparling),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Rewrite the pages that show committed rows.")
    parser.add_argument("--check", action="store_true", help="change nothing, name what is old")
    options = parser.parse_args(arguments)
    old = {
        path: content
        for path, content in pages().items()
        if not path.exists() or path.read_text() != content
    }
    for path, content in old.items():
        sys.stdout.write(f"{path.relative_to(ROOT)} {'is out of date' * options.check}\n")
        if not options.check:
            path.write_text(content)
    return 1 if old and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
