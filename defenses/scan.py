"""SCAn: is a class one group or two? The smaller group of the class that looks most like two comes first.

Tang, Wang, Tang and Zhang, "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination
Detection" (USENIX Security 2021, arXiv:1908.00686), adapted to have no clean set:

1. Decomposition. A row of class t is r = mu_t + e with mu_t ~ N(0, S_mu) and e ~ N(0, S_e), one S_e for all classes
   (r less the mean of all rows). EM: the expected mu_t is n_t S_mu (n_t S_mu + S_e)^-1 times the class's mean row;
   then S_mu and S_e are the covariances of the expected mu_t and of r - mu_t.
2. Untangling. Each class is split into two groups with means mu_1, mu_2 and covariance S_e: a row belongs to the group
   whose mean is nearer in the metric of S_e (Fisher's discriminant S_e^-1 (mu_1 - mu_2)), and the means follow.
3. Test. J_t is twice the log-likelihood that two groups gain over one:
   J_t = sum over r of (r - mu_t)' S_e^-1 (r - mu_t) - (r - mu_g(r))' S_e^-1 (r - mu_g(r)).
   The anomaly index is (J_t - median J) / (1.4826 MAD J) over the classes; classes above e^2 = 7.39 are suspected.

Which of the two groups is the poison is told by size: the smaller one. That is this adaptation's rule. If poison is more
than half of its class, the groups change places and the clean rows come first.

The score puts classes with larger J first and orders the rows of a class by the log-likelihood ratio l of the smaller
group to the larger: it is the number of classes with a smaller J plus (1 + l / (1 + |l|)) / 2.

Departures: the paper estimates S_mu and S_e on clean rows; here on all, so that poison adds its shift to S_e. Its index
is two-sided; a class that looks less like two groups than others is no poison, so this one is not. J is not put on the
scale of a chi-squared distribution first, which the index does not see. J is a sum and grows with the class, also where
there is but one group, so that clean classes should be of about one size (the authors' program divides by the size; in
many dimensions a small class then looks more like two groups than a large one that is two). S_mu is the covariance over
classes of equal weight. The groups start from the sign of the direction in which the class varies most in the metric of
S_e, where the program draws at random. Directions without variance within the classes are dropped.
"""

import numpy as np
from scipy.linalg import eigh

_THRESHOLD = np.exp(2)  # of the anomaly index
_MIN_VARIANCE = 1e-6  # of the largest; below it float32 features hold rounding errors, which must not be whitened
_ROUNDING = 1e-20  # of the largest squared mean: what classes of equal rows seem to vary by
_MIN_ROWS = 4  # of a class, to be split
_MIN_CLASSES = 3  # with fewer, a median over classes says nothing
_EM_STEPS, _SPLIT_STEPS = 20, 100
_TOLERANCE = 1e-5  # of EM, relative
_BLOCK = 8192  # rows in float64 at a time


class BackdoorDefense:
    """Rank samples by the evidence that their class is two groups, and by their place between the groups."""

    RELIES_ON = ("minority_in_class", "class_sizes")

    def fit(self, features, labels, poison_fraction, **kwargs):
        """Estimate the shared covariance from features (N, D) float and labels (N,) int."""
        self.labels_ = np.array(labels)
        self.classes_, self.rows_ = np.unique(self.labels_, return_inverse=True)
        sizes = np.bincount(self.rows_)
        n_rows, width = features.shape
        sums, scatter = np.zeros((len(sizes), width)), np.zeros((width, width))
        for start in range(0, n_rows, _BLOCK):
            np.add.at(sums, self.rows_[start : start + _BLOCK], features[start : start + _BLOCK].astype(np.float64))
        self.centre_ = sums.sum(axis=0) / n_rows
        means = sums / sizes[:, None]
        for start in range(0, n_rows, _BLOCK):
            within = features[start : start + _BLOCK].astype(np.float64) - means[self.rows_[start : start + _BLOCK]]
            scatter += within.T @ within
        variances, axes = eigh(scatter / n_rows)
        kept = variances > max(_MIN_VARIANCE * variances[-1], _ROUNDING * (means**2).max())
        whiten = axes[:, kept] / np.sqrt(variances[kept])
        self.means_, noise = _decompose((means - self.centre_) @ whiten, sizes)
        variances, axes = eigh(noise) if kept.any() else (np.ones(0), np.zeros((0, 0)))
        axes = axes / np.sqrt(variances)
        self.whiten_, self.means_ = whiten @ axes, self.means_ @ axes
        return self

    def score_samples(self, features, logits):
        """Scores, (N,) float64 in [0, number of classes]; higher = more suspicious.

        Sets ``suspected_classes_`` and ``n_suspected_``. A class with fewer than four rows, or whose rows are all the
        same, is one group: J is 0, and so is the l of its rows.
        """
        if len(features) != len(self.labels_):
            raise ValueError(f"score_samples got {len(features)} rows, fit got {len(self.labels_)}")
        ratios, evidence = np.zeros(len(features)), np.zeros(len(self.classes_))
        tested = np.zeros(len(self.classes_), dtype=bool)
        for c in range(len(self.classes_)):
            rows = np.flatnonzero(self.rows_ == c)
            white = (features[rows].astype(np.float64) - self.centre_) @ self.whiten_
            small = _split(white) if len(rows) >= _MIN_ROWS and white.shape[1] else None
            if small is not None:
                evidence[c], ratios[rows] = _test(white, small, self.means_[c])
                tested[c] = True
        index = np.zeros(len(self.classes_))
        if tested.sum() >= _MIN_CLASSES:
            deviations = evidence[tested] - np.median(evidence[tested])
            spread = 1.4826 * np.median(np.abs(deviations))
            index[tested] = np.divide(deviations, spread, out=np.zeros_like(deviations), where=spread > 0)
        suspected = index > _THRESHOLD
        self.suspected_classes_ = self.classes_[suspected].tolist()
        self.n_suspected_ = int((suspected[self.rows_] & (ratios > 0)).sum())
        tiers = (evidence[:, None] > evidence).sum(axis=1)
        return tiers[self.rows_] + (1 + ratios / (1 + np.abs(ratios))) / 2


def _decompose(means, sizes):
    """EM on class means (T, d) in coordinates where the pooled within-class covariance is I: expected mu_t, and S_e."""
    n_rows = sizes.sum()
    between = means.T @ means / len(means)
    within = np.eye(means.shape[1])
    expected = means
    if not means.shape[1]:
        return expected, within
    for _ in range(_EM_STEPS):
        last = within
        ratios, axes = eigh(between, within)  # axes' within axes = I, axes' between axes = diag(ratios)
        shrink = sizes[:, None] * np.maximum(ratios, 0)
        expected = (means @ axes * (shrink / (1 + shrink))) @ np.linalg.inv(axes)
        rest = means - expected
        between = expected.T @ expected / len(means)
        within = np.eye(means.shape[1]) + rest.T @ (rest * (sizes / n_rows)[:, None])
        if np.linalg.norm(within - last) <= _TOLERANCE * np.linalg.norm(last):
            break
    return expected, within


def _split(white):
    """The smaller of two groups of the rows (n, d), S_e being I: (n,) bool, or None if they do not fall apart."""
    centred = white - white.mean(axis=0)
    wide = len(centred) < centred.shape[1]
    gram = centred @ centred.T if wide else centred.T @ centred
    last = len(gram) - 1
    direction = eigh(gram, subset_by_index=[last, last])[1][:, 0]
    group = direction > 0 if wide else centred @ direction > 0
    for _ in range(_SPLIT_STEPS):
        if group.all() or not group.any():
            return None
        first, second = centred[group].mean(axis=0), centred[~group].mean(axis=0)
        before, group = group, (centred - (first + second) / 2) @ (first - second) > 0
        if (before == group).all():
            break
    if group.all() or not group.any():
        return None
    return group if group.sum() <= len(group) / 2 else ~group


def _test(white, small, mean):
    """J of a class, and twice the log-likelihood ratio (n,) of the smaller group to the larger; 0 if equally large."""
    to_small, to_large, to_one = (
        ((white - centre) ** 2).sum(axis=1) for centre in (white[small].mean(axis=0), white[~small].mean(axis=0), mean)
    )
    evidence = (to_one - np.where(small, to_small, to_large)).sum()
    ratios = np.zeros(len(white)) if small.sum() * 2 == len(small) else to_large - to_small
    return evidence, ratios
