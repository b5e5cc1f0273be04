"""Sentences on active units, on when and in which control units die, and on L1's steering."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...grid import STUDY
from ..activity import (
    PHASES,
    TRANSIENT,
    Cut,
    SilentParts,
    describe_cut,
    l1_strengths,
    largest_lag,
    phase_shares,
    shared_epochs,
    silent_after_a_tenth,
    silent_before_cut,
    silent_share,
    silent_since_before_cut,
    split_silent,
)
from ..measurements import (
    L0_TOLERANCE,
    Content,
    Getter,
    Measured,
    at_end_of_run,
    at_end_of_schedule,
    mig_score,
    never_active,
    returned,
)
from ..names import named
from ..statistics import Difference, Spread, counted, in_words, paired_change, span, spread

# -- active units ----------------------------------------------------------------------------------


def active_units(measured: Measured, dataset: str) -> Iterator[str]:
    """Say what ReLU leaves active, and from when on k cuts."""
    for arm in STUDY:
        cells = list(measured.of(dataset, arm).values())
        if cells:
            config = cells[0]["config"]
            yield _describe_cut_of_arm(arm, [describe_cut(content) for content in cells], config)


def _describe_cut_of_arm(arm: str, cuts: list[Cut], config: Mapping[str, Any]) -> str:
    """Say from when on k cuts active units under an arm."""
    first = spread(cut.first for cut in cuts)
    last = spread(cut.last for cut in cuts)
    start = (
        f"under {named(arm)}, {first.text()} of {config['units']} units are active after the first "
        "epoch"
    )
    begun = [(cut.epoch, cut.k) for cut in cuts if cut.epoch is not None and cut.k is not None]
    if not begun:
        return f"{start} and {last.text()} after the last; k never cuts them."
    epochs, ks = ([pair[at] for pair in begun] for at in (0, 1))
    if max(epochs) == 1:
        return f"{start}: k cuts from the first epoch on, and {last.text()} are active at the end."
    some = "" if len(begun) == len(cuts) else f" with {len(begun)} of {len(cuts)} seeds"
    before = spread(cut.before for cut in cuts)
    return (
        f"{start}, so k = {config['k_start']} cuts nothing. It begins to cut{some} in epoch "
        f"{span(epochs)} of {config['epochs']}, at k = {span(ks)}: the real cut of active units is "
        f"from {before.text()} to {last.text()}."
    )


# -- deaths ----------------------------------------------------------------------------------------


def without_sparsification(measured: Measured, dataset: str) -> Iterator[str]:
    """Say how many units are dead in the dense control."""
    dense = measured.spread(dataset, "dense", never_active)
    if dense is None:
        yield (
            "no cell of the dense control is finished, so the part of the dead units that needs no "
            "sparsification is unknown."
        )
        return
    held_out = measured.known(dataset, "dense", silent_share)
    yield (
        f"{dense.percent()} % of the units are active on no test image although k never cut "
        f"anything (dense control, {counted(dense.n, 'seed')}); on the fewer held-out images, "
        f"{held_out.percent()} %."
    )


def by_part(measured: Measured, dataset: str) -> Iterator[str]:
    """Say which part of the collapse came early, and which goes with sparsification."""
    for arm in STUDY:
        cells = list(measured.of(dataset, arm).values())
        if not cells:
            continue
        whole = measured.known(dataset, arm, silent_share)
        if whole.mean == 0:
            yield f"under {named(arm)} no unit was silent on the held-out images at the end."
            continue
        yield _describe_silence(measured, dataset, arm, whole)
        split = split_silent(measured, dataset, arm)
        if split is not None:
            yield _describe_parts(arm, split)
            yield from _describe_shared_epochs(measured, dataset, arm)


def _describe_silence(measured: Measured, dataset: str, arm: str, whole: Spread) -> str:
    """Say when units fell silent under an arm."""
    cells = measured.of(dataset, arm).values()
    shares = {phase: spread(phase_shares(content)[phase] for content in cells) for phase in PHASES}
    words = ", ".join(f"{share.percent()} % {phase}" for phase, share in shares.items())

    def of(get: Getter) -> str:
        return measured.known(dataset, arm, get).percent()

    return (
        f"under {named(arm)}, {whole.percent()} % of all units are silent on the held-out images "
        f"at the end of the schedule ({of(never_active)} % on the test images). By when their "
        f"silence began: {words}. The curve of silent units passes {of(silent_after_a_tenth)} % "
        f"after a tenth of the schedule and {of(silent_before_cut)} % after the last epoch before "
        f"k cut, of which {of(silent_since_before_cut)} % stay silent."
    )


def _describe_parts(arm: str, split: SilentParts) -> str:
    """Say what the parts of the silent units add up to."""

    def of(part: float) -> str:
        return f"{100 * part:.1f} ({100 * part / split.whole.mean:.0f} %)"

    if split.uncut >= 0:
        rest = (
            f"+ {of(split.uncut)} that fell silent later as in the dense control, late or rare "
            "units that neither explains"
        )
    else:
        rest = (
            f"- {of(-split.uncut)} counted in both, since fewer units are silent at the end of the "
            "dense control than stay silent here from before the cut"
        )
    judged = in_words(
        split.excess,
        "more than in the control, so this part goes with sparsification",
        "fewer than in the control",
    )
    return (
        f"so the {100 * split.whole.mean:.1f} % silent under {named(arm)} are, in points of all "
        f"units (and as a share of the silent ones): {of(split.early)} that died early, before k "
        f"cut anything, + {of(split.excess.mean)} in excess of the dense control, {rest}. The "
        f"excess is {split.excess.points()}: {judged}."
    )


def _describe_shared_epochs(measured: Measured, dataset: str, arm: str) -> Iterator[str]:
    """Say for how long an arm and the dense control are the same run."""
    count = shared_epochs(measured, dataset, arm)
    if count:
        yield (
            f"with the same seed, {named(arm)} and the dense control are the same run for "
            f"{counted(count, 'epoch')}; what they differ in afterwards is k."
        )


def fixed(measured: Measured, dataset: str) -> Iterator[str]:
    """Compare the final k from the start with the schedule."""
    difference = measured.difference(dataset, "fixed", "topk", never_active)
    if difference is not None:
        words = in_words(
            difference,
            "more units are dead without the schedule than with it",
            "fewer units are dead without the schedule than with it",
        )
        yield (
            f"with the final k from the first epoch, never active units differ by "
            f"{difference.points()} from those under the schedule: {words}."
        )


# -- L1's steering and the further epochs ----------------------------------------------------------


def steering(measured: Measured, dataset: str) -> Iterator[str]:
    """Say whether L0 under L1 followed k, and whether the end of the schedule is a transient."""
    cells = measured.of(dataset, "l1")
    if not cells:
        return
    off = []
    for seed, content in cells.items():
        k, l0 = (content["results"]["schedule"][name] for name in ("k", "l0"))
        if abs(l0 - k) > L0_TOLERANCE * k:
            off.append(f"seed {seed}: {l0:.1f} for k = {k}")
    worst = max(
        (largest_lag(content) for content in cells.values()), key=lambda one: abs(one.share)
    )
    yield (
        f"over the last fifth of the schedule, L0 under L1 was off k by at most "
        f"{100 * worst.share:+.0f} % (epoch {worst.epoch}: {worst.l0:.0f} for k = {worst.k})."
    )
    if off:
        yield (
            f"L0 under L1 ended more than 10 % away from k ({'; '.join(off)}), so the rows of L1 "
            "are not comparable with those of Top-k."
        )
    else:
        l0 = measured.known(dataset, "l1", at_end_of_schedule("l0"))
        yield f"L0 under L1 ended within 10 % of k: {l0.text(1)}."
    yield from _describe_settling(list(cells.values()))


def _describe_settling(cells: list[Content]) -> Iterator[str]:
    """Say whether the strength of L1 had settled."""
    pairs = [pair for pair in map(l1_strengths, cells) if pair is not None]
    if not pairs:
        return
    last, settled = (spread(pair[at] for pair in pairs).mean for at in (0, 1))
    extra = counted(cells[0]["config"]["extra_epochs"], "more epoch")
    numbers = (
        f"the strength of L1 was {last:.3g} in the last epoch of the schedule and {settled:.3g} "
        f"after {extra}"
    )
    if last > TRANSIENT * settled:
        yield (
            f"{numbers}, {last / settled:.0f} times less. The end of the schedule is a transient "
            "of the steering: what is said of L1 there (dead units, reconstruction, KL, MIG) is "
            "not what L1 settles at, and does not compare with Top-k."
        )
    else:
        yield f"{numbers}: it had settled."


def further_epochs(measured: Measured, dataset: str) -> Iterator[str]:
    """Say who came back and who died, and what else changed."""
    for arm in STUDY:
        cells = [
            content
            for content in measured.of(dataset, arm).values()
            if content["config"]["extra_epochs"]
        ]
        if not cells:
            continue
        counts = [returned(content) for content in cells]
        dead, revived = (
            sum(count.dead_before for count in counts),
            sum(count.back for count in counts),
        )
        died = sum(count.died for count in counts)
        epochs = counted(cells[0]["config"]["extra_epochs"], "more epoch")
        if dead == 0:
            yield f"under {named(arm)} no unit was dead after the schedule; {died} died later."
        else:
            count = "none" if revived == 0 else f"{revived} ({100 * revived / dead:.0f} %)"
            yield (
                f"in {epochs} under {named(arm)}, {count} of {dead} dead units came back "
                f"({counted(len(cells), 'seed')}{' together' if len(cells) > 1 else ''}, on the "
                f"test images), and {died} others died."
            )
        yield _describe_changes(arm, cells, epochs)


def _describe_changes(arm: str, cells: list[Content], epochs: str) -> str:
    """Say what the further epochs changed."""

    def of(get: Getter) -> Difference:
        return paired_change(
            spread(get(at_end_of_run(content)) - get(content) for content in cells)
        )

    reconstruction = of(at_end_of_schedule("reconstruction"))
    open_ended = (
        " Training had not converged at the end of the schedule."
        if reconstruction.shown == -1
        else ""
    )
    return (
        f"these {epochs} under {named(arm)} changed reconstruction by "
        f"{reconstruction.text(1, 1, ' nats')}, KL by "
        f"{of(at_end_of_schedule('kl')).text(2, 1, ' nats')}, MIG by {of(mig_score).text(3)}, "
        f"never active units by {of(never_active).points()}.{open_ended}"
    )
