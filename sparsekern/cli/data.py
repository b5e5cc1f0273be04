"""The command ``sparsekern data``, which makes data files."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DTYPES = ("float16", "bfloat16", "float32")


def add_data(commands: Any) -> None:
    """Add ``data`` to the commands of a parser."""
    parser = commands.add_parser("data", help="make data files")
    kinds = parser.add_subparsers(title="kinds of data", metavar="KIND", required=True)
    activations = kinds.add_parser(
        "activations", help="HDF5 files of activations, to train sparse autoencoders on"
    )
    sources = activations.add_subparsers(title="sources", metavar="SOURCE", required=True)
    _add_synthetic(sources)
    _add_convert(sources)
    _add_capture(sources)
    _add_images(kinds, "dsprites", "dSprites", ".npz, .h5 or .hdf5")
    _add_images(kinds, "shapes3d", "Shapes3D", ".h5 or .hdf5")


def _add_images(kinds: Any, name: str, title: str, suffixes: str) -> None:
    """Add a command that renders a set of images."""
    text = f"a file of {title}-compatible, calibrated images in the published layout, rendered"
    parser = kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument(
        "--out", metavar="FILE", required=True, help=f"the new file, {suffixes}; must not exist"
    )
    parser.add_argument(
        "--images", type=int, metavar="N",
        help="a random subset (default: the whole set in its published order)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="chooses the subset (default: 0)")
    parser.set_defaults(function=_render_images, command=f"data {name}", set=name)


def _add_source(
    sources: Any, name: str, function: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """Add a command that makes a file of activations."""
    parser: argparse.ArgumentParser = sources.add_parser(
        name, help=text, description=text, allow_abbrev=False
    )
    parser.add_argument(
        "--out", metavar="FILE", required=True, help="the new file, .h5 or .hdf5; must not exist"
    )
    parser.set_defaults(function=_naming_flags(function), command=f"data activations {name}")
    return parser


# What messages of the library call what was typed here.
FLAGS = {"path": "--out", "hook_point": "--hook", "paths": "IN"}
REMEDIES = (
    (r"dtype=torch\.(\w+)", r"--dtype \1"),
    (r"nonfinite='skip'", "--nonfinite skip"),
    (r"mask=None writes all, a function of the input may return another mask",
     "--keep-padding writes all, --mask FILE.npy others"),
)  # fmt: skip


def _naming_flags(
    function: Callable[[argparse.Namespace], int],
) -> Callable[[argparse.Namespace], int]:
    """Name flags instead of Python's arguments in the errors of a function."""

    def run(options: argparse.Namespace) -> int:
        try:
            return function(options)
        except ValueError as error:
            text = str(error)
            named = re.match(r"(?:synthetic|convert|capture|write_activations): (\w+) must ", text)
            if named is not None and (named[1] in FLAGS or hasattr(options, named[1])):
                flag = FLAGS.get(named[1], f"--{named[1].replace('_', '-')}")
                text = flag + text[named.end(1) :]
            for pattern, remedy in REMEDIES:
                text = re.sub(pattern, remedy, text)
            if text == str(error):
                raise
            raise type(error)(text) from error

    return run


def _add_synthetic(sources: Any) -> None:
    """Add ``data activations synthetic``."""
    from ..data import synthetic

    parser = _add_source(
        sources, "synthetic", _synthetic, "sparse mixtures of random, known directions"
    )
    parameters = inspect.signature(synthetic).parameters
    for name, kind, text in (
        ("features", int, "width of the activations"),
        ("latents", int, "number of directions"),
        ("active", int, "directions mixed in each token"),
        ("tokens", int, "number of tokens"),
        ("seed", int, "determines the file"),
        ("noise", float, "standard deviation of the noise in each feature"),
    ):
        default = parameters[name].default
        parser.add_argument(
            f"--{name}", type=kind, default=default, help=f"{text} (default: {default})"
        )
    _add_dtype(parser, "float16", "float16")


def _add_convert(sources: Any) -> None:
    """Add ``data activations convert``."""
    parser = _add_source(
        sources, "convert", _convert, "other files, one after the other: HDF5, .npy, .safetensors"
    )
    parser.add_argument("paths", metavar="IN", nargs="+", help="a file to read")
    parser.add_argument(
        "--dataset", default="activations", metavar="NAME",
        help="dataset or tensor to read (default: activations)",
    )  # fmt: skip
    parser.add_argument(
        "--nonfinite", choices=("refuse", "skip"), default="refuse",
        help="what to do about tokens with NaN or infinities (default: refuse)",
    )  # fmt: skip
    _add_dtype(parser, None, "that of the files")


def _add_capture(sources: Any) -> None:
    """Add ``data activations capture``."""
    parser = _add_source(
        sources, "capture", _capture, "what a submodule returns when a torch module runs"
    )
    parser.add_argument(
        "--module", required=True, metavar="PACKAGE.MODULE:FACTORY",
        help="a function without arguments that returns the torch.nn.Module",
    )  # fmt: skip
    parser.add_argument(
        "--hook", required=True, metavar="NAME", help="the submodule, as in named_modules()"
    )
    parser.add_argument(
        "--inputs", required=True, nargs="+", metavar="[NAME=]FILE.npy",
        help="the module's inputs, [n, ...]: a file, or one for each keyword argument, such as "
        "input_ids=ids.npy attention_mask=mask.npy (positions whose attention_mask is 0 are "
        "not written)",
    )  # fmt: skip
    parser.add_argument(
        "--mask", metavar="FILE.npy",
        help="[n, positions] of 0 and 1: which positions are written; the module does not get it",
    )  # fmt: skip
    parser.add_argument(
        "--keep-padding", action="store_true", help="write the positions of padding, too"
    )
    parser.add_argument(
        "--skip-first", type=int, default=0, metavar="N",
        help="leave out the first N real tokens of each sequence, such as BOS (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--skip-tokens", type=int, nargs="+", default=[], metavar="ID",
        help="leave out these tokens, such as those of [CLS] and [SEP]",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=64, help="inputs per call (default: 64)")
    parser.add_argument("--device", default="cpu", help="where the module runs (default: cpu)")
    _add_dtype(parser, None, "that of the submodule's output")


def _add_dtype(parser: argparse.ArgumentParser, default: str | None, default_text: str) -> None:
    """Add the flag of the stored type."""
    parser.add_argument(
        "--dtype", choices=DTYPES, default=default, help=f"stored type (default: {default_text})"
    )


def _render_images(options: argparse.Namespace) -> int:
    """Render a set of images to a file."""
    from .. import data

    images = getattr(data, options.set)
    if options.images is None and options.seed is not None:
        raise ValueError(f"--seed chooses a subset and needs --images, got --seed {options.seed}")
    if options.images is not None and not 1 <= options.images <= images.COUNT:
        raise ValueError(
            f"--images must lie in 1..{images.COUNT} (the number of images), got {options.images}"
        )
    if options.seed is not None and options.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {options.seed}")
    try:
        count = images.write(options.out, options.images, seed=options.seed or 0)
    except data.WritingInterrupted as stop:
        sys.stdout.write(f"{stop}\n")
        # What a shell gives a process that the signal ended.
        return 128 + stop.signal
    size = Path(options.out).stat().st_size / 1e6
    sys.stdout.write(f"{options.out}: {count} rendered, calibrated images, {size:.1f} MB\n")
    return 0


def _dtype(options: argparse.Namespace) -> Any:
    """Look up the type that ``--dtype`` names; None for the default."""
    import torch

    return None if options.dtype is None else getattr(torch, options.dtype)


def _synthetic(options: argparse.Namespace) -> int:
    """Make a file of sparse mixtures."""
    from ..data import synthetic

    synthetic(
        options.out, features=options.features, latents=options.latents, active=options.active,
        tokens=options.tokens, seed=options.seed, noise=options.noise, dtype=_dtype(options),
    )  # fmt: skip
    return _print_summary(options.out)


def _convert(options: argparse.Namespace) -> int:
    """Convert files."""
    from ..data import convert

    convert(
        options.paths, options.out, dataset=options.dataset, dtype=_dtype(options),
        nonfinite=options.nonfinite,
    )  # fmt: skip
    return _print_summary(options.out)


def _capture(options: argparse.Namespace) -> int:
    """Capture what a submodule returns."""
    from ..data import capture

    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {options.batch_size}")
    if options.mask and options.keep_padding:
        raise ValueError("--mask says what is written, --keep-padding that all is: give one")
    arrays, names = _open_inputs(options.inputs)
    batch_mask = _open_mask(options.mask, arrays[0])
    mask: Any = "attention_mask"
    if options.keep_padding or batch_mask is not None:
        mask = None if batch_mask is None else batch_mask.of_batch
    module = _make_module(options.module).to(options.device)
    inputs = _read_batches(arrays, names, options.batch_size, batch_mask)
    capture(
        module, options.hook, inputs, options.out,
        dtype=_dtype(options), mask=mask, skip_first=options.skip_first,
        skip_tokens=options.skip_tokens,
    )  # fmt: skip
    return _print_summary(options.out)


class _BatchMask:
    """Gives out the rows of a mask that belong to the inputs being run."""

    def __init__(self, array: Any) -> None:
        self.array, self.start, self.stop = array, 0, 0

    def of_batch(self, _batch: Any) -> Any:
        """Look up the mask of the batch given out last."""
        import torch

        return torch.from_numpy(self.array[self.start : self.stop])


def _open_mask(path: str | None, inputs: Any) -> _BatchMask | None:
    """Open the file of ``--mask``."""
    if path is None:
        return None
    array = _open_array(path)
    _check_length(path, array, inputs)
    return _BatchMask(array)


def _check_length(path: str, array: Any, inputs: Any) -> None:
    """Raise DataError where a file has another length than the inputs."""
    from ..data import DataError

    if len(array) != len(inputs):
        raise DataError(f"input files differ in length: {len(inputs)}, {len(array)} in {path}")


def _open_inputs(paths: list[str]) -> tuple[list[Any], list[str]]:
    """Open the inputs; return the arrays and the names of the keyword arguments.

    A single array has no name.
    """
    names, files = [], []
    for path in paths:
        name, separator, rest = path.partition("=")
        named = bool(separator) and name.isidentifier() and not Path(path).is_file()
        names.append(name if named else "")
        files.append(rest if named else path)
    if len(paths) > 1 and ("" in names or len(set(names)) < len(names)):
        raise ValueError(f"--inputs: several files need different names, got {' '.join(paths)}")
    arrays = [_open_array(file) for file in files]
    for file, array in zip(files, arrays, strict=True):
        _check_length(file, array, arrays[0])
    return arrays, names


def _read_batches(
    arrays: list[Any], names: list[str], batch_size: int, mask: _BatchMask | None
) -> Iterator[Any]:
    """Yield batches of the first dimension of arrays that are read as they are needed."""
    for start in range(0, len(arrays[0]), batch_size):
        parts = [array[start : start + batch_size] for array in arrays]
        if mask is not None:
            mask.start, mask.stop = start, start + len(parts[0])
        yield dict(zip(names, parts, strict=True)) if names[0] else parts[0]


def _open_array(path: str) -> Any:
    """Open an array of inputs, of which slices are read."""
    from ..data import DataError
    from ..data.npy import NpyArray

    if not Path(path).is_file():
        raise DataError(f"input file not found: {path}")
    try:
        array = NpyArray(path)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(
            f"input file is truncated, damaged or not .npy: {path} ({error})"
        ) from error
    if not array.shape or array.shape[0] == 0:
        raise DataError(f"input file is empty: {path} holds {list(array.shape)}")
    return array


def _make_module(name: str) -> Any:
    """Call a factory named ``package.module:factory``; the current folder is searched too."""
    from torch import nn

    package, _, factory = name.partition(":")
    if not package or not factory:
        raise ValueError(f"--module must be PACKAGE.MODULE:FACTORY, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    make = getattr(importlib.import_module(package), factory, None)
    if not callable(make):
        raise ValueError(f"--module: {package} has no function {factory!r}")
    module = make()
    if not isinstance(module, nn.Module):
        raise ValueError(f"--module: {name} must return a torch.nn.Module, got {type(module)}")
    return module


def _print_summary(path: str) -> int:
    """Print what a new file holds."""
    from ..data import ActivationStore

    with ActivationStore(path) as store:
        facts = [f"{store.tokens} tokens of {store.features} features"]
        facts.append(str(store.dtype).removeprefix("torch."))
        if store.directions is not None:
            facts.append(f"{len(store.directions)} known directions")
    size = Path(path).stat().st_size / 1e6
    sys.stdout.write(f"{path}: {', '.join(facts)}, {size:.1f} MB\n")
    return 0
