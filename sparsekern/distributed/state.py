"""The state of a sharded model: parts of all latents, as torch and its checkpoints know them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from .sharding import Shards

COUNTS = "counter.rows_since_fired"


def wrap_counts(model: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Give the counts of the own latents in a state as a part of all (a hook of torch's)."""
    if f"{prefix}{COUNTS}" in state:
        shards: Shards = model.shards
        state[f"{prefix}{COUNTS}"] = shards.wrap(state[f"{prefix}{COUNTS}"])


def cut_state(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the own rows of a state, be it of one process or of several (a hook of torch's)."""
    shards: Shards = model.shards
    for name, current in model.state_dict(prefix=prefix).items():
        given = state.get(name)
        if not isinstance(current, DTensor) or given is None:
            continue
        if not isinstance(given, DTensor):
            given = given.to(shards.device)
            cut = current.dim() > 1 and given.shape[:1] == (shards.layout.latents,)
            given = (
                shards.wrap(shards.layout.cut(given)) if cut else shards.replicate(given.clone())
            )
        state[name] = shards.local(given) if name == f"{prefix}{COUNTS}" else given


def gather_value(value: Any) -> Any:
    """Return a value of a state with all latents, on the CPU; all processes must call it."""
    if not isinstance(value, DTensor):
        return value.cpu() if isinstance(value, Tensor) else value
    whole = value.full_tensor().cpu()
    return whole.flatten(0, 1) if any(p.is_shard() for p in value.placements) else whole
