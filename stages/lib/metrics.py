"""What a model and a filter are measured by."""

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from stages.lib.errors import UserError
from stages.lib.inference import predict
from stages.lib.poisoning import PoisonedData


def defense_score(clean_acc: float, asr: float, poison_recall: float) -> float:
    """``(clean_acc + (1 - asr) + poison_recall) / 3``, in [0, 1], higher is better."""
    return (clean_acc + (1 - asr) + poison_recall) / 3


def of_model(checkpoint, poisoned: PoisonedData, device) -> dict[str, float]:
    """How well a model does its work and the attacker's.

    `clean_acc`: share of the clean test images that are classified right. `asr`, attack success rate: share of the
    triggered test images that are taken for what the attacker wants, the mean over his triggers; which images count and
    what he wants stands with each attack in `stages.lib.attacks`. For one target: the share of the images of another
    true label that are taken for the target. `target_clean_acc`: share of the clean test images of the target classes
    that are classified right. The last two are left out where nothing is poisoned. Raises `UserError` without test images.
    """
    model, architecture = checkpoint.model(), checkpoint.architecture
    clean = poisoned.test()
    if not len(clean.labels):
        raise UserError("no test images to measure the model on: set data.test_fraction, or add a test split")
    right = predict(model, architecture, clean.images, device) == clean.labels
    found = {"clean_acc": float(right.mean())}
    rates = [
        float((predict(model, architecture, triggered.images, device) == wanted).mean())
        for triggered, wanted in poisoned.triggered_tests()
    ]
    if rates:
        found["asr"] = float(np.mean(rates))
        found["target_clean_acc"] = float(right[np.isin(clean.labels, poisoned.index.target_labels)].mean())
    return found


def of_filter(scores: np.ndarray, kept: np.ndarray, poisoned: np.ndarray) -> dict[str, float | int]:
    """How well the filter found the poison: (N,) scores, higher = more suspicious; kept and poisoned, (N,) bool.

    `poison_recall`: share of the poisoned rows that were removed. `auroc` and `average_precision` of the scores judge
    the ranking at every budget. All three are left out where nothing is poisoned.
    """
    removed = ~kept
    found: dict[str, float | int] = {
        "rows_removed": int(removed.sum()),
        "clean_removed": int((removed & ~poisoned).sum()),
    }
    if poisoned.any():
        found["poison_recall"] = float(removed[poisoned].mean())
        found["auroc"] = float(roc_auc_score(poisoned, scores))
        found["average_precision"] = float(average_precision_score(poisoned, scores))
    return found
