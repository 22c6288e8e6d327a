"""Domain similarity: the cosine between the sample's mean embedding and each expert's centroid."""

from dataclasses import dataclass
from typing import Dict, Sequence

import numpy as np

from ..errors import SamError
from ..plan import Centroid, Selection
from .base import SelectionContext, make_selection


@dataclass(frozen=True)
class DomainSimilarity:
    """The paper's first selector (arXiv 2506.22813): experts whose training texts lie nearest to the target's."""

    name = "domain_similarity"

    def __call__(self, context: SelectionContext, n_experts: int) -> Selection:
        """Rank the experts by cosine similarity, in [-1, 1].

        RAISES: SamError S304 if an expert's centroid is missing or of another encoder.
        """
        target = context.encode(context.texts).mean(0)
        return make_selection(self.name, domain_similarities(target, context), context, n_experts)


def domain_similarities(target: np.ndarray, context: SelectionContext) -> Dict[str, float]:
    """Cosine of the target's mean embedding [dimension] and every expert's centroid."""
    cards = context.bank.experts
    for card in cards:
        centroid = card.centroid
        if centroid is None or centroid.encoder != context.encoder or len(centroid.vector) != len(target):
            known = centroid.encoder if centroid else "none"
            raise SamError("S304", name=card.name, encoder=context.encoder, known=known)
    if not cards:
        return {}
    centroids = np.stack([card.centroid.array for card in cards])  # type: ignore[union-attr]  # checked above
    return dict(zip([card.name for card in cards], cosines(centroids, target).tolist()))


def cosines(vectors: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Cosines of vectors [n, dimension] and a target [dimension]: [n], float64; 0 where one of the two is zero."""
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(target)
    products = (vectors * target).sum(1)  # row by row, so that equal vectors have equal cosines
    return np.divide(products, norms, out=np.zeros(len(vectors)), where=norms > 0)


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Cosine of two vectors; 0 if one of them is zero."""
    return float(cosines(first[None], second)[0])


def make_centroid(embeddings: np.ndarray, encoder: str) -> Centroid:
    """The mean of training texts' embeddings [n_texts, dimension], as it is kept in an expert's card."""
    mean: Sequence[float] = np.asarray(embeddings, dtype=np.float64).mean(0).round(7).tolist()
    return Centroid(encoder, len(embeddings), tuple(mean))
