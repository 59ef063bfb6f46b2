"""Confidence filter: what the victim is surest of comes first.

The suspicion of a sample is the victim's softmax confidence p on the sample's training label, the maximum softmax
probability baseline of Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples
in Neural Networks" (ICLR 2017), turned to backdoors: a trigger is a feature that never fails, so triggered samples
tend to be fitted with the highest confidence.

Departures: the label is the training label, not the predicted one, and the score is the log-odds log(p / (1 - p)),
which ranks as p does. A trained network's p rounds to 1 on many samples, and equal scores carry no order; the
log-odds is the label's logit less the log-sum-exp of all others, and does not saturate.
"""

import numpy as np


class BackdoorDefense:
    """Rank samples by the victim's confidence on their training label."""

    RELIES_ON = ()
    CHUNKED = True  # the logits are read whole, the features not at all

    def fit(self, features, labels, poison_fraction, **kwargs):
        """Remember the labels, (N,) int in [0, C)."""
        self.labels_ = np.array(labels)
        return self

    def score_samples(self, features, logits):
        """Log-odds of the training label under the softmax, (N,) float64; higher = more suspicious.

        With one class only there is nothing to be sure of, and all scores are 0.
        """
        logits = np.array(logits[:], dtype=np.float64)
        if len(logits) != len(self.labels_):
            raise ValueError(f"score_samples got {len(logits)} rows, fit got {len(self.labels_)}")
        if logits.shape[1] == 1:
            return np.zeros(len(logits))
        rows = np.arange(len(logits))
        own = logits[rows, self.labels_]
        logits[rows, self.labels_] = -np.inf
        top = logits.max(axis=1)
        return own - top - np.log(np.exp(logits - top[:, None]).sum(axis=1))
