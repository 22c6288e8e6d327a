"""How good probabilities are, and how good rankings: calibration error, Brier score, areas under curves, isotonic regression.

`scores` (ndarray): [n], between 0 and 1. `right` (ndarray): [n] bool, whether each of n entities is right. `weights` (ndarray):
[n], what each counts for.
"""

from typing import Any, Dict, List, NamedTuple, Sequence

import numpy as np

N_BINS = 15
Array = Any  # a numpy array


class Bin(NamedTuple):
    """Some entities of like score: their mean score, the share of right ones, and what they weigh."""

    score: float
    right: float
    weight: float


def bins(scores: Array, right: Array, weights: Array, n_bins: int = N_BINS) -> List[Bin]:
    """Bins of equal weight, by ascending score; no empty ones."""
    order = np.argsort(scores, kind="stable")
    middles = np.cumsum(weights[order]) - weights[order] / 2
    numbers = np.minimum((n_bins * middles / weights.sum()).astype(int), n_bins - 1)
    parts = [order[numbers == number] for number in range(n_bins)]
    mean = np.average
    return [
        Bin(
            float(mean(scores[p], weights=weights[p])),
            float(mean(right[p], weights=weights[p])),
            float(weights[p].sum()),
        )
        for p in parts
        if len(p)
    ]


def calibration_error(scores: Array, right: Array, weights: Array, n_bins: int = N_BINS) -> float:
    """Expected calibration error over bins of equal weight (Nguyen and O'Connor 2015, arXiv 1508.05154)."""
    return sum(b.weight * abs(b.score - b.right) for b in bins(scores, right, weights, n_bins)) / float(weights.sum())


def brier(scores: Array, right: Array, weights: Array) -> float:
    """Mean squared difference of score and truth (Brier 1950)."""
    return float(np.average((scores - right) ** 2, weights=weights))


def auroc(scores: Array, right: Array) -> float:
    """Chance that a right entity has a higher score than a wrong one, ties counting half; nan if there are not both."""
    n_right = int(right.sum())
    n_wrong = len(right) - n_right
    if not n_right or not n_wrong:
        return float("nan")
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float((ranks[right].sum() - n_right * (n_right + 1) / 2) / (n_right * n_wrong))


def average_precision(scores: Array, right: Array) -> float:
    """Mean over the right entities of the precision at their score, equal scores taken together; nan without right ones."""
    if not right.any():
        return float("nan")
    values, place = np.unique(-scores, return_inverse=True)
    found = np.cumsum(np.bincount(place, minlength=len(values)))
    correct = np.cumsum(np.bincount(place, weights=right, minlength=len(values)))
    return float(np.mean((correct / found)[place[right]]))


def isotonic(scores: Array, right: Array, weights: Array) -> Array:
    """The monotone map of least squared error, at each score [n] (pool adjacent violators; Zadrozny and Elkan 2002)."""
    values, place = np.unique(scores, return_inverse=True)
    mass = np.bincount(place, weights=weights, minlength=len(values))
    total = np.bincount(place, weights=weights * right, minlength=len(values))
    blocks: List[List[float]] = []  # weight, weight of the right ones, number of values
    for weight, value in zip(mass, total):
        blocks.append([weight, value, 1])
        while len(blocks) > 1 and blocks[-2][1] * blocks[-1][0] >= blocks[-1][1] * blocks[-2][0]:
            last = blocks.pop()
            blocks[-1] = [one + other for one, other in zip(blocks[-1], last)]
    return np.concatenate([np.full(int(n), value / weight) for weight, value, n in blocks])[place]


def precision_recall(
    scores: Array, right: Array, weights: Array, shares: Array, thresholds: Sequence[float]
) -> Dict[str, List[float]]:
    """Precision (1 where nothing is left) and recall of the entities scored at least each threshold.

    shares (ndarray): [n], what each adds to recall if it is right.
    """
    parts = [scores >= threshold for threshold in thresholds]
    return {
        "precision": [float(np.average(right[p], weights=weights[p])) if p.any() else 1.0 for p in parts],
        "recall": [float(shares[p & right].sum()) for p in parts],
    }
