"""Random filter: what a defense is worth that knows nothing.

Each sample gets a number drawn evenly from [0, 1). The number is a hash of the sample's features, keyed by the seed
(BLAKE2b, RFC 7693), not the next one of a stream: so a sample keeps its number when the rows are put in another order,
and the order of the rows carries nothing. Samples with the same features get the same number.
"""

import hashlib

import numpy as np


class BackdoorDefense:
    """Rank samples at random."""

    RELIES_ON = ()

    def fit(self, features, labels, poison_fraction, seed=0, **kwargs):
        """Remember the seed, an int."""
        self.key_ = str(int(seed)).encode()
        return self

    def score_samples(self, features, logits):
        """Random numbers, (N,) float64 in [0, 1); higher = more suspicious."""
        rows = np.ascontiguousarray(features, dtype="<f4")
        digests = b"".join(hashlib.blake2b(row, digest_size=8, key=self.key_).digest() for row in rows)
        return (np.frombuffer(digests, dtype="<u8") >> 11) * 2.0**-53  # 53 bits: what a float64 holds exactly
