"""Training a bank: what ends up in it, going on after a stop, the loss, the config. On a minuscule base, without network."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import numpy as np
import pytest
import torch
from helpers import make_tokenizer
from torch.nn.functional import cross_entropy
from transformers import Trainer

from spacy_sam.bank import ExpertBank
from spacy_sam.errors import SamError
from spacy_sam.prompts import LinesFormat, PromptEncoder
from spacy_sam.train import run, sft
from spacy_sam.train.base import random_llama
from spacy_sam.train.config import TrainConfig, expand, read_config
from spacy_sam.train.data import IGNORED, Example, encode_example
from spacy_sam.train.run import train_bank
from spacy_sam.train.scores import score_bank

DEMO = Path(__file__).parents[1] / "assets" / "demo"
BASE_STEPS, EXPERT_STEPS, UNIFIED_STEPS = 3, 4, 3
CONFIG = f"""
[paths]
data = "{DEMO.as_posix()}"

[bank]
name = "minuscule"
centroid_texts = 30

[base]
kind = "random"
vocab_size = 400
context = 256
hidden_size = 16
n_layers = 1
n_heads = 2

[base_training]
max_steps = {BASE_STEPS}
learning_rate = 0.01
tokens_per_batch = 256
warmup_steps = 1
bf16 = false

[lora]
rank = 2
alpha = 4

[expert_training]
max_steps = {EXPERT_STEPS}
learning_rate = 0.01
tokens_per_batch = 256
warmup_steps = 1
gradient_accumulation = 2
bf16 = false

[unified_training]
max_steps = {UNIFIED_STEPS}
learning_rate = 0.01
tokens_per_batch = 256
warmup_steps = 1
bf16 = false

[data]
max_length = 128
max_labels = 3

[training]
seed = 5
dev_texts = 2

[domains]

[domains.cooking]
train = ["${{paths.data}}/cooking.train.jsonl"]
dev = ["${{paths.data}}/cooking.dev.jsonl"]

[domains.sea_and_sport]
train = ["${{paths.data}}/s*.train.jsonl"]
dev = ["${{paths.data}}/sport.dev.jsonl"]
"""
RUNS = ["base", "cooking", "sea_and_sport", "unified"]


class Killed(Exception):
    """The machine goes off."""


class FakeEncoder:
    """Embeds a text by its length and its vowels."""

    def __init__(self, name: str, *, path: Optional[str] = None) -> None:
        self.name = name

    def __call__(self, texts: List[str]) -> np.ndarray:
        return np.array([[len(text), *(text.count(vowel) for vowel in "aeiou")] for text in texts], dtype=np.float32)


@pytest.fixture(autouse=True, scope="module")
def _fake_encoder() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SentenceEncoder", FakeEncoder)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    path = tmp_path_factory.mktemp("configs") / "minuscule.cfg"
    path.write_text(CONFIG, encoding="utf8")
    return read_config(path)


@pytest.fixture(scope="module")
def whole(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> ExpertBank:
    """The bank of a run that nothing disturbed: do not change it."""
    return train(config, tmp_path_factory.mktemp("trained") / "bank")


def train(config: TrainConfig, out: Path) -> ExpertBank:
    return train_bank(config, out, progress=False)


def raises(code: str) -> Any:
    return pytest.raises(SamError, match=rf"^\[{code}\]")


def hashes(folder: Path) -> Dict[str, str]:
    """Every file of a bank with its content's hash."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def on_steps(monkeypatch: pytest.MonkeyPatch, act: Callable[[int, Any, Any], None]) -> None:
    """Call `act` after each training step, with the number of steps of all runs so far, instead of looking at the clock."""
    steps = [0]
    original = sft.SaveEvery.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        control = original(self, args, state, control, **kwargs)
        act(steps[0], state, control)
        return control

    monkeypatch.setattr(sft.SaveEvery, "on_step_end", on_step_end)


# The bank


def test_train_bank(whole, config):
    assert [card.name for card in whole.experts] == ["cooking", "sea_and_sport"]
    assert [card.name for card in whole.baselines] == ["unified"]
    assert whole.check() == ["cooking", "sea_and_sport", "unified"]
    assert whole.name == "minuscule"
    assert whole.prompt == {"name": LinesFormat.name, "instruction": "", "max_labels": 3}
    assert whole.encoder == config.bank.encoder
    assert whole.details["base_kind"] == "random"
    assert whole.details["base_training"]["max_steps"] == BASE_STEPS
    assert 0 < whole.details["base_training"]["loss"] < 20
    assert Path(whole.base[0]) == whole.path / "base"


def test_train_cards(whole):
    cooking, both, unified = whole["cooking"], whole["sea_and_sport"], whole["unified"]
    assert cooking.labels == ("cook", "dish", "ingredient", "utensil")
    assert both.domain == "sea and sport"
    assert [(corpus.name, corpus.n_records) for corpus in both.corpora] == [("shipping", 250), ("sport", 250)]
    assert both.corpora[1].labels == ("athlete", "competition", "stadium", "team")
    assert len(unified.corpora) == 3
    assert len(unified.labels) == 12
    assert (cooking.role, unified.role) == ("expert", "baseline")
    assert (cooking.centroid.encoder, cooking.centroid.n_texts) == (whole.encoder, 30)
    assert len(cooking.centroid.vector) == 6
    assert cooking.centroid.vector != both.centroid.vector
    assert unified.centroid is None
    for card in (cooking, both, unified):
        assert card.base_hash == whole.base_hash
        assert card.prompt == whole.prompt
        assert card.lora == {"rank": 2, "alpha": 4, "target_modules": "all-linear"}
        assert 0 < card.training["loss"] < 20
    assert cooking.training["max_steps"] == EXPERT_STEPS
    assert cooking.training["gradient_accumulation"] == 2
    assert cooking.training["learning_rate"] == 0.01
    assert len({card.training["seed"] for card in (cooking, both, unified)}) == 3
    delta = whole.load_adapter("cooking")
    assert delta is not None


def test_train_adapters_have_learned(whole):
    """Every adapter changes weights, and each in its own way."""
    found = {name: hashes(whole.folder(name))["adapter_model.safetensors"] for name in RUNS[1:]}
    assert len(set(found.values())) == 3
    from safetensors.torch import load_file

    for name in RUNS[1:]:
        tensors = load_file(whole.folder(name) / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert all(tensor.abs().max() > 0 for key, tensor in tensors.items() if "lora_B" in key)


def test_train_adapter_configs_name_no_folder_of_this_machine(whole):
    for name in RUNS[1:]:
        config = json.loads((whole.folder(name) / "adapter_config.json").read_text(encoding="utf8"))
        assert config["base_model_name_or_path"] == "../../base"
        assert config["target_modules"] == sorted(config["target_modules"])


def test_train_without_base_training_or_unified(config, tmp_path):
    bare = config.model_copy(update={"base_training": None, "unified_training": None})
    bank = train(bare, tmp_path / "bank")
    assert (len(bank), bank.baselines, "base_training" in bank.details) == (2, [], False)


def test_train_on_a_base_from_elsewhere(config, whole, tmp_path):
    """kind "hub" with a folder: the base is used where it is, and not trained."""
    before = hashes(whole.path / "base")
    section = config.base.model_copy(update={"kind": "hub", "source": whole.base[0]})
    bank = train(config.model_copy(update={"base": section, "unified_training": None}), tmp_path / "bank")
    assert bank.base[0] == whole.base[0]
    assert bank.base_hash == whole.base_hash
    assert not (tmp_path / "bank" / "base").exists()
    assert hashes(whole.path / "base") == before
    weights = "adapter_model.safetensors"
    assert hashes(bank.folder("cooking"))[weights] == hashes(whole.folder("cooking"))[weights]


def test_train_says_what_it_does(config, tmp_path, whole):
    shutil.copytree(whole.path, tmp_path / "bank")
    ExpertBank(tmp_path / "bank").remove("cooking")
    said: List[str] = []
    train_bank(config, tmp_path / "bank", progress=False, report=said.append)
    assert len(said) == 2
    assert said[0] == "'cooking': 250 texts of 1 corpora"
    assert said[1].startswith("'cooking' is in the bank")


def test_train_scores(config, whole, tmp_path):
    """Experts are scored on their own dev sets, the baseline on all, and nothing is scored twice."""
    shutil.copytree(whole.path, tmp_path / "bank")
    bank = ExpertBank(tmp_path / "bank")
    said: List[str] = []
    score_bank(bank, config, report=said.append)
    scores = {card.name: card.scores for card in [*bank.experts, *bank.baselines]}
    assert {name: sorted(found) for name, found in scores.items()} == {
        "cooking": ["cooking"],
        "sea_and_sport": ["sport"],
        "unified": ["cooking", "sport"],
    }
    assert {score.n_docs for found in scores.values() for score in found.values()} == {2}
    assert len(said) == 4
    score_bank(ExpertBank(bank.path), config, report=said.append)
    assert len(said) == 4


# Going on


def test_train_same_seed_same_bank(config, whole, tmp_path):
    assert hashes(train(config, tmp_path / "bank").path) == hashes(whole.path)


def test_train_other_seed_other_bank(config, whole, tmp_path):
    other = config.model_copy(update={"seed": 6, "base_training": None, "unified_training": None})
    bank = train(other, tmp_path / "bank")
    assert bank.base_hash != whole.base_hash
    assert bank["cooking"].training["seed"] != whole["cooking"].training["seed"]


@pytest.mark.parametrize("last_step", [1, 3, 6, 7, 10, BASE_STEPS + 2 * EXPERT_STEPS + UNIFIED_STEPS])
def test_train_goes_on_after_a_stop(config, whole, tmp_path, monkeypatch, last_step):
    """Stopped after any step, with a checkpoint at every second one, and continued: the same bank, bit for bit."""
    stopped = [False]

    def act(step: int, state: Any, control: Any) -> None:
        if step == last_step and not stopped[0]:
            stopped[0] = True
            raise Killed
        if state.global_step % 2 == 0:
            control.should_save = control.should_log = True

    on_steps(monkeypatch, act)
    with pytest.raises(Killed):
        train(config, tmp_path / "bank")
    assert hashes(train(config, tmp_path / "bank").path) == hashes(whole.path)


@pytest.mark.parametrize("name", ["create", "add"])
def test_train_goes_on_after_a_stop_between_training_and_bank(config, whole, tmp_path, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setattr(ExpertBank, name, lambda *args, **kwargs: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(config, tmp_path / "bank")
    assert hashes(train(config, tmp_path / "bank").path) == hashes(whole.path)


@pytest.mark.parametrize("at", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_train_goes_on_after_a_stop_while_saving(config, whole, tmp_path, monkeypatch, at):
    """A checkpoint that was not written to its end is not continued from."""
    original, n_saved = getattr(Trainer, at), [0]

    def save(self: Any, *args: Any, **kwargs: Any) -> None:
        n_saved[0] += 1
        if n_saved[0] == 2:
            (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}").mkdir(exist_ok=True)
            raise Killed
        original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, at, save)
    often = config.model_copy(update={"save_minutes": 1e-9})
    with pytest.raises(Killed):
        train(often, tmp_path / "bank")
    assert hashes(train(config, tmp_path / "bank").path) == hashes(whole.path)


def test_train_finished_parts_are_kept(config, whole, tmp_path, monkeypatch):
    """Nothing is trained again in a finished bank; an expert that was taken out is, and comes out the same."""
    shutil.copytree(whole.path, tmp_path / "bank")
    with monkeypatch.context() as patch:
        patch.setattr(run, "fine_tune", lambda *args, **kwargs: pytest.fail("trained again"))
        assert hashes(train(config, tmp_path / "bank").path) == hashes(whole.path)
    ExpertBank(tmp_path / "bank").remove("sea_and_sport")
    assert "sea_and_sport" not in ExpertBank(tmp_path / "bank")
    assert hashes(train(config, tmp_path / "bank").path) == hashes(whole.path)


def test_train_a_new_domain_is_added(config, whole, tmp_path):
    shutil.copytree(whole.path, tmp_path / "bank")
    section = config.domains["cooking"].model_copy(update={"train": [str(DEMO / "shipping.train.jsonl")], "dev": []})
    bank = train(config.model_copy(update={"domains": {"ships": section}}), tmp_path / "bank")
    assert [card.name for card in bank.experts] == ["cooking", "sea_and_sport", "ships"]
    assert hashes(bank.folder("cooking")) == hashes(whole.folder("cooking"))


@pytest.mark.parametrize("change", ["learning_rate", "max_steps", "seed", "data"])
def test_train_does_not_continue_another_run(config, tmp_path, monkeypatch, change):
    def stop(step: int, state: Any, control: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        on_steps(patch, stop)
        with pytest.raises(Killed):
            train(config, tmp_path / "bank")
    if change == "seed":
        other = config.model_copy(update={"seed": 7})
    elif change == "data":
        other = config.model_copy(update={"domains": {"cooking": config.domains["cooking"]}})
    else:
        section = config.base_training.model_copy(update={change: 2 * getattr(config.base_training, change)})
        other = config.model_copy(update={"base_training": section})
    with raises("S605") as info:
        train(other, tmp_path / "bank")
    assert ("batches" if change == "data" else change) in str(info.value)


# The loss


@pytest.fixture(scope="module")
def examples() -> List[Example]:
    encoder = PromptEncoder(make_tokenizer(), LinesFormat())
    texts = {"Anna met Omar in Bern.": [(0, 4, "person"), (17, 21, "place")], "Nobody came.": []}
    texts["In Prague, Lena took the late ferry to Calais."] = [(3, 9, "place"), (11, 15, "person")]
    return [encode_example(encoder, ["person", "place"], text, entities) for text, entities in texts.items()]


def test_train_collator(examples):
    """Padded on the left; the labels are the answers, their end tokens included, and nothing else."""
    tokenizer = make_tokenizer()
    batch = sft.Collator(tokenizer.pad_token_id)([examples])
    kept = batch["logits_to_keep"]
    assert batch["labels"].shape == (3, kept)
    for row, example in enumerate(examples):
        answer = example.input_ids[example.n_prompt :]
        assert answer[-1] == tokenizer.eos_token_id
        labels = batch["labels"][row].tolist()
        assert labels[kept - len(answer) :] == answer
        assert set(labels[: kept - len(answer)]) == {IGNORED}
        mask = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][mask].tolist() == example.input_ids
        assert batch["position_ids"][row][mask].tolist() == list(range(len(example.input_ids)))
        assert mask[-1]


def test_train_loss_is_on_the_answer_alone(examples):
    """The model's loss on a batch is the mean over all answer tokens, each example taken by itself."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = random_llama(tokenizer, 16, 1, 2).eval()
    with torch.no_grad():
        loss = model(**sft.Collator(tokenizer.pad_token_id)([examples])).loss
        losses = []
        for example in examples:
            ids = torch.tensor([example.input_ids])
            logits = model(input_ids=ids).logits[0, example.n_prompt - 1 : -1]
            losses.append(cross_entropy(logits, ids[0, example.n_prompt :], reduction="none"))
    torch.testing.assert_close(loss, torch.cat(losses).mean())


def test_train_overfits_one_batch(examples, tmp_path):
    """The whole way of a fine-tuning run lowers the loss, and gives the mean of all its steps."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = random_llama(tokenizer, 32, 1, 2)
    settings = sft.SftSettings(max_steps=30, learning_rate=0.01, warmup_steps=1, bf16=False)
    loss = sft.fine_tune(model, tokenizer, [examples] * 30, tmp_path / "work", settings, progress=False)
    with torch.no_grad():
        after = model(**sft.Collator(tokenizer.pad_token_id)([examples])).loss.item()
    assert after < 2 < loss < np.log(len(tokenizer))
    state = json.loads((tmp_path / "work" / "checkpoint-30" / "trainer_state.json").read_text(encoding="utf8"))
    logged = [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]
    assert [step for step, _ in logged] == [20, 30]
    assert loss == pytest.approx((20 * logged[0][1] + 10 * logged[1][1]) / 30)


@pytest.mark.parametrize("half_written", [None, "", '{"global_step": 3'])
def test_train_last_checkpoint(tmp_path, half_written):
    assert sft.last_checkpoint(tmp_path / "nothing") is None
    for step in (2, 10, 9):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text('{"global_step": 1}', encoding="utf8")
    if half_written is not None:
        (tmp_path / "checkpoint-11").mkdir()
        (tmp_path / "checkpoint-11" / "trainer_state.json").write_text(half_written, encoding="utf8")
    (tmp_path / "checkpoint-12").mkdir()
    assert sft.last_checkpoint(tmp_path).name == "checkpoint-10"


# The config


def write(folder: Path, text: str) -> Path:
    path = folder / "train.cfg"
    path.write_text(text, encoding="utf8")
    return path


def test_train_config(tmp_path):
    path = write(tmp_path, CONFIG)
    plain = read_config(path)
    assert plain.domains["cooking"].train == [f"{DEMO.as_posix()}/cooking.train.jsonl"]
    assert plain.seed == 5
    other = read_config(path, {"paths.data": "elsewhere", "training.seed": 8, "expert_training.max_steps": 2})
    assert other.domains["cooking"].dev == ["elsewhere/cooking.dev.jsonl"]
    assert (other.seed, other.expert_training.max_steps) == (8, 2)
    assert other.unified_training == plain.unified_training


def test_train_config_lists_all_problems(tmp_path):
    text = CONFIG.replace('kind = "random"', 'kind = "magic"').replace("rank = 2", "rank = 0\nrang = 3")
    text = text.replace("max_labels = 3", 'max_labels = "few"').replace('dev = ["${paths.data}/sport.dev.jsonl"]', "")
    with raises("S601") as info:
        read_config(write(tmp_path, text.replace("seed = 5", "sead = 5")))
    for problem in ("base.kind", "lora.rank", "lora.rang", "data.max_labels", "sead"):
        assert f"  {problem}: " in str(info.value)
    assert "domains" not in str(info.value).replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (CONFIG.replace("[lora]", "[lora"), "lora"),
        (CONFIG.replace("${paths.data}", "${paths.nothing}"), "nothing"),
        (CONFIG.replace("[expert_training]", "[expert]"), "expert_training"),
        ("", "base"),
    ],
)
def test_train_config_that_cannot_be_read(tmp_path, text, part):
    path = write(tmp_path, text)
    with raises("S601") as info:
        read_config(path)
    assert str(path) in str(info.value)
    assert part in str(info.value)


def test_train_config_missing_file_and_override(tmp_path):
    with raises("S601"):
        read_config(tmp_path / "nothing.cfg")
    with raises("S601"):
        read_config(tmp_path)
    with raises("S601"):
        read_config(write(tmp_path, CONFIG), {"nothing.here": 1})


def test_train_data_is_checked_before_any_training(config, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "fine_tune", lambda *args, **kwargs: pytest.fail("trained"))
    section = config.domains["cooking"].model_copy(update={"train": [f"{DEMO.as_posix()}/cooking.*.nothing"]})
    with raises("S602"):
        train(config.model_copy(update={"domains": {**config.domains, "z": section}}), tmp_path / "bank")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a", "entities": []}\n{"text": "b", "entities": [[0, 9, "x"]]}\n', encoding="utf8")
    section = section.model_copy(update={"train": [str(bad)]})
    with raises("S603") as info:
        train(config.model_copy(update={"domains": {**config.domains, "z": section}}), tmp_path / "bank")
    assert "line 2" in str(info.value)
    assert not (tmp_path / "bank").exists()


def test_train_expand(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text("", encoding="utf8")
    (tmp_path / "d.jsonl").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in expand([str(tmp_path / "*.jsonl")])] == ["a.jsonl", "b.jsonl"]
    assert [path.name for path in expand(["c.txt", "*.jsonl"])] == ["c.txt", "a.jsonl", "b.jsonl"]
    with raises("S602"):
        expand(["*.jsonl", "*.conll"])
