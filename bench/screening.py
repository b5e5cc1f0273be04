"""What screening of the encoder finds and keeps, as results/screening.json.

    python bench/screening.py [--activations FILE --run RUN] [--tries 100000]

Counts, for random and for trained dictionaries, the candidates of a row (see
docs/how-encoding-is-exact.md), compares selections with those of double precision, and searches for
inputs that lose a latent: random ones of every size and range, and some that were made for it by
ascent on what rounding takes away. With FILE, a file of the activation store (real_activations.py
makes one), an autoencoder is trained from the same weights on the same batches in float64, without
screening and with it. The error rule is held to the whole curve: the largest distance of the loss
with screening from that in float64 is at most twice that of the loss without, plus 4 eps of the
loss. RUN is the folder of a run of `sparsekern train sae` on FILE.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import chain, count, islice
from pathlib import Path

import pages
import torch
from measuring.checkout import RESULTS, sparsekern

from sparsekern._system import replaced
from sparsekern.data import ActivationStore
from sparsekern.ops.linear_topk import native, screen, slices
from sparsekern.studies.sae import load_run

SIZES = ((768, 16384, 32), (768, 65536, 64), (2048, 32768, 64), (4096, 65536, 64))
ROWS = 256
TRUE_ROWS = 20_000
STEPS, TRAINED_ROWS, TRAINED_LATENTS, TRAINED_K = 300, 1024, 6144, 32
ROUNDOFF = 2.0**-24


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--activations", type=Path, help="file of activations")
    parser.add_argument("--run", type=Path, help="folder of a run on them")
    parser.add_argument("--tries", type=int, default=100_000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if not screen.is_quick_here():
        print("this CPU has no instructions for bfloat16: it screens in another arithmetic")
    torch.manual_seed(0)
    layers = []
    for d, n, k in SIZES:
        x, weight = torch.randn(ROWS, d), torch.nn.functional.normalize(torch.randn(n, d))
        layers.append(("Gaussian", x, weight, None, k))
        if (d, n) == SIZES[0][:2]:
            mixed = sparsekern.sparse_matmul(
                torch.rand(ROWS, k), torch.randint(n, (ROWS, k)), weight
            )
            layers.append(("Gaussian, rows are sums of k latents", mixed, weight, None, k))
    if options.activations:
        layers.append(trained(options))
    found = {
        "candidates": [candidates(*layer) for layer in layers],
        "double precision": [against_truth(*layer) for layer in (layers[0], *layers[5:])],
        "training": training(options) if options.activations else None,
        "search": search(options.tries),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    with replaced(options.results / "screening.json") as file:
        file.write((json.dumps(found, indent=1) + "\n").encode())
    if options.results == RESULTS:
        pages.main([])
    if found["training"] and not found["training"]["within the error rule"]:
        print("the loss with screening is further from float64's than the error rule allows")
        return 1
    lost = found["search"]["lost"] + sum(row["lost"] for row in found["double precision"])
    print(f"{lost} latents lost")
    return 1 if lost else 0


def trained(options: argparse.Namespace) -> tuple:
    """A trained encoder and the activations it was trained on."""
    model = load_run(options.run).model
    store = ActivationStore(options.activations)
    x = store.stored_rows(0, TRUE_ROWS).float() - model.decoder_bias.detach()
    weight, bias = model.encoder.detach(), model.encoder_bias.detach()
    return "trained on a sentence model's layer", x, weight, bias, int(model.k)


def candidates(
    name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, k: int
) -> dict:
    """How many candidates rows have, on average and at most."""
    layer = slices.Layer(weight, bias, None, None, torch.float32)
    product = screen.Product(native, layer, x[:2048], torch.bfloat16)
    counts = screen.find_candidates(product, k, range(len(weight))).counts
    fitting = counts[counts >= 0].float()
    return {
        "name": name, "d": weight.shape[1], "n": len(weight), "k": k, "rows": len(counts),
        "mean": round(fitting.mean().item(), 1), "most": int(fitting.max()),
        "crowded": int((counts < 0).sum()),
    }  # fmt: skip


def against_truth(
    name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, k: int
) -> dict:
    """Selections beside those of double precision: latents that float32 can tell from the k-th."""
    while len(x) < TRUE_ROWS:
        x = torch.cat([x, torch.randn_like(x)])
    rows = lost = other = 0
    for part in x[:TRUE_ROWS].split(500):
        few, more = lost_latents(part, weight, bias, k)
        rows, lost, other = rows + len(part), lost + few, other + more
    return {"name": name, "rows": rows, "lost": lost, "closer than float32 tells": other}


def lost_latents(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, k: int
) -> tuple[int, int]:
    """How many selected latents lie below the k-th true score: by more than two float32 sums may
    be off, and by less."""
    codes = sparsekern.linear_topk(x, weight, bias, k, relu=False)
    wide = None if bias is None else bias.double()
    exact = torch.nn.functional.linear(x.double(), weight.double(), wide)
    lengths = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
    error = (x.shape[1] + 18) * ROUNDOFF * (lengths if wide is None else lengths + wide.abs())
    below = exact.topk(k).values[:, -1:] - exact.gather(1, codes.indices)
    apart = below > error.gather(1, codes.indices) + error.amax(1, keepdim=True)
    return int(apart.sum()), int((below > 0).sum()) - int(apart.sum())


def training(options: argparse.Namespace) -> dict:
    """Losses of STEPS steps and milliseconds of one, in float64, without screening and with it."""
    store = ActivationStore(options.activations)
    epochs = (store.batches(TRAINED_ROWS, seed=0, epoch=epoch) for epoch in count())
    batches = list(islice(chain.from_iterable(epochs), STEPS))
    curves, times = {}, {}
    for name, dtype, screened in (
        ("float64", torch.float64, False),
        ("without", torch.float32, False),
        ("with", torch.float32, True),
    ):
        torch.manual_seed(0)
        model = sparsekern.sae.SparseAutoencoder(batches[0].shape[1], TRAINED_LATENTS, TRAINED_K)
        model = model.to(dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses, milliseconds = [], []
        with sparsekern.screening(screened):
            for batch in batches:
                rows, began = batch.to(dtype), time.perf_counter()
                loss = model.loss(rows)[1].total
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                milliseconds.append(1e3 * (time.perf_counter() - began))
                losses.append(loss.item())
        curves[name], times[name] = losses, statistics.median(milliseconds)
    distances = {
        name: max(abs(a - b) for a, b in zip(curves[name], curves["float64"], strict=True))
        for name in ("without", "with")
    }
    allowed = 2 * distances["without"] + 4 * 2.0**-23 * max(curves["float64"])
    return {
        "rows": TRAINED_ROWS, "latents": TRAINED_LATENTS, "k": TRAINED_K, "steps": STEPS,
        "last loss": {name: losses[-1] for name, losses in curves.items()},
        "distance": distances, "milliseconds": times,
        "within the error rule": distances["with"] <= allowed,
    }  # fmt: skip


def search(tries: int) -> dict:
    """Rows whose codes were compared, bit for bit, with those of all float32 scores, and how many
    differed: half of them random, half made to deceive the bound."""
    screen.pays, slices.SMALL_TERMS = (lambda *_: True), 0
    done = lost = 0
    while done < tries:
        d, n = int(torch.randint(1, 200, ())), int(torch.randint(300, 2000, ()))
        k = int(torch.randint(1, max(2, n // 40), ()))
        x = torch.randn(50, d) * 2.0 ** torch.randint(-40, 40, ())
        weight = torch.randn(n, d) * 2.0 ** (30 * torch.rand(()) * torch.rand(n, 1))
        if done % 100:
            x, weight = deceiving(x, weight, k)
        lost += differing(x, weight, k)
        done += len(x)
    return {"rows": done, "lost": lost}


def deceiving(x: torch.Tensor, weight: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Move rows and latents to where rounding makes winners smaller and the others larger."""
    for _ in range(4):
        scores = x @ weight.t()
        sign = torch.where(scores >= scores.topk(k).values[:, -1:], 1.0, -1.0)
        of_x, of_weight = (t - t.bfloat16().float() for t in (x, weight))
        x = x + 2.0**-10 * x.abs() * (sign @ of_weight).sign() + of_x / 2
        weight = weight + 2.0**-10 * weight.abs() * (sign.t() @ of_x).sign() + of_weight / 2
    return x, weight


def differing(x: torch.Tensor, weight: torch.Tensor, k: int) -> int:
    """Rows whose codes are not those of all float32 scores."""
    every = torch.arange(len(weight)).repeat(len(x), 1)
    expected = sparsekern.topk(sparsekern.gather_dot(x, weight, every), k)
    found = sparsekern.linear_topk(x, weight, None, k, relu=False, sorted=True)
    same = (expected.indices == found.indices) & (expected.values == found.values)
    return int((~same.all(1)).sum())


if __name__ == "__main__":
    sys.exit(main())
