"""A bank that changes while its component is in use: by threads of this process, and by other processes."""

import json
import logging
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import pytest
import spacy
from fakes import FakeEngineMaker, FakeStrategy, plan_of
from helpers import make_card, save_adapter
from pipelines import LABELS, TEXTS, engines_of, ents, group, make_nlp, names_in, raises
from spacy.tokens import Doc

from spacy_sam import parts
from spacy_sam.bank import ExpertBank
from spacy_sam.component import SamNer
from spacy_sam.generate.engine import Request
from spacy_sam.merge.methods import Ties
from spacy_sam.plan import Plan, TaskModelSpec
from spacy_sam.versions import Changes

REAL: Dict[str, Any] = {"engine": {"@misc": "spacy_sam.TorchEngine.v1", "device": "cpu", "max_new_tokens": 24}}
NEW = ("expert0", "expert3")
Answer = List[Tuple[int, int, str]]


class Live(NamedTuple):
    """A pipeline on a bank that may be changed, and two adapters of one name for it."""

    nlp: spacy.Language
    sam: SamNer
    adapters: Tuple[Path, Path]

    def add(self, number: int = 0, name: str = "expert3") -> None:
        self.sam.add_expert(name, self.adapters[number], make_card(self.sam.bank, 3))

    def replace(self, number: int, name: str = "expert3") -> None:
        self.sam.remove_expert(name)
        self.add(number, name)


@pytest.fixture(scope="module")
def adapters(tiny_bank_path, tmp_path_factory) -> Tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("live")
    one, other = (save_adapter(folder / str(seed), tiny_bank_path / "base", seed=seed) for seed in (71, 72))
    return one, other


@pytest.fixture
def make_live(bank_copy, adapters) -> Callable[..., Live]:
    def make(**config: Any) -> Live:
        return Live(*make_nlp(bank_copy.path, **{"selection": "manual", **config}), adapters)

    return make


@pytest.fixture
def live(make_live) -> Live:
    return make_live()


@pytest.fixture
def real(make_live) -> Live:
    return make_live(**REAL)


def merged(bank: ExpertBank, *experts: str) -> Plan:
    """A plan of one merged task model, and one of its last expert alone."""
    specs = TaskModelSpec(experts, (), Ties(0.4).config), TaskModelSpec(experts[-1:])
    return Plan(bank.base_hash, specs, {name: bank.adapter_hash(name) for name in experts})


def answers(live: Live, plan: Plan) -> Dict[str, Answer]:
    """What a plan finds in each text, in a component and an engine of its own."""
    nlp, sam = make_nlp(live.sam.bank, selection="manual", **REAL)
    sam.plan = plan
    return {text: group(nlp(text)) for text in TEXTS}


# Threads


class Reader(threading.Thread):
    """Annotates until it is told to stop, and keeps each document's plan and answer; and what went wrong."""

    def __init__(self, annotate: Callable[[], Sequence[Doc]], stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.annotate, self.stop = annotate, stop
        self.found: List[Tuple[str, str, Answer]] = []
        self.n_rounds = 0
        self.errors: List[BaseException] = []

    def run(self) -> None:
        try:
            while not self.stop.is_set() or not self.n_rounds:
                docs = self.annotate()
                assert len({doc.spans["sc"].attrs["plan"] for doc in docs}) == 1, "a stream has one plan"
                self.found += [(doc.spans["sc"].attrs["plan"], doc.text, group(doc)) for doc in docs]
                self.n_rounds += 1
        except BaseException as error:
            self.errors.append(error)


def read_meanwhile(readers: Sequence[Reader], change: Callable[[], None]) -> None:
    """Change things while readers read. RAISES: What went wrong for any of them."""
    for reader in readers:
        reader.start()
    try:
        change()
    finally:
        readers[0].stop.set()
        for reader in readers:
            reader.join(120)
    for reader in readers:
        assert not reader.is_alive(), "it hangs"
        if reader.errors:
            raise reader.errors[0]


def test_live_hundred_swaps_under_readers(real):
    """Plans are swapped, and an expert is added, replaced and removed on disk: every answer is that of its document's plan."""
    nlp, sam, _ = real
    plans: List[Plan] = []
    expected: Dict[str, Dict[str, Answer]] = {}
    for number, experts in ((0, ("expert0", "expert1")), (0, ("expert1", "expert2")), (0, NEW), (1, NEW)):
        real.add(number)
        plans.append(merged(sam.bank, *experts))
        expected[plans[-1].fingerprint] = answers(real, plans[-1])
        sam.remove_expert("expert3")
    assert len({str(found) for found in expected.values()}) == len(plans) == 4
    sam.plan = plans[0]
    stop = threading.Event()
    readers = [Reader(lambda n=n: [nlp(TEXTS[n])], stop) for n in (0, 3)]
    readers += [Reader(lambda: list(nlp.pipe(TEXTS)), stop) for _ in range(2)]

    def swap() -> None:
        for number in range(50):
            sam.plan = plans[number % 2]
            real.add(number % 4 // 2)
            sam.plan = plans[2 + number % 4 // 2]
            sam.remove_expert("expert3")  # the plan that runs uses it

    read_meanwhile(readers, swap)
    seen = [found for reader in readers for found in reader.found]
    assert all(found == expected[plan][text] for plan, text, found in seen)
    assert len({plan for plan, _, _ in seen}) > 1


def test_live_selection_under_readers(make_live):
    """Streams select by themselves while experts come and go."""
    nlp, sam, _ = live = make_live(selection="stream", min_docs=2, look_ahead=3)
    stop = threading.Event()
    readers = [Reader(lambda: list(nlp.pipe(TEXTS)), stop) for _ in range(3)]

    def change() -> None:
        for number in range(20):
            live.add(number % 2)
            sam.select(TEXTS)
            sam.remove_expert("expert3")

    read_meanwhile(readers, change)
    for reader in readers:
        for _, text, found in reader.found:
            assert found in [names_in(text, number) for number in range(3)] + [
                [span for span in names_in(text) if text[span[0]] != "D"]
            ]


def run_all(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "it hangs"


class Counting(FakeEngineMaker):
    """Engines are made slowly, so that several threads ask for one meanwhile."""

    def __call__(self, bank: ExpertBank) -> Any:
        threading.Event().wait(0.05)
        return super().__call__(bank)


def test_live_first_use_by_many_threads(make_live):
    """One engine is loaded, one call selects, and one warning says so."""
    nlp, sam, _ = make_live(selection="stream")
    sam.parts.make_engine = Counting()
    barrier = threading.Barrier(4)
    errors: List[BaseException] = []

    def call() -> None:
        try:
            barrier.wait(60)
            nlp(TEXTS[0])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    with pytest.warns(UserWarning, match="one document alone") as warned:
        run_all(threads)
    assert errors == []
    assert len(warned) == len(engines_of(sam)) == len(sam.parts.strategy.contexts) == 1


# A running stream, and the policy for experts that are gone


def test_live_stream_keeps_the_plan_it_began_with(real):
    nlp, sam, _ = real
    sam.cfg["batch_size"] = 1
    real.add()
    first, second = merged(sam.bank, *NEW), merged(sam.bank, "expert1", "expert2")
    expected = answers(real, first)
    sam.plan = first
    stream = nlp.pipe(TEXTS)
    docs = [next(stream)]
    sam.plan = second
    real.replace(1)
    docs += [next(stream)]
    sam.remove_expert("expert3")
    docs += list(stream)
    assert [group(doc) for doc in docs] == [expected[text] for text in TEXTS]
    assert {doc.spans["sc"].attrs["plan"] for doc in docs} == {first.fingerprint}


@pytest.mark.parametrize("used", [True, False], ids=["merged before", "never merged"])
@pytest.mark.parametrize("change", ["removed", "replaced", "deleted"])
def test_live_plan_outlives_its_expert(make_live, caplog, used, change):
    """The plan goes on from memory until the next one, and says that it is stale. Merged weights are not even kept."""
    nlp, sam, _ = real = make_live(engine={**REAL["engine"], "cache_bytes": 0})
    real.add()
    plan = merged(sam.bank, *NEW)
    expected = answers(real, plan)
    sam.plan = plan
    if used:
        assert group(nlp(TEXTS[0])) == expected[TEXTS[0]]
    assert not sam.plan_is_stale
    with caplog.at_level(logging.WARNING, "spacy_sam"):
        if change == "deleted":  # by hand, behind the bank's back
            shutil.rmtree(sam.bank.folder("expert3"))
        else:
            sam.remove_expert("expert3")
            assert "expert3" in caplog.text
    if change == "replaced":
        real.add(1)
    assert sam.plan_is_stale
    sam(nlp.make_doc(TEXTS[0]), plan=merged(sam.bank, "expert1", "expert2"))
    assert {doc.text: group(doc) for doc in nlp.pipe(TEXTS)} == expected
    assert group(nlp(TEXTS[1])) == expected[TEXTS[1]]
    sam.plan = merged(sam.bank, "expert0", "expert1")
    assert not sam.plan_is_stale


def test_live_removed_expert_is_not_selected_again(make_live):
    live = make_live(selection="stream", min_docs=2)
    live.sam.parts.strategy.contexts.append(None)  # the next one takes expert1
    list(live.nlp.pipe(TEXTS))
    assert live.sam.plan.task_models[0].name == "expert1"
    live.sam.remove_expert("expert1")
    assert group(live.nlp(TEXTS[0])) == names_in(TEXTS[0], 1)
    list(live.nlp.pipe(TEXTS))
    assert [card.name for card in live.sam.parts.strategy.contexts[-1].bank.experts] == ["expert0", "expert2"]
    assert live.sam.plan.task_models[0].name == "expert0"


def test_live_replaced_expert_has_new_answers(real):
    """Same name, other weights: nothing of the old version is left in any cache, in either direction."""
    nlp, sam, _ = real
    real.add(0)
    first = merged(sam.bank, *NEW)
    expected = answers(real, first)
    sam.plan = first
    assert {text: group(nlp(text)) for text in TEXTS} == expected
    real.replace(1)
    second = merged(sam.bank, *NEW)
    other = answers(real, second)
    assert first.fingerprint != second.fingerprint
    assert expected != other
    sam.plan = second
    assert {text: group(nlp(text)) for text in TEXTS} == other
    real.replace(0)
    sam.plan = first
    assert {text: group(nlp(text)) for text in TEXTS} == expected


def test_live_plan_is_not_taken_back_from_memory(live):
    """What is asked for anew is held against the bank, whoever has it in memory still."""
    live.add()
    plan = plan_of(live.sam.bank, "expert3")
    live.sam.plan = plan
    live.sam.remove_expert("expert3")
    for refused in (replace(plan, strategy="by hand"), Plan.from_dict(plan.to_dict())):
        with raises("S108"):
            live.sam(live.nlp.make_doc(TEXTS[0]), plan=refused)
        with raises("S108"):
            live.sam.plan = refused
    assert live.sam.plan is plan
    assert ents(live.sam(live.nlp.make_doc("Anna Dan"), plan=plan)) == [(0, 4, "person")]
    live.add(1)
    with raises("S116"):
        live.sam.plan = plan


def test_live_plan_for_single_calls(make_live):
    """Its experts are read once for many calls, and given plans are not kept for ever."""
    live = make_live()
    bank = live.sam.bank
    plan = plan_of(bank, "expert1")
    for _ in range(3):
        assert ents(live.sam(live.nlp.make_doc(TEXTS[0]), plan=plan)) == names_in(TEXTS[0], 1)
    assert len(live.sam.parts._given) == 1
    for number in range(8):
        spec = TaskModelSpec(("expert1",), (1.0 + number,))
        live.sam(live.nlp.make_doc(TEXTS[0]), plan=replace(plan, task_models=(spec,)))
    assert len(live.sam.parts._given) == parts.MAX_GIVEN


# Labels


def test_live_types_are_those_of_the_plan(bank_copy, make_live):
    """Without labels, the types that experts share are asked: those of when the plan was made."""
    live = make_live(labels=[])
    sam = live.sam
    for name in ("expert0", "expert1"):
        sam.bank.update_card(replace(sam.bank[name], labels=("person", "river")))
    sam.bank.update_card(replace(sam.bank["expert2"], labels=("person", "place")))
    assert sam.labels == ("person", "river")
    sam.plan = plan_of(sam.bank, "expert0")
    for name in ("expert1", "expert2"):
        sam.remove_expert(name)
    assert sam.labels == ("person", "river")
    assert ents(live.nlp("Anna Bella")) == names_in("Anna Bella", labels=["person", "river"])
    sam.reset()
    with raises("S202"):
        sam.select(TEXTS)


# Changes on the way from selection to merge


class Meddling(FakeStrategy):
    """Changes the bank in the middle of its first selections."""

    def __init__(self, change: Callable[[], None], times: int) -> None:
        super().__init__()
        self.change, self.times = change, times

    def __call__(self, context: Any) -> Plan:
        names = [card.name for card in context.bank.experts]
        self.contexts.append(context)
        if len(self.contexts) <= self.times:
            self.change()
        assert [card.name for card in context.bank.experts] == names, "a selection sees one state of the bank"
        return plan_of(context.bank, names[-1])


def meddle(live: Live, times: int) -> Meddling:
    """The last expert is removed while it is selected, and another one added."""
    added = iter(range(4, 50))

    def change() -> None:
        live.sam.remove_expert([card.name for card in live.sam.bank][-1])
        live.sam.add_expert(f"expert{next(added)}", live.adapters[0], make_card(live.sam.bank, 9))

    strategy = Meddling(change, times)
    live.sam.parts.strategy = strategy
    return strategy


def test_live_selection_that_fails_for_a_change_is_repeated(live, caplog):
    strategy = meddle(live, times=2)
    with caplog.at_level(logging.WARNING, "spacy_sam"):
        plan = live.sam.select(TEXTS)
    assert len(strategy.contexts) == 3
    assert plan.task_models[0].name == "expert5"
    assert caplog.text.count("was changed while experts were selected") == 2


def test_live_selection_gives_up_on_a_restless_bank(live):
    live.sam.plan = before = plan_of(live.sam.bank, "expert0")
    strategy = meddle(live, times=100)
    with raises("S705"):
        live.sam.select(TEXTS)
    assert len(strategy.contexts) == parts.MAX_SELECTIONS
    assert live.sam.plan is before


def test_live_selection_notices_what_others_removed(live):
    """An expert that another process removed is still listed here: the selection that falls over it sees the bank anew."""
    assert len(live.sam.bank) == 3
    ExpertBank(live.sam.bank.path).remove("expert0")
    plan = live.sam.select(TEXTS)
    assert plan.task_models[0].name != "expert0"
    assert [card.name for card in live.sam.bank] == ["expert1", "expert2"]


def test_live_selection_that_fails_for_the_bank_itself_fails(live):
    (live.sam.bank.folder("expert0") / "adapter_model.safetensors").unlink()
    with raises("S104"):
        live.sam.select(TEXTS)


@pytest.mark.parametrize("how", ["removed", "deleted", "replaced"])
def test_live_expert_gone_between_selection_and_merge(real, how):
    """An engine that is asked for a version that nobody has any more says what to do, and goes on with others."""
    sam, engine = real.sam, real.sam.parts.annotator.engine
    real.add()
    lost, kept = merged(sam.bank, *NEW), merged(sam.bank, "expert0", "expert1")
    if how == "deleted":
        shutil.rmtree(sam.bank.folder("expert3"))
    else:
        sam.remove_expert("expert3")
    if how == "replaced":
        real.add(1)
    ask = [[Request(spec, tuple(LABELS), TEXTS[0]) for spec in plan.versions] for plan in (lost, kept)]
    before = [answer.text for answer in engine.generate(ask[1])]
    with raises("S413") as caught:
        engine.generate(ask[0])
    assert "expert3" in str(caught.value)
    assert "Select again" in str(caught.value)
    assert [answer.text for answer in engine.generate(ask[1])] == before


# Other processes


CHANGE = """
import sys
from spacy_sam.bank import ExpertBank

bank = ExpertBank(sys.argv[1])
card = bank["expert2"]
bank.add("expert3", sys.argv[2], card)
bank.remove("expert0")
bank.remove("expert2")
bank.add("expert2", sys.argv[3], card)
"""


def test_live_refresh_sees_other_processes(live):
    live.sam.plan = plan_of(live.sam.bank, "expert2")
    assert not live.sam.refresh()
    command = [sys.executable, "-c", CHANGE, str(live.sam.bank.path), *map(str, live.adapters)]
    subprocess.run(command, check=True, timeout=240)
    assert [card.name for card in live.sam.bank] == ["expert0", "expert1", "expert2"]
    changes = live.sam.refresh()
    assert changes == Changes(("expert3",), ("expert0",), ("expert2",))
    assert [card.name for card in live.sam.bank] == ["expert1", "expert2", "expert3"]
    assert live.sam.plan_is_stale
    assert not live.sam.refresh()
    assert [card.name for card in ExpertBank(live.sam.bank.path)] == ["expert1", "expert2", "expert3"]


def test_live_refresh_sees_new_cards(live):
    other = ExpertBank(live.sam.bank.path)
    other.update_card(replace(other["expert1"], domain="another"))
    other.entity_bias = 0.75
    assert live.sam.refresh() == Changes(changed=("expert1",))
    assert live.sam.bank["expert1"].domain == "another"
    assert live.sam.bank.entity_bias == 0.75
    assert not live.sam.plan_is_stale


@pytest.mark.parametrize("setting", ["base_hash", "prompt", "encoder"])
def test_live_refresh_refuses_another_bank(live, setting):
    """Base, prompt format and encoder are loaded once."""
    before = [card.name for card in live.sam.bank]
    file = live.sam.bank.path / "bank.json"
    text = file.read_text()
    file.write_text(json.dumps({**json.loads(text), setting: {"name": "x"} if setting == "prompt" else "x"}))
    with raises("S704"):
        live.sam.refresh()
    assert [card.name for card in live.sam.bank] == before
    assert live.sam.bank.prompt["name"] != "x"
    file.write_text(text)
    assert not live.sam.refresh()


def test_live_refresh_of_a_damaged_bank_changes_nothing(live):
    assert len(live.sam.bank) == 3
    card = live.sam.bank.folder("expert1") / "card.json"
    text = card.read_text()
    card.write_text(text[:20])
    with raises("S102"):
        live.sam.refresh()
    assert len(live.sam.bank) == 3
    card.write_text(text)
    assert not live.sam.refresh()


# Adding


def test_live_add_takes_the_card_of_the_folder(live, tmp_path):
    folder = shutil.copytree(live.sam.bank.folder("expert1"), tmp_path / "trained")
    live.sam.add_expert("expert8", folder)
    assert live.sam.bank["expert8"] == replace(live.sam.bank["expert1"], name="expert8")
    assert "expert8" in ExpertBank(live.sam.bank.path)
    with raises("S104"):
        live.sam.add_expert("expert9", live.adapters[0])
    with raises("S109"):
        live.sam.add_expert("expert8", folder)
    with raises("S108"):
        live.sam.remove_expert("expert9")


def test_live_add_after_another_process_removed_it(live):
    assert "expert2" in live.sam.bank
    ExpertBank(live.sam.bank.path).remove("expert2")
    live.add(name="expert2")
    assert ExpertBank(live.sam.bank.path).check() == ["expert0", "expert1", "expert2"]


def test_live_added_by_many_threads(live):
    """None is lost."""
    names = [f"new{number}" for number in range(8)]
    errors: List[BaseException] = []

    def add(name: str) -> None:
        try:
            live.add(name=name)
        except BaseException as error:
            errors.append(error)

    run_all([threading.Thread(target=add, args=(name,)) for name in names])
    assert errors == []
    assert ExpertBank(live.sam.bank.path).check() == ["expert0", "expert1", "expert2", *names]
    assert {*names} < {card.name for card in live.sam.bank}


def test_live_docs_example(tmp_path, monkeypatch):
    """The example of docs/usage.md, as it stands."""
    text = (Path(__file__).parent.parent / "docs" / "usage.md").read_text(encoding="utf8")
    code = text.split("## Experts added and removed while it runs")[1].split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: Dict[str, Any] = {}
    exec(code, names)
    sam = names["sam"]
    assert "law" in sam.bank
    assert "legal" not in sam.bank
    assert "law" in dict(sam.plan.selections[0].scores)
    assert "disease" in {ent.label_ for doc in names["docs"] for ent in doc.ents}
    assert sam.bank.check()
