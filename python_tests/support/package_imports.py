"""Which module of a package imports which: statements, wherever they stand, and imports by name.

Any string that is the full name of a module of the package counts as an import of it, since there
are many functions that a name can be handed to.
"""

from __future__ import annotations

import ast
import pathlib
from dataclasses import dataclass, field

BY_NAME = {"import_module", "__import__", "resolve_name", "run_module"}


@dataclass
class Package:
    """The modules of a package by their dotted names, what each imports of the others, and the
    imports by a name that only the call knows, as `module:line`."""

    imports: dict[str, set[str]] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)

    def circles(self) -> list[list[str]]:
        """Modules each of which imports, by way of others, itself."""
        reached = {module: self._reached(module) for module in self.imports}
        circles = {
            frozenset(other for other in found if module in reached[other])
            for module, found in reached.items()
            if module in found
        }
        return sorted(sorted(circle) for circle in circles)

    def _reached(self, module: str) -> set[str]:
        reached: set[str] = set()
        open_ends = [module]
        while open_ends:
            for other in self.imports[open_ends.pop()] - reached:
                reached.add(other)
                open_ends.append(other)
        return reached


def read_package(folder: pathlib.Path) -> Package:
    """Read all modules of the package in a folder."""
    paths = {_dotted(path, folder): path for path in sorted(folder.rglob("*.py"))}
    package = Package()
    for module, path in paths.items():
        inside = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names: set[str] = set()
        nodes = list(ast.walk(ast.parse(path.read_text())))
        calls = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = node.value.partition(":")[0]  # as in resolve_name("module:attribute")
                names |= {named} & paths.keys() - {folder.name}
            elif _hands_on(node, calls):
                package.computed.append(f"{module}:{node.lineno}")
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = _base(inside, node)
                names |= {f"{base}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Call) and _called(node) in BY_NAME:
                name = _literal(node)
                if name is None:
                    package.computed.append(f"{module}:{node.lineno}")
                elif _absolute(name, inside) in paths:  # else a compiled module, or another's
                    names.add(_absolute(name, inside))
        known = {_longest(name, paths) for name in names} - {None, module}
        package.imports[module] = {name for name in known if name is not None}
    return package


def _dotted(path: pathlib.Path, folder: pathlib.Path) -> str:
    parts = [folder.name, *path.relative_to(folder).with_suffix("").parts]
    return ".".join(parts).removesuffix(".__init__")


def _base(inside: str, node: ast.ImportFrom) -> str:
    return _absolute("." * node.level + (node.module or ""), inside).rstrip(".")


def _called(node: ast.Call) -> str:
    return _name(node.func)


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _hands_on(node: ast.AST, calls: set[int]) -> bool:
    """Whether a function that imports by name gets another name, so that its calls are not seen."""
    if isinstance(node, ast.ImportFrom):
        return any(alias.name in BY_NAME and alias.asname for alias in node.names)
    return _name(node) in BY_NAME and id(node) not in calls


def _literal(node: ast.Call) -> str | None:
    first = node.args[0] if node.args else None
    return first.value if isinstance(first, ast.Constant) else None


def _absolute(name: str, inside: str) -> str:
    dots = len(name) - len(name.lstrip("."))
    if not dots:
        return name
    parts = inside.split(".")
    return ".".join([*parts[: len(parts) - dots + 1], name[dots:]])


def _longest(name: str, paths: dict[str, pathlib.Path]) -> str | None:
    """The module that an imported name is, or is in."""
    return name if name in paths else _longest(name.rpartition(".")[0], paths) if name else None
