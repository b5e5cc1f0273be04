"""The examples in the docstrings run, and everything public has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import sparsekern
import sparsekern.models
import sparsekern.ops
import sparsekern.optim

# their imports need what an extra installs, or a GPU
ELSEWHERE = ("sparsekern.__main__", "sparsekern._native", "sparsekern._cuda")
# facts about this machine; one line of PyTorch, which its docstring gives
WITHOUT = {"describe", "codes_to_dense"}

MODULES = [
    found.name
    for found in pkgutil.walk_packages(sparsekern.__path__, "sparsekern.")
    if not found.name.startswith(ELSEWHERE) and ".triton" not in found.name
]


def examples(name: str) -> list[doctest.DocTest]:
    # by its full name: sparsekern.ops.topk as an attribute is the function, not the module
    found = doctest.DocTestFinder().find(importlib.import_module(name))
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", [name for name in MODULES if examples(name)])
def test_examples_run(name):
    runner = doctest.DocTestRunner()
    output: list[str] = []
    for test in examples(name):
        runner.run(test, out=output.append)
    assert runner.failures == 0, "".join(output)


@pytest.mark.parametrize("package", [sparsekern, sparsekern.ops, sparsekern.optim])
def test_what_is_public_has_an_example(package):
    public = [getattr(package, name) for name in getattr(package, "__all__", ["Adam"])]
    for item in public:
        plain = inspect.isclass(item) and issubclass(item, (tuple, Exception))
        if not plain and item.__name__ not in WITHOUT:
            assert ">>>" in item.__doc__, f"{item.__module__}.{item.__name__} has no example"
