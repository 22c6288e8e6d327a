"""Task models as adapters: peft loads them, they are the merged model exactly, and an error leaves nothing behind."""

import json
import re
from typing import Any, Dict, List

import pytest
import torch
from helpers import load_model, make_tiny_bank, save_adapter
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

import spacy_sam.cli.commands  # noqa: F401 (registers the commands)
from spacy_sam.adapters import LoraFactors, read_adapter
from spacy_sam.bank import ExpertBank
from spacy_sam.cli import app
from spacy_sam.errors import SamError
from spacy_sam.merge import adapter_export
from spacy_sam.merge.adapter_export import write_adapter, write_task_adapters
from spacy_sam.merge.merged import merged_deltas
from spacy_sam.merge.methods import Mean, TaskArithmetic, Ties
from spacy_sam.merge.subspace import Knots, Tsvm
from spacy_sam.plan import Plan, TaskModelSpec

METHODS = {method.config["@misc"]: method for method in (Mean(), TaskArithmetic(0.3), Knots(), Tsvm())}
MEAN = Mean().config
ALL = ("expert0", "expert1", "expert2")
ARCHITECTURES = ("llama", "gpt2", "bart", "tagger")


def resolve(config: Dict[str, Any]) -> Any:
    if config["@misc"] == "spacy_sam.TIES.v1":
        return Ties()
    return METHODS[config["@misc"]]


def plan_of(bank: ExpertBank, *specs: TaskModelSpec) -> Plan:
    names = sorted({name for spec in specs for name in spec.experts})
    return Plan(bank.base_hash, specs, {name: bank.adapter_hash(name) for name in names})


@pytest.fixture(scope="module")
def banks(tmp_path_factory, tiny_bank_path) -> Dict[str, ExpertBank]:
    folder = tmp_path_factory.mktemp("architectures")
    others = {name: make_tiny_bank(folder / name, architecture=name, seed=2) for name in ARCHITECTURES[1:]}
    return {"llama": ExpertBank(tiny_bank_path), **others}


@pytest.fixture
def bank(tiny_bank_path) -> ExpertBank:
    return ExpertBank(tiny_bank_path)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        return model(input_ids=ids).logits


def merged_logits(bank: ExpertBank, spec: TaskModelSpec) -> torch.Tensor:
    """Of the base with the merged weight changes added, written as plainly as can be."""
    model = load_model(bank.base[0])
    adapters = {name: bank.load_adapter(name) for name in spec.experts}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for matrix, delta in merged_deltas(adapters, spec, resolve(spec.method) if spec.method else Mean()):
            parameters[matrix] += delta
    return logits(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_adapter_is_the_merged_model(banks, architecture, method, tmp_path):
    bank = banks[architecture]
    spec = TaskModelSpec(ALL, (1.0, 2.0, 0.5), METHODS[method].config)
    ((folder, written),) = write_task_adapters(bank, plan_of(bank, spec), tmp_path / "out", resolve)
    assert written == spec
    base = load_model(bank.base[0])
    before = logits(base)
    loaded = PeftModel.from_pretrained(base, folder)
    expected = merged_logits(bank, spec)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(before, expected, rtol=1e-2, atol=1e-1)
    merged = dict(merged_deltas({name: bank.load_adapter(name) for name in ALL}, spec, METHODS[method]))
    read = read_adapter(folder, "again").matrices
    assert read.keys() == merged.keys()
    for matrix, factors in read.items():
        torch.testing.assert_close(factors.delta(), merged[matrix], rtol=1e-4, atol=1e-5)


def test_adapter_of_a_single_expert_is_the_expert(bank, tmp_path):
    spec = TaskModelSpec(("expert1",), (0.3,))
    ((folder, _),) = write_task_adapters(bank, plan_of(bank, spec), tmp_path / "out", resolve)
    own = bank.load_adapter("expert1").matrices
    for matrix, factors in read_adapter(folder, "again").matrices.items():
        assert torch.equal(factors.delta(), own[matrix].delta())  # its scale is 2: exact
    assert json.loads((folder / "adapter_config.json").read_text(encoding="utf8"))["r"] == 4


def test_adapters_of_several_task_models(bank, tmp_path):
    specs = (TaskModelSpec(("expert0", "expert1"), method=MEAN), TaskModelSpec(("expert2",)))
    plan = plan_of(bank, *specs)
    written = write_task_adapters(bank, plan, tmp_path / "new" / "out", resolve)
    assert written == [(tmp_path / "new" / "out" / f"task_model_{n}", spec) for n, spec in enumerate(specs, 1)]
    assert Plan.from_disk(tmp_path / "new" / "out" / "plan.json") == plan
    for folder, _ in written:
        assert sorted(path.name for path in folder.iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_adapters_are_the_same_bytes_every_time(bank, tmp_path):
    plan = plan_of(bank, TaskModelSpec(ALL, method=MEAN))
    (first, _), (second, _) = (write_task_adapters(bank, plan, tmp_path / name, resolve)[0] for name in "ab")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


# Ranks


def add_expert(bank: ExpertBank, tmp_path: Any, name: str, **lora: Any) -> None:
    bank.add(name, save_adapter(tmp_path / name, bank.path / "base", seed=5, **lora), bank["expert0"])


def test_adapter_of_experts_of_other_ranks_and_modules(bank_copy, tmp_path):
    """The concatenated ranks differ from matrix to matrix, and the adapter has the largest."""
    add_expert(bank_copy, tmp_path, "narrow", r=3, target_modules=["q_proj"])
    add_expert(bank_copy, tmp_path, "other", r=6, lora_alpha=6, target_modules=["q_proj", "up_proj"])
    spec = TaskModelSpec(("narrow", "other"), (1.0, 3.0), MEAN)
    ((folder, _),) = write_task_adapters(bank_copy, plan_of(bank_copy, spec), tmp_path / "out", resolve)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf8"))
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (9, 9, ["q_proj", "up_proj"])
    shapes = {key: tensor.shape for key, tensor in load_file(folder / "adapter_model.safetensors").items()}
    assert {shape[0] for key, shape in shapes.items() if "lora_A" in key} == {9}
    loaded = PeftModel.from_pretrained(load_model(bank_copy.base[0]), folder)
    torch.testing.assert_close(logits(loaded), merged_logits(bank_copy, spec), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("experts", "rank", "padded"), [(("expert0",), 4, 8), (ALL, 12, 16)])
def test_adapter_rank_is_padded_if_asked(bank, tmp_path, experts, rank, padded):
    spec = TaskModelSpec(experts, method=MEAN)
    plan = plan_of(bank, spec)
    found = []
    for name, pad in (("plain", False), ("padded", True)):
        ((folder, _),) = write_task_adapters(bank, plan, tmp_path / name, resolve, pad)
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf8"))
        found.append(config["r"])
        loaded = PeftModel.from_pretrained(load_model(bank.base[0]), folder)
        torch.testing.assert_close(logits(loaded), merged_logits(bank, spec), rtol=1e-4, atol=1e-3)
        assert f"--max-lora-rank {padded}" in (folder / "README.md").read_text(encoding="utf8")
    assert found == [rank, padded]


def test_adapter_of_too_large_a_rank_cannot_be_padded(bank, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_export, "VLLM_RANKS", (1, 8))
    plan = plan_of(bank, TaskModelSpec(("expert0",)), TaskModelSpec(ALL, method=MEAN))
    with pytest.raises(SamError, match=r"^\[S803\].*rank is 12.*up to 8"):
        write_task_adapters(bank, plan, tmp_path / "out", resolve, pad_rank=True)
    assert list(tmp_path.iterdir()) == []
    ((_, _), (folder, _)) = write_task_adapters(bank, plan, tmp_path / "out", resolve)
    assert "cannot serve" in (folder / "README.md").read_text(encoding="utf8")


def test_modules_that_share_a_name_with_others_are_named_whole(bank_copy, tmp_path):
    only = "model.layers.0.self_attn.q_proj"
    add_expert(bank_copy, tmp_path, "one", target_modules=[only])
    spec = TaskModelSpec(("one",))
    ((folder, _),) = write_task_adapters(bank_copy, plan_of(bank_copy, spec), tmp_path / "out", resolve)
    assert json.loads((folder / "adapter_config.json").read_text(encoding="utf8"))["target_modules"] == [only]
    loaded = PeftModel.from_pretrained(load_model(bank_copy.base[0]), folder)
    torch.testing.assert_close(logits(loaded), merged_logits(bank_copy, spec), rtol=1e-4, atol=1e-3)


def test_write_adapter_of_no_rank_changes_nothing(bank, tmp_path):
    """A merge may come out as no change at all."""
    (matrix, own), *_ = bank.load_adapter("expert0").matrices.items()
    nothing = LoraFactors(own.a[:0], own.b[:, :0], 1.0)
    write_adapter(tmp_path / "a", {matrix: nothing}, 1)
    base = load_model(bank.base[0])
    before = logits(base)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "a")), before)


# The card


def test_card_says_where_the_adapter_comes_from(bank, tmp_path):
    spec = TaskModelSpec(("expert0", "expert2"), (1.0, 0.25), TaskArithmetic(0.3).config)
    plan = plan_of(bank, spec)
    ((folder, _),) = write_task_adapters(bank, plan, tmp_path / "out", resolve)
    text = (folder / "README.md").read_text(encoding="utf8")
    for name, weight in (("expert0", "1"), ("expert2", "0.25")):
        assert re.search(rf"\| {name} \| domain\d \| {weight} \| `{bank.adapter_hash(name)}` \| corpus\d \|", text)
    said = ("spacy_sam.TaskArithmetic.v1", '"scale": 0.3', bank.base_hash, plan.fingerprint, "| rank | 8 |", "peft 0.")
    for word in said:
        assert word in text, word
    assert text.startswith("---\nlibrary_name: peft\n")
    assert str(bank.path) not in text


def test_card_s_text_cannot_break_its_tables(bank_copy, tmp_path):
    from dataclasses import replace

    bank_copy.update_card(replace(bank_copy["expert0"], domain="a | b\nc"))
    spec = TaskModelSpec(("expert0",))
    ((folder, _),) = write_task_adapters(bank_copy, plan_of(bank_copy, spec), tmp_path / "out", resolve)
    assert "| expert0 | a \\| b c | 1 |" in (folder / "README.md").read_text(encoding="utf8")


# What is refused


def refused(bank: ExpertBank, plan: Plan, out: Any) -> str:
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(SamError) as caught:
        write_task_adapters(bank, plan, out, resolve)
    assert sorted(out.parent.rglob("*")) == before
    return str(caught.value)


def test_dense_methods_are_refused(bank, tmp_path):
    plan = plan_of(bank, TaskModelSpec(("expert0",)), TaskModelSpec(ALL, method=Ties().config))
    message = refused(bank, plan, tmp_path / "out")
    assert message.startswith("[S406]")
    assert "spacy_sam.Mean.v1" in message


def test_the_base_is_no_adapter(bank, tmp_path):
    assert "[S803] Task model 1 (base)" in refused(bank, plan_of(bank, TaskModelSpec()), tmp_path / "out")


def test_plans_of_other_banks_are_refused(bank, tmp_path):
    assert "[S112]" in refused(bank, Plan("another", (TaskModelSpec(("expert0",)),)), tmp_path / "out")
    changed = Plan(bank.base_hash, (TaskModelSpec(("expert0",)),), {"expert0": "another"})
    assert "[S116]" in refused(bank, changed, tmp_path / "out")


def test_folders_with_something_in_them_are_left_alone(bank, tmp_path):
    plan = plan_of(bank, TaskModelSpec(("expert0",)))
    (tmp_path / "out").mkdir()
    write_task_adapters(bank, plan, tmp_path / "out", resolve)  # empty: taken
    assert "[S123]" in refused(bank, plan, tmp_path / "out")
    (tmp_path / "file").write_text("x", encoding="utf8")
    assert "[S123]" in refused(bank, plan, tmp_path / "file")


@pytest.mark.parametrize("at", [1, 2])
def test_an_error_leaves_nothing_behind(bank, tmp_path, monkeypatch, at):
    plan = plan_of(bank, TaskModelSpec(("expert0",)), TaskModelSpec(ALL, method=MEAN))
    calls: List[Any] = []

    def full(tensors, path, **settings):
        calls.append(path)
        path.write_bytes(b"half")
        if len(calls) == at:
            raise OSError("no space left on device")

    monkeypatch.setattr(adapter_export, "save_file", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="no space"):
        write_task_adapters(bank, plan, tmp_path / "out", resolve)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


# The command


@pytest.fixture
def merge(tiny_bank_path, tmp_path) -> Any:
    def run(spec: TaskModelSpec, *args: str) -> Any:
        plan_of(ExpertBank(tiny_bank_path), spec).to_disk(tmp_path / "plan.json")
        command = ["merge", tmp_path / "plan.json", tmp_path / "out", "-b", tiny_bank_path, *args]
        return CliRunner().invoke(app, list(map(str, command)), env={"COLUMNS": "200", "NO_COLOR": "1"})

    return run


def test_cli_merge_as_adapter(merge, bank, tmp_path):
    result = merge(TaskModelSpec(ALL, method=MEAN), "--as", "adapter", "--pad-rank")
    assert result.exit_code == 0, result.output
    assert "expert0 + expert1 + expert2" in result.output
    config = json.loads((tmp_path / "out" / "task_model_1" / "adapter_config.json").read_text(encoding="utf8"))
    assert (config["r"], config["task_type"]) == (16, "CAUSAL_LM")


def test_cli_merge_as_adapter_by_ties(merge, tmp_path):
    result = merge(TaskModelSpec(ALL, method=Ties().config), "--as", "adapter")
    assert result.exit_code == 1
    assert "[S406]" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_cli_merge_as_something_else(merge):
    assert merge(TaskModelSpec(ALL, method=MEAN), "--as", "gguf").exit_code == 2
