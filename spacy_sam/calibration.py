"""Scores as probabilities: a monotone map from an entity's raw score to the chance that it is right, fitted on dev sets."""

import math
from dataclasses import asdict, dataclass
from typing import Dict, Iterable, List, Mapping, Optional, Sequence

import numpy as np
from numpy.typing import NDArray

from .align import Candidate
from .errors import SamError
from .plan import TaskModelSpec

EDGE = 1e-6  # raw scores are kept this far from 0 and 1, where log-odds have no end
RIDGE = 1e-2  # pulls each parameter to 0 about as much as a hundredth of an entity does, so that every fit has an end
MAX_STEPS = 100
LEAST_SLOPE = 1e-3  # of scores that say nothing, or the contrary: their order is kept
PREFIX = "score_"  # of the parameters in `decoding` of a bank's file


@dataclass(frozen=True)
class Calibration:
    """Platt scaling of log-odds (Platt 1999; for neural networks Guo et al. 2017, arXiv 1706.04599).

    The log-odds that an entity is right are `slope * logit(score) + offset`, and `single_expert` more in a plan of one expert
    that is not merged: strategies make such a plan where one expert knows the domain. Of an entity that several task models
    found, `score` is the highest one.

    slope (float): Above 0, so that in one plan the order of scores is kept. offset, single_expert (float): Log-odds.
    RAISES: SamError S126 if a parameter is not finite, or the slope is not above 0.
    """

    slope: float
    offset: float
    single_expert: float = 0.0

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.slope, self.offset, self.single_expert))) or self.slope <= 0:
            raise SamError("S126", found=asdict(self))

    def __call__(self, score: float, is_single: bool = False) -> float:
        """The probability that an entity is right. score (float): Raw, 0 to 1. is_single (bool): See `is_single_expert`."""
        log_odds = self.slope * logit(score) + self.offset + self.single_expert * is_single
        return 1 / (1 + math.exp(-log_odds)) if log_odds > 0 else math.exp(log_odds) / (1 + math.exp(log_odds))

    def apply(self, candidates: Iterable[Candidate], specs: Sequence[TaskModelSpec]) -> List[Candidate]:
        """Candidates with probabilities as scores, in the order given. specs (Sequence[TaskModelSpec]): The plan's."""
        is_single = is_single_expert(specs)
        return [candidate._replace(score=self(candidate.score, is_single)) for candidate in candidates]

    def to_decoding(self) -> Dict[str, float]:
        """As a bank's file keeps it in `decoding`."""
        return {PREFIX + name: value for name, value in asdict(self).items()}

    @classmethod
    def from_decoding(cls, decoding: Mapping[str, float]) -> Optional["Calibration"]:
        """What a bank's file keeps in `decoding`; None if there is nothing. RAISES: SamError S126 if it cannot be used."""
        found = {name.removeprefix(PREFIX): value for name, value in decoding.items() if name.startswith(PREFIX)}
        if not found:
            return None
        try:
            return cls(**found)
        except TypeError as error:
            raise SamError("S126", found=found) from error


def logit(score: float) -> float:
    """Log-odds of a score between 0 and 1, kept `EDGE` away from both."""
    kept = min(max(score, EDGE), 1 - EDGE)
    return math.log(kept / (1 - kept))


def is_single_expert(specs: Sequence[TaskModelSpec]) -> bool:
    """Whether a plan is one expert that is not merged."""
    return len(specs) == 1 and len(specs[0].experts) == 1


def fit_calibration(
    scores: Sequence[float],
    right: Sequence[bool],
    is_single: Sequence[bool],
    weights: Optional[Sequence[float]] = None,
) -> Calibration:
    """The calibration of highest likelihood.

    scores (Sequence[float]): Raw scores of entities, between 0 and 1.
    right (Sequence[bool]): Whether each is right: type and both boundaries.
    is_single (Sequence[bool]): Whether it comes from a plan of one expert. If all do, `single_expert` is 0: nothing tells it from
        the offset.
    weights (Optional[Sequence[float]]): What each counts for; None for all alike.
    RETURNS (Calibration): With a slope of at least `LEAST_SLOPE`.
    """
    are_mixed = not all(is_single)
    columns = [[logit(score), 1.0, float(single and are_mixed)] for score, single in zip(scores, is_single)]
    inputs = np.array(columns, dtype=float).reshape(-1, 3)
    truth = np.array(right, dtype=float)
    counts = np.ones(len(truth)) if weights is None else np.array(weights, dtype=float)
    slope, offset, single = logistic(inputs, truth, counts)
    if slope < LEAST_SLOPE:
        inputs[:, 0] = 0
        _, offset, single = logistic(inputs, truth, counts)
        slope = LEAST_SLOPE
    return Calibration(float(slope), float(offset), float(single))


def logistic(inputs: NDArray, truth: NDArray, weights: NDArray) -> NDArray:
    """Coefficients [k] of a logistic regression, by Newton's method. inputs: [n, k]. truth and weights: [n]."""
    found = np.zeros(inputs.shape[1])
    penalty = RIDGE * np.eye(len(found))
    value = _loss(found, inputs, truth, weights)
    for _ in range(MAX_STEPS):
        chance = 1 / (1 + np.exp(-np.clip(inputs @ found, -500, 500)))
        gradient = inputs.T @ (weights * (chance - truth)) + penalty @ found
        curvature = (inputs * (weights * chance * (1 - chance))[:, None]).T @ inputs + penalty
        step = np.linalg.solve(curvature, gradient)
        # Halved until it leads down: far from the lowest point a whole step may overshoot.
        while np.abs(step).max() > 1e-10 and _loss(found - step, inputs, truth, weights) > value:
            step = step / 2
        found = found - step
        value = _loss(found, inputs, truth, weights)
        if np.abs(step).max() < 1e-8:
            break
    return found


def _loss(found: NDArray, inputs: NDArray, truth: NDArray, weights: NDArray) -> float:
    log_odds = inputs @ found
    return float(weights @ (np.logaddexp(0, log_odds) - truth * log_odds) + RIDGE * found @ found / 2)
