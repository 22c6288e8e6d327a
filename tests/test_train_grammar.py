"""Loss under a grammar: what the batches say is allowed, and the loss against one taken a token at a time."""

import copy
from typing import Any, Dict, List, Tuple

import pytest
import torch
from helpers import load_model, make_tokenizer, save_base
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, TrainingArguments

from spacy_sam.generate.constrain import InlineGrammar
from spacy_sam.prompts import InlineFormat, PromptEncoder
from spacy_sam.train.data import IGNORED, Example, encode_example
from spacy_sam.train.loss import GrammarTrainer, choices, grammar_loss
from spacy_sam.train.sft import Collator, Seq2SeqCollator

LABEL_WEIGHT = 3.0
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


def weight_of(grammar: InlineGrammar, before: List[int]) -> float:
    """Of the decision behind these tokens of an answer: within a label it counts more."""
    text, _ = grammar.encoder.decode(before)
    return LABEL_WEIGHT if text.rfind("⟨") > text.rfind("⟩") else 1.0


def slow_loss(model, grammar: InlineGrammar, examples: List[Example]) -> float:
    """Cross entropy at every decision; those about a label, where no mark can come, count more."""
    losses, weights = [], []
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
            weights.append(weight_of(grammar, answer[:place]))
    return sum(loss * weight for loss, weight in zip(losses, weights)) / sum(weights)


def make_trainer(model, tmp_path) -> GrammarTrainer:
    return GrammarTrainer(model=model, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))


def collate(parts) -> Dict[str, Any]:
    model, tokenizer, grammar, examples = parts
    collator = Seq2SeqCollator if model.config.is_encoder_decoder else Collator
    return collator(tokenizer.pad_token_id, grammar, LABEL_WEIGHT)([examples])


def count_rows(head: torch.nn.Module, monkeypatch) -> List[int]:
    """The rows of states that the output layer gets from now on, a number for each call."""
    rows: List[int] = []
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda states: rows.append(states.shape[0]) or forward(states))
    return rows


@torch.no_grad()
def test_loss_is_that_of_a_token_at_a_time(parts, tmp_path, monkeypatch):
    model, _, grammar, examples = parts
    trainer = make_trainer(model, tmp_path)
    rows = count_rows(model.get_output_embeddings(), monkeypatch)
    losses = [float(trainer.compute_loss(model, collate(parts))) for _ in range(2)]
    assert rows == [1]  # all logits of one row, to see how they are made, and never again
    assert losses == [pytest.approx(slow_loss(model, grammar, examples), rel=1e-4)] * 2


def test_loss_has_the_gradients_of_all_logits(parts, tmp_path):
    task = "SEQ_2_SEQ_LM" if parts[0].config.is_encoder_decoder else "CAUSAL_LM"
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(parts[0]), lora)
    trainer = make_trainer(model, tmp_path)
    found = []
    for whole in (False, True):
        loss = trainer.compute_loss(model, collate(parts), return_outputs=whole)
        model.zero_grad()
        (loss[0] if whole else loss).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    assert any(grad.abs().max() > 1e-6 for grad in found[0].values())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
@pytest.mark.parametrize("change", ["bias", "scale", "adapter", "wrapped"])
@torch.no_grad()
def test_loss_of_models_whose_logits_are_made_in_another_way(parts, tmp_path, monkeypatch, change):
    model = copy.deepcopy(parts[0])
    called = model
    if change == "bias":
        size = model.config.vocab_size
        layer = torch.nn.Linear(model.get_output_embeddings().in_features, size)
        model.set_output_embeddings(layer)
    elif change == "scale":
        forward = type(model).forward

        def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = forward(self, *args, **kwargs)
            output.logits = output.logits * 3
            return output

        monkeypatch.setattr(type(model), "forward", scaled)
    elif change == "adapter":
        task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
        lora = LoraConfig(r=2, target_modules=["lm_head"], task_type=task)
        called = get_peft_model(model, lora)
    else:

        class Wrapper(torch.nn.Module):
            """As DistributedDataParallel: gradients are only reduced if it is called itself."""

            def __init__(self, module: torch.nn.Module) -> None:
                super().__init__()
                self.module, self.calls = module, 0

            def forward(self, **kwargs: Any) -> Any:
                self.calls += 1
                return self.module(**kwargs)

        called = Wrapper(model)
    trainer = make_trainer(model, tmp_path)
    trainer.compute_loss(called, collate(parts))
    if change == "adapter":  # it changes nothing before it is trained
        model.lm_head.lora_B["default"].weight.normal_()
    loss = trainer.compute_loss(called, collate(parts))
    assert float(loss) == pytest.approx(slow_loss(model, parts[2], parts[3]), rel=1e-4)
    assert change != "wrapped" or called.calls == 2


@torch.no_grad()
def test_loss_of_capped_logits(tmp_path):
    """A cap hardly shows in the small logits of a new model."""
    tokenizer = make_tokenizer()
    encoder = PromptEncoder(tokenizer, InlineFormat())
    grammar = InlineGrammar(encoder)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=30.0,
    )
    model = Gemma2ForCausalLM(config).eval()
    parts = (model, tokenizer, grammar, [encode_example(encoder, LABELS, *ANNOTATED[0], grammar)])
    trainer = make_trainer(model, tmp_path)
    trainer.compute_loss(model, collate(parts))
    model.lm_head.weight.mul_(3000)
    assert float(trainer.compute_loss(model, collate(parts))) == pytest.approx(slow_loss(model, *parts[2:]), rel=1e-4)


@pytest.mark.parametrize("left", [False, True])
def test_choices_say_what_is_allowed_and_right(parts, left):
    _, _, grammar, examples = parts
    batch = choices(examples, grammar, left=left, label_weight=LABEL_WEIGHT)
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
            answer = example.input_ids[example.n_prompt :]
            assert batch["weights"][row, offset + place] == weight_of(grammar, answer[:place])


def test_no_grammar_no_choices(parts):
    assert choices(parts[3], None, left=True) == {}


def test_loss_leaves_out_what_is_forced():
    logits = torch.zeros(1, 2, 5)
    logits[0, 0, 3] = 9.0  # not allowed
    allowed = torch.tensor([[[0, 1, -1], [2, -1, -1]]])
    loss = grammar_loss(logits, allowed, torch.tensor([[1, IGNORED]]), torch.ones(1, 2))
    assert float(loss) == pytest.approx(0.6931, abs=1e-4)


def test_loss_is_a_weighted_mean():
    logits = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 50.0, 0.0]]])
    allowed = torch.tensor([[[0, 1], [0, 1]]])
    loss = grammar_loss(logits, allowed, torch.tensor([[1, 1]]), torch.tensor([[1.0, 3.0]]))
    assert float(loss) == pytest.approx(0.6931 / 4, abs=1e-4)


def test_examples_that_the_grammar_lacks_are_none(parts):
    grammar = parts[2]
    assert encode_example(grammar.encoder, LABELS, "Lena", [(1, 3, "person")], grammar) is None
