"""Every logged number on its way to a tool of one's own: python log_metrics.py tokens.h5 RUN

With wandb, in place of the function below::

    with wandb.init(name="first") as board:
        sae.run(config, folder, on_metrics=lambda record: board.log(record, step=record["step"]))

With tensorboard::

    with torch.utils.tensorboard.SummaryWriter("board") as board:
        sae.run(config, folder, on_metrics=lambda record: board.add_scalar(
            f"{record['kind']}/fvu", record["fvu"], record["step"]))

`sparsekern train sae --log-to wandb` (or tensorboard) does so with all of them.
"""

import sys

from sparsekern.studies import sae


def on_metrics(record):
    """A record is a line of metrics.jsonl: kind ("step" or "epoch"), step, epoch, and numbers."""
    if record["kind"] == "step":
        print(record["step"], f"{record['loss']:.4f}")


config = sae.Config(activations=(sys.argv[1],), k=4, auxk=8, batch_size=512, progress=False)
sae.run(config, sys.argv[2], on_metrics=on_metrics)
trained = sae.load_run(sys.argv[2])  # model in evaluation mode, config, threshold, step
print(trained.step, "steps of", len(trained.model.dictionary), "latents")
