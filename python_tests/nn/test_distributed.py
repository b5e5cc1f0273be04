"""Two processes: gradients are averaged, and counters hold for batches of any number."""

from __future__ import annotations

import copy
import gc
import json
import traceback
import warnings

import pytest
import torch
from processes import run_together
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from sparsekern import BatchTopK, DeadNeuronCounter, JumpReLU, SparseLinear, TopK, linear_topk
from sparsekern.models import SparseAutoencoder, SparseBottleneck
from sparsekern.optim import Adam


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
    for at in range(20):
        model.loss(_batches()[rank, at % 3])[1].total.backward()
    ddp = DistributedDataParallel(model)
    model.zero_grad()
    model.loss(_batches()[rank, 0])[1].total.backward()
    one, other = _all(ddp.module.dictionary.grad)
    assert torch.equal(one, other)


def a_wrapper_that_is_gone_is_told(rank):
    model = DistributedDataParallel(_model()).module
    gc.collect()
    with pytest.warns(UserWarning, match="around it is gone, so the gradients .* not averaged"):
        model.loss(_batches()[rank, 0])[1].total.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.loss(_batches()[rank, 0])[1].total.backward()
        copy.deepcopy(model).loss(_batches()[rank, 0])[1].total.backward()


class _Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.model = nn.Linear(16, 16), _model()

    def forward(self, x):
        return self.model.loss(self.first(x))[1].total


def a_model_around_it_must_call_the_loss(rank):
    x = _batches()[rank, 0]
    around = _Around()
    for _ in range(20):
        around(x)
    ddp = copy.deepcopy(DistributedDataParallel(around))
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


class _Layers(nn.Module):
    """Layers of ours in a network; its forward pass returns the loss."""

    def __init__(self, activation, codes=False):
        super().__init__()
        self.encoder, self.activation = nn.Linear(16, 64), activation
        self.decoder, self.codes = SparseLinear(64, 16), codes

    def forward(self, x):
        scores = self.encoder(x)
        latents = self.activation.codes(scores) if self.codes else self.activation(scores)
        return (self.decoder(latents) - x).square().mean()


class _Functions(_Layers):
    def forward(self, x):
        codes = linear_topk(x, self.encoder.weight, self.encoder.bias, 4)
        return (self.decoder(tuple(codes)) - x).square().mean()


class _Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = SparseBottleneck(16, 64, 16, k=4, standardize=True)

    def forward(self, x):
        return (self.layer(x).output - x).square().mean()


class _Loss(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.model = _model(**options)

    def forward(self, x):
        return self.model.loss(x)[1].total


NETWORKS = {
    "TopK": lambda: _Layers(TopK(4, groups=2)),
    "codes": lambda: _Layers(TopK(4), codes=True),
    "counter": lambda: _Layers(TopK(4, counter=DeadNeuronCounter(64, distributed=True))),
    "BatchTopK": lambda: _Layers(BatchTopK(4)),
    "BatchTopK of all": lambda: _Layers(BatchTopK(4, distributed=True)),
    "JumpReLU": lambda: _Layers(JumpReLU(64)),
    "JumpReLU's codes": lambda: _Layers(JumpReLU(64), codes=True),
    "linear_topk": lambda: _Functions(nn.Identity()),
    "bottleneck": _Bottleneck,
    "autoencoder": lambda: _Loss(auxk=8, dead_after=8, scale_scores=True, prefixes=(9,)),
    "autoencoder with BatchTopK": lambda: _Loss(k=None, activation=BatchTopK(4), tied=True),
    "autoencoder with JumpReLU": lambda: _Loss(k=None, activation=JumpReLU(64), target_l0=4),
}
# What each layer computes without a call of it, or with parameters of others.
NOT_IN_PARTS = {"JumpReLU's codes", "linear_topk", "autoencoder with JumpReLU"}


def _optimizer(model):
    rows = [p for n, p in model.named_parameters() if n.endswith(("dictionary", "decoder.weight"))]
    others = [p for p in model.parameters() if all(p is not row for row in rows)]
    return Adam([{"params": rows, "unit_rows": True}, {"params": others}], lr=1e-2)


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _cut(model):
    fully_shard(model)
    return model


def _cut_in_parts(model):
    for part in list(model.modules())[:0:-1]:
        if next(part.parameters(recurse=False), None) is not None:
            fully_shard(part)
    fully_shard(model)
    return model


def _trained_by_hand(model, batches, broadcasts):
    """Train with gradients that are averaged here."""
    for part in model.modules():
        if isinstance(part, SparseAutoencoder):
            part._wrapper.around = lambda *_: None
    optimizer = _optimizer(model)
    for batch in batches:
        optimizer.zero_grad()
        for buffer in model.buffers() if broadcasts else ():
            torch.distributed.broadcast(buffer, 0)
        model(batch).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= 2
        optimizer.step()
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def layers_train_as_if_averaged_by_hand(rank):
    batches = _batches()[rank]
    for name, make in NETWORKS.items():
        for wrap in (DistributedDataParallel, _cut, _cut_in_parts):
            torch.manual_seed(0)
            model = make()
            expected = _trained_by_hand(
                copy.deepcopy(model), batches, wrap is DistributedDataParallel
            )
            wrapped = wrap(model)
            optimizer = _optimizer(model)
            if wrap is _cut_in_parts and name in NOT_IN_PARTS:
                with pytest.raises(
                    (TypeError, RuntimeError), match=r"register_fsdp_forward_method|model alone"
                ):
                    wrapped(batches[0])
                continue
            for batch in batches:
                optimizer.zero_grad()
                wrapped(batch).backward()
                optimizer.step()
            actual = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            torch.testing.assert_close(
                {key: _whole(value).detach() for key, value in actual.items()},
                {key: value.detach() for key, value in expected.items()},
                rtol=1e-3, atol=1e-5,
                msg=lambda text, name=name, wrap=wrap: f"{name}, {wrap.__name__}: {text}",
            )  # fmt: skip


def evaluation_between_steps_changes_nothing(rank):
    """A forward pass leaves the parameters of a sharded model whole."""
    x, model = _batches()[rank, 0], _cut(_model())
    with torch.no_grad():
        model.loss(x)
    model.loss(x)[1].total.backward()
    gradients = [torch.autograd.grad(loss, m.dictionary)[0] for loss, m in _alone(_batches())]
    torch.testing.assert_close(model.dictionary.grad.full_tensor(), sum(gradients) / 2)
    around = _cut(_Around())
    with torch.no_grad():
        around(x)
    with pytest.raises(RuntimeError, match=r"in the forward pass of the model .* fully_shard"):
        around.model.loss(x)


def changes_in_place_stay(rank):
    x = _batches()[0, 0]
    changes = {
        "normalize_dictionary": lambda m: m.normalize_dictionary(),
        "fold_norms": lambda m: m.fold_norms(),
        "fold_bias": lambda m: m.fold_bias(),
        "fold_normalization": lambda m: m.fold_normalization(0.5),
        "remove_parallel_gradient": lambda m: m.remove_parallel_gradient(),
    }
    for name, change in changes.items():
        one = _model(scale_scores=True)
        with torch.no_grad():
            one.dictionary.mul_(3)
            one.decoder_bias.add_(1)
        model = _cut(copy.deepcopy(one))
        one._wrapper.around = lambda *_: None
        for each in (one, model):
            each.loss(x)[1].total.backward()
            with torch.no_grad():
                each(x)  # what it gathers must not take the changes
            change(each)
        model.reshard()
        for key, parameter in model.named_parameters():
            expected = one.get_parameter(key)
            torch.testing.assert_close(parameter.full_tensor(), expected, msg=name)
            torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad, msg=name)
    register_fsdp_forward_method(model, "normalize_dictionary")
    with pytest.raises(RuntimeError, match="normalize_dictionary: it must be called outside"):
        model.normalize_dictionary()


def what_needs_all_parameters_says_so(rank):
    x, model = _batches()[rank, 0], _cut(_model())
    for call in (model.initialize, model.initialize_bias, model.calibrate):
        with pytest.raises(RuntimeError, match="must be called before fully_shard"):
            call(x)
    with pytest.raises(TypeError, match=r"linear_topk: .*register_fsdp_forward_method"):
        model.encode(x)
    with pytest.raises(RuntimeError, match=r"save_pretrained: .*get_model_state_dict"):
        model.save_pretrained("nowhere")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        _model().load_state_dict(state)
    with pytest.raises(ValueError, match=r"must not be distributed.*ShardedAutoencoder"):
        _model(k=None, activation=BatchTopK(4, distributed=True))


def gradients_past_a_wrapper_are_refused(rank):
    x = _batches()[rank, 0]
    for wrap in (DistributedDataParallel, _cut):
        model = _model()
        wrapped = wrap(model)  # kept
        with torch.no_grad():
            model(x)
        calls = {
            "encode": lambda m: m.encode(x).values,
            "decode": lambda m: m.decode(*m.encode(x)),
            "reconstruct": lambda m: m.reconstruct(x)[0].reconstruction,
        }
        if wrap is DistributedDataParallel:
            calls["forward"] = lambda m: m(x).reconstruction
            calls["forward with a loss"] = lambda m: m(x, return_loss=True)[1].total
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=rf"{name[:6]}.*: gradients that are to be aver"):
                call(model).sum().backward()
        model.eval()
        call(model)  # nothing to be averaged
        del wrapped
    model = _cut(_model())
    for method in ("encode", "decode"):
        register_fsdp_forward_method(model, method)
    one = _model()
    for each in (model, one):
        (each.decode(*each.encode(x)) - x).square().mean().backward()
    expected = sum(_all(one.encoder.grad)) / 2
    torch.testing.assert_close(model.encoder.grad.full_tensor(), expected)


def compiled_losses_are_averaged(rank):
    x, model = _batches()[rank, 0], _model()
    wrapped = DistributedDataParallel(model)  # kept
    torch.compile(lambda x: model.loss(x)[1].total, backend="eager")(x).backward()
    one, other = _all(wrapped.module.dictionary.grad)
    assert torch.equal(one, other)


def first_weights_fit_the_rows_of_all(rank):
    rows = torch.randn(300, 16, generator=torch.Generator().manual_seed(1)) + 1
    own = rows.split([200, 100])[rank]
    for wrapped, make in ((True, lambda: BatchTopK(4)), (False, lambda: JumpReLU(64))):
        one, model = (
            _model(k=None, activation=make(), distributed=d) for d in (False, not wrapped)
        )
        ddp = DistributedDataParallel(model) if wrapped else None
        one.initialize(rows)
        model.initialize(own)
        torch.testing.assert_close(dict(model.named_parameters()), dict(one.named_parameters()))
        one.calibrate(rows, 3)
        model.calibrate(own, 3)
        torch.testing.assert_close(dict(model.state_dict()), dict(one.state_dict()))
        del ddp


def batches_of_all_processes(rank):
    """BatchTopK over the rows of all is that of one process which has them all."""
    generator = torch.Generator().manual_seed(3)
    for case in (
        "normal",
        "equal values",
        "one process has all",
        "one row",
        "NaN",
        "bfloat16",
        "none",
    ):
        x = torch.randn(9, 32, generator=generator)
        if case == "equal values":
            x = x.round()
        if case in ("one process has all", "none"):
            x[:6] -= 100
        if case == "one row":
            x[7] += 100
        if case == "NaN":
            x[2, 3] = x[7, 1] = torch.nan
        if case == "bfloat16":
            x = x.bfloat16()
        if case == "none":
            x -= 100
        one, layer = BatchTopK(2.5), BatchTopK(2.5, distributed=True)
        whole = x.clone().requires_grad_()
        own = x.split([6, 3])[rank].clone().requires_grad_()
        for _ in range(2):
            expected, actual = one(whole), layer(own)
        assert torch.equal(actual.nan_to_num(-1), expected.split([6, 3])[rank].nan_to_num(-1)), case
        expected.nansum().backward()
        actual.nansum().backward()
        assert torch.equal(own.grad, whole.grad.split([6, 3])[rank]), case
        torch.testing.assert_close(layer.state_dict(), one.state_dict(), equal_nan=True, msg=case)
        if case != "NaN":
            one.calibrate(x)
            layer.calibrate(x.split([6, 3])[rank])
            assert torch.equal(layer.threshold, one.threshold), case


def standardized_over_all_processes(rank):
    """Statistics, activity and gradients are those of one process with all rows."""
    torch.manual_seed(0)
    one, model = (_Bottleneck() for _ in range(2))
    model.layer = SparseBottleneck(16, 64, 16, k=4, standardize=True, distributed=True)
    model.load_state_dict(one.state_dict())
    ddp = DistributedDataParallel(model)
    batches = _batches()
    for at in range(3):
        for each, rows in ((one, batches[:, at].flatten(0, 1)), (ddp, batches[rank, at])):
            each.zero_grad()
            each(rows).backward()
    torch.testing.assert_close(dict(model.state_dict()), dict(one.state_dict()))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, one.get_parameter(name).grad, msg=name)
    ddp(batches[rank, 0, : 1 + rank])  # of one row here: the others have more


def a_counter_alone_warns(rank):
    ddp = DistributedDataParallel(_model(distributed=False))
    for model in (ddp, _cut(_model(distributed=False))):
        with pytest.warns(UserWarning, match="DeadNeuronCounter: it counts the rows of this proc"):
            model(_batches()[rank, 0])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(_batches()[rank, 0])  # once


CHECKS = (
    the_loss_is_averaged,
    no_sync_averages_at_its_end,
    a_wrapper_that_comes_late_is_found,
    a_wrapper_that_is_gone_is_told,
    a_model_around_it_must_call_the_loss,
    nothing_waits_outside_training,
    sharded_parameters_are_gathered,
    counters_under_join,
    counters_alone,
    a_counter_alone_warns,
    batches_of_all_processes,
    standardized_over_all_processes,
)
# Of seconds.
LONG_CHECKS = (
    first_weights_fit_the_rows_of_all,
    layers_train_as_if_averaged_by_hand,
    evaluation_between_steps_changes_nothing,
    changes_in_place_stay,
    what_needs_all_parameters_says_so,
    gradients_past_a_wrapper_are_refused,
    compiled_losses_are_averaged,
)


def _outcomes(folder, checks):
    """What each check says in each of two processes: '' where it holds."""
    run_together(_main, 2, folder, checks)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return _outcomes(tmp_path_factory.mktemp("processes"), CHECKS)


@pytest.fixture(scope="module")
def long_outcomes(tmp_path_factory):
    return _outcomes(tmp_path_factory.mktemp("processes"), LONG_CHECKS)


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_two_processes(outcomes, name):
    assert [of_rank[name] for of_rank in outcomes] == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize("name", [check.__name__ for check in LONG_CHECKS])
def test_wrapped_models(long_outcomes, name):
    assert [of_rank[name] for of_rank in long_outcomes] == ["", ""]


def _main(rank, folder, checks):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    results = {}
    for check in checks:
        try:
            check(rank)
            results[check.__name__] = ""
        except Exception:  # reported by the test of this name
            results[check.__name__] = traceback.format_exc()
        torch.distributed.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
