"""How many units are active, when units die, and which part goes with what: known answers."""

import pytest
from made_up_cells import ACTIVE, EPOCHS, UNITS, content, grid

from sparsekern.studies.vae_sae.grid import Cell
from sparsekern.studies.vae_sae.report.activity import (
    PHASES,
    Cut,
    Lag,
    describe_cut,
    first_cut_epoch,
    l1_strengths,
    largest_lag,
    phase_of_units,
    phase_shares,
    shared_epochs,
    silent_after_a_tenth,
    silent_before_cut,
    silent_share,
    silent_since_before_cut,
    split_silent,
)
from sparsekern.studies.vae_sae.report.conclusions import conclusions
from sparsekern.studies.vae_sae.report.measurements import Measured

NEVER, BEFORE, WHILE = PHASES


def said(found):
    return "\n".join(text for texts in conclusions(Measured(found)).values() for text in texts)


def made(arm, **changes):
    return content(Cell("dsprites", arm, 0), **changes)


def lasting(*last):
    """Epochs of the last activity, one unit each; the other units live on."""
    return [*last] + [None] * (UNITS - len(last))


# -- active units ----------------------------------------------------------------------------------


def test_k_cuts_from_the_first_epoch_that_fills_it():
    one = made("topk")
    # k: 20 18 16 14 12 10; ReLU leaves 11, of which 0.95 * 12 = 11.4 are not.
    assert first_cut_epoch(one) == 5
    assert describe_cut(one) == Cut(first=ACTIVE, epoch=6, k=10, before=ACTIVE, last=2)
    one["epochs"][4]["eval_l0"] = 11.5
    assert first_cut_epoch(one) == 4
    assert first_cut_epoch(made("dense")) is None and describe_cut(made("dense")).epoch is None
    assert first_cut_epoch(made("fixed")) == 0 and describe_cut(made("fixed")).before == 2


def test_k_of_all_units_cuts_nothing_even_when_all_are_active():
    one = made("topk")
    for record in one["epochs"]:
        record["eval_l0"] = float(record["k"])
    assert one["epochs"][0]["k"] == UNITS and first_cut_epoch(one) == 1


def test_the_lag_is_the_largest_of_the_last_fifth():
    one = made("l1")
    # Epochs 9 and 10 of 10, with k = 4 and 2; what lies before does not count.
    for record, l0 in zip(one["epochs"][7:10], (60.0, 6.0, 2.4), strict=True):
        record["eval_l0"] = l0
    assert largest_lag(one) == Lag(share=0.5, epoch=9, l0=6.0, k=4)
    one["epochs"][9]["eval_l0"] = 0.5
    assert largest_lag(one) == Lag(share=-0.75, epoch=10, l0=0.5, k=2)


def test_strengths_are_those_of_both_ends():
    one = made("l1")
    one["epochs"][EPOCHS - 1]["strength"], one["epochs"][-1]["strength"] = 6.0, 0.25
    assert l1_strengths(one) == (6.0, 0.25)
    assert l1_strengths(made("topk")) is None
    one["config"]["extra_epochs"] = 0
    assert l1_strengths(one) is None


def with_strength(last):
    found = grid(("l1",), ("dsprites",), l0=2.0)
    for one in found.values():
        one["epochs"][EPOCHS - 1]["strength"] = last
        one["epochs"][8]["eval_l0"] = 6.0
    return said(found)


def test_a_transient_of_the_steering_is_named():
    text = with_strength(1.6)  # and 0.5 after the further epochs
    assert "off k by at most +50 % (epoch 9: 6 for k = 4)" in text
    assert "was 1.6 in the last epoch of the schedule and 0.5 after 5 more epochs" in text
    assert "3 times less. The end of the schedule is a transient" in text
    text = with_strength(1.4)
    assert "after 5 more epochs: it had settled." in text and "transient" not in text


def test_the_real_cut_is_told():
    text = said(grid(("topk",), ("dsprites",)))
    assert "11.0 ± 0.0 of 20 units are active after the first epoch, so k = 20 cuts nothing" in text
    assert "begins to cut in epoch 6 of 10, at k = 10" in text
    assert "from 11.0 ± 0.0 to 2.0 ± 0.0" in text


# -- deaths ----------------------------------------------------------------------------------------


def test_units_die_in_the_phase_of_their_first_silent_epoch():
    # k cuts from epoch 5 (from 0) on: last active in epoch 3, silent from 4; last in 4, from 5.
    one = made("topk", death=lasting(-1, 0, 3, 4, 8))
    assert phase_of_units(one)[:6] == [NEVER, BEFORE, BEFORE, WHILE, WHILE, None]
    assert phase_shares(one) == {NEVER: 1 / 20, BEFORE: 2 / 20, WHILE: 2 / 20}
    assert silent_share(one) == sum(phase_shares(one).values()) == 5 / 20
    assert silent_since_before_cut(one) == pytest.approx(3 / 20)


def test_in_the_controls_k_cuts_never_or_always():
    death = lasting(-1, 0, 8)
    assert phase_of_units(made("dense", death=death))[:3] == [NEVER, BEFORE, BEFORE]
    assert silent_since_before_cut(made("dense", death=death)) == pytest.approx(3 / 20)
    assert phase_of_units(made("fixed", death=death))[:3] == [NEVER, WHILE, WHILE]
    assert silent_since_before_cut(made("fixed", death=death)) == 0.0


def test_the_curve_of_silent_units_is_read_at_three_epochs():
    one = made("topk")
    for at, record in enumerate(one["epochs"]):
        record["eval_dead"] = at / 100
    assert silent_after_a_tenth(one) == 0.0  # the first of ten epochs
    assert silent_before_cut(one) == 0.04  # epoch 5 from 1, before the cut in epoch 6
    dense = made("dense")
    for at, record in enumerate(dense["epochs"]):
        record["eval_dead"] = at / 100
    assert silent_before_cut(dense) == 0.09
    assert silent_before_cut(made("fixed")) == 0.0


def two_arms(topk, dense, arm="topk"):
    found = grid((arm, "dense"), ("dsprites",), seeds=3)
    for cell, one in found.items():
        last = topk if cell.arm == arm else dense
        # A seed more has a dead unit more, in either arm.
        one["results"]["death_epoch"] = lasting(*last, *[0] * cell.seed)
    return found


def test_the_parts_of_the_collapse_add_up():
    # 2 early and 8 late under Top-k, 2 early and 1 late (still uncut) in the control.
    found = split_silent(Measured(two_arms([0, 1] + [6] * 8, [0, 1, 6])), "dsprites", "topk")
    assert found.whole.mean == pytest.approx(11 / 20)
    assert found.early == pytest.approx(3 / 20) and found.uncut == pytest.approx(1 / 20)
    assert found.excess.mean == pytest.approx(7 / 20) and found.excess.shown == 1
    assert found.early + found.uncut + found.excess.mean == pytest.approx(found.whole.mean)
    assert split_silent(Measured(grid(("topk",))), "dsprites", "topk") is None


def test_the_sentence_on_the_parts_has_their_numbers():
    text = said(two_arms([0, 1] + [6] * 8, [0, 1, 6]))
    assert "15.0 (27 %) that died early, before k cut anything" in text
    assert "+ 35.0 (64 %) in excess of the dense control" in text
    assert "+ 5.0 (9 %) that fell silent later as in the dense control" in text
    assert "more than in the control, so this part goes with sparsification" in text


def test_no_part_is_put_down_to_sparsification_where_the_interval_holds_0():
    text = said(two_arms([0, 1, 6], [0, 1]))
    # +-1 seed's spread: sd 1 unit, so one unit more shows nothing.
    assert "The excess is +5.0 percentage points (95 % interval -6.3 to +16.3" in text
    assert "3 seeds each): no difference shown" in text and "goes with" not in text
    assert "fewer than in the control" in said(two_arms([0], [6] * 9))


def test_an_overlap_of_the_parts_is_told():
    # Five early under Top-k, only two dead in the control: three are counted twice.
    text = said(two_arms([0] * 5, [0, 1]))
    assert "- 15.0 (50 %) counted in both" in text


def test_what_the_further_epochs_do_moves_no_death():
    one, other = (grid(("topk", "dense"), ("dsprites",), after=after) for after in (0, 15))

    def on_deaths(found):
        return [t for t in said(found).splitlines() if "silent" in t]

    assert on_deaths(one) == on_deaths(other) and len(on_deaths(one)) >= 2
    assert "5 more epochs under Top-k, 9 (100 %) of 9 dead units came back" in said(one)
    assert (
        "none of 9 dead units came back (2 seeds together, on the test images), and 21 others"
        in (said(other))
    )


def test_training_is_called_unconverged_where_reconstruction_fell_in_every_way():
    found = grid(("topk",), ("dsprites",), seeds=3)
    for cell, one in found.items():
        one["results"]["reconstruction"] = 26.0 - cell.seed  # 30 at the end of the schedule
    # t(2) = 4.303 * 1 / sqrt(3)
    assert "reconstruction by -5.0 nats (95 % interval -7.5 to -2.5, 3 seeds)" in said(found)
    assert "Training had not converged at the end of the schedule." in said(found)
    for cell, one in found.items():
        one["results"]["reconstruction"] = 31.0 - 3 * cell.seed
    assert "not converged" not in said(found)


def test_arms_are_the_same_run_until_k_cuts():
    found = grid(("topk", "dense"), ("dsprites",))
    measured = Measured(found)
    # L0 is 11 in both until k = 10, in the sixth epoch.
    assert shared_epochs(measured, "dsprites", "topk") == 5
    assert "are the same run for 5 epochs" in said(found)
    found[Cell("dsprites", "dense", 1)]["epochs"][2]["eval_reconstruction"] += 1e-6
    assert shared_epochs(measured, "dsprites", "topk") == 2
    assert shared_epochs(Measured(grid(("topk",))), "dsprites", "topk") == 0
