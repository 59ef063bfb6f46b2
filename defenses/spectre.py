"""SPECTRE: whiten each class with a robust covariance, and score by quantum entropy.

Hayase, Kong, Somani and Oh, "SPECTRE: Defending Against Backdoor Attacks Using Robust Statistics" (ICML 2021,
arXiv:2104.11315). For a class of n rows, m of them poisoned by assumption, and a number of directions k:

1. Project the centred rows on the k leading principal directions.
2. Estimate mean and covariance S of the clean rows by the filter of Diakonikolas et al., "Being Robust (in High
   Dimensions) Can Be Practical" (ICML 2017, arXiv:1703.00893): find the quadratic polynomial p(y) = (y'Vy - tr V) /
   sqrt(2), |V|_F = 1, of largest variance over the whitened rows y (1 if they are Gaussian), take off the rows on
   which it is far from its median, and start again, until its variance is at most 1 + 10 e ln(1/e)^2, e = m / n, or
   until 2 m rows are off.
3. Whiten all rows, h = S^-1/2 (x - mean), and score (QUE, quantum entropy, alpha = 4)
   t_i = h_i' Q h_i / tr Q, Q = exp(alpha (C - I) / (|C| - 1)), C the covariance of h, |C| its largest eigenvalue.
4. Take off the 1.5 m rows of highest score. Whiten all rows, in all of the (up to 64) directions, by mean and covariance
   of the rows that are left, and judge k by tr(CQ) / tr(Q): the mean of the scores t, less the part of it that comes
   from the mean of h, which is not 0. The k with the largest value is used, out of eight between 1 and 64 with evenly
   spaced square roots.

The class in which that value is largest, measured by what Gaussian rows give, is the target. Its rows come first: the
score is t / (1 + t), plus 1 there.

Departures: the paper removes 1.5 m rows of the target and nothing else; here all rows are ranked, and n_suspected_ says
1.5 m.

The paper compares the values of the classes as they are. But they grow as classes shrink, poison or not, since m rows
are the larger part of a small class: on Gaussian rows in 64 dimensions, m = 72, from 1.4 at 1,000 rows to 5 to 14 at 140,
and a target, which is larger by its poison, would start behind all others. Here a class's value is divided by the
largest that five sets of standard normal rows give, with as many rows (to two digits), directions and m, drawn with
fit's seed: a clean Gaussian class is above 1 about once in six, whatever its size.

m is the number of poisoned rows, as if all were in the class at hand; where that is more than a class can stand, half
of its rows are left in at least (the paper takes poison to be a minority). The largest number of directions is also
bounded by the rows left, five for each. Where the polynomial's tail is not heavy enough for the filter's bound, rows
within 3 of the farthest go, as in the authors' program, and each round takes off a tenth of the 2 m rows at least, so
that ten rounds do. Mean and covariance are those of the rows that are left; the paper estimates the covariance on
differences of rows and the mean by a filter of its own.
"""

import functools

import numpy as np
from scipy.linalg import eigh

_MOST_DIRECTIONS = 64
_CANDIDATES = 8  # values of k
_ALPHA = 4.0
_ROWS_PER_DIRECTION = 5  # left in, for each direction: with fewer, whitening fits them, and all others look far off
_ROUNDS = 10  # of the filter
_POWER_STEPS = 20  # for the polynomial; a nearly leading one serves the filter as well
_CONFIDENCE = 0.1  # tau of the filter
_CONSTANT = 10.0  # C of the filter, as in the authors' program; the proof leaves it open
_NULL_SETS = 5  # of Gaussian rows
_MIN_VARIANCE = 1e-10  # of the largest; below it float32 features hold rounding errors, which must not be whitened


class BackdoorDefense:
    """Rank samples by QUE score, those of the class whose QUE scores are most unlike those of Gaussian rows first."""

    RELIES_ON = ("poison_fraction", "minority_in_class")

    def fit(self, features, labels, poison_fraction, seed=0, **kwargs):
        """Remember the labels, (N,) int, the number of poisoned rows, at least 1, and the seed, int >= 0."""
        self.labels_ = np.array(labels)
        self.n_poisoned_ = max(1, round(poison_fraction * len(self.labels_)))
        self.seed_ = int(seed)
        return self

    def score_samples(self, features, logits):
        """Scores, (N,) float64 in [0, 2]; higher = more suspicious.

        Sets ``suspected_classes_`` (one label) and ``n_suspected_``. A class with fewer than ten rows, or whose rows
        are all the same, gets 0; if there is no other class, none is suspected.
        """
        if len(features) != len(self.labels_):
            raise ValueError(f"score_samples got {len(features)} rows, fit got {len(self.labels_)}")
        scores, evidence = np.zeros(len(features)), {}
        for label in np.unique(self.labels_):
            rows = np.flatnonzero(self.labels_ == label)
            values = np.ascontiguousarray(features[rows])
            order = _order_of_values(values)  # sums over the rows decide which of them the filter takes off
            answer = _score_class(values[order].astype(np.float64), self.n_poisoned_, self.seed_)
            if answer is not None:
                evidence[int(label)], que = answer
                scores[rows[order]] = que / (1 + que)
        self.suspected_classes_ = ()
        self.n_suspected_ = 0
        if evidence:
            target = max(evidence, key=evidence.get)
            scores[self.labels_ == target] += 1
            self.suspected_classes_ = (target,)
            self.n_suspected_ = _n_removed((self.labels_ == target).sum(), self.n_poisoned_, 1.5)
        return scores


def _score_class(values, n_poisoned, seed):
    """Evidence and QUE scores of a class's rows (n, D), or None for a class that has too few different rows."""
    n_left = len(values) - _n_removed(len(values), n_poisoned, 2)
    most = min(_MOST_DIRECTIONS, n_left // _ROWS_PER_DIRECTION)
    if most < 1 or (values == values[0]).all():
        return None
    projected = _principal_components(values, most)
    value, scores = _best_directions(projected, n_poisoned)
    return value / _usual_value(_two_digits(len(values)), projected.shape[1], n_poisoned, seed), scores


@functools.cache
def _usual_value(n_rows, n_directions, n_poisoned, seed):
    """The largest value of step 4 that sets of Gaussian rows give."""
    rng = np.random.default_rng(seed)
    sets = (rng.normal(size=(n_rows, n_directions)) for _ in range(_NULL_SETS))
    return max(_best_directions(rows, n_poisoned)[0] for rows in sets)


def _two_digits(number):
    unit = 10 ** max(0, len(str(number)) - 2)
    return round(number / unit) * unit


def _best_directions(projected, n_poisoned):
    """Largest value of step 4 over the numbers k of leading directions of (n, K), and the QUE scores for that k."""
    n_rows, most = projected.shape
    n_removed, limit = (_n_removed(n_rows, n_poisoned, multiple) for multiple in (1.5, 2))
    best = None
    for k in np.unique(np.round(np.linspace(1, np.sqrt(most), _CANDIDATES) ** 2).astype(int)):
        left = _filter(projected[:, :k], min(0.5, n_poisoned / n_rows), limit)
        scores = _que(projected[:, :k], left)[0]
        left = np.sort(np.argsort(scores, kind="stable")[: n_rows - n_removed])
        value = _que(projected, left)[1]
        if best is None or value > best[0]:
            best = value, scores
    return best


def _n_removed(n_rows, n_poisoned, multiple):
    return int(min(round(multiple * n_poisoned), n_rows // 2))


def _que(rows, left):
    """QUE scores (n,) of rows (n, k), whitened by mean and covariance of rows[left]; and tr(CQ) / tr(Q)."""
    white = _whiten(rows, left)
    variances, axes = eigh(np.atleast_2d(np.cov(white, rowvar=False, bias=True)))
    excess = variances[-1] - 1
    weights = np.exp(_ALPHA * (variances - 1) / excess) if excess > 1e-9 else np.ones(len(variances))
    weights /= weights.sum()
    return (white @ axes) ** 2 @ weights, variances @ weights


def _whiten(rows, left):
    variances, axes = eigh(np.atleast_2d(np.cov(rows[left], rowvar=False, bias=True)))
    # A direction in which the rows left do not vary at all: finite, and as far off as anything can be.
    variances = np.maximum(variances, max(_MIN_VARIANCE, _MIN_VARIANCE * variances[-1]))
    return (rows - rows[left].mean(axis=0)) @ (axes / np.sqrt(variances)) @ axes.T


def _filter(rows, share, limit):
    """Indices of the rows (n, k) that the covariance filter leaves; it takes off ``limit`` rows at most."""
    left = np.arange(len(rows))
    n_least = -(-limit // _ROUNDS)
    while limit > 0:
        white = _whiten(rows[left], slice(None))
        distances = (white**2).sum(axis=1)
        far = distances >= _CONSTANT * rows.shape[1] * np.log(len(left) / _CONFIDENCE)
        if far.any():
            n_off = min(far.sum(), limit)
        else:
            polynomial = _leading_polynomial(white)
            if polynomial.var() <= 1 + _CONSTANT * share * np.log(1 / share) ** 2:
                break
            distances = np.abs(polynomial - np.median(polynomial))
            n_off = min(max(_n_in_tail(distances, share), n_least), limit)
        nearest = np.argsort(distances, kind="stable")[: len(left) - n_off]
        left, limit = left[np.sort(nearest)], limit - n_off
    return left


def _leading_polynomial(white):
    """The quadratic polynomial of largest variance at the whitened rows (n, k), by power iteration: (n,)."""
    values = (white**2).sum(axis=1)
    for _ in range(_POWER_STEPS + 1):
        matrix = white.T @ (white * (values - values.mean())[:, None])
        matrix /= np.linalg.norm(matrix) or 1.0
        values = ((white @ matrix) * white).sum(axis=1)
    return (values - np.trace(matrix)) / np.sqrt(2)


def _n_in_tail(distances, share):
    """How many rows lie beyond the smallest T with more mass beyond T + 3 than 3 e / (T ln T)^2, as clean rows have."""
    ascending = np.sort(distances)
    beyond = 1 - np.arange(len(ascending)) / len(ascending)  # share of the rows at this distance or farther
    t = ascending - 3
    bounded = t > max(10 * np.log(1 / share), 1.0)
    heavy = np.flatnonzero(bounded)[beyond[bounded] > 3 * share / (t[bounded] * np.log(t[bounded])) ** 2]
    threshold = t[heavy[0]] if heavy.size else t[-1]
    return int((distances > threshold).sum())


def _principal_components(values, n_directions):
    """Coordinates along the leading principal directions that have variance, largest first: (n, k)."""
    centred = values - values.mean(axis=0)
    wide = centred.shape[0] < centred.shape[1]
    gram = centred @ centred.T if wide else centred.T @ centred
    size = len(gram)
    variances, vectors = eigh(gram, subset_by_index=[max(0, size - n_directions), size - 1])
    kept = np.flatnonzero(variances > _MIN_VARIANCE * variances[-1])[::-1]
    vectors = vectors[:, kept]
    projected = vectors * np.sqrt(variances[kept]) if wide else centred @ vectors
    return projected / projected[:, 0].std()  # one scale for all: the whitening takes it away again


def _order_of_values(values):
    """An order of the rows that depends on their bytes alone; which one does not matter."""
    return np.argsort(values.view(np.dtype((np.void, values.itemsize * values.shape[1])))[:, 0], kind="stable")
