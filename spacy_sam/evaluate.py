"""Strict span scores of the base, the experts and the merged plans on annotated corpora, through spaCy's scorer."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import spacy
from spacy.language import Language
from spacy.scorer import get_ner_prf
from spacy.tokens import Doc
from spacy.training import Example
from spacy.util import filter_spans

from .bank import ExpertBank
from .component import SamNer
from .corpora import Record
from .plan import Plan, TaskModelSpec
from .registered import make_domain_similarity, make_sam, make_sam_eco, make_sampling_evaluation
from .select.strategies import Strategy

ROWS = ("base", "unified", "experts", "all", "sam", "eco")
TITLES = {"all": "all merged", "sam": "SaM", "eco": "SaM-eco"}


@dataclass(frozen=True)
class Result:
    """One row on one corpus: micro precision, recall and F1 (0 to 1), the same per type, and what was run."""

    p: float
    r: float
    f: float
    per_type: Dict[str, Dict[str, float]] = field(default_factory=dict)
    task_models: Tuple[str, ...] = ()
    n_docs: int = 0


Table = Dict[str, Dict[str, Result]]  # corpus -> row -> result


def make_pipeline(bank: Optional[Path] = None, labels: Sequence[str] = (), **config: Any) -> Tuple[Language, SamNer]:
    """A blank English pipeline with `sam_ner`, and the component. `config`: more of its settings."""
    nlp = spacy.blank("en")
    settings = {"bank": str(bank) if bank else None, "labels": list(labels), **config}
    component = nlp.add_pipe("sam_ner", config=settings)
    assert isinstance(component, SamNer)
    return nlp, component


def gold_doc(nlp: Language, record: Record) -> Doc:
    """The reference document. Entity-free ones are marked as annotated, or false positives in them would not count."""
    doc = nlp.make_doc(record.text)
    spans = [doc.char_span(start, end, label=label, alignment_mode="expand") for start, end, label in record.entities]
    doc.set_ents(filter_spans([span for span in spans if span is not None]))
    return doc


def score(nlp: Language, component: SamNer, records: Sequence[Record], plan: Optional[Plan]) -> Result:
    """Annotate records by a plan and score the entities.

    nlp (Language): Makes the documents.
    component (SamNer): Annotates; its labels must be the corpus's.
    records (Sequence[Record]): Texts with gold entities.
    plan (Optional[Plan]): What to run; None for the component's own.
    RETURNS (Result): Strict scores: type and both boundaries (in tokens) must be right.
    """
    golds = [gold_doc(nlp, record) for record in records]
    predicted = component.pipe((nlp.make_doc(record.text) for record in records), plan=plan)
    examples = [Example(doc, gold) for doc, gold in zip(predicted, golds)]
    scores = get_ner_prf(examples)
    used = plan or component.plan
    per_type = {label: dict(prf) for label, prf in sorted((scores["ents_per_type"] or {}).items())}
    names = tuple(spec.name for spec in used.task_models) if used else ()
    p, r, f = (float(scores[key] or 0.0) for key in ("ents_p", "ents_r", "ents_f"))
    return Result(p, r, f, per_type=per_type, task_models=names, n_docs=len(examples))


def plans(bank: ExpertBank, merge: Any, n_experts: int, rows: Sequence[str]) -> Dict[str, Any]:
    """What each row runs: a plan, or a strategy that makes one for the corpus at hand."""
    names = [card.name for card in bank.experts]
    found: Dict[str, Any] = {}
    if "base" in rows:
        found["base"] = plan_of(bank)
    if "unified" in rows:
        found.update({card.name: plan_of(bank, [card.name]) for card in bank.baselines})
    if "experts" in rows:
        found.update({name: plan_of(bank, [name]) for name in names})
    if "all" in rows:
        found[TITLES["all"]] = plan_of(bank, names, merge)
    if "sam" in rows:
        found[TITLES["sam"]] = sam(merge, n_experts)
    if "eco" in rows:
        found[TITLES["eco"]] = make_sam_eco(_selectors(), merge, n_experts)
    return found


def sam(merge: Any, n_experts: int) -> Strategy:
    """The paper's strategy with its two selectors."""
    return make_sam(_selectors(), merge, n_experts)


def _selectors() -> Dict[str, Any]:
    return {"similarity": make_domain_similarity(), "sampling": make_sampling_evaluation()}


def plan_of(bank: ExpertBank, experts: Sequence[str] = (), merge: Any = None) -> Plan:
    """A plan of one task model that nobody selected. No experts: the base."""
    spec = TaskModelSpec(tuple(experts), (), dict(merge.config) if merge is not None else {})
    return Plan(bank.base_hash, (spec,), {name: bank.adapter_hash(name) for name in experts})


def evaluate(
    nlp: Language,
    component: SamNer,
    corpora: Mapping[str, Sequence[Record]],
    *,
    merge: Any,
    n_experts: int = 3,
    rows: Sequence[str] = ROWS,
    on_result: Callable[[str, str, Result], None] = lambda corpus, row, result: None,
) -> Table:
    """Compare what a bank's parts and plans reach on some corpora.

    nlp (Language): Tokenises.
    component (SamNer): Holds the bank and the engine; its labels and plan are changed.
    corpora (Mapping[str, Sequence[Record]]): Annotated corpora by name; their types are what is asked.
    merge (MergeMethod): Merges the rows "all", "sam" and "eco".
    n_experts (int): Experts of a task model in "sam" and "eco".
    rows (Sequence[str]): Which of ROWS to run.
    on_result (Callable): Told of each result as it comes.
    RETURNS (Table): Results by corpus and row.
    """
    table: Table = {}
    for name, records in corpora.items():
        component.set_labels(sorted({label for record in records for _, _, label in record.entities}))
        table[name] = {}
        for row, made in plans(component.parts.bank, merge, n_experts, rows).items():
            plan = made if isinstance(made, Plan) else _select(component, made, records)
            table[name][row] = score(nlp, component, records, plan)
            on_result(name, row, table[name][row])
    return table


def _select(component: SamNer, strategy: Strategy, records: Sequence[Record]) -> Plan:
    component.parts.strategy = strategy
    return component.select(record.text for record in records)


def to_json(table: Table) -> Dict[str, Any]:
    """The table as plain JSON types."""
    return {corpus: {row: asdict(result) for row, result in results.items()} for corpus, results in table.items()}


def to_rows(table: Table) -> List[List[str]]:
    """F1 in percent: a header, a line for each row, a column for each corpus and their mean."""
    corpora = list(table)
    rows = list(next(iter(table.values()))) if table else []
    lines = [["", *corpora, "mean"]]
    for row in rows:
        scores = [table[corpus][row].f for corpus in corpora]
        lines.append([row, *(f"{100 * f:.1f}" for f in scores), f"{100 * sum(scores) / len(scores):.1f}"])
    return lines


def exclude(records: Sequence[Record], labels: Sequence[str]) -> List[Record]:
    """Records without the entities of some types (CrossNER's "miscellaneous", say)."""
    return [Record(r.text, tuple(e for e in r.entities if e[2] not in labels)) for r in records]
