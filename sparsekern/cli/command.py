"""The command ``sparsekern``.

It can ``train`` and ``eval`` models, ``reproduce`` studies, make ``data``, ``convert`` checkpoints,
``bench`` this machine, and give ``info`` on all this.

Exit codes: 0 done, 2 bad input (one line on stderr says what), 128 + signal when interrupted, 141
when nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import NoReturn, TextIO

_WIDTH = 120  # columns of what `info` prints
_BROKEN_PIPE = 128 + 13  # what a shell gives a process that SIGPIPE ended


class _Parser(argparse.ArgumentParser):
    """Reports a wrong flag in the same single line as any other bad input."""

    def error(self, message: str) -> NoReturn:
        from ..studies.processes import should_report

        command = self.prog.removeprefix("sparsekern").strip()
        self.exit(2, _error_line(command, message) if should_report() else None)


def _error_line(command: str, message: str) -> str:
    """Put a message into the one line that reports an error."""
    parts = ["sparsekern: error", *([command] if command else []), " ".join(message.split())]
    return ": ".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; ``arguments`` defaults to the process's."""
    _open_closed_streams()
    try:
        try:
            return _run(arguments)
        finally:
            # Here, where it can be caught: what is left is written when the interpreter ends.
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
    except BrokenPipeError:
        # Whoever read the output has seen enough, as in `sparsekern info | head`.
        for stream in (sys.stdout, sys.stderr):
            _drop_unwritten(stream)
        return _BROKEN_PIPE


def _open_closed_streams() -> None:
    """Open a standard stream that the process was started without, as services do.

    It takes everything and has nothing: its number would else become that of the next file opened,
    with what libraries print in it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


def _run(arguments: Sequence[str] | None) -> int:
    """Run the command that the arguments name."""
    from ..studies.processes import FirstProcessLostError, should_report
    from ..studies.runs import EXPECTED_ERRORS

    options, unknown = _parser().parse_known_args(arguments)
    if unknown:
        if should_report():
            message = f"unknown arguments: {' '.join(unknown)}"
            sys.stderr.write(_error_line(options.command, message))
        return 2
    try:
        code: int = options.function(options)
        return code
    except BrokenPipeError:
        raise
    except EXPECTED_ERRORS as error:
        # Of several processes, the first says it, for all.
        if isinstance(error, FirstProcessLostError) or should_report():
            message = _message_with_flags(error, options.command)
            sys.stderr.write(_error_line(options.command, message))
        return 2
    except KeyboardInterrupt as stop:
        notes = "".join(f"; {note}" for note in getattr(stop, "__notes__", ()))
        sys.stderr.write(f"sparsekern: {options.command}: interrupted{notes}\n")
        return 130


def _message_with_flags(error: BaseException, command: str) -> str:
    """Say what an error says, with the flag that was typed where it names a field of a config."""
    from ..studies.configs import SettingError

    if not isinstance(error, SettingError):
        return str(error)
    if command.startswith("reproduce") and error.setting != "data":
        return f"--set {error.setting} {error.rule}"
    return f"--{error.setting.replace('_', '-')} {error.rule}"


def _drop_unwritten(stream: TextIO | None) -> None:
    """Send what a stream still holds nowhere, if nobody reads it any more."""
    if stream is None:
        return
    try:
        stream.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _parser() -> argparse.ArgumentParser:
    """Make the parser of all commands."""
    from .. import __version__
    from .bench import add_bench
    from .convert import add_convert
    from .data import add_data
    from .reproduce import add_reproduce
    from .train import add_eval, add_train

    parser = _Parser(
        prog="sparsekern",
        description="Kernels for networks with extremely sparse activations, and their studies.",
    )
    parser.add_argument("--version", action="version", version=f"sparsekern {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    add_train(commands)
    add_eval(commands)
    add_reproduce(commands)
    add_data(commands)
    add_convert(commands)
    add_bench(commands)

    info = commands.add_parser(
        "info",
        help="versions, instruction sets, GPU, and which implementation serves each operation",
    )
    info.set_defaults(function=_info, command="info")
    return parser


def _info(options: argparse.Namespace) -> int:
    """Print what there is: versions, instruction sets, and what serves each operation."""
    from .. import describe

    facts = describe()
    lines = [f"python {facts['python']} on {facts['platform']}"]
    lines += [f"{name} {version}" for name, version in facts["versions"].items()]
    lines += [f"threads: {facts['threads']}", f"GPU: {facts['gpu']}"]
    lines.append(f"forced backend: {facts['forced_backend']}")
    for module, built in facts["modules"].items():
        text = ", ".join(f"{name}: {value}" for name, value in built.items())
        lines.append(f"sparsekern.{module}: {text}")
    sys.stdout.write("\n".join(map(_wrap, lines)) + "\n\n")
    sys.stdout.write("\n".join(_implementation_lines(facts["implementations"])) + "\n")
    return 0


def _wrap(text: str, indent: str = "") -> str:
    """Wrap a line of what ``info`` prints."""
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _implementation_lines(rows: list[dict[str, str]]) -> list[str]:
    """List what serves which operations; those with the same choice and reasons stand together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        others = row["others"].replace(f"{row['operation']} has no", "no")
        choice = (row["device"], row["backend"], row["reason"], others)
        groups.setdefault(choice, []).append(row["operation"])
    lines = []
    for (device, backend, reason, others), operations in groups.items():
        lines.append(_wrap(f"{device}: {backend} ({reason})"))
        lines.append(_wrap(f"serves {', '.join(operations)}", "  "))
        lines.append(_wrap(f"others: {others}", "  "))
    return lines
