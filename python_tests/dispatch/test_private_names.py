"""The package works where torch has any of the private names that it uses no longer.

torch needs most of them itself, so they are not taken from it: the package is imported with another
name, that torch does not have, in its place.
"""

from __future__ import annotations

import ast
import os
import pathlib
import subprocess
import sys

import pytest
from torch_alone import run_after_torch

import sparsekern

# of objects, whose types the sources do not show
OF_OBJECTS = [
    "torch.Tensor:_is_view", "torch.UntypedStorage:_cdata",
    "torch.nn.parallel.DistributedDataParallel:_join_config",
]  # fmt: skip
PACKAGE = pathlib.Path(sparsekern.__file__).parent


def private_names() -> list[str]:
    """Names of torch with an underscore in front, `module:name`, that the package imports, or
    takes from a module of torch."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        modules = {"torch": "torch"}  # what a name in this file stands for
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                for alias in node.names:
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    if "._" in f"{node.module}.{alias.name}":
                        names.add(f"{node.module}:{alias.name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and "._" in (dotted := _dotted(node, modules)):
                names.add(":".join(dotted.rsplit(".", 1)))
            elif (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") in ("getattr", "hasattr")
                and isinstance(node.args[0], ast.Name)
                and isinstance(node.args[1], ast.Constant)
                and node.args[0].id in modules
                and str(node.args[1].value).startswith("_")
            ):
                names.add(f"{modules[node.args[0].id]}:{node.args[1].value}")
    return sorted(name for name in names if not name.endswith((":_C", "__")))


def _dotted(node: ast.Attribute, modules: dict[str, str]) -> str:
    parts = [node.attr]
    while isinstance(node.value, ast.Attribute):
        node = node.value
        parts.append(node.attr)
    if isinstance(node.value, ast.Name) and node.value.id in modules:
        return ".".join([modules[node.value.id], *reversed(parts)])
    return ""


USES = """
import importlib.machinery, os, re, sys, traceback, torch, torch._dynamo, torch.utils.checkpoint

def use():
    import sparsekern
    from sparsekern.ops import adam_step
    x = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.0, 7.0, -2.0, 1.0]], requires_grad=True)
    values, indices = sparsekern.topk(x, 2)
    assert indices.tolist() == [[0, 2], [1, 3]]
    weight = torch.arange(12.0).view(4, 3).requires_grad_()
    sparsekern.sparse_matmul(values, indices, weight).sum().backward()
    assert x.grad.tolist() == [[3, 0, 21, 0], [0, 12, 0, 30]], x.grad
    assert weight.grad.sum(1).tolist() == [9, 21, 6, 3], weight.grad
    with torch.no_grad():
        assert sparsekern.topk_mask(x, 1).tolist() == [[3, 0, 0, 0], [0, 7, 0, 0]]
    rows = torch.vmap(lambda row: sparsekern.topk(row, 2).values)(x.detach())
    assert rows.tolist() == values.tolist()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = sparsekern.sparse_matmul(values.detach(), indices, weight.detach())
    assert product.dtype == torch.bfloat16
    negated = torch.complex(torch.zeros_like(x), x).detach().conj().imag
    assert sparsekern.topk(negated, 1).indices.tolist() == [[1], [2]]
    parameter, gradient = torch.zeros(2), torch.ones(2)
    version = parameter._version
    adam_step(parameter, gradient, torch.zeros(2), torch.zeros(2), lr=0.5, step=1)
    assert parameter.tolist() == [-0.5, -0.5] and parameter._version > version
    counter = sparsekern.DeadNeuronCounter(4)
    layers = [sparsekern.TopK(2, counter=counter), sparsekern.JumpReLU(4), sparsekern.BatchTopK(2)]
    for layer in layers:
        again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        again.sum().backward()
        layer.eval()(x), layer.codes(x)
    counter.fraction(1)
    model = sparsekern.models.SparseAutoencoder(4, 8, activation=sparsekern.BatchTopK(2))
    (model(x.detach()).reconstruction - x.detach()).square().mean().backward()
    model.eval()(x.detach())
    large = sparsekern.topk_mask(torch.rand(3, 3 << 20), 2)
    assert large.count_nonzero() == 6

def hide(name):
    code_of = importlib.machinery.SourceFileLoader.get_code

    def get_code(loader, module):
        if not module.startswith("sparsekern"):
            return code_of(loader, module)
        source = re.sub(rf"\\b{name}\\b", f"{name}_no_more", loader.get_source(module))
        return compile(source, loader.path, "exec", dont_inherit=True)

    importlib.machinery.SourceFileLoader.get_code = get_code

for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            hide(name.partition(":")[2])
            use()
        except BaseException:
            print(name, traceback.format_exc(), flush=True)
            os._exit(1)
        os._exit(0)
    print(name, "works" if os.waitpid(child, 0)[1] == 0 else "FAILS", flush=True)
"""


@pytest.mark.slow
def test_the_package_works_without_any_of_them():
    names = private_names() + OF_OBJECTS
    assert {"torch._C:_dispatch_keys", "torch.autograd.forward_ad:_current_level"} <= set(names)
    run = subprocess.run(
        [sys.executable, "-c", USES, *names],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=PACKAGE.parent,
    )
    assert run.stdout.split("\n")[:-1] == [f"{name} works" for name in names], run.stdout


@pytest.mark.parametrize("lie", ["empty", "other"])
def test_keys_that_tell_something_else_are_not_trusted(lie):
    """torch may keep a name and change what it means."""
    empty = "torch._C.DispatchKeySet.from_raw_repr(0)"
    told = {"empty": f"lambda *_: {empty}", "other": "lambda *_: 7"}[lie]
    code = f"""
import torch
torch._C._dispatch_keys = {told}
from sparsekern.dispatch.fast_path import dispatcher_has_nothing_to_do
assert not dispatcher_has_nothing_to_do((torch.ones(2),))
"""
    run = run_after_torch(code)
    assert run.returncode == 0, run.stderr
