"""The benchmarks' own parts: kept predictions score as the package does, and the page is written from a results file."""

import json

import numpy as np
import pytest
from remembering import REMEMBERED, REMEMBERED_LABELS

from benchmarks.bank_scale import make_bank
from benchmarks.compression import n_bytes, sizes
from benchmarks.norms import matched_methods
from benchmarks.predictions import Predictions, Target, bootstrap, f1, read_target, tallies
from benchmarks.results_page import write_page
from benchmarks.rows import Choice, Situation, main_rows, oracle, weighted
from benchmarks.tune import NewDomain
from spacy_sam import evaluate as ev
from spacy_sam.bank import ExpertBank
from spacy_sam.compress import compress_bank
from spacy_sam.corpora import Record
from spacy_sam.merge.methods import Mean
from spacy_sam.plan import Plan, Selection, TaskModelSpec
from spacy_sam.select.similarity import cosine


@pytest.fixture(scope="module")
def target() -> Target:
    """The remembered texts; one entity is annotated otherwise, so that scores are not all 1."""
    records = [Record(text, tuple(entities)) for text, entities in REMEMBERED.items()]
    records[1] = Record(records[1].text, ((0, 4, "place"), (13, 18, "place")))
    return Target("remembered", tuple(records), REMEMBERED_LABELS)


@pytest.fixture(scope="module")
def predictions(remembering_bank, tmp_path_factory) -> Predictions:
    nlp, component = ev.make_pipeline(remembering_bank.path, labels=REMEMBERED_LABELS)
    return Predictions(nlp, component, tmp_path_factory.mktemp("cache"), say=lambda line: None)


def test_kept_predictions_score_as_evaluate_does(predictions, target):
    specs = (TaskModelSpec(), TaskModelSpec(("expert0", "expert1"), (), Mean(300.0).config))
    plan = Plan(predictions.bank.base_hash, specs)
    result = ev.score(predictions.nlp, predictions.component, target.records, plan)
    tally = tallies(predictions.entities(specs, target), predictions.golds(target)).sum(0)
    assert 0 < result.f < 1
    assert float(f1(tally)) == pytest.approx(result.f)
    assert (tally[0] / tally[1], tally[0] / tally[2]) == pytest.approx((result.p, result.r))


def test_predictions_are_read_back(predictions, target, monkeypatch):
    first = predictions.candidates(TaskModelSpec(("expert0",)), target)
    again = Predictions(predictions.nlp, predictions.component, predictions.cache)
    monkeypatch.setattr(again, "_run", lambda *args: pytest.fail("it was run again"))
    assert again.candidates(TaskModelSpec(("expert0",)), target) == first
    assert again.counts(TaskModelSpec(("expert0",)), target)["windows"] == len(target.records)


def test_intersection_is_part_of_the_union(predictions, target):
    specs = (TaskModelSpec(), TaskModelSpec(("expert0", "expert1"), (), Mean(300.0).config))
    union, both = (predictions.entities(specs, target, agree) for agree in (1, 2))
    single = predictions.entities(specs[:1], target)
    assert all(b <= u and b <= s for b, u, s in zip(both, union, single))


def test_f1_of_hand_made_tallies():
    assert f1(np.array([[2, 4, 4], [0, 0, 0], [1, 1, 1]])).tolist() == [0.5, 0.0, 1.0]


def test_bootstrap_draws_texts_and_is_repeatable():
    rng = np.random.default_rng(0)
    gold = rng.integers(1, 5, 300)
    tally = np.stack([rng.binomial(gold, 0.6), gold, gold], axis=1)
    draws = bootstrap([tally, tally], 2000, seed=3)
    assert np.array_equal(draws, bootstrap([tally], 2000, seed=3))
    assert draws.mean() == pytest.approx(float(f1(tally.sum(0))), abs=0.005)
    assert 0.005 < draws.std() < 0.05


def test_targets_leave_miscellaneous_out(tmp_path):
    rows = [{"text": f"Text {n} in Rome", "entities": [[0, 4, "miscellaneous"], [10, 14, "city"]]} for n in range(1, 9)]
    path = tmp_path / "some.test.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    target = read_target(path, 3)
    assert (target.name, target.labels, len(target.records)) == ("some", ("city",), 3)
    assert target.texts == sorted(target.texts)
    assert target == read_target(path, 3)
    assert len(read_target(path, None).records) == 8


def test_oracle_is_the_best_of_its_options(predictions, target):
    at = Situation(predictions, target, 0, Mean(300.0))
    best = at.f1(oracle([1, 2])(at))
    options = [Choice((at.spec(names),)) for names in (["expert0"], ["expert1"], ["expert0", "expert1"])]
    assert best == max(map(at.f1, options))


def test_new_domain_lacks_its_expert(predictions, target):
    at = NewDomain(predictions, target, 0, Mean(), "expert1")
    assert at.experts == ["expert0"]
    bank = at.context(2).bank
    assert [card.name for card in bank.experts] == ["expert0"]
    assert bank.base_hash == predictions.bank.base_hash
    assert [card.name for card in predictions.bank.experts] == ["expert0", "expert1"]


def test_weights_fall_with_the_distance_in_similarity(predictions, target, monkeypatch):
    at = Situation(predictions, target, 0, Mean())
    scores = (("expert1", 0.5), ("expert0", 0.5 - 0.1 * np.log(3)))
    monkeypatch.setattr(at, "selections", lambda: [Selection("domain_similarity", scores, ())])
    (spec,) = weighted(0.1)(at).specs
    assert dict(zip(spec.experts, spec.weights)) == pytest.approx({"expert0": 0.25, "expert1": 0.75})
    (spec,) = weighted(0.1, least=0.3)(at).specs
    assert spec.experts == ("expert1",)


def test_rows_without_subsets_run_no_sets_of_experts(predictions):
    names = {row.name for row in main_rows(predictions)} - {row.name for row in main_rows(predictions, subsets=False)}
    assert names == {"best of at most three (oracle)"}


def test_matched_methods_have_the_norm_they_say(predictions, target, monkeypatch):
    from benchmarks import norms

    monkeypatch.setattr(norms, "chosen", lambda at: ("expert0", "expert1"))
    at = Situation(predictions, target, 0, Mean())
    single = np.mean([norms._norm(predictions.bank, TaskModelSpec((name,))) for name in ("expert0", "expert1")])
    found = [method for method in matched_methods(predictions.bank, [at]) if method.norm]
    assert len(found) == len(norms.METHODS) * len(norms.NORMS)
    for method in found:
        assert norms._norm(predictions.bank, method.spec(at)) / single == pytest.approx(method.norm, rel=1e-3)


def test_page_is_written_from_results(predictions, tmp_path):
    names = [row.name for row in main_rows(predictions)] + ["unified"]
    line = {
        "f1": {"crossner_ai": 0.2, "extra": 0.4},
        "mean": 0.3,
        "interval": [0.25, 0.35],
        "relative": 1.0,
        "relative_interval": [0.9, 1.1],
        "precision": 0.5,
        "recall": 0.25,
        "task_models": {"crossner_ai": [["news", "legal"]], "extra": [["news"], ["stem"]]},
    }
    data = {
        "machine": {"cpu": "CPU", "cores": 2},
        "commit": "abc",
        "command": "python -m benchmarks.paper",
        "figures": {"in_domain_f1": 0.61, "sam/unified": 1.05},
        "settings": {"seeds": [0, 1], "method_limit": 100},
        "groups": {"targets": ["crossner_ai"], "extra": ["extra"]},
        "n_texts": {"crossner_ai": 10, "extra": 20},
        "table": {name: line for name in names},
        "sweeps": {"n_experts/SaM": {"1": 0.1, "2": 0.2}, "sample_size/SaM": {"1": 0.1, "10": 0.2}},
        "methods": [{"method": "TIES", "norm": 0.5, "mean": 0.2, "unparseable": 0.01}],
        "sources": {"conll2003": {"own expert": 0.6, "SaM": 0.5}},
    }
    results, page = tmp_path / "paper.json", tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    results.write_text(json.dumps(data), encoding="utf8")
    write_page(results, page)
    text = page.read_text(encoding="utf8")
    for expected in (
        "| SaM | 30.0 | 25.0 to 35.0 | 1.00 |",
        "| sam/unified | 1.050 | >= 1.10 |",
        "| SaM | 20.0 | 40.0 | 1.00 | 1.00 |",
        "news; stem",
        "0.50 | 20.0",
    ):
        assert expected in text
    quick = tmp_path / "quick.md"
    results.write_text(json.dumps({**data, "sweeps": {}}), encoding="utf8")
    write_page(results, quick)
    assert "img/" not in quick.read_text(encoding="utf8")
    for image in ("n_experts.svg", "sample_size.svg"):
        assert f"(img/{image})" in text
        assert (page.parent / "img" / image).read_text(encoding="utf8").lstrip().startswith("<?xml")


def test_compression_sizes_are_those_of_the_files(remembering_bank, tmp_path):
    small = compress_bank(remembering_bank, tmp_path / "small", 8)
    row = sizes(remembering_bank, small, 8)
    folders = [small.folder(card.name) for card in small.experts]
    assert row["bytes"] == np.mean([n_bytes(folder) for folder in folders])
    assert row["bytes/bfloat16"] == pytest.approx(2 * row["bytes/float32"], abs=1e-3)
    assert 0 < row["error"] < 0.3


def test_bank_of_noisy_copies_is_sound(tmp_path):
    make_bank(tmp_path / "bank", 7)
    bank = ExpertBank(tmp_path / "bank")
    assert len(bank.check()) == 7
    first, second = (bank[f"expert0000{number}"] for number in (0, 6))  # of the same original
    assert first.domain == second.domain
    assert 0.5 < cosine(first.centroid.array, second.centroid.array) < 1
