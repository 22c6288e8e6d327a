"""Fixtures that every test file shares."""

import shutil
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from helpers import make_tiny_bank, save_encoder
from hypothesis import HealthCheck, settings

from spacy_sam.bank import ExpertBank

torch.set_num_threads(1)
# No test fails because the machine is busy.
settings.register_profile("spacy_sam", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("spacy_sam")


@pytest.fixture(scope="session")
def tiny_bank_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a bank of three random experts on a tiny Llama, built once: do not change it."""
    path = tmp_path_factory.mktemp("banks") / "tiny"
    make_tiny_bank(path)
    return path


@pytest.fixture(scope="session")
def tiny_encoder_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random tiny BERT, written once: do not change it."""
    return save_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture
def bank_copy(tiny_bank_path: Path, tmp_path: Path) -> ExpertBank:
    """The same bank as a copy that the test may damage; its folder is `bank_copy.path`."""
    path = tmp_path / "bank"
    shutil.copytree(tiny_bank_path, path)
    return ExpertBank(path)


@pytest.fixture
def make_case(tiny_bank_path: Path) -> Callable[..., Any]:
    """Makes a pipeline on the tiny bank with a fake engine and a fake strategy; see `pipelines.Case`."""
    from pipelines import Case, make_nlp

    bank = ExpertBank(tiny_bank_path)
    return lambda **config: Case(*make_nlp(bank, **config), bank)


@pytest.fixture(scope="session")
def remembering_bank(tmp_path_factory: pytest.TempPathFactory) -> ExpertBank:
    """A bank whose base knows the answers to a few texts, built once: do not change it."""
    from remembering import make_remembering_bank

    return make_remembering_bank(tmp_path_factory.mktemp("remembering") / "bank")
