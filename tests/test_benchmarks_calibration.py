"""The calibration benchmark's measures against slow ones, and its definitions of a score against the engine's."""

import itertools
import math
from typing import Any, List

import numpy as np
import pytest
from helpers import make_tiny_bank
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import calibration as cal
from benchmarks.evidence import CHOSEN, Evidence
from benchmarks.predictions import Predictions, Target
from benchmarks.reliability import (
    auroc,
    average_precision,
    bins,
    brier,
    calibration_error,
    isotonic,
    precision_recall,
)
from spacy_sam import evaluate as ev
from spacy_sam.calibration import Calibration
from spacy_sam.corpora import Record
from spacy_sam.merge.methods import Mean
from spacy_sam.plan import TaskModelSpec

scored = st.lists(st.tuples(st.sampled_from([0.1, 0.3, 0.3001, 0.7, 0.9]), st.booleans()), min_size=1, max_size=25)


def arrays(pairs: Any) -> Any:
    return np.array([score for score, _ in pairs]), np.array([right for _, right in pairs])


@given(scored)
def test_reliability_areas_are_counted_pairs_and_precisions(pairs):
    scores, right = arrays(pairs)
    wins = [(a > b) + (a == b) / 2 for a, r in pairs if r for b, w in pairs if not w]
    assert auroc(scores, right) == pytest.approx(np.mean(wins) if wins else math.nan, nan_ok=True)
    at_each = [np.mean([r for score, r in pairs if score >= one]) for one, is_right in pairs if is_right]
    assert average_precision(scores, right) == pytest.approx(np.mean(at_each) if at_each else math.nan, nan_ok=True)


def test_reliability_of_hand_made_numbers():
    scores, right = np.array([0.9, 0.1, 0.2, 0.8]), np.array([True, False, True, False])
    even = np.ones(4)
    assert [tuple(b) for b in bins(scores, right, even, 2)] == [
        (pytest.approx(0.15), 0.5, 2.0),
        (pytest.approx(0.85), 0.5, 2.0),
    ]
    assert calibration_error(scores, right, even, 2) == pytest.approx(0.35)
    assert brier(scores, right, even) == pytest.approx((0.01 + 0.01 + 0.64 + 0.64) / 4)
    assert precision_recall(scores, right, even, even / 4, [0, 0.5, 0.85, 0.95]) == {
        "precision": [0.5, 0.5, 1.0, 1.0],
        "recall": [0.5, 0.25, 0.25, 0.0],
    }


@given(scored, st.integers(1, 6))
def test_reliability_weights_are_repetitions(pairs, n_bins):
    """Bins hold every entity once; weights of 2 give the means of everything twice."""
    scores, right = arrays(pairs)
    twice = np.full(len(pairs), 2.0)
    found = bins(scores, right, twice, n_bins)
    assert sum(b.weight for b in found) == 2 * len(pairs)
    assert all(one.score <= other.score + 1e-12 for one, other in itertools.pairwise(found))
    weights = 1.0 + np.arange(len(pairs)) % 3
    again = np.repeat(np.arange(len(pairs)), weights.astype(int))
    assert brier(scores, right, weights) == pytest.approx(brier(scores[again], right[again], np.ones(len(again))))
    one_bin = calibration_error(scores, right, weights, 1)
    assert one_bin == pytest.approx(abs(np.average(scores, weights=weights) - np.average(right, weights=weights)))


@given(scored, st.integers(0, 99))
def test_reliability_isotonic_is_the_best_monotone_map(pairs, seed):
    scores, right = arrays(pairs)
    weights = 1.0 + np.arange(len(pairs)) % 3
    fitted = isotonic(scores, right, weights)
    order = np.argsort(scores, kind="stable")
    assert (np.diff(fitted[order]) >= -1e-12).all()
    assert all(len(set(fitted[scores == score].round(12))) == 1 for score in scores)
    other = np.sort(np.random.default_rng(seed).random(len(pairs)))
    levels = dict(zip(sorted(set(scores)), other))
    rival = np.array([levels[score] for score in scores])
    assert brier(fitted, right, weights) <= brier(rival, right, weights) + 1e-12


# Definitions and samples


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    prompt = {"name": "spacy_sam.Inline.v1", "max_labels": 2}
    bank = make_tiny_bank(tmp_path_factory.mktemp("bank") / "bank", architecture="tagger", prompt=prompt)
    nlp, component = ev.make_pipeline(
        bank.path, labels=["any"], engine={"@misc": "spacy_sam.TorchEngine.v1", "device": "cpu"}
    )
    return Evidence(Predictions(nlp, component, tmp_path_factory.mktemp("cache"), say=lambda line: None))


@pytest.fixture(scope="module")
def target() -> Target:
    texts = ["Anna Keller moved from Bern to Lisbon.", "The ferry from Dover was late , so Omar left .", "Hi", " "]
    return Target("written", tuple(Record(text, ((0, 2, "river"),)) for text in texts), ("person", "place", "river"))


SPECS = [TaskModelSpec(("expert1",)), TaskModelSpec(("expert0", "expert2"), (), Mean().config)]


@pytest.mark.parametrize("spec", SPECS, ids=["one", "merged"])
def test_evidence_has_what_the_engine_finds_and_its_score(evidence, target, spec):
    found = evidence(spec, target)
    kept = evidence.predictions.candidates(spec, target)
    assert sum(map(len, found)) > 3
    for said, candidates in zip(found, kept, strict=True):
        assert sorted(said) == [(c.start, c.end, c.label) for c in candidates]
        scores = [math.exp(said[c.start, c.end, c.label][CHOSEN]) for c in candidates]
        assert scores == pytest.approx([c.score for c in candidates], abs=1e-3)
    assert evidence(spec, target) == found  # read back


def sample(n: int, domains: str, seed: int = 0) -> cal.Sample:
    """Entities whose chance of being right is as `truth` says; corpora are named after domains."""
    rng = np.random.default_rng(seed)
    truth = Calibration(0.7, -1.0, 1.5)
    domain = np.array(list(domains))[np.arange(n) % len(domains)]
    scores, single = rng.uniform(0.05, 0.95, n), rng.random(n) < 0.5
    right = np.array([rng.random() < truth(score, bool(flag)) for score, flag in zip(scores, single)])
    one = np.ones(n, dtype=int)
    return cal.Sample({CHOSEN: np.log(scores)}, right, one, one, single, domain, domain, {name: n for name in domains})


def test_samples_weigh_every_corpus_alike():
    made = sample(30, "aab")
    assert made.weights[made.corpus == "a"].sum() == pytest.approx(made.weights[made.corpus == "b"].sum())
    joined = cal.Sample.join(made.where(made.corpus == "a"), made.without("a"))
    assert len(joined.right) == 30
    assert joined.weights.sum() == pytest.approx(30)
    assert made.shares == pytest.approx(np.full(30, 1 / 60))  # 30 entities are there in either corpus


def test_maps_are_measured_on_domains_that_they_were_not_fitted_on():
    """A domain in which everything is right says nothing of itself."""
    made = sample(4000, "abcd")
    made.right[made.domain == "d"] = True
    chance = cal.held_out(made, made, cal.MAPS[cal.FITTED], CHOSEN)
    (here,) = [made.domain == "d"]
    plain = cal.MAPS[cal.FITTED](made.without("d"), made.where(here), CHOSEN)
    assert chance[here] == pytest.approx(plain)
    assert chance[here].mean() < 0.7


def test_every_map_but_none_is_calibrated_on_what_fits_it():
    """Where truth is a Platt map, maps of that kind come near it, and are monotone within plans of a kind."""
    fit, to = sample(6000, "ab"), sample(6000, "ab", seed=1)
    error = {name: cal.errors(make(fit, to, CHOSEN), to)["ece"] for name, make in cal.MAPS.items()}
    assert error["raw"] > 0.08
    for name in ("Platt, single", "Platt, single, agreement", "Platt, single apart", "isotonic, single apart"):
        assert error[name] < 0.04
        chance = cal.MAPS[name](fit, to, CHOSEN)
        for single in (False, True):
            some = to.single == single
            order = np.argsort(to.scores()[some])
            assert (np.diff(chance[some][order]) >= -1e-12).all()


def test_the_fit_of_the_bank_is_the_fit_of_the_benchmark():
    made = sample(500, "ab")
    by = cal.fit(made)
    chances: List[float] = [by(score, bool(single)) for score, single in zip(made.scores(), made.single)]
    assert chances == pytest.approx(list(cal.MAPS[cal.FITTED](made, made, CHOSEN)), abs=2e-3)


def test_picture_is_written(tmp_path):
    made = sample(200, "ab")
    shown = {kind: cal.curves(made, made.scores()) for kind in ("new", "known")}
    cal.draw(shown, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
