"""Strict span scores, and the traps in them."""

from typing import List

import pytest
from fakes import plan_of
from pipelines import names_in

from spacy_sam import evaluate as ev
from spacy_sam.corpora import Record

TEXTS = ["Anna met Bella .", "nothing here", "Dan lives in Quito ."]


def gold(texts: List[str]) -> List[Record]:
    return [Record(text, tuple(names_in(text))) for text in texts]


def test_evaluate_perfect(make_case):
    parts = make_case()
    result = ev.score(parts.nlp, parts.sam, gold(TEXTS), plan_of(parts.bank, "expert0"))
    assert (result.p, result.r, result.f) == (1, 1, 1)
    assert result.n_docs == len(TEXTS)
    assert result.task_models == ("expert0",)


def test_evaluate_false_positives_in_texts_without_entities(make_case):
    """spaCy's scorer skips documents that look unannotated: one without entities must not look so."""
    parts = make_case()
    records = [*gold(TEXTS[:1]), Record("Emil and Fay came .")]
    n_right = len(records[0].entities)
    result = ev.score(parts.nlp, parts.sam, records, plan_of(parts.bank, "expert0"))
    assert result.r == 1
    assert result.p == pytest.approx(n_right / (n_right + len(names_in(records[1].text))))


def test_evaluate_is_strict(make_case):
    """A wrong type and a wrong boundary are both wrong."""
    parts = make_case()
    start, end, label = names_in("Anna Bell came .")[0]
    other = next(name for name in parts.sam.labels if name != label)
    plan = plan_of(parts.bank, "expert0")
    for wrong in ((start, end, other), (start, end + 5, label)):
        assert ev.score(parts.nlp, parts.sam, [Record("Anna Bell came .", (wrong,))], plan).f == 0


def test_evaluate_nothing_found(make_case):
    parts = make_case()
    record = Record("nothing here", ((0, 7, "person"),))
    result = ev.score(parts.nlp, parts.sam, [record], plan_of(parts.bank, "expert0"))
    assert (result.p, result.r, result.f) == (0, 0, 0)


def test_evaluate_per_type(make_case):
    parts = make_case()
    records = gold(TEXTS)
    result = ev.score(parts.nlp, parts.sam, records, plan_of(parts.bank, "expert0"))
    assert set(result.per_type) == {label for record in records for _, _, label in record.entities}
    assert all(scores["f"] == 1 for scores in result.per_type.values())


def test_evaluate_plans_rows(tiny_bank_path):
    from spacy_sam.bank import ExpertBank
    from spacy_sam.registered import make_ties

    bank = ExpertBank(tiny_bank_path)
    plans = ev.plans(bank, make_ties(), 2, ev.ROWS)
    assert list(plans) == ["base", "expert0", "expert1", "expert2", "all merged", "SaM", "SaM-eco"]
    assert plans["base"].task_models[0].experts == ()
    assert plans["all merged"].task_models[0].experts == ("expert0", "expert1", "expert2")
    assert plans["all merged"].task_models[0].method["@misc"] == "spacy_sam.TIES.v1"


def test_evaluate_to_rows():
    table = {
        "one": {"base": ev.Result(1, 1, 0.5), "SaM": ev.Result(1, 1, 1.0)},
        "two": {"base": ev.Result(0, 0, 0.0), "SaM": ev.Result(1, 1, 0.25)},
    }
    assert ev.to_rows(table) == [
        ["", "one", "two", "mean"],
        ["base", "50.0", "0.0", "25.0"],
        ["SaM", "100.0", "25.0", "62.5"],
    ]
    assert ev.to_json(table)["two"]["SaM"]["f"] == 0.25


def test_evaluate_exclude():
    records = [Record("Ann in Rome", ((0, 3, "person"), (7, 11, "place")))]
    assert ev.exclude(records, ["place"]) == [Record("Ann in Rome", ((0, 3, "person"),))]
    assert ev.exclude(records, []) == records
