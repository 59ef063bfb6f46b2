"""Small dumps of a victim with planted poison, for which the truth is known."""

from typing import NamedTuple

import numpy as np


class Dump(NamedTuple):
    """What a defense sees (the first four), and what it does not (poisoned)."""

    features: np.ndarray  # (N, D) float32
    logits: np.ndarray  # (N, C) float32
    labels: np.ndarray  # (N,) int64, after poisoning
    poison_fraction: float
    poisoned: np.ndarray  # (N,) bool

    def take(self, rows):
        """The dump with its rows chosen or reordered by an index array."""
        return self._replace(
            features=self.features[rows],
            logits=self.logits[rows],
            labels=self.labels[rows],
            poisoned=self.poisoned[rows],
        )


def planted(share=0.3, shift=10.0, n=1000, d=24, classes=5, target=0, seed=0):
    """Gaussian classes with one covariance; in the target class, a share of the rows is shifted.

    share: of the target class, in [0, 1); shift: how far poison lies from the class mean along the trigger direction,
    in units of the standard deviation there; classes < d. The logits are a linear head on the features that separates
    the classes and has learnt the trigger, so poison gets the highest logits for the target. Rows are in random order.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    of_target = np.flatnonzero(labels == target)
    poisoned = np.zeros(n, dtype=bool)
    poisoned[rng.permutation(of_target)[: round(share * len(of_target))]] = True

    directions = np.linalg.qr(rng.normal(size=(d - 1, classes)))[0]
    means = np.zeros((classes, d))
    means[:, :-1] = 5 * directions.T  # equally long and at right angles, so that no class stands out by itself
    trigger = np.eye(d)[-1]
    noise = rng.normal(size=(n, d)) * np.linspace(0.5, 1.0, d)  # 1 along the trigger
    features = means[labels] + noise + np.outer(poisoned, shift * trigger)

    weights = means.copy()
    weights[target] += 10 * trigger
    logits = features @ weights.T
    return Dump(
        features.astype(np.float32),
        logits.astype(np.float32),
        labels.astype(np.int64),
        max(1, poisoned.sum()) / n,
        poisoned,
    )


def recall(dump, scores):
    """Share of the poison among as many highest-scored rows as there are poisoned ones."""
    n_poisoned = dump.poisoned.sum()
    removed = np.argsort(-scores, kind="stable")[:n_poisoned]
    return dump.poisoned[removed].sum() / n_poisoned
