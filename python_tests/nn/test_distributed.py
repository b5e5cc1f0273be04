"""Two processes: gradients are averaged, and counters hold for batches of any number."""

from __future__ import annotations

import json
import traceback

import pytest
import torch
from processes import run_together
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from sparsekern import BatchTopK, DeadNeuronCounter
from sparsekern.models import SparseAutoencoder


def _all(tensor):
    """A tensor of every process."""
    both = [torch.empty_like(tensor) for _ in range(2)]
    torch.distributed.all_gather(both, tensor)
    return both


def _batches(seed=5, count=4):
    """Of every process: float32 [2, count, 8, 16]."""
    return torch.randn(2, count, 8, 16, generator=torch.Generator().manual_seed(seed))


def _model(**options):
    torch.manual_seed(0)
    return SparseAutoencoder(16, 64, **{"k": 4, "distributed": True, **options})


def the_loss_is_averaged(rank):
    x = _batches()[rank, 0]
    for call in (
        lambda ddp: ddp(x, return_loss=True)[1],
        lambda ddp: ddp.module.loss(x)[1],
        lambda ddp: ddp.module.loss(x, variance=torch.tensor(9.0), rows=3)[1],
    ):
        for options in ({}, {"auxk": 8, "dead_after": 1}, {"k": None, "activation": BatchTopK(4)}):
            ddp = DistributedDataParallel(_model(**options))
            call(ddp).total.backward()
            one, other = _all(ddp.module.dictionary.grad)
            assert torch.equal(one, other), options
    gradients = [torch.autograd.grad(loss, m.dictionary)[0] for loss, m in _alone(_batches())]
    ddp = DistributedDataParallel(_model())
    ddp.module.loss(x)[1].total.backward()
    torch.testing.assert_close(ddp.module.dictionary.grad, sum(gradients) / 2)


def _alone(batches):
    for part in batches:
        model = _model(distributed=False)
        yield model.loss(part[0])[1].total, model


def no_sync_averages_at_its_end(rank):
    ddp = DistributedDataParallel(_model())
    with ddp.no_sync():
        ddp.module.loss(_batches()[rank, 0])[1].total.backward()
    one, other = _all(ddp.module.dictionary.grad)
    assert not torch.equal(one, other)
    ddp.module.loss(_batches()[rank, 1])[1].total.backward()
    one, other = _all(ddp.module.dictionary.grad)
    assert torch.equal(one, other)


def a_wrapper_that_comes_late_is_found(rank):
    model = _model()
    for at in range(3):
        model.loss(_batches()[rank, at])[1].total.backward()
    ddp = DistributedDataParallel(model)
    model.zero_grad()
    model.loss(_batches()[rank, 0])[1].total.backward()  # the fourth call
    one, other = _all(ddp.module.dictionary.grad)
    assert torch.equal(one, other)


class _Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.model = nn.Linear(16, 16), _model()

    def forward(self, x):
        return self.model.loss(self.first(x))[1].total


def a_model_around_it_must_call_the_loss(rank):
    x = _batches()[rank, 0]
    ddp = DistributedDataParallel(_Around())
    with pytest.raises(RuntimeError, match=r"SparseAutoencoder.loss: .* outside of _Around"):
        ddp.module.model.loss(x)
    with torch.no_grad():
        ddp.module.model.loss(x)  # nothing to be averaged
    ddp(x).backward()
    one, other = _all(ddp.module.model.dictionary.grad)
    assert torch.equal(one, other)


def nothing_waits_outside_training(rank):
    ddp = DistributedDataParallel(_model())
    if rank == 0:  # alone
        ddp.module.eval().loss(_batches()[rank, 0])
        ddp.module.counter.fraction(3), ddp.module.state_dict()
        SparseAutoencoder(16, 64, k=4).loss(_batches()[rank, 0])[1].total.backward()


def sharded_parameters_are_gathered(rank):
    from torch.distributed.fsdp import fully_shard

    gradients = [torch.autograd.grad(loss, m.dictionary)[0] for loss, m in _alone(_batches())]
    for call in (lambda m, x: m.loss(x)[1], lambda m, x: m(x, return_loss=True)[1]):
        model = _model()
        fully_shard(model)
        call(model, _batches()[rank, 0]).total.backward()
        torch.testing.assert_close(model.dictionary.grad.full_tensor(), sum(gradients) / 2)


def counters_under_join(rank):
    for options in ({}, {"auxk": 8, "dead_after": 8}):
        ddp = DistributedDataParallel(_model(**options))
        with Join([ddp]):
            for at in range(4 - 3 * rank):
                ddp(_batches()[rank, at], return_loss=True)[1].total.backward()
        ddp.module.counter.synchronize()
        one, other = _all(ddp.module.counter.rows_since_fired)
        assert torch.equal(one, other)
        assert one.max() == 8 * 5, "a latent that never fired has been silent for all rows"
        ddp(_batches()[rank, 0], return_loss=True)[1].total.backward()
        ddp.module.counter.synchronize()
        now, other = _all(ddp.module.counter.rows_since_fired)
        assert torch.equal(now, other) and bool(((now == 0) | (now == one + 16)).all())


def counters_alone(rank):
    counter = DeadNeuronCounter(4, distributed=True)
    fire = torch.eye(4)
    counter.update(fire[[rank, rank]])  # 0 and 1 fire
    assert counter.rows_since_fired.tolist() == [0, 0, 4, 4]
    with counter.no_sync():
        for at in range(2 + 2 * rank):  # batches of one row
            counter.update(fire[[2 if at == 0 and rank == 0 else 1 - rank]])
    alone = [[2 + 2, 0, 1, 4 + 4], [0, 4 * 2, 4 + 8, 4 + 8]][rank]
    assert counter.rows_since_fired.tolist() == alone, "the other advances like this one"
    counter.update(fire[[3]])  # in both
    # 8 rows since the first update, 3 and 5 of them: 2 fired after one of 3 rows, and so on.
    one, other = _all(counter.rows_since_fired)
    assert torch.equal(one, other)
    assert one.tolist() == [round(8 / 5), round(8 / 3), round(8 * 2 / 3), 0]


CHECKS = (
    the_loss_is_averaged,
    no_sync_averages_at_its_end,
    a_wrapper_that_comes_late_is_found,
    a_model_around_it_must_call_the_loss,
    nothing_waits_outside_training,
    sharded_parameters_are_gathered,
    counters_under_join,
    counters_alone,
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each check says in each of two processes: '' where it holds."""
    folder = tmp_path_factory.mktemp("processes")
    run_together(_main, 2, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_two_processes(outcomes, name):
    assert [of_rank[name] for of_rank in outcomes] == ["", ""]


def _main(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    results = {}
    for check in CHECKS:
        try:
            check(rank)
            results[check.__name__] = ""
        except Exception:  # reported by the test of this name
            results[check.__name__] = traceback.format_exc()
        torch.distributed.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
