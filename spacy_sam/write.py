"""Candidates into Docs: `doc.spans` with scores, `doc.ents` without overlaps. Text and existing entities are kept."""

from typing import Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from spacy.pipeline.span_ruler import prioritize_existing_ents_filter
from spacy.tokens import Doc, Span, SpanGroup

from .align import Candidate, resolve_overlaps

EntsFilter = Callable[[Iterable[Span], Iterable[Span]], Iterable[Span]]
Pair = Tuple[Span, Candidate]


def merge_windows(found: Iterable[Sequence[Candidate]]) -> List[Candidate]:
    """The candidates of one document's windows, sorted; what overlapping windows find twice is kept once, with its best score."""
    kept: Dict[Tuple[int, int, str], Candidate] = {}
    for candidate in (candidate for window in found for candidate in window):
        key = (candidate.start, candidate.end, candidate.label)
        old = kept.get(key, candidate)
        sources = tuple(sorted({*old.sources, *candidate.sources}))
        kept[key] = candidate._replace(score=max(old.score, candidate.score), sources=sources)
    return sorted(kept.values())


def to_spans(doc: Doc, candidates: Sequence[Candidate], threshold: float) -> List[Pair]:
    """Place candidates on token boundaries, widening to whole tokens, and leave out those scored under `threshold`."""
    kept: Dict[Tuple[int, int, str], Pair] = {}
    for candidate in candidates:
        span = doc.char_span(candidate.start, candidate.end, label=candidate.label, alignment_mode="expand")
        if span is None or candidate.score < threshold:
            continue
        key = (span.start, span.end, span.label_)
        if key not in kept or kept[key][1].score < candidate.score:
            kept[key] = (span, candidate)
    return list(kept.values())


def write_spans(doc: Doc, pairs: Sequence[Pair], key: str, plan: Optional[str], overwrite: bool) -> None:
    """Write all spans to `doc.spans[key]`.

    attrs: `scores` and `sources` (indexes of the plan's task models), parallel to the spans, and the `plan`'s fingerprint.
    Spans that were in the group stay behind the new ones unless `overwrite`; without a score of their own they get 1.0.
    """
    spans = [span for span, _ in pairs]
    scores = [candidate.score for _, candidate in pairs]
    sources = [list(candidate.sources) for _, candidate in pairs]
    if not overwrite and key in doc.spans:
        group = doc.spans[key]
        own = {(span.start, span.end, span.label) for span in spans}
        old_scores, old_sources = group.attrs.get("scores", []), group.attrs.get("sources", [])
        for index, span in enumerate(group):
            if (span.start, span.end, span.label) not in own:
                spans.append(span)
                scores.append(float(old_scores[index]) if index < len(old_scores) else 1.0)
                sources.append(list(old_sources[index]) if index < len(old_sources) else [])
    doc.spans[key] = SpanGroup(doc, name=key, spans=spans, attrs={"scores": scores, "sources": sources, "plan": plan})


def write_ents(doc: Doc, pairs: Sequence[Pair], ents_filter: Optional[EntsFilter], overwrite: bool) -> None:
    """Write non-overlapping spans to `doc.ents`, together with the entities that are there.

    Between new spans the higher score wins, then the one that more task models found. Between new and existing ones
    `ents_filter` decides: by default existing entities stay. With `overwrite` they are removed before, as in SpanRuler.
    """
    placed = {c._replace(start=span.start_char, end=span.end_char): span for span, c in pairs}
    new = [placed[candidate] for candidate in resolve_overlaps(list(placed))]
    existing = () if overwrite else doc.ents
    doc.set_ents(sorted((ents_filter or prioritize_existing_ents_filter)(existing, new)))
