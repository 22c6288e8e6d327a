"""A causal model of random weights, made where it runs, with a tokenizer and a bank: for speed at sizes nobody trains here."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.texts import WRITTEN, Texts
from spacy_sam.bank import ExpertBank
from spacy_sam.prompts import InlineFormat
from spacy_sam.train.vocab import build_tokenizer

CONTEXT = 4096
LLAMA_8B: Dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY: Dict[str, Any] = {
    "vocab_size": 1200,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Model:
    """A random model on a device, a tokenizer, and the sizes that its speed follows from."""

    def __init__(self, shape: Dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        texts = Texts(WRITTEN).take("short", 5000)
        self.tokenizer = build_tokenizer(texts, min(shape["vocab_size"], 8000), CONTEXT)
        self.config = LlamaConfig(
            **shape,
            max_position_embeddings=CONTEXT,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=self.tokenizer.eos_token_id,
            architectures=["LlamaForCausalLM"],
        )
        with torch.device(device):
            self.measure(AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval())

    def measure(self, model: Any) -> None:
        """Take this model, and see how large it is."""
        self.model = model
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self.n_parameters = sum(sizes.values())
        self.n_read = (
            self.n_parameters - sizes["model.embed_tokens.weight"]
        )  # by a step: of embeddings, some rows alone
        self.n_head = sizes["lm_head.weight"]
        self.item_size = model.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Of keys and values."""
        heads = self.model.config.num_key_value_heads * self.model.config.head_dim
        return 2 * self.model.config.num_hidden_layers * heads * self.item_size

    def step_bytes(self, rows: int, n_before: float) -> float:
        """What one step must read. n_before (float): Tokens before the one that is made, on average."""
        return self.n_read * self.item_size + rows * n_before * self.token_bytes

    def prompt_flops(self, n_new: int, n_before: int) -> float:
        """Of one prompt: matrices for its new tokens, attention to all before each, and the head for the last."""
        attention = 4 * self.config.num_hidden_layers * self.config.hidden_size * n_new * (n_before + n_new / 2)
        return 2 * (self.n_read - self.n_head) * n_new + attention + 2 * self.n_head

    def words(self) -> List[str]:
        """Words of one token each."""
        plain = (self.tokenizer.convert_tokens_to_string([token]) for token in sorted(self.tokenizer.get_vocab()))
        return [text[1:] for text in plain if text.startswith(" ") and text[1:].isalpha()]

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Whoever loads a causal model gets this one."""
        with patch.object(AutoModelForCausalLM, "from_pretrained", new=lambda *args, **kwargs: self.model):
            yield

    def bank(self, folder: Path) -> ExpertBank:
        """A bank around the model, without experts, and without weights on the disk."""
        base = folder / "base"
        self.config.save_pretrained(base)
        self.tokenizer.save_pretrained(base)
        save_file({"in_memory": torch.zeros(1)}, base / "model.safetensors")
        prompt = {"name": InlineFormat.name, "max_labels": 100}
        return ExpertBank.create(folder, base="base", prompt=prompt, encoder="none", name="random")
