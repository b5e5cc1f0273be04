"""Imports point down, and in no circle; imports by name are imports."""

from __future__ import annotations

import ast
import pathlib
import sys

import pytest
from package_imports import read_package

import sparsekern

PACKAGE = pathlib.Path(sparsekern.__file__).parent

# what a module of the package may import from the package, by its first path element
ALLOWED = {
    "__init__": {"_renamed", "_system", "dispatch", "nn", "ops"},
    "_renamed": set(),
    "_system": set(),
    "_tensor_files": {"_system"},
    "dispatch": {"dispatch"},
    "ops": {"dispatch", "ops"},
    "nn": {"dispatch", "nn", "ops"},
    "integrations": {"_system", "_tensor_files", "integrations", "nn", "ops"},
    "optim": {"ops"},
    "sae": {"dispatch", "integrations", "nn", "ops", "sae"},
    "models": {"models", "nn", "ops", "sae"},
    "distributed": {"dispatch", "distributed", "integrations", "nn", "ops", "sae"},
    "measures": {"_system", "data", "measures", "ops"},
    "benchmarks": {"__init__", "_system", "benchmarks", "models", "ops", "optim", "sae", "testing"},
    "testing": set(),
    "data": {"_system", "_tensor_files", "data"},
    "training": {"_system", "_tensor_files", "data", "measures", "nn", "training"},
    "studies": {
        "__init__",
        "_system",
        "data",
        "dispatch",
        "distributed",
        "measures",
        "models",
        "nn",
        "ops",
        "optim",
        "sae",
        "studies",
        "training",
    },
    "cli": {
        "__init__",
        "_system",
        "benchmarks",
        "cli",
        "data",
        "dispatch",
        "integrations",
        "measures",
        "models",
        "sae",
        "studies",
        "training",
    },
    "__main__": {"cli"},
}
# what only the kernel library's user needs: it can be left out
ABOVE_THE_LIBRARY = {
    "benchmarks",
    "cli",
    "data",
    "distributed",
    "measures",
    "models",
    "sae",
    "studies",
    "training",
}
# modules that import by a name which only the call knows, and what these names can be; a circle
# through them is not seen
COMPUTED = {
    "sparsekern": "the parts of the package, when they are first used",
    "sparsekern._renamed": "modules by their names of version 0.1",
    "sparsekern._system": "optional packages of others",
    "sparsekern.studies.loggers": "optional packages of others",
    "sparsekern.cli.data": "the user's own module",
    "sparsekern.benchmarks.peers": "packages of others",
}


@pytest.fixture(scope="module")
def package():
    return read_package(PACKAGE)


def room(module: str) -> str:
    """The first path element of a module; `__init__` of the package itself."""
    return [*module.split("."), "__init__"][1]


def test_imports_point_down(package):
    for module, imported in package.imports.items():
        beyond = {room(other) for other in imported} - ALLOWED[room(module)]
        assert not beyond, f"{module} imports {beyond}"


def test_no_imports_in_a_circle(package):
    assert package.circles() == []


def test_imports_by_name_can_be_read(package):
    """Else the tests above would not see them."""
    unread = [place for place in package.computed if place.split(":")[0] not in COMPUTED]
    assert unread == []
    assert {place.split(":")[0] for place in package.computed} == set(COMPUTED)


def test_operations_and_layers_need_nothing_that_trains_or_draws(package):
    for module, imported in package.imports.items():
        if room(module) not in ABOVE_THE_LIBRARY | {"__main__", "_renamed", "_system"}:
            assert not {room(other) for other in imported} & ABOVE_THE_LIBRARY, module


def test_planted_imports_are_seen(tmp_path):
    """A circle through a function, through a literal name, through a relative one; a name that is
    computed."""
    folder = tmp_path / "planted"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "inner" / "__init__.py").write_text("from . import leaf\n")
    (folder / "inner" / "leaf.py").write_text("import math\n")
    (folder / "a.py").write_text("def f():\n    from .b import g\n")
    (folder / "b.py").write_text("import importlib\nc = importlib.import_module('planted.c')\n")
    (folder / "c.py").write_text(
        "from importlib import import_module\nd = import_module('.d', __package__)\n"
    )
    (folder / "d.py").write_text("from planted import a\n")
    found = read_package(folder)
    assert found.circles() == [[f"planted.{name}" for name in "abcd"]]
    assert found.imports["planted.inner"] == {"planted.inner.leaf"}
    assert found.computed == []
    (folder / "d.py").write_text("import importlib\nname = 'a'\nimportlib.import_module(name)\n")
    found = read_package(folder)
    assert found.circles() == [] and found.computed == ["planted.d:3"]
    # a name that some other function imports, and an import under another name
    (folder / "d.py").write_text("from .c import require\nrequire('planted.a:attribute')\n")
    found = read_package(folder)
    assert found.circles() == [[f"planted.{name}" for name in "abcd"]] and found.computed == []
    for alias in ("from importlib import import_module as load", "load = importlib.import_module"):
        (folder / "d.py").write_text(f"import importlib\n{alias}\nload('planted' + '.a')\n")
        assert read_package(folder).computed == ["planted.d:2"]


def test_one_file_knows_the_dispatcher_and_one_the_compiled_modules():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text().replace("torch.library.register_vmap", "")
        place = str(path.relative_to(PACKAGE))
        assert place == "dispatch/operations.py" or "torch.library" not in text, path
        named = "sparsekern._native" in text or "import _native" in text or "import _cuda" in text
        assert place == "dispatch/modules.py" or not named, path


def test_triton_kernels_import_only_torch_and_triton():
    """From outside of the package, so that whoever has these has all that they need."""
    kernels = [path for path in PACKAGE.rglob("*.py") if "import triton\n" in path.read_text()]
    assert len(kernels) >= 9 and all(path.name.startswith("triton") for path in kernels)
    for path in kernels:
        for node in ast.walk(ast.parse(path.read_text())):
            names = set()
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = {node.module.split(".")[0]}
            assert names <= {"torch", "triton", *sys.stdlib_module_names}, path
