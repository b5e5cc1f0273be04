"""Checkpoints that survive a kill at any moment: tensors in safetensors, the rest in JSON.

A checkpoint is a tensor file ``checkpoint-<step>.safetensors`` and ``checkpoint.json``, which names
it. The tensor file is written and made durable first; replacing the JSON file is the one atomic act
that makes the checkpoint count; only then the tensor file before it is removed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .runs import write_atomically

FACTS = "checkpoint.json"
TENSORS = "checkpoint-{step}.safetensors"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or belongs to another model or config."""


class Checkpoint(NamedTuple):
    """A checkpoint in memory."""

    tensors: dict[str, Tensor]
    """By name; on the CPU."""
    facts: dict[str, Any]
    """JSON types only."""


def write_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Writes a checkpoint and removes the one before it.

    Args:
        folder: the run folder.
        step: names the tensor file; optimizer steps done.
        tensors: any dtype, shape and device.
        facts: JSON types only.
    """
    from safetensors.torch import save

    # A copy each: safetensors refuses tensors that share memory, such as tied weights.
    plain = {n: tensor.detach().to("cpu", copy=True).contiguous() for n, tensor in tensors.items()}
    name = TENSORS.format(step=step)
    write_atomically(folder / name, save(plain))
    content = {"format": FORMAT, "tensors": name, **facts}
    write_atomically(folder / FACTS, (json.dumps(content, indent=2) + "\n").encode())
    for old in folder.glob(TENSORS.format(step="*")):
        if old.name != name:
            old.unlink()


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in a run folder, or None when there is none yet.

    Raises:
        CheckpointError: it is damaged or of a format this version does not know.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not (folder / FACTS).exists():
        return None
    try:
        facts = json.loads((folder / FACTS).read_text())
        if facts["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint in {folder} has format {facts['format']}, this version reads {FORMAT}"
            )
        tensors = load((folder / facts["tensors"]).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise damaged(folder, error) from error
    return Checkpoint(tensors, facts)


def damaged(folder: Path, reason: Exception | str) -> CheckpointError:
    """The error to raise for a checkpoint that cannot be used as it is."""
    text = f"{reason} is missing" if isinstance(reason, KeyError) else str(reason)
    return CheckpointError(f"checkpoint in {folder} is damaged: {text}")


def check_facts(folder: Path, facts: Any, kinds: Mapping[str, type]) -> None:
    """Raises :class:`CheckpointError` unless facts hold these names, with values of these types.

    Numbers must be finite and not negative; an int is a float, too, but a bool is no int.
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
    """Raises :class:`CheckpointError` naming the first field in which two configs differ."""
    for field in [*current, *(name for name in saved if name not in current)]:
        there, here = saved.get(field, "absent"), current.get(field, "absent")
        if there != here:
            raise CheckpointError(
                f"checkpoint in {folder} is of another config: {field} is {there!r} there "
                f"and {here!r} here"
            )


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's state under names that start with ``model.``."""
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def load_model(folder: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts saved tensors into a model, after checking all of them.

    Raises:
        CheckpointError: a name or a shape differs.
    """
    prefix = "model."
    saved = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    shapes = {name: list(tensor.shape) for name, tensor in saved.items()}
    check_same(folder, shapes, {name: list(t.shape) for name, t in model.state_dict().items()})
    model.load_state_dict(saved)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors, named ``optimizer.<parameter>.<key>``, and JSON types."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, entries in state["state"].items():
        for key, value in entries.items():
            place = tensors if isinstance(value, Tensor) else numbers
            place[f"optimizer.{parameter}.{key}"] = value
    return tensors, {"numbers": numbers, "groups": state["param_groups"]}


def load_optimizer(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    """The inverse of :func:`optimizer_state`.

    Raises:
        CheckpointError: the facts are not those of such an optimizer.
    """
    check_facts(folder, facts, {"numbers": dict, "groups": list})
    fresh = optimizer.state_dict()["param_groups"]
    state: dict[int, dict[str, Any]] = {}
    try:
        for name, value in {**tensors, **facts["numbers"]}.items():
            if name.startswith("optimizer."):
                _, parameter, key = name.split(".", 2)
                state.setdefault(int(parameter), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(folder, error) from error
    # Afterwards, because torch itself adds what a version before it did not write.
    for saved, group in zip(optimizer.param_groups, fresh, strict=True):
        for name in group.keys() - {"params"}:
            if name not in saved:
                raise damaged(folder, KeyError(name))
            if not _same_kind(saved[name], group[name]):
                raise damaged(folder, f"{name!r} is {saved[name]!r}")


def _same_kind(one: Any, other: Any) -> bool:
    """Whether two values look alike in JSON, where a tuple is a list."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same_kind, one, other))
    if isinstance(other, bool) or not isinstance(other, int | float):
        return type(one) is type(other)
    return isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one)
