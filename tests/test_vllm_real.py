"""The vLLM engine with vLLM itself: it writes what the torch engine writes.

Runs where SPACY_SAM_VLLM_PYTHON names an interpreter that has vLLM; docs/vllm.md says how to make one for the CPU.
"""

import os
from typing import Any, Dict, Iterator, List, Sequence

import helpers
import pytest
import spacy
from helpers import CONTEXT, make_tiny_bank
from remembering import REMEMBERED, REMEMBERED_LABELS, make_remembering_bank
from transformers import LlamaConfig, LlamaForCausalLM

from spacy_sam.annotate import Annotator
from spacy_sam.bank import ExpertBank
from spacy_sam.errors import SamError
from spacy_sam.generate.engine import Completion, Request
from spacy_sam.generate.torch_engine import TorchEngine
from spacy_sam.generate.vllm_engine import VLLMEngine
from spacy_sam.merge.methods import Mean, Ties
from spacy_sam.plan import TaskModelSpec
from spacy_sam.prompts import make_format
from spacy_sam.registered import resolve_method
from spacy_sam.windows import Window

PYTHON = os.environ.get("SPACY_SAM_VLLM_PYTHON")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="SPACY_SAM_VLLM_PYTHON names no interpreter"),
    pytest.mark.timeout(1800),  # vLLM compiles on its first runs
]
BASE, ONE = TaskModelSpec(), TaskModelSpec(("expert1",))
MEAN = TaskModelSpec(("expert0", "expert2"), (), Mean().config)
TIES = TaskModelSpec(("expert0", "expert1", "expert2"), (), Ties(0.4).config)
LABELS, OTHER_LABELS = ("person", "place"), ("river", "tall mountain", "lake", "mountain")
TEXTS = (
    "Anna Keller moved from Bern to a small town near Lisbon last spring.",
    "Hi",
    "",
    "In Nairobi, Grace Wanjiru opened a school; in Kyoto, her brother Daniel runs a bakery.\n\nCafé Zürich",
    "A <|end|> is only text | so is ⟨this¦⟩.",
    "東京 😀 is far.",
)
FORMATS = ("spacy_sam.Inline.v1", "spacy_sam.Lines.v1")


def wide_llama(ids: Dict[str, Any]) -> LlamaForCausalLM:
    """Heads as wide as vLLM wants them on the CPU."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=helpers.INIT_RANGE / 2,
        **ids,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module", autouse=True)
def settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(helpers.ARCHITECTURES, "llama", wide_llama)
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="module", params=FORMATS, ids=["inline", "lines"])
def bank(request, tmp_path_factory) -> ExpertBank:
    return make_tiny_bank(tmp_path_factory.mktemp("real") / "bank", prompt={"name": request.param})


def make_engine(bank: ExpertBank, **settings: Any) -> VLLMEngine:
    return VLLMEngine(bank, resolve_method, python=PYTHON, options={"enforce_eager": True}, **settings)


@pytest.fixture(scope="module")
def engine(bank) -> Iterator[VLLMEngine]:
    """Keeps two merged models at a time, fewer than the tests ask."""
    made = make_engine(bank, max_new_tokens=60, max_task_models=2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def other(bank) -> TorchEngine:
    return TorchEngine(bank, resolve_method, device="cpu", max_new_tokens=60)


def mixture() -> List[Request]:
    return [Request(s, ls, text) for text in TEXTS for ls in (LABELS, OTHER_LABELS) for s in (BASE, ONE, MEAN, TIES)]


def assert_same(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    for one, two in zip(found, expected, strict=True):
        assert (one.text, one.ends, one.finished) == (two.text, two.ends, two.finished)
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-3)


def test_writes_what_the_torch_engine_writes(engine, other):
    """Marks or lines of a random model, under the grammar; the second time with its prefixes cached."""
    expected = other.generate(mixture())
    assert len({completion.text for completion in expected}) > len(TEXTS)
    assert_same(engine.generate(mixture()), expected)
    assert_same(engine.generate(mixture()), expected)


@pytest.mark.parametrize("bias", [3.0, -3.0])
def test_entity_bias_is_that_of_the_torch_engine(engine, other, bias):
    requests = [Request(spec, LABELS, text) for spec in (BASE, TIES) for text in TEXTS]
    before = other.generate(requests)
    engine.entity_bias = other.entity_bias = bias
    try:
        expected = other.generate(requests)
        assert [c.text for c in expected] != [c.text for c in before]
        assert_same(engine.generate(requests), expected)
    finally:
        engine.entity_bias = other.entity_bias = 0.0


def test_errors_of_vllm_are_told(engine, other):
    """And the next call has a worker again."""
    engine.end_ids = (-1,)
    try:
        with pytest.raises(SamError) as caught:
            engine.generate(mixture()[:1])
    finally:
        engine.end_ids = other.end_ids
    assert caught.value.code == "S510"
    assert_same(engine.generate(mixture()[:1]), other.generate(mixture()[:1]))


def test_without_grammar(bank):
    engine = make_engine(bank, constrained=False, max_new_tokens=24)
    other = TorchEngine(bank, resolve_method, device="cpu", constrained=False, max_new_tokens=24)
    engine.end_ids = other.end_ids = (*other.end_ids, *range(3, 400, 14))  # so that some answers are finished
    expected = other.generate(mixture())
    assert {completion.finished for completion in expected} == {True, False}
    try:
        assert_same(engine.generate(mixture()), expected)
    finally:
        engine.close()


def test_finds_the_entities_that_the_torch_engine_finds(tmp_path):
    """A model that knows a few texts, in the component's own way of asking, and in a pipeline."""
    bank = make_remembering_bank(tmp_path / "bank")
    texts = list(REMEMBERED)
    expected = [[(start, end, label) for start, end, label in REMEMBERED[text]] for text in texts]
    engine = make_engine(bank)
    for used in (engine, TorchEngine(bank, resolve_method, device="cpu")):
        annotator = Annotator(used, make_format(bank.prompt))
        found = annotator.annotate([BASE, ONE], REMEMBERED_LABELS, [Window(text, 0) for text in texts])
        assert [[(c.start, c.end, c.label) for c in candidates] for candidates in found] == expected
    engine.close()
    nlp = spacy.blank("en")
    maker = {"@misc": "spacy_sam.VLLMEngine.v1", "python": PYTHON, "options": {"enforce_eager": True}}
    strategy = {"selectors": {"similarity": None}}  # the encoder of these banks is a fake
    config = {"bank": str(bank.path), "labels": list(REMEMBERED_LABELS), "engine": maker, "strategy": strategy}
    component: Any = nlp.add_pipe("sam_ner", config=config)
    docs = list(nlp.pipe(texts * 3))
    assert [[(e.start_char, e.end_char, e.label_) for e in doc.ents] for doc in docs] == expected * 3
    component.parts.annotator.engine.close()
