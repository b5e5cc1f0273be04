"""The command ``sparsekern convert``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_convert(commands: Any) -> None:
    """Add ``convert`` to the commands of a parser."""
    from ..integrations.checkpoints import WRITTEN

    parser = commands.add_parser(
        "convert",
        help="a sparse autoencoder's checkpoint in another library's format",
        description="Read a checkpoint of any known format, or a run of train sae, and write it in "
        "another format; weights stay bit for bit, unless --fold changes them.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="folder (or file) of the checkpoint, or run")
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
    from ..training import checkpoints

    if (Path(options.source) / checkpoints.FACTS).is_file():
        return _convert_run(options)
    checkpoint = read(options.source, None if options.k is None else TopK(options.k))
    if options.fold:
        checkpoint = folded(checkpoint, options.source, options.fold)
    write(checkpoint, options.target, options.to)
    _say(options, checkpoint.features, checkpoint.latents, checkpoint.activation)
    return 0


def _convert_run(options: argparse.Namespace) -> int:
    """Write the model of a run, which takes activations as they are in the files."""
    from ..studies.sae import load_run

    if options.k is not None:
        raise ValueError(f"convert: --k must be left out for a run, which says it, got {options.k}")
    trained = load_run(options.source)
    if trained.config.normalize == "token":
        raise ValueError(
            "convert: the run must be one of activations as they are (no format says that rows "
            f"are normalised first), got --normalize token in {options.source}"
        )
    model = trained.model
    if "norms" in options.fold:
        model.fold_norms()
    if "bias" in options.fold:
        model.fold_bias()
    model.save_pretrained(options.target, options.to)
    _say(options, len(model.decoder_bias), len(model.encoder_bias), model.activation)
    return 0


def _say(options: argparse.Namespace, features: int, latents: int, activation: Any) -> None:
    name = type(activation).__name__
    sys.stdout.write(
        f"{options.target}: {latents} latents of {features} features with {name}, as {options.to}\n"
    )
