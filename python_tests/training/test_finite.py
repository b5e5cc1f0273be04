"""A run never loses its last finite state, and stops in the step that is not finite."""

import dataclasses
import signal

import pytest
import torch
from one_thread import one_thread
from test_training import CONFIG, Noisy, complete, resume, start

from sparsekern.training import TrainingError, checkpoints
from sparsekern.training.finite import nonfinite_names

__all__ = ["complete", "one_thread"]  # fixtures
BAD_STEP = 7


class Diverging(Noisy):
    """Something becomes infinite or NaN in a step, in a place that the loss does not show."""

    def __init__(self, kind, value, at=BAD_STEP, before_step=None):
        super().__init__(before_step=before_step)
        self.kind, self.value, self.at = kind, value, at
        self.model.register_buffer("mean", torch.zeros(3))
        self.model.register_buffer("unset", torch.full((), torch.nan))
        # A weight that the loss does not depend on.
        self.model.register_parameter("silent", torch.nn.Parameter(torch.zeros(4)))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        step = self.optimizer.step

        def stepped():
            step()
            if self.steps == self.at and kind == "parameter":
                self.model.silent.data[1] = value
            if self.steps == self.at and kind == "state":
                self.optimizer.state[self.model[0].weight]["exp_avg_sq"][0, 0] = value

        self.optimizer.step = stepped

    def backward(self, rows):
        scalars = super().backward(rows)
        if self.steps == self.at and self.kind == "loss":
            scalars["loss"] = torch.tensor(self.value)
        if self.steps == self.at and self.kind == "gradient":
            self.model[2].weight.grad[0, 3] = self.value
        if self.steps == self.at and self.kind == "buffer":
            self.model.mean[2] = self.value
        return scalars


NAMES = {
    "loss": "loss is",
    "gradient": "gradient of 2.weight is",
    "parameter": "parameter silent is",
    "buffer": "model.mean is not finite",
    "state": "optimizer.1.exp_avg_sq is not finite",
}


def assert_finite(folder, step):
    tensors, facts = checkpoints.read_checkpoint(folder)
    assert facts["step"] == step
    assert nonfinite_names(tensors) == {"model.unset"}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("log_every", [1, 1000])
def test_the_step_that_is_not_finite_ends_the_run(kind, value, log_every, tmp_path):
    config = dataclasses.replace(CONFIG, log_every=log_every, checkpoint_every=1)
    task = Diverging(kind, value)
    with pytest.raises(TrainingError, match=rf"{NAMES[kind]}.* at step {BAD_STEP}.*learning rate"):
        start(tmp_path / "run", task, config)
    assert task.steps == BAD_STEP
    assert_finite(tmp_path / "run", BAD_STEP - 1)


@pytest.mark.parametrize("kind", NAMES)
def test_no_end_of_an_epoch_saves_what_is_not_finite(kind, tmp_path):
    config = dataclasses.replace(CONFIG, log_every=1000, checkpoint_every=1000)
    with pytest.raises(TrainingError, match=NAMES[kind]):
        start(tmp_path / "run", Diverging(kind, torch.nan, at=8), config)
    assert_finite(tmp_path / "run", 4)


@pytest.mark.parametrize("kind", NAMES)
def test_no_signal_saves_what_is_not_finite(kind, tmp_path):
    config = dataclasses.replace(CONFIG, log_every=1000, checkpoint_every=1000)

    def interrupt(step):
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    task = Diverging(kind, torch.nan, at=6, before_step=interrupt)
    with pytest.raises(TrainingError, match=NAMES[kind]):
        start(tmp_path / "run", task, config)
    assert_finite(tmp_path / "run", 4)


def test_a_learning_rate_beyond_all_measure_is_told_in_the_first_step(tmp_path):
    task = Noisy()
    for group in task.optimizer.param_groups:
        group["lr"] = 1e30
    with pytest.raises(TrainingError, match=r"(parameter|gradient|loss).* at step [12];"):
        start(tmp_path / "run", task)
    assert checkpoints.read_checkpoint(tmp_path / "run") is None


def test_a_gradient_whose_square_overflows_is_told(tmp_path):
    """Adam's second moment becomes infinite, and the weight stands still for ever."""
    with pytest.raises(TrainingError, match="norm of the gradients is inf at step 7"):
        start(tmp_path / "run", Diverging("gradient", 1e30))


def test_a_measurement_that_is_not_finite_keeps_the_checkpoint_before(tmp_path):
    task = Noisy()
    task.evaluate = lambda epoch: {"eval": torch.nan if epoch == 1 else 0.0}
    with pytest.raises(TrainingError, match="eval is nan at step 8"):
        start(tmp_path / "run", task)
    assert checkpoints.read_checkpoint(tmp_path / "run").facts["step"] == 6
    assert resume(tmp_path / "run").step == 12


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: run on a machine that has one"
)
@pytest.mark.parametrize("kind", NAMES)
def test_a_gpu_is_not_waited_for_and_stops_one_step_later(kind, tmp_path):
    config = dataclasses.replace(CONFIG, log_every=1000, checkpoint_every=1000)
    task = Diverging(kind, torch.nan, at=6)
    task.model.cuda()
    task.inputs, task.targets = task.inputs.cuda(), task.targets.cuda()
    with pytest.raises(TrainingError, match=NAMES[kind]):
        start(tmp_path / "run", task, config)
    assert task.steps <= (8 if kind in ("buffer", "state") else 7)
    assert_finite(tmp_path / "run", 4)
