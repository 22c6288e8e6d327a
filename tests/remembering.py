"""A tiny bank with a real model whose answers are known: its base is trained on a few texts until it remembers them."""

from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import torch
from helpers import PROMPT, make_card, save_adapter, save_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from spacy_sam.bank import ExpertBank
from spacy_sam.prompts import PromptEncoder, make_format

REMEMBERED: Dict[str, List[Tuple[int, int, str]]] = {
    "Lena met Jakob in Prague.": [(0, 4, "person"), (9, 14, "person"), (18, 24, "place")],
    "Omar flew to Paris.": [(0, 4, "person"), (13, 18, "place")],
    "Nothing is here.": [],
    "Kyoto is old.": [(0, 5, "place")],
}
REMEMBERED_LABELS = ("person", "place")


def make_remembering_bank(path: Path, n_experts: int = 2) -> ExpertBank:
    """A tiny bank whose base answers the texts of `REMEMBERED` rightly, and whose experts hardly change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_base(path / "base")
    tokenizer = AutoTokenizer.from_pretrained(path / "base")
    model = AutoModelForCausalLM.from_pretrained(path / "base", dtype=torch.float32)
    encoder = PromptEncoder(tokenizer, make_format(PROMPT))
    batches = list(_examples(encoder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = torch.stack([model(input_ids=ids, labels=labels).loss for ids, labels in batches]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(path / "base")
    bank = ExpertBank.create(path, base="base", prompt=PROMPT, encoder="test-encoder", name="remembering")
    for number in range(n_experts):
        adapter = save_adapter(path.parent / f"adapter{number}", path / "base", seed=number, lora_alpha=0.001)
        bank.add(f"expert{number}", adapter, make_card(bank, number))
    return bank


def _examples(encoder: PromptEncoder) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    for text, entities in REMEMBERED.items():
        prompt = encoder.prefix(REMEMBERED_LABELS) + encoder.body(text)
        answer = encoder.answer(text, entities)
        yield torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
