"""The loss under a grammar: cross entropy over what it allows, without the logits of all other tokens."""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer

from ..generate.constrain import Grammar
from ..generate.parallel import allowed_logits
from .data import IGNORED, Example


def choices(
    examples: Sequence[Example], grammar: Optional[Grammar], *, left: bool, label_weight: float = 1.0
) -> Dict[str, torch.Tensor]:
    """What the grammar allows in place of each token of the answers, and which of it is right.

    left (bool): Answers are padded on the left.
    label_weight (float): What a decision about a label counts for in the loss; others count 1.
    RETURNS (Dict[str, Tensor]): "choices" [rows, longest answer, most choices], padded with -1; "chosen" [rows, longest
        answer], the place of the right one among them, IGNORED where it is forced; "weights" [rows, longest answer], what
        each decision counts for in the loss. Nothing without a grammar.
    """
    if grammar is None:
        return {}
    rows = [_walk(grammar, example) for example in examples]
    width, most = max(map(len, rows)), max(len(step.allowed) for row in rows for step in row)
    found = torch.full((len(rows), width, most), -1)
    chosen = torch.full((len(rows), width), IGNORED)
    weights = torch.ones(len(rows), width)
    for number, row in enumerate(rows):
        offset = width - len(row) if left else 0
        for at, step in enumerate(row, offset):
            if len(step.allowed) > 1:
                found[number, at, : len(step.allowed)] = torch.tensor(step.allowed)
                chosen[number, at] = step.place
                weights[number, at] = label_weight if step.in_label else 1.0
    return {"choices": found, "chosen": chosen, "weights": weights}


class Step(NamedTuple):
    """What the grammar allows in place of one token, which of it is right, and whether it is about a label."""

    allowed: Tuple[int, ...]
    place: int
    in_label: bool


def _walk(grammar: Grammar, example: Example) -> List[Step]:
    walk = grammar.walk(example.labels, example.text)
    steps: List[Step] = []
    for token in example.input_ids[example.n_prompt :]:
        allowed = walk.allowed()
        steps.append(Step(allowed, allowed.index(token), walk.in_label))
        walk.advance(token)
    return steps


def grammar_loss(
    logits: torch.Tensor, choices: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Cross entropy over what the grammar allows: weighted mean over the tokens that it does not force.

    logits (Tensor): [rows, answer, vocab]. choices, chosen, weights: See `choices`.
    """
    decided = chosen != IGNORED
    allowed = logits[decided].gather(1, choices[decided].clamp_min(0)).float()
    allowed = allowed.masked_fill(choices[decided] < 0, float("-inf"))
    return _weighted_mean(allowed, chosen[decided], weights[decided])


def _weighted_mean(allowed: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (cross_entropy(allowed, chosen, reduction="none") * weights).sum() / weights.sum()


class GrammarTrainer(Trainer):
    """Trains under a grammar, if the batch says what it allows.

    Most of a vocabulary's logits are never looked at. Where logits are the last states times a matrix, which is seen at
    the first batch, only those of the tokens that are allowed anywhere in the batch are computed.
    """

    _is_plain: Optional[bool] = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any) -> Any:
        if "choices" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        given = {key: inputs[key] for key in inputs if key not in ("choices", "chosen", "weights", "labels")}
        if "logits_to_keep" not in given:  # an encoder-decoder: its answers go in beside the prompt
            given["decoder_input_ids"] = _shifted(inputs["labels"], model)
        choices, chosen, weights = inputs["choices"], inputs["chosen"], inputs["weights"]
        if self._is_plain is None:
            self._is_plain = _has_plain_head(model, given)
        if self._is_plain and not return_outputs:
            decided = chosen != IGNORED
            with self.accelerator.autocast():
                states = _last_states(model, given)[decided]
                allowed = allowed_logits(_inside(model), states, choices[decided])
                return _weighted_mean(allowed, chosen[decided], weights[decided])
        logits = _of_answer(model(**given).logits, given)
        loss = grammar_loss(logits, choices, chosen, weights)
        return (loss, {"logits": logits}) if return_outputs else loss


def _shifted(labels: torch.Tensor, model: Any) -> torch.Tensor:
    """Answers [rows, length] behind the decoder's start token, without their last token."""
    config = getattr(model, "module", model).config
    begun = torch.full_like(labels[:, :1], config.decoder_start_token_id)
    return torch.cat([begun, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, config.pad_token_id)], dim=1)


def _of_answer(values: torch.Tensor, given: Dict[str, Any]) -> torch.Tensor:
    """A causal model's logits and states stand one place before what they predict."""
    return values[:, -given["logits_to_keep"] : -1] if "logits_to_keep" in given else values


def _inside(model: Any) -> Any:
    """The transformers model, with its adapter if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _last_states(model: Any, given: Dict[str, Any]) -> torch.Tensor:
    """What the output layer would get for the answers: [rows, answer, hidden]."""
    inputs = {key: value for key, value in given.items() if key != "logits_to_keep"}
    return _of_answer(_inside(model).base_model(**inputs).last_hidden_state, given)


@torch.no_grad()
def _has_plain_head(model: Any, given: Dict[str, Any]) -> bool:
    """Whether logits are the last states times the output layer's matrix, without scale, cap or adapter.

    Seen by the first row of a batch. A model that is wrapped, say by DistributedDataParallel, must be called as a whole.
    """
    inside = _inside(model)
    if hasattr(model, "module") or type(inside.get_output_embeddings()) is not torch.nn.Linear:
        return False
    if getattr(inside.config, "final_logit_softcapping", None):  # small logits would not show it
        return False
    row = {key: value[:1] if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    was_training = inside.training
    inside.eval()
    # Trainer puts autocast around the forward of the instance; the class's has none.
    logits = _of_answer(type(inside).forward(inside, **row).logits, row)[0, -4:]
    states = _last_states(inside, row)[0, -4:]
    inside.train(was_training)
    everything = torch.arange(logits.shape[-1], device=states.device).expand(len(states), -1)
    found = allowed_logits(inside, states, everything)
    return torch.allclose(logits, found, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
