"""Known mistakes of other implementations of sparse autoencoders, each with the test that owns it.

The first half names tests elsewhere; the second half are tests that belong nowhere else.
"""

from __future__ import annotations

import pathlib

import pytest
import torch
from processes import run_together

import sparsekern
from sparsekern import DeadNeuronCounter, testing
from sparsekern.models import SparseAutoencoder

F = torch.nn.functional

OWNERS = {
    "auxiliary losses train the decoder only": (
        "test_sae.py",
        "test_auxk_reaches_the_encoder_of_dead_latents_only",
    ),
    "no ReLU mask at selected zeros": ("test_sae.py", "test_zero_codes_give_no_gradient"),
    "AuxK adds the decoder bias twice": ("test_sae.py", "test_auxk_does_not_count_the_decoder"),
    "the residual of AuxK is not detached": ("test_sae.py", "test_the_residual_of_auxk_is_held"),
    "ties at the k-th value keep more than k": ("test_topk.py", "test_codes_equal_the_reference"),
    "N or d not a multiple of a tile, k not a power of two": (
        "test_sparse_matmul.py",
        "test_product_and_gradients",
    ),
    "upstream gradients that are not contiguous": (
        "test_linear_topk.py",
        "test_gradients_equal_dense_autograd",
    ),
    "BatchTopK saved without its threshold": (
        "test_sae_activations.py",
        "test_the_threshold_is_saved_with_the_model",
    ),
    "autocast tied to CUDA": ("test_sae.py", "test_bfloat16_autocast_keeps_float32_gradients"),
}


@pytest.mark.parametrize("name", OWNERS)
def test_each_has_an_owner(name):
    file, test = OWNERS[name]
    (path,) = pathlib.Path(__file__).parents[1].rglob(file)
    assert f"def {test}" in path.read_text()


def model_with_dead(**options) -> SparseAutoencoder:
    torch.manual_seed(0)
    model = SparseAutoencoder(6, 40, 5, auxk=4, **options).double()
    model.counter.rows_since_fired[:10] = model.dead_after + 1
    return model.eval()


def rows(count: int = 16) -> torch.Tensor:
    return torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_weight_of_auxk_enters_once():
    losses = [model_with_dead(auxk_weight=weight).loss(rows())[1] for weight in (0.0, 0.25, 0.5)]
    plain, quarter, half = (loss.total for loss in losses)
    assert losses[0].auxk > 0
    torch.testing.assert_close(quarter - plain, 0.25 * losses[0].auxk)
    torch.testing.assert_close(half - plain, 0.5 * losses[0].auxk)


def test_auxk_is_propagated_back_and_scaled_by_what_is_dead():
    """Its gradient reaches the dead latents' rows, and fewer dead than wanted weigh less."""
    model = model_with_dead(auxk_weight=0.5)
    model.loss(rows())[1].total.backward()
    assert model.dictionary.grad[:10].any() and model.encoder.grad[:10].any()
    wide = model_with_dead(auxk_weight=0.5)
    wide.auxk = 20
    values, indices = wide.encode(rows(), 5)
    residual = rows() - wide.decode(values, indices)
    scores = F.linear(rows() - wide.decoder_bias, wide.encoder, wide.encoder_bias)[:, :10].relu()
    estimate = scores @ wide.dictionary[:10]
    variance = (rows() - rows().mean(0)).square().sum()
    expected = 10 / 20 * (residual - estimate).square().sum() / variance
    torch.testing.assert_close(wide.loss(rows())[1].auxk, expected)


@pytest.mark.parametrize("indices_dtype", [torch.int64, torch.int32], ids=str)
def test_both_index_dtypes_give_every_gradient(target, counted, indices_dtype):
    values = torch.randn(6, 3, device=target.device, requires_grad=True)
    weight = torch.randn(20, 5, device=target.device, requires_grad=True)
    indices = torch.randint(0, 20, (6, 3), device=target.device)
    upstream = torch.randn(6, 5, device=target.device)
    out = sparsekern.sparse_matmul(values, indices.to(indices_dtype), weight)
    grads = torch.autograd.grad(out, (values, weight), upstream)
    dense = torch.einsum("bk,bkd->bd", values, weight[indices])
    expected = torch.autograd.grad(dense, (values, weight), upstream)
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, right)
        counted()


def test_selections_of_slices_never_merge_an_index_twice(target, monkeypatch):
    from sparsekern.ops.linear_topk import slices as linear_slices

    monkeypatch.setattr(linear_slices, "SMALLEST_SLICE", 8)
    monkeypatch.setattr(linear_slices, "BUFFER_ELEMENTS", {"cpu": 8, "cuda": 8})
    x, weight = torch.zeros(3, 4, device=target.device), torch.zeros(50, 4, device=target.device)
    indices = sparsekern.linear_topk(x, weight, None, 20).indices
    testing.assert_same("all equal", indices, torch.arange(20).expand(3, 20))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["row-major", "column-major"])
def test_dictionaries_beyond_two_to_the_31_elements(kind):
    """Offsets need 64 bits. Only the rows that are read are touched, so little memory is used."""
    n, d = 2**20 + 64, 2**11 + 3
    shape = (n, d) if kind == "row-major" else (d, n)
    weight = torch.empty(shape, dtype=torch.bfloat16)
    weight = weight if kind == "row-major" else weight.t()
    indices = torch.tensor([[0, n - 1, n - 40], [n // 2, n - 3, 7]])
    for latent in indices.flatten().tolist():
        weight[latent] = torch.randn(d).bfloat16()
    values = torch.randn(2, 3).bfloat16().requires_grad_()
    with sparsekern.backend("native"):
        out = sparsekern.sparse_matmul(values, indices, weight)
        (grad,) = torch.autograd.grad(out.float().square().sum(), values)
    gathered = weight[indices].float()
    dense = torch.einsum("bk,bkd->bd", values.float(), gathered)
    torch.testing.assert_close(out.float(), dense, rtol=0.02, atol=0.02)
    upstream = (2 * out.float()).bfloat16().float()
    torch.testing.assert_close(
        grad.float(), torch.einsum("bd,bkd->bk", upstream, gathered), rtol=0.02, atol=2.0
    )


def _count_in_a_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    counter = DeadNeuronCounter(4, distributed=True)
    alone = DeadNeuronCounter(4)
    for step in range(3):
        activations = torch.zeros(5 + rank, 4)
        activations[0, rank] = 1.0  # latent 0 fires in process 0, latent 1 in process 1
        activations[1, 2] = float(step == 0 and rank == 1)
        counter.update(activations)
        alone.update(activations)
    torch.save((counter.rows_since_fired, alone.rows_since_fired), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_dead_latents_are_counted_over_all_processes(tmp_path):
    """Counted by each process alone, latents die later by the number of processes, and of what
    fires elsewhere nothing is known."""
    run_together(_count_in_a_process, 2, str(tmp_path))
    for rank in range(2):
        together, alone = torch.load(tmp_path / f"{rank}.pt")
        assert together.tolist() == [0, 0, 22, 33]
        assert alone.tolist()[3] == 3 * (5 + rank) and alone[1 - rank] > 0
