"""Measures of sparse layers, against counting by hand."""

import pytest
import torch

from sparsekern.measures.activity import UnitActivity


def test_panel_and_l0_by_hand():
    activity = UnitActivity(4)
    # Unit 0 fires in all of 2000 rows, unit 1 in one, unit 2 is selected with value 0, 3 never.
    indices = torch.tensor([[0, 2]]).repeat(2000, 1)
    values = torch.tensor([[0.5, 0.0]]).repeat(2000, 1)
    indices[7], values[7] = torch.tensor([0, 1]), torch.tensor([0.5, 4.0])
    activity.update(values[:900], indices[:900])
    activity.update(values[900:], indices[900:])
    assert activity.rows == 2000
    assert activity.fired.tolist() == [2000, 1, 0, 0]
    assert activity.sums.tolist() == [1000.0, 4.0, 0.0, 0.0]
    assert activity.l0() == 2001 / 2000
    assert activity.dead_panel() == {
        "never": 0.5,
        "frequency<1e-04": 0.5,
        "frequency<1e-03": 0.75,
        "frequency<1e-02": 0.75,
        "mean<1e-04": 0.5,
        "mean<1e-03": 0.5,
        "mean<1e-02": 0.75,
    }


def test_agrees_with_the_dense_formula():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(300, 40, generator=generator).relu() * torch.linspace(0, 1e-2, 40)
    values, indices = dense.topk(10)
    kept = torch.zeros_like(dense).scatter(1, indices, values)
    activity = UnitActivity(40)
    for part in range(0, 300, 70):
        activity.update(values[part : part + 70], indices[part : part + 70])
    assert activity.l0() == pytest.approx((kept != 0).sum(1).double().mean().item())
    frequency = (kept != 0).double().mean(0)
    assert activity.dead_panel()["never"] == (frequency == 0).double().mean()
    assert activity.dead_panel()["frequency<1e-02"] == (frequency < 1e-2).double().mean()
    # Means of at most 300 numbers in double precision, summed in another order.
    assert torch.allclose(activity.sums / 300, kept.double().mean(0), rtol=1e-12, atol=0)


def test_nothing_seen_yet():
    with pytest.raises(ValueError, match="update must have seen at least one row"):
        UnitActivity(3).l0()
    with pytest.raises(ValueError, match="update must have seen at least one row"):
        UnitActivity(3).dead_panel()
