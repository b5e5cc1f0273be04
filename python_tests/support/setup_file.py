"""setup.py as a module: the tests build with its functions and flags."""

import functools
import importlib.util
import pathlib
import types

ROOT = pathlib.Path(__file__).parents[2].resolve()


@functools.cache
def setup_file() -> types.ModuleType:
    """The names of setup.py, without running its setup()."""
    spec = importlib.util.spec_from_file_location("sparsekern_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
