"""What a new bank's scores mean: a calibration fitted on the experts' dev sets."""

from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

from spacy.language import Language

from ..bank import ExpertBank
from ..calibration import Calibration, fit_calibration, is_single_expert
from ..component import SamNer
from ..corpora import Dataset, Record
from ..evaluate import gold_doc, plan_of
from ..plan import Plan
from ..registered import make_ties
from ..settings import DENSITY, SCALE

LEAST_ENTITIES = 200  # found; with fewer the fit is mostly chance


class Findings(NamedTuple):
    """Of the entities that a plan found in one dev set: raw scores, and whether each is right."""

    scores: List[float]
    right: List[bool]
    is_single: bool


def calibrate(
    bank: ExpertBank,
    domains: Dict[str, List[Dataset]],
    nlp: Language,
    component: SamNer,
    *,
    n_texts: int,
    report: Callable[[str], None],
) -> Optional[Calibration]:
    """Fit the bank's calibration, with every dev set in two parts: as a known domain and as a new one.

    Known: annotated by the domain's own expert. New: by all other experts, merged as `sam_ner` merges by default; nothing is
    selected, so that no encoder is needed. Every dev set weighs as much as every other.

    bank (ExpertBank): The bank; `bank.json` is rewritten.
    domains (Dict[str, List[Dataset]]): Dev sets by expert. n_texts (int): The first so many texts of each are used.
    nlp (Language), component (SamNer): Annotate by plans; labels are changed.
    report (Callable[[str], None]): Told the result.
    RETURNS (Optional[Calibration]): None, and the bank is left as it is, if fewer than `LEAST_ENTITIES` were found.
    """
    merge = make_ties(DENSITY, SCALE)
    names = [card.name for card in bank.experts]
    found: List[Findings] = []
    for name in names:
        others = [other for other in names if other != name]
        for dataset in domains.get(name, []):
            component.set_labels(dataset.labels)
            plans = [plan_of(bank, [name])] + [plan_of(bank, others, merge)] * (len(others) > 1)
            found += [find(nlp, component, dataset.records[:n_texts], plan) for plan in plans]
    n_found = sum(len(one.scores) for one in found)
    if n_found < LEAST_ENTITIES:
        report(f"No calibration: {n_found} entities were found, and {LEAST_ENTITIES} are needed. Scores are raw")
        return None
    calibration = fit(found)
    bank.calibration = calibration
    report(f"Calibration on {n_found} entities: {calibration}")
    return calibration


def find(nlp: Language, component: SamNer, records: Sequence[Record], plan: Plan) -> Findings:
    """Annotate records by a plan, and see which entities are right: type and both boundaries, in tokens."""
    settings = dict(component.cfg)
    component.cfg.update(calibrated=False, threshold=0.0, spans_key="sc", annotate_ents=False)
    try:
        docs = list(component.pipe((nlp.make_doc(record.text) for record in records), plan=plan))
    finally:
        component.cfg.update(settings)
    scores: List[float] = []
    right: List[bool] = []
    for doc, record in zip(docs, records, strict=True):
        gold = {(ent.start, ent.end, ent.label_) for ent in gold_doc(nlp, record).ents}
        scores += doc.spans["sc"].attrs["scores"]
        right += [(span.start, span.end, span.label_) in gold for span in doc.spans["sc"]]
    return Findings(scores, right, is_single_expert(plan.task_models))


def fit(found: Sequence[Findings]) -> Calibration:
    """The calibration of some findings, each of which weighs as much as every other. Rounded, as a bank's file keeps it."""
    columns = [
        (score, right, one.is_single, 1 / len(one.scores))
        for one in found
        for score, right in zip(one.scores, one.right)
    ]
    scores, right, single, shares = zip(*columns)
    mean = sum(shares) / len(shares)
    fitted = fit_calibration(scores, right, single, [share / mean for share in shares])
    return Calibration(round(fitted.slope, 3), round(fitted.offset, 3), round(fitted.single_expert, 3))
