"""What a report of a reproduction computes and says: statistics with known answers, sentences."""

import pytest
from made_up_cells import UNITS, asked, content, grid

from sparsekern.studies.vae_sae.grid import Cell
from sparsekern.studies.vae_sae.report.conclusions import conclusions
from sparsekern.studies.vae_sae.report.conclusions.limits import changed_settings, limits
from sparsekern.studies.vae_sae.report.measurements import (
    Measured,
    Returned,
    returned,
    threshold_range,
)
from sparsekern.studies.vae_sae.report.raw_results import protocol_rows
from sparsekern.studies.vae_sae.report.statistics import Spread, Verdict, spread, welch

# -- statistics ------------------------------------------------------------------------------------


def test_returned_units_are_counted_one_by_one():
    made = content(Cell("dsprites", "topk", 0))
    made["results"]["schedule"]["units"]["frequency"] = [0, 0, 0, 0.1] + [0.1] * 16
    made["results"]["units"]["frequency"] = [0.1, 0.1, 0, 0] + [0.1] * 16
    assert returned(made) == Returned(dead_before=3, back=2, died=1, dead_after=2)


def test_threshold_range_names_the_ends():
    shares = {"a": Spread(0.2, None, 1), "b": Spread(0.7, 0.1, 2), "c": Spread(0.1, None, 1)}
    assert threshold_range(shares) == (("c", 0.1), ("b", 0.7))


def test_differences_are_over_all_seeds_of_either_arm():
    found = grid(("topk", "dense"), seeds=3)
    del found[Cell("dsprites", "dense", 1)]
    difference = Measured(found).difference(
        "dsprites", "topk", "dense", lambda c: c["results"]["schedule"]["dead"]["never"]
    )
    # 4, 5 and 6 of 20 against 4 and 6.
    assert difference == welch(spread([0.2, 0.25, 0.3]), spread([0.2, 0.3]))
    assert difference.mean == pytest.approx(0.0) and difference.seeds == "3 and 2 seeds"


def test_a_cure_without_the_uncured_arm_has_no_verdict():
    found = grid(("topk", "auxk"))
    assert Measured(found).verdict("shapes3d", "auxk") == Verdict(False, True, True, False)
    for seed in (0, 1):
        del found[Cell("shapes3d", "topk", seed)]
    assert Measured(found).verdict("shapes3d", "auxk") is None


# -- conclusions -----------------------------------------------------------------------------------


def said(found):
    return "\n".join(text for texts in conclusions(Measured(found)).values() for text in texts)


def test_conclusions_follow_the_numbers():
    found = grid(("topk", "l1", "dense", "fixed"), dead=10, seeds=3)
    for cell, made in found.items():
        if cell.arm == "fixed":
            made["results"]["schedule"]["dead"]["never"] += 0.25
    text = said(found)
    assert "L0 under L1 ended within 10 % of k: 2.0" in text
    # 10, 11 and 12 of 20 in every arm; t(4) = 2.776, s = 5 sqrt(2 / 3) points.
    same = "55.0 ± 5.0 against 55.0 ± 5.0 %, +0.0 percentage points (95 % interval -11.3 to +11.3"
    assert f"than dSprites under Top-k is neither shown nor reversed: {same}" in text
    assert "never active units differ by +25.0 percentage points (95 % interval +13.7" in text
    assert "more units are dead without the schedule than with it" in text
    # Before: units 0-9 and more; after: units 0-2, in every seed.
    assert "5 more epochs under Top-k, 24 (73 %) of 33 dead units came back" in text
    assert "changed reconstruction by -1.0 nats (95 % interval -1.0 to -1.0, 3 seeds)" in text
    assert "Training had not converged" in text
    assert "due to" not in text and "within the spread" not in text


def test_conclusions_turn_with_the_numbers():
    found = grid(("topk", "l1", "dense"), dead=4, l0=2.3, seeds=3)
    for cell, made in found.items():
        schedule = made["results"]["schedule"]
        if cell.arm == "dense":
            schedule["mig"]["score"] = 0.3 + 0.01 * cell.seed
        elif cell.dataset == "shapes3d":
            schedule["dead"]["never"] = 0.8 if cell.arm == "topk" else 0.05
    text = said(found)
    assert "ended more than 10 % away from k (seed 0: 2.3 for k = 2" in text
    assert "dSprites under Top-k is seen here: 80.0 ± 0.0 against 25.0 ± 5.0 %" in text
    assert "dSprites under L1 is reversed here: 5.0 ± 0.0 against 25.0 ± 5.0 %" in text
    # t(2) = 4.303: 4.303 * 0.01 / sqrt(3) = 0.025
    assert "(0.310 ± 0.010) is -0.210 (95 % interval -0.235 to -0.185, 3 seeds each): lower" in text


def with_mig(*scores):
    """Top-k with these, and the dense control with 0.06, 0.05 and 0.04."""
    found = grid(("topk", "dense"), ("dsprites",), seeds=3)
    for cell, made in found.items():
        score = scores[cell.seed] if cell.arm == "topk" else 0.06 - 0.01 * cell.seed
        made["results"]["schedule"]["mig"]["score"] = score
    return said(found)


def test_a_comparison_of_mig_without_power_says_so():
    text = with_mig(0.01, 0.05, 0.09)
    assert "is +0.000 (95 % interval -0.0" in text and "no difference shown" in text
    assert "as far as the loss of all of the control's MIG" in text
    assert "as far as the loss" not in with_mig(0.045, 0.05, 0.055)


def test_mig_is_compared_with_the_untrained_model_and_random_codes():
    text = with_mig(0.10, 0.11, 0.12)
    # 0.01 before training; t(2) = 4.303 * 0.01 / sqrt(3)
    assert "before training 0.010 ± 0.000, a change of +0.100 (95 % interval +0.075" in text
    assert "of a random code 0.001 ± 0.000" in text and "training raised it" in text
    assert "training raised it" not in with_mig(0.01, 0.02, 0.15)


def test_mig_is_followed_from_before_the_cut():
    found = grid(("topk",), ("dsprites",))
    for cell, made in found.items():
        # Estimates at k = 20, 16, 12, then, after the cut, 8 and 4.
        for at, score in zip((0, 2, 4, 6, 8), (0.02, 0.3, 0.2, 0.15, 0.1), strict=True):
            made["epochs"][at]["mig"] = score + 0.01 * cell.seed
    text = said(found)
    assert "last estimate before k cut (k = 12) to the end, MIG changed by -0.100" in text
    assert "between 0.025 (k = 20) and 0.305 (k = 16)" in text


def test_selectivity_is_compared_with_the_dense_control_and_the_untrained_model():
    found = grid(("topk", "dense"), dead=10, seeds=3)
    for cell, made in found.items():
        units = made["results"]["schedule"]["units"]
        if cell.arm == "dense":
            units["frequency"] = [0.5] * UNITS
    # Alive: 10, 9 and 8 units with the largest of 0, 0.01, ..., 0.19; all 20 in the control and
    # before training.
    text = said(found)
    words = "is 0.150 ± 0.005 under Top-k and 0.095 ± 0.000 in the dense control, +0.055"
    assert words in text and "3 seeds each): higher. Before training it is 0.095 ± 0.000" in text
    assert "+0.055 (95 % interval +0.043 to +0.067, 3 seeds): more selective" in text
    assert "mechanical" not in text
    for cell, made in found.items():
        if cell.arm == "dense":
            made["results"]["schedule"]["units"]["selectivity"] = [0.9] * UNITS
    assert "part of that fall is mechanical" in said(found).lower()


def test_without_the_dense_control_nothing_is_put_down_to_sparsification():
    text = said(grid(("topk",)))
    assert "the part of the dead units that needs no sparsification is unknown" in text
    assert "in excess of" not in text and "L1" not in text


def test_drawing_z_matters_only_behind_it():
    found = grid(("topk",), ("dsprites",))
    assert "The sparse layer sits before z" in said(found)
    for made in found.values():
        made["config"]["placement"] = "decoder"
    text = said(found)
    assert "11.2 ± 1.8 % instead of 22.5 ± 3.5 % are never active under Top-k" in text
    assert "sits before z" not in text


def test_a_cure_is_told_with_other_definitions_and_the_power_of_its_verdict():
    found = grid(("topk", "auxk"), ("dsprites",), seeds=3)
    for cell, made in found.items():
        schedule = made["results"]["schedule"]
        if cell.arm == "auxk":
            schedule["dead"] |= {"never": 0.01, "frequency<1e-03": 0.1, "frequency<1e-02": 0.4}
        else:
            schedule["mig"]["score"] = 0.1 + 0.08 * (cell.seed - 1)
    text = said(found)
    assert "on dSprites: auxk." in text
    assert "frequency < 0.01: 40.0 ± 0.0 against 25.0 ± 5.0 %" in text
    assert "so widely (0.100 ± 0.080) that a cure with MIG 0.020 would pass" in text
    for cell, made in found.items():
        if cell.arm == "topk":
            made["results"]["schedule"]["mig"]["score"] = 0.1 + 0.04 * (cell.seed - 1)
    assert "so widely" not in said(found)


def test_a_value_that_differs_from_the_default_is_ours():
    def sources(arm, **changes):
        config = content(Cell("dsprites", arm, 0))["config"] | changes
        return {name: source for name, _, _, source in protocol_rows([config], arm)}

    plain = sources("topk", side=64, batch_size=64, extra_epochs=100)
    assert "disentanglement_lib" in plain["side"] and plain["side"] == plain["batch_size"]
    assert "abstract" in plain["extra_epochs"] == plain["sparsifier"]
    changed = sources("topk", side=32, batch_size=1024, extra_epochs=5, test_images=10_240)
    names = ("side", "batch_size", "extra_epochs", "test_images", "k_end", "units")
    assert {changed[name] for name in names} == {"ours"}
    assert "abstract" in sources("l1")["sparsifier"]
    # Both data sets are the study's; a column of values needs no source.
    assert "abstract" in plain["dataset"] and plain["seed"] == ""


def test_limits_name_what_was_changed():
    measured = Measured(grid(("topk",)))
    texts = " ".join(limits(measured, changed_settings(asked(["topk"]))))
    assert "epochs (the preset has 50)" in texts and "2 seeds" in texts
    assert "On 400 test images, a frequency below 0.0001 is the same as never" in texts
