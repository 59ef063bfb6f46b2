"""Published methods against their papers: each formula by a slow, obvious computation, and what it finds and does not."""

import sys

import numpy as np
import pytest
from dumps import planted, recall
from scipy.linalg import expm, inv, sqrtm
from sklearn.metrics import roc_auc_score

import defenses

RNG = np.random.default_rng


def score(name, features, labels, logits=None, poison_fraction=0.1, **options):
    if logits is None:
        logits = np.zeros((len(labels), max(labels) + 1))
    return defenses.score(defenses.load(name, **options), features, logits, labels, poison_fraction, seed=0)


def module(name):
    return sys.modules[type(defenses.load(name)).__module__]


def within_target(dump, scores):
    """AUROC among the rows of the target class, 0."""
    rows = dump.labels == 0
    return roc_auc_score(dump.poisoned[rows], scores[rows])


def scores_of(name, dump):
    return score(name, dump.features, dump.labels, dump.logits, dump.poison_fraction)


# The minority assumption: as many of these as are poisoned are found at 20 % of the class, and clean rows come first
# at 83 %.
@pytest.mark.parametrize("name", ["robust_mahalanobis", "scan", "spectre"])
def test_poison_is_taken_for_the_minority(name):
    few, most = planted(share=0.2, n=2000), planted(share=0.83, n=2000)
    assert within_target(few, scores_of(name, few)) > 0.99
    assert within_target(most, scores_of(name, most)) < 0.05


@pytest.mark.parametrize("name", ["beatrix", "scan", "spectre"])
def test_the_target_class_comes_first(name):
    dump = planted(share=0.1, n=4000, classes=10)
    defense = defenses.load(name)
    scores = defenses.score(defense, dump.features, dump.logits, dump.labels, dump.poison_fraction, seed=0)
    assert list(defense.suspected_classes_) == [0]
    assert scores[dump.labels == 0].min() >= scores[dump.labels != 0].max()


def test_beatrix_loses_the_class_when_poison_sets_the_range():
    few, most = planted(share=0.2), planted(share=0.6)
    assert recall(few, scores_of("beatrix", few)) > 0.95
    assert recall(most, scores_of("beatrix", most)) < 0.05


@pytest.mark.parametrize("name", ["isolation_forest", "local_outlier_factor", "nearest_neighbours"])
def test_densities_find_scattered_rows_and_miss_a_cluster(name):
    rng = RNG(0)
    features, odd = rng.normal(size=(600, 8)) + 5, np.arange(600) < 30
    apart = features.copy()
    apart[odd] += 30 * rng.normal(size=(30, 8))
    assert roc_auc_score(odd, score(name, apart, np.zeros(600, int))) > 0.95
    collapsed = features.copy()
    half = np.arange(600) < 300
    collapsed[half] = 7 + 0.01 * rng.normal(size=(300, 8))
    assert roc_auc_score(half, score(name, collapsed, np.zeros(600, int))) < 0.6


def test_spectre_scores_by_quantum_entropy():
    rng = RNG(0)
    rows = rng.normal(size=(60, 4)) @ rng.normal(size=(4, 4)) + 3
    rows[:10] += 6
    left = np.arange(10, 60)
    mean, covariance = rows[left].mean(axis=0), np.cov(rows[left].T, bias=True)
    white = np.stack([inv(sqrtm(covariance)) @ (row - mean) for row in rows])
    spread = np.cov(white.T, bias=True)
    weight = expm(4 * (spread - np.eye(4)) / (np.linalg.norm(spread, 2) - 1))
    expected = [row @ weight @ row / np.trace(weight) for row in white]
    scores, mean_score = module("spectre")._que(rows, left)
    np.testing.assert_allclose(scores, expected, rtol=1e-8)
    np.testing.assert_allclose(mean_score, np.trace(spread @ weight) / np.trace(weight), rtol=1e-8)


def test_spectre_without_excess_weighs_all_directions_alike():
    rows = RNG(0).normal(size=(60, 3))
    white = (rows - rows.mean(axis=0)) @ inv(sqrtm(np.cov(rows.T, bias=True)))
    np.testing.assert_allclose(module("spectre")._que(rows, np.arange(60))[0], (white**2).mean(axis=1), rtol=1e-8)


def test_spectre_filters_by_the_leading_polynomial():
    rows = RNG(0).normal(size=(300, 3))
    rows[:30, 0] += 4
    white = (rows - rows.mean(axis=0)) @ inv(sqrtm(np.cov(rows.T, bias=True)))
    products = np.stack([np.outer(row, row).ravel() for row in white])
    matrix = np.linalg.eigh(np.cov(products.T, bias=True))[1][:, -1].reshape(3, 3)
    expected = np.array([(row @ matrix @ row - np.trace(matrix)) / np.sqrt(2) for row in white])
    found = module("spectre")._leading_polynomial(white)
    assert abs(np.corrcoef(found, expected)[0, 1]) > 0.99
    assert expected.var() * 0.99 < found.var() < expected.var() * (1 + 1e-9)


def test_spectre_filter_takes_off_poison_and_stops():
    rows = RNG(0).normal(size=(1000, 4))
    assert len(module("spectre")._filter(rows, 0.05, 100)) == 1000  # Gaussian: nothing to take off
    rows[:50, 0] += 12
    left = module("spectre")._filter(rows, 0.05, 100)
    assert len(left) >= 900
    assert (left < 50).sum() == 0


def test_spectre_says_how_many_and_leaves_half_of_a_class():
    dump = planted(share=0.1, n=1000)
    defense = defenses.load("spectre")
    defenses.score(defense, dump.features, dump.logits, dump.labels, 0.02)
    assert defense.n_suspected_ == 30  # 1.5 x 0.02 x 1000
    defenses.score(defense, dump.features, dump.logits, dump.labels, 0.5)
    assert defense.n_suspected_ == 100  # of the 200 rows of the class


def test_spectre_evidence_does_not_grow_as_classes_shrink():
    evidence = [module("spectre")._score_class(RNG(n).normal(size=(n, 64)), 72, 0)[0] for n in (140, 214, 500, 1000)]
    assert max(evidence) < 3 * min(evidence)  # undivided, they fall from above 5 to 1.4
    np.testing.assert_allclose(evidence[2:], 1, atol=0.25)


def test_spectre_puts_a_large_poisoned_class_before_small_clean_ones():
    labels = np.r_[np.zeros(400, int), np.repeat(np.arange(1, 5), 140)]
    features, poisoned = RNG(0).normal(size=(960, 64)), np.arange(960) < 72
    features[poisoned, 0] += 6
    defense = defenses.load("spectre")
    scores = defenses.score(defense, features, np.zeros((960, 5)), labels, 72 / 960, seed=0)
    assert list(defense.suspected_classes_) == [0]
    assert poisoned[np.argsort(-scores)[:72]].mean() > 0.9


def test_spectre_draws_from_its_seed_alone():
    dump = planted(share=0.1)
    evidence = [module("spectre")._score_class(dump.features[:300].astype(float), 20, seed)[0] for seed in (1, 1, 2)]
    assert evidence[0] == evidence[1] != evidence[2]


def test_scan_decomposes_as_the_paper_does():
    # Means of classes and S_e by matrix inverses, from the rows; _decompose starts from class means where S_e is I.
    rng = RNG(0)
    labels = np.repeat(np.arange(6), [5, 6, 7, 8, 9, 10])
    rows = (rng.normal(size=(6, 3)) @ np.diag([3, 1, 0.3]))[labels] + rng.normal(size=(45, 3))
    rows -= rows.mean(axis=0)
    sizes, means = np.bincount(labels), np.stack([rows[labels == c].mean(axis=0) for c in range(6)])
    within = (rows - means[labels]).T @ (rows - means[labels]) / 45
    rows = rows @ inv(sqrtm(within))
    means = np.stack([rows[labels == c].mean(axis=0) for c in range(6)])

    between, noise = means.T @ means / 6, np.eye(3)
    for _ in range(20):
        expected = np.stack([n * between @ inv(n * between + noise) @ mean for n, mean in zip(sizes, means)])
        between = expected.T @ expected / 6
        noise = (rows - expected[labels]).T @ (rows - expected[labels]) / 45
    found_means, found_noise = module("scan")._decompose(means, sizes)
    np.testing.assert_allclose(found_means, expected, atol=1e-3)
    np.testing.assert_allclose(found_noise, noise, atol=1e-3)


def test_scan_splits_and_tests_a_class():
    # On a line: groups {0, 1, 2} and {10, 12}, means 1 and 11; one group at 5. Squared distances 25, 16, 9, 25, 49, sum
    # 124, fall to 1, 0, 1, 1, 1, sum 4. The row 2 is 81 from the smaller group's mean and 1 from the larger one's.
    white = np.array([[0.0], [1], [2], [10], [12]])
    small = module("scan")._split(white)
    np.testing.assert_array_equal(small, [False, False, False, True, True])
    evidence, ratios = module("scan")._test(white, small, np.array([5.0]))
    assert evidence == pytest.approx(120)
    np.testing.assert_allclose(ratios, [1 - 121, 0 - 100, 1 - 81, 81 - 1, 121 - 1])


@pytest.mark.parametrize("shape", [(80, 5), (30, 50)])
def test_scan_leaves_each_row_with_the_nearer_mean(shape):
    white = RNG(0).normal(size=shape)
    white[: shape[0] // 4, 0] += 6
    small = module("scan")._split(white)
    centres = [white[small].mean(axis=0), white[~small].mean(axis=0)]
    nearer = np.array([np.argmin([np.linalg.norm(row - centre) for centre in centres]) == 0 for row in white])
    np.testing.assert_array_equal(small, nearer)
    assert small.sum() <= len(white) / 2


def test_scan_suspects_no_class_of_a_clean_set():
    dump = planted(share=0.0, n=4000, classes=10)
    defense = defenses.load("scan")
    defenses.score(defense, dump.features, dump.logits, dump.labels, None)
    assert defense.suspected_classes_ == []
    assert defense.n_suspected_ == 0


def test_beatrix_deviations_are_those_of_all_orders():
    rng = RNG(0)
    reference, values = rng.uniform(1, 2, size=(21, 4)), rng.uniform(0.1, 12, size=(9, 4))
    expected = np.zeros(9)
    n_terms = 0
    for order in range(1, 9):
        for i in range(4):
            for j in range(i, 4):
                usual = (reference[:, i] ** order * reference[:, j] ** order) ** (1 / order)
                median = np.median(usual)
                reach = 10 * np.median(np.abs(usual - median))
                lower, upper = median - reach, median + reach
                least = reference.mean() ** 2
                n_terms += 1
                for row in range(9):
                    entry = (values[row, i] ** order * values[row, j] ** order) ** (1 / order)
                    expected[row] += max(lower - entry, 0) / max(abs(lower), least)
                    expected[row] += max(entry - upper, 0) / max(abs(upper), least)
    found = module("beatrix")._deviations(values.astype(np.float32), reference.astype(np.float32))
    assert expected.max() > 0
    np.testing.assert_allclose(found, expected / n_terms, rtol=1e-4, atol=1e-6)


def test_beatrix_judges_a_class_by_its_discrepancy():
    rng = RNG(0)
    values, deviations = rng.normal(size=(12, 3)), np.arange(12.0)
    values[8:] += 2
    suspects = deviations > 7
    squares = ((values[:, None] - values) ** 2).sum(axis=2)
    bandwidth = np.median(squares)
    kernel = np.exp(-squares / bandwidth) + np.exp(-squares / (bandwidth / 2))
    mmd = kernel[8:, 8:].mean() + kernel[:8, :8].mean() - 2 * kernel[8:, :8].mean()
    found = module("beatrix")._discrepancy(values, deviations, suspects)
    assert found == pytest.approx(4 * 8 / 12 * mmd, rel=1e-9)
    assert module("beatrix")._discrepancy(values, deviations, deviations > 10) == 0  # one suspect is no group


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_beatrix_discrepancy_of_noise_does_not_grow_with_the_class(share):
    found = []
    for n_rows in (600, 6000):
        values, deviations = RNG(n_rows).normal(size=(n_rows, 24)), RNG(n_rows + 1).uniform(size=n_rows)
        found.append(module("beatrix")._discrepancy(values, deviations, deviations > 1 - share))
    np.testing.assert_allclose(found, 1.5, atol=0.4)


def test_beatrix_suspects_no_class_where_most_have_no_suspects():
    """One class of noise is flagged in part, the others not at all: the MAD of R is 0, and no measure of what is far."""
    labels = np.arange(1000) % 5
    features = 5 + RNG(0).uniform(-0.1, 0.1, size=(1000, 8))  # 10 MADs are far beyond what any product reaches
    features[labels == 2] = 5 + RNG(1).standard_t(3, size=(200, 8))
    defense = defenses.load("beatrix")
    scores = defenses.score(defense, features, np.zeros((1000, 5)), labels, None)
    assert scores[labels == 2].min() >= scores[labels != 2].max()  # R > 0 in this class only
    assert defense.suspected_classes_ == []
    assert defense.n_suspected_ == 0


def test_beatrix_chooses_features_within_the_class():
    """The trigger's feature varies less than 299 others over all rows, since classes lie apart in these."""
    labels, poisoned = np.arange(1000) % 5, np.zeros(1000, dtype=bool)
    features = RNG(0).normal(size=(1000, 300)) + RNG(1).choice([-5, 5], size=(5, 300))[labels]
    features[:, 0] = RNG(2).normal(size=1000)
    poisoned[np.flatnonzero(labels == 3)[:20]] = True
    features[poisoned, 0] += 20
    scores = score("beatrix", features, labels)
    assert roc_auc_score(poisoned[labels == 3], scores[labels == 3]) > 0.99


def test_nearest_neighbours():
    # Directions: east, north, south-west, west, and a row of zeros in the middle. Lengths do not count.
    features = np.array([[2.0, 0], [0, 3], [-1, -1], [-5, 0], [0, 0]])
    diagonal = np.sqrt((1 - np.sqrt(0.5)) ** 2 + 0.5)  # from west to south-west
    expected = [np.sqrt(2), np.sqrt(2), 1, 1, 1]  # to the second nearest; every row has the middle at 1
    np.testing.assert_allclose(score("nearest_neighbours", features, [0] * 5, n_neighbors=2), expected, rtol=1e-6)
    expected = [1, 1, diagonal, diagonal, 1]
    np.testing.assert_allclose(score("nearest_neighbours", features, [0] * 5, n_neighbors=1), expected, rtol=1e-6)


def test_local_outlier_factor():
    rows, k = RNG(0).normal(size=(30, 3)).astype(np.float32).astype(np.float64), 4
    distances = np.linalg.norm(rows[:, None] - rows, axis=2)
    neighbours = np.argsort(distances, axis=1)[:, 1 : k + 1]
    reach = [distances[i, neighbours[i, -1]] for i in range(30)]
    density = [1 / np.mean([max(reach[j], distances[i, j]) for j in neighbours[i]]) for i in range(30)]
    expected = [np.mean([density[j] for j in neighbours[i]]) / density[i] for i in range(30)]
    np.testing.assert_allclose(score("local_outlier_factor", rows, [0] * 30, n_neighbors=k), expected, rtol=1e-4)


def test_local_outlier_factor_counts_equal_rows_once():
    rows = RNG(0).normal(size=(31, 3))
    rows[30] = [0.0, -0.0, 0.0]
    repeated = np.concatenate([rows, np.repeat([[0.0, 0.0, -0.0]], 29, axis=0)])
    scores = score("local_outlier_factor", repeated, [0] * 60)
    np.testing.assert_allclose(scores[:31], score("local_outlier_factor", rows, [0] * 31), rtol=1e-6)
    np.testing.assert_array_equal(scores[30:], scores[30])
    assert scores.max() < 5
    np.testing.assert_array_equal(score("local_outlier_factor", np.ones((30, 3)), [0] * 30), 1)


def test_robust_mahalanobis_measures_by_the_clean_rows():
    rng = RNG(0)
    rows = rng.normal(size=(2000, 4)) @ rng.normal(size=(4, 4))
    rows[:400] += 30
    clean = rows[400:]
    difference = rows - clean.mean(axis=0)
    expected = (difference @ inv(np.cov(clean.T)) * difference).sum(axis=1) / 4
    found = score("robust_mahalanobis", rows, [0] * 2000)
    # The estimate stands on the 97.5 % of clean rows nearest to the centre, hence a few per cent.
    np.testing.assert_allclose(found, expected, rtol=0.25)
    np.testing.assert_allclose(np.median(found[400:]), np.median(expected[400:]), rtol=0.1)


def test_robust_mahalanobis_where_half_the_rows_are_one():
    rows = RNG(0).normal(size=(100, 3))
    rows[:60] = 1.0
    scores = score("robust_mahalanobis", rows, [0] * 100)
    assert np.isfinite(scores).all()
    assert scores[:60].max() <= scores[60:].max()


def test_self_confidence():
    # p of the label: 0.8, 0.6 in class 0 (threshold 0.7) and 0.5, 0.3, 0.1 in class 1 (threshold 0.3).
    p = np.array([[0.8, 0.1, 0.1], [0.6, 0.4, 0], [0.2, 0.5, 0.3], [0.7, 0.3, 0], [0.1, 0.1, 0.8]])
    labels = [0, 0, 1, 1, 1]
    logits = np.log(np.maximum(p, 1e-30))
    scores = score("self_confidence", np.ones((5, 1)), labels, logits)
    np.testing.assert_allclose(scores, [-0.1, 0.1, -0.2, 0, 0.2], atol=1e-6)
    # The adjusted quality of the paper, row by row; the threshold of a class without rows does not change the order.
    adjusted = p - [0.7, 0.3, 0.5] + 0.7
    quality = (adjusted / adjusted.sum(axis=1, keepdims=True))[np.arange(5), labels]
    np.testing.assert_array_equal(np.argsort(-quality), np.argsort(scores))


def test_self_confidence_is_not_the_confidence_filter():
    dump = planted()
    assert within_target(dump, scores_of("confidence_filter", dump)) > 0.95
    assert within_target(dump, scores_of("self_confidence", dump)) < 0.05


def test_self_confidence_keeps_its_order_where_p_rounds_to_0_or_1():
    # From the surest to the least sure of label 0; in float64, exp(-40) is nothing beside 1.
    gaps = [3e4, 90, 60, 50, 40, 1, -1, -40, -60, np.nextafter(np.float32(-90), np.float32(0)), -90, -3e4]
    logits = np.array([[gap, 0] for gap in gaps])
    scores = score("self_confidence", np.ones((12, 1)), [0] * 12, logits)
    assert (np.diff(scores) > 0).all()
    doubt = [0, 0, 0, 0, 0, 1 / (1 + np.e), 1 / (1 + 1 / np.e), 1, 1, 1, 1, 1]
    np.testing.assert_allclose(scores, np.array(doubt) - np.mean(doubt), atol=1e-6)


def test_self_confidence_with_one_class():
    np.testing.assert_array_equal(score("self_confidence", np.ones((2, 1)), [0, 0], np.array([[3.0], [4.0]])), [0, 0])


class Unreadable:
    """Features that may be looked at in slices once, for the check, and never as a whole."""

    read_direct = None  # tells a data set

    def __init__(self, values):
        self.values, self.shape, self.dtype, self.n_read = values, values.shape, values.dtype, 0

    def __getitem__(self, rows):
        self.n_read += len(self.values[rows])
        return self.values[rows]

    def __array__(self, *arguments, **keywords):
        raise AssertionError("the features are copied")


@pytest.mark.parametrize("name", ["confidence_filter", "self_confidence"])
def test_confidence_is_found_without_the_features(name):
    dump = planted()
    features = Unreadable(dump.features)
    scores = defenses.score(defenses.load(name), features, dump.logits, dump.labels, dump.poison_fraction)
    assert features.n_read == 1000  # by the check for NaN
    np.testing.assert_array_equal(scores, scores_of(name, dump))


@pytest.mark.parametrize("value", [0, -1, 2.5, "10", True])
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("local_outlier_factor", "n_neighbors"),
        ("nearest_neighbours", "n_neighbors"),
        ("robust_mahalanobis", "n_directions"),
    ],
)
def test_options_are_refused(name, option, value):
    with pytest.raises(defenses.DefenseError, match="expected an integer of at least 1"):
        defenses.load(name, **{option: value})
