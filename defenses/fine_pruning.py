"""Feature norm, not fine-pruning: the score of a sample is the Euclidean norm of its penultimate features.

Labels, logits and the other rows do not count. Only the name and the idea are borrowed, from
Liu, Dolan-Gavitt and Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks" (RAID 2018):
a backdoor sits in units that clean inputs leave dormant, so a triggered input, which adds their activation to that of
the others, is expected to have the larger features.

Departure: this is not the paper's defense. Fine-pruning ranks the units of the network by their mean activation on
clean data, prunes the dormant ones, and trains the rest further on clean data; it repairs a model, and scores no
samples. Here there is neither clean data nor a model to prune, and nothing is pruned or tuned.
"""

import numpy as np


class BackdoorDefense:
    """Rank samples by the L2 norm of their features."""

    RELIES_ON = ()

    def fit(self, features, labels, poison_fraction, **kwargs):
        """Nothing to learn."""
        return self

    def score_samples(self, features, logits):
        """L2 norm of each row of features, (N,) float64 >= 0; higher = more suspicious."""
        return np.sqrt(np.einsum("nd,nd->n", features, features, dtype=np.float64))
