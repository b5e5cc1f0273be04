"""Made-up cells of a reproduction, for the tests of its report."""

from dataclasses import asdict

from sparsekern.studies.vae_sae import report
from sparsekern.studies.vae_sae.grid import cell_config, cells
from sparsekern.training import scheduled_k

UNITS = 20
EPOCHS, EXTRA = 10, 5
ACTIVE = 11
"""Units that ReLU leaves active: k, which goes 20 18 16 14 12 10 8 6 4 2, cuts from epoch 6 on."""
OVERRIDES = {"epochs": EPOCHS, "extra_epochs": EXTRA, "units": UNITS, "k_start": UNITS, "k_end": 2}
SETS = ("dsprites", "shapes3d")


def asked(arms, datasets=SETS, seeds=2):
    return {
        "preset": "small",
        "datasets": list(datasets),
        "arms": list(arms),
        "seeds": seeds,
        "data": {},
        "overrides": OVERRIDES,
    }


def gap(score):
    return {"score": score, "low": score - 0.01, "high": score + 0.01, "factors": [None, score]}


def measurements(dead, mig, reconstruction, k, l0):
    """With the first `dead` units dead."""
    alive = [0.0] * dead + [0.25] * (UNITS - dead)
    share = dead / UNITS
    names = ("never", "frequency<1e-04", "frequency<1e-03", "frequency<1e-02")
    panel = dict.fromkeys(names, share) | {
        "mean<1e-04": share,
        "mean<1e-03": share,
        "mean<1e-02": min(1.0, share + 0.1),
    }
    return {
        "k": k,
        "reconstruction": reconstruction,
        "kl": 7.5,
        "l0": l0,
        "dead": panel,
        "dead_sampled": dict.fromkeys(panel, share / 2),
        "mig": gap(mig),
        "mig_code": gap(mig / 2),
        "mig_random": gap(0.001),
        "mig_monte_carlo": {"score": mig + 0.02, "factors": [None, mig]},
        "units": {
            "frequency": alive,
            "mean": [2 * f for f in alive],
            "selectivity": [0.01 * at for at in range(UNITS)],
            "factor": [at % 6 for at in range(UNITS)],
        },
    }


def content(cell, *, dead=4, after=3, mig=0.1, reconstruction=30.0, death=None, l0=None):
    """Unless death says in which epoch each unit was active last, the dead units' is epoch 3."""
    config = cell_config(cell, "small", OVERRIDES, None)
    ks = [
        scheduled_k("linear", config.k_start, config.k_end, min(at, EPOCHS - 1), EPOCHS)
        for at in range(config.all_epochs)
    ]
    end = measurements(dead, mig, reconstruction, ks[EPOCHS - 1], l0 or ks[EPOCHS - 1])
    final = end if config.extra_epochs == 0 else measurements(after, mig, 29.0, ks[-1], 2.0)
    last = round(final["dead"]["never"] * UNITS)
    return {
        "config": asdict(config),
        "results": {
            **final,
            "data": f"rendered {cell.dataset} images",
            "test_images": 400,
            "schedule": end,
            "untrained": measurements(0, 0.01, 150.0, UNITS, 10.0),
            "death_epoch": death or [3] * dead + [None] * (UNITS - dead),
            "death_epoch_after": [3] * last + [None] * (UNITS - last),
            "steps": 100,
            "images_per_second": 1000.0,
            "seconds": 1.5,
            "device": "cpu",
            "backends": {"topk": "native"},
        },
        "epochs": [
            {
                "kind": "epoch",
                "epoch": at,
                "k": k,
                "reconstruction": 40.0 - at,
                "eval_reconstruction": 41.0 - at,
                "eval_dead": dead / UNITS * at / config.all_epochs,
                "eval_l0": float(min(k, ACTIVE)),
                **({"strength": 0.5} if cell.arm == "l1" else {}),
                **({"mig": 0.1, "mig_low": 0.09, "mig_high": 0.11} if at % 2 == 0 else {}),
            }
            for at, k in enumerate(ks)
        ],
    }


def grid(arms, datasets=SETS, seeds=2, **changes):
    """Seed s has s more dead units."""
    dead = changes.pop("dead", 4)
    return {
        cell: content(cell, dead=dead + cell.seed, **changes)
        for cell in cells(datasets, arms, range(seeds))
    }


def written(folder, found, request, failed=None, total=None):
    report.write(
        folder, request, found, failed=failed or {}, total=len(found) if total is None else total
    )
    return (folder / "report.md").read_text()
