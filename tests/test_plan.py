"""Plans and cards: to JSON and back, fingerprints, refusals."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spacy_sam.errors import SamError
from spacy_sam.plan import Centroid, Corpus, Expert, Plan, Score, Selection, TaskModelSpec, from_json, to_json

TIES = {"@misc": "spacy_sam.TIES.v1", "density": 0.2, "scale": 1.0}
PLAN = Plan(
    base_hash="0123456789abcdef",
    task_models=(TaskModelSpec(("news", "legal"), (1.0, 0.5), TIES), TaskModelSpec(("stem",), (), TIES)),
    adapter_hashes={"news": "aa", "legal": "bb", "stem": "cc"},
    selections=(
        Selection("domain_similarity", (("news", 0.75), ("legal", 0.5), ("stem", -0.125)), ("news", "legal"), {"n": 3}),
        Selection("sampling", (("stem", 1.0), ("news", 0.0), ("legal", 0.0)), ("stem",)),
    ),
    strategy="spacy_sam.SaM.v1",
    labels=("person", "Straße; | ünïcode"),
    sample_size=10,
)

names = st.text(min_size=1, max_size=20)
finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | finite | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
json_dicts = st.dictionaries(st.text(max_size=8), json_values, max_size=3)
specs = st.dictionaries(names, finite, max_size=4).flatmap(
    lambda weights: st.builds(TaskModelSpec, st.just(tuple(weights)), st.just(tuple(weights.values())), json_dicts)
)
selections = st.builds(
    Selection,
    names,
    st.lists(st.tuples(names, finite), max_size=4).map(tuple),
    st.lists(names, max_size=4).map(tuple),
    json_dicts,
)
plans = st.builds(
    Plan,
    names,
    st.lists(specs, max_size=3).map(tuple),
    st.dictionaries(names, names, max_size=3),
    st.lists(selections, max_size=2).map(tuple),
    st.text(max_size=10),
    st.lists(names, max_size=3).map(tuple),
    st.integers(0, 1000),
)


def raises(code):
    return pytest.raises(SamError, match=rf"^\[{code}\]")


# Task models


def test_plan_task_model_weights_default_to_one():
    assert TaskModelSpec(("b", "a")).weights == (1.0, 1.0)


@given(st.dictionaries(names, finite, min_size=1, max_size=5), st.randoms())
def test_plan_task_model_order_of_experts_does_not_matter(weights, random):
    pairs = list(weights.items())
    random.shuffle(pairs)
    shuffled = TaskModelSpec(tuple(n for n, _ in pairs), tuple(w for _, w in pairs), TIES)
    ordered = TaskModelSpec(tuple(weights), tuple(weights.values()), TIES)
    assert shuffled == ordered
    assert shuffled.fingerprint == ordered.fingerprint
    assert dict(zip(shuffled.experts, shuffled.weights)) == weights


@pytest.mark.parametrize(
    ("experts", "weights"),
    [
        (("a", "b"), (1.0,)),
        (("a",), (1.0, 1.0)),
        ((), (1.0,)),
        (("a", "a"), (1.0, 1.0)),
        (("a", "a"), ()),
        (("a",), (float("nan"),)),
        (("a", "b"), (1.0, float("inf"))),
        (("a",), (float("-inf"),)),
    ],
)
def test_plan_task_model_refuses_weights_that_do_not_fit(experts, weights):
    with raises("S113"):
        TaskModelSpec(experts, weights)


@pytest.mark.parametrize(
    "other",
    [
        TaskModelSpec(("a", "b"), (1.0, 0.25), TIES),
        TaskModelSpec(("a", "b"), (0.5, 1.0), TIES),
        TaskModelSpec(("a", "c"), (1.0, 0.5), TIES),
        TaskModelSpec(("a",), (1.0,), TIES),
        TaskModelSpec(("a", "b"), (1.0, 0.5), {**TIES, "density": 0.3}),
        TaskModelSpec(("a", "b"), (1.0, 0.5), {"@misc": "spacy_sam.Average.v1"}),
        TaskModelSpec(("a", "b"), (1.0, 0.5)),
        TaskModelSpec(),
    ],
)
def test_plan_task_model_fingerprint_changes_with_what_decides_the_merge(other):
    spec = TaskModelSpec(("a", "b"), (1.0, 0.5), TIES)
    assert other.fingerprint != spec.fingerprint
    assert replace(PLAN, task_models=(other,)).fingerprint != replace(PLAN, task_models=(spec,)).fingerprint


def test_plan_task_model_fingerprint_ignores_order_of_settings():
    backwards = dict(reversed(list(TIES.items())))
    assert TaskModelSpec(("a", "b"), (), backwards).fingerprint == TaskModelSpec(("a", "b"), (), TIES).fingerprint


@pytest.mark.parametrize("experts", [(), ("a",)])
def test_plan_task_model_of_one_has_no_method(experts):
    """It is the same task model whatever it would be merged by, so it is run once."""
    assert TaskModelSpec(experts, (), TIES) == TaskModelSpec(experts)
    assert TaskModelSpec(experts, (), TIES).fingerprint == TaskModelSpec(experts).fingerprint


@pytest.mark.parametrize(("experts", "name"), [(("b", "a"), "a + b"), (("a",), "a"), ((), "base")])
def test_plan_task_model_name(experts, name):
    assert TaskModelSpec(experts).name == name


# Plans


@pytest.mark.parametrize(
    "changes",
    [
        {"base_hash": "fedcba9876543210"},
        {"adapter_hashes": {**PLAN.adapter_hashes, "news": "retrained"}},
        {"task_models": PLAN.task_models[:1]},
    ],
)
def test_plan_fingerprint_changes_with_the_merged_weights(changes):
    assert replace(PLAN, **changes).fingerprint != PLAN.fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"selections": ()},
        {"strategy": "another"},
        {"labels": ("other",)},
        {"sample_size": 99},
        {"adapter_hashes": dict(reversed(list(PLAN.adapter_hashes.items())))},
        {"task_models": (TaskModelSpec(("legal", "news"), (0.5, 1.0), TIES), PLAN.task_models[1])},
    ],
)
def test_plan_fingerprint_ignores_what_does_not_decide_the_merged_weights(changes):
    assert replace(PLAN, **changes).fingerprint == PLAN.fingerprint


@given(plans)
def test_plan_survives_json(plan):
    data = json.loads(json.dumps(plan.to_dict()))
    again = Plan.from_dict(data)
    assert again == plan
    assert again.fingerprint == plan.fingerprint == data["fingerprint"]


def test_plan_survives_disk(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.to_disk(path)
    assert Plan.from_disk(path) == PLAN
    assert Plan.from_disk(str(path)) == PLAN
    assert "Straße" in path.read_text(encoding="utf8")


def test_plan_from_dict_leaves_its_argument_alone():
    data = PLAN.to_dict()
    before = json.dumps(data)
    Plan.from_dict(data)
    assert json.dumps(data) == before


def test_plan_edited_by_hand_has_a_fingerprint_of_its_own():
    data = PLAN.to_dict()
    data["task_models"][0]["weights"] = [0.9, 0.1]
    edited = Plan.from_dict(data)
    assert edited.task_models[0].weights == (0.9, 0.1)
    assert edited.fingerprint != PLAN.fingerprint


def broken(**changes):
    return {**PLAN.to_dict(), **changes}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "base_hash"),
        ({"base_hash": "x"}, "task_models"),
        (broken(base_hash=None), "base_hash"),
        (broken(task_models="news"), "task_models"),
        (broken(task_models=[{"experts": ["a"], "weights": [1, 2]}]), "S113"),
        (broken(task_models=[{"experts": ["a"], "weights": ["heavy"]}]), "weights"),
        (broken(task_models=[{"expert": ["a"]}]), "task_models.0.expert"),
        (broken(sample_size="many"), "sample_size"),
        (broken(adapter_hashes=["a"]), "adapter_hashes"),
        (broken(selections=[{"selector": "x"}]), "selections.0"),
        (broken(selections=[{"selector": "x", "scores": [["a"]], "chosen": []}]), "selections.0.scores"),
        (broken(version=2), "version"),
    ],
)
def test_plan_refuses_what_is_no_plan(data, said, tmp_path):
    with raises("S111") as caught:
        Plan.from_dict(data)
    assert said in str(caught.value)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data), encoding="utf8")
    with raises("S111"):
        Plan.from_disk(path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'"plan"', b"null", b"\xff\xfe", json.dumps(asdict(PLAN)).encode()[:-9]]
)
def test_plan_refuses_a_broken_file(content, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with raises("S111"):
        Plan.from_disk(path)


def test_plan_refuses_a_missing_file(tmp_path):
    with raises("S111"):
        Plan.from_disk(tmp_path / "none.json")
    with raises("S111"):
        Plan.from_disk(tmp_path)


def test_plan_in_words():
    assert str(PLAN) == (
        "domain_similarity: news 0.750, legal 0.500, stem -0.125\n"
        "sampling: stem 1.000, news 0.000, legal 0.000\n"
        "task model 1: legal + news\n"
        "task model 2: stem"
    )
    assert str(Plan("x", (TaskModelSpec(),))) == "task model 1: base"


# Cards

CARD = Expert(
    name="news",
    domain="news",
    labels=("person", "place"),
    base_hash="0123",
    corpora=(Corpus("one", 3, ("person",)),),
    lora={"rank": 4, "alpha": 8.0},
    centroid=Centroid("encoder", 3, (0.1, -1e-30, 3.0)),
    scores={"dev": Score(0.5, 0.25, 1 / 3, 10)},
)


def test_plan_card_survives_json():
    assert from_json(Expert, json.loads(json.dumps(to_json(CARD))), "S102", path="card.json") == CARD


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": "person"}, "labels"),
        ({"domain": None}, "domain"),
        ({"centroid": {"encoder": "e", "n_texts": 1}}, "centroid.vector"),
        ({"centroid": {"encoder": "e", "n_texts": 1, "vector": [1.0], "norm": 1.0}}, "centroid.norm"),
        ({"scores": {"dev": {"p": 1, "r": 1, "f1": 1, "n_docs": 1}}}, "scores.dev.f1"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_plan_card_refuses_what_is_no_card(changes, said):
    with raises("S102") as caught:
        from_json(Expert, {**to_json(CARD), **changes}, "S102", path="card.json")
    assert said in str(caught.value)
    assert "card.json" in str(caught.value)
