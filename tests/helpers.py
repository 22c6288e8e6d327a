"""Small banks made on the spot: a random base, random LoRA experts, no network, about a second."""

import shutil
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Sequence, Union

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from spacy_sam.bank import ExpertBank
from spacy_sam.models import auto_model
from spacy_sam.plan import Centroid, Corpus, Expert, Score
from spacy_sam.train.run import peft_task

PAD, END = "<|pad|>", "<|end|>"
ENCODER = "test-encoder"
ENCODER_DIMENSION = 8
CONTEXT = 512
PROMPT = {"name": "spacy_sam.Lines.v1", "instruction": ""}
# Initial weights ten times larger than usual: a random model then prefers some tokens clearly, and batched and
# single runs agree on its greedy choice in spite of rounding.
INIT_RANGE = 0.2
WORD_PIECES = "the a in types text entities person place anna bern sand wal ##wich ##nut ##er ##ing ##s"
SENTENCES = (
    "Anna Keller moved from Bern to a small town near Lisbon last spring.",
    "The ferry between Dover and Calais was late, so Omar Haddad took the train to Paris.",
    "In Nairobi, Grace Wanjiru opened a school; in Kyoto, her brother Daniel runs a bakery.",
    "Types: person; place\nText: Lena met Jakob in Prague.\nEntities:\n Lena | person\n Prague | place\n",
    "Types: river; lake; mountain\nText: The Rhone leaves Lake Geneva.\nEntities:\n Rhone | river\n",
    "Café Müller in Zürich sells 1,250 cakes a week; Señora Ibáñez buys three of them.",
)


def make_tiny_bank(
    path: Union[str, Path],
    n_experts: int = 3,
    architecture: str = "llama",
    seed: int = 0,
    labels: Sequence[str] = ("person", "place"),
    prompt: Mapping[str, Any] = PROMPT,
) -> ExpertBank:
    """Build a bank of random experts named `expert0`, `expert1`, ... around a random base in `path/base`.

    path (Union[str, Path]): The folder of the bank.
    n_experts (int): How many experts it gets.
    architecture (str): "llama" (grouped queries, untied head), "opt" (norm after each block, tied head), "gpt2",
        "bart" (an encoder-decoder, tied head) or "tagger" (see `spacy_sam.generate.tagging`).
    seed (int): Decides every weight and centroid; torch's global random state is left as it was.
    labels (Sequence[str]): The labels on every expert's card.
    prompt (Mapping[str, Any]): The bank's prompt format.
    RETURNS (ExpertBank): The bank, opened.
    """
    path = Path(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_base(path / "base", architecture)
    bank = ExpertBank.create(path, base="base", prompt=prompt, encoder=ENCODER, name="tiny")
    for number in range(n_experts):
        adapter = save_adapter(path / f".adapter{number}", path / "base", seed=1000 * (seed + 1) + number)
        bank.add(f"expert{number}", adapter, make_card(bank, number, labels, seed))
        shutil.rmtree(adapter)
    return bank


def make_card(bank: ExpertBank, number: int, labels: Sequence[str] = ("person", "place"), seed: int = 0) -> Expert:
    """A card for `expert<number>`, with a random centroid of the fake encoder "test-encoder"."""
    generator = torch.Generator().manual_seed(7919 * (seed + 1) + number)
    vector = tuple(torch.randn(ENCODER_DIMENSION, generator=generator).tolist())
    return Expert(
        name=f"expert{number}",
        domain=f"domain{number}",
        labels=tuple(labels),
        base_hash=bank.base_hash,
        corpora=(Corpus(f"corpus{number}", 10, tuple(labels)),),
        lora={"rank": 4, "alpha": 8},
        prompt=dict(bank.prompt),
        centroid=Centroid(ENCODER, 10, vector),
        scores={"dev": Score(0.5, 0.5, 0.5, 10)},
    )


def save_base(folder: Path, architecture: str = "llama") -> None:
    """Save a random tiny model (hidden 32, 2 layers, context 512) and its tokenizer; torch's seed decides it."""
    disable_progress_bar()
    tokenizer = make_tokenizer()
    ids: Dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    model = ARCHITECTURES[architecture](ids)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: pad and end tokens, no begin token, padded on the left."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_encoder(folder: Union[str, Path], n_layers: int = 4) -> Path:
    """Save a random tiny uncased BERT (hidden 16) with word pieces for a few words and letters. RETURNS (Path): `folder`."""
    disable_progress_bar()
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,;:|()'", *letters, *WORD_PIECES.split()]
    pieces += [f"##{letter}" for letter in (*letters, *".,;:|()'")]  # those of signs are never used
    tokenizer = BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, do_lower_case=True)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=n_layers,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=INIT_RANGE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def save_adapter(folder: Union[str, Path], base_folder: Union[str, Path], seed: int = 0, **lora_kwargs: Any) -> Path:
    """Write a LoRA adapter whose weight change is not zero.

    folder (Union[str, Path]): Where to write the PEFT folder.
    base_folder (Union[str, Path]): The base it belongs to.
    seed (int): Decides the factors.
    lora_kwargs (Any): Settings of `peft.LoraConfig` other than rank 4, alpha 8 and all linear layers, for odd adapters.
    RETURNS (Path): `folder`.
    """
    disable_progress_bar()
    model = load_model(base_folder)
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "task_type": peft_task(model.config),
        "fan_in_fan_out": model.config.model_type == "gpt2",
        **lora_kwargs,
    }
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of odd adapters, and asks transformers a deprecated question
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if (
                    "lora_B" in name
                    or "lora_embedding_A" in name
                    or (parameter.requires_grad and name.endswith("bias"))
                ):
                    parameter.normal_(0, INIT_RANGE)
        peft_model.save_pretrained(folder)
    return Path(folder)


def load_model(folder: Union[str, Path], dtype: torch.dtype = torch.float32) -> Any:
    """A base of any kind, as transformers loads it, in evaluation mode."""
    return auto_model(str(folder)).from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def _llama(ids: Mapping[str, Any]) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=INIT_RANGE,
        **ids,
    )
    return LlamaForCausalLM(config)


def _opt(ids: Mapping[str, Any]) -> OPTForCausalLM:
    config = OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        do_layer_norm_before=False,
        dropout=0.0,
        init_std=INIT_RANGE,
        **ids,
    )
    return OPTForCausalLM(config)


def _gpt2(ids: Mapping[str, Any]) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=INIT_RANGE,
        **ids,
    )
    return GPT2LMHeadModel(config)


def _bart(ids: Mapping[str, Any]) -> BartForConditionalGeneration:
    config = BartConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
        init_std=INIT_RANGE,
        decoder_start_token_id=ids["eos_token_id"],
        forced_eos_token_id=None,
        **ids,
    )
    return BartForConditionalGeneration(config)


def _tagger(ids: Mapping[str, Any]) -> BertForTokenClassification:
    config = BertConfig(
        vocab_size=ids["vocab_size"],
        pad_token_id=ids["pad_token_id"],
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=INIT_RANGE,
        num_labels=2 * 8 + 2,
    )
    return BertForTokenClassification(config)


ARCHITECTURES: Dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "llama": _llama,
    "opt": _opt,
    "gpt2": _gpt2,
    "bart": _bart,
    "tagger": _tagger,
}
