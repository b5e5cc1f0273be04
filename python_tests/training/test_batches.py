"""The order of the examples, and what a loop refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_training import Noisy, start

from sparsekern.training import LoopConfig, TrainingError, permuted_rows


@pytest.mark.parametrize("first", range(5))
def test_permuted_rows_start_anywhere(first):
    whole = list(permuted_rows(30, 8, 5, 2, 0))
    assert [len(rows) for rows in whole] == [8, 8, 8, 6]
    assert torch.cat(whole).tolist() == np.random.default_rng((5, 2)).permutation(30).tolist()
    rest = list(permuted_rows(30, 8, 5, 2, first))
    assert len(rest) == 4 - first
    assert all(torch.equal(one, other) for one, other in zip(rest, whole[first:], strict=True))


def test_permuted_rows_take_any_batch_size_and_reject_what_is_too_small():
    assert [len(rows) for rows in permuted_rows(30, 10**30, 0, 0, 0)] == [30]
    good = {"examples": 30, "batch_size": 8, "seed": 0, "epoch": 0, "first": 0}
    for name, least in {**dict.fromkeys(good, 0), "examples": 1, "batch_size": 1}.items():
        with pytest.raises(ValueError, match=f"permuted_rows: {name} must be at least {least},"):
            permuted_rows(**{**good, name: least - 1})


@pytest.mark.parametrize("name", ["epochs", "batch_size", "log_every", "checkpoint_every"])
def test_config_rejects_zero(name):
    with pytest.raises(ValueError, match=f"LoopConfig: {name} must be at least 1, got 0"):
        LoopConfig(**{"epochs": 1, "batch_size": 1, name: 0})


def test_a_loss_that_is_not_a_number_stops_training(tmp_path):
    task = Noisy()
    task.targets[3] = float("nan")
    with pytest.raises(TrainingError, match=r"loss is nan at step .*smaller learning rate"):
        start(tmp_path / "run", task)
