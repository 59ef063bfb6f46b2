"""Local outlier factor: rows in a thinner place than their neighbours have.

Breunig, Kriegel, Ng and Sander, "LOF: Identifying Density-Based Local Outliers" (SIGMOD 2000), by scikit-learn, in each
class by itself: the mean local reachability density of a row's k nearest neighbours over its own. About 1 in the midst
of a cluster, larger outside; the scores of all classes are on that one scale.

It finds single rows that lie apart. Poison that lies together in more than about k rows is a cluster of its own, dense
by its own measure, and is not found.

Departures: backdoors are not what the paper is about. Equal rows of a class count as one, and get the same score: more
than k of them have no finite density, and next to it that of all other rows would seem thin. The paper leaves duplicates
out, and suggests to count neighbours at different places only. k is 20 (the paper asks for at least 10), or all other
rows of a smaller class.
"""

import warnings

import numpy as np
from sklearn.neighbors import LocalOutlierFactor


class BackdoorDefense:
    """Rank samples by their local outlier factor within their class."""

    RELIES_ON = ("minority_in_class",)

    def __init__(self, n_neighbors=20):
        """n_neighbors: int >= 1."""
        if isinstance(n_neighbors, bool) or not isinstance(n_neighbors, int) or n_neighbors < 1:
            raise ValueError(f"n_neighbors is {n_neighbors!r}; expected an integer of at least 1")
        self.n_neighbors = n_neighbors

    def fit(self, features, labels, poison_fraction, **kwargs):
        """Remember the labels, (N,) int; neighbours are sought in score_samples."""
        self.labels_ = np.array(labels)
        return self

    def score_samples(self, features, logits):
        """Local outlier factors, (N,) float64 > 0; higher = more suspicious. A class whose rows are all equal gets 1."""
        if len(features) != len(self.labels_):
            raise ValueError(f"score_samples got {len(features)} rows, fit got {len(self.labels_)}")
        scores = np.ones(len(features))
        for label in np.unique(self.labels_):
            rows = np.flatnonzero(self.labels_ == label)
            values, places = _distinct(features[rows])
            if len(values) > 1:
                scores[rows] = self._score_class(values)[places]
        return scores

    def _score_class(self, values):
        detector = LocalOutlierFactor(n_neighbors=min(self.n_neighbors, len(values) - 1))
        with warnings.catch_warnings():
            # Rows that differ in last digits only may be at distance 0; scikit-learn bounds their density and warns.
            warnings.filterwarnings("ignore", message="Duplicate values", category=UserWarning)
            detector.fit(values)
        return -detector.negative_outlier_factor_  # scikit-learn: higher = more normal


def _distinct(values):
    """The different rows, in an order that depends on their bytes alone, and the place of each row among them.

    Which of several rows at one distance are neighbours depends on the order.
    """
    values = np.ascontiguousarray(values + 0)  # -0 becomes 0: equal rows have equal bytes
    keys = values.view(np.dtype((np.void, values.itemsize * values.shape[1])))[:, 0]
    _, first, places = np.unique(keys, return_index=True, return_inverse=True)
    return values[first], places
