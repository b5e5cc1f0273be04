"""Accelerated modules compared with what they were."""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import sparsekern

ROWS, D, N, K = 48, 24, 200, 6


def peer(name: str) -> ModuleType:
    """Import another library, or skip the tests of a file, saying what is missing."""
    return imported(name, allow_module_level=True)


def imported(name: str, *, allow_module_level: bool = False) -> ModuleType:
    """Import another library, or skip a test, saying what is missing."""
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels take no CPU tensors
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            pytest.skip(
                f"needs {name}, of which {error.name} is missing: "
                "pip install --no-deps -r python_tests/integrations/peers.txt",
                allow_module_level=allow_module_level,
            )


def batch(seed: int = 0, *leading: int) -> torch.Tensor:
    """Rows of random numbers."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*(leading or (ROWS,)), D, generator=draw)


def randomize(module: nn.Module, seed: int = 1) -> None:
    """Give every parameter random numbers, in the layout that it has."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))


def pair(module: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Return the module, and a copy that is accelerated."""
    fast = sparsekern.accelerate(module, inplace=False, **options)
    assert type(fast) is not type(module) and isinstance(fast, type(module))
    return module, fast


def tensors(result: Any) -> list[torch.Tensor]:
    """Return the tensors of a result in order, as plain dense ones."""
    if isinstance(result, torch.Tensor):
        return [result.detach() + 0]
    if isinstance(result, dict):
        result = list(result.values())
    if hasattr(result, "__dataclass_fields__"):
        result = [getattr(result, name) for name in result.__dataclass_fields__]
    if isinstance(result, list | tuple):
        return [tensor for part in result for tensor in tensors(part)]
    return []


def gradients(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def check_equal(
    slow: nn.Module,
    fast: nn.Module,
    call: Callable[[nn.Module], Any],
    loss: Callable[[Any], torch.Tensor] | None = None,
) -> None:
    """Compare results, gradients of a loss, and buffers, of a module and an accelerated one."""
    results = []
    for module in (slow, fast):
        module.zero_grad(set_to_none=True)
        result = call(module)
        if loss is not None:
            loss(result).backward()
        results.append(result)
    for expected, got in zip(*map(tensors, results), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for name, expected in gradients(slow).items():
        got = gradients(fast)[name]
        assert (expected is None) == (got is None), name
        if expected is not None:
            largest = expected.abs().max().item()
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * max(largest, 1.0))
    for (name, expected), got in zip(slow.named_buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(got, expected, msg=name)


def check_lifecycle(
    module: nn.Module, call: Callable[[nn.Module], Any], *, pickled: bool = True
) -> None:
    """Check what accelerate keeps, what copies and pickles of an accelerated module are, and that
    restore undoes all. pickled: the library's own modules can be."""
    own = type(module)
    seen: list[str] = []
    handle = module.register_forward_hook(lambda *_: seen.append("hook"))
    before = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    attributes = set(vars(module))
    with torch.no_grad():
        expected = tensors(call(module))
    assert sparsekern.accelerate(module) is module
    accelerated = type(module)
    assert issubclass(accelerated, own) and accelerated is not own
    assert sparsekern.accelerate(module) is module and type(module) is accelerated  # twice
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == before
    assert set(vars(module)) == attributes
    handle.remove()
    copies = [copy.deepcopy(module), module.to("cpu")]
    if pickled:
        stored = io.BytesIO()
        torch.save(module, stored)
        stored.seek(0)
        copies.append(torch.load(stored, weights_only=False))
    module.register_forward_hook(lambda *_: seen.append("hook"))
    for other in copies:
        assert type(other) is accelerated
        with torch.no_grad():
            for one, two in zip(tensors(call(other)), expected, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert seen, "the hook was not called"
    assert sparsekern.restore(module) is module and type(module) is own
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == before
    assert set(vars(module)) == attributes
    with torch.no_grad():
        for one, two in zip(tensors(call(module)), expected, strict=True):
            assert torch.equal(one, two)
