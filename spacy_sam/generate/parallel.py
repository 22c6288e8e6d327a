"""Greedy decoding under a grammar, many tokens at a time, with the result of one at a time.

The text is known, so a whole answer can be guessed, and one forward pass tells every decision that the model would make in its
place. Wrong guesses are replaced by these decisions until nothing changes (Jacobi decoding, Santilli et al. 2023, arXiv
2305.10427). Each pass settles at least the first wrong decision for good, because all before it are right; so the end is
the greedy answer itself, mostly after a few passes where one token at a time takes one for every token.
"""

from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .batches import cache_argument, decoder_start, pad_right
from .guesses import Guess
from .passes import CausalPasses, Passes, Seq2SeqPasses


def decode(model: Any, passes: Passes, guesses: Sequence[Guess], entity_bias: float = 0.0) -> None:
    """Make every guess the model's greedy answer under the grammar.

    model (Any): A transformers model in evaluation mode.
    passes (Passes): Its encoded prompts.
    guesses (Sequence[Guess]): One for each row; they are changed. Log-probabilities do not have the bias in them.
    entity_bias (float): Added to the logit of beginning an entity.
    """
    active = list(guesses)
    while active:
        for guess in active:
            guess.write()
        answers = _decide(model, passes, active, entity_bias)
        going_on = [place for place, (guess, answer) in enumerate(zip(active, answers)) if not guess.settle(*answer)]
        if len(going_on) < len(active):
            passes.keep(torch.tensor(going_on, dtype=torch.long, device=model.device))
            active = [active[place] for place in going_on]


def _decide(
    model: Any, passes: Passes, guesses: Sequence[Guess], entity_bias: float
) -> List[Tuple[List[int], List[float]]]:
    """For each guess, the best choice at each of its open decisions and its log-probability."""
    flat = [(row, decision) for row, guess in enumerate(guesses) for decision in guess.open]
    if not flat:
        return [([], []) for _ in guesses]
    starts = [guess.start for guess in guesses]
    hidden = passes.hidden([guess.tokens for guess in guesses], starts)
    at = torch.tensor([[row, decision.place - starts[row]] for row, decision in flat], device=hidden.device)
    allowed, _ = pad_right([decision.allowed for _, decision in flat], hidden.device, -1)
    opens, _ = pad_right([decision.opens for _, decision in flat], hidden.device)
    logits = allowed_logits(model, hidden[at[:, 0], at[:, 1]], allowed)
    best, scores = best_allowed(logits, opens, entity_bias)
    chosen, values = iter(best.tolist()), iter(scores.tolist())
    return [([next(chosen) for _ in guess.open], [next(values) for _ in guess.open]) for guess in guesses]


def best_allowed(logits: Tensor, opens: Tensor, entity_bias: float) -> Tuple[Tensor, Tensor]:
    """The best choice of each row, with a bias for beginning an entity, and its log-probability without.

    logits (Tensor): [n, choices], -inf for none. opens (Tensor): Which of them begin an entity, [n, choices].
    RETURNS (Tuple[Tensor, Tensor]): Places among the choices and natural log-probabilities, both [n].
    """
    best = (logits + entity_bias * opens).argmax(-1)
    return best, logits.log_softmax(-1).gather(-1, best[:, None])[:, 0]


def allowed_logits(model: Any, hidden: Tensor, allowed: Tensor) -> Tensor:
    """Logits of some tokens alone, where they are the decoder's output times the output layer's matrix.

    model (Any): A transformers model.
    hidden (Tensor): Its decoder's output, [n, width].
    allowed (Tensor): The token ids that are looked at in each row, [n, choices], -1 for none.
    RETURNS (Tensor): [n, choices], float32, -inf for none.
    """
    tokens, places = allowed.clamp_min(0).unique(return_inverse=True)
    logits = torch.nn.functional.linear(hidden, model.get_output_embeddings().weight[tokens]).float()
    bias: Optional[Tensor] = getattr(model, "final_logits_bias", None)
    if bias is not None:
        logits = logits + bias[0][tokens].float()
    return logits.gather(1, places).masked_fill(allowed < 0, float("-inf"))


@torch.inference_mode()
def can_decode(model: Any) -> bool:
    """Whether this model's logits are its decoder's output times the output embeddings, and its cache can be cut back."""
    if model.get_output_embeddings() is None:
        return False
    if not model.config.is_encoder_decoder:
        return _causal_can(model)
    if decoder_start(model) is None:
        return False
    ids = torch.tensor([[decoder_start(model)]], device=model.device)
    whole = model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits[0]
    return _same(model, Seq2SeqPasses(model, ids.tolist()).hidden([[0]], [0])[0], whole)


def _causal_can(model: Any) -> bool:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    ids = torch.arange(8, device=model.device)[None] % model.get_output_embeddings().weight.shape[0]
    cache = DynamicCache(config=model.config)
    whole = model(input_ids=ids, use_cache=True, **{cache_argument(model): cache}).logits[0]
    if any(type(layer) is not DynamicLayer for layer in cache.layers):  # sliding windows forget what lies before
        return False
    passes = CausalPasses(model, DynamicCache(config=model.config), 0, ids[:, :1].tolist())
    (answer,) = ids[:, 1:].tolist()
    first = passes.hidden([[*answer[:3], *reversed(answer[3:])]], [0])[0, :4]
    mended = passes.hidden([answer], [3])[0]  # behind what was read and does not hold any more
    return _same(model, torch.cat([first[:3], mended]), whole[:-1])


def _same(model: Any, hidden: Tensor, logits: Tensor) -> bool:
    """Whether these are the logits [n, vocab] that we make of the decoder's output [n, width]."""
    every = torch.arange(logits.shape[1], device=logits.device)
    ours, whole = allowed_logits(model, hidden, every.expand(len(hidden), -1)), logits.float()
    return torch.allclose(whole, ours, rtol=0.02, atol=0.02 * float(whole.std()) + 1e-6)
