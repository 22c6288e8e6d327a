"""What throughput is measured against, on the same loaded model: transformers' `generate`, and spacy-llm with its own task."""

from collections import deque
from typing import Any, Deque, Dict, Iterable, List, Sequence

import spacy
import torch
from spacy_llm.registry import registry

from benchmarks.timing import Output
from spacy_sam.generate.engine import Request
from spacy_sam.prompts import PromptEncoder

MODEL_NAME = "benchmarks.Generate.v1"


class Generate:
    """Greedy `generate` in batches, without a grammar, on a model that an engine has loaded.

    Every answer has as many tokens as it is told, the end token being one like any other: the work is then the same however well
    the model does without a grammar.
    """

    def __init__(self, model: Any, encoder: PromptEncoder) -> None:
        """model (Any): A causal model with a task model's weights. encoder (PromptEncoder): Makes the prompts."""
        self.model = model
        self.encoder = encoder
        self.model.generation_config.eos_token_id = None
        pad_id = encoder.tokenizer.pad_token_id
        self.pad_id: int = encoder.tokenizer.eos_token_id if pad_id is None else pad_id

    def __call__(
        self, requests: Sequence[Request], lengths: Sequence[int], size: int, by_length: bool = False
    ) -> Output:
        """Complete requests.

        requests (Sequence[Request]): Their task model is the one that the model has the weights of.
        lengths (Sequence[int]): New tokens of each.
        size (int): Prompts of a batch.
        by_length (bool): Batch prompts of like length; else in the order given.
        """
        prefixes = {labels: self.encoder.prefix(labels) for labels in {request.labels for request in requests}}
        prompts = [prefixes[request.labels] + self.encoder.body(request.text) for request in requests]
        order = sorted(range(len(prompts)), key=lambda at: len(prompts[at])) if by_length else range(len(prompts))
        rows: Dict[int, List[int]] = {}
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            rows.update(zip(batch, self.batch([prompts[at] for at in batch], [lengths[at] for at in batch])))
        return self.output([rows[at] for at in range(len(prompts))])

    @torch.inference_mode()
    def batch(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> List[List[int]]:
        """New tokens of each prompt. Rows of a batch run until the longest is done, as `generate` has it."""
        device = self.model.device
        width = max(map(len, prompts))
        padded = [[self.pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        made = self.model.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            do_sample=False,
            max_new_tokens=max(lengths),
            pad_token_id=self.pad_id,
        )
        return [row[:length] for row, length in zip(made[:, width:].tolist(), lengths)]

    def output(self, rows: Sequence[List[int]]) -> Output:
        """The answers as text."""
        texts = self.encoder.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Output(tuple(texts), sum(map(len, rows)))


class PromptModel:
    """A spacy-llm model that completes one prompt at a time, as spacy-llm's own Hugging Face models do.

    lengths: New tokens of each document to come. context_length: As spacy-llm asks it, to cut documents that are too long.
    """

    def __init__(self, generate: Generate) -> None:
        self.generate = generate
        self.context_length = int(generate.model.config.max_position_embeddings)
        self.lengths: Deque[int] = deque()
        self.n_tokens = 0

    def __call__(self, prompts: Iterable[Iterable[str]]) -> Iterable[Iterable[str]]:
        return [[self._complete(prompt, length) for prompt in of_doc] for of_doc, length in zip(prompts, self._next())]

    def _next(self) -> Iterable[int]:
        while self.lengths:
            yield self.lengths.popleft()

    def _complete(self, prompt: str, length: int) -> str:
        rows = self.generate.batch([self.generate.encoder.whole(prompt)], [length])
        self.n_tokens += len(rows[0])
        return self.generate.output(rows).answers[0]


class SpacyLlm:
    """A pipeline of spacy-llm's component with its own task `spacy.NER.v3`, and the given model behind it."""

    def __init__(self, generate: Generate, labels: Sequence[str]) -> None:
        self.model = PromptModel(generate)
        registry.llm_models(MODEL_NAME, func=lambda: self.model)
        self.nlp = spacy.blank("en")
        task = {"@llm_tasks": "spacy.NER.v3", "labels": list(labels)}
        self.nlp.add_pipe("llm", config={"task": task, "model": {"@llm_models": MODEL_NAME}, "validate_types": False})

    def __call__(self, texts: Sequence[str], lengths: Sequence[int]) -> Output:
        """Annotate texts, by answers of so many new tokens. RETURNS (Output): Tokens alone."""
        self.model.lengths.extend(lengths)
        self.model.n_tokens = 0
        for _ in self.nlp.pipe(texts):
            pass
        return Output((), self.model.n_tokens)
