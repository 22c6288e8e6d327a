"""Scores as probabilities: the map and its fit, in the bank and through the component, and spaCy's search for a threshold."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, List, Sequence, Tuple

import numpy as np
import pytest
import spacy
from fakes import Answer, FakeEngineMaker, plan_of
from helpers import make_tiny_bank
from hypothesis import given
from hypothesis import strategies as st
from pipelines import LABELS, make_nlp, raises
from spacy.tokens import DocBin

from spacy_sam.align import Candidate
from spacy_sam.bank import ExpertBank
from spacy_sam.calibration import LEAST_SLOPE, Calibration, fit_calibration, is_single_expert
from spacy_sam.generate.engine import Request
from spacy_sam.plan import TaskModelSpec

ONE, OTHER, MERGED = TaskModelSpec(("a",)), TaskModelSpec(("b",)), TaskModelSpec(("a", "b"))
finite = st.floats(-20, 20)
calibrations = st.builds(Calibration, st.floats(0.01, 20), finite, finite)

# The map


def test_calibration_of_hand_made_numbers():
    """Odds of 4 to the power of .5 are 2; an offset of log 3 makes them 6, one of log 2 more 12."""
    calibration = Calibration(0.5, math.log(3), math.log(2))
    assert calibration(0.8) == pytest.approx(6 / 7)
    assert calibration(0.8, is_single=True) == pytest.approx(12 / 13)
    assert Calibration(1, 0)(0.3) == pytest.approx(0.3)


@given(calibrations, st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_calibration_keeps_the_order_of_scores(calibration, one, other, is_single):
    low, high = (calibration(score, is_single) for score in sorted([one, other]))
    assert 0 <= low <= high <= 1


def test_calibration_of_a_plan_of_one_expert():
    assert [is_single_expert(specs) for specs in ([ONE], [MERGED], [ONE, OTHER], [TaskModelSpec()], [])] == [True] + [
        False
    ] * 4
    candidates = [Candidate(0, 3, "x", 0.5, (0,)), Candidate(4, 5, "y", 0.9, (0, 1))]
    calibration = Calibration(1, 0, 1)
    assert calibration.apply(candidates, [ONE, MERGED]) == [
        candidates[0],
        candidates[1]._replace(score=pytest.approx(0.9)),
    ]
    (single, _) = calibration.apply(candidates, [ONE])
    assert single == candidates[0]._replace(score=pytest.approx(1 / (1 + math.exp(-1))))


@pytest.mark.parametrize("bad", [(0, 0), (-1, 0), (math.nan, 0), (1, math.inf), (1, 0, math.nan)])
def test_calibration_refuses_what_is_not_monotone_or_finite(bad):
    with raises("S126"):
        Calibration(*bad)


# The fit


def drawn(n: int, truth: Calibration, seed: int = 0) -> Tuple[List[float], List[bool], List[bool]]:
    rng = np.random.default_rng(seed)
    scores, single = rng.uniform(0.02, 0.98, n), rng.random(n) < 0.4
    right = [bool(rng.random() < truth(score, flag)) for score, flag in zip(scores, single)]
    return scores.tolist(), right, single.tolist()


def test_calibration_fit_finds_what_made_the_data():
    truth = Calibration(0.6, -0.8, 0.9)
    found = fit_calibration(*drawn(20_000, truth))
    assert (found.slope, found.offset, found.single_expert) == pytest.approx((0.6, -0.8, 0.9), abs=0.08)


def log_loss(found: Calibration, data: Tuple[Sequence[float], Sequence[bool], Sequence[bool]], weights: Any) -> float:
    chances = [found(score, single) if right else 1 - found(score, single) for score, right, single in zip(*data)]
    return -sum(weight * math.log(chance) for weight, chance in zip(weights, chances))


def test_calibration_fit_is_the_best_around():
    """No map near it, and none of a coarse grid, has a smaller loss."""
    data = drawn(60, Calibration(0.7, 0.3, -0.5), seed=3)
    weights = [1 + place % 3 for place in range(60)]
    found = fit_calibration(*data, weights)
    best = log_loss(found, data, weights)
    near = (found.slope, found.offset, found.single_expert)
    for at in range(3):
        for step in (-0.05, 0.05):
            moved = Calibration(*(value + step * (place == at) for place, value in enumerate(near)))
            assert log_loss(moved, data, weights) > best
    grid = np.linspace(0.1, 2, 8), np.linspace(-2, 2, 9), np.linspace(-2, 2, 9)
    assert all(log_loss(Calibration(a, b, c), data, weights) > best for a in grid[0] for b in grid[1] for c in grid[2])


def test_calibration_fit_weights_are_repetitions():
    scores, right, single = drawn(30, Calibration(0.7, 0.3, -0.5))
    weights = [place % 4 for place in range(30)]
    repeated = [[one for one, n in zip(column, weights) for _ in range(n)] for column in (scores, right, single)]
    weighted, plain = fit_calibration(scores, right, single, weights), fit_calibration(*repeated)
    assert (weighted.slope, weighted.offset) == pytest.approx((plain.slope, plain.offset), abs=1e-6)


def test_calibration_fit_of_plans_of_one_expert_alone_is_for_all_plans():
    scores, right, _ = drawn(200, Calibration(0.7, 0.8))
    found = fit_calibration(scores, right, [True] * 200)
    assert found == fit_calibration(scores, right, [False] * 200)
    assert found(0.5, is_single=True) == found(0.5) > 0.6


@pytest.mark.parametrize(
    ("scores", "right"),
    [
        ([0.5, 0.6], [True, True]),
        ([0.1, 0.9], [False, False]),
        ([0.1, 0.9], [False, True]),
        ([0.0, 1.0], [True, False]),
    ],
    ids=["all right", "all wrong", "apart", "upside down"],
)
def test_calibration_fit_has_an_end(scores, right):
    """All right, all wrong, or apart: likelihood alone has no best map. Upside down: the order of scores is kept."""
    found = fit_calibration(scores, right, [False, False])
    assert found.slope >= LEAST_SLOPE
    assert found.single_expert == 0


# In the bank


def test_calibration_is_kept_in_the_bank(bank_copy):
    assert bank_copy.calibration is None
    bank_copy.entity_bias = 0.5
    bank_copy.calibration = Calibration(0.9, -1.25, 1.0)
    again = ExpertBank(bank_copy.path)
    assert again.calibration == bank_copy.calibration == Calibration(0.9, -1.25, 1.0)
    assert again.entity_bias == 0.5


@pytest.mark.parametrize(
    "decoding",
    [
        {"score_slope": 1.0},
        {"score_slope": -1.0, "score_offset": 0.0},
        {"score_slope": 1.0, "score_offset": 0.0, "score_of": 0.0},
    ],
    ids=["no offset", "slope below 0", "unknown"],
)
def test_calibration_that_cannot_be_used_is_refused_at_once(bank_copy, decoding):
    file = bank_copy.path / "bank.json"
    data = json.loads(file.read_text(encoding="utf8"))
    file.write_text(json.dumps({**data, "decoding": decoding}), encoding="utf8")
    with raises("S126"):
        ExpertBank(bank_copy.path)


# Through the component


def find_scored(request: Request) -> List[Answer]:
    """`Name50` with a score of .50, as "person"; expert1's are higher, and odd ones also "place" with a still higher one."""
    is_other = "expert1" in request.task_model.experts
    found: List[Answer] = []
    for word in (word for word in request.text.split() if word[-1].isdigit()):
        score = int(word[-2:]) / 100
        found.append((word, "person", score + 0.02 * is_other))
        if is_other and int(word[-1]) % 2:
            found.append((word, "place", score + 0.05))
    return found


def scored_pipeline(bank: ExpertBank, **config: Any) -> Any:
    nlp, sam = make_nlp(bank, **config)
    sam.parts.make_engine = FakeEngineMaker(find_scored)
    return nlp, sam


def scores_of(bank: ExpertBank, *experts: str, **config: Any) -> List[float]:
    nlp, sam = scored_pipeline(bank, **config)
    doc = sam(nlp.make_doc("Anna20 met Bo50 and Cy90 ."), plan=plan_of(bank, *experts))
    assert len(doc.ents) == len(doc.spans["sc"])
    return list(doc.spans["sc"].attrs["scores"])


def test_calibration_is_what_spans_are_scored_by(bank_copy):
    """Raw scores without a calibration, or where it is switched off; else probabilities, and the highest score counts."""
    assert scores_of(bank_copy, "expert0") == pytest.approx([0.2, 0.5, 0.9])
    bank_copy.calibration = calibration = Calibration(0.5, -0.5, 1.5)
    single = [calibration(score, is_single=True) for score in (0.2, 0.5, 0.9)]
    assert scores_of(bank_copy, "expert0") == pytest.approx(single)
    assert scores_of(bank_copy, "expert0", calibrated=False) == pytest.approx([0.2, 0.5, 0.9])
    both = [calibration(score) for score in (0.22, 0.52, 0.92)]
    assert scores_of(bank_copy, "expert0", "expert1") == pytest.approx(both)
    assert scores_of(bank_copy, ("expert0", "expert1")) == pytest.approx(both)


def test_calibration_is_what_the_threshold_is_held_against(bank_copy):
    bank_copy.calibration = calibration = Calibration(1.0, -1.0, 0.0)
    at = calibration(0.5)
    assert len(scores_of(bank_copy, "expert0", threshold=at)) == 2
    assert len(scores_of(bank_copy, "expert0", threshold=at + 1e-6)) == 1
    assert len(scores_of(bank_copy, "expert0", threshold=at + 1e-6, calibrated=False)) == 2


@given(scores=st.lists(st.integers(1, 94), max_size=8), thresholds=st.lists(st.floats(0, 1), min_size=2, max_size=4))
def test_threshold_takes_away_and_never_adds(calibrated_case, scores, thresholds):
    """With a higher threshold what is found is a part of what was found before, overlaps or not: recall never rises."""
    nlp, sam, plan = calibrated_case
    text = " ".join(f"Name{place}x{score:02}" for place, score in enumerate(scores))
    before: Any = None
    for threshold in sorted(thresholds):
        sam.cfg["threshold"] = threshold
        doc = sam(nlp.make_doc(text), plan=plan)
        found = [{(span.start, span.end, span.label_) for span in spans} for spans in (doc.ents, doc.spans["sc"])]
        assert found[0] <= found[1]
        assert all(score >= threshold for score in doc.spans["sc"].attrs["scores"])
        assert before is None or all(one <= other for one, other in zip(found, before))
        before = found


@pytest.fixture(scope="module")
def calibrated_case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    bank = make_tiny_bank(tmp_path_factory.mktemp("calibrated") / "bank", n_experts=2)
    bank.calibration = Calibration(0.8, -1.0, 0.5)
    nlp, sam = scored_pipeline(bank)
    return nlp, sam, plan_of(bank, "expert0", "expert1")


# `spacy find-threshold`


def test_spacy_finds_a_threshold(tmp_path: Path):
    """On a saved pipeline, with spaCy's own command. What is right has the highest scores, so a middle threshold is best."""
    prompt = {"name": "spacy_sam.Inline.v1", "max_labels": 3}
    bank = make_tiny_bank(tmp_path / "bank", n_experts=1, architecture="tagger", prompt=prompt)
    nlp = spacy.blank("en")
    config = {"bank": str(bank.path), "labels": LABELS, "selection": "manual"}
    sam: Any = nlp.add_pipe("sam_ner", config=config)
    sam.plan = plan_of(bank, "expert0")
    texts = ["Anna Keller moved from Bern to Lisbon last spring .", "The ferry from Dover was late , so Omar left ."]
    raw = sorted(score for doc in nlp.pipe(texts) for score in doc.spans["sc"].attrs["scores"])
    cut = (raw[len(raw) // 2 - 1] + raw[len(raw) // 2]) / 2
    # The score in the middle becomes .45: with steps of .1, .4 keeps a wrong one or not, and .5 keeps the right ones.
    bank.calibration = Calibration(5.0, math.log(0.45 / 0.55) - 5.0 * math.log(cut / (1 - cut)))
    sam.parts._bank = None
    golds = DocBin()
    for doc in nlp.pipe(texts):
        scores = doc.spans["sc"].attrs["scores"]
        gold = nlp.make_doc(doc.text)
        gold.set_ents([span for span, score in zip(doc.spans["sc"], scores) if score > 0.45])
        golds.add(gold)
    golds.to_disk(tmp_path / "dev.spacy")
    nlp.to_disk(tmp_path / "pipeline")
    command = [
        "-m",
        "spacy",
        "find-threshold",
        tmp_path / "pipeline",
        tmp_path / "dev.spacy",
        "sam_ner",
        "threshold",
        "ents_f",
    ]
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    by_threshold = dict(map(float, line.split()) for line in done.stdout.splitlines() if line[:1].isdigit())
    assert by_threshold.keys() == {round(0.1 * step, 1) for step in range(11)}
    assert max(by_threshold, key=lambda threshold: by_threshold[threshold]) in (0.4, 0.5)
    assert by_threshold[0.0] < max(by_threshold.values())
    assert by_threshold[1.0] == 0
