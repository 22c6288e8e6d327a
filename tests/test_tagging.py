"""Taggers: prompts whose places are right, decisions as defined, and answers that are read back as what was found."""

import math
from typing import Any, Dict, List, Tuple

import pytest
import torch
from helpers import PROMPT, load_model, make_tiny_bank, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from spacy_sam.annotate import Annotator
from spacy_sam.bank import ExpertBank
from spacy_sam.errors import SamError
from spacy_sam.generate.engine import Request
from spacy_sam.generate.tagging import Tag, TagEncoder, find_tags, tag_batch, tag_logits, write_answer
from spacy_sam.generate.torch_engine import TorchEngine
from spacy_sam.merge.methods import Mean
from spacy_sam.plan import TaskModelSpec
from spacy_sam.prompts import InlineFormat, LinesFormat, PromptEncoder, begins_word, ends_word
from spacy_sam.registered import resolve_method
from spacy_sam.train import sft
from spacy_sam.train.data import encode_example
from spacy_sam.train.tagging import BEGIN_WEIGHT, TagCollator, tag_loss
from spacy_sam.windows import Window

INLINE = {"name": "spacy_sam.Inline.v1", "instruction": ""}
LABELS = ("person", "tall mountain", "place")
TEXTS = (
    "Anna Keller moved from Bern to a small town near Lisbon last spring.",
    "Hi",
    "",
    " \n",
    "In Nairobi, Grace Wanjiru opened a school⟨x⟩; in Kyoto, her brother Daniel runs a bakery.\n\nCafé Zürich",
    "東京 😀 is 3/4-far, e\u0301tude.",
)
ANY_TEXT = st.text(st.sampled_from("ab1 .-'é\u0301⟨¦⟩\n東😀") | st.characters(codec="utf-8"), max_size=40)
ENCODER = TagEncoder(PromptEncoder(make_tokenizer(), InlineFormat()))
SPECS = (
    TaskModelSpec(),
    TaskModelSpec(("expert0",)),
    TaskModelSpec(("expert0", "expert2"), (), Mean().config),
)


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> ExpertBank:
    return make_tiny_bank(tmp_path_factory.mktemp("tagger"), architecture="tagger", prompt=INLINE)


@pytest.fixture(scope="module")
def model(bank) -> Any:
    return load_model(bank.base[0])


def make_engine(bank: ExpertBank, **settings: Any) -> TorchEngine:
    return TorchEngine(bank, resolve_method, **{"device": "cpu", **settings})


# The prompt


@given(ANY_TEXT)
def test_tagging_places_of_types_and_words(text):
    """Names are what was asked; words are whole, apart from each other, and leave out nothing but white space."""
    row = ENCODER.row(LABELS, text)
    decode = ENCODER.encoder.tokenizer.decode
    assert [decode(row.ids[begin:end]) for begin, end in row.labels] == [f" {label}" for label in LABELS]
    shown = ENCODER.format.shown(text)
    done = 0
    for (begin, end), (first, last) in zip(row.words, row.characters, strict=True):
        assert shown[done:first].isspace() or done == first
        assert begins_word(shown, first)
        assert ends_word(shown, last)
        assert decode(row.ids[begin:end]).strip() == shown[first:last]
        done = last
    assert not shown[done:].strip()


def test_tagging_prompt_is_that_of_generation():
    row = ENCODER.row(LABELS, TEXTS[0])
    assert ENCODER.encoder.tokenizer.decode(row.ids) == ENCODER.format.prefix(LABELS) + f" {TEXTS[0]}"
    assert ENCODER.prompt_length(LABELS) == len(ENCODER.row(LABELS, "").ids) < len(row.ids)


def test_tagging_needs_an_inline_format():
    with pytest.raises(SamError, match="S506"):
        TagEncoder(PromptEncoder(make_tokenizer(), LinesFormat()))


# What the model says


@torch.no_grad()
def slow_logits(model: Any, text: str) -> Tuple[List[List[float]], List[float]]:
    """One text by itself, a word and a type at a time."""
    row = ENCODER.row(LABELS, text)
    outputs = model(torch.tensor([row.ids])).logits[0]
    size = (outputs.shape[1] - 2) // 2
    types, begins = [], []
    for begin, end in row.words:
        word = outputs[begin:end].mean(0)
        keys = [outputs[first:last].mean(0)[size : 2 * size] for first, last in row.labels]
        types.append([word[-2].item(), *(float(word[:size] @ key) for key in keys)])
        begins.append(word[-1].item())
    return types, begins


@torch.no_grad()
def test_tagging_logits_are_those_of_each_text_alone(model):
    rows = [ENCODER.row(LABELS, text) for text in TEXTS]
    types, begins = tag_logits(model, tag_batch(rows, 0))
    for place, text in enumerate(TEXTS):
        wanted_types, wanted_begins = slow_logits(model, text)
        n_words = len(rows[place].words)
        assert len(wanted_types) == n_words
        for word in range(n_words):
            assert types[place, word].tolist() == pytest.approx(wanted_types[word], abs=2e-3)
        assert begins[place, :n_words].tolist() == pytest.approx(wanted_begins, abs=2e-3)


@torch.no_grad()
def test_tagging_types_of_other_rows_are_not_there(model):
    rows = [ENCODER.row(LABELS, "Hi"), ENCODER.row(LABELS[:1], "Hi")]
    types, _ = tag_logits(model, tag_batch(rows, 0))
    assert types[0].isfinite().all()
    assert types[1, 0].tolist()[2:] == [-math.inf, -math.inf]


def tags_of(types: torch.Tensor, begins: torch.Tensor, bias: float = 0.0) -> List[Tag]:
    """Of one text, a word at a time: the slow, obvious version of `find_tags`."""
    tags: List[Tag] = []
    run: List[int] = []
    for word in range(len(types) + 1):
        inside = word < len(types) and (types[word, 1:].logsumexp(-1) + bias > types[word, 0]).item()
        if run and not (inside and begins[word] <= 0):
            label = int(types[run, 1:].mean(0).argmax())
            of_type = math.prod(types[word].softmax(-1)[1 + label].item() for word in run) ** (1 / len(run))
            tags.append(Tag(run[0], run[-1], label, of_type * score_of_bounds(types, begins, run)))
            run = []
        if inside:
            run.append(word)
    return tags


def score_of_bounds(types: torch.Tensor, begins: torch.Tensor, run: List[int]) -> float:
    """The probability that an entity begins and ends where this run does."""
    is_entity = [1 - row.softmax(-1)[0].item() for row in types]
    goes_on = [1 - begin.sigmoid().item() for begin in begins]
    score = math.prod(goes_on[word] for word in run[1:])
    if run[0] > 0:
        score *= 1 - is_entity[run[0] - 1] * goes_on[run[0]]
    if run[-1] + 1 < len(types):
        score *= 1 - is_entity[run[-1] + 1] * goes_on[run[-1] + 1]
    return score


def test_tagging_runs_of_words():
    """Cut where a word is of no type or begins anew, and of the type with the highest mean."""
    types = torch.tensor([[0.0, 3, 0], [0, 0, 4], [2, 1, 1], [0, 5, 1], [0, 5, 1], [9, 1, 1], [0, -1, 2]])
    begins = torch.tensor([1.0, -1, 1, 1, 1, 1, -1])
    (tags,) = find_tags(types[None], begins[None], [len(types)])
    assert [(tag.first, tag.last, tag.label) for tag in tags] == [(0, 1, 1), (3, 3, 0), (4, 4, 0), (6, 6, 1)]


def test_tagging_score_of_hand_made_numbers():
    """Two words, in an entity with .8 and .9 in the middle of a text, of types with equal logits."""

    def word(p: float) -> List[float]:
        return [0.0, math.log(p / (1 - p) / 2), math.log(p / (1 - p) / 2)]

    types = torch.tensor([[word(0.4), word(0.8), word(0.9), word(0.3)]])
    begins = torch.tensor([0.7, 0.5, 0.25, 0.2]).logit()[None]
    ((tag,),) = find_tags(types, begins, [4])
    assert (tag.first, tag.last) == (1, 2)
    expected = math.sqrt(0.4 * 0.45) * (1 - 0.4 * 0.5) * (1 - 0.25) * (1 - 0.3 * 0.8)
    assert tag.score == pytest.approx(expected, rel=1e-5)
    ((shorter,),) = find_tags(types, begins, [3])  # what stands behind is padding
    assert shorter.score == pytest.approx(expected / (1 - 0.3 * 0.8), rel=1e-5)


@given(
    n_words=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    n_labels=st.integers(1, 4),
    bias=st.sampled_from([-1.0, 0.0, 1.5]),
    seed=st.integers(0, 999),
)
def test_tagging_a_batch_is_text_by_text(n_words, n_labels, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    types = 3 * torch.randn(len(n_words), max(n_words), 1 + n_labels, generator=generator)
    begins = torch.randn(len(n_words), max(n_words), generator=generator)
    types[0, :, 2:] = -math.inf  # the first text is asked for one type alone
    batch = find_tags(types, begins, n_words, bias)
    for tags, n, some_types, some_begins in zip(batch, n_words, types, begins):
        expected = tags_of(some_types[:n], some_begins[:n], bias)
        assert [tag[:3] for tag in tags] == [tag[:3] for tag in expected]
        assert [tag.score for tag in tags] == pytest.approx([tag.score for tag in expected], rel=1e-4)


def test_tagging_bias_is_for_entities_and_not_for_scores():
    types, begins = torch.tensor([[[1.0, 0.6, 0], [3, 0, 0]]]), torch.tensor([[1.0, 1]])
    assert [tag.first for tag in find_tags(types, begins, [2])[0]] == [0]
    (more,) = find_tags(types, begins, [2], 5.0)
    assert [tag.first for tag in more] == [0, 1]
    assert more[0] == find_tags(types, begins, [2])[0][0]
    assert find_tags(types, begins, [2], -5.0) == [[]]
    assert find_tags(types[:, :0], begins[:, :0], [0]) == [[]]


# The answer


@given(ANY_TEXT, st.randoms(use_true_random=False))
def test_tagging_answers_are_read_back(text, rng):
    """Whatever is found is what the format's parser reads, at its place and with its score."""
    row = ENCODER.row(LABELS, text)
    tags, word = [], 0
    while word < len(row.words):
        last = min(word + rng.randint(0, 2), len(row.words) - 1)
        if rng.random() < 0.5:
            tags.append(Tag(word, last, rng.randrange(3), rng.uniform(0.01, 1)))
        word = last + 1
    shown = ENCODER.format.shown(text)
    completion = write_answer(shown, row, tags, LABELS)
    assert completion.finished
    entities = [(row.characters[t.first][0], row.characters[t.last][1], LABELS[t.label]) for t in tags]
    assert completion.text == ENCODER.format.answer(text, entities)
    parsed = ENCODER.format.parse(completion.text, LABELS)
    assert parsed.n_malformed == 0
    assert [(m.at, m.at + len(m.surface), m.label) for m in parsed.mentions] == entities
    for mention, tag in zip(parsed.mentions, tags, strict=True):
        assert completion.score(mention.start, mention.end) == pytest.approx(tag.score)


@pytest.mark.parametrize("spec", SPECS, ids=["base", "one", "merged"])
def test_tagging_engine_answers_in_order_whatever_the_batch(bank, spec):
    """All at once, one by one, and after other task models."""
    requests = [Request(spec, labels, text) for text in TEXTS for labels in (LABELS, LABELS[:2])]
    engine = make_engine(bank, entity_bias=1.0)
    together = engine.generate(requests)
    small = make_engine(bank, entity_bias=1.0, tokens_per_batch=1)
    small.generate([Request(other, LABELS, "Anna") for other in SPECS])
    alone = [completion for request in requests for completion in small.generate([request])]
    assert [c.text for c in together] == [c.text for c in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
    assert any("⟨" in completion.text for completion in together)


def test_tagging_finds_nothing_that_is_not_in_the_text(bank):
    """Random weights: every span is one of whole words, every label was asked, nothing is malformed."""
    annotator = Annotator(make_engine(bank, entity_bias=2.0), InlineFormat())
    windows = [Window(text, 100 * number) for number, text in enumerate(TEXTS)]
    n_found = 0
    for window, found in zip(windows, annotator.annotate(SPECS, LABELS, windows), strict=True):
        for candidate in found:
            start, end = candidate.start - window.start, candidate.end - window.start
            assert 0 <= start < end <= len(window.text)
            assert candidate.label in LABELS
            assert 0 < candidate.score <= 1
            n_found += 1
    assert n_found > 5
    assert (annotator.counts.dropped, annotator.counts.malformed, annotator.counts.unfinished) == (0, 0, 0)


def test_tagging_engine_has_an_entity_bias(bank, tiny_bank_path):
    """So training chooses one on the dev sets; answers without a grammar have none."""
    assert make_engine(bank).has_entity_bias
    free = TorchEngine(ExpertBank(tiny_bank_path), resolve_method, device="cpu", constrained=False)
    assert not free.has_entity_bias


def test_tagging_completes_prompts_of_its_own_format_only(bank):
    engine, encoder = make_engine(bank, entity_bias=1.0), InlineFormat()
    prompts = [encoder.prefix(LABELS) + encoder.body(text) for text in TEXTS]
    assert engine.complete(SPECS[1], prompts) == engine.generate([Request(SPECS[1], LABELS, text) for text in TEXTS])
    with pytest.raises(SamError, match="S507"):
        engine.complete(SPECS[1], [*prompts, "Write a poem."])


def test_tagging_bank_of_another_format_is_refused(tmp_path):
    bank = make_tiny_bank(tmp_path / "bank", n_experts=0, architecture="tagger", prompt=PROMPT)
    with pytest.raises(SamError, match="S506"):
        make_engine(bank)


# Training

ANNOTATED: Dict[str, List[Tuple[int, int, str]]] = {
    "Anna Keller met Omar Haddad in Bern.": [(0, 11, "person"), (16, 27, "person"), (31, 35, "place")],
    "Nobody came.": [],
    "In Prague Lena took the late ferry.": [(3, 9, "place"), (10, 14, "person")],
}


def test_tagging_examples_have_the_annotated_words():
    example = encode_example(ENCODER, LABELS, "Anna Keller met Omar.", [(0, 11, "person"), (16, 20, "place")])
    assert example.tags.types == (1, 1, 0, 3, 0)
    assert example.tags.begins == (1, 0, 0, 1, 0)
    assert example.input_ids == ENCODER.row(LABELS, "Anna Keller met Omar.").ids


@pytest.mark.parametrize(
    ("text", "entities"),
    [
        ("Anna Keller", [(0, 3, "person")]),
        ("Anna Keller", [(0, 11, "person"), (5, 11, "place")]),
        ("  ", []),
    ],
    ids=["part of a word", "overlap", "no words"],
)
def test_tagging_examples_that_cannot_be_told_are_left_out(text, entities):
    assert encode_example(ENCODER, LABELS, text, entities) is None


@torch.no_grad()
def test_tagging_loss_is_on_words_alone(model):
    """The mean over all words of all texts, each by itself; beginnings count among the words of entities."""
    examples = [encode_example(ENCODER, LABELS, text, entities) for text, entities in ANNOTATED.items()]
    batch = TagCollator(0)([examples])
    loss = tag_loss(*tag_logits(model, batch), batch)
    of_types, of_begins = [], []
    for text, example in zip(ANNOTATED, examples, strict=True):
        types, begins = slow_logits(model, text)
        for word, (type_, begin) in enumerate(zip(example.tags.types, example.tags.begins, strict=True)):
            of_types.append(cross_entropy(torch.tensor(types[word]), torch.tensor(type_)).item())
            if type_:
                of_begins.append(math.log1p(math.exp(-begins[word] if begin else begins[word])))
    wanted = sum(of_types) / len(of_types) + BEGIN_WEIGHT * sum(of_begins) / len(of_begins)
    assert loss.item() == pytest.approx(wanted, rel=1e-3)


def test_tagging_learns_what_it_is_shown(bank, tmp_path):
    """From training data to entities: a fine-tuned base finds the entities of its texts, adjacent ones apart."""
    model, tokenizer = load_model(bank.base[0]), make_tokenizer()
    examples = [encode_example(ENCODER, LABELS, text, entities) for text, entities in ANNOTATED.items()]
    settings = sft.SftSettings(max_steps=80, learning_rate=3e-3, warmup_steps=5, bf16=False)
    sft.fine_tune(model, tokenizer, [examples] * 80, tmp_path / "work", settings, progress=False)
    model.save_pretrained(tmp_path / "bank" / "base")
    tokenizer.save_pretrained(tmp_path / "bank" / "base")
    trained = ExpertBank.create(tmp_path / "bank", base="base", prompt=INLINE, encoder="none", name="trained")
    annotator = Annotator(make_engine(trained), InlineFormat())
    found = annotator.found(TaskModelSpec(), LABELS, list(ANNOTATED))
    assert [sorted(spans) for spans in found] == list(ANNOTATED.values())
