"""Spectral signatures: per class, the squared projection on the top singular direction.

Tran, Li and Madry, "Spectral Signatures in Backdoor Attacks" (NeurIPS 2018), Algorithm 1: let M be the matrix of a
class's features with the class mean taken off each row, and v its top right singular vector; the score of row i is
(M_i . v)^2.

Departure: the paper ranks within a class, and removes the 1.5 eps n highest scores of each. Here the scores of all classes
are returned as they are and the filter removes the highest of all. Squared projections are in the features' own unit, so
a class that spreads wider than others comes first, whatever it holds.
"""

import numpy as np
from scipy.linalg import eigh


class BackdoorDefense:
    """Rank samples by their squared distance from the class mean along the class's top singular direction."""

    RELIES_ON = ("minority_in_class",)

    def fit(self, features, labels, poison_fraction, **kwargs):
        """Find mean and direction of each class.

        features: (N, D) float; labels: (N,) int. A class with one row has no direction and gets a zero vector, hence
        the score 0.
        """
        self.labels_ = np.array(labels)
        self.classes_, rows = np.unique(self.labels_, return_inverse=True)
        self.means_ = np.zeros((len(self.classes_), features.shape[1]))
        self.directions_ = np.zeros_like(self.means_)
        for c in range(len(self.classes_)):
            centred = np.asarray(features[rows == c], dtype=np.float64)
            self.means_[c] = centred.mean(axis=0)
            centred = centred - self.means_[c]
            if len(centred) > 1:
                self.directions_[c] = _top_right_singular_vector(centred)
        return self

    def score_samples(self, features, logits):
        """Squared projections, (N,) float64 >= 0; higher = more suspicious."""
        if len(features) != len(self.labels_):
            raise ValueError(f"score_samples got {len(features)} rows, fit got {len(self.labels_)}")
        scores = np.empty(len(features))
        for label, mean, direction in zip(self.classes_, self.means_, self.directions_, strict=True):
            rows = self.labels_ == label
            scores[rows] = ((np.asarray(features[rows], dtype=np.float64) - mean) @ direction) ** 2
        return scores


def _top_right_singular_vector(matrix):
    """By the smaller of the two Gram matrices: one eigenvector, without the other min(n, D) - 1 of an SVD."""
    n_rows, n_columns = matrix.shape
    if n_rows >= n_columns:
        return _top_eigenvector(matrix.T @ matrix)
    vector = matrix.T @ _top_eigenvector(matrix @ matrix.T)
    length = np.linalg.norm(vector)
    return vector / length if length > 0 else vector


def _top_eigenvector(gram):
    last = len(gram) - 1
    return eigh(gram, subset_by_index=[last, last])[1][:, 0]
