"""The transforms of torch.func see the gradients that torch.autograd sees."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call, grad, jacrev, stack_module_state, vjp, vmap

import sparsekern
from sparsekern.models import SparseAutoencoder
from sparsekern.ops import batch_norm, codes_to_dense, jumprelu

F64 = torch.float64


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)
X, WEIGHT, ENCODER = normal(3, 8), normal(8, 4), normal(8, 8)
BIAS, SCALE = normal(8), torch.rand(8, dtype=F64, generator=GENERATOR) + 0.5
INDICES = sparsekern.topk(X, 3).indices
IMAGE, CHANNELS = normal(2, 3, 4), normal(3)
THRESHOLD = torch.zeros(3, dtype=F64)
SPARSE, PLACES = normal(4), torch.tensor([3, 20, 11, 4])
FEW = 1  # so few that the convolution stays sparse


def decoded(codes, transposition):
    return sparsekern.sparse_matmul(*codes, WEIGHT, transposition=transposition)


CASES = {
    "topk": (lambda x: sparsekern.topk(x, 3).values, X),
    "topk, relu": (lambda x: sparsekern.topk(x, 6, relu=True).values, X),
    "topk, counts": (lambda x: sparsekern.topk_counts(x, 3)[0].values, X),
    "topk_mask": (lambda x: sparsekern.topk_mask(x, 6, relu=True), X),
    "batch_topk": (lambda x: sparsekern.batch_topk(x, 6, relu=True), X),
    "linear_topk": (
        lambda x, w, b, p, s: sparsekern.linear_topk(x, w, b, 6, pre_bias=p, scale=s).values,
        X, ENCODER, BIAS, BIAS.flip(0), SCALE,
    ),
    "linear_topk, transposed": (
        lambda x, w: decoded(*sparsekern.linear_topk_transposed(x, w, None, 6)),
        X, ENCODER,
    ),
    "linear_at": (
        lambda x, w, b, s: sparsekern.linear_at(x, w, b, INDICES, scale=s), X, ENCODER, BIAS, SCALE,
    ),
    "sparse_matmul": (
        lambda v, w, b: sparsekern.sparse_matmul(v, INDICES, w, b), X[:, :3], WEIGHT, BIAS[:4]
    ),
    "sparse_matmul, column-major": (
        lambda v, w: sparsekern.sparse_matmul(v, INDICES, w.t()), X[:, :3], WEIGHT.t().contiguous()
    ),
    "codes_to_dense": (lambda v: codes_to_dense(v, INDICES, 8), X[:, :3]),
    "batch_norm": (lambda x, w, b: batch_norm(x, w, b).tensor, IMAGE, CHANNELS, CHANNELS.flip(0)),
    "threshold_relu": (
        lambda x, s, b: sparsekern.threshold_relu(x, THRESHOLD, scale=s, shift=b)[0],
        IMAGE, CHANNELS.abs(), CHANNELS.flip(0),
    ),
    "pointwise_conv": (
        lambda v, w, b: sparsekern.pointwise_conv(v, PLACES[:FEW], (2, 3, 4), w, b),
        SPARSE[:FEW], normal(5, 3), normal(5),
    ),
    "pointwise_conv, dense": (
        lambda v, w, b: sparsekern.pointwise_conv(v, PLACES, (2, 3, 4), w, b),
        SPARSE, normal(5, 3), normal(5),
    ),
    "channel_threshold": (
        lambda x: x * sparsekern.channel_threshold(x, 0.3).view(-1, 1), IMAGE
    ),
    "jumprelu": (lambda x, t: jumprelu(x, t, 0.5), X, BIAS.abs()),
}  # fmt: skip
# Its codes differ in number from one entry of a batch to another.
UNBATCHED = {
    "threshold_codes": (
        lambda x, s, b: sparsekern.threshold_codes(x, THRESHOLD, scale=s, shift=b).values,
        IMAGE, CHANNELS.abs(), CHANNELS.flip(0),
    ),
}  # fmt: skip


def case(name):
    function, *arguments = {**CASES, **UNBATCHED}[name]
    return function, tuple(arguments), tuple(range(len(arguments)))


def loss_of(function):
    return lambda *arguments: function(*arguments).sin().square().sum()


def expected(function, arguments, **options):
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    return torch.autograd.grad(function(*leaves), leaves, materialize_grads=True, **options)


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", [*CASES, *UNBATCHED])
def test_gradients_of_every_operation(name):
    function, arguments, all_of_them = case(name)
    loss = loss_of(function)
    assert_same(grad(loss, all_of_them)(*arguments), expected(loss, arguments))
    out, back = vjp(function, *arguments)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape)
    assert_same(back(upstream), expected(lambda *a: (function(*a) * upstream).sum(), arguments))
    with torch.no_grad():  # the transform records all the same
        assert_same(grad(loss, all_of_them)(*arguments), expected_with_gradients(loss, arguments))


def expected_with_gradients(loss, arguments):
    with torch.enable_grad():
        return expected(loss, arguments)


@pytest.mark.parametrize("name", [*CASES, *UNBATCHED])
def test_second_derivatives_nest(name):
    function, arguments, all_of_them = case(name)
    loss = loss_of(function)

    def first(*args):
        return sum(g.sin().sum() for g in grad(loss, all_of_them)(*args))

    def first_of_autograd(*leaves):
        found = torch.autograd.grad(
            loss(*leaves), leaves, create_graph=True, materialize_grads=True
        )
        return sum(g.sin().sum() for g in found)

    assert_same(grad(first, all_of_them)(*arguments), expected(first_of_autograd, arguments))


@pytest.mark.parametrize("name", [*CASES, *UNBATCHED])
def test_jacobians_and_batches_of_upstream_gradients(name):
    function, arguments, all_of_them = case(name)
    wanted = torch.autograd.functional.jacobian(function, arguments)
    assert_same(jacrev(function, all_of_them)(*arguments), wanted)
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    out = function(*leaves)
    basis = torch.eye(out.numel(), dtype=F64).view(-1, *out.shape)
    rows = torch.autograd.grad(out, leaves, basis, is_grads_batched=True, materialize_grads=True)
    assert_same([r.view(w.shape) for r, w in zip(rows, wanted, strict=True)], wanted)


@pytest.mark.parametrize("name", CASES)
def test_batches_of_gradients_and_gradients_of_batches(name):
    function, arguments, all_of_them = case(name)
    loss = loss_of(function)
    batch = tuple(torch.stack([argument, 0.9 * argument]) for argument in arguments)
    wanted = [expected(loss, [both[at] for both in batch]) for at in range(2)]
    stacked = [torch.stack(pair) for pair in zip(*wanted, strict=True)]
    assert_same(vmap(grad(loss, all_of_them))(*batch), stacked)
    summed = grad(lambda *many: vmap(loss)(*many).sum(), all_of_them)
    assert_same(summed(*batch), stacked)
    twice = [torch.stack([both, both.flip(0)]) for both in batch]
    nested = vmap(vmap(grad(loss, all_of_them)))(*twice)
    assert_same([g[1].flip(0) for g in nested], stacked)
    for at in all_of_them:  # the others are shared
        dims = tuple(0 if at == other else None for other in all_of_them)
        mixed = tuple(batch[o] if o == at else arguments[o] for o in all_of_them)
        found = vmap(grad(loss, all_of_them), in_dims=dims)(*mixed)
        one = [batch[o][1] if o == at else arguments[o] for o in all_of_them]
        assert_same([g[1] for g in found], expected(loss, one))


def test_codes_that_differ_in_number_are_refused_by_vmap():
    with pytest.raises(ValueError, match="vmap all entries must have the same number of codes"):
        vmap(lambda x: sparsekern.threshold_codes(x, THRESHOLD).values)(
            torch.stack([IMAGE, IMAGE.abs()])
        )


# jumprelu is an autograd.Function; these two are constant or go through torch's own operations
@pytest.mark.parametrize(
    "name", sorted({*CASES, *UNBATCHED} - {"pointwise_conv, dense", "channel_threshold"})
)
def test_forward_mode_is_refused_at_every_level(name):
    function, arguments, _ = case(name)
    refused = (NotImplementedError, RuntimeError)
    with pytest.raises(refused, match=r"forward[- ]mode"):
        torch.func.jvp(function, arguments, arguments)
    if name == "jumprelu":
        return
    with pytest.raises(NotImplementedError, match="there is no forward-mode derivative"):
        torch.func.jacfwd(function)(*arguments)
    with pytest.raises(NotImplementedError, match="there is no forward-mode derivative"):
        torch.func.hessian(loss_of(function))(*arguments)


LAYERS = {
    "TopK": lambda: sparsekern.TopK(3),
    "TopK, groups": lambda: sparsekern.TopK(4, groups=2),
    "TopK, counted": lambda: sparsekern.TopK(3, counter=sparsekern.DeadNeuronCounter(16)),
    "TopK, post": lambda: sparsekern.TopK(3, torch.tanh),
    "BatchTopK": lambda: sparsekern.BatchTopK(3),
    "JumpReLU": lambda: sparsekern.JumpReLU(16),
}


def model_with(layer):
    return torch.nn.Sequential(torch.nn.Linear(8, 16), layer(), sparsekern.SparseLinear(16, 8))


@pytest.mark.parametrize("name", [*LAYERS, "SparseAutoencoder"])
def test_ensembles_of_layers(name):
    torch.manual_seed(0)
    if name == "SparseAutoencoder":
        models = [SparseAutoencoder(8, 16, k=4) for _ in range(2)]
    else:
        models = [model_with(LAYERS[name]) for _ in range(2)]
    x = torch.randn(6, 8)
    parameters, buffers = stack_module_state(models)
    template = copy.deepcopy(models[0]).to("meta")

    def size(out):
        return (out if isinstance(out, torch.Tensor) else out.reconstruction).square().sum()

    def loss(parameters, buffers, x):
        return size(functional_call(template, (parameters, buffers), (x,)))

    found = vmap(grad(loss), in_dims=(0, 0, None))(parameters, buffers, x)
    for at, model in enumerate(models):
        names, leaves = zip(*model.named_parameters(), strict=True)
        wanted = torch.autograd.grad(size(model(x)), leaves, materialize_grads=True)
        assert_same([found[name][at] for name in names], wanted)


def test_gradients_per_row_of_a_model():
    torch.manual_seed(0)
    model = model_with(LAYERS["TopK"])
    parameters = dict(model.named_parameters())
    x = torch.randn(5, 8)

    def loss(parameters, row):
        return functional_call(model, parameters, (row.unsqueeze(0),)).square().sum()

    rows = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    wanted = torch.autograd.grad(model(x).square().sum(), tuple(parameters.values()))
    assert_same([g.sum(0) for g in rows.values()], wanted)


AUTOENCODERS = {
    "TopK": lambda: SparseAutoencoder(8, 64, k=4, prefixes=(16, 32)),
    "BatchTopK": lambda: SparseAutoencoder(8, 64, activation=sparsekern.BatchTopK(3)),
    "JumpReLU": lambda: SparseAutoencoder(8, 64, activation=sparsekern.JumpReLU(64)),
    "ReLU": lambda: SparseAutoencoder(8, 64, activation=torch.nn.ReLU(), sparsity_weight=0.1),
}


def autoencoder(name):
    model = AUTOENCODERS[name]().double().eval()
    if name == "BatchTopK":
        model.activation.threshold.fill_(0.5)
    return model


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_losses_of_autoencoders_per_row_and_in_ensembles(name):
    torch.manual_seed(0)
    models = [autoencoder(name) for _ in range(2)]
    x = torch.randn(5, 8, dtype=torch.float64)
    one = torch.tensor(1.0, dtype=torch.float64)
    parameters, buffers = stack_module_state(models)

    def loss(parameters, buffers, row):
        given = {"return_loss": True, "variance": one, "rows": 1}
        call = functional_call(models[0], (parameters, buffers), (row.unsqueeze(0),), given)
        return call[1].total

    per_row = vmap(grad(loss), in_dims=(None, None, 0))
    found = vmap(per_row, in_dims=(0, 0, None))(parameters, buffers, x)
    for at, model in enumerate(models):
        for place, row in enumerate(x):
            names, leaves = zip(*model.named_parameters(), strict=True)
            alone = model.loss(row.unsqueeze(0), one, 1)[1].total
            wanted = torch.autograd.grad(alone, leaves, materialize_grads=True)
            assert_same([found[name][at, place] for name in names], wanted)


def test_an_ensemble_with_a_threshold_that_was_never_set_is_refused():
    models = [autoencoder("BatchTopK") for _ in range(2)]
    models[1].activation.threshold.fill_(torch.nan)
    state = stack_module_state(models)

    def run(parameters, buffers, x):
        return functional_call(models[0], (parameters, buffers), (x,)).reconstruction

    with pytest.raises(RuntimeError, match="threshold must be set before evaluation"):
        vmap(run, in_dims=(0, 0, None))(*state, torch.randn(5, 8, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse_matmul"])
def test_compiled_transforms(name):
    function, arguments, all_of_them = case(name)
    transformed = grad(loss_of(function), all_of_them)
    compiled = torch.compile(transformed, fullgraph=True)
    assert_same(compiled(*arguments), transformed(*arguments))
