"""Beatrix: rows whose products of features lie outside the range that is usual for the class.

Ma, Wang, Sun, Xue, Wen and Xiang, "The Beatrix Resurrections: Robust Backdoor Detection via Gram Matrices" (NDSS 2023,
arXiv:2209.11715). The Gram matrix of order p of a feature map v (channels x places) is G^p = (v^p (v^p)')^(1/p), entry
by entry. Over a class, every entry of the upper triangle has a median and a MAD (the median of the distances from the
median); with the bounds a = median - 10 MAD and b = median + 10 MAD, an entry g deviates by

    relu(a - g) / |a| + relu(g - b) / |b|,

and a row's deviation is the mean over entries and orders. In the penultimate vector every channel has one place, so
that G^p_ij = ((v_i v_j)^p)^(1/p) = v_i v_j for all orders p (where v >= 0, as it is after a ReLU): the orders say the
same, and only p = 1 is computed.

A class is judged by the regularised maximum mean discrepancy between its suspects (m rows, those whose deviation is
above the class's median by more than e^2 times 1.4826 MAD) and its other n rows,

    R = m n / (m + n) MMD^2,  MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),

with Gaussian kernels k of bandwidths 1/2 and 1 times the median squared distance, and by the anomaly index
(R - median R) / (1.4826 MAD R) over the classes, suspected above e^2 as in the paper; where the MAD of R is 0, no class
is. At most 300 suspects and 300 others are used, and they are the m and n of the formula: R is then about 1.5 for two
groups of one distribution, however many rows the class has.

The score puts classes with larger R first and orders the rows of a class by their deviation d: it is the number of
classes with a smaller R plus d / (1 + d).

Departures: the paper has some 30 rows of each class that are known to be clean, for medians, MADs, and the threshold
of the deviations. Here they come from the class itself, so poison must be a minority: planted poison (10 standard
deviations off) was found up to 30 % of its class, at 45 % another class came first, and at 60 % the range is that of the
poison. Two more weaken it: the authors' program cuts the deviations at the 95th percentile of those of clean rows, found
by cross-validation, and it reads a map of channels x places from an inner layer, where the orders 1 to 8 differ. Where
more than half of a class does not deviate at all, the MAD of its deviations is 0 and every row that does is a suspect;
its R then speaks of a group with many clean rows. Medians and MADs are taken over at most 200 rows of a class, evenly
spread, and over the 256 features of the largest variance in the class. A bound nearer to 0 than the square of the
class's mean |feature| is replaced by that square as a divisor: after a ReLU many medians and MADs are 0, and 10^-6, as in
the authors' program, would let these entries outweigh all others. The index is one-sided.
"""

import numpy as np

_MADS = 10.0  # from the median to a bound
_THRESHOLD = np.exp(2)  # of the anomaly index and of the deviations
_FEATURES = 256
_REFERENCE_ROWS = 200
_MMD_ROWS = 300
_MIN_CLASSES = 3  # with fewer, a median over classes says nothing


class BackdoorDefense:
    """Rank samples by the deviation of their feature products, classes whose suspects form a group of their own first."""

    RELIES_ON = ("minority_in_class",)

    def fit(self, features, labels, poison_fraction, **kwargs):
        """Remember the labels, (N,) int; medians and MADs are found in score_samples."""
        self.labels_ = np.array(labels)
        self.classes_, self.rows_ = np.unique(self.labels_, return_inverse=True)
        return self

    def score_samples(self, features, logits):
        """Scores, (N,) float64 in [0, number of classes]; higher = more suspicious.

        Sets ``suspected_classes_`` and ``n_suspected_``. Rows of a class with fewer than three rows do not deviate.
        """
        if len(features) != len(self.labels_):
            raise ValueError(f"score_samples got {len(features)} rows, fit got {len(self.labels_)}")
        deviations, suspects = np.zeros(len(features)), np.zeros(len(features), dtype=bool)
        evidence = np.zeros(len(self.classes_))
        for c in range(len(self.classes_)):
            rows = np.flatnonzero(self.rows_ == c)
            values = np.ascontiguousarray(features[rows], dtype=np.float32)
            order = _order_of_values(values)  # which rows serve for the medians and for the MMD depends on it
            rows, values = rows[order], values[order]
            values = np.ascontiguousarray(values[:, _widest(values)])
            deviations[rows] = _deviations(values, values[_spread(len(rows), _REFERENCE_ROWS)])
            suspects[rows] = _above(deviations[rows])
            evidence[c] = _discrepancy(values.astype(np.float64), deviations[rows], suspects[rows])
        suspected = np.zeros(len(self.classes_), dtype=bool)
        if len(self.classes_) >= _MIN_CLASSES:
            suspected = _above(evidence) & (np.median(np.abs(evidence - np.median(evidence))) > 0)
        self.suspected_classes_ = self.classes_[suspected].tolist()
        self.n_suspected_ = int((suspected[self.rows_] & suspects).sum())
        tiers = (evidence[:, None] > evidence).sum(axis=1)
        return tiers[self.rows_] + deviations / (1 + deviations)


def _widest(values):
    """The columns of (n, D) that vary most."""
    variances = np.var(values, axis=0, dtype=np.float64)
    return np.sort(np.argsort(-variances, kind="stable")[:_FEATURES])


def _deviations(values, reference):
    """Mean deviation of the products of features of each row (n, D) from their range in ``reference``: (n,)."""
    if len(reference) < 3:
        return np.zeros(len(values))
    least = np.float32(np.abs(reference).mean(dtype=np.float64) ** 2) or np.float32(1)
    columns, usual = np.ascontiguousarray(values.T), np.ascontiguousarray(reference.T)
    width = len(columns)
    totals = np.zeros(len(values))
    for i in range(width):  # one row of the triangle at a time: (D - i, n) products
        products = usual[i:] * usual[i]
        medians = np.median(products, axis=1, keepdims=True)
        products -= medians
        reach = np.float32(_MADS) * np.median(np.abs(products, out=products), axis=1, keepdims=True)
        lower, upper = medians - reach, medians + reach
        products = columns[i:] * columns[i]
        outside = np.maximum(lower - products, 0) / np.maximum(np.abs(lower), least)
        products -= upper
        outside += np.maximum(products, 0, out=products) / np.maximum(np.abs(upper), least)
        totals += outside.sum(axis=0, dtype=np.float64)
    return totals / (width * (width + 1) / 2)


def _above(values):
    """Which values lie above the median by more than e^2 robust standard deviations; (n,) bool."""
    excess = values - np.median(values)
    return excess > _THRESHOLD * 1.4826 * np.median(np.abs(excess))


def _discrepancy(values, deviations, suspects):
    """Regularised MMD between suspects and others of the rows (n, D); 0 if either are fewer than two."""
    order = np.argsort(deviations, kind="stable")
    groups = [order[suspects[order] == group] for group in (True, False)]
    if min(len(group) for group in groups) < 2:
        return 0.0
    x, y = (values[group[_spread(len(group), _MMD_ROWS)]] for group in groups)
    both = np.concatenate([x, y])
    lengths = (both**2).sum(axis=1)
    squares = np.maximum(lengths[:, None] + lengths - 2 * both @ both.T, 0)
    bandwidth = np.median(squares)
    if bandwidth <= 0:
        return 0.0
    kernel = np.exp(-squares / bandwidth) + np.exp(-2 * squares / bandwidth)
    m, n = len(x), len(y)
    mmd = kernel[:m, :m].mean() + kernel[m:, m:].mean() - 2 * kernel[:m, m:].mean()
    return m * n / (m + n) * mmd


def _spread(n_rows, most):
    """Indices of at most ``most`` of the rows, evenly spread."""
    return np.unique(np.linspace(0, n_rows - 1, min(n_rows, most)).round().astype(int))


def _order_of_values(values):
    """An order of the rows that depends on their bytes alone; which one does not matter."""
    return np.argsort(values.view(np.dtype((np.void, values.itemsize * values.shape[1])))[:, 0], kind="stable")
