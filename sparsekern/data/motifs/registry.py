"""The motif domains by their names."""

from __future__ import annotations

from typing import Any

from .digit_circle import TINY, DigitCircle
from .domain import MotifDomain
from .latex_formulas import LatexFormulas
from .spoken_digits import SpokenDigits


def motif_domain(name: str, **options: Any) -> MotifDomain:
    """Make a domain by its name.

    * ``"tiny"``: 28 x 28 images with four kinds of digits on a circle, for minutes on one core;
    * ``"digit-circle"``: 100 x 100 images with ten kinds of digits on a circle;
    * ``"latex"``: 120 x 360 images of formulas;
    * ``"audio"``: spectrograms of 15 s with spoken digits.

    Args:
        name: one of these.
        options: parameters of :class:`~.digit_circle.DigitCircle` (the first two),
            :class:`~.latex_formulas.LatexFormulas`, :class:`~.spoken_digits.SpokenDigits`.

    Raises:
        ValueError: there is no such domain, or a parameter is not possible.
        TypeError: there is no such parameter.

    Example:
        >>> domain = motif_domain("tiny")
        >>> inputs, labels, motifs = domain.batch(seed=0, first=0, count=32)
        >>> inputs.shape, labels.shape, motifs.shape
        (torch.Size([32, 1, 28, 28]), torch.Size([32, 4]), torch.Size([32, 4, 5]))
        >>> [domain.label_symbols[number] for number in labels[3].tolist()]
        ['0', '4', '7', '1']
    """
    makers: dict[str, Any] = {
        "tiny": lambda **changes: DigitCircle(**{**TINY, **changes}),
        "digit-circle": DigitCircle,
        "latex": LatexFormulas,
        "audio": SpokenDigits,
    }
    if name not in makers:
        raise ValueError(f"motif_domain: name must be one of {', '.join(makers)}, got {name!r}")
    domain: MotifDomain = makers[name](**options)
    return domain
