"""The command ``sparsekern``: ``train`` a study's model, make ``data``, ``info`` on this machine.

Exit codes: 0 done, 2 bad input (one line on stderr says what), 128 + signal when interrupted.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, replace
from pathlib import Path
from typing import Any, NoReturn

_WIDTH = 120  # columns of what `info` prints


class _Parser(argparse.ArgumentParser):
    """Reports a wrong flag in the same single line as any other bad input."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("sparsekern").strip()
        self.exit(2, _error_line(command, message))


def _error_line(command: str, message: str) -> str:
    parts = ["sparsekern: error", *([command] if command else []), " ".join(message.split())]
    return ": ".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; ``arguments`` defaults to the process's."""
    from . import BackendUnavailableError
    from .training import CheckpointError, RunError, TrainingError

    options, unknown = _parser().parse_known_args(arguments)
    if unknown:
        sys.stderr.write(_error_line(options.command, f"unknown arguments: {' '.join(unknown)}"))
        return 2
    # ValueError: bad values and data files. OSError: a full disk, for one.
    expected = (
        BackendUnavailableError, CheckpointError, ModuleNotFoundError, OSError, RunError,
        TrainingError, ValueError,
    )  # fmt: skip
    try:
        return options.function(options)
    except expected as error:
        sys.stderr.write(_error_line(options.command, str(error)))
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"sparsekern: {options.command}: interrupted\n")
        return 130


def _parser() -> argparse.ArgumentParser:
    from . import __version__
    from .cli_data import add_data

    parser = _Parser(
        prog="sparsekern",
        description="Kernels for networks with extremely sparse activations, and their studies.",
    )
    parser.add_argument("--version", action="version", version=f"sparsekern {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    training = commands.add_parser("train", help="train the model of a study")
    studies = training.add_subparsers(title="studies", metavar="STUDY", required=True)
    _add_train_vae_sae(studies)

    add_data(commands)

    info = commands.add_parser(
        "info",
        help="versions, instruction sets, GPU, and which implementation serves each operation",
    )
    info.set_defaults(function=_info, command="info")
    return parser


def _add_train_vae_sae(studies: Any) -> None:
    from .studies import vae_sae

    parser = studies.add_parser(
        "vae-sae",
        help="VAE with a top-k sparse layer on dSprites",
        description="Trains the VAE-SAE hybrid on dSprites while k falls from 500 to 50. Without "
        "arguments it renders a dSprites-compatible subset and takes a few minutes on two cores.",
        # An absent flag is absent, so that --resume can tell it from one given with its default.
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--out", metavar="RUN", help="folder of the new run; by default runs/vae-sae-<date>-<time>"
    )
    place.add_argument("--resume", metavar="RUN", help="folder of an interrupted run to go on with")
    kinds = typing.get_type_hints(vae_sae.VAESAEConfig)
    for item in vae_sae.flags():
        _add_flag(parser, item, kinds[item.name])
    parser.set_defaults(function=_train_vae_sae, command="train vae-sae")


def _add_flag(parser: argparse.ArgumentParser, item: Field, kind: Any) -> None:
    """Makes a flag of a config field: its name, type, default and documentation."""
    flag = "--" + item.name.replace("_", "-")
    text = item.metadata["help"]
    if item.default is not MISSING and item.default is not None:
        text += f" (default: {item.default})"
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        return
    optional = [k for k in typing.get_args(kind) if k is not type(None)]
    parser.add_argument(
        flag,
        type=optional[0] if optional else kind,
        choices=item.metadata.get("choices"),
        metavar=item.metadata.get("metavar"),
        help=text,
    )


def _train_vae_sae(options: argparse.Namespace) -> int:
    from .studies import vae_sae

    given = {
        item.name: getattr(options, item.name)
        for item in vae_sae.flags()
        if hasattr(options, item.name)
    }
    resume = getattr(options, "resume", None)
    if resume is None:
        config = vae_sae.VAESAEConfig(**given)
        out = getattr(options, "out", None) or time.strftime("runs/vae-sae-%Y%m%d-%H%M%S")
    else:
        config, out = _resumed_config(vae_sae.saved_config(resume), given, resume), resume
    report = vae_sae.run(config, out, resume=resume is not None)
    # What a shell gives a process that the signal ended.
    signal = report.outcome.signal
    status = 0 if signal is None else 128 + signal
    if report.results is None:
        sys.stdout.write(
            f"interrupted after step {report.outcome.step}; everything is saved. Go on with:\n"
            f"  sparsekern train vae-sae --resume {out}\n"
        )
        return status
    files = ("history.png", "reconstructions.png", "results.json", "metrics.jsonl")
    sys.stdout.write(vae_sae.table(report.results, config) + "\n")
    sys.stdout.write(f"run folder {Path(out)}: {', '.join(files)}\n")
    return status


def _resumed_config(saved: Any, given: dict[str, Any], folder: str) -> Any:
    """The saved config with the given free fields; any other difference is an error."""
    fixed = saved.identity()
    for name, value in given.items():
        if name in fixed and fixed[name] != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{folder} was started with {flag} {fixed[name]}, it cannot be resumed with {value}"
            )
    return replace(saved, **given)


def _info(options: argparse.Namespace) -> int:
    from . import describe

    facts = describe()
    lines = [f"python {facts['python']} on {facts['platform']}"]
    lines += [f"{name} {version}" for name, version in facts["versions"].items()]
    lines += [f"threads: {facts['threads']}", f"GPU: {facts['gpu']}"]
    lines.append(f"forced backend: {facts['forced_backend']}")
    for module, built in facts["modules"].items():
        text = ", ".join(f"{name}: {value}" for name, value in built.items())
        lines.append(f"sparsekern.{module}: {text}")
    sys.stdout.write("\n".join(map(_wrapped, lines)) + "\n\n")
    sys.stdout.write("\n".join(_implementation_lines(facts["implementations"])) + "\n")
    return 0


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _implementation_lines(rows: list[dict[str, str]]) -> list[str]:
    """What serves which operations; those with the same choice and reasons stand together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        choice = (row["device"], row["backend"], row["reason"], row["others"])
        groups.setdefault(choice, []).append(row["operation"])
    lines = []
    for (device, backend, reason, others), operations in groups.items():
        lines.append(_wrapped(f"{device}: {backend} ({reason})"))
        lines.append(_wrapped(f"serves {', '.join(operations)}", "  "))
        lines.append(_wrapped(f"others: {others}", "  "))
    return lines
