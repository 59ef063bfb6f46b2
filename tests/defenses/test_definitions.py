"""Each baseline against its definition, on matrices small enough to be worked out by hand."""

import sys

import numpy as np
import pytest
from dumps import planted
from sklearn.cluster import KMeans
from sklearn.decomposition import FastICA
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

import defenses


def score(name, features, labels, logits=None, seed=0, **options):
    if logits is None:
        logits = np.zeros((len(labels), max(labels) + 1))
    return defenses.score(defenses.load(name, **options), features, logits, labels, None, seed=seed)


def test_confidence_filter():
    # exp(logits) = (1, 2, 5), sum 8. Label 2: p = 5/8, odds 5/3, log 0.5108. Label 1: p = 2/8, odds 1/3, log -1.0986.
    logits = np.log([[1, 2, 5], [1, 2, 5]])
    scores = score("confidence_filter", np.ones((2, 1)), [2, 1], logits)
    np.testing.assert_allclose(scores, [0.5108256, -1.0986123], rtol=1e-5)


def test_confidence_filter_still_ranks_where_confidence_rounds_to_one():
    # With two classes the log-odds is the difference of the two logits; 1 - p is exp(-50) and less, and 1 + exp(-50)
    # is 1 in float64. Exponentials of 2000 overflow.
    logits = np.array([[50, 0], [60, 0], [1000, -1000], [-1000, 1000]])
    scores = score("confidence_filter", np.ones((4, 1)), [0, 0, 0, 0], logits)
    np.testing.assert_allclose(scores, [50, 60, 2000, -2000], rtol=1e-12)


def test_confidence_filter_with_one_class():
    np.testing.assert_array_equal(score("confidence_filter", np.ones((2, 1)), [0, 0], np.array([[3.0], [4.0]])), [0, 0])


# Class 0 (four rows). About its mean (12, -5) the rows are -3, 1, 1, 1 along (0.6, 0.8) and 0, 1, -1, 0 along
# (-0.8, 0.6). The two sets of coordinates are orthogonal (-3 * 0 + 1 * 1 - 1 * 1 + 1 * 0 = 0) with sums of squares 12
# and 2, so (0.6, 0.8) is the top singular direction and the scores are the squares 9, 1, 1, 1.
# Not centred, the top direction would be near the mean and the scores near |(12, -5)|^2 = 169.
SPECTRAL_ROWS = [[10.2, -7.4], [11.8, -3.6], [13.4, -4.8], [12.6, -4.2]]


def test_spectral_signature():
    # Class 1 has one row, which is its own mean: 0. Class 2 has rows 4 apart, each 2 from the mean: 4 and 4.
    features = [*SPECTRAL_ROWS, [7, 7], [0, 1], [0, 5]]
    scores = score("spectral_signature", np.array(features), [0, 0, 0, 0, 1, 2, 2])
    np.testing.assert_allclose(scores, [9, 1, 1, 1, 0, 4, 4], rtol=1e-5)


def test_spectral_signature_with_more_dimensions_than_rows():
    features = np.full((4, 6), 3.0)  # constant columns add nothing to the centred rows
    features[:, [1, 4]] = SPECTRAL_ROWS
    np.testing.assert_allclose(score("spectral_signature", features, [0] * 4), [9, 1, 1, 1], rtol=1e-5)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_spectral_signature_is_the_full_svd(shape):
    features = np.random.default_rng(0).normal(loc=5, size=shape).astype(np.float32).astype(np.float64)
    centred = features - features.mean(axis=0)
    expected = (centred @ np.linalg.svd(centred)[2][0]) ** 2
    np.testing.assert_allclose(score("spectral_signature", features, [0] * len(features)), expected, rtol=1e-8)


def test_activation_clustering():
    # One dimension, where distances compare as they do before whitening.
    # Class 0: 0, 1, 2, 1 (centre 1) and 10, 12 (centre 11), n = 6. The row 10 is 1 from its own centre and 9 from the
    # other, t = (9 - 1) / 9 = 8/9; the row 12 has t = (11 - 1) / 11 = 10/11; 0 has -10/11, both 1s have -1, 2 has -8/9.
    # Smaller cluster, m = 2: 1 - 2/6 + t/12 = 2/3 + 2/27 = 20/27 and 2/3 + 5/66 = 49/66.
    # Larger cluster, m = 4: 1 - 4/6 + t/12 = 1/3 - 5/66 = 17/66, 1/3 - 1/12 = 1/4, 1/3 - 2/27 = 7/27.
    # Class 1 falls into two and two: 1/2. Class 2 has fewer than n_components + 2 = 3 rows, class 3 equal ones: 0.
    # Silhouettes, 1 - (mean distance in the cluster) / (mean distance to the other), of class 0: 29/33 for 0, 14/15 for
    # both 1s, 23/27 for 2, 7/9 for 10, 9/11 for 12, mean 0.866. Of class 1: 19/21 twice and 17/19 twice, mean 0.900. Two
    # classes are below class 0, three below class 1; the smaller cluster gets the number of classes, 4, on top.
    values = [0, 10, 1, 2, 12, 1, 0, 1, 10, 11, 5, 9, 4, 4, 4]
    labels = [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3]
    features = np.outer(values, [0.6, 0.8]) + [100, 0]
    defense = defenses.load("activation_clustering", n_components=1)
    scores = defenses.score(defense, features, np.zeros((15, 4)), labels, None, seed=0)
    term = [17 / 66, 20 / 27, 1 / 4, 7 / 27, 49 / 66, 1 / 4, 0.5, 0.5, 0.5, 0.5, 0, 0, 0, 0, 0]
    tiers = [2, 2 + 4, 2, 2, 2 + 4, 2, 3, 3, 3, 3, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(scores, np.add(tiers, term), rtol=1e-5)
    assert defense.suspected_classes_ == [0, 1]  # silhouettes above 0.10
    assert defense.n_suspected_ == 2  # class 1 has no smaller cluster


@pytest.mark.filterwarnings("ignore:FastICA did not converge")
@pytest.mark.parametrize("d", [24, 300], ids=["tall", "wide"])
def test_activation_clustering_is_the_paper_s_recipe(d):
    """FastICA and 2-means as scikit-learn has them, on a class that falls apart: the same clusters, the same scores."""
    dump = planted(share=0.3, n=1000, d=d)
    rows = dump.labels == 0
    scores = score("activation_clustering", dump.features[rows], dump.labels[rows])

    features = dump.features[rows].astype(np.float64)
    reduced = FastICA(10, whiten="unit-variance", random_state=1, max_iter=1000).fit_transform(features)
    clusters = KMeans(2, n_init=100, random_state=1).fit(reduced)
    small = clusters.labels_ == np.bincount(clusters.labels_).argmin()
    np.testing.assert_array_equal(small, dump.poisoned[rows])
    np.testing.assert_array_equal(scores > 1, small)
    to_small, to_large = (np.linalg.norm(reduced - reduced[part].mean(axis=0), axis=1) for part in (small, ~small))
    t = (to_large - to_small) / np.maximum(to_large, to_small)
    np.testing.assert_allclose(scores, small + 1 - (np.where(small, 60, 140) - t / 2) / 200, rtol=1e-4)


@pytest.mark.parametrize("d", [20, 300], ids=["tall", "wide"])
def test_activation_clustering_drops_directions_without_variance(d):
    """Two dimensions spread over many: rounding to float32 leaves noise in the others, which must not be whitened."""
    plane = planted(n=1000, d=24).features[:200, -2:]
    spread = plane @ np.random.default_rng(0).normal(size=(2, d)).astype(np.float32)
    expected = score("activation_clustering", plane, [0] * 200, n_components=2)
    np.testing.assert_allclose(score("activation_clustering", spread, [0] * 200), expected, rtol=1e-4)


def test_activation_clustering_does_not_move_with_the_threads():
    # Many classes, each of several of the 256-row blocks that threads share out: sums in another order change a last
    # bit in some of them.
    features, labels = np.random.default_rng(0).normal(size=(16000, 10)), np.arange(16000) % 16
    with threadpool_limits(6, user_api="openmp"):
        many = score("activation_clustering", features, labels)
    with threadpool_limits(1, user_api="openmp"):
        one = score("activation_clustering", features, labels)
    np.testing.assert_array_equal(many, one)


def test_activation_clustering_puts_every_smaller_cluster_first():
    dump = planted(n=1000)
    scores = score("activation_clustering", dump.features, dump.labels, dump.logits)
    for label in range(5):
        of_class = scores[dump.labels == label]
        assert 0 < (of_class > 5).sum() < (of_class < 5).sum()


def test_activation_clustering_puts_a_clear_split_before_an_unbalanced_one():
    """40 % of class 0 lies apart; of each other class, one skewed group, 2-means cuts less than 40 % off."""
    rng = np.random.default_rng(0)
    features, labels = rng.beta(1, 3, size=(1000, 2)), np.arange(1000) % 5
    poisoned = (labels == 0) & (np.arange(1000) < 400)
    features[labels == 0] = rng.normal(size=(200, 2)) + 10 * poisoned[labels == 0, None]
    scores = score("activation_clustering", features, labels, n_components=2)
    np.testing.assert_array_equal(np.sort(np.argsort(-scores)[:80]), np.flatnonzero(poisoned))


def test_activation_clustering_suspects_by_the_paper_s_threshold():
    dump = planted(share=0.15, n=1000, target=3)
    defense = defenses.load("activation_clustering")
    scores = defenses.score(defense, dump.features, dump.logits, dump.labels, None, seed=0)
    assert defense.suspected_classes_ == [3]
    assert defense.n_suspected_ == 30
    assert scores[dump.poisoned].min() > scores[~dump.poisoned].max()
    dump = planted(share=0.0, n=1000)
    defenses.score(defense, dump.features, dump.logits, dump.labels, None, seed=0)
    assert defense.suspected_classes_ == []
    assert defense.n_suspected_ == 0


@pytest.mark.parametrize("n_small", [3, 1500])
def test_activation_clustering_samples_a_large_class_for_its_silhouette(n_small):
    rng = np.random.default_rng(0)
    clusters = (np.arange(5000) < n_small).astype(int)
    rows = rng.normal(size=(5000, 3)) + 3 * clusters[:, None]
    module = sys.modules[type(defenses.load("activation_clustering")).__module__]
    assert module._silhouette(rows, clusters, 0) == pytest.approx(silhouette_score(rows, clusters), abs=0.02)
    assert module._silhouette(rows, clusters, 0) == module._silhouette(rows, clusters, 0)


@pytest.mark.parametrize("value", [0, -1, 2.5, "10", True])
def test_activation_clustering_refuses_a_number_of_components(value):
    with pytest.raises(defenses.DefenseError, match="expected an integer of at least 1.*n_components=10"):
        defenses.load("activation_clustering", n_components=value)


def test_fine_pruning():
    # sqrt(9 + 16), sqrt(1 + 4 + 4), and squares that float16 could not hold.
    features = np.array([[3, 4, 0], [1, -2, 2], [300, 400, 0]], dtype=np.float16)
    np.testing.assert_allclose(score("fine_pruning", features, [0, 1, 1]), [5, 3, 500], rtol=1e-12)
    defense = defenses.load("fine_pruning").fit(features, np.array([0, 1, 1]), None)
    np.testing.assert_allclose(defense.score_samples(features, None), [5, 3, 500], rtol=1e-12)


def test_random_filter_draws_evenly():
    n = 5000
    features = np.arange(n, dtype=np.float32)[:, None]
    scores = score("random_filter", features, [0] * n, seed=3)
    assert scores.min() >= 0
    assert scores.max() < 1
    # A tenth of the rows in each tenth of the range; the standard deviation of each count is sqrt(5000 * 0.09) = 21.
    np.testing.assert_allclose(np.histogram(scores, bins=10, range=(0, 1))[0], 500, atol=100)


def test_random_filter_is_keyed_by_the_seed_and_by_all_of_a_row():
    features = np.random.default_rng(0).normal(size=(2000, 8))
    features[1] = features[0]
    features[3] = features[2]
    features[3, -1] += 1
    scores = score("random_filter", features, [0] * 2000, seed=1)
    other = score("random_filter", features, [0] * 2000, seed=2)
    assert scores[0] == scores[1]
    assert scores[2] != scores[3]
    # Correlation of independent numbers: standard deviation 1 / sqrt(2000) = 0.022.
    assert abs(np.corrcoef(scores, other)[0, 1]) < 0.1
    assert abs(np.corrcoef(scores, np.arange(2000))[0, 1]) < 0.1
