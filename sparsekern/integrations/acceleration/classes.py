"""Classes that stand in for a library's, made from its class and from ours.

A module is accelerated by giving it another class, so that its parameters, buffers, hooks and
attributes stay. The new class is a subclass of the old one. Where that is itself a subclass of the
class that a library has written, our methods come after its own and before the library's:

    AcceleratedMine(Mine, AcceleratedTopKSAE(OurMethods, TopKSAE))
"""

from __future__ import annotations

import copyreg
from typing import Any

from torch import nn

from .peers import find
from .plain import plain_replacement
from .replacement import Accelerated, Replacement

_CLASSES: dict[tuple[type, Replacement, bool], type] = {}


class _Pickled(Accelerated):
    """A class that stands in, pickled by the class that it stands for, since it has no place."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        function, args, *rest = reduced
        if function is not copyreg.__newobj__ or args[0] is not type(self):  # type: ignore[attr-defined]
            return (function, args, *rest)
        return (_new, (self.stands_for, self.match_upstream, *args[1:]), *rest)

    def __prepare_scriptable__(self) -> Any:
        """Return what torch.jit.script takes in the place of self: the module as it was."""
        own: Any = self.stands_for.__new__(self.stands_for)
        own.__dict__.update(vars(self))
        return own


def standing_in(
    own: type[nn.Module], replacement: Replacement, match_upstream: bool
) -> type[nn.Module]:
    """Return the class that stands in for a class or a subclass of what is replaced."""
    key = (own, replacement, match_upstream)
    if key not in _CLASSES:
        bases: tuple[type, ...] = (replacement.methods, _upstream(replacement))
        if own is not bases[1]:
            bases = (own, _make_class(replacement.name, bases, {}))
        attributes = {"match_upstream": match_upstream, "stands_for": own}
        _CLASSES[key] = _make_class(own.__name__, (_memory(own), _Pickled, *bases), attributes)
    return _CLASSES[key]


def _memory(own: type) -> type:
    """Return an empty class whose objects take the same memory as those of a class.

    Python gives an object another class only if the first bases of both add the same fields to the
    same class.
    """
    first = own
    while (below := first.__base__) is not None and _fields(below) == _fields(first):
        first = below
    return type("Memory", (first.__base__ or object,), {"__module__": __name__})


def _fields(of: type) -> tuple[int, ...]:
    return (of.__basicsize__, of.__itemsize__, of.__dictoffset__, of.__weakrefoffset__)


def _upstream(replacement: Replacement) -> type:
    upstream = replacement.upstream()
    if upstream is None:
        raise TypeError(f"accelerate: {replacement.module}.{replacement.name} is not imported")
    return upstream


def _make_class(name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> type:
    made: type = type(bases[-1])(
        f"Accelerated{name}", bases, {"__module__": __name__, **attributes}
    )
    return made


def _new(own: type[nn.Module], match_upstream: bool, *args: Any) -> nn.Module:
    """Make an empty module of the class that stands in for a class, as unpickling needs it."""
    replacement, reason = find(own)
    replacement = replacement or plain_replacement(own)
    if replacement is None:
        raise TypeError(f"accelerate: the pickled {own.__name__} cannot be accelerated: {reason}")
    made = standing_in(own, replacement, match_upstream)
    result: nn.Module = made.__new__(made, *args)
    return result
