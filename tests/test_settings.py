"""The component's labels and settings, and how it is saved and scored."""

import json
import pickle
import shutil
from dataclasses import replace
from typing import Any, Tuple

import pytest
import spacy
from fakes import FakeEngineMaker, FakeStrategy, plan_of
from pipelines import LABELS, TEXTS, Case, add_sam, engines_of, ents, group, make_nlp, names_in, raises, sam_of
from spacy.tokens import Doc
from spacy.training import Example

from spacy_sam.component import SamNer

# Labels


def asked(case: Case) -> Tuple[str, ...]:
    """The labels of the last prompt, after a text was annotated."""
    case.sam(case.nlp.make_doc("Anna met Bella"), plan=plan_of(case.bank, "expert0"))
    return case.engines[-1].requests[-1].labels


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["person", "place"], ("person", "place")),
        (["place", "person"], ("place", "person")),
        (["b", "a", "b", " a "], ("b", "a")),
        ({"ORG": "organization", "LOC": "place"}, ("ORG", "LOC")),
        (["x" * 100], ("x" * 100,)),
        (["Ünïcode 日本", "a | b"], ("Ünïcode 日本", "a | b")),
    ],
)
def test_labels(make_case, labels, expected):
    case = make_case(labels=labels)
    assert case.sam.labels == expected
    assert case.nlp.pipe_labels["sam_ner"] == list(expected)
    phrases = tuple(labels.values()) if isinstance(labels, dict) else expected
    assert asked(case) == phrases
    doc = case.sam(case.nlp.make_doc("Anna met Bella"), plan=plan_of(case.bank, "expert0"))
    assert ents(doc) == group(doc) == names_in(doc.text, labels=expected)


def test_labels_many_are_asked_in_groups(make_case):
    labels = [f"kind {n}" for n in range(200)]
    case = make_case(labels=labels, engine={"@misc": "sam_tests.NumberedEngine.v1"})
    doc = case.nlp.make_doc("X7 then X199 then X150 , X0 and X7 , not X200")
    case.sam(doc, plan=plan_of(case.bank, "expert0"))
    assert [(ent.text, ent.label_) for ent in doc.ents] == [
        ("X7", "kind 7"),
        ("X199", "kind 199"),
        ("X150", "kind 150"),
        ("X0", "kind 0"),
        ("X7", "kind 7"),
    ]
    groups = [request.labels for request in case.engines[0].requests]
    assert [label for labels in groups for label in labels] == labels
    assert max(map(len, groups)) <= 16
    assert case.engines[0].calls == [case.engines[0].requests], "all groups in one call"


@pytest.mark.parametrize(
    ("labels", "code"),
    [
        ([""], "S203"),
        (["ok", "  "], "S203"),
        (["x" * 101], "S203"),
        (["x" * 200], "S203"),
        (["a;b"], "S203"),
        (["a\nb"], "S203"),
        (["a\u2028b"], "S203"),
        ([3], "S203"),
        ([None], "S203"),
        ({"ORG": ""}, "S203"),
        ({"ORG": 5}, "S203"),
        ({"": "organization"}, "S203"),
        ({"ORG": "organization", "COMPANY": "organization"}, "S202"),
        ({"ORG": "organization", "ORG ": "company"}, "S202"),
        ("person", "S202"),
        (b"person", "S202"),
        (None, "S202"),
        (5, "S202"),
        ({"person"}, "S202"),
    ],
)
def test_labels_that_cannot_be_asked(make_case, labels, code):
    case = make_case()
    with raises(code):
        case.sam.set_labels(labels)
    assert case.sam.labels == ("person", "place")
    with raises(code):
        SamNer(case.nlp.vocab, strategy=FakeStrategy(), engine=FakeEngineMaker(), labels=labels)


def test_labels_a_string_in_a_config_is_a_mistake(make_case):
    with pytest.raises(ValueError, match="abels"):
        make_case(labels="person")


def test_labels_add(make_case):
    case = make_case(labels=["person"])
    assert case.sam.add_label("person") == 0
    assert case.sam.add_label("place") == 1
    assert case.sam.add_label(" place ") == 0
    assert case.sam.labels == asked(case) == ("person", "place")
    assert case.sam.label_data == ["person", "place"]
    for label, code in (("", "S203"), (7, "S203"), ("a\nb", "S203")):
        with raises(code):
            case.sam.add_label(label)
    assert "place" in case.nlp.vocab.strings
    case = make_case(labels={"ORG": "organization"})
    with raises("S202"):
        case.sam.add_label("organization")
    assert case.sam.add_label("ORG") == 0
    assert case.sam.labels == ("ORG",)


def test_labels_by_default_are_those_that_experts_share(bank_copy):
    for name, labels in (("expert0", ("z", "a", "b")), ("expert1", ("b", "z", "c")), ("expert2", ("d", "z"))):
        card = bank_copy[name]
        bank_copy.update_card(replace(card, labels=labels))
    case = Case(*make_nlp(bank_copy, labels=[]), bank_copy)
    assert case.sam.labels == asked(case) == ("b", "z")
    bank_copy.remove("expert0")
    bank_copy.remove("expert1")
    with raises("S202"):
        _ = make_nlp(bank_copy, labels=[])[1].labels


def test_labels_that_leave_no_room(make_case):
    nlp, sam, bank = make_case(labels=["word " * 15])  # 24 tokens of the prompt
    sam.parts.make_engine = FakeEngineMaker(context=55)
    with raises("S204"):
        sam(nlp.make_doc("Anna"), plan=plan_of(bank, "expert0"))
    nlp, sam, bank = make_case(labels=["word " * 15])
    sam.parts.make_engine = FakeEngineMaker(context=56)
    long = "Anna saw one more . " * 30
    assert ents(sam(nlp.make_doc(long), plan=plan_of(bank, "expert0"))) == names_in(long, labels=sam.labels)
    assert max(len(r.text.split()) for r in engines_of(sam)[0].requests) <= 16


def test_labels_outlive_memory_zones(make_case):
    case = make_case(labels=[], min_docs=1)
    with case.nlp.memory_zone():
        inside = [ents(doc) for doc in case.nlp.pipe(TEXTS)]
    assert inside == [names_in(text) for text in TEXTS]
    assert case.sam.labels == ("person", "place")
    assert all(label in case.nlp.vocab.strings for label in LABELS)
    with case.nlp.memory_zone():
        case.sam.add_label("late one")
    assert "late one" in case.nlp.vocab.strings
    case.sam.set_labels(LABELS)
    (doc,) = case.nlp.pipe(TEXTS[:1])
    assert ents(doc) == names_in(TEXTS[0], 1)


# Settings


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("look_ahead", [0, -1, "100", 1.0, True, None]),
        ("min_docs", [0, -1, "10", 2.5, False]),
        ("batch_size", [0, "64", 1.5]),
        ("window_size", [0, 7, "128", 64.0]),
        ("window_overlap", [-1, "24", 128, 500]),
        ("threshold", [-0.1, 1.01, "0.5", None, True, float("nan")]),
        ("selection", ["", "always", None, 1]),
        ("spans_key", ["", 5, ["sc"]]),
        ("annotate_ents", ["yes", 1, None]),
        ("overwrite", ["no", 0, None]),
        ("save_bank", ["no", 1, None]),
    ],
)
def test_settings_out_of_range(make_case, setting, values):
    vocab = spacy.blank("en").vocab
    for value in values:
        with raises("S702") as caught:
            SamNer(vocab, strategy=FakeStrategy(), engine=FakeEngineMaker(), **{setting: value})
        assert caught.value.fields["setting"] == setting
        with pytest.raises(ValueError, match=setting):  # by spaCy's check of the config, or by ours
            make_case(**{setting: value})


@pytest.mark.parametrize(
    "config",
    [
        {"lables": ["person"]},
        {"engine": {"@misc": "sam_tests.NoSuchEngine.v1"}},
        {"engine": {"@misc": "spacy_sam.TorchEngine.v1", "gpu": 0}},
        {"engine": {"@misc": "spacy_sam.TorchEngine.v1", "max_new_tokens": "128"}},
        {"engine": {"@misc": "spacy_sam.TorchEngine.v1", "max_new_tokens": [1]}},
        {"strategy": {"@misc": "spacy_sam.SaM.v1", "n_experts": "3"}},
        {"strategy": {"@misc": "spacy_sam.SaM.v1", "n_experts": 0}},
        {"strategy": {"@misc": "spacy_sam.SaM.v1", "merge": {"@misc": "spacy_sam.TIES.v1", "density": "0.2"}}},
        {"strategy": {"@misc": "spacy_sam.SaM.v1", "merge": {"@misc": "spacy_sam.Mean.v1", "scale": "1"}}},
        {"strategy": {"@misc": "spacy_sam.SaM.v1", "selectors": {"sampling": {"sample_size": "10"}}}},
        {"strategy": None},
        {"engine": "cpu"},
        {"look_ahead": [1]},
        {"bank": 5},
    ],
    ids=lambda config: json.dumps(config)[:60],
)
def test_settings_that_spacy_cannot_use(config):
    nlp = spacy.blank("en")
    with pytest.raises(ValueError):  # noqa: PT011 - by confection, catalogue or this package
        nlp.add_pipe("sam_ner", config=config)
    assert nlp.pipe_names == []


def strategy_of(config: Any) -> Any:
    return add_sam(spacy.blank("en"), strategy=config).parts.strategy


def test_settings_default_selector_can_be_left_out():
    strategy = strategy_of({"selectors": {"similarity": None}})
    assert [selector.name for selector in strategy.selectors] == ["sampling_evaluation"]
    strategy = strategy_of({"@misc": "spacy_sam.SaM.v1", "n_experts": 2})
    assert [selector.name for selector in strategy.selectors] == ["domain_similarity", "sampling_evaluation"]
    assert strategy.n_experts == 2


def test_settings_eco_strategy():
    config = {
        "@misc": "spacy_sam.SaMEco.v1",
        "n_experts": 2,
        "selectors": {"one": {"@misc": "spacy_sam.DomainSimilarity.v1"}},
        "merge": {"@misc": "spacy_sam.Mean.v1"},
    }
    strategy = strategy_of(config)
    assert strategy.name == "SaM-eco"
    assert [selector.name for selector in strategy.selectors] == ["domain_similarity"]
    assert strategy.merge.config["@misc"] == "spacy_sam.Mean.v1"


def test_settings_merge_method_inside_another():
    inner = {"@misc": "spacy_sam.PCB.v1", "density": 0.2, "scale": 0.5}
    merge = {"@misc": "spacy_sam.CoreSpace.v1", "inner": inner}
    assert strategy_of({"merge": merge}).merge.config == merge
    assert strategy_of({"merge": {"@misc": "spacy_sam.KnOTS.v1"}}).merge.config["density"] == 1.0


# Serialisation


def state(sam: SamNer) -> Tuple[Any, ...]:
    return sam.cfg, sam.labels, sam.plan


@pytest.fixture
def configured(make_case) -> Case:
    case = make_case(labels={"ORG": "organization"}, selection="once", threshold=0.1, window_size=32, batch_size=2)
    case.sam.add_label("place")
    case.sam.plan = plan_of(case.bank, "expert1", ("expert0", "expert2"))
    return case


def test_saved_pipeline_is_the_same(configured, tmp_path):
    configured.nlp.to_disk(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    nlp = spacy.load(tmp_path / "there")
    sam = sam_of(nlp)
    assert state(sam) == state(configured.sam)
    assert sam.parts.bank_path == configured.sam.parts.bank_path
    assert engines_of(sam) == []
    assert [group(doc) for doc in nlp.pipe(TEXTS)] == [group(doc) for doc in configured.nlp.pipe(TEXTS)]
    assert len(engines_of(sam)) == 1
    files = sorted(path.name for path in (tmp_path / "there" / "sam_ner").iterdir())
    assert files == ["cfg.json", "plan.json"]


def test_saved_pipeline_without_a_plan(make_case, tmp_path):
    case = make_case()
    case.nlp.to_disk(tmp_path / "model")
    nlp = spacy.load(tmp_path / "model")
    assert state(sam_of(nlp)) == state(case.sam)
    assert [ents(doc) for doc in nlp.pipe(TEXTS)] == [names_in(text) for text in TEXTS]


def test_saved_over_another_plan(make_case, tmp_path):
    """Loading a component without a plan leaves no older one behind."""
    case, other = make_case(), make_case()
    other.sam.plan = plan_of(case.bank, "expert1")
    case.sam.to_disk(tmp_path / "sam")
    assert other.sam.from_disk(tmp_path / "sam").plan is None


def test_bytes_are_the_same(configured, make_case):
    other = make_case(labels=["another"])
    assert other.nlp.from_bytes(configured.nlp.to_bytes()) is other.nlp
    assert state(other.sam) == state(configured.sam)
    assert [group(doc) for doc in other.nlp.pipe(TEXTS)] == [group(doc) for doc in configured.nlp.pipe(TEXTS)]


def test_bytes_in_part(configured, make_case):
    other = make_case(labels=["another"])
    other.sam.from_bytes(configured.sam.to_bytes(exclude=["plan"]))
    assert other.sam.labels == ("ORG", "place")
    assert other.sam.plan is None
    other = make_case(labels=["another"])
    other.sam.from_bytes(configured.sam.to_bytes(), exclude=["cfg"])
    assert other.sam.labels == ("another",)
    assert other.sam.plan == configured.sam.plan


def test_saved_nonsense(make_case, tmp_path):
    case = make_case()
    case.sam.to_disk(tmp_path / "sam")
    file = tmp_path / "sam" / "plan.json"
    file.write_text(json.dumps({"base_hash": 5}))
    with raises("S111"):
        case.sam.from_disk(tmp_path / "sam")
    cfg = tmp_path / "sam" / "cfg.json"
    cfg.write_text(json.dumps({**case.sam.cfg, "batch_size": "64"}))
    with raises("S702"):
        case.sam.from_disk(tmp_path / "sam")


def test_pickled_component_is_the_same(configured):
    configured.nlp(TEXTS[0])  # with an engine that was used
    sam = pickle.loads(pickle.dumps(configured.sam))
    assert state(sam) == state(configured.sam)
    docs = [Doc(sam.vocab, words=text.split()) for text in TEXTS]
    assert [group(doc) for doc in sam.pipe(docs)] == [group(doc) for doc in configured.nlp.pipe(TEXTS)]
    assert sam.parts.make_engine.made[-1] is not engines_of(configured.sam)[-1]


def test_evaluate(make_case):
    nlp = make_case().nlp
    examples = []
    for text in TEXTS:
        gold = nlp.make_doc(text)
        gold.set_ents([gold.char_span(*span) for span in names_in(text, 1)])
        examples.append(Example(nlp.make_doc(text), gold))
    scores = nlp.evaluate(examples)
    assert scores["ents_r"] == 1.0
    n_gold, n_found = (sum(len(names_in(text, n)) for text in TEXTS) for n in (1, 0))
    assert scores["ents_p"] == pytest.approx(n_gold / n_found)
    assert set(scores["ents_per_type"]) == set(LABELS)
    assert nlp.get_factory_meta("sam_ner").default_score_weights["ents_f"] == 1.0
