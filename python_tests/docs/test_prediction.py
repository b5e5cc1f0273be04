"""The prediction for many GPUs counts the bytes that the page says, and that are measured."""

from __future__ import annotations

import pathlib

import pytest

BENCH = pathlib.Path(__file__).parents[2] / "bench"


@pytest.fixture
def prediction(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import prediction

    return prediction


@pytest.mark.parametrize("size", [1, 8])
def test_messages_in_a_node_are_a_ring(prediction, size):
    """2 (W - 1) / W of the bytes for a sum, (W - 1) times them for a gathering."""
    group = prediction.Group(size, 1)
    step = (size - 1) * prediction.NVLINK_STEP
    alpha = prediction.BASE if size > 1 else 0
    expected = alpha + 2 * step + 2 * (size - 1) / size * 1e9 / prediction.NVLINK
    assert group.all_reduce(1e9) == pytest.approx(expected)
    assert group.all_gather(1e6) == pytest.approx(
        alpha + step + (size - 1) * 1e6 / prediction.NVLINK
    )


def test_messages_between_nodes_use_all_ports(prediction):
    """Each of the node's GPUs sends its part of a sum; what is gathered comes once by the net."""
    group = prediction.Group(8, 4)
    assert group.size == 32
    both = group.all_reduce(8e9) - prediction.Group(8, 1).all_reduce(8e9)
    latency = 2 * 3 * prediction.NETWORK_STEP
    assert both == pytest.approx(latency + 2 * 3 / 4 * 1e9 / prediction.NETWORK)


def test_steps_are_the_measured_one_shared_out(prediction):
    """And with one GPU, what was measured."""
    work = prediction.Work(131072, 0.028, 0.007, 0.093)
    assert prediction.seconds(work, 1, 1) == pytest.approx(0.028)
    assert prediction.seconds(work, 1, 1, dense=True) == pytest.approx(0.093)
    whole = prediction.seconds(work, 64, 64)
    messages = prediction.Group(8, 8)
    expected = 0.028 / 64 + sum((
        messages.all_gather(8 * 8192 * 64), messages.all_reduce(4 * 8192 * 4096),
        messages.all_reduce(4 * 4096),
    ))  # fmt: skip
    assert whole == pytest.approx(expected)
    replicas = prediction.seconds(work, 64, 1)
    gradients = messages.all_reduce(8 * 131072 * 4096)
    assert replicas == pytest.approx(0.021 / 64 + 0.007 + gradients)
