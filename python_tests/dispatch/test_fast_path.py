"""A call may skip torch's dispatcher only where the dispatcher would do nothing."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekern
from sparsekern.dispatch.fast_path import (
    MORE,
    NOTHING,
    RECORDING,
    dispatcher_has_nothing_to_do,
    left_to_torch,
    left_to_torch_of,
)

X = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.0, 7.0, -2.0, 1.0]])


class SeesOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class Tagged(torch.Tensor):
    pass


def test_plain_tensors_without_gradients_need_no_dispatcher():
    parameter = torch.nn.Parameter(X.clone())
    assert dispatcher_has_nothing_to_do((X, 2, True, None))
    with torch.no_grad():
        assert dispatcher_has_nothing_to_do((parameter, X))
    with torch.inference_mode():
        assert dispatcher_has_nothing_to_do((X, 2))
        assert dispatcher_has_nothing_to_do((torch.ones(2), 2))
    assert not dispatcher_has_nothing_to_do((X, parameter))


def test_what_is_left_to_torch_with_one_tensor():
    """Both functions say the same, and what each context asks for."""
    parameter = torch.nn.Parameter(X.clone())
    negated = torch.complex(torch.zeros_like(X), X).conj().imag
    no_autograd = torch._C._AutoDispatchBelowAutograd
    seen = []

    def check(tensor, wanted):
        seen.append(wanted)
        assert left_to_torch_of(tensor) == left_to_torch((tensor, 2, True)) == wanted
        return tensor

    check(X, NOTHING), check(parameter, RECORDING), check(parameter * 2, RECORDING)
    check(negated, MORE), check(X.as_subclass(Tagged), MORE), check(X.to_sparse(), MORE)
    with torch.no_grad():
        check(parameter, NOTHING)
    with torch.inference_mode():
        check(parameter, NOTHING)
    with no_autograd():  # the dispatcher records nothing
        check(parameter, MORE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(X, MORE), check(parameter, MORE)
    with torch.autograd.forward_ad.dual_level():
        check(parameter, MORE)
    with SeesOperations(), torch.no_grad():
        check(parameter, MORE)
    torch.vmap(lambda row: check(row, MORE))(X)
    torch.func.grad(lambda x: check(x, MORE).sum())(X)
    assert len(seen) == 15


def test_gradients_recorded_without_the_dispatcher():
    """They are those that it records: of views, twice, under hooks, and None where none is due."""
    base = X.clone().requires_grad_()
    values, indices = sparsekern.topk(base[:, 1:].relu(), 2)
    assert "topk" in type(values.grad_fn).__name__ and not indices.requires_grad
    grads = []
    values.register_hook(grads.append)
    (first,) = torch.autograd.grad((values**3).sum(), base, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), base)
    wanted = torch.zeros_like(X[:, 1:]).scatter(1, indices, (6 * values).detach())
    torch.testing.assert_close(second[:, 1:], wanted * (base[:, 1:] > 0))
    assert len(grads) == 2  # of either derivative
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = sparsekern.topk(base, 2, relu=True).values.sum()
    torch.testing.assert_close(torch.autograd.grad(loss, base)[0].sum(), torch.tensor(4.0))


def test_modes_see_the_operation():
    with SeesOperations() as operations:
        sparsekern.topk(X, 2)
    assert "sparsekern::topk" in operations.seen
    with SeesFunctions() as functions:
        sparsekern.topk(X, 2)
    assert any("topk" in name for name in functions.seen)


def test_profiler_sees_the_operation():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sparsekern.topk(X, 2)
    assert "sparsekern::topk" in {event.key for event in profile.key_averages()}


def test_tracing_records_the_operation():
    graph = make_fx(lambda x: sparsekern.topk(x, 2).values)(X).graph
    assert any("sparsekern.topk" in str(node.target) for node in graph.nodes)


@pytest.mark.parametrize("call", [lambda x: sparsekern.topk(x, 2).values, sparsekern.nn.TopK(2)])
def test_a_lazily_negated_view_keeps_its_sign(call):
    negated = torch.complex(torch.zeros_like(X), X).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(call(negated), call(-X))


def test_subclasses_and_meta_tensors_go_through_torch():
    assert not dispatcher_has_nothing_to_do((X.to("meta"), 2))
    assert sparsekern.topk(X.to("meta"), 2).values.shape == (2, 2)
    tagged = X.as_subclass(Tagged)
    assert not dispatcher_has_nothing_to_do((tagged, 2))
    with torch.no_grad():
        assert type(sparsekern.topk(tagged, 2).values) is Tagged
    torch.testing.assert_close(torch.Tensor(sparsekern.topk(tagged, 2).values), X.topk(2).values)


def test_autocast_and_function_transforms_go_through_torch():
    codes = sparsekern.topk(X, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not dispatcher_has_nothing_to_do((X, 2))
        out = sparsekern.sparse_matmul(codes.values, codes.indices, torch.eye(4))
    assert out.dtype == torch.bfloat16
    rows = torch.vmap(lambda row: sparsekern.topk(row, 2).values)(X)
    torch.testing.assert_close(rows, codes.values)


@pytest.mark.filterwarnings("ignore")  # torch deprecates tracing, and warns of constants
@pytest.mark.parametrize("layer", [sparsekern.TopK(2), sparsekern.JumpReLU(4)])
def test_traced_and_exported_layers_give_what_they_give(layer):
    layer.eval()
    traced = torch.jit.trace(layer, (X,), check_trace=False)
    exported = torch.export.export(layer, (X,)).module()
    for copy in (traced, exported):
        torch.testing.assert_close(copy(-X), layer(-X))
