"""A reproduction asked for by several calls: its cells and its commands are those of the calls."""

import json
import shlex

import pytest
from made_up_cells import asked, grid, written

from sparsekern.cli.command import _parser
from sparsekern.studies.figures import from_zero, new_figure
from sparsekern.studies.reproduction import calls_of, merged_request
from sparsekern.studies.sparling import grid as sparling
from sparsekern.studies.sparling.report import _command_line as sparling_command
from sparsekern.studies.vae_sae import grid as vae_sae


def merged(folder, *requests, lists):
    for request in requests:
        found = merged_request(json.loads(json.dumps(request)), folder, fixed=(), lists=lists)
        (folder / "reproduction.json").write_text(json.dumps(found))
    return found


def test_no_cell_is_asked_for_that_no_call_asked_for(tmp_path):
    found = merged(
        tmp_path,
        {"arms": ["sparling"], "seeds": 3},
        {"arms": ["l1-3"], "seeds": 1},
        lists=("arms",),
    )
    names = [cell.name for cell in sparling.asked_cells(found)]
    assert names == ["sparling-0", "sparling-1", "sparling-2", "l1-3-0"]
    (tmp_path / "other").mkdir()
    found = merged(
        tmp_path / "other",
        {"datasets": ["dsprites"], "arms": ["topk"], "seeds": 2},
        {"datasets": ["shapes3d"], "arms": ["topk", "l1"], "seeds": 1},
        lists=("datasets", "arms"),
    )
    assert {cell.name for cell in vae_sae.asked_cells(found)} == {
        "dsprites-topk-0", "dsprites-topk-1", "shapes3d-topk-0", "shapes3d-l1-0",
    }  # fmt: skip


def test_calls_that_others_cover_are_left_out(tmp_path):
    first, more = {"arms": ["a"], "seeds": 1}, {"arms": ["a"], "seeds": 2}
    wider, other = {"arms": ["a", "b"], "seeds": 2}, {"arms": ["c"], "seeds": 1}
    assert merged(tmp_path, first, first, more, first, lists=("arms",)) == more
    found = merged(tmp_path, wider, other, lists=("arms",))
    assert calls_of(found) == [wider, other]
    assert calls_of(merged(tmp_path, first, other, lists=("arms",))) == [wider, other]


def test_a_report_of_an_earlier_version_is_extended(tmp_path):
    """It has one grid, whatever the calls were."""
    (tmp_path / "reproduction.json").write_text(json.dumps({"arms": ["a", "b"], "seeds": 2}))
    found = merged(tmp_path, {"arms": ["c"], "seeds": 1}, lists=("arms",))
    assert calls_of(found) == [{"arms": ["a", "b"], "seeds": 2}, {"arms": ["c"], "seeds": 1}]


@pytest.fixture
def extended():
    """Two seeds of one arm, then one of another."""
    call = {"datasets": ["dsprites"], "arms": ["topk"], "seeds": 2}
    later = {"datasets": ["dsprites"], "arms": ["fixed"], "seeds": 1}
    return {**asked(["topk", "fixed"], ["dsprites"]), "calls": [call, later]}


def test_an_extended_report_is_complete_and_prints_the_commands_given(extended, tmp_path):
    found = grid(["topk", "fixed"], ["dsprites"])
    wanted = vae_sae.asked_cells(extended)
    found = {cell: content for cell, content in found.items() if cell in wanted}
    assert len(found) == 3
    text = written(tmp_path, found, extended, total=len(wanted))
    assert "Complete: 3 cells" in text and "Incomplete" not in text
    commands = [line.strip().strip("`") for line in text.splitlines() if "sparsekern repro" in line]
    parsed = [_parser().parse_args(shlex.split(line)[1:]) for line in commands]
    assert [(o.arms, o.seeds, o.datasets) for o in parsed] == [
        (["topk"], 2, ["dsprites"]), (["fixed"], 1, ["dsprites"]),
    ]  # fmt: skip


def test_the_command_of_sparling_has_its_data_and_survives_a_shell():
    request = {
        "preset": "audio", "arms": ["sparling"], "seeds": 1, "data": "/a b/c", "overrides": {},
    }  # fmt: skip
    options = _parser().parse_args(shlex.split(sparling_command(request, request))[1:])
    assert options.data == "/a b/c" and options.arms == ["sparling"]


@pytest.mark.parametrize("values", [[31.9, 32.0, 32.0], [4.0, 4.0], [500.0, 50.0], [0.0, 0.0]])
def test_lines_stay_away_from_the_upper_frame(values):
    panel = new_figure(3, 3).subplots()
    panel.plot(range(len(values)), values)
    from_zero(panel)
    low, high = panel.get_ylim()
    assert low == 0 and max(values) <= 0.9 * high
