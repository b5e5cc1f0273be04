"""What is known of dead units: the rates of the study, and what cured them in our reproduction."""

from __future__ import annotations

DEAD_UNITS = {
    ("topk", "dsprites"): (34.4, 0.9),
    ("topk", "shapes3d"): (62.7, 1.3),
    ("l1", "dsprites"): (41.7, 4.4),
    ("l1", "shapes3d"): (90.6, 0.5),
}
"""By sparsifier and data set: percent, mean and spread, of the abstract of arXiv 2603.18056."""

CURE = (
    "To keep units alive, add --standardize: in 'sparsekern reproduce vae-sae --arms study cures'\n"
    "0.1 % of the units were never active with it, 36.1 % without, and the loss was lower."
)
"""Of bench/results/vae-sae-small: Top-k on dSprites, means of three seeds."""
