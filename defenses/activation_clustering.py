"""Activation clustering: the smaller cluster of the class that best falls into two comes first.

Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering" (SafeAI at AAAI 2019,
arXiv:1811.03728): the activations of each class are reduced to 10 dimensions by independent component analysis and
split by 2-means. Where there is no clean set, the paper takes a class for poisoned if the silhouette of its split (the
mean over rows, Rousseeuw 1987) is above a threshold between 0.10 and 0.15, and its smaller cluster for the poison. So
are suspected_classes_ and n_suspected_ set here, with 0.10. For whitening holds a silhouette down: parts p and 1 - p of a
class that lie apart along one of ten directions, Gaussian in the others, reach about 1 - sqrt(18 / (18 + 1 / (p (1 - p))))
at most, 0.11 for a third of the class and 0.21 for a tenth. So small clusters still have the advantage, those of
outliers in a clean class included.

The score orders what that rule leaves open. All smaller clusters come before all larger ones, each kind by the
silhouette of the class: the score is the number of classes with a smaller silhouette, plus the number of all classes in
a smaller cluster, plus 1 - (m - t / 2) / n for a row whose cluster has m of its class's n rows. The last term is above
1/2 in the smaller cluster and below in the larger; in it t = (d_large - d_small) / max(d_large, d_small) gives the order
within a cluster, d_small and d_large being the distances to the centres of the smaller and the larger cluster. Where both
are equally large neither is the smaller, and the term is 1/2. A class is one cluster, with silhouette -1 and 0 for the
term, if it has fewer than n_components + 2 rows (whitening puts them at equal distances from each other) or if its rows
are all the same.

Departures: exclusionary reclassification, another of the paper's tests (train again without the cluster and see whether
the new model gives its rows another label), is missing: a defense trains nothing here. So is its comparison of relative
sizes between classes. The paper flags whole clusters; here the rows of one are put in order. The silhouette is taken over about
2,000 rows of a larger class, drawn from each cluster in proportion. Directions without variance are dropped before the
independent components are sought. Rows are put in an order of their own values first, so that the order in which they
arrive does not sway what is drawn.
"""

import warnings

import numpy as np
from scipy.linalg import eigh
from sklearn.cluster import KMeans
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

_MIN_VARIANCE = 1e-10  # of the largest; below it float32 features hold rounding errors, which whitening would blow up
_STARTS = 50  # of 2-means: 10 missed the best split of 13 in 48 planted classes (5 to 20 % poison), 50 of none
_THRESHOLD = 0.10  # of the silhouette
_SILHOUETTE_ROWS = 2000  # its cost grows with their square


class BackdoorDefense:
    """Rank samples by whether their cluster is the smaller of its class, and by the silhouette of the class."""

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
        """Scores, (N,) float64 in [0, 2 x number of classes); higher = more suspicious.

        Sets ``suspected_classes_`` and ``n_suspected_``, the rows in the smaller clusters of these classes.
        """
        if len(features) != len(self.labels_):
            raise ValueError(f"score_samples got {len(features)} rows, fit got {len(self.labels_)}")
        scores = np.empty(len(features))
        labels, classes = np.unique(self.labels_, return_inverse=True)
        silhouettes = np.empty(len(labels))
        for c in range(len(labels)):
            rows = np.flatnonzero(classes == c)
            values = np.ascontiguousarray(features[rows])
            order = _order_of_values(values)
            silhouettes[c], scores[rows[order]] = self._score_class(values[order].astype(np.float64))
        small = scores > 0.5
        suspected = silhouettes > _THRESHOLD
        self.suspected_classes_ = labels[suspected].tolist()
        self.n_suspected_ = int((suspected[classes] & small).sum())
        tiers = (silhouettes[:, None] > silhouettes).sum(axis=1)
        return tiers[classes] + len(labels) * small + scores

    def _score_class(self, values):
        """Silhouette of the split of a class, and the last term of the scores of its rows (n, D): (n,)."""
        n_rows = len(values)
        one_cluster = -1.0, np.zeros(n_rows)
        if n_rows < self.n_components + 2 or (values == values[0]).all():
            return one_cluster
        reduced = _independent_components(values, self.n_components, self.seed_)
        with threadpool_limits(1, user_api="openmp"):  # threads add up in an order that changes from run to run
            clusters = KMeans(2, n_init=_STARTS, random_state=self.seed_).fit(reduced)
        sizes = np.bincount(clusters.labels_, minlength=2)
        if not sizes.all():
            return one_cluster
        silhouette = _silhouette(reduced, clusters.labels_, self.seed_)
        if sizes[0] == sizes[1]:
            return silhouette, np.full(n_rows, 0.5)
        distances = clusters.transform(reduced)
        to_small, to_large = distances[:, sizes.argmin()], distances[:, sizes.argmax()]
        nearness = (to_large - to_small) / np.maximum(to_large, to_small)
        return silhouette, 1 - (sizes[clusters.labels_] - nearness / 2) / n_rows


def _silhouette(rows, clusters, seed):
    """Mean silhouette of the rows (n, k) in two clusters, over a sample of a large class."""
    if len(rows) > _SILHOUETTE_ROWS:
        rng = np.random.default_rng(seed)
        parts = [rng.permutation(np.flatnonzero(clusters == c)) for c in (0, 1)]
        parts = [part[: max(2, round(len(part) * _SILHOUETTE_ROWS / len(rows)))] for part in parts]
        sample = np.concatenate(parts)
        rows, clusters = rows[sample], clusters[sample]
    return float(silhouette_score(rows, clusters))


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
