"""Passes over answers that change from their ends on give what reading each prompt and answer anew gives."""

import random
from typing import List

import pytest
import torch
from helpers import load_model, save_base
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from spacy_sam.generate.batches import causal_step
from spacy_sam.generate.passes import CausalPasses

PREFIX = [7, 8, 9, 10]


@pytest.fixture(scope="module", params=["llama", "opt", "gpt2"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    save_base(folder, request.param)
    return load_model(folder)


def open_passes(model, bodies: List[List[int]], prefix: List[int]) -> CausalPasses:
    cache = DynamicCache(config=model.config)
    if prefix:
        ids = torch.tensor([prefix])
        causal_step(model, ids, torch.ones_like(ids), torch.arange(len(prefix))[None], cache)
    return CausalPasses(model, cache, len(prefix), bodies)


def read_anew(model, prompt: List[int], answer: List[int]) -> torch.Tensor:
    states = model.get_decoder()(input_ids=torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False).last_hidden_state
    return states[0, len(prompt) - 1 :]


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), n_rows=st.integers(1, 4), n_passes=st.integers(1, 12), prefix=st.booleans())
def test_passes_are_reading_anew(model, seed, n_rows, n_passes, prefix):
    """Starts only rise, rows leave, and long runs cut the cache back."""
    chance = random.Random(seed)

    def tokens(n: int) -> List[int]:
        return [chance.randrange(300) for _ in range(n)]

    given_prefix = PREFIX if prefix else []
    bodies = [tokens(chance.randint(1, 5)) for _ in range(n_rows)]
    answers, starts = [tokens(chance.randint(1, 9)) for _ in bodies], [0] * n_rows
    with torch.inference_mode():
        passes = open_passes(model, bodies, given_prefix)
        for _ in range(n_passes):
            states = passes.hidden(answers, starts)
            assert len(states) == len(bodies)
            for row, (body, answer, start) in enumerate(zip(bodies, answers, starts)):
                expected = read_anew(model, [*given_prefix, *body], answer)[start:]
                torch.testing.assert_close(states[row, : len(expected)], expected, rtol=1e-3, atol=1e-4)
            kept = sorted(chance.sample(range(len(bodies)), chance.randint(1, len(bodies))))
            passes.keep(torch.tensor(kept))
            bodies = [bodies[row] for row in kept]
            starts = [chance.randint(starts[row], len(answers[row]) - 1) for row in kept]
            answers = [answers[row][:start] + tokens(chance.randint(1, 6)) for row, start in zip(kept, starts)]


def test_the_cache_stays_bounded(model):
    answer = list(range(20))
    with torch.inference_mode():
        passes = open_passes(model, [[1, 2, 3]], PREFIX)
        for _ in range(40):
            passes.hidden([answer], [0])
    assert passes.cache.get_seq_length() == passes.mask.shape[1] <= 3 * (len(PREFIX) + 3 + len(answer))
