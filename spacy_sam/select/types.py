"""Entity-type similarity: how near the types that are asked come to the types each expert was trained on."""

from dataclasses import dataclass
from typing import Dict, List, Tuple

import numpy as np

from ..plan import Selection
from .base import SelectionContext, make_selection


@dataclass(frozen=True)
class TypeSimilarity:
    """Experts that know the target's types, or some like them. The paper (arXiv 2506.22813) names it as an open question.

    The score of an expert is the mean, over the target's labels, of the cosine to the nearest of the expert's own.
    """

    name = "type_similarity"

    def __call__(self, context: SelectionContext, n_experts: int) -> Selection:
        """Rank the experts; scores are in [-1, 1]. An expert whose card names no types has 0."""
        asked = _normalised(context, context.labels)
        scores: Dict[str, float] = {}
        nearest: Dict[str, Dict[str, str]] = {}
        for card in context.bank.experts:
            scores[card.name] = 0.0
            if card.labels and context.labels:
                cosines = asked @ _normalised(context, card.labels).T  # [n_asked, n_known]
                scores[card.name] = float(cosines.max(1).mean())
                nearest[card.name] = {
                    label: card.labels[at] for label, at in zip(context.labels, cosines.argmax(1).tolist())
                }
        return make_selection(self.name, scores, context, n_experts, details={"nearest": nearest})


def _normalised(context: SelectionContext, labels: Tuple[str, ...]) -> np.ndarray:
    """Embeddings of names [n_labels, dimension], each of length 1."""
    names: List[str] = list(labels)
    vectors = context.encode(names)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
