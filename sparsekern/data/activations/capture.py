"""Activations captured from a torch module while it runs, without padding, with their origins."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DataError
from .activation_file import DOCUMENTS, POSITIONS, TOKEN_IDS
from .writing import STORED, check_new, with_progress, write_pieces

ATTENTION_MASK, INPUT_IDS, DECODER = "attention_mask", "input_ids", "decoder_"
# Names of masks that are true, or -inf, where padding is: torch's, fairseq's.
PADDING_MASKS = (
    "src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask", "padding_mask",
    "encoder_padding_mask",
)  # fmt: skip

# Layers of torch whose `batch_first` says where their outputs have the sequences.
CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
SEQUENCE_LAYERS = (
    nn.RNNBase, nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoder,
    nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
)  # fmt: skip

Mask = str | Callable[[Any], Tensor] | None


def capture(
    module: nn.Module,
    hook_point: str,
    inputs: Iterable[Any],
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    mask: Mask = ATTENTION_MASK,
    skip_first: int = 0,
    skip_tokens: Sequence[int] = (),
) -> int:
    """Run a module and write what one of its submodules returns.

    The module runs without gradients and in evaluation mode; its mode is restored. Padding is left
    out where the inputs say what it is; tokens like [CLS], [SEP] and BOS are written, unless
    ``skip_first`` or ``skip_tokens`` leave them out. Their activations are often of another size
    than all others.

    Beside the rows the file holds, for each, the number of its sequence in the order of the inputs
    (``documents``), its position among the sequence's real tokens (``positions``) and, where the
    inputs have them, its token (``token_ids``); see :meth:`ActivationStore.origins`.

    When an error ends the capture, the rows before it are kept in ``<name>.partial.h5``, which the
    error names.

    Args:
        module: runs on the device of its parameters; the inputs are moved there.
        hook_point: name of the submodule, as in ``module.named_modules()``; ``""`` for the module
            itself. It returns ``[batch, positions, D]``, or ``[..., D]`` where no positions are
            left out; or a tuple whose first element is that, or an object with
            ``last_hidden_state``. Of torch's layers with ``batch_first=False``, and of what lies in
            them, ``[positions, batch, D]``; of torch's convolutions and batch normalisations
            ``[batch, D, ...]``.
        inputs: what the module is called with: a tensor, a tuple of positional or a mapping of
            keyword arguments, such as what a tokenizer of transformers returns.
        path: see :func:`write_activations`.
        chunk_rows: see :func:`write_activations`.
        dtype: stored; by default that of the submodule's output, float32 for float64.
        mask: which positions are written. The name of an argument ``[batch, positions]`` of 0 and
            1; or a function of an input that returns such a mask; or None to write all positions,
            padding too. By default ``"attention_mask"``, and where the inputs have none what is
            not marked in ``src_key_padding_mask`` or the like, and without one all positions. Of
            an encoder-decoder model, what does not lie in ``encoder`` goes by its
            ``decoder_attention_mask`` and ``decoder_input_ids``.
        skip_first: leaves out the first so many real tokens of each sequence.
        skip_tokens: leaves out these tokens, such as ``tokenizer.all_special_ids``.

    Returns:
        The number of rows: the leading dimensions are flattened.

    Raises:
        ValueError: there is no such submodule; ``skip_first`` is negative.
        DataError: the submodule was not called or returned something else; a mask does not fit, or
            positions or tokens are to be left out of outputs that have none; as
            :func:`write_activations`.
    """
    names = [name for name, _ in module.named_modules()]
    if hook_point not in names:
        names = names[1:]  # the first is the module itself
        near = difflib.get_close_matches(hook_point, names, 5, 0.4) or names[:5]
        raise ValueError(
            f"capture: hook_point must name a submodule, got {hook_point!r}; there are "
            f"{', '.join(map(repr, near))}{', ...' if len(names) > len(near) else ''}"
        )
    if not (mask is None or isinstance(mask, str) or callable(mask)):
        raise ValueError(f"capture: mask must be a name, a function or None, got {mask!r}")
    if not isinstance(skip_first, int) or skip_first < 0:
        raise ValueError(f"capture: skip_first must be an integer of at least 0, got {skip_first}")
    check_new(path)
    choice = _RowChoice(hook_point, mask, skip_first, torch.tensor(list(skip_tokens)))
    outputs = _capture_rows(module, hook_point, inputs, choice)
    outputs = with_progress(outputs, "capturing", lambda piece: len(piece[0]))
    with closing(outputs) as pieces:
        return write_pieces(
            path, pieces, dtype=dtype, default=_computed_dtype, chunk_rows=chunk_rows,
            keep_partial=True,
        )  # fmt: skip


def _computed_dtype(given: torch.dtype) -> torch.dtype:
    return given if given in STORED else torch.float32


Piece = tuple[Tensor, dict[str, Tensor]]


def _capture_rows(
    module: nn.Module, hook_point: str, inputs: Iterable[Any], choice: _RowChoice
) -> Generator[Piece]:
    """Yield what the submodule returns for each input, [rows, D], and where the rows come from."""
    outputs: list[Tensor] = []
    arranged = _batch_first_layout(module, hook_point)

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        # A copy: the module may go on in place.
        outputs.append(arranged(_tensor_of(output, hook_point)).detach().clone())

    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    modes = [(layer, layer.training) for layer in module.modules()]
    handle = module.get_submodule(hook_point).register_forward_hook(keep)
    try:
        module.eval()
        for given in inputs:
            with torch.no_grad():
                _call(module, given, device)
            if not outputs:
                raise DataError(f"capture: {hook_point!r} was not called by the module's forward")
            arguments = _own_arguments(_named_arguments(module, given), hook_point)
            sequences = 0
            for output in outputs:
                rows, columns, sequences = choice.rows_of(output, given, arguments)
                yield rows, columns
            choice.documents += sequences
            outputs.clear()
    finally:
        handle.remove()
        for part, mode in modes:
            part.training = mode


def _tensor_of(output: Any, hook_point: str) -> Tensor:
    """Take the tensor [..., D] out of what a submodule returned."""
    got = type(output).__name__
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    elif not isinstance(output, Tensor):
        output = getattr(output, "last_hidden_state", None)
    if not isinstance(output, Tensor) or output.dim() == 0:
        got = str(list(output.shape)) if isinstance(output, Tensor) else got
        raise DataError(f"capture: {hook_point!r} must return a tensor [..., D], got {got}")
    if output.is_nested or output.layout != torch.strided:
        raise DataError(
            f"capture: {hook_point!r} must return a dense tensor, got a nested or sparse one "
            f"(torch's TransformerEncoder has enable_nested_tensor=False)"
        )
    return output


def _batch_first_layout(module: nn.Module, hook_point: str) -> Callable[[Tensor], Tensor]:
    """Choose the function that arranges a submodule's output as [batch, positions, D].

    Torch's own layers say how their outputs are laid out; all others are taken as they are.
    """
    names = hook_point.split(".") if hook_point else []
    around = [module.get_submodule(".".join(names[:n])) for n in range(len(names) + 1)]
    layer = around[-1]
    if isinstance(layer, CONVOLUTIONS):
        channels = -1 - len(layer.kernel_size)  # also of an input without a batch
        return lambda output: output.movedim(channels, -1)
    if isinstance(layer, BATCH_NORMS):
        return lambda output: output.movedim(1, -1)
    if any(isinstance(layer, SEQUENCE_LAYERS) and not _batch_first(layer) for layer in around):
        return lambda output: output.transpose(0, 1) if output.dim() == 3 else output
    return lambda output: output


def _batch_first(layer: nn.Module) -> bool:
    """Tell whether the batch comes first in the outputs of one of SEQUENCE_LAYERS.

    The layer says so itself, or its attention or its first layer does.
    """
    for name in ("layers", "self_attn"):
        inner = getattr(layer, name, None)
        if isinstance(inner, nn.ModuleList):
            return len(inner) == 0 or _batch_first(inner[0])
        if isinstance(inner, nn.Module):
            return _batch_first(inner)
    return bool(getattr(layer, "batch_first", True))


def _call(module: nn.Module, given: Any, device: torch.device) -> None:
    def moved(value: Any) -> Any:
        """Call the module with one of the inputs, moved to its device."""
        value = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(given, Mapping):
        module(**{name: moved(value) for name, value in given.items()})
    elif isinstance(given, (tuple, list)):
        module(*map(moved, given))
    else:
        module(moved(given))


def _named_arguments(module: nn.Module, given: Any) -> dict[str, Any]:
    """Name the arguments of a call."""
    if isinstance(given, Mapping):
        return dict(given)
    positional = given if isinstance(given, (tuple, list)) else (given,)
    try:
        return dict(inspect.signature(module.forward).bind_partial(*positional).arguments)
    except (TypeError, ValueError):  # no signature that could be read
        return {}


def _own_arguments(arguments: dict[str, Any], hook_point: str) -> dict[str, Any]:
    """Leave out the arguments of the other half of an encoder and decoder.

    What does not lie in the encoder has the decoder's tokens and mask, here without their prefix.
    """
    decoder = {DECODER + name: name for name in (INPUT_IDS, ATTENTION_MASK, "inputs_embeds")}
    in_encoder = "encoder" in hook_point.split(".")
    if "tgt" in arguments:  # torch's
        foreign = "tgt_key_padding_mask" if in_encoder else "src_key_padding_mask"
        return {name: value for name, value in arguments.items() if name != foreign}
    if in_encoder or not decoder.keys() & arguments.keys():
        return arguments
    own = {name: value for name, value in arguments.items() if name not in decoder.values()}
    return own | {decoder[name]: value for name, value in own.items() if name in decoder}


def _attention_mask(arguments: Mapping[str, Any]) -> tuple[str, Any]:
    """Find a mask among the arguments; return its name and the mask, not 0 where no padding is.

    The mask is None where the arguments hold none.
    """
    mask = arguments.get(ATTENTION_MASK)
    if mask is None:
        for name in PADDING_MASKS:
            padding = arguments.get(name)
            if isinstance(padding, (Tensor, np.ndarray)):
                return name, padding == 0
    return ATTENTION_MASK, mask


def _count_sequences(arguments: Mapping[str, Any], unknown: int) -> int:
    """Count the sequences in the inputs, where they have tokens; else return ``unknown``."""
    tokens = _token_ids(arguments)
    return unknown if tokens is None or tokens.dim() != 2 else len(tokens)


def _token_ids(arguments: Mapping[str, Any]) -> Tensor | None:
    """Find the tokens in the inputs: what is called so, or the only argument if it is integer."""
    given = arguments.get(INPUT_IDS)
    if given is None and len(arguments) == 1:
        given = next(iter(arguments.values()))
    if not isinstance(given, (Tensor, np.ndarray)):
        return None
    tokens = torch.as_tensor(given).cpu()
    return tokens if tokens.dtype in (torch.int64, torch.int32) else None


class _RowChoice:
    """Which rows of an output are written, and where each comes from."""

    def __init__(self, hook_point: str, mask: Mask, skip_first: int, skip_tokens: Tensor) -> None:
        self.hook_point, self.mask = hook_point, mask
        self.skip_first, self.skip_tokens = skip_first, skip_tokens
        self.documents = 0  # sequences in the inputs before
        self._with_tokens: bool | None = None

    def rows_of(
        self, output: Tensor, given: Any, arguments: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor], int]:
        """Choose rows of an output [..., D].

        Returns:
            The rows [n, D], their columns [n], and the number of sequences in the output.
        """
        lead = output.shape[:-1]
        rows = output.reshape(-1, output.shape[-1])
        real = self._mask_of_output(_attention_mask(arguments)[1], lead)
        chosen = self._write_mask(given, arguments, lead)
        tokens = self._tokens(arguments, lead)
        known = next((layout for layout in (chosen, real, tokens) if layout is not None), None)
        layout = lead if known is None else known.shape
        has_positions = known is not None or len(lead) > 1
        if len(layout) > 1:
            shape = (layout[0], len(rows) // max(1, layout[0]))
        else:  # one of a mask or of tokens is a sequence, one of the output alone a batch
            shape = (1, len(rows)) if has_positions else (len(rows), 1)
        unclear = known is None and (
            len(lead) != 2 or lead[0] != _count_sequences(arguments, lead[0])
        )
        if self.skip_first and (not has_positions or unclear):
            raise DataError(
                f"capture: skip_first needs outputs [batch, positions, D], {self.hook_point!r} "
                f"returned {list(output.shape)}"
            )
        real = real if real is not None else chosen
        present = torch.ones(shape, dtype=torch.bool) if real is None else real.reshape(shape)
        # Real tokens up to each position, itself included.
        counted = present.long().cumsum(1)
        keep = torch.ones(shape, dtype=torch.bool) if chosen is None else chosen.reshape(shape)
        if self.skip_first:
            keep = keep & (counted > self.skip_first)
        columns = self._columns(shape, counted, tokens)
        if len(self.skip_tokens):
            if tokens is None:
                raise DataError(
                    f"capture: skip_tokens needs {INPUT_IDS!r} for each row of "
                    f"{self.hook_point!r} {list(output.shape)} among the inputs"
                )
            keep = keep & ~torch.isin(tokens.reshape(shape), self.skip_tokens)
        flat = keep.reshape(-1)
        if not flat.all():
            rows = rows[flat.to(rows.device)]
        return rows, {name: value.reshape(-1)[flat] for name, value in columns.items()}, shape[0]

    def _columns(
        self, shape: tuple[int, int], counted: Tensor, tokens: Tensor | None
    ) -> dict[str, Tensor]:
        documents = self.documents + torch.arange(shape[0])
        columns = {
            DOCUMENTS: documents[:, None].expand(shape),
            POSITIONS: (counted - 1).int(),
        }
        # All batches have the same columns: the first one decides.
        self._with_tokens = tokens is not None if self._with_tokens is None else self._with_tokens
        if self._with_tokens:
            ids = torch.full(shape, -1) if tokens is None else tokens.reshape(shape)
            columns[TOKEN_IDS] = ids.int()
        return columns

    def _write_mask(
        self, given: Any, arguments: Mapping[str, Any], lead: torch.Size
    ) -> Tensor | None:
        """Make the mask of the positions to write; None for all."""
        if self.mask is None:
            return None
        mask: Any
        if callable(self.mask):
            name, mask = "mask", self.mask(given)
        else:
            name, mask = self.mask, arguments.get(self.mask)
            if name == ATTENTION_MASK:
                name, mask = _attention_mask(arguments)
            elif mask is None:
                raise DataError(
                    f"capture: the inputs have no {name!r}; they have "
                    f"{', '.join(map(repr, arguments)) or 'no names'}"
                )
        if mask is None:
            return None
        fitted = self._mask_of_output(mask, lead)
        if fitted is None:
            got = list(getattr(mask, "shape", []))
            raise DataError(
                f"capture: {name} {got} does not say which rows of {self.hook_point!r} "
                f"{[*lead, 'D']} are padding (mask=None writes all, a function of the input may "
                f"return another mask)"
            )
        values = torch.as_tensor(mask)
        if values.dtype != torch.bool and not ((values == 0) | (values == 1)).all():
            raise DataError(f"capture: {name} must hold 0 and 1, got {values.max()}")
        return fitted

    @staticmethod
    def _mask_of_output(given: Any, lead: torch.Size) -> Tensor | None:
        """Convert a mask of an output [*lead, D] to bool on the CPU; None if it does not fit."""
        if not isinstance(given, (Tensor, np.ndarray, list)):
            return None
        mask = torch.as_tensor(given).cpu()
        flattened = len(lead) == 1 and mask.numel() == lead.numel() and mask.dim() <= 2
        return mask != 0 if mask.shape == lead or flattened else None

    def _tokens(self, arguments: Mapping[str, Any], lead: torch.Size) -> Tensor | None:
        """Find the tokens of the rows, where the inputs have them."""
        tokens = _token_ids(arguments)
        if tokens is None:
            return None
        fits = tokens.shape == lead or (len(lead) == 1 and tokens.numel() == lead.numel())
        return tokens if fits else None
