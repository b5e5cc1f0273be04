"""What a report of a reproduction computes and says: statistics with known answers, sentences."""

import pytest
from made_up_cells import UNITS, asked, content, grid

from sparsekern.studies.vae_sae.grid import Cell
from sparsekern.studies.vae_sae.report.conclusions import conclusions
from sparsekern.studies.vae_sae.report.limits import changed_settings, limits
from sparsekern.studies.vae_sae.report.summary import (
    PHASES,
    Measured,
    Returned,
    Spread,
    Verdict,
    compared,
    phase_of_units,
    phases,
    returned,
    spread,
    threshold_range,
    verdict,
)

# -- statistics ------------------------------------------------------------------------------------


def test_spread_is_mean_and_sample_deviation():
    found = spread([0.1, 0.2, 0.3])
    assert found.n == 3 and found.mean == pytest.approx(0.2) and found.sd == pytest.approx(0.1)
    assert found.percent() == "20.0 ± 10.0" and found.text(2) == "0.20 ± 0.10"
    one = spread([0.25])
    assert one == Spread(0.25, None, 1) and one.percent() == "25.0"


def test_units_die_in_the_phase_of_the_k_at_their_death():
    cell = Cell("dsprites", "topk", 0)
    #      last active after epoch: -1 with and without life before, then 0, 1, 8, 9, 13
    death = [-1, -1, 0, 1, 8, 9, 13] + [None] * (UNITS - 7)
    made = content(cell, death=death)
    # k: 20 18 16 14 12 10 8 6 4 2, then 2; at least 18 is early
    assert [r["k"] for r in made["epochs"]][:3] == [20, 18, 16]
    made["results"]["untrained"]["units"]["frequency"][0] = 0.0
    found = phase_of_units(made)
    never_alive, early, fell, final = PHASES
    assert found[:7] == [never_alive, early, early, fell, final, final, final]
    assert found[7:] == [None] * (UNITS - 7)
    assert phases(made) == {never_alive: 1 / 20, early: 2 / 20, fell: 1 / 20, final: 3 / 20}


def test_where_k_is_constant_early_is_the_first_tenth():
    made = content(Cell("dsprites", "fixed", 0), death=[-1, 0, 1] + [None] * (UNITS - 3))
    assert {r["k"] for r in made["epochs"]} == {2}
    assert phase_of_units(made)[:3] == [PHASES[1], PHASES[3], PHASES[3]]


def test_a_gated_schedule_need_not_fall_in_every_epoch():
    made = content(Cell("dsprites", "gated", 0), death=[0, 3, 6] + [None] * (UNITS - 3))
    for record, k in zip(made["epochs"], [20, 20, 16, 16, 12, 12, 12, 8, 8, 8], strict=True):
        record["k"] = k
    # Dead from the epochs with k = 20, 12 and 8 on; 8 is the last k although not k_end.
    assert phase_of_units(made)[:3] == [PHASES[1], PHASES[2], PHASES[3]]


def test_returned_units_are_counted_one_by_one():
    made = content(Cell("dsprites", "topk", 0))
    made["results"]["schedule"]["units"]["frequency"] = [0, 0, 0, 0.1] + [0.1] * 16
    made["results"]["units"]["frequency"] = [0.1, 0.1, 0, 0] + [0.1] * 16
    assert returned(made) == Returned(dead_before=3, back=2, died=1, dead_after=2)


@pytest.mark.parametrize(
    ("dead", "reconstruction", "mig", "expected"),
    [
        (0.049, 31.0, 0.09, Verdict(True, True, True)),
        (0.05, 31.0, 0.09, Verdict(False, True, True)),
        (0.01, 31.1, 0.09, Verdict(True, False, True)),
        (0.01, 29.0, 0.08, Verdict(True, True, False)),
    ],
)
def test_the_verdict_allows_the_larger_deviation(dead, reconstruction, mig, expected):
    # Uncured 30 +- 1 and 0.10 +- 0.001; cured +- 0.5 and +- 0.011.
    found = verdict(
        Spread(dead, 0.0, 3),
        (Spread(reconstruction, 0.5, 3), Spread(30.0, 1.0, 3)),
        (Spread(mig, 0.011, 3), Spread(0.1, 0.001, 3)),
    )
    assert found == expected and found.all == all(expected)


def test_one_seed_decides_no_verdict_on_reconstruction_and_mig():
    one, two = (Spread(1.0, None, 1), Spread(1.0, None, 1)), (Spread(1, None, 1), Spread(1, 0.1, 2))
    assert verdict(Spread(0.0, None, 1), one, two) == Verdict(True, None, True)
    assert not verdict(Spread(0.0, None, 1), one, two).all


def test_a_difference_counts_beyond_its_deviation():
    assert compared(spread([0.3, 0.4])) == 1
    assert compared(spread([-0.3, -0.4])) == -1
    assert compared(spread([-0.3, 0.4])) == 0
    assert compared(spread([0.4])) is None


def test_threshold_range_names_the_ends():
    shares = {"a": Spread(0.2, None, 1), "b": Spread(0.7, 0.1, 2), "c": Spread(0.1, None, 1)}
    assert threshold_range(shares) == (("c", 0.1), ("b", 0.7))


def test_differences_pair_seeds():
    found = grid(("topk", "dense"), seeds=3)
    del found[Cell("dsprites", "dense", 1)]
    for seed, share in ((0, 0.1), (1, 0.9), (2, 0.3)):
        found[Cell("dsprites", "topk", seed)]["results"]["schedule"]["dead"]["never"] = share
    difference = Measured(found).difference(
        "dsprites", "topk", "dense", lambda c: c["results"]["schedule"]["dead"]["never"]
    )
    # dense: 4/20 and 6/20 with seeds 0 and 2
    assert difference.n == 2 and difference.mean == pytest.approx((-0.1 + 0.0) / 2)


def test_a_cure_without_the_uncured_arm_has_no_verdict():
    found = grid(("topk", "auxk"))
    assert Measured(found).verdict("shapes3d", "auxk") == Verdict(False, True, True)
    for seed in (0, 1):
        del found[Cell("shapes3d", "topk", seed)]
    assert Measured(found).verdict("shapes3d", "auxk") is None


# -- conclusions -----------------------------------------------------------------------------------


def said(found):
    return "\n".join(text for texts in conclusions(Measured(found)).values() for text in texts)


def test_conclusions_follow_the_numbers():
    found = grid(("topk", "l1", "dense", "fixed"), dead=10)
    for cell, made in found.items():
        if cell.arm == "dense":
            made["results"]["schedule"]["dead"]["never"] = 0.1
    text = said(found)
    # 10/20 and 11/20 minus 0.1
    assert "Top-k minus dense is +42.5 ± 3.5 percentage points" in text
    assert "this part, 81 % of the dead units, is due to sparsification" in text
    assert "L0 under L1 ended within 10 % of k: 2.0" in text
    assert "Shapes3D has more dead units than dSprites under Top-k is neither seen" in text
    assert "no difference beyond the spread" in text
    assert "MIG under Top-k stays within the spread" in text
    # Before: units 0-9; after: units 0-2, in both seeds.
    assert "5 more epochs under Top-k brought 15 (71 %) of 21 dead units back" in text


def test_conclusions_turn_with_the_numbers():
    found = grid(("topk", "l1", "dense"), dead=4, l0=2.3)
    for cell, made in found.items():
        schedule = made["results"]["schedule"]
        if cell.arm == "dense":
            schedule["dead"]["never"] = 0.9 + 0.01 * cell.seed
            schedule["mig"]["score"] = 0.3
        elif cell.dataset == "shapes3d":
            schedule["dead"]["never"] = 0.8 if cell.arm == "topk" else 0.05
    text = said(found)
    assert "sparsification left fewer units dead" in text
    assert "ended more than 10 % away from k (seed 0: 2.3 for k = 2" in text
    assert "dSprites under Top-k is seen here: 80.0 ± 0.0 against 22.5 ± 3.5 %" in text
    assert "dSprites under L1 is reversed here: 5.0 ± 0.0 against 22.5 ± 3.5 %" in text
    assert "MIG under Top-k falls beyond the spread" in text
    assert "due to sparsification" not in text


def test_selectivity_is_compared_with_the_dense_control():
    found = grid(("topk", "dense"), dead=10, seeds=3)
    for cell, made in found.items():
        units = made["results"]["schedule"]["units"]
        if cell.arm == "dense":
            units["frequency"] = [0.5] * UNITS
    # Alive: 10, 9 and 8 units with the largest of 0, 0.01, ..., 0.19; all 20 in the control.
    words = "is 0.150 ± 0.005 under Top-k and 0.095 ± 0.000 in the dense control: higher"
    assert words in said(found)


def test_without_the_dense_control_nothing_is_put_down_to_sparsification():
    text = said(grid(("topk",)))
    assert "the part of the dead units that needs no sparsification is unknown" in text
    assert "minus dense" not in text and "L1" not in text


def test_drawing_z_matters_only_behind_it():
    found = grid(("topk",), ("dsprites",))
    assert "The sparse layer sits before z" in said(found)
    for made in found.values():
        made["config"]["placement"] = "decoder"
    text = said(found)
    assert "11.2 ± 1.8 % instead of 22.5 ± 3.5 % are never active under Top-k" in text
    assert "sits before z" not in text


def test_early_deaths_are_named_when_they_are_most():
    death = [-1, 0, 0, 5] + [None] * (UNITS - 4)
    text = said(grid(("topk",), death=death))
    assert "So most of the deaths (75 %) came early" in text


def test_limits_name_what_was_changed():
    measured = Measured(grid(("topk",)))
    texts = " ".join(limits(measured, changed_settings(asked(["topk"]))))
    assert "epochs (the preset has 50)" in texts and "2 seeds" in texts
    assert "On 400 test images, a frequency below 0.0001 is the same as never" in texts
