"""Self-confidence: the less the victim believes a sample's label, the more suspicious the sample.

Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels" (JAIR 2021,
arXiv:1911.00068): with p_ik the softmax probability of class k for row i and y_i the row's label, the class threshold
t_j is the mean of p_ij over the rows labelled j, the victim's usual confidence in that class. This is a label-quality
score from confident learning, not the method: the confident joint, which counts the rows of each pair of given and likely
label, and the rules that prune by it are absent. The quality of a label is its self-confidence, adjusted by the
thresholds so that classes which are hard to learn are not suspected as a whole (the adjustment of the authors' library
cleanlab): with M = max_k t_k,

    q_i = (p_iy - t_y + M) / sum_k (p_ik - t_k + M).

The divisor is 1 - sum_k t_k + C M, the same for all rows, so -q_i ranks as the score returned here does: t_y - p_iy,
in (-1, 1), positive where the victim is less sure than it usually is of that class. Far from p = 1/2, float64 rounds
the score of many rows to the same number. Therefore 10^-8 arcsinh(l) is added, l = log((1 - p) / p): less than 10^-6, as
little as float32 logits leave uncertain anyway, and it keeps the order of p within a class.

confidence_filter is the opposite rule: it suspects the rows that the victim is surest of, and does not compare a row
with its class. Poison carries wrong labels, which is what this method looks for, but a victim that has learnt the
trigger believes them. What this finds is the poison that the victim has not fitted, and natural label errors.

Departures: the paper takes p from models that have not been trained on the row (cross-validation). Here the victim has
been, so p is higher throughout.
"""

import numpy as np
from scipy.special import expit

_TIE_BREAK = 1e-8  # a last digit of float32 logits, 10^-7 of l, is then 10^-15 in the score, which float64 still has


class BackdoorDefense:
    """Rank samples by how far the victim's confidence in their label lies below the usual one of the class."""

    RELIES_ON = ()
    CHUNKED = True  # the logits are read whole, the features not at all

    def fit(self, features, labels, poison_fraction, **kwargs):
        """Remember the labels, (N,) int in [0, C)."""
        self.labels_ = np.array(labels)
        return self

    def score_samples(self, features, logits):
        """Threshold of the class less the row's confidence, (N,) float64 in about (-1, 1); higher = more suspicious.

        A row that is alone in its class is its own threshold and gets 0, but for the 10^-6. So do all rows where there
        is one class only, with 0 exactly.
        """
        logits = np.asarray(logits[:], dtype=np.float64)
        if len(logits) != len(self.labels_):
            raise ValueError(f"score_samples got {len(logits)} rows, fit got {len(self.labels_)}")
        if logits.shape[1] == 1:
            return np.zeros(len(logits))
        own = np.arange(logits.shape[1]) == self.labels_[:, None]
        others = np.where(own, -np.inf, logits)
        top = others.max(axis=1)
        log_odds = top + np.log(np.exp(others - top[:, None]).sum(axis=1)) - logits[own]
        doubt = expit(log_odds)  # 1 - p, which keeps its digits where p is near 1
        _, classes = np.unique(self.labels_, return_inverse=True)
        usual = np.bincount(classes, weights=doubt) / np.bincount(classes)
        return doubt - usual[classes] + _TIE_BREAK * np.arcsinh(log_odds)
