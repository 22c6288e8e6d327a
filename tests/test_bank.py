"""Banks on disk: what is opened, what is refused and with which code, and that nothing else is touched."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ENCODER, PROMPT, load_model, make_card, make_tiny_bank, save_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from spacy_sam import bank as bank_module
from spacy_sam.adapters import hash_adapter, read_adapter
from spacy_sam.bank import ExpertBank, base_shapes, bundled_bank_path, hash_base
from spacy_sam.errors import SamError
from spacy_sam.plan import Score

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "card.json"
NAMES = ["expert0", "expert1", "expert2"]


def raises(code):
    return pytest.raises(SamError, match=rf"^\[{code}\]")


def contents(folder, leave_out=()):
    """Every file and folder below `folder`, with the bytes of the files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if not any(str(path.relative_to(folder)).startswith(name) for name in leave_out)
    }


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf8")), **changes}), encoding="utf8")


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def expert_folder(bank, name="expert1"):
    return bank.path / "experts" / name


@pytest.fixture(scope="module")
def tiny_adapter(tiny_bank_path, tmp_path_factory):
    """A good adapter that is in no bank: do not change it."""
    return save_adapter(tmp_path_factory.mktemp("adapters") / "good", tiny_bank_path / "base", seed=77)


@pytest.fixture
def adapter(tiny_adapter, tmp_path):
    """A good adapter that the test may damage."""
    return Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))


@pytest.fixture
def card(bank_copy):
    return make_card(bank_copy, 9)


# Opening


def test_bank_opens_and_lists(tiny_bank_path):
    bank = ExpertBank(str(tiny_bank_path))
    assert [card.name for card in bank] == [card.name for card in bank.experts] == NAMES
    assert len(bank) == 3
    assert bank.baselines == []
    assert "expert1" in bank
    assert "nobody" not in bank
    assert bank["expert1"] == make_card(bank, 1)
    assert bank.folder("expert1") == tiny_bank_path / "experts" / "expert1"
    assert (bank.name, bank.encoder, bank.prompt, bank.details) == ("tiny", ENCODER, PROMPT, {})
    assert bank.base == (str(tiny_bank_path / "base"), None)
    assert bank.base_hash == hash_base(tiny_bank_path / "base")
    assert bank.check() == NAMES


def test_bank_opening_and_reading_write_nothing(bank_copy):
    before = contents(bank_copy.path)
    bank = ExpertBank(bank_copy.path)
    bank.check()
    bank.load_adapter("expert0")
    bank.adapter_hash("expert0")
    assert contents(bank_copy.path) == before


def test_bank_hands_out_copies(bank_copy):
    bank_copy.prompt["instruction"] = "changed"
    bank_copy.details["new"] = 1
    assert (bank_copy.prompt, bank_copy.details) == (PROMPT, {})


def test_bank_moved_to_another_folder_still_opens(bank_copy, tmp_path):
    moved = tmp_path / "elsewhere" / "moved bank"
    moved.parent.mkdir()
    bank_copy.path.rename(moved)
    bank = ExpertBank(moved)
    assert bank.check() == NAMES
    assert bank.base[0] == str(moved / "base")
    assert bank.base_hash == bank_copy.base_hash


@pytest.mark.parametrize("name", ["", "nothing", "base", "bank.json"])
def test_bank_that_is_not_there_is_refused(name, bank_copy, tmp_path):
    path = bank_copy.path / name if name else tmp_path / "nothing"
    with raises("S101"):
        ExpertBank(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"bank"', b"\xff\xfe\x00"])
def test_bank_file_half_written_is_refused(content, bank_copy):
    (bank_copy.path / "bank.json").write_bytes(content)
    with raises("S102"):
        ExpertBank(bank_copy.path)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_bank_file_cut_off_anywhere_is_refused(data, tiny_bank_path, tmp_path):
    content = (tiny_bank_path / "bank.json").read_bytes().rstrip()
    cut = data.draw(st.integers(0, len(content) - 1))
    (tmp_path / "bank.json").write_bytes(content[:cut])
    with raises("S102"):
        ExpertBank(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": None}, "base"),
        ({"experts": "expert0"}, "experts"),
        ({"experts": [1]}, "experts.0"),
        ({"prompt": []}, "prompt"),
        ({"colour": "red"}, "colour"),
        ({"experts": ["expert0", "expert1", "expert0"]}, "twice"),
    ],
)
def test_bank_file_with_wrong_entries_is_refused(changes, said, bank_copy):
    edit_json(bank_copy.path / "bank.json", **changes)
    with raises("S102") as caught:
        ExpertBank(bank_copy.path)
    assert said in str(caught.value)


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_bank_of_another_schema_version_is_refused(version, bank_copy):
    edit_json(bank_copy.path / "bank.json", schema_version=version, colour="red")
    with raises("S103") as caught:
        ExpertBank(bank_copy.path)
    assert str(version) in str(caught.value)


@pytest.mark.parametrize("missing", ["", CARD, CONFIG, WEIGHTS])
def test_bank_with_a_missing_file_is_refused(missing, bank_copy):
    path = expert_folder(bank_copy) / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with raises("S104") as caught:
        ExpertBank(bank_copy.path)
    assert "expert1" in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"name": "expert1"}', '{"name": 1, "domain": 2, "labels": 3, "base_hash": 4}']
)
def test_bank_with_a_damaged_card_is_refused(content, bank_copy):
    (expert_folder(bank_copy) / CARD).write_text(content, encoding="utf8")
    with raises("S102") as caught:
        ExpertBank(bank_copy.path)
    assert str(Path("expert1") / CARD) in str(caught.value)


def test_bank_with_the_card_of_another_expert_is_refused(bank_copy):
    shutil.copy(expert_folder(bank_copy, "expert2") / CARD, expert_folder(bank_copy, "expert1") / CARD)
    with raises("S102") as caught:
        ExpertBank(bank_copy.path)
    assert "expert2" in str(caught.value)


def test_bank_with_a_card_of_another_base_is_refused(bank_copy):
    edit_json(expert_folder(bank_copy) / CARD, base_hash="another")
    with raises("S105") as caught:
        ExpertBank(bank_copy.path)
    assert "another" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../outside", "..", ".", "", "a/b", "a\\b", "/tmp", "~", ".hidden", "a" * 65, "é", "a\n"]
)
def test_bank_names_that_could_leave_the_bank_are_refused(name, bank_copy, tmp_path, adapter, card):
    shutil.copytree(expert_folder(bank_copy), tmp_path / "outside")
    before = contents(tmp_path)
    with raises("S114"):
        bank_copy.add(name, adapter, card)
    assert contents(tmp_path) == before
    edit_json(bank_copy.path / "bank.json", experts=["expert0", name])
    with raises("S114"):
        ExpertBank(bank_copy.path)


def test_bank_absolute_names_are_refused(bank_copy, tmp_path):
    outside = shutil.copytree(expert_folder(bank_copy), tmp_path / "outside")
    edit_json(bank_copy.path / "bank.json", experts=[str(outside)])
    with raises("S114"):
        ExpertBank(bank_copy.path)


@pytest.mark.parametrize("name", ["a", "A.b-c_9", "0", "a" * 64])
def test_bank_usable_names_are_taken(name, bank_copy, adapter, card):
    bank_copy.add(name, adapter, card)
    assert name in ExpertBank(bank_copy.path)


def test_bank_links_that_leave_the_bank_are_refused(bank_copy, tmp_path):
    folder = expert_folder(bank_copy)
    shutil.move(folder, tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside", target_is_directory=True)
    with raises("S104"):
        ExpertBank(bank_copy.path)
    with raises("S104"):
        bank_copy.load_adapter("expert1")
    with raises("S104"):
        bank_copy.remove("expert1")
    assert (tmp_path / "outside" / WEIGHTS).is_file()


def test_bank_behind_a_link_opens(bank_copy, tmp_path):
    (tmp_path / "link").symlink_to(bank_copy.path, target_is_directory=True)
    assert ExpertBank(tmp_path / "link").check() == NAMES


@pytest.mark.parametrize(
    "ask",
    [
        lambda bank: bank["nobody"],
        lambda bank: bank.folder("nobody"),
        lambda bank: bank.load_adapter("nobody"),
        lambda bank: bank.adapter_hash("nobody"),
        lambda bank: bank.remove("nobody"),
        lambda bank: bank.update_card(replace(bank["expert0"], name="nobody")),
        lambda bank: bank.load_adapter("../experts/expert0"),
    ],
)
def test_bank_unknown_names_are_refused(ask, bank_copy):
    before = contents(bank_copy.path)
    with raises("S108") as caught:
        ask(bank_copy)
    assert "expert0, expert1, expert2" in str(caught.value)
    assert contents(bank_copy.path) == before


# Adapters that cannot be merged exactly: made by peft, then as config entries


@pytest.mark.parametrize(
    ("kwargs", "feature"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, "bias='lora_only'"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2], "target_modules": ["q_proj"]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bank_add_refuses_what_is_not_plain_lora(kwargs, feature, bank_copy, card, tmp_path):
    odd = save_adapter(tmp_path / "odd", bank_copy.path / "base", **kwargs)
    before = contents(bank_copy.path)
    with raises("S106") as caught:
        bank_copy.add("odd", odd, card)
    assert feature in str(caught.value)
    assert contents(bank_copy.path) == before
    assert "odd" not in bank_copy


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"peft_type": "IA3"}, "S106"),
        ({"peft_type": None}, "S106"),
        ({"use_dora": True}, "S106"),
        ({"bias": "all"}, "S106"),
        ({"kasa_config": {}}, "S106"),
        ({"a_later_kind": True}, "S106"),
        ({"rank_pattern": {"q_proj": 0}}, "S107"),
        ({"rank_pattern": {"q_(proj": 2}}, "S107"),
        ({"rank_pattern": ["q_proj"]}, "S107"),
        ({"alpha_pattern": {"q_proj": "8"}}, "S107"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "S107"),
        ({"modules_to_save": ["lm_head"]}, "S106"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "S106"),
        ({"target_parameters": ["q_proj.weight"]}, "S106"),
        ({"init_lora_weights": "olora"}, "S106"),
        ({"r": 0}, "S107"),
        ({"r": -4}, "S107"),
        ({"r": "4"}, "S107"),
        ({"r": 4.0}, "S107"),
        ({"lora_alpha": None}, "S107"),
        ({"lora_alpha": float("nan")}, "S107"),
        ({"lora_alpha": float("inf")}, "S107"),
    ],
    ids=str,
)
def test_bank_with_an_adapter_of_another_kind_is_refused(changes, code, bank_copy):
    edit_json(expert_folder(bank_copy) / CONFIG, **changes)
    with raises(code) as caught:
        ExpertBank(bank_copy.path)
    assert "expert1" in str(caught.value)
    with raises(code):
        bank_copy.load_adapter("expert1")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"{}", b'{"r": 4}', b"\xff"])
def test_bank_with_a_damaged_adapter_config_is_refused(content, bank_copy):
    (expert_folder(bank_copy) / CONFIG).write_bytes(content)
    with raises("S107"):
        ExpertBank(bank_copy.path)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_bank_add_takes_plain_lora_however_it_began(init, bank_copy, card, tmp_path):
    good = save_adapter(tmp_path / "good", bank_copy.path / "base", init_lora_weights=init)
    bank_copy.add("good", good, card)
    assert bank_copy.check() == [*NAMES, "good"]


# Damaged weights


def set_value(value):
    def change(tensors):
        key = sorted(tensors)[3]
        tensors[key][0, 1] = value

    return change


def drop(ending):
    def change(tensors):
        del tensors[next(key for key in sorted(tensors) if key.endswith(ending))]

    return change


def put(name, *shape):
    def change(tensors):
        tensors[f"base_model.model.model.layers.0.self_attn.q_proj.{name}"] = torch.ones(shape)

    return change


DAMAGE = [
    (set_value(float("nan")), "NaN"),
    (set_value(float("inf")), "NaN or infinite"),
    (set_value(float("-inf")), "NaN or infinite"),
    (drop("lora_A.weight"), "needs lora_A and lora_B"),
    (drop("lora_B.weight"), "needs lora_A and lora_B"),
    (put("lora_A.weight", 3, 32), "rank 4"),
    (put("lora_B.weight", 32, 3), "rank 4"),
    (put("lora_A.weight", 4, 1, 32), "not a LoRA factor"),
    (put("lora_magnitude_vector", 32), "not a LoRA factor"),
    (put("bias", 32), "not a LoRA factor"),
    (dict.clear, "no tensors"),
]


@pytest.mark.parametrize(("change", "said"), DAMAGE)
def test_bank_damaged_weights_are_refused(change, said, bank_copy, adapter, card):
    edit_tensors(adapter / WEIGHTS, change)
    before = contents(bank_copy.path)
    with raises("S107") as caught:
        bank_copy.add("new", adapter, card)
    assert said in str(caught.value)
    assert contents(bank_copy.path) == before
    edit_tensors(expert_folder(bank_copy) / WEIGHTS, change)
    bank = ExpertBank(bank_copy.path)  # opening reads no weights
    for read in (bank.check, lambda: bank.load_adapter("expert1")):
        with raises("S107") as caught:
            read()
        assert "expert1" in str(caught.value)


FITS_NOT = [
    (put("lora_A.weight", 4, 16), "S107"),
    (put("lora_B.weight", 16, 4), "S107"),
]


@pytest.mark.parametrize(("change", "code"), FITS_NOT)
def test_bank_weights_of_another_shape_than_the_base_are_refused(change, code, bank_copy, adapter, card):
    edit_tensors(adapter / WEIGHTS, change)
    before = contents(bank_copy.path)
    with raises(code):
        bank_copy.add("new", adapter, card)
    assert contents(bank_copy.path) == before
    edit_tensors(expert_folder(bank_copy) / WEIGHTS, change)
    with raises(code):
        ExpertBank(bank_copy.path).check()


def test_bank_weights_that_the_base_has_not_are_refused(bank_copy, card, tmp_path):
    other = make_tiny_bank(tmp_path / "opt", n_experts=1, architecture="opt")
    before = contents(bank_copy.path)
    with raises("S105"):
        bank_copy.add("new", other.folder("expert0"), other["expert0"])
    with raises("S403"):
        bank_copy.add("new", other.folder("expert0"), card)
    assert contents(bank_copy.path) == before


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_bank_truncated_weights_are_refused(kept, bank_copy, adapter, card):
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    before = contents(bank_copy.path)
    with raises("S107"):
        bank_copy.add("new", adapter, card)
    assert contents(bank_copy.path) == before


class Boom:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS])
def test_bank_reads_no_pickle(name, bank_copy, adapter, card, tmp_path):
    (adapter / WEIGHTS).unlink()
    (adapter / name).write_bytes(pickle.dumps(Boom(tmp_path / "executed")))
    before = contents(bank_copy.path)
    with raises("S118" if name.endswith(".bin") else "S107"):
        bank_copy.add("new", adapter, card)
    assert contents(bank_copy.path) == before
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Boom(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").exists(), "the trap works"


def test_bank_base_that_is_a_pickle_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(pickle.dumps(Boom(tmp_path / "executed")))
    with raises("S503"):
        ExpertBank.create(tmp_path, base="base", prompt=PROMPT, encoder=ENCODER)
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "bank.json").exists()


# Adding and removing


def test_bank_add_touches_no_other_expert(bank_copy, adapter, card):
    before = contents(bank_copy.path, leave_out=["bank.json"])
    source = contents(adapter)
    bank_copy.add("newcomer", str(adapter), card)
    after = contents(bank_copy.path, leave_out=["bank.json", "experts/newcomer"])
    assert after == before
    assert contents(adapter) == source
    assert sorted(p.name for p in expert_folder(bank_copy, "newcomer").iterdir()) == sorted([CONFIG, WEIGHTS, CARD])
    for bank in (bank_copy, ExpertBank(bank_copy.path)):
        assert [c.name for c in bank] == [*NAMES, "newcomer"]
        assert bank["newcomer"] == replace(card, name="newcomer")
        assert bank.adapter_hash("newcomer") == hash_adapter(adapter)
        assert bank.check() == [*NAMES, "newcomer"]


def test_bank_remove_touches_no_other_expert(bank_copy):
    before = contents(bank_copy.path, leave_out=["bank.json", "experts/expert1"])
    bank_copy.remove("expert1")
    assert contents(bank_copy.path, leave_out=["bank.json"]) == before
    for bank in (bank_copy, ExpertBank(bank_copy.path)):
        assert [c.name for c in bank] == ["expert0", "expert2"]
        with raises("S108"):
            bank["expert1"]


def test_bank_add_and_remove_again_is_no_change(bank_copy, adapter, card):
    before = contents(bank_copy.path)
    bank_copy.add("passing", adapter, card)
    bank_copy.remove("passing")
    assert contents(bank_copy.path) == before


def test_bank_can_be_emptied_and_filled(bank_copy, adapter, card):
    for name in NAMES:
        bank_copy.remove(name)
    assert len(ExpertBank(bank_copy.path)) == 0
    assert ExpertBank(bank_copy.path).check() == []
    with raises("S108") as caught:
        bank_copy["expert0"]
    assert "none" in str(caught.value)
    bank_copy.add("expert0", adapter, card)
    assert ExpertBank(bank_copy.path).check() == ["expert0"]


def test_bank_duplicate_names_are_refused(bank_copy, adapter, card):
    before = contents(bank_copy.path)
    with raises("S109"):
        bank_copy.add("expert1", adapter, card)
    assert contents(bank_copy.path) == before


def test_bank_add_of_another_base_is_refused(bank_copy, adapter, card):
    before = contents(bank_copy.path)
    with raises("S105"):
        bank_copy.add("new", adapter, replace(card, base_hash="another"))
    assert contents(bank_copy.path) == before


@pytest.mark.parametrize(
    "changes", [{"labels": None}, {"domain": 5}, {"corpora": ({"name": "x"},)}, {"scores": {"dev": 1}}]
)
def test_bank_cards_that_could_not_be_read_again_are_refused(changes, bank_copy, adapter, card):
    before = contents(bank_copy.path)
    with raises("S102"):
        bank_copy.add("new", adapter, replace(card, **changes))
    with raises("S102"):
        bank_copy.update_card(replace(bank_copy["expert1"], **changes))
    assert contents(bank_copy.path) == before
    assert "new" not in bank_copy
    assert ExpertBank(bank_copy.path).check() == NAMES


def test_bank_add_that_is_stopped_leaves_a_bank_that_opens(bank_copy, adapter, card, monkeypatch):
    before = contents(bank_copy.path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bank_module.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        bank_copy.add("new", adapter, card)
    assert contents(bank_copy.path) == before
    monkeypatch.undo()
    bank_copy.add("new", adapter, card)
    assert ExpertBank(bank_copy.path).check() == [*NAMES, "new"]


def test_bank_add_replaces_what_a_stopped_add_left(bank_copy, adapter, card):
    left = expert_folder(bank_copy, "new")
    left.mkdir()
    (left / "half").write_text("half", encoding="utf8")
    assert "new" not in ExpertBank(bank_copy.path)
    bank_copy.add("new", adapter, card)
    assert not (left / "half").exists()
    assert ExpertBank(bank_copy.path).check() == [*NAMES, "new"]


def test_bank_opened_twice_loses_nothing(bank_copy, adapter, card):
    other = ExpertBank(bank_copy.path)
    bank_copy.add("first", adapter, card)
    other.add("second", adapter, card)
    other.remove("expert2")
    bank_copy.remove("expert0")
    assert ExpertBank(bank_copy.path).check() == ["expert1", "first", "second"]
    before = contents(bank_copy.path)
    with raises("S109"):
        bank_copy.add("second", adapter, card)
    assert contents(bank_copy.path) == before


def test_bank_update_card_touches_no_other_file(bank_copy):
    before = contents(bank_copy.path, leave_out=[f"experts/expert1/{CARD}"])
    card = replace(bank_copy["expert1"], domain="new", scores={"test": Score(0.1, 0.2, 0.3, 4)})
    bank_copy.update_card(card)
    assert contents(bank_copy.path, leave_out=[f"experts/expert1/{CARD}"]) == before
    assert bank_copy["expert1"] == ExpertBank(bank_copy.path)["expert1"] == card


def test_bank_update_card_of_another_base_is_refused(bank_copy):
    before = contents(bank_copy.path)
    with raises("S105"):
        bank_copy.update_card(replace(bank_copy["expert1"], base_hash="another"))
    assert contents(bank_copy.path) == before
    assert ExpertBank(bank_copy.path).check() == NAMES


def test_bank_baselines_take_no_part_in_selection(bank_copy, adapter, card):
    bank_copy.add("unified", adapter, replace(card, role="baseline"))
    for bank in (bank_copy, ExpertBank(bank_copy.path)):
        assert [c.name for c in bank] == NAMES
        assert [c.name for c in bank.baselines] == ["unified"]
        assert "unified" in bank
        assert bank.check() == [*NAMES, "unified"]


# Creating


def test_bank_create_is_empty(bank_copy, tmp_path):
    base = shutil.copytree(bank_copy.path / "base", tmp_path / "new" / "mine")
    bank = ExpertBank.create(
        tmp_path / "new", base="mine", prompt=PROMPT, encoder=ENCODER, name="new", details={"seed": 1}
    )
    assert (len(bank), bank.name, bank.encoder, bank.prompt) == (0, "new", ENCODER, PROMPT)
    assert bank.details == {"seed": 1}
    assert bank.base == (str(base), None)
    assert bank.base_hash == bank_copy.base_hash
    assert bank.check() == []


def test_bank_create_around_a_base_elsewhere(bank_copy, tmp_path, adapter, card):
    base = bank_copy.path / "base"
    bank = ExpertBank.create(tmp_path / "new", base=str(base), prompt=PROMPT, encoder=ENCODER)
    assert bank.base == (str(base), None)
    assert bank.base_hash == bank_copy.base_hash
    bank.add("new", adapter, card)
    assert bank.check() == ["new"]


def test_bank_create_around_a_hub_base(tmp_path, adapter, tiny_bank_path):
    bank = ExpertBank.create(tmp_path / "new", base="someone/model", revision="abc", prompt=PROMPT, encoder=ENCODER)
    assert bank.base == ("someone/model", "abc")
    other = ExpertBank.create(tmp_path / "other", base="someone/model", revision="abd", prompt=PROMPT, encoder=ENCODER)
    assert bank.base_hash != other.base_hash
    bank.add("new", adapter, make_card(bank, 0))
    assert bank.check() == ["new"]


# The base


def change_base(folder, change):
    edit_tensors(folder / "model.safetensors", change)


def nudge(tensors):
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 0.25


def test_bank_base_changed_after_training_is_refused(bank_copy):
    bank_copy.check_base()
    change_base(bank_copy.path / "base", nudge)
    bank = ExpertBank(bank_copy.path)
    for check in (bank.check, bank.check_base):
        with raises("S110") as caught:
            check()
        assert bank.base_hash in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        nudge,
        lambda tensors: tensors.pop("model.norm.weight"),
        lambda tensors: tensors.update({"extra": torch.ones(1)}),
        lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].half()}),
        lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].T.contiguous()}),
    ],
    ids=["value", "missing", "extra", "dtype", "shape"],
)
def test_bank_hash_of_base_changes_with_its_weights(change, bank_copy):
    base = bank_copy.path / "base"
    change_base(base, dict)  # saved by the same function, so that only `change` can make the difference
    before = hash_base(base)
    change_base(base, change)
    assert hash_base(base) != before
    assert len(before) == 16


def test_bank_hash_of_base_is_that_of_every_tensor(bank_copy):
    base = bank_copy.path / "base"
    seen = {hash_base(base)}
    for name in load_file(base / "model.safetensors"):
        change_base(base, lambda tensors, name=name: tensors[name].view(-1)[:1].add_(1.0))
        seen.add(hash_base(base))
    assert len(seen) == 1 + len(load_file(base / "model.safetensors"))


def test_bank_hash_of_base_does_not_depend_on_the_folder(bank_copy, tmp_path):
    copied = shutil.copytree(bank_copy.path / "base", tmp_path / "a" / "b")
    (copied / "README.md").write_text("notes", encoding="utf8")
    assert hash_base(copied) == bank_copy.base_hash


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 40, (2).to_bytes(8, "little") + b"[]"])
def test_bank_damaged_base_is_refused(content, bank_copy):
    (bank_copy.path / "base" / "model.safetensors").write_bytes(content)
    with raises("S102"):
        ExpertBank(bank_copy.path).check()


def test_bank_without_its_base_is_refused_when_checked(bank_copy):
    shutil.rmtree(bank_copy.path / "base")
    bank = ExpertBank(bank_copy.path)
    with raises("S503"):
        bank.check()


def test_bank_shapes_of_base_are_those_of_its_tensors(tiny_bank_path):
    tensors = load_file(tiny_bank_path / "base" / "model.safetensors")
    assert base_shapes(tiny_bank_path / "base") == {name: tuple(t.shape) for name, t in tensors.items()}


def test_bank_bundled_bank_is_refused_where_it_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(bank_module, "__file__", str(tmp_path / "bank.py"))
    with raises("S115"):
        bundled_bank_path()
    (tmp_path / "bundled").mkdir()
    (tmp_path / "bundled" / "bank.json").write_text("{}", encoding="utf8")
    assert bundled_bank_path() == tmp_path / "bundled"


# Task vectors


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks transformers
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "bart"])
def test_bank_adapters_are_the_weight_change_that_peft_makes(architecture, tmp_path):
    bank = make_tiny_bank(tmp_path / "bank", n_experts=1, architecture=architecture)
    base = load_model(bank.base[0])
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, str(bank.folder("expert0"))).merge_and_unload().state_dict()
    matrices = bank.load_adapter("expert0").matrices
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert set(matrices) == changed
    for name, factors in matrices.items():
        assert factors.shape == tuple(before[name].shape)
        torch.testing.assert_close(factors.delta(), merged[name] - before[name], rtol=1e-4, atol=1e-5)


def test_bank_adapter_hash_changes_with_content_alone(adapter, tmp_path):
    before = hash_adapter(adapter)
    assert hash_adapter(shutil.copytree(adapter, tmp_path / "copy")) == before
    edit_json(adapter / CONFIG, base_model_name_or_path="/elsewhere", lora_dropout=0.5)
    assert hash_adapter(adapter) == before
    seen = {before}
    edit_json(adapter / CONFIG, lora_alpha=16)
    seen.add(hash_adapter(adapter))
    edit_tensors(adapter / WEIGHTS, lambda tensors: tensors[sorted(tensors)[0]].add_(1e-3))
    seen.add(hash_adapter(adapter))
    assert len(seen) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_bank_adapters_are_float32_whatever_they_are_stored_in(dtype, adapter):
    exact = read_adapter(adapter, "exact")

    def convert(tensors):
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})

    edit_tensors(adapter / WEIGHTS, convert)
    for name, factors in read_adapter(adapter, "stored").matrices.items():
        assert (factors.a.dtype, factors.b.dtype) == (torch.float32, torch.float32)
        torch.testing.assert_close(factors.delta(), exact.matrices[name].delta(), rtol=0.02, atol=0.02)


def test_bank_add_keeps_no_path_of_the_machine(bank_copy):
    """The adapter's PEFT config names the base from where it stands, and peft can follow it."""
    import json

    source = bank_copy.folder("expert0")
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf8"))
    (source / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/home/me/base"}))
    bank_copy.add("again", source, bank_copy["expert0"])
    folder = bank_copy.folder("again")
    named = json.loads((folder / "adapter_config.json").read_text(encoding="utf8"))["base_model_name_or_path"]
    assert (folder / named).resolve() == (bank_copy.path / "base").resolve()
    assert bank_copy.adapter_hash("again") == bank_copy.adapter_hash("expert0")
