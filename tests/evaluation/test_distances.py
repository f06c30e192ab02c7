"""FID, KID, Inception Score, precision and recall: closed forms, and what other libraries find."""

import numpy as np
import pytest

from cogview2_jax.evaluation import distances
from cogview2_jax.evaluation.distances import Statistics

RNG = np.random.default_rng(0)


def features(rows: int, width: int = 24, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Float32 features as a network makes them: not negative, far from zero, correlated."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, width)) @ np.random.default_rng(99).random((width, width))
    return (np.abs(mixed + 3 + shift) / 8).astype(np.float32)


def covariance(width: int, seed: int) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((width, width))
    return root @ root.T


# --- Fréchet distance -----------------------------------------------------------------------------


def test_gaussians_of_one_axis():
    one = Statistics(9, np.array([1.0]), np.array([[4.0]]))
    other = Statistics(9, np.array([3.5]), np.array([[9.0]]))
    assert distances.frechet_distance(one, other) == pytest.approx(2.5**2 + (2 - 3) ** 2, abs=1e-9)


def test_gaussians_that_share_their_axes():
    axes, _ = np.linalg.qr(RNG.standard_normal((40, 40)))
    sizes = RNG.random((2, 40)) * 5
    one, other = (Statistics(99, RNG.standard_normal(40), (axes * each) @ axes.T) for each in sizes)
    expected = ((one.mean - other.mean) ** 2).sum()
    expected += ((np.sqrt(sizes[0]) - np.sqrt(sizes[1])) ** 2).sum()
    assert distances.frechet_distance(one, other) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_gaussians_of_two_axes_that_do_not_commute(seed):
    first, second = covariance(2, seed), covariance(2, seed + 50)
    product = first @ second
    # The trace of the root of a 2×2 matrix, from its trace and determinant.
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(first) + np.trace(second) - 2 * root
    zero = np.zeros(2)
    found = distances.frechet_distance(Statistics(9, zero, first), Statistics(9, zero, second))
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_distance_of_a_set_from_itself_is_zero_and_the_order_does_not_matter():
    one, other = (distances.statistics([features(500, seed=seed)]) for seed in (1, 2))
    assert distances.frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    there, back = (distances.frechet_distance(*pair) for pair in ((one, other), (other, one)))
    assert there == pytest.approx(back, rel=1e-9) and there > 1e-3


def test_fewer_pictures_than_features():
    few, many = features(20, 64, seed=1), features(900, 64, seed=2)
    made = distances.statistics([few])
    assert not made.enough and distances.statistics([many]).enough
    assert np.linalg.matrix_rank(made.covariance) == 19
    found = distances.frechet_distance(made, distances.statistics([many]))
    whole = distances.frechet_distance(
        distances.statistics([features(900, 64, seed=1)]), distances.statistics([many])
    )
    assert np.isfinite(found) and found > 2 * whole  # the bias that `enough` warns of


def test_two_encoders_are_not_compared():
    one, other = (distances.statistics([features(50, width)]) for width in (8, 9))
    with pytest.raises(ValueError, match="8 and 9 values: two encoders"):
        distances.frechet_distance(one, other)


# --- Statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_statistics_in_parts_are_those_of_the_whole(size):
    whole = features(300) + 100
    made = distances.statistics(whole[begin : begin + size] for begin in range(0, 300, size))
    assert made.num_pictures == 300
    np.testing.assert_allclose(made.mean, whole.mean(0, dtype=float), rtol=1e-12)
    np.testing.assert_allclose(made.covariance, np.cov(whole, rowvar=False), rtol=1e-9)


def test_a_part_without_rows_changes_nothing():
    whole = features(30)
    parts = [whole[:0], whole[:10], whole[:0], whole[10:]]
    found, expected = distances.statistics(parts), distances.statistics([whole])
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-12)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_covariance_of_one_picture_is_refused(rows):
    with pytest.raises(ValueError, match=f"at least two pictures: got {rows}"):
        distances.statistics([features(rows)])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused_by_number(value):
    broken = features(40)
    broken[7, 3] = broken[9, 0] = value
    for measure in (
        lambda: distances.statistics([broken]),
        lambda: distances.inception_score(broken),
        lambda: distances.kernel_distance(broken, features(40), size=10),
        lambda: distances.precision_recall(features(40), broken),
    ):
        with pytest.raises(
            ValueError, match="of 2 of 40 pictures are not finite, first of number 7"
        ):
            measure()


def test_features_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"must be \[n, d\]: got \[2, 3, 4\]"):
        distances.statistics([np.zeros((2, 3, 4))])


def test_a_file_of_statistics(tmp_path):
    made = distances.statistics([features(60)])
    file = tmp_path / "a.npz"
    distances.save_statistics(file, made)
    read = distances.load_statistics(file)
    assert read.num_pictures == 60
    np.testing.assert_array_equal(read.mean, made.mean)
    np.testing.assert_array_equal(read.covariance, made.covariance)
    np.savez(tmp_path / "theirs.npz", mu=made.mean, sigma=made.covariance)  # as pytorch-fid's
    assert distances.load_statistics(tmp_path / "theirs.npz").num_pictures == 0
    assert [each.name for each in tmp_path.iterdir() if "partial" in each.name] == []


@pytest.mark.parametrize("damage", ["cut", "text", "names", "shape", "pickle", "infinite"])
def test_a_damaged_file_of_statistics_is_refused(damage, tmp_path):
    file = tmp_path / "a.npz"
    mean, sigma = np.zeros(4), np.eye(4)
    match damage:
        case "cut":
            distances.save_statistics(file, Statistics(9, mean, sigma))
            file.write_bytes(file.read_bytes()[:-40])
        case "text":
            file.write_text("mu sigma")
        case "names":
            np.savez(file, mean=mean)
        case "shape":
            np.savez(file, mu=mean, sigma=np.eye(3))
        case "pickle":
            np.savez(file, mu=np.array([{}], object), sigma=sigma)
        case "infinite":
            np.savez(file, mu=mean + np.nan, sigma=sigma)
    with pytest.raises(ValueError) as caught:
        distances.load_statistics(file)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


# --- Inception Score, KID, precision and recall ---------------------------------------------------


def test_the_inception_score_of_known_distributions():
    certain = np.kron(np.eye(10), np.ones((8, 1))) * 1000  # each class as often, each sure
    assert distances.inception_score(certain, splits=1).mean == pytest.approx(10)
    assert distances.inception_score(np.zeros((50, 10))).mean == pytest.approx(1)
    with pytest.raises(ValueError, match="10 splits need as many pictures: got 4"):
        distances.inception_score(np.zeros((4, 10)))


def test_the_kernel_distance_is_not_biased_and_grows_with_the_distance():
    one = features(2000, seed=1)
    same = distances.kernel_distance(one, features(2000, seed=2), size=200)
    other = distances.kernel_distance(one, features(2000, seed=2, shift=1.0), size=200)
    assert abs(same.mean) < 4 * same.deviation / 10  # of 100 subsets
    assert other.mean > 10 * abs(same.mean)
    with pytest.raises(ValueError, match="a subset of 1000 needs as many"):
        distances.kernel_distance(one, one[:10])


def test_precision_and_recall_of_sets_that_meet_in_part():
    line = np.arange(100.0)[:, None]
    half = line[:50]
    assert distances.precision_recall(half, line) == (1.0, 0.53)  # 3 beyond its end are near
    assert distances.precision_recall(line, half) == (0.53, 1.0)
    assert distances.precision_recall(half, half + 1000) == (0.0, 0.0)
    with pytest.raises(ValueError, match="3 neighbours need more pictures"):
        distances.precision_recall(line[:3], line)


def test_precision_and_recall_do_not_depend_on_blocks(monkeypatch):
    pair = features(300, seed=1), features(200, seed=2, shift=0.3)
    whole = distances.precision_recall(*pair)
    monkeypatch.setattr(distances, "_BLOCK", 37)
    assert distances.precision_recall(*pair) == whole and 0 < whole.recall < 1


# --- Other libraries, where they are --------------------------------------------------------------


def test_fid_is_that_of_pytorch_fid(monkeypatch):
    pytest.importorskip("torch")
    theirs = pytest.importorskip("pytorch_fid.fid_score")
    root = theirs.linalg.sqrtm
    # pytorch-fid 0.3.0 passes an argument that scipy no longer has.
    monkeypatch.setattr(theirs.linalg, "sqrtm", lambda product, disp: (root(product), None))
    pair = features(700, 64, seed=1), features(900, 64, seed=2, shift=0.2)
    expected = theirs.calculate_frechet_distance(
        *(
            moment
            for each in pair
            for moment in (each.mean(0, dtype=float), np.cov(each, rowvar=False))
        )
    )
    found = distances.frechet_distance(*(distances.statistics([each]) for each in pair))
    assert found == pytest.approx(expected, abs=1e-4)


def test_all_measures_are_those_of_torch_fidelity():
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    pair = features(1200, 64, seed=1), features(1100, 64, seed=2, shift=0.2)
    theirs = [torch.from_numpy(each) for each in pair]
    fid = metric_fid.fid_statistics_to_metric(
        *(metric_fid.fid_features_to_statistics(each) for each in theirs), False
    )
    ours = distances.frechet_distance(*(distances.statistics([each]) for each in pair))
    assert ours == pytest.approx(fid["frechet_inception_distance"], abs=1e-4)

    score = metric_isc.isc_features_to_metric(theirs[0])
    found = distances.inception_score(pair[0])
    assert found.mean == pytest.approx(score["inception_score_mean"], abs=1e-4)
    assert found.deviation == pytest.approx(score["inception_score_std"], abs=1e-4)

    kid = metric_kid.kid_features_to_metric(*theirs, verbose=False)
    distance = distances.kernel_distance(*pair)
    assert distance.mean == pytest.approx(kid["kernel_inception_distance_mean"], abs=1e-4)
    assert distance.deviation == pytest.approx(kid["kernel_inception_distance_std"], abs=1e-4)

    shares = metric_prc.prc_features_to_metric(*theirs, verbose=False)
    both = distances.precision_recall(*pair)
    assert both == pytest.approx((shares["precision"], shares["recall"]), abs=1e-4)
    assert 0 < both.precision < 1
