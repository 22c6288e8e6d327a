"""The entity bias that training chooses: the best for the experts on their own dev sets, written into the bank."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from helpers import make_tiny_bank

from spacy_sam.bank import ExpertBank
from spacy_sam.evaluate import Result
from spacy_sam.train import scores
from spacy_sam.train.config import DomainSection, TrainConfig
from spacy_sam.train.scores import ENTITY_BIASES, score_bank

DEMO = Path(__file__).parents[1] / "assets" / "demo"
DEV = [str(DEMO / "cooking.dev.jsonl")]


def unscored(path: Path, **settings: Any) -> ExpertBank:
    bank = make_tiny_bank(path, n_experts=2, **settings)
    for card in bank.experts:
        bank.update_card(replace(card, scores={}))
    return bank


@pytest.fixture
def inline_bank(tmp_path) -> ExpertBank:
    return unscored(tmp_path / "bank", architecture="bart", prompt={"name": "spacy_sam.Inline.v1", "max_labels": 3})


@pytest.fixture
def config() -> TrainConfig:
    domains = {f"expert{number}": DomainSection(train=DEV, dev=DEV) for number in range(2)}
    run = {"max_steps": 1, "learning_rate": 0.1}
    return TrainConfig(base={"kind": "random"}, expert_training=run, domains=domains, dev_texts=3)  # type: ignore[arg-type]


@pytest.fixture
def scored(monkeypatch) -> Dict[Tuple[str, float], float]:
    """F1 by expert and bias. Scores are looked up here; each call is kept with its number of texts."""
    table: Dict[Tuple[str, float], float] = {}

    def score(nlp, component, records, plan):
        bias = component.parts.annotator.engine.entity_bias
        (spec,) = plan.task_models
        assert len(records) == 3
        return Result(0.5, 0.5, table[(spec.name, bias)], n_docs=len(records))

    monkeypatch.setattr(scores, "score", score)
    monkeypatch.setattr(scores, "calibrate", lambda *args, **kwargs: None)
    return table


def test_the_bias_with_the_best_mean_is_chosen(inline_bank, config, scored):
    """Neither expert's own best one: the one that is best for both."""
    for bias, first, second in zip(ENTITY_BIASES, (0.9, 0.8, 0.3, 0.1), (0.1, 0.6, 0.9, 0.2)):
        scored[("expert0", bias)], scored[("expert1", bias)] = first, second
    said: List[str] = []
    score_bank(inline_bank, config, report=said.append)
    again = ExpertBank(inline_bank.path)
    assert again.entity_bias == ENTITY_BIASES[1]
    assert said[1] == f"Entity bias {ENTITY_BIASES[1]}: mean F1 0.700"
    assert [score.f for card in again.experts for score in card.scores.values()] == [0.8, 0.6]


def test_a_bank_that_has_scores_keeps_its_bias(inline_bank, config, scored):
    scored.update({(f"expert{n}", bias): 0.5 for n in range(2) for bias in ENTITY_BIASES})
    score_bank(inline_bank, config, report=lambda line: None)
    assert ExpertBank(inline_bank.path).entity_bias == 0.0  # the first of equal ones
    inline_bank.entity_bias = 0.7
    said: List[str] = []
    score_bank(ExpertBank(inline_bank.path), config, report=said.append)
    assert said == []
    assert ExpertBank(inline_bank.path).entity_bias == 0.7


def test_answers_in_lines_have_a_bias_too(tmp_path, config, scored):
    bank = unscored(tmp_path / "bank")
    scored.update({(f"expert{n}", bias): bias / 10 for n in range(2) for bias in ENTITY_BIASES})
    score_bank(bank, config, report=lambda line: None)
    assert ExpertBank(bank.path).entity_bias == max(ENTITY_BIASES)
