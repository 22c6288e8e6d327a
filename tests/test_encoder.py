"""The sentence encoder: each text is embedded once."""

import pickle
from typing import Any, List, Sequence

import numpy as np
import pytest

from spacy_sam.select import encoder as module
from spacy_sam.select.encoder import SentenceEncoder


class Lengths:
    """Embeds a text as its length, and writes down what it was asked."""

    def __init__(self) -> None:
        self.asked: List[str] = []

    def encode(self, texts: Sequence[str], **kwargs: Any) -> np.ndarray:
        self.asked += texts
        return np.array([[len(text), 1.0] for text in texts])


@pytest.fixture
def encoder(monkeypatch) -> SentenceEncoder:
    encoder = SentenceEncoder("lengths")
    monkeypatch.setattr(SentenceEncoder, "_load", lambda self: Lengths())
    return encoder


def test_texts_are_embedded_once(encoder):
    first = encoder(["a", "bb", "a"])
    assert first.tolist() == [[1, 1], [2, 1], [1, 1]]
    assert first.dtype == np.float32
    assert encoder(["ccc", "bb"]).tolist() == [[3, 1], [2, 1]]
    assert encoder._model.asked == ["a", "bb", "ccc"]


def test_only_so_many_are_kept(encoder, monkeypatch):
    monkeypatch.setattr(module, "MAX_KEPT", 2)
    encoder(["a", "bb"])
    assert encoder(["bb", "ccc"]).tolist() == [[2, 1], [3, 1]]
    assert encoder(["a", "bb", "ccc", "dddd"]).tolist() == [[1, 1], [2, 1], [3, 1], [4, 1]]
    assert encoder._model.asked == ["a", "bb", "bb", "ccc", "a", "bb", "ccc", "dddd"]


def test_lone_surrogates_can_be_embedded(encoder):
    assert encoder(["\ud800"]).tolist() == [[1, 1]]


def test_what_is_kept_does_not_travel(encoder):
    encoder(["a"])
    assert pickle.loads(pickle.dumps(encoder))._kept == {}
