"""The calibration that training fits: on every dev set by its own expert, and by the others merged."""

from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from fakes import Answer, FakeEngineMaker
from helpers import make_tiny_bank
from pipelines import make_nlp

from spacy_sam.bank import ExpertBank
from spacy_sam.corpora import Dataset, Record
from spacy_sam.generate.engine import Request
from spacy_sam.train.calibrate import LEAST_ENTITIES, calibrate

NAMES = {"Xa": 0.3, "Xb": 0.6, "Xc": 0.9}  # the engine's scores, and how often they are right
LABELS = ("person", "place")


def dataset(name: str, n: int = 100) -> Dataset:
    """Each name in each text: a person as often as its score says."""
    records: List[Record] = []
    for number in range(n):
        text = f"{' '.join(NAMES)} no {number}"
        people = [place for place, share in enumerate(NAMES.values()) if (37 * number) % 100 < 100 * share]
        records.append(Record(text, tuple((3 * place, 3 * place + 2, "person") for place in people)))
    return Dataset(name, tuple(records), LABELS)


@pytest.fixture
def bank(tmp_path: Path) -> ExpertBank:
    return make_tiny_bank(tmp_path / "bank", n_experts=3)


@pytest.fixture
def pipeline(bank) -> Tuple[Any, Any, List[Request]]:
    """An engine whose single experts are right as often as their scores say, and whose merged ones half as often."""
    nlp, sam = make_nlp(bank, labels=["any"], threshold=0.5, annotate_ents=True)
    asked: List[Request] = []

    def find(request: Request) -> List[Answer]:
        asked.append(request)
        is_wrong = len(request.task_model.experts) > 1 and int(request.text.split()[-1]) % 2
        return [(name, "place" if is_wrong else "person", share) for name, share in NAMES.items()]

    sam.parts.make_engine = FakeEngineMaker(find)
    return nlp, sam, asked


def run(bank: ExpertBank, pipeline: Any, domains: Dict[str, List[Dataset]], n_texts: int = 100) -> List[str]:
    said: List[str] = []
    nlp, sam, _ = pipeline
    calibrate(bank, domains, nlp, sam, n_texts=n_texts, report=said.append)
    return said


def test_train_calibrates_known_and_new_domains(bank, pipeline):
    (said,) = run(bank, pipeline, {"expert0": [dataset("one")], "expert2": [dataset("two"), dataset("three")]})
    _, sam, asked = pipeline
    by = ExpertBank(bank.path).calibration
    assert by is not None
    assert str(by) in said
    for share in NAMES.values():
        assert by(share, is_single=True) == pytest.approx(share, abs=0.12)
        assert by(share) == pytest.approx(share / 2, abs=0.12)
    models = {request.task_model.experts for request in asked}
    assert models == {("expert0",), ("expert1", "expert2"), ("expert2",), ("expert0", "expert1")}
    assert sam.cfg["calibrated"] is True
    assert sam.cfg["threshold"] == 0.5


def test_train_calibrates_on_raw_scores(bank, pipeline):
    """Doing it again does not calibrate what is calibrated."""
    domains = {"expert0": [dataset("one")]}
    run(bank, pipeline, domains)
    first = ExpertBank(bank.path).calibration
    pipeline[1].parts._bank = None  # opened again, with its calibration
    run(bank, pipeline, domains)
    assert ExpertBank(bank.path).calibration == first


def test_train_counts_dev_sets_alike(bank, pipeline):
    """A short one in which nothing is right weighs as much as a long one."""
    short = dataset("short", 20)
    wrong = Dataset("short", tuple(Record(record.text) for record in short.records), LABELS)
    run(bank, pipeline, {"expert0": [dataset("long"), wrong]})
    by = ExpertBank(bank.path).calibration
    assert by is not None
    assert by(0.9, is_single=True) == pytest.approx(0.45, abs=0.1)


def test_train_does_not_calibrate_on_a_few(bank, pipeline):
    n_texts = (LEAST_ENTITIES - 1) // (2 * len(NAMES))
    (said,) = run(bank, pipeline, {"expert0": [dataset("one")]}, n_texts)
    assert said.startswith(f"No calibration: {2 * len(NAMES) * n_texts} entities")
    assert ExpertBank(bank.path).calibration is None
