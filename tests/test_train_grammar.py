"""Loss under a grammar: what the batches say is allowed, and the loss against one taken a token at a time."""

from typing import List, Tuple

import pytest
import torch
from helpers import load_model, save_base
from transformers import AutoTokenizer, TrainingArguments

from spacy_sam.generate.constrain import InlineGrammar
from spacy_sam.prompts import InlineFormat, PromptEncoder
from spacy_sam.train.data import Example, encode_example
from spacy_sam.train.sft import IGNORED, Collator, GrammarTrainer, Seq2SeqCollator, choices, grammar_loss

LABELS = ("place", "person", "person or place")
ANNOTATED = [
    ("Lena met Jakob in Prague.", [(0, 4, "person"), (9, 14, "person"), (18, 24, "place")]),
    ("Nothing.", []),
    ("The New Town of Rome", [(4, 12, "person or place"), (16, 20, "place")]),
]


@pytest.fixture(scope="module", params=["llama", "bart"])
def parts(request, tmp_path_factory):
    """A random model, its grammar, and some examples."""
    folder = tmp_path_factory.mktemp("bases") / request.param
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_base(folder, request.param)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = PromptEncoder(tokenizer, InlineFormat())
    grammar = InlineGrammar(encoder)
    examples = [encode_example(encoder, LABELS, text, entities, grammar) for text, entities in ANNOTATED]
    return load_model(folder), tokenizer, grammar, examples


def decisions(grammar: InlineGrammar, example: Example) -> List[Tuple[int, Tuple[int, ...], int]]:
    """Place in the answer, what is allowed there, and what is right, wherever there is a choice."""
    walk = grammar.walk(example.labels, example.text)
    found = []
    for place, token in enumerate(example.input_ids[example.n_prompt :]):
        if len(walk.allowed()) > 1:
            found.append((place, walk.allowed(), token))
        walk.advance(token)
    return found


def slow_loss(model, grammar: InlineGrammar, examples: List[Example]) -> float:
    losses = []
    for example in examples:
        prompt, answer = example.input_ids[: example.n_prompt], example.input_ids[example.n_prompt :]
        for place, allowed, token in decisions(grammar, example):
            if model.config.is_encoder_decoder:
                start = [model.config.decoder_start_token_id, *answer[:place]]
                logits = model(torch.tensor([prompt]), decoder_input_ids=torch.tensor([start])).logits
            else:
                logits = model(torch.tensor([prompt + answer[:place]])).logits
            scores = logits[0, -1, list(allowed)].log_softmax(-1)
            losses.append(-float(scores[allowed.index(token)]))
    return sum(losses) / len(losses)


@torch.no_grad()
def test_loss_is_that_of_a_token_at_a_time(parts, tmp_path):
    model, tokenizer, grammar, examples = parts
    collator = Seq2SeqCollator if model.config.is_encoder_decoder else Collator
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = GrammarTrainer(model=model, args=args)
    loss = trainer.compute_loss(model, collator(tokenizer.pad_token_id, grammar)([examples]))
    assert float(loss) == pytest.approx(slow_loss(model, grammar, examples), rel=1e-4)


@pytest.mark.parametrize("left", [False, True])
def test_choices_say_what_is_allowed_and_right(parts, left):
    _, _, grammar, examples = parts
    batch = choices(examples, grammar, left=left)
    lengths = [len(example.input_ids) - example.n_prompt for example in examples]
    assert batch["choices"].shape[:2] == batch["chosen"].shape == (len(examples), max(lengths))
    for row, (example, length) in enumerate(zip(examples, lengths)):
        offset = max(lengths) - length if left else 0
        expected = decisions(grammar, example)
        assert (batch["chosen"][row] != IGNORED).nonzero()[:, 0].tolist() == [
            offset + place for place, _, _ in expected
        ]
        for place, allowed, token in expected:
            found = batch["choices"][row, offset + place]
            assert found[found >= 0].tolist() == list(allowed)
            assert found[batch["chosen"][row, offset + place]] == token


def test_no_grammar_no_choices(parts):
    assert choices(parts[3], None, left=True) == {}


def test_loss_leaves_out_what_is_forced():
    logits = torch.zeros(1, 2, 5)
    logits[0, 0, 3] = 9.0  # not allowed
    allowed = torch.tensor([[[0, 1, -1], [2, -1, -1]]])
    loss = grammar_loss(logits, allowed, torch.tensor([[1, IGNORED]]))
    assert float(loss) == pytest.approx(0.6931, abs=1e-4)


def test_examples_that_the_grammar_lacks_are_none(parts):
    grammar = parts[2]
    assert encode_example(grammar.encoder, LABELS, "Lena", [(1, 3, "person")], grammar) is None
