"""Whitened mixture: split each class into two components, and ask which half of which class is no ordinary half.

A network that has learnt a trigger moves every triggered sample of the target class by a common shift. Within that
class the shift is a second mode: it stands out against the spread of the other classes, and the two modes differ from
each other and from the halves of other classes more than natural sub-classes do.

1. Whiten with the within-class covariance pooled over the other classes (as SCAn, Tang et al. 2021, arXiv:1908.00686,
   pools; the whitening step of SPECTRE, Hayase et al. 2021, arXiv:2104.11315) and keep the 32 directions in which the
   class varies most against the others.
2. Fit two multivariate-t components with full covariances by EM (Peel & McLachlan 2000, Statistics and Computing
   10:339) from several short runs (Biernacki et al. 2003, CSDA 41:561). The different splits that they end in are kept.
   Both halves of the best two are split again: where a class has natural parts, few poisoned rows hide in one of them.
3. Weigh each half of each split as the poison: how far the halves lie apart, how much likelihood two components gain on
   held-out rows, and how unlike the halves of all other classes its spread, place, confidence and traces of other
   classes are. A class whose halves are more distinct than natural ones is suspect (Ashman, Bird & Zepf 1994, AJ 108:2348).
   A surplus of the class over the usual size and the known number of poisoned rows count where they are given.
4. A row's score is its log-odds of being poison, averaged over the splits of its class by their evidence (Bayesian
   model averaging, Hoeting et al. 1999, Statistical Science 14:382), the larger half described by one, two
   and three components (mixture discriminant analysis, Hastie & Tibshirani 1996, JRSS B 58:155), weighed by how near
   the number of rows then comes to the surplus or the known number. Rows of other classes follow.
5. Order the rows of a suspected class by these log-odds and by the linear discriminant (Fisher 1936, Annals of Eugenics
   7:179) between its halves, with their own covariance or that of other classes: whichever sets them further apart.

Departures: SCAn needs clean data and gives both halves one covariance; here no row is known to be clean and each half
has its own. SPECTRE needs poison to be the minority of its class; here neither half is the background by its size.
See README.md for what was measured and for where it breaks.
"""

import numbers

import numpy as np
from scipy.linalg import eigh
from scipy.linalg.lapack import dpotri
from threadpoolctl import threadpool_limits

_DIRECTIONS = 32  # of a class, for the mixture. With 8 the likeliest split was often not the poison; with 32 it was
_BASIS = 128  # principal directions of the pooled covariance in which a class's directions are sought
_ROWS_PER_DIRECTION = 10  # fewer rows than that for each principal direction, and whitening fits noise
_MIN_VARIANCE = 1e-6  # relative to the largest; features are float32, below this is rounding
_DEGREES = 4.0  # of freedom of the t components: with Gaussian ones, heavy tails pass for a second component
_MIN_CLASS = 8  # rows; a smaller class is not split
_MIN_HALF = 16  # rows; a smaller half is not split again
_SPLIT_AGAIN = 2  # likeliest splits of each class; with one, the poison is at times in a half of the second
_SEARCH_ROWS = 1000  # of a class, evenly spread; the search for splits gains nothing from more
_SHORT_RUN, _LONG_RUN = 12, 80  # EM steps
_SMALLEST = -30.0  # log-responsibility; denormal numbers make BLAS a hundred times slower
_CANDIDATES, _CANDIDATES_TOLD = 6, 8  # splits kept of each class; the number of poisoned rows adds starts
_FINER = 2, 3  # components of the larger half, once a class is suspected, beside one
_SAME_SPLIT = 0.97  # two splits that agree on so many rows are one, and two halves that share so many of theirs
_BLOCK = 8192  # rows in float64 at a time
_DESIGNED = 512  # rows of a design at a time: 561 numbers each, which then fit the processor's cache
_ENTRIES = 2**21  # responsibilities at a time, in EM over all rows of a class

# Weights of the evidence for "this half is poison". Found on the development dumps of analysis/dumps.yaml, and rounded;
# twice or half of each changes little. Separation and likelihood mostly compare the splits of one class: natural classes
# can be in two parts that lie far apart, but a trigger's shift is the widest and the likeliest gap of its own class.
_WEIGHTS = {"oddness": 0.2, "separation": 14.0, "likelihood": 3.0, "held_out": 1.5, "distinct": 70.0}
_LARGEST_Z2 = 25.0  # a single statistic says no more than five standard deviations' worth
_LARGEST_ODDNESS = 10.0  # nor all of them together: they are related, and an easy class is odd in several at once
_LARGEST_DISTINCT = 7.0  # nats: once a gap is wider than natural ones, it does not matter how wide
_DISTINCT = 6.5  # Ashman's D that natural halves of a class reach,
_MORE_DISTINCT = 1.6  # or so many times the median class's
_DISTINCT_ROWS = 4096  # of a class, evenly spread, tell it
_FEW_DISTINCT = 40.0  # rows: a gap beside so many counts by two thirds
_UNEQUAL = 1.5  # upper over lower quartile of the class sizes: beyond, they are unequal by nature. One class is what poison adds
_LARGER = 2.0  # deviations of the class sizes: so much larger, and the surplus is sought among the splits
_AWAY = 1e-6  # of the widest gap: least that counts as the distance of a half's part from all other rows; 1, none does
_FEW = 10.0  # rows: a statistic of as many counts half
_SHARE_ERROR = 0.1  # of the class: how far the size of a half may be off before EM with the right weight puts it right
_COUNT_ERROR = 0.1  # of the expected number of poisoned rows: how far off it may be, and what EM ends with
_FEWER = 0.4  # of the class: a half that holds so many rows fewer than are poisoned may be one of several targets
_UNSHARED = 2.0  # what that costs at most
_MISSING = 0.15  # of the known number of rows: with so few left to explain, no further class is suspected
_BENT_ERROR = 0.3  # of the rows that the mixture finds: how far off it may be before the discriminant
_CUT_ERROR = 0.1  # of the rows that are more likely poison than not: how many more there may be
_FOLDS = 10  # of the rows of a class, for the linear discriminant
_FAR_OFF = 4.0  # times the expected number: where the mixture finds so many rows, or so few, that number is wrong
_CLOSE = 2.0  # hypotheses about a class whose evidence differs by less are both possible
_NEGLIGIBLE = -15.0  # log-weight of a hypothesis that is left out of the average
# Smallest scale of each of the statistics of a half (see `_look`), for victims with few or very similar classes.
_FLOORS = [0.15, 0.15, 0.15, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
# How far each may be below the usual: rows of several classes under one label are not more alike (the three spreads) than
# those of a natural half, and one that is so is the core of its class.
_LEAST_Z = [-2.0, -2.0, *[-np.inf] * 4, -2.0, *[-np.inf] * 3]
# Their variance over rows; of few rows, the last two are mostly noise: ratios of squares.
_SAMPLING = [0.0] * 8 + [1.0, 5.0]


class BackdoorDefense:
    """Rank samples by their log-odds of belonging to the poisoned component of a suspected class.

    Parameters
    ----------
    use_class_sizes : bool
        Whether a class that is larger than the others is more suspect. Right where clean classes are about equally
        large; where they clearly are not (upper quartile over 1.5 times the lower), and with False, none is looked at.
    threshold : float
        Evidence above which a class is suspected where the poison fraction is not known. On the development dumps clean
        classes reached 6.1, one of them 10.0; and 8.9 without class sizes, one of them (on two dumps) 12.2 and 15.7.

    Attributes
    ----------
    n_suspected_ : int
        Rows of the suspected classes that are more likely poison than not. Set by score_samples, as is the next.
    suspected_classes_ : list of int
        Most suspect first. With a poison fraction there is at least one; without, there may be none.
    RELIES_ON : tuple of str
        ("class_sizes",) if it may look at them, after fit if it does; else ().
    """

    CHUNKED = True
    MAY_USE = ("poison_fraction",)

    def __init__(self, use_class_sizes=True, threshold=10.0):
        if not isinstance(use_class_sizes, bool):
            raise ValueError(f"use_class_sizes is {use_class_sizes!r}; expected true or false")
        if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real) or not np.isfinite(threshold):
            raise ValueError(f"threshold is {threshold!r}; expected a finite number")
        self.use_class_sizes = use_class_sizes
        self.threshold = float(threshold)
        self.RELIES_ON = ("class_sizes",) if use_class_sizes else ()

    @threadpool_limits.wrap(limits=1, user_api="blas")  # products of 32 columns: threads cost time and change last bits
    def fit(self, features, labels, poison_fraction, **kwargs):
        """Find each class's whitened coordinates.

        features: (N, D) float, finite; labels: (N,) int; poison_fraction: in (0, 0.5], or None.
        """
        self.labels_ = np.array(labels)
        n_samples, width = features.shape
        self.n_poisoned_ = None if poison_fraction is None else max(1, round(poison_fraction * n_samples))
        self.classes_, self.of_class_ = np.unique(self.labels_, return_inverse=True)
        self.sizes_ = np.bincount(self.of_class_)
        low, high = np.percentile(self.sizes_, [25, 75])
        self.sizes_tell_ = self.use_class_sizes and bool(high <= _UNEQUAL * low)
        self.RELIES_ON = ("class_sizes",) if self.sizes_tell_ else ()
        # Features may be larger than memory: each pass reads them once, a block at a time.
        self.means_ = np.zeros((len(self.classes_), width))
        for block, x in _blocks(features):
            present, starts, order = _grouped(self.of_class_[block])
            self.means_[present] += np.add.reduceat(x[order], starts)
        self.means_ /= self.sizes_[:, None]
        self.centre_ = self.sizes_ @ self.means_ / n_samples

        pooled = np.zeros((width, width))
        for block, x in _blocks(features):
            centred = x - self.means_[self.of_class_[block]]
            pooled += centred.T @ centred
        basis = _whitener(pooled, max(n_samples - len(self.classes_), 1))

        white = np.empty((n_samples, basis.shape[1]), np.float32)
        for block, x in _blocks(features):
            white[block] = (x - self.means_[self.of_class_[block]]) @ basis
        self.white_ = white  # (N, up to 128) float32
        means = (self.means_ - self.centre_) @ basis
        # Directions in which the class means lie; around their mean there is one fewer than classes.
        self.between_ = np.linalg.svd(means, full_matrices=False)[2][: len(means) - 1].T
        by_class = np.split(np.argsort(self.of_class_, kind="stable"), np.cumsum(self.sizes_)[:-1])
        # In an order of their own, so that nothing depends on the order in which the rows came.
        self.rows_ = [rows[np.lexsort(white[rows, :2].T)] if basis.shape[1] else rows for rows in by_class]
        self.coordinates_ = [self._directions(c, _DIRECTIONS) for c in range(len(self.classes_))]
        return self

    @threadpool_limits.wrap(limits=1, user_api="blas")
    def score_samples(self, features, logits):
        """Scores, (N,) float64; higher = more suspicious, and above 0 = more likely poison, in a suspected class."""
        if len(features) != len(self.labels_):
            raise ValueError(f"score_samples got {len(features)} rows, fit got {len(self.labels_)}")
        splits = []
        for c, values in enumerate(self.coordinates_):
            if len(values) >= _MIN_CLASS and values.shape[1]:
                splits += [{**split, "class": c} for split in _candidates(values, self._sought(len(values)))]
        self.n_suspected_, self.suspected_classes_ = 0, []
        scores = np.full(len(features), -100.0)  # rows of classes too small to be split come last
        if not splits:
            return scores
        self._look(features, logits, splits)
        self.distinct_ = self._distinctness(splits)
        of_class, best = _ranked(splits, self._evidence(splits))
        nested = self._nested(splits, of_class)
        if nested:
            self._look(features, logits, nested)  # reads all features once more
            splits += nested
            of_class, best = _ranked(splits, self._evidence(splits))
        order = sorted(best, key=lambda c: (-best[c][0], c))
        ranked = []
        for c in order:
            evidence = best[c][0]
            close = [splits[i]["sizes"][side] for other, i, side in of_class[c] if other > evidence - _CLOSE]
            ranked.append((c, evidence, min(close), max(close)))
        suspected = self._suspects(ranked)
        self.suspected_classes_ = [int(self.classes_[c]) for c in suspected]
        reference = best[order[0]][0] if suspected else self.threshold
        for c in order:
            rows = self.rows_[c]
            share = self.n_poisoned_ / len(rows) if self.n_poisoned_ and suspected == [c] else None
            hypotheses = of_class[c] if c in (suspected or order[:1]) else [best[c]]
            expected = self._expected(len(rows), suspected == [c])
            log_odds = _average(self.coordinates_[c], splits, hypotheses, share, expected)
            if c in suspected:
                log_odds = _discriminated(self._directions(c), log_odds, expected)
                if self.n_poisoned_ is None:
                    log_odds = _raised(log_odds, expected)
                self.n_suspected_ += int((log_odds > 0).sum())
                scores[rows] = log_odds
            else:  # log-odds of "the class is a target and the row is poison", with little credit for the class
                log_p = -np.logaddexp(0, -log_odds) + min(best[c][0] - reference, 0) - 5
                scores[rows] = log_p - np.log(-np.expm1(log_p))
        return scores

    def _directions(self, c, most=_BASIS):
        return _class_coordinates(self.white_[self.rows_[c]], len(self.rows_[c]) / len(self.labels_), most)

    def _nested(self, splits, of_class):
        """Splits of both halves of the likeliest splits of each class; the rows beside that half are a third part.

        Kept are those that lie further apart than all splits of the class (a new gap), make no half that there is already
        (not the same gap again) and gain likelihood. A half with fewer rows than are poisoned is left as it is.
        """
        nested, most = [], _most(splits)
        for c, hypotheses in of_class.items():
            values, widest = self.coordinates_[c], most["separation", c, False]
            sought = self._sought(len(values))
            there = np.concatenate([splits[index]["halves"] for _, index, side in hypotheses if side == 0])
            likeliest = dict.fromkeys(index for _, index, _ in sorted(hypotheses, key=lambda h: -h[0]))
            for split in (splits[index] for index in list(likeliest)[:_SPLIT_AGAIN]):
                for half, beside in zip(split["halves"], split["statistics"][::-1], strict=True):
                    if half.sum() < max(_MIN_HALF, sought or 0):
                        continue
                    for inner in _candidates(values[half], sought, apart=widest):
                        parts, halves = np.zeros((3, len(half))), np.zeros((2, len(half)), bool)
                        parts[:2, half], parts[2], halves[:, half] = inner["parts"], ~half, inner["halves"]
                        least = halves.sum(axis=1).min()
                        if inner["held_out"] <= 0 or least < _MIN_CLASS or _shared(halves, there) > _SAME_SPLIT:
                            continue
                        # The poison is as far from all clean rows as from those that were split off with it.
                        away = np.array([_separation(values, one) for one in halves])
                        away = np.maximum(away / max(widest, *away), _AWAY)
                        of_three = {"parts": parts, "halves": halves, "beside": beside, "away": away}
                        nested.append({**inner, "class": c, **of_three})
        return nested

    def _suspects(self, ranked):
        """Suspected classes out of (class, evidence, rows that it may explain at least and at most), most suspect first."""
        if self.n_poisoned_ is None:
            return [c for c, evidence, *_ in ranked if evidence > self.threshold]
        few = _MISSING * self.n_poisoned_
        suspected, missing, missing_at_least = [], self.n_poisoned_, self.n_poisoned_
        for c, evidence, least, most in ranked:
            fits = missing_at_least > few and most <= missing_at_least + few
            if not suspected or (missing > few and evidence > self.threshold / (2 if fits else 1)):
                suspected.append(c)
                missing, missing_at_least = missing - least, missing_at_least - most
        return suspected

    def _look(self, features, logits, splits):
        """Add to each split what its two halves look like: sizes (2,) and statistics (2, 10).

        The statistics: log spread of the features; log spread of the other classes' logits; entropy of the runner-up
        label; mean margin of the label's logit; log distance of the half's mean from that of all rows; mean logit of
        the label; log spread of the margin; mean length of the features; log share of the whitened spread that lies
        where the class means differ; log square of how far one of the other logits stands out, over their spread.
        """
        halves = {}  # class -> (2 x its splits, n) bool, rows rising
        for split in splits:
            halves.setdefault(split["class"], []).extend(split["halves"][:, np.argsort(self.rows_[split["class"]])])
        halves = {c: np.array(both) for c, both in halves.items()}
        sums = dict.fromkeys(halves, 0.0)
        runner_up = np.zeros(len(features), np.int64)
        for (block, x), present in zip(_blocks(features), self._by_block(halves), strict=True):
            table, runner_up[block] = _columns(x, np.array(logits[block], np.float64), self.labels_[block])
            for c, here, both in present:
                sums[c] = sums[c] + both.astype(np.float64) @ table[here]
        rest_means = {c: of_class[:, 7 + features.shape[1] :] / of_class[:, :1] for c, of_class in sums.items()}
        gaps = self._gaps(logits, halves, rest_means)

        runner_up_of = {c: runner_up[np.sort(self.rows_[c])] for c in halves}
        looks = {}
        for c, both in halves.items():
            count, (square, length, own, margin, margin2, rest2) = sums[c][:, 0], (sums[c][:, 1:7] / sums[c][:, :1]).T
            means, rest = sums[c][:, 7 : 7 + features.shape[1]] / sums[c][:, :1], rest_means[c]
            spread, rest_spread, margin_spread = (
                np.log(np.maximum(value, 0) + 1e-12)
                for value in (square - (means**2).sum(axis=1), rest2 - (rest**2).sum(axis=1), margin2 - margin**2)
            )
            entropy = [_entropy(np.bincount(runner_up_of[c][half])) for half in both]
            offset = np.log(np.linalg.norm(means - self.centre_, axis=1) + 1e-12)
            share, gap = self._between_share(c, both), np.log(gaps[c] / count + 1e-12) - rest_spread
            table = [spread, rest_spread, entropy, margin, offset, own, margin_spread / 2, length, share, gap]
            table = np.column_stack(table)
            looks[c] = iter(zip(count.reshape(-1, 2), table.reshape(-1, 2, table.shape[1]), strict=True))
        for split in splits:
            split["sizes"], split["statistics"] = next(looks[split["class"]])

    def _by_block(self, halves):
        """For each block of rows: (class, its rows there, which of its halves they are in) of the classes that were split."""
        seen = np.zeros(len(self.classes_), np.int64)
        for block in _slices(len(self.labels_)):
            present, starts, order = _grouped(self.of_class_[block])
            found = []
            for c, here in zip(present, np.split(order, starts[1:]), strict=True):
                if c in halves:
                    found.append((c, here, halves[c][:, seen[c] : seen[c] + len(here)]))
                seen[c] += len(here)
            yield found

    def _gaps(self, logits, halves, means):
        """Of each class (2 x its splits,): summed squares of how far the largest of the other logits exceeds the second.

        Less their means in the half, which say what the half has in common: a poisoned row's true class stands out then.
        """
        gaps = {c: np.zeros(len(both)) for c, both in halves.items()}
        if logits.shape[1] <= 2:
            return gaps
        for block, present in zip(_slices(len(logits)), self._by_block(halves), strict=True):
            values = np.asarray(logits[block], np.float64)
            for c, here, both in present:
                others = np.arange(logits.shape[1]) != self.classes_[c]
                rest = values[np.ix_(here, others)]
                rest -= rest.mean(axis=1, keepdims=True)
                gaps[c] += [_gap(rest[half] - mean) for half, mean in zip(both, means[c][:, others], strict=True)]
        return gaps

    def _between_share(self, c, both):
        """(2 x splits,): log share of the whitened spread of halves that lies along the directions of the class means.

        Rows of many classes under one label differ as classes do; where the network has merged them, less than others do.
        """
        white = self.white_[np.sort(self.rows_[c])].astype(np.float64)
        both = both / both.sum(axis=1, keepdims=True)
        spreads = (both @ (x**2).sum(axis=1) - ((both @ x) ** 2).sum(axis=1) for x in (white, white @ self.between_))
        total, between = (np.log(np.maximum(spread, 0) + 1e-12) for spread in spreads)
        return between - total

    def _distinctness(self, splits):
        """For each class, how distinct the halves of a split are at most, less where the smaller one has few rows."""
        most = {}
        for split in splits:
            c, up = split["class"], split["halves"][0]
            few = min(up.sum(), (~up).sum())
            counted = 1 - np.exp(-few / _FEW_DISTINCT)
            most[c] = max(most.get(c, 1e-6), _ashmans_d(self.coordinates_[c], up) * counted)
        return most

    def _evidence(self, splits):
        """(number of splits, 2): how much speaks for each half being the poison, in units near to nats."""
        most = _most(splits)
        # What halves of classes look like. All classes count: a few poisoned ones do not move the medians.
        usual = np.concatenate([split["statistics"] for split in _likeliest(splits)])
        centre = np.median(usual, axis=0)
        scale = np.maximum(1.4826 * np.median(np.abs(usual - centre), axis=0), _FLOORS)
        evidence = np.empty((len(splits), 2))
        usual_gain = np.median([split["held_out"] for split in _likeliest(splits)])  # natural classes have parts too
        # What natural parts of a class may reach.
        natural = max(_DISTINCT, _MORE_DISTINCT * np.median(list(self.distinct_.values())))
        for index, split in enumerate(splits):
            most_apart, most_gained = (most[n, split["class"], _is_nested(split)] for n in ("separation", "held_out"))
            apart = np.log((split["separation"] + 1e-12) / (most_apart + 1e-12)) + np.log(split.get("away", 1.0))
            few = split["sizes"] / (split["sizes"] + _FEW)  # statistics of few rows are noisy
            # Where a class has three parts, the poisoned one is also unlike the natural ones, and these are like each other.
            z = np.array([split["statistics"] - usual_look for usual_look in (centre, split.get("beside", centre))])
            z = np.maximum(z, _LEAST_Z * scale)
            z2 = z**2 / (scale**2 + _SAMPLING / split["sizes"][:, None]) * few[:, None]
            odd = _WEIGHTS["oddness"] * np.minimum(z2, _LARGEST_Z2).sum(axis=2).mean(axis=0)
            evidence[index] = (
                _LARGEST_ODDNESS * np.tanh((odd - odd[::-1]) / _LARGEST_ODDNESS)
                + _WEIGHTS["separation"] * apart
                + _WEIGHTS["likelihood"] * (split["held_out"] - most_gained)
                + _WEIGHTS["held_out"] * (split["held_out"] - usual_gain)
                + np.clip(_WEIGHTS["distinct"] * np.log(self.distinct_[split["class"]] / natural), 0, _LARGEST_DISTINCT)
                + [self._size_evidence(size, len(self.rows_[split["class"]]) - size) for size in split["sizes"]]
            )
        return evidence

    def _sought(self, n):
        """Poisoned rows to seek in a class of n rows: the known number, else a surplus that is the smaller part; or None."""
        if self.n_poisoned_ is not None or not self.sizes_tell_:
            return self.n_poisoned_
        surplus, deviation = self._surplus(n)
        return round(surplus) if _LARGER * deviation < surplus < n / 2 else None

    def _surplus(self, n):
        """Rows that a class of n rows has won, and the deviation of that among classes."""
        usual = np.median(self.sizes_)
        scale = max(1.4826 * np.median(np.abs(self.sizes_ - usual)), 0.005 * usual, 1.0)
        return (n - usual) / (1 + 1 / max(len(self.sizes_) - 1, 1)), scale  # the others have lost what this one won

    def _expected(self, n, alone):
        """Least and most poisoned rows of a suspected class of n rows, and the deviation of both; None if nothing tells."""
        if alone and self.n_poisoned_ is not None:
            return self.n_poisoned_, self.n_poisoned_, 0.0
        surplus, deviation = self._surplus(n)
        if not self.sizes_tell_ or surplus <= 0:
            return None
        return surplus, n - np.median(self.sizes_), deviation  # most if one class alone has lost rows, or none

    def _size_evidence(self, size, rest):
        """What the class sizes and the number of poisoned rows say about a half of so many rows being the poison."""
        n, evidence = size + rest, 0.0
        if self.sizes_tell_:
            surplus, scale = self._surplus(n)
            assumed = np.clip(surplus, 0.5 * size, min(1.5 * size, n))  # the split may be off
            without, left = surplus / scale, (surplus - assumed) / scale
            evidence += 4 * np.log((5 + without**2) / (5 + left**2))  # t with few degrees of freedom: sizes have tails
            evidence -= (size - np.clip(surplus, 0, n)) ** 2 / (2 * ((_SHARE_ERROR * n) ** 2 + scale**2))
        if self.n_poisoned_ is not None:
            more = (size - self.n_poisoned_) / n
            if more > 0:  # no half can hold more poison than there is
                evidence -= min((more / _SHARE_ERROR) ** 2 / 2, 4 * _UNSHARED)
            else:
                evidence -= min((more / _FEWER) ** 2, 1) * _UNSHARED
        return evidence


def _is_nested(split):
    return "beside" in split


def _shared(halves, others):
    """Rows in both of two halves, over those in either, for the two most alike; halves (a, n) bool, others (b, n)."""
    both = halves.astype(float) @ others.T
    return (both / (halves.sum(axis=1)[:, None] + others.sum(axis=1) - both)).max()


def _likeliest(splits):
    """One split of each class: the first."""
    return {split["class"]: split for split in reversed(splits)}.values()


def _most(splits):
    """The largest held_out and separation in each class, of the nested splits and of the others."""
    most = {}
    for split in splits:
        for name in ("held_out", "separation"):
            key = name, split["class"], _is_nested(split)
            most[key] = max(most.get(key, split[name]), split[name])
    return most


def _ranked(splits, evidence):
    """For each class: its hypotheses (evidence, split, side), and the best of them."""
    of_class = {}
    for index, split in enumerate(splits):
        of_class.setdefault(split["class"], []).extend((evidence[index, side], index, side) for side in (0, 1))
    return of_class, {c: max(hypotheses, key=lambda h: h[0]) for c, hypotheses in of_class.items()}


def _slices(n):
    return (slice(start, min(start + _BLOCK, n)) for start in range(0, n, _BLOCK))


def _blocks(features):
    """Slices of the rows, and the rows there in float64."""
    for block in _slices(len(features)):
        yield block, np.asarray(features[block], np.float64)


def _grouped(of_class):
    """The classes that occur, where each starts in the sorted rows, and the order that sorts them (stable)."""
    order = np.argsort(of_class, kind="stable")
    present, starts = np.unique(of_class[order], return_index=True)
    return present, starts, order


def _columns(x, logits, labels):
    """(b, 7 + D + C): what `_look` averages over halves; and (b,) the label with the largest other logit."""
    rows, n_others = np.arange(len(x)), logits.shape[1] - 1
    own = logits[rows, labels].copy()
    logits[rows, labels] = -np.inf
    runner_up = logits.argmax(axis=1)
    margin = own - logits[rows, runner_up] if n_others else own
    logits[rows, labels] = 0
    rest = logits - logits.sum(axis=1, keepdims=True) / max(n_others, 1)
    rest[rows, labels] = 0
    squares = np.einsum("ij,ij->i", x, x)
    columns = [np.ones(len(x)), squares, np.sqrt(squares), own, margin, margin**2, (rest**2).sum(axis=1)]
    return np.column_stack([*columns, x, rest]), runner_up


def _gap(rest):
    """Summed squares of how far the largest of each row (b, C - 1) exceeds the second."""
    second, largest = np.partition(rest, -2, axis=1)[:, -2:].T
    return ((largest - second) ** 2).sum()


def _whitener(scatter, degrees):
    """(D, q): principal directions of the pooled covariance, over their standard deviations."""
    width = len(scatter)
    wanted = min(width, _BASIS, max(_DIRECTIONS, degrees // _ROWS_PER_DIRECTION))
    variances, directions = eigh(scatter / degrees, subset_by_index=[width - wanted, width - 1])
    kept = (variances > _MIN_VARIANCE * variances[-1]) & (variances > 0)
    return directions[:, kept] / np.sqrt(variances[kept])


def _class_coordinates(white, share, most):
    """(n, up to most): a class along its directions, the largest first, in units of the deviation that other classes have there.

    white: (n, q), centred and whitened by the pooled covariance P. The eigenvectors of a class's covariance A against P
    are those against P - share * A, the other classes' part; an eigenvalue m becomes m (1 - share) / (1 - share m). So one
    whitening serves all classes.
    """
    white = white.astype(np.float64)
    if not white.shape[1]:
        return white
    variances, directions = eigh(white.T @ white / len(white))
    variances, directions = variances[::-1][:most], directions[:, ::-1][:, :most]
    return white @ directions * np.sqrt((1 - share) / np.maximum(1 - share * variances, 1e-2))


def _candidates(values, n_poisoned, apart=0.0):
    """Different splits of a class in two whose means lie further apart than that, likeliest first.

    Returns dicts of parts (2, n), the responsibilities of the two components; halves (2, n) bool, the rows of each;
    held_out, the gain in likelihood; separation, the distance of the two means in whitened units.
    """
    n = len(values)
    sample = _evenly(values, _SEARCH_ROWS) if n > _SEARCH_ROWS else np.arange(n)
    few = values[sample]
    design = _Design(few)
    wanted = None if n_poisoned is None else round(n_poisoned * len(sample) / n)
    starts = _starts(few, wanted)
    if not starts:
        return []
    _, parts, likelihoods = _em(design, 0.05 + 0.9 * np.array([[~start, start] for start in starts]), steps=_SHORT_RUN)
    kept = []
    for second in parts[np.argsort(-likelihoods, kind="stable"), 1]:
        up = second > 0.5
        agreements = [np.mean(up == (other > 0.5)) for other in kept]
        if 0 < up.sum() < len(up) and all(1 - _SAME_SPLIT < agreement < _SAME_SPLIT for agreement in agreements):
            kept.append(second)
    if not kept:
        return []
    kept = np.array(kept[: _CANDIDATES if wanted is None else _CANDIDATES_TOLD])
    everywhere = kept if len(sample) == n else _carry_over(_Design(values), design, kept)
    separation = np.array([_separation(values, second > 0.5) for second in everywhere])
    wide = separation > apart
    if not wide.any():
        return []
    kept, everywhere, separation = kept[wide], everywhere[wide], separation[wide]
    in_two, in_one = _held_out(few, np.stack([1 - kept, kept], axis=1), np.ones((1, 1, len(sample))))
    columns = {
        "parts": np.stack([everywhere, 1 - everywhere], axis=1),
        "halves": np.stack([everywhere > 0.5, everywhere <= 0.5], axis=1),
        "held_out": in_two - in_one,
        "separation": separation,
    }
    return [dict(zip(columns, of_split, strict=True)) for of_split in zip(*columns.values(), strict=True)]


def _evenly(values, most):
    """Which rows of values (n, k) to take where no more than that many will do: evenly spread along the first column."""
    n = len(values)
    return np.argsort(values[:, 0], kind="stable")[np.arange(min(n, most)) * n // min(n, most)]


def _separation(values, up):
    """Distance of the means of two halves; -inf where one has no rows."""
    return np.linalg.norm(values[up].mean(axis=0) - values[~up].mean(axis=0)) if 0 < up.sum() < len(up) else -np.inf


def _starts(values, wanted):
    """Halves to start EM from: along each leading direction the 2-means split and both tails."""
    n = len(values)
    sizes = {max(2, round(0.08 * n))}
    if wanted is not None and 2 <= wanted <= n - 2:
        sizes.add(wanted)
    starts = []
    for along in values.T[:3]:
        ranked = np.sort(along)
        starts.append(_two_means(along))
        for size in sorted(sizes):
            starts += [along >= ranked[-size], along <= ranked[size - 1]]
    return [start for start in starts if 0 < start.sum() < n]


def _two_means(along):
    """The split of numbers in two with the least scatter within."""
    ranked = np.sort(along)
    sums, n = np.cumsum(ranked), len(ranked)
    below = np.arange(1, n)
    between = (sums[:-1] / below - (sums[-1] - sums[:-1]) / (n - below)) ** 2 * below * (n - below)
    cut = between.argmax()
    return along > (ranked[cut] + ranked[cut + 1]) / 2


class _Design:
    """Design matrix of (n, k) values: a one, the coordinates and their products of each row, (1 + k + k (k + 1) / 2, n).

    The weighted moments of any number of components are one product with it, their squared Mahalanobis distances another:
    for many components faster than one at a time. Made some rows at a time, and kept where there are few.
    """

    def __init__(self, values):
        self.n, self.width = values.shape
        self._values = np.ascontiguousarray(values.T)
        self._first, self._second = np.triu_indices(self.width)
        self._upper = self._first * self.width + self._second
        self._packed = np.empty((self.width, self.width), np.int64)  # where in the design a product is
        self._packed[self._first, self._second] = 1 + self.width + np.arange(len(self._first))
        self._packed[self._second, self._first] = self._packed[self._first, self._second]
        self._blocks = [slice(start, start + _DESIGNED) for start in range(0, self.n, _DESIGNED)]
        self._kept = [self._columns(block) for block in self._blocks] if self.n <= _BLOCK else None

    def _columns(self, block):
        x = self._values[:, block]
        return np.concatenate([np.ones((1, x.shape[1])), x, x[self._first] * x[self._second]])

    def _by_block(self):
        return zip(self._blocks, self._kept or map(self._columns, self._blocks), strict=True)

    def fit(self, weights, distances=None):
        """M step of m t components with weights (m, n), the covariance drawn to that of the other classes.

        distances: (m, n), squared, from the components before. Returns what `distances` and `_log_density` need.
        """
        width = self.width
        prior = width + 2  # rows' worth of the identity: enough to be definite, little for a class of hundreds
        robust = weights if distances is None else weights * ((_DEGREES + width) / (_DEGREES + distances))
        sums = sum(robust[:, block] @ columns.T for block, columns in self._by_block())
        means = sums[:, 1 : width + 1] / (sums[:, :1] + 1e-12)
        scatter = sums[:, self._packed] - (sums[:, :1] * means)[:, :, None] * means[:, None, :]
        scatter[:, range(width), range(width)] += 0.5 * prior
        factors = np.linalg.cholesky(scatter / (weights.sum(axis=1) + prior)[:, None, None])
        # LAPACK itself: numpy's inverse does not know that there is a factor. The upper half of it; the lower is 0.
        inverses = np.array([dpotri(factor.T)[0] for factor in factors])
        inverses[:, range(width), range(width)] /= 2
        linear = np.einsum("mij,mj->mi", inverses, means) + np.einsum("mji,mj->mi", inverses, means)
        constant = np.einsum("mi,mi->m", linear, means)
        quadratic = 2 * inverses.reshape(len(inverses), -1)[:, self._upper]
        form = np.column_stack([constant, -2 * linear, quadratic])
        return form, np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(axis=1)

    def distances(self, form):
        """Squared Mahalanobis distances (m, n) from components."""
        return np.concatenate([form @ columns for _, columns in self._by_block()], axis=1)


def _log_density(distances, log_volume, width):
    """Of t components at squared Mahalanobis distances (m, n), up to a constant that all share."""
    return -0.5 * (_DEGREES + width) * np.log1p(distances / _DEGREES) - log_volume[:, None]


def _log_densities(design, fitted, weights, steps):
    """(..., n): log-density of rows under components fitted to others with weights (..., n of those)."""
    flat = weights.reshape(-1, fitted.n)
    form, log_volume = fitted.fit(flat)
    for _ in range(steps - 1):
        form, log_volume = fitted.fit(flat, fitted.distances(form))
    return _log_density(design.distances(form), log_volume, design.width).reshape(*weights.shape[:-1], -1)


def _em(design, parts, weight=None, last=1, steps=_LONG_RUN, tolerance=1e-6):
    """EM from the responsibilities (r, K, n) in r mixtures of K components each, the last ones of which are the poison.

    weight: of those together, free or given; last: how many they are, one number or (r,). Returns the log-odds of poison
    (r, n), responsibilities (r, K, n), and the mean log-likelihoods (r,).
    """
    parts = parts.copy()
    poison = np.arange(parts.shape[1]) >= parts.shape[1] - np.broadcast_to(last, len(parts))[:, None]
    weight = None if weight is None else np.clip(weight, 1e-6, 1 - 1e-6)
    log_odds, likelihoods = np.empty((len(parts), parts.shape[2])), np.full(len(parts), -np.inf)
    running, distances = np.arange(len(parts)), None  # mixtures that have not converged
    for step in range(steps):
        before, is_poison = parts[running], poison[running]
        shares = np.clip(before.mean(axis=2), 1e-6, 1 - 1e-6)
        if weight is not None:
            of_all = np.where(is_poison, weight, 1 - weight)
            poisoned = (shares * is_poison).sum(axis=1, keepdims=True)
            shares *= of_all / np.where(is_poison, poisoned, shares.sum(axis=1, keepdims=True) - poisoned)
        form, log_volume = design.fit(before.reshape(-1, parts.shape[2]), distances)
        distances = design.distances(form)
        densities = _log_density(distances, log_volume, design.width).reshape(before.shape) + np.log(shares)[:, :, None]
        total = np.logaddexp.reduce(densities, axis=1)
        parts[running] = np.exp(np.maximum(densities - total[:, None], _SMALLEST))
        likelihood = total.mean(axis=1)
        done = (abs(likelihood - likelihoods[running]) < tolerance) | (step == steps - 1)
        likelihoods[running] = likelihood
        for i in np.flatnonzero(done):
            p = is_poison[i]
            log_odds[running[i]] = np.logaddexp.reduce(densities[i, p]) - np.logaddexp.reduce(densities[i, ~p])
        distances = distances.reshape(before.shape)[~done].reshape(-1, parts.shape[2])
        running = running[~done]
        if not len(running):
            break
    return log_odds, parts, likelihoods


def _carry_over(design, few, second):
    """Responsibilities of the second component for all rows (r, n), from those for a few."""
    shares = np.clip(second.mean(axis=1), 1e-6, 1 - 1e-6)[:, None]
    first, other = np.moveaxis(_log_densities(design, few, np.stack([1 - second, second], axis=1), 3), 1, 0)
    other = other + np.log(shares)
    return np.exp(other - np.logaddexp(first + np.log1p(-shares), other))


def _held_out(values, *mixtures):
    """(r,) of each mixture, responsibilities (r, K, n): mean log-likelihood on the half of the rows not fitted to."""
    designs, total = [_Design(values[fold::2]) for fold in (0, 1)], [0.0] * len(mixtures)
    for fold, (seen, unseen) in enumerate((designs, designs[::-1])):
        for i, parts in enumerate(mixtures):
            weights = parts[:, :, fold::2]
            shares = np.clip(weights.mean(axis=2), 1e-3, 1)
            shares /= shares.sum(axis=1, keepdims=True)
            densities = _log_densities(unseen, seen, weights, 4) + np.log(shares)[:, :, None]
            total[i] = total[i] + np.logaddexp.reduce(densities, axis=1).sum(axis=1)
    return [of_mixture / len(values) for of_mixture in total]


def _average(values, splits, hypotheses, share, expected):
    """Log-odds of poison, averaged over the hypotheses (evidence, split, side) about a class by their evidence.

    Splits of nearly the same evidence often err on different rows; the average is better than the best of them. So it is
    with the number of components: `expected`, a number of poisoned rows and its deviation, or None, weighs them.
    """
    strongest, alone = max(hypotheses)[0], len(hypotheses) == 1  # one stands for a class that is not suspected
    hypotheses = [h for h in hypotheses if h[0] - strongest > _NEGLIGIBLE]
    design = _Design(values)
    starts = [(np.roll(splits[index]["parts"], -1 - side, axis=0), 1) for _, index, side in hypotheses]
    log_odds = _settle(design, starts, share, steps=1 if alone else _LONG_RUN)  # the poison is the last
    if not alone:
        ends = {}  # rows that are more likely poison than not -> hypotheses of two parts; many end in the same
        for i, (parts, _) in enumerate(starts):
            poisoned = log_odds[i] > 0
            if len(parts) == 2 and 0 < poisoned.sum() < design.n:
                ends.setdefault(poisoned.tobytes(), []).append(i)
        finer = [_finer(values, log_odds[same[0]] > 0, pieces) for same in ends.values() for pieces in _FINER]
        refined = _settle(design, finer, share).reshape(len(ends), len(_FINER), design.n)
        for same, odds in zip(ends.values(), refined, strict=True):
            odds = np.concatenate([log_odds[same[:1]], odds])
            log_odds[same] = _mean_log_odds(odds, _nearness(odds, expected))
    return _mean_log_odds(log_odds, np.array([evidence - strongest for evidence, _, _ in hypotheses])[:, None])


def _mean_log_odds(log_odds, weights):
    """Log-odds (n,) of the mean probability, from log-odds (r, n) and log-weights (r, 1)."""
    yes, no = (np.logaddexp.reduce(weights - np.logaddexp(0, odds)) for odds in (-log_odds, log_odds))
    return yes - no


def _nearness(log_odds, expected):
    """Log-weights (r, 1) of log-odds (r, n): how near the rows above 0 come to the expected number, if there is one."""
    number, _, deviation = expected or (0, 0, np.inf)
    deviation = np.hypot(max(deviation, 1.0), _COUNT_ERROR * number)
    off = ((log_odds > 0).sum(axis=1, keepdims=True) - number) / deviation
    return -np.log1p(off**2)  # t with one degree of freedom


def _settle(design, starts, share, steps=_LONG_RUN):
    """Log-odds of poison (r, n) after EM from r starts: responsibilities (K, n), how many of the last are the poison's."""
    log_odds = np.empty((len(starts), design.n))
    for size in {len(parts) for parts, _ in starts}:
        alike = [i for i, (parts, _) in enumerate(starts) if len(parts) == size]
        at_once = max(1, _ENTRIES // (size * design.n))
        for some in (alike[at : at + at_once] for at in range(0, len(alike), at_once)):
            parts, last = (np.array(column) for column in zip(*(starts[i] for i in some), strict=True))
            log_odds[some] = _em(design, parts, share, last, steps)[0]
    return log_odds


def _finer(values, poisoned, pieces):
    """Responsibilities (1 + pieces, n), the larger half in so many components, and how many of the last are the poison's.

    With one, the outskirts of the larger half may go to the smaller: of a class that is mostly poisoned a tenth of the
    poison, of one that is poisoned by a third a tenth of the clean rows. With three, the smaller may lose as many.
    """
    small, large = sorted((~poisoned, poisoned), key=np.sum)
    of_large = [large]
    while len(of_large) < pieces:
        of_large.sort(key=np.sum)
        piece = of_large.pop()
        centred = values[piece] - values[piece].mean(axis=0)
        up = np.zeros(len(values), bool)
        up[piece] = _two_means(centred @ eigh(centred.T @ centred)[1][:, -1])
        of_large += [up, piece & ~up]
    ordered = [small, *of_large] if large is poisoned else [*of_large, small]  # the poison is the last
    return 0.05 + 0.9 * np.array(ordered), pieces if large is poisoned else 1


def _discriminated(values, log_odds, expected):
    """Log-odds (n,) averaged with those along a linear discriminant between the two halves of a class.

    values: (n, q), all directions of the class. A mixture bends around single rows at the outskirts of its halves; a plane
    cannot. Of two planes the one is taken along which two components promise fewer errors, for rows it was not fitted to. The
    averages go to the rows in the order of the sum of both, each in units of the distance between the halves: along the
    plane log-odds hardly grow where the halves end.
    """
    n, count = len(log_odds), int((log_odds > 0).sum())
    size = round(_reconciled(count, expected, _BENT_ERROR))
    if not (2 <= size <= n - 2 and 1 / _FAR_OFF < count / size < _FAR_OFF):
        return log_odds
    ranks = np.argsort(np.argsort(-log_odds, kind="stable"), kind="stable")
    up = ranks < size
    unseen = _out_of_fold(values, up, ranks)
    fits = []
    for along, seen in zip(unseen, _along_discriminants(values, up, values), strict=True):
        design = _Design(along[:, None] / (along.std() + 1e-12))
        odds, parts, _ = _em(design, 0.05 + 0.9 * np.array([[~up, up]]), size / n)
        fits.append((parts[0, 1, np.argsort(-along, kind="stable")[:size]].mean(), odds[0], seen))
    _, odds, seen = max(fits, key=lambda fit: fit[0])
    odds = np.stack([log_odds, odds])
    together = sum(one / (one[up].mean() - one[~up].mean() + 1e-12) for one in (log_odds, seen))
    in_order = np.empty(n)
    in_order[np.argsort(together, kind="stable")] = np.sort(_mean_log_odds(odds, _nearness(odds, expected)))
    return in_order


def _raised(log_odds, expected):
    """Log-odds with as much added as brings the rows above 0 up to the least expected number; both numbers have errors.

    EM counts too few: the component of the clean rows, which is wider or larger, takes poisoned rows where the two meet.
    Too many are left alone, since a poisoned row left in costs more than a clean row removed.
    """
    count = int((log_odds > 0).sum())
    number = count + round(np.clip(_reconciled(count, expected, _CUT_ERROR) - count, 0, _CUT_ERROR * count))
    if number == count:
        return log_odds
    ranked = np.sort(log_odds)[::-1]
    return log_odds - ranked[number - 1 : number + 1].mean()


def _reconciled(count, expected, share):
    """Poisoned rows by a count that may be off by that share, and by `_expected`: the mean of both, each by its precision."""
    if expected is None or not count:
        return count
    least, most, deviation = expected
    error = share * count
    return count + (np.clip(count, least, most) - count) * error**2 / (error**2 + deviation**2)


def _ashmans_d(values, up):
    """Ashman's D (Ashman, Bird & Zepf 1994, AJ 108:2348) of two halves of values (n, k): how far apart their means lie along
    the linear discriminant, in deviations, each row along one that was not fitted to it.
    """
    some = _evenly(values, _DISTINCT_ROWS)
    values, up = values[some], up[some]
    if min(up.sum(), (~up).sum()) < 2:  # each fold needs both
        return 0.0
    along = _out_of_fold(values, up, np.argsort(np.argsort(up, kind="stable"), kind="stable"))[0]
    upper, lower = along[up], along[~up]
    return (upper.mean() - lower.mean()) / np.sqrt((upper.var() + lower.var()) / 2 + 1e-12)


def _out_of_fold(values, up, ranks):
    """(2, n): `_along_discriminants` of each row, fitted to the rows of other folds; ranks tell the fold."""
    along = np.empty((2, len(values)))
    for fold in range(_FOLDS):
        left_out = ranks % _FOLDS == fold
        along[:, left_out] = _along_discriminants(values[~left_out], up[~left_out], values[left_out])
    return along


def _along_discriminants(values, up, others):
    """(2, m): other values (m, q) along two linear discriminants between two halves of values (n, q).

    One by the covariance within the halves, which knows that the trigger moves some rows further than others; and one by that
    of the other classes, here the identity, which owes nothing to rows that are in the wrong half.
    """
    means = values[up].mean(axis=0), values[~up].mean(axis=0)
    within = values - np.where(up[:, None], *means)
    prior = values.shape[1] + 2  # rows' worth of the identity, as in a component
    covariance = (within.T @ within + prior * np.eye(values.shape[1])) / (len(values) + prior)
    apart = means[0] - means[1]
    return np.stack([np.linalg.solve(covariance, apart), apart]) @ (others - (means[0] + means[1]) / 2).T


def _entropy(counts):
    """In nats, with the first-order correction for few rows (Miller 1955)."""
    shares = counts[counts > 0] / counts.sum()
    return -(shares * np.log(shares)).sum() + (len(shares) - 1) / (2 * counts.sum())
