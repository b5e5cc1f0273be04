"""Logged numbers on their way to other tools; each is one function that takes a record.

A record is what metrics.jsonl has in a line: a dict with "kind" ("step" or "epoch"), "step", and
numbers. Any callable will do; these are the ones of the command line.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
TARGETS = tuple(_MODULES)
Log = Callable[[Mapping[str, Any]], None]


@contextmanager
def logged_to(target: str, folder: Path, config: Any) -> Iterator[Log]:
    """Open a target; yield a function for ``on_metrics`` of a study's run.

    Args:
        target: one of :data:`TARGETS`.
        folder: of the run; tensorboard's files go to its folder ``tensorboard``, and wandb's name
            of the run is its name.
        config: of the run, a dataclass.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    module = _import_or_explain(_MODULES[target], target)
    with ExitStack() as stack:
        send: list[Any] = []

        def log(record: Mapping[str, Any]) -> None:
            if not send:  # a run that is refused leaves nothing behind
                send.append(stack.enter_context(_open_target(module, target, folder, config)))
            send[0](scalars(record), record["step"])

        yield log


@contextmanager
def _open_target(module: Any, target: str, folder: Path, config: Any) -> Iterator[Any]:
    """Open a target; yield a function of numbers by name and a step."""
    if target == "wandb":
        with module.init(name=folder.resolve().name, config=asdict(config)) as run:
            yield lambda numbers, step: run.log(numbers, step=step)
        return
    with module.SummaryWriter(str(folder / "tensorboard")) as writer:

        def add(numbers: Mapping[str, float], step: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        yield add


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Name the numbers of a record: ``step/loss``, ``epoch/loss`` and so on."""
    return {
        f"{record['kind']}/{name}": value
        for name, value in record.items()
        if isinstance(value, int | float) and name not in ("step", "epoch")
    }


def _import_or_explain(module: str, package: str) -> Any:
    """Import the module of a package; say how to install it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"--log-to {package} needs the package {package} (pip install {package})"
        ) from error
