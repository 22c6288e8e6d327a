"""Training a bank: what ends up in it, going on after a stop. On a minuscule base, without network."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import numpy as np
import pytest
import torch
from helpers import load_model
from transformers import AutoTokenizer, Trainer

from spacy_sam.bank import ExpertBank
from spacy_sam.errors import SamError
from spacy_sam.models import is_tagger
from spacy_sam.prompts import LinesFormat
from spacy_sam.train import run, sft
from spacy_sam.train.config import TrainConfig, read_config
from spacy_sam.train.data import Example
from spacy_sam.train.run import train_bank
from spacy_sam.train.scores import ENTITY_BIASES, score_bank

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

[base_training.all]
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
    assert list(whole.details["base_training"]) == ["all"]
    assert whole.details["base_training"]["all"]["max_steps"] == BASE_STEPS
    assert 0 < whole.details["base_training"]["all"]["loss"] < 20
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
    bare = config.model_copy(update={"base_training": {}, "unified_training": None})
    bank = train(bare, tmp_path / "bank")
    assert (len(bank), bank.baselines, "base_training" in bank.details) == (2, [], False)


def test_train_tagger_bank(config, tiny_encoder_path, tmp_path):
    """kind "tagger": base and adapters are of a tagger, and a run that was stopped goes on to the same bank."""
    update = {"kind": "tagger", "source": str(tiny_encoder_path)}
    section = config.bank.model_copy(update={"prompt": "spacy_sam.Inline.v1"})
    other = config.model_copy(update={"base": config.base.model_copy(update=update), "bank": section})
    bank = train(other, tmp_path / "bank")
    assert bank.check() == ["cooking", "sea_and_sport", "unified"]
    model = load_model(bank.base[0])
    assert is_tagger(model.config)
    assert len(model.bert.encoder.layer) == 4
    assert 0 < bank.details["base_training"]["all"]["loss"] < 100
    matrices = bank.load_adapter("cooking").matrices
    assert set(matrices) <= set(dict(model.named_parameters()))
    changed = ("bert.encoder.layer.3.attention.self.query", "bert.encoder.layer.0.output.dense", "classifier")
    assert all(matrices[f"{name}.weight"].delta().abs().max() > 0 for name in changed)
    assert not any("embeddings" in name for name in matrices)
    shutil.copytree(bank.path, tmp_path / "again")
    ExpertBank(tmp_path / "again").remove("cooking")
    assert hashes(train(other, tmp_path / "again").path) == hashes(bank.path)


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


def test_train_says_what_is_left_though_the_config_changed(config, tmp_path, whole):
    shutil.copytree(whole.path, tmp_path / "bank")
    before = hashes(tmp_path / "bank")
    said: List[str] = []
    train_bank(config, tmp_path / "bank", progress=False, report=said.append)
    assert said == []
    section = config.domains["cooking"]
    domains = {
        **config.domains,
        "cooking": section.model_copy(update={"train": [*section.train, f"{DEMO}/sport.dev.jsonl"]}),
    }
    other = config.model_copy(
        update={"domains": domains, "unified_training": config.unified_training.model_copy(update={"max_steps": 9})}
    )
    train_bank(other, tmp_path / "bank", progress=False, report=said.append)
    assert [line.split(" was trained")[0] for line in said] == ["'cooking'", "'unified'"]
    assert "(corpora)" in said[0]
    assert "(max_steps, corpora)" in said[1]
    assert hashes(tmp_path / "bank") == before


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
    assert len(said) == len(ENTITY_BIASES) + 1 + 4  # the calibration, and four scores
    score_bank(ExpertBank(bank.path), config, report=said.append)
    assert len(said) == len(ENTITY_BIASES) + 1 + 4  # the calibration, and four scores


# Going on


def test_train_same_seed_same_bank(config, whole, tmp_path):
    assert hashes(train(config, tmp_path / "bank").path) == hashes(whole.path)


def test_train_other_seed_other_bank(config, whole, tmp_path):
    other = config.model_copy(update={"seed": 6, "base_training": {}, "unified_training": None})
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
        section = config.base_training["all"]
        section = section.model_copy(update={change: 2 * getattr(section, change)})
        other = config.model_copy(update={"base_training": {"all": section}})
    with raises("S605") as info:
        train(other, tmp_path / "bank")
    assert ("batches" if change == "data" else change) in str(info.value)


# Stages of the base's training


@pytest.fixture(scope="module")
def staged_config(config, tmp_path_factory) -> TrainConfig:
    """A stage on a corpus of its own, with types of each text, and one on all domains; one domain."""
    path = tmp_path_factory.mktemp("copy") / "copy.train.jsonl"
    rows = [{"text": f"copy {n}", "entities": [[0, 6, "text"]], "labels": ["text"]} for n in range(100, 150)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    section = config.base_training["all"]
    copy = section.model_copy(update={"corpora": [str(path)], "max_steps": 2})
    domains = {"cooking": config.domains["cooking"]}
    stages = {"copy": copy, "domains": section}
    return config.model_copy(update={"base_training": stages, "domains": domains, "unified_training": None})


@pytest.fixture(scope="module")
def staged(staged_config, tmp_path_factory) -> ExpertBank:
    """The bank of a run in stages that nothing disturbed: do not change it."""
    return train(staged_config, tmp_path_factory.mktemp("staged") / "bank")


def test_train_stages(staged, staged_config, tmp_path, monkeypatch):
    """Each stage trains on its own corpora, starting from the base that the one before made."""
    details = staged.details["base_training"]
    assert [(name, stage["max_steps"]) for name, stage in details.items()] == [("copy", 2), ("domains", BASE_STEPS)]
    assert "corpora" not in str(details), "the bank names no folder of this machine"
    seen: List[Any] = []
    original = run.fine_tune

    def fine_tune(model: Any, tokenizer: Any, batches: List[List[Example]], *args: Any, **kwargs: Any) -> float:
        before = hash_model(model)
        loss = original(model, tokenizer, batches, *args, **kwargs)
        texts = {tokenizer.decode(e.input_ids).splitlines()[1] for batch in batches for e in batch}
        seen.append((before, hash_model(model), sum(" copy 1" in text for text in texts) / len(texts)))
        return loss

    monkeypatch.setattr(run, "fine_tune", fine_tune)
    assert hashes(train(staged_config, tmp_path / "bank").path) == hashes(staged.path)
    copy, domains, expert = seen
    assert (copy[2], domains[2], expert[2]) == (1, 0, 0)
    assert copy[1] == domains[0] != domains[1]


def hash_model(model: Any) -> str:
    """Of the weights as a base on disk has them."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def test_train_stages_stopped_between(staged, staged_config, tmp_path):
    """The next run does not train again what is finished."""
    said: List[str] = []

    def stop(message: str) -> None:
        if message.startswith("Base, stage 'domains'"):
            raise Killed

    with pytest.raises(Killed):
        train_bank(staged_config, tmp_path / "bank", progress=False, report=stop)
    bank = train_bank(staged_config, tmp_path / "bank", progress=False, report=said.append)
    assert [message.split(":")[0] for message in said[:2]] == ["Base, stage 'domains'", "'cooking'"]
    assert hashes(bank.path) == hashes(staged.path)


@pytest.mark.parametrize("last_step", [1, 2, 4])
def test_train_stages_stopped_at_any_step(staged, staged_config, tmp_path, monkeypatch, last_step):
    def act(step: int, state: Any, control: Any) -> None:
        control.should_save = control.should_log = True
        if step == last_step:
            raise Killed

    with monkeypatch.context() as patch:
        on_steps(patch, act)
        with pytest.raises(Killed):
            train(staged_config, tmp_path / "bank")
    assert hashes(train(staged_config, tmp_path / "bank").path) == hashes(staged.path)


@pytest.mark.parametrize("n_saved", [1, 2])
@pytest.mark.parametrize("at", ["before", "within", "after"])
def test_train_stages_stopped_while_the_base_is_saved(staged, staged_config, tmp_path, monkeypatch, n_saved, at):
    """After the first stage and after the second: the old base is there, or none, or the new one."""
    original, calls = run.save_base, [0]

    def save_base(model: Any, tokenizer: Any, folder: Path) -> None:
        calls[0] += 1
        if calls[0] <= n_saved or at == "after":
            original(model, tokenizer, folder)
        if calls[0] > n_saved:
            if at == "within":
                shutil.rmtree(folder, ignore_errors=True)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run, "save_base", save_base)
        with pytest.raises(Killed):
            train(staged_config, tmp_path / "bank")
    assert hashes(train(staged_config, tmp_path / "bank").path) == hashes(staged.path)


def test_train_stages_of_a_bank_that_was_deleted(staged, staged_config, tmp_path):
    """With the folder of checkpoints left over, the base is made again, and not taken for trained."""
    shutil.copytree(staged.path.with_name("bank.work"), tmp_path / "bank.work")
    assert hashes(train(staged_config, tmp_path / "bank").path) == hashes(staged.path)


def test_train_stage_corpora_are_checked_before_any_training(staged, staged_config, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "fine_tune", lambda *args, **kwargs: pytest.fail("trained"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a", "entities": []}\n{"text": "b", "entities": [], "labels": [5]}\n', encoding="utf8")
    for code, pattern in (("S602", tmp_path / "*.nothing"), ("S603", bad)):
        last = staged_config.base_training["domains"].model_copy(update={"corpora": [str(pattern)]})
        stages = {**staged_config.base_training, "domains": last}
        other = staged_config.model_copy(update={"base_training": stages})
        with raises(code):
            train(other, tmp_path / "bank")
        assert not (tmp_path / "bank").exists()
        assert hashes(train(other, staged.path).path) == hashes(staged.path), "a finished bank needs them no more"


def test_train_vocabulary_of_other_texts(config, whole, tmp_path):
    """A word that is frequent in the given texts, and in no domain's, is a token."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "quokka quokka quokka", "entities": []}\n' * 50, encoding="utf8")
    other = config.model_copy(update={"base": config.base.model_copy(update={"texts": [str(path)]})})
    tokens = {}
    for name, bank in (("domains", whole), ("texts", train(other, tmp_path / "bank"))):
        tokens[name] = AutoTokenizer.from_pretrained(bank.base[0]).tokenize(" quokka")
    assert len(tokens["texts"]) == 1 < len(tokens["domains"])


# Other names of types


def test_train_with_aliases(config, tmp_path, monkeypatch):
    """They are asked in every run, and read before any training."""
    path = tmp_path / "aliases.json"
    other = config.model_copy(update={"data": config.data.model_copy(update={"aliases": str(path)})})
    monkeypatch.setattr(run, "fine_tune", lambda *args, **kwargs: pytest.fail("trained"))
    with raises("S602"):
        train(other, tmp_path / "bank")
    for content in ("{", '["meal"]', '{"dish": "meal"}', '{"dish": [5]}'):
        path.write_text(content, encoding="utf8")
        with raises("S601"):
            train(other, tmp_path / "bank")
    assert not (tmp_path / "bank").exists()
    path.write_text('{"dish": ["meal"]}', encoding="utf8")
    asked: List[str] = []

    def fine_tune(model: Any, tokenizer: Any, batches: List[List[Example]], *args: Any, **kwargs: Any) -> float:
        asked.append("".join(tokenizer.decode(e.input_ids).splitlines()[0] for batch in batches for e in batch))
        args[0].mkdir(parents=True)
        return 1.0

    monkeypatch.setattr(run, "fine_tune", fine_tune)
    train(other, tmp_path / "bank")
    assert [name for name, types in zip(RUNS, asked) if "meal" in types] == ["base", "cooking", "unified"]


# Corpora of no domain


def test_train_with_general_corpora(config, tmp_path, monkeypatch):
    """Experts and baseline get them, the base does not; the card tells the share; they are read before any training."""
    path = tmp_path / "general.jsonl"
    data = config.data.model_copy(update={"general": [str(path)], "general_share": 0.5})
    other = config.model_copy(update={"data": data})
    monkeypatch.setattr(run, "fine_tune", lambda *args, **kwargs: pytest.fail("trained"))
    with raises("S602"):
        train(other, tmp_path / "bank")
    assert not (tmp_path / "bank").exists()
    path.write_text('{"text": "an oboe", "entities": [[3, 7, "instrument"]]}\n', encoding="utf8")
    asked: List[float] = []

    def fine_tune(model: Any, tokenizer: Any, batches: List[List[Example]], *args: Any, **kwargs: Any) -> float:
        texts = [tokenizer.decode(e.input_ids) for batch in batches for e in batch]
        asked.append(sum("instrument" in text for text in texts) / len(texts))
        args[0].mkdir(parents=True)
        return 1.0

    monkeypatch.setattr(run, "fine_tune", fine_tune)
    bank = train(other, tmp_path / "bank")
    shares = dict(zip(RUNS, asked))
    assert shares["base"] == 0
    assert 0 < shares["cooking"] < 1
    assert 0 < shares["unified"] < 1
    assert bank["cooking"].training["general_share"] == 0.5
    assert "instrument" not in bank["cooking"].labels


# The data


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
