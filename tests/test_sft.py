"""Supervised fine-tuning: collators, the loss of the answers alone, accumulation, the newest whole checkpoint."""

import json
import math
from pathlib import Path
from typing import List

import pytest
import torch
from helpers import load_model, make_tokenizer, save_base
from torch.nn.functional import cross_entropy

from spacy_sam.errors import SamError
from spacy_sam.generate.constrain import InlineGrammar
from spacy_sam.prompts import InlineFormat, LinesFormat, PromptEncoder
from spacy_sam.train import sft
from spacy_sam.train.base import random_llama
from spacy_sam.train.data import IGNORED, Example, encode_example


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


def test_train_seq2seq_collator(examples):
    """Prompts and answers, each padded on the right; answers with their end tokens."""
    tokenizer = make_tokenizer()
    batch = sft.Seq2SeqCollator(tokenizer.pad_token_id)([examples])
    longest_prompt = max(example.n_prompt for example in examples)
    longest_answer = max(len(example.input_ids) - example.n_prompt for example in examples)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, longest_prompt)
    assert batch["labels"].shape == (3, longest_answer)
    for row, example in enumerate(examples):
        prompt, answer = example.input_ids[: example.n_prompt], example.input_ids[example.n_prompt :]
        n_left = longest_prompt - len(prompt)
        assert batch["input_ids"][row].tolist() == prompt + [tokenizer.pad_token_id] * n_left
        assert batch["attention_mask"][row].tolist() == [1] * len(prompt) + [0] * n_left
        assert batch["labels"][row].tolist() == answer + [IGNORED] * (longest_answer - len(answer))


@pytest.fixture(scope="module")
def tiny_bart_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bart")
    torch.manual_seed(0)
    save_base(folder, "bart")
    return folder


def test_train_seq2seq_loss_is_on_the_answer_alone(examples, tiny_bart_path):
    """The mean over all answer tokens, each example taken by itself, the decoder begun with the end token."""
    tokenizer, model = make_tokenizer(), load_model(tiny_bart_path)
    with torch.no_grad():
        loss = model(**sft.Seq2SeqCollator(tokenizer.pad_token_id)([examples])).loss
        losses = []
        for example in examples:
            prompt, answer = torch.tensor([example.input_ids]).split(
                [example.n_prompt, len(example.input_ids) - example.n_prompt], dim=1
            )
            begun = torch.cat([torch.tensor([[tokenizer.eos_token_id]]), answer[:, :-1]], dim=1)
            logits = model(input_ids=prompt, decoder_input_ids=begun).logits
            losses.append(cross_entropy(logits[0], answer[0], reduction="none"))
    torch.testing.assert_close(loss, torch.cat(losses).mean())


@pytest.mark.parametrize("architecture", ["llama", "bart"])
@pytest.mark.parametrize("constrained", [False, True], ids=["free", "grammar"])
def test_train_accumulated_loss(examples, tiny_bart_path, tmp_path, architecture, constrained):
    """Micro-batches of one step count together as one batch does: its loss is their mean, and its step as large."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    start = random_llama(tokenizer, 16, 1, 2) if architecture == "llama" else load_model(tiny_bart_path)
    start.save_pretrained(tmp_path / "start")
    grammar = InlineGrammar(PromptEncoder(tokenizer, InlineFormat())) if constrained else None
    if grammar:
        examples = [encode_example(grammar.encoder, ["person"], "Anna came.", [(0, 4, "person")], grammar)]
    found = {}
    for accumulation in (1, 3):
        model = load_model(tmp_path / "start")
        settings = sft.SftSettings(
            max_steps=1, learning_rate=1e-9, warmup_steps=0, gradient_accumulation=accumulation, bf16=False
        )
        batches = [examples[:1]] * accumulation
        work = tmp_path / str(accumulation)
        loss = sft.fine_tune(model, tokenizer, batches, work, settings, grammar=grammar, progress=False)
        state = json.loads((work / "checkpoint-1" / "trainer_state.json").read_text(encoding="utf8"))
        found[accumulation] = (loss, state["log_history"][0]["grad_norm"])
    assert found[3] == pytest.approx(found[1], rel=1e-3)


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


def test_train_encoder_learns_at_its_own_rate(examples, tiny_bart_path, tmp_path):
    """Adam's first step is as long as the rate: seen on the encoder with the embeddings, and on the decoder."""
    tokenizer = make_tokenizer()
    model = load_model(tiny_bart_path)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = sft.SftSettings(
        max_steps=1, learning_rate=1e-2, encoder_learning_rate=1e-3, warmup_steps=0, weight_decay=0.0, bf16=False
    )
    sft.fine_tune(model, tokenizer, [examples], tmp_path / "work", settings, progress=False)
    for name, parameter in model.named_parameters():
        step = (parameter - before[name]).abs().max().item()
        rate = 1e-2 if ".decoder." in name and "embed_tokens" not in name else 1e-3
        if parameter.ndim > 1:  # keys have biases without a gradient
            assert step == pytest.approx(rate, rel=0.05), name


def test_train_encoder_rate_of_a_causal_base_is_refused(examples, tmp_path):
    tokenizer = make_tokenizer()
    settings = sft.SftSettings(max_steps=1, learning_rate=1e-2, encoder_learning_rate=1e-3)
    with pytest.raises(SamError, match="S607"):
        sft.fine_tune(random_llama(tokenizer, 16, 1, 2), tokenizer, [examples], tmp_path / "work", settings)
    assert not (tmp_path / "work").exists()


def test_train_overfits_one_batch(examples, tmp_path):
    """The whole way of a fine-tuning run lowers the loss, and gives the mean of all its steps."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = random_llama(tokenizer, 32, 1, 2)
    settings = sft.SftSettings(max_steps=30, learning_rate=0.01, warmup_steps=1, bf16=False)
    loss = sft.fine_tune(model, tokenizer, [examples] * 30, tmp_path / "work", settings, progress=False)
    with torch.no_grad():
        after = model(**sft.Collator(tokenizer.pad_token_id)([examples])).loss.item()
    assert after < 2 < loss < math.log(len(tokenizer))
    state = json.loads((tmp_path / "work" / "checkpoint-30" / "trainer_state.json").read_text(encoding="utf8"))
    logged = [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]
    assert [step for step, _ in logged] == [20, 30]
    assert loss == pytest.approx((20 * logged[0][1] + 10 * logged[1][1]) / 30)


def test_train_seq2seq_overfits_one_batch(examples, tiny_bart_path, tmp_path):
    """What is learned is what the decoder writes."""
    tokenizer, model = make_tokenizer(), load_model(tiny_bart_path)
    settings = sft.SftSettings(max_steps=60, learning_rate=0.01, warmup_steps=1, bf16=False)
    loss = sft.fine_tune(model, tokenizer, [examples] * 60, tmp_path / "work", settings, progress=False)
    batch = sft.Seq2SeqCollator(tokenizer.pad_token_id)([examples])
    after = model.eval()(**batch).loss.item()
    assert after < 0.2 < loss
    for example in examples:
        prompt, answer = example.input_ids[: example.n_prompt], example.input_ids[example.n_prompt :]
        written = model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)
        assert written[0, 1:].tolist() == answer


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
