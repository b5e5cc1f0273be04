"""Checkpoints that survive a kill at any moment: tensors in safetensors, the rest in JSON.

A checkpoint is a tensor file ``checkpoint-<step>.safetensors`` and ``checkpoint.json``, which names
it. The tensor file is written and made durable first; replacing the JSON file is the one atomic act
that makes the checkpoint count; only then the tensor file before it is removed.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._system import open_plain, replaced
from .._tensor_files import SavedTensors, TensorsOfFile, in_order, shape_and_dtype, write_tensors
from ..nn.saved_k import NAME as K
from .processes import Processes
from .runs import write_atomically

FACTS = "checkpoint.json"
TENSORS = "checkpoint-{step}.safetensors"
FORMAT = 1
# In the facts and in the tensor file: that they were written together.
PAIR = "written together"
OPTIMIZER = "optimizer."


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or belongs to another model or config."""


class Checkpoint(NamedTuple):
    """A checkpoint of a run folder."""

    tensors: SavedTensors
    """By name; each is read from the file when it is asked for, to the CPU."""
    facts: dict[str, Any]
    """JSON types only."""


class _Wholes(TensorsOfFile):
    """Tensors of which each process may hold a part; all ask for them in the same order."""

    def __init__(self, tensors: Mapping[str, Tensor], processes: Processes) -> None:
        self._tensors, self._processes = tensors, processes

    def shape(self, name: str) -> list[int]:
        return self._processes.saved_shape(self._tensors[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._processes.whole(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def close(self) -> None:
        """Do nothing."""


def write_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    processes: Processes | None = None,
) -> None:
    """Write a checkpoint and remove the one before it; memory is needed for one tensor.

    Args:
        folder: the run folder.
        step: names the tensor file; optimizer steps done.
        tensors: any dtype, shape and device.
        facts: JSON types only.
        processes: that hold parts of the tensors; all must call this, and the first writes.
    """
    wholes = _Wholes(tensors, processes or Processes())
    if processes is not None and not processes.first:
        for name in in_order(wholes):
            wholes[name]
        return
    name = TENSORS.format(step=step)
    pair = secrets.token_hex(16)
    with replaced(folder / name) as file:
        write_tensors(file, wholes, {PAIR: pair})
    content = {"format": FORMAT, "tensors": name, PAIR: pair, **facts}
    write_atomically(folder / FACTS, (json.dumps(content, indent=2) + "\n").encode())
    for old in folder.glob(TENSORS.format(step="*")):
        if old.name != name:
            old.unlink()


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the checkpoint in a run folder, or None when there is none yet.

    Raises:
        CheckpointError: it is damaged or of a format this version does not know, or its two files
            do not belong together.
    """
    try:
        with open_plain(folder / FACTS) as file:
            facts = json.loads(file.read())
    except FileNotFoundError:
        return None
    except (OSError, RecursionError, ValueError) as error:
        raise damaged(folder, error) from error
    try:
        if facts["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint in {folder} has format {facts['format']}, this version reads {FORMAT}"
            )
        name, pair = facts["tensors"], facts.pop(PAIR, None)
        if not isinstance(name, str) or Path(name).name != name:
            raise damaged(folder, f"'tensors' must name a file in the folder, got {name!r}")
        tensors = SavedTensors(folder / name)
    except (OSError, RecursionError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder, error) from error
    # Checkpoints of earlier versions have no such mark.
    if pair is not None and tensors.metadata.get(PAIR) != pair:
        tensors.close()
        raise damaged(folder, f"{name} was not written with {FACTS}, it is of another checkpoint")
    return Checkpoint(tensors, facts)


def change_identity(folder: Path, changes: Mapping[str, Any]) -> None:
    """Replace entries of what the checkpoint in a folder belongs to, and nothing else of it."""
    with open_plain(folder / FACTS) as file:
        facts = json.loads(file.read())
    facts["identity"] |= changes
    write_atomically(folder / FACTS, (json.dumps(facts, indent=2) + "\n").encode())


def damaged(folder: Path, reason: Exception | str) -> CheckpointError:
    """Make the error for a checkpoint that cannot be used as it is."""
    text = f"{reason} is missing" if isinstance(reason, KeyError) else str(reason)
    return CheckpointError(f"checkpoint in {folder} is damaged: {text}")


def check_facts(folder: Path, facts: Any, kinds: Mapping[str, type]) -> None:
    """Raise :class:`CheckpointError` unless facts hold these names, with values of these types.

    Numbers must be finite and not negative; an int is a float, too, but a bool is no int.

    Args:
        folder: of the run, for the message.
        facts: what was read.
        kinds: type of each by name.
    """
    if not isinstance(facts, dict):
        raise damaged(folder, f"{', '.join(kinds)} are expected in place of {facts!r}")
    for name, kind in kinds.items():
        if name not in facts:
            raise damaged(folder, KeyError(name))
        value = facts[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = 0 <= value < math.inf if number else kind not in (int, float)
        if not fits or not isinstance(value, int | float if kind is float else kind):
            raise damaged(folder, f"{name!r} is {value!r}")


def check_same(folder: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` naming the first field in which two configs differ.

    Args:
        folder: of the run, for the message.
        saved: fields of the checkpoint.
        current: fields of now.
    """
    for field in [*current, *(name for name in saved if name not in current)]:
        saved_value, value = saved.get(field, "absent"), current.get(field, "absent")
        if saved_value != value:
            raise CheckpointError(
                f"checkpoint in {folder} is of another config: {field} is {saved_value!r} there "
                f"and {value!r} here"
            )


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name a model's state with the prefix ``model.``."""
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


@torch.no_grad()
def load_model(
    folder: Path,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    processes: Processes | None = None,
) -> None:
    """Put saved tensors into a model, one at a time, after checking all of them.

    Args:
        folder: of the run, for messages.
        model: left as it is where the tensors do not fit.
        tensors: by names that start with ``model.``.
        processes: that share the model; each takes its part.

    Raises:
        CheckpointError: a name, a shape or a dtype differs.
    """
    prefix = "model."
    processes = processes or Processes()
    state = model.state_dict()
    saved = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    # Versions before saved no k, and a tied matrix under both of its names.
    state = {
        name: tensor
        for name, tensor in state.items()
        if name in saved or name.rpartition(".")[2] != K
    }
    saved = {
        name: key for name, key in saved.items() if name in state or not _is_alias(model, name)
    }
    check_same(
        folder,
        {name: shape_and_dtype(tensors, key)[0] for name, key in saved.items()},
        {name: processes.saved_shape(tensor) for name, tensor in state.items()},
    )
    check_same(
        folder,
        {name: str(shape_and_dtype(tensors, key)[1]) for name, key in saved.items()},
        {name: str(tensor.dtype) for name, tensor in state.items()},
    )
    try:
        for name, tensor in state.items():
            tensor.copy_(processes.part(tensors[saved[name]], tensor))
    except (OSError, ValueError) as error:
        raise damaged(folder, error) from error
    # The tensors are there already; this tells layers that keep something else, too.
    model.load_state_dict(state)


def _is_alias(model: nn.Module, name: str) -> bool:
    """Tell whether a name leads to a parameter that the model's state has under another."""
    path, _, last = name.rpartition(".")
    try:
        tensor = getattr(model.get_submodule(path), last, None)
    except AttributeError:
        return False
    return any(tensor is parameter for parameter in model.parameters())


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors and JSON types.

    The tensors are named ``optimizer.<parameter>.<key>``.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, entries in state["state"].items():
        for key, value in entries.items():
            target = tensors if isinstance(value, Tensor) else numbers
            target[f"{OPTIMIZER}{parameter}.{key}"] = value
    return tensors, {"numbers": numbers, "groups": state["param_groups"]}


def load_optimizer(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    processes: Processes | None = None,
) -> None:
    """Load what :func:`optimizer_state` returned.

    Args:
        folder: of the run, for messages.
        optimizer: of the same parameters.
        tensors: of the checkpoint; those of the optimizer are taken.
        facts: the JSON part.
        processes: that share the parameters; each takes its part.

    Raises:
        CheckpointError: the facts are not those of such an optimizer.
    """
    check_facts(folder, facts, {"numbers": dict, "groups": list})
    processes = processes or Processes()
    fresh = optimizer.state_dict()["param_groups"]
    state: dict[int, dict[str, Any]] = {}
    try:
        for name, value in facts["numbers"].items():
            _file_entry(state, name, value)
        for name in tensors:
            if name.startswith(OPTIMIZER):
                _file_entry(state, name, None)
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        for number, entries in state.items():
            for key, value in entries.items():
                if value is None:
                    tensor = tensors[f"{OPTIMIZER}{number}.{key}"]
                    if tensor.dim():
                        parameter = parameters[number]
                        if list(tensor.shape) != processes.saved_shape(parameter):
                            raise ValueError(f"{key} of parameter {number} has another shape")
                        # On its device at once: the copy on the CPU is gone before the next one.
                        tensor = processes.part(tensor, parameter).to(parameter.device)
                    # Counters of steps stay on the CPU, unless the optimizer moves them.
                    entries[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
        raise damaged(folder, error) from error
    # Afterwards, because torch itself adds what a version before it did not write.
    for saved, group in zip(optimizer.param_groups, fresh, strict=True):
        for name in group.keys() - {"params"}:
            if name not in saved:
                raise damaged(folder, KeyError(name))
            if not _same_json_type(saved[name], group[name]):
                raise damaged(folder, f"{name!r} is {saved[name]!r}")


def _file_entry(state: dict[int, dict[str, Any]], name: str, value: Any) -> None:
    """File a value of the state under its parameter's number and key."""
    _, parameter, key = name.split(".", 2)
    state.setdefault(int(parameter), {})[key] = value


def _same_json_type(one: Any, other: Any) -> bool:
    """Tell whether two values look alike in JSON, where a tuple is a list."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same_json_type, one, other))
    if isinstance(other, bool) or not isinstance(other, int | float):
        return type(one) is type(other)
    return isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one)
