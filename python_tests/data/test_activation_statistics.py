"""Statistics of stored activations, and rows left out because they are too long."""

import numpy as np
import pytest
import torch
from test_activations import batches, put

from sparsekern.data import ActivationStore, DataError
from sparsekern.data.activations.rows import row_norms


def rows_with_outliers(count=500, features=6):
    """Normal rows [count, features], every 50th a thousand times as long."""
    rows = np.random.default_rng(0).standard_normal((count, features)).astype(np.float32)
    rows[::50] *= 1000
    return rows


@pytest.fixture
def path(tmp_path):
    put(tmp_path / "a.h5", rows_with_outliers(), 8)
    return tmp_path / "a.h5"


def test_rows_beyond_a_norm_are_left_out_and_counted(path):
    rows = torch.from_numpy(rows_with_outliers())
    kept = rows[rows.double().norm(dim=1) <= 20]
    with ActivationStore(path, max_norm=20) as store:
        assert (store.outliers, store.skipped, store.tokens) == (10, 0, 490) == (10, 0, len(kept))
        assert torch.equal(torch.cat(batches(store, shuffle=False)), kept)
        full = batches(store)
        assert torch.equal(torch.cat(full).sort(0).values, kept.sort(0).values)
        for start in (1, 7, len(full)):
            assert all(map(torch.equal, batches(store, start=start), full[start:]))


def test_a_norm_that_no_row_exceeds_changes_nothing(path):
    with ActivationStore(path) as one, ActivationStore(path, max_norm=1e9) as two:
        assert two.outliers == 0 and all(map(torch.equal, batches(one), batches(two)))


def test_rows_that_are_not_finite_are_no_outliers(tmp_path):
    rows = rows_with_outliers()
    rows[3, 1], rows[100, 2], rows[101, 0] = np.nan, np.inf, -np.inf
    put(tmp_path / "a.h5", rows, 8)
    with ActivationStore(tmp_path / "a.h5", max_norm=20, nonfinite="skip") as store:
        assert (store.skipped, store.outliers, store.tokens) == (3, 9, 488)
    with pytest.raises(DataError, match=r"^activations are not finite: .* row 3 of .*a\.h5"):
        ActivationStore(tmp_path / "a.h5", max_norm=20)


def test_a_norm_that_leaves_no_row_or_is_none(path):
    with pytest.raises(DataError, match="hold no finite row of a norm up to 1e-06"):
        ActivationStore(path, max_norm=1e-6)
    for value in (0, -1.0, float("nan"), float("inf"), "3"):
        with pytest.raises(ValueError, match=r"^ActivationStore: max_norm must be above 0 and fin"):
            ActivationStore(path, max_norm=value)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norms_neither_overflow_nor_depend_on_their_neighbours(scale):
    rows = torch.randn(5000, 48, generator=torch.Generator().manual_seed(0)) * scale
    norms = row_norms(rows)
    assert np.allclose(norms, rows.double().norm(dim=1).numpy(), rtol=1e-12)
    assert all(row_norms(rows[i : i + 1])[0] == norms[i] for i in range(0, 5000, 501))


def test_statistics_of_all_rows_are_those_of_the_file(path):
    rows = rows_with_outliers().astype(np.float64) + np.array([1e5, 0, 0, 0, 0, 0])
    put(path.with_name("b.h5"), rows.astype(np.float32))
    rows = rows.astype(np.float32).astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    with ActivationStore(path.with_name("b.h5")) as store:
        found = store.statistics()
    assert found.rows == 500
    assert np.allclose(found.mean, rows.mean(0), rtol=1e-12)
    assert np.allclose(found.deviation, rows.std(0), rtol=1e-9)
    assert found.mean_norm == pytest.approx(norms.mean(), rel=1e-12)
    assert found.median_norm == pytest.approx(np.median(norms), rel=1e-12)
    assert found.largest_norm == pytest.approx(norms.max(), rel=1e-12)
    assert found.variance == pytest.approx(rows.var(0).sum(), rel=1e-9)
    assert found.offset == pytest.approx(1e5 / rows.var(0).sum() ** 0.5, rel=1e-2)


def test_a_sample_follows_from_its_seed_and_leaves_outliers_out(path):
    with ActivationStore(path) as store:
        one, two, other = (store.statistics(64, seed=seed) for seed in (1, 1, 2))
        assert one.rows == 64 and torch.equal(one.mean, two.mean)
        assert not torch.equal(one.mean, other.mean)
        median = store.statistics().median_norm
        assert 1.5 < median < 3.5
    with ActivationStore(path, max_norm=10 * median) as store:
        assert store.outliers == 10 and store.statistics().largest_norm <= 10 * median
        assert store.statistics(495).rows == 490
        with pytest.raises(ValueError, match=r"^statistics: rows must be an integer of at least 1"):
            store.statistics(0)


def test_features_that_outgrow_the_others_are_named(tmp_path):
    rows = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
    rows[:, 7] *= 1000
    rows[:, 40] += 5000
    put(tmp_path / "a.h5", rows)
    with ActivationStore(tmp_path / "a.h5") as store:
        found = store.statistics()
    assert found.outlier_features().tolist() == [40, 7]
    assert found.outlier_features(1e5).tolist() == []
