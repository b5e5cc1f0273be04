"""The command ``sparsekern convert``."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_convert(commands: Any) -> None:
    """Add ``convert`` to the commands of a parser."""
    from ..integrations.checkpoints import WRITTEN

    parser = commands.add_parser(
        "convert",
        help="a sparse autoencoder's checkpoint in another library's format",
        description="Read a checkpoint of any known format, and write it in another; weights stay "
        "bit for bit, unless --fold changes them.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="folder (or file) of the checkpoint")
    parser.add_argument("target", metavar="DST", help="folder to write, new or empty")
    parser.add_argument("--to", choices=WRITTEN, required=True, help="format to write")
    parser.add_argument(
        "--k",
        type=int,
        help="active latents, for formats that do not say it (qwen_scope, overcomplete)",
    )
    parser.add_argument(
        "--fold",
        action="append",
        choices=("norms", "bias"),
        default=[],
        help="first move into the weights what the format lacks: norms of the dictionary's rows "
        "(scale_scores), or the bias that is subtracted (subtract_bias); may be given twice; codes "
        "and reconstructions stay, up to rounding",
    )
    parser.set_defaults(function=_convert, command="convert")


def _convert(options: argparse.Namespace) -> int:
    """Read one format and write the other."""
    from .. import TopK
    from ..integrations.checkpoints import read, write
    from ..sae.model import folded

    checkpoint = read(options.source, None if options.k is None else TopK(options.k))
    if options.fold:
        checkpoint = folded(checkpoint, options.source, options.fold)
    write(checkpoint, options.target, options.to)
    layer = type(checkpoint.activation).__name__
    sys.stdout.write(
        f"{options.target}: {checkpoint.latents} latents of {checkpoint.features} features with "
        f"{layer}, as {options.to}\n"
    )
    return 0
