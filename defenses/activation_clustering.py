"""Activation clustering: in each class, the smaller of two clusters comes first.

Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering" (SafeAI at AAAI 2019,
arXiv:1811.03728): the activations of each class are reduced to 10 dimensions by independent component analysis and
split by 2-means; poison is expected in the smaller cluster.

The score is 1 - (m - t / 2) / n, in [0, 1), for a row whose cluster has m of its class's n rows. Up to t that is one
minus the cluster's relative size, the paper's measure of how suspicious a cluster is: above 1/2 in the smaller cluster
and below in the larger, so every member of every smaller cluster comes before all members of larger ones, and the
smallest share comes first (2-means cuts a clean class about in half). Within a cluster, where one row more or less
would weigh 1 / n, t = (d_large - d_small) / max(d_large, d_small) gives the order; d_small and d_large are the
distances to the centres of the smaller and the larger cluster, so t is a silhouette with centres in place of averages
over members, in [0, 1] for the smaller and [-1, 0] for the larger cluster. Where both are equally large neither is the
smaller, and all rows of the class get 1/2. A class is one cluster, and all its rows get 0, if it has fewer than
n_components + 2 rows (whitening puts them at equal distances from each other) or if its rows are all the same.

Departures: the paper flags whole clusters of the classes that it takes to be poisoned; a ranking is wanted here, so
no threshold decides and the members of a cluster are put in order. Directions without variance are dropped before the
independent components are sought. Rows are put in an order of their own values first, so that the order in which they
arrive does not sway the random starts.
"""

import warnings

import numpy as np
from scipy.linalg import eigh
from sklearn.cluster import KMeans
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

_MIN_VARIANCE = 1e-10  # of the largest; below it float32 features hold rounding errors, which whitening would blow up
_STARTS = 50  # of 2-means: 10 missed the best split of 13 in 48 planted classes (5 to 20 % poison), 50 of none


class BackdoorDefense:
    """Rank samples by how small a part of their class their cluster is."""

    RELIES_ON = ("minority_in_class",)

    def __init__(self, n_components=10):
        """n_components: int >= 1, the dimensions to which a class's features are reduced."""
        if isinstance(n_components, bool) or not isinstance(n_components, int) or n_components < 1:
            raise ValueError(f"n_components is {n_components!r}; expected an integer of at least 1")
        self.n_components = n_components

    def fit(self, features, labels, poison_fraction, seed=0, **kwargs):
        """Remember the labels, (N,) int, and the seed, int >= 0; the clusters are found in score_samples."""
        self.labels_ = np.array(labels)
        self.seed_ = int(seed) % 2**32  # the range that scikit-learn takes
        return self

    def score_samples(self, features, logits):
        """One minus the relative size of each row's cluster, (N,) float64 in [0, 1); higher = more suspicious."""
        if len(features) != len(self.labels_):
            raise ValueError(f"score_samples got {len(features)} rows, fit got {len(self.labels_)}")
        scores = np.empty(len(features))
        for label in np.unique(self.labels_):
            rows = np.flatnonzero(self.labels_ == label)
            values = np.ascontiguousarray(features[rows])
            order = _order_of_values(values)
            scores[rows[order]] = self._score_class(values[order].astype(np.float64))
        return scores

    def _score_class(self, values):
        n_rows = len(values)
        if n_rows < self.n_components + 2 or (values == values[0]).all():
            return np.zeros(n_rows)
        reduced = _independent_components(values, self.n_components, self.seed_)
        with threadpool_limits(1, user_api="openmp"):  # threads add up in an order that changes from run to run
            clusters = KMeans(2, n_init=_STARTS, random_state=self.seed_).fit(reduced)
        sizes = np.bincount(clusters.labels_, minlength=2)
        if sizes[0] == sizes[1]:
            return np.full(n_rows, 0.5)
        distances = clusters.transform(reduced)
        to_small, to_large = distances[:, sizes.argmin()], distances[:, sizes.argmax()]
        silhouettes = (to_large - to_small) / np.maximum(to_large, to_small)
        return 1 - (sizes[clusters.labels_] - silhouettes / 2) / n_rows


def _order_of_values(values):
    """An order of the rows that depends on their bytes alone; which one does not matter."""
    return np.argsort(values.view(np.dtype((np.void, values.itemsize * values.shape[1])))[:, 0], kind="stable")


def _independent_components(values, n_components, seed):
    """Whiten the leading principal components that have variance, then turn them to be independent."""
    centred = values - values.mean(axis=0)
    wide = centred.shape[0] < centred.shape[1]
    gram = centred @ centred.T if wide else centred.T @ centred
    size = len(gram)
    variances, vectors = eigh(gram, subset_by_index=[max(0, size - n_components), size - 1])
    kept = variances > _MIN_VARIANCE * variances[-1]
    projected = vectors[:, kept] if wide else centred @ vectors[:, kept]  # up to scale, which whitening takes away
    white = projected / projected.std(axis=0)
    with warnings.catch_warnings():
        # Whatever FastICA has reached when it stops is a rotation of white, and distances do not see rotations.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return FastICA(whiten=False, random_state=seed).fit_transform(white)
