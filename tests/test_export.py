"""Task models as folders: the switch's weights, tensor by tensor, sharded, whole or not at all."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from helpers import ARCHITECTURES, load_model, make_tiny_bank, save_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from spacy_sam.adapters import read_adapter
from spacy_sam.bank import ExpertBank, bundled_bank_path, hash_base
from spacy_sam.errors import SamError
from spacy_sam.merge import base_files, export, shards
from spacy_sam.merge.base_files import BaseFiles
from spacy_sam.merge.export import write_task_model, write_task_models
from spacy_sam.merge.materialise import WeightSwitch
from spacy_sam.merge.methods import Dare, Mean, Ties
from spacy_sam.plan import Plan, TaskModelSpec
from spacy_sam.registered import resolve_method

ALL = ("expert0", "expert1", "expert2")
TIES = TaskModelSpec(ALL, (3, 1, 2), Ties(0.3, 0.7).config)
GLOBAL = TaskModelSpec(ALL, (), Ties(0.3, trim="global").config)


@pytest.fixture(scope="module")
def banks(tmp_path_factory, tiny_bank_path) -> Dict[str, ExpertBank]:
    folder = tmp_path_factory.mktemp("architectures")
    names = [name for name in ARCHITECTURES if name != "llama"]
    others = {name: make_tiny_bank(folder / name, architecture=name, seed=1) for name in names}
    return {"llama": ExpertBank(tiny_bank_path), **others}


@pytest.fixture
def bank(tiny_bank_path) -> ExpertBank:
    return ExpertBank(tiny_bank_path)


def make_plan(bank: ExpertBank, *specs: TaskModelSpec) -> Plan:
    hashes = {name: bank.adapter_hash(name) for spec in specs for name in spec.experts}
    return Plan(bank.base_hash, specs, hashes)


def switched(bank: ExpertBank, spec: TaskModelSpec, dtype: Any = "auto") -> Any:
    model = load_model(bank.base[0], dtype)
    WeightSwitch(model, bank.load_adapter, resolve_method).use(spec)
    return model


def check_equal(folder: Path, expected: Any, dtype: Any = "auto") -> None:
    """Transformers loads the folder, and its weights have the same bits."""
    parameters = dict(load_model(folder, dtype).named_parameters(remove_duplicate=False))
    wanted = dict(expected.named_parameters(remove_duplicate=False))
    assert parameters.keys() == wanted.keys()
    for name, parameter in parameters.items():
        assert parameter.dtype == wanted[name].dtype
        assert torch.equal(parameter, wanted[name]), name


def written(folder: Path) -> List[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("max_shard_size", [5_000_000_000, 20_000], ids=["one file", "shards"])
def test_folders_hold_what_the_switch_makes(banks, architecture, max_shard_size, tmp_path):
    bank = banks[architecture]
    specs = [TaskModelSpec(), TaskModelSpec(ALL[:1]), TIES, GLOBAL, TaskModelSpec(ALL, (), Dare().config)]
    plan = make_plan(bank, *specs)
    found = list(write_task_models(bank, plan, tmp_path / "out", resolve_method, max_shard_size))
    assert [spec for _, spec in found] == list(plan.task_models)
    for folder, spec in found:
        check_equal(folder, switched(bank, spec))
        assert AutoTokenizer.from_pretrained(folder).eos_token == "<|end|>"
        files = sorted(folder.glob("*.safetensors"))
        assert (len(files) > 3) == (max_shard_size < 1_000_000)
        # What hashes of bases are made of is there, too.
        assert hash_base(folder)
        for file in files:
            tensors = load_file(file)
            assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= max_shard_size
            with safe_open(file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}
    assert not [name for name in written(tmp_path) if ".writing" in name]
    assert Plan.from_disk(tmp_path / "out" / "plan.json") == plan


def test_index_names_every_tensor_and_the_size(bank, tmp_path):
    write_task_model(bank, make_plan(bank, TIES), tmp_path / "out", resolve_method, max_shard_size=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text("utf8"))
    tensors = {file: load_file(tmp_path / "out" / file) for file in set(index["weight_map"].values())}
    assert {name: file for file, held in tensors.items() for name in held} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for held in tensors.values() for t in held.values())
    assert set(tensors) == {f"model-{n:05}-of-{len(tensors):05}.safetensors" for n in range(1, len(tensors) + 1)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_in_another_dtype(bank, dtype, tmp_path):
    write_task_model(bank, make_plan(bank, TIES), tmp_path / "out", resolve_method, dtype=dtype)
    expected = switched(bank, TIES, dtype)
    check_equal(tmp_path / "out", expected)  # transformers takes the dtype from the config
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}


def test_bundled_task_models(tmp_path):
    bank = ExpertBank(bundled_bank_path())
    names = tuple(expert.name for expert in bank.experts[:3])
    spec = TaskModelSpec(names, (), Ties(0.5, 0.5).config)
    write_task_model(bank, make_plan(bank, spec), tmp_path / "stored", resolve_method)
    check_equal(tmp_path / "stored", switched(bank, spec))
    write_task_model(bank, make_plan(bank, spec), tmp_path / "wide", resolve_method, dtype=torch.float32)
    check_equal(tmp_path / "wide", switched(bank, spec, torch.float32))


def test_folder_says_what_it_was_made_of(bank, tmp_path):
    (base := tmp_path / "bank").mkdir()
    shutil.copytree(bank.path, base, dirs_exist_ok=True)
    for name, text in (("LICENSE.txt", "All rights."), ("chat_template.jinja", "{{ x }}"), ("pytorch_model.bin", "x")):
        (base / "base" / name).write_text(text, "utf8")
    bank = ExpertBank(base)
    write_task_model(bank, make_plan(bank, TIES), tmp_path / "out", resolve_method)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    copied = {path.name for path in (base / "base").iterdir()} - {"pytorch_model.bin"}
    assert files == copied | {"README.md", "plan.json"}
    card = (tmp_path / "out" / "README.md").read_text("utf8")
    for name, weight in zip(TIES.experts, ("3", "1", "2")):
        assert f"| {name} | {bank[name].domain} | {weight} | {bank.adapter_hash(name)} |" in card
    assert bank.base_hash in card
    assert '"density": 0.3' in card
    assert "transformers" in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "plan.json").read_text("utf8")
    assert Plan.from_disk(tmp_path / "out" / "plan.json").task_models == (TIES,)
    assert (tmp_path / "out").stat().st_mode & 0o777 == (base / "base").stat().st_mode & 0o777


# Bases whose files differ from what transformers would write


def rewrite(bank: ExpertBank, rename: Any) -> ExpertBank:
    """The bank with other names in the base's file; a name that becomes None is left out."""
    file = Path(bank.base[0]) / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name}, file, {"format": "pt"})
    settings = json.loads((bank.path / "bank.json").read_text("utf8"))
    settings["base_hash"] = hash_base(Path(bank.base[0]))
    (bank.path / "bank.json").write_text(json.dumps(settings), "utf8")
    for name in settings["experts"]:
        card = bank.path / "experts" / name / "card.json"
        data = json.loads(card.read_text("utf8"))
        card.write_text(json.dumps({**data, "base_hash": settings["base_hash"]}), "utf8")
    return ExpertBank(bank.path)


def test_names_without_the_prefix_of_the_class(tmp_path):
    """GPT-2 is on the hub so."""
    bank = make_tiny_bank(tmp_path / "bank", architecture="gpt2")
    expected = switched(bank, TIES)
    bank = rewrite(bank, lambda name: name.removeprefix("transformer."))
    assert "h.0.attn.c_attn.weight" in BaseFiles(bank.base[0]).entries
    write_task_model(bank, make_plan(bank, TIES), tmp_path / "out", resolve_method)
    check_equal(tmp_path / "out", expected)


def test_matrix_that_is_not_in_the_files(bank_copy, tmp_path):
    bank = rewrite(bank_copy, lambda name: None if name == "model.layers.1.mlp.up_proj.weight" else name)
    with pytest.raises(SamError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        write_task_model(bank, make_plan(bank, TIES), tmp_path / "out", resolve_method)
    assert caught.value.code == "S411"
    assert not (tmp_path / "out").exists()


def test_sharded_base(bank_copy, tmp_path):
    expected = switched(bank_copy, TIES)
    base = Path(bank_copy.base[0])
    load_model(base).save_pretrained(base, max_shard_size=20_000)
    (base / "model.safetensors").unlink(missing_ok=True)
    bank = rehashed(bank_copy)
    assert len({entry.file for entry in BaseFiles(str(base)).entries.values()}) > 3
    write_task_model(bank, make_plan(bank, TIES), tmp_path / "out", resolve_method)
    check_equal(tmp_path / "out", expected)
    assert written(tmp_path / "out").count("model.safetensors") == 1
    next(base.glob("model-00002*")).unlink()
    with pytest.raises(SamError, match="model-00002") as caught:
        BaseFiles(str(base))
    assert caught.value.code == "S411"


def rehashed(bank: ExpertBank) -> ExpertBank:
    settings = json.loads((bank.path / "bank.json").read_text("utf8"))
    text = settings["base_hash"]
    for path in [bank.path / "bank.json", *bank.path.glob("experts/*/card.json")]:
        path.write_text(path.read_text("utf8").replace(text, hash_base(Path(bank.base[0]))), "utf8")
    return ExpertBank(bank.path)


def test_weights_in_other_formats_are_refused(bank_copy):
    base = Path(bank_copy.base[0])
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(SamError, match=r"pytorch_model\.bin") as caught:
        BaseFiles(str(base))
    assert caught.value.code == "S411"
    assert "save_pretrained" in str(caught.value)


def test_experts_that_do_not_fit(bank_copy, tmp_path):
    """The same errors as of the switch, before anything is written."""
    other = make_tiny_bank(tmp_path / "opt", n_experts=0, architecture="opt")
    adapter = read_adapter(save_adapter(tmp_path / "adapter", other.base[0]), "odd")
    bank_copy.load_adapter = lambda name: adapter  # type: ignore[method-assign]
    with pytest.raises(SamError, match="S403"):
        write_task_model(bank_copy, make_plan(bank_copy, TIES), tmp_path / "out", resolve_method)
    assert not (tmp_path / "out").exists()


# Hub ids


def test_hub_id_is_read_from_the_local_cache(bank_copy, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(bank_copy.base[0], snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40, "utf8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = BaseFiles("someone/tiny", local_files_only=True)
    assert found.folder == snapshot
    assert found.entries.keys() == BaseFiles(bank_copy.base[0]).entries.keys()
    with pytest.raises(SamError, match="someone/unknown") as caught:
        BaseFiles("someone/unknown", local_files_only=True)
    assert caught.value.code == "S503"


def test_card_of_a_base_from_the_hub_names_it(bank_copy, tmp_path, monkeypatch):
    base = bank_copy.base[0]
    monkeypatch.setattr(base_files, "_local_folder", lambda *args: Path(base))
    monkeypatch.setattr(ExpertBank, "base", property(lambda self: ("someone/tiny", "v1")))
    monkeypatch.setattr(ExpertBank, "check_base", lambda self: None)
    write_task_model(bank_copy, make_plan(bank_copy, TIES), tmp_path / "out", resolve_method)
    card = (tmp_path / "out" / "README.md").read_text("utf8")
    assert "base_model: someone/tiny\n" in card
    assert "someone/tiny, revision v1" in card


# Whole or not at all


class FullDisk:
    """A file that takes `room` bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def write(self, data: Any) -> None:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.file.write(data)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", ["nothing", "a task model"])
def test_full_disk_leaves_what_was_there(bank, tmp_path, monkeypatch, error, before):
    plan = make_plan(bank, TIES)
    if before != "nothing":
        list(write_task_models(bank, plan, tmp_path / "out", resolve_method))
    state = {name: (tmp_path / name).stat().st_mtime_ns for name in written(tmp_path) if "." in name}
    opened: List[Path] = []

    def open_file(path: Path) -> Any:
        opened.append(path)
        if error is KeyboardInterrupt and len(opened) == 2:
            raise error
        return FullDisk(path.open("wb"), 10_000_000 if len(opened) == 1 else 100)

    monkeypatch.setattr(shards, "open_file", open_file)
    other = make_plan(bank, TaskModelSpec(ALL, (), Mean().config))
    with pytest.raises(SamError if error is OSError else error) as caught:
        list(write_task_models(bank, other, tmp_path / "out", resolve_method, max_shard_size=20_000))
    if error is OSError:
        assert caught.value.code == "S412"
        assert "No space left" in str(caught.value)
    assert len(opened) == 2
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in written(tmp_path) if "." in name} == state


def test_too_little_room_is_noticed_before_any_work(bank, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(BaseFiles, "read", lambda self, name: pytest.fail("it was read"))
    with pytest.raises(SamError, match="are needed") as caught:
        write_task_model(bank, make_plan(bank, TIES), tmp_path / "out", resolve_method)
    assert caught.value.code == "S412"
    assert written(tmp_path) == []


def test_what_was_there_is_replaced(bank, tmp_path):
    write_task_model(bank, make_plan(bank, TIES), tmp_path / "out", resolve_method)
    (tmp_path / "out" / "old.txt").touch()
    write_task_model(bank, make_plan(bank, GLOBAL), tmp_path / "out", resolve_method)
    assert not (tmp_path / "out" / "old.txt").exists()
    check_equal(tmp_path / "out", switched(bank, GLOBAL))
    write_task_model(bank, make_plan(bank, TIES), tmp_path / "out", resolve_method, keep_existing=True)
    check_equal(tmp_path / "out", switched(bank, GLOBAL))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_tensor_at_a_time_is_read(bank, tmp_path, monkeypatch):
    """Each tensor of the base is read once, when it is its turn."""
    reads: List[str] = []
    read = BaseFiles.read
    monkeypatch.setattr(BaseFiles, "read", lambda self, name: (reads.append(name), read(self, name))[1])
    write_task_model(bank, make_plan(bank, TIES), tmp_path / "out", resolve_method)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert reads == list(opened.offset_keys())
