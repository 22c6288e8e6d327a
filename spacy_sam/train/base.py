"""A small base from given weights: a pretrained encoder's knowledge in a standard causal decoder.

No small pretrained causal LM has to be fetched. The layers of a BERT-shaped encoder (MiniLM) are the layers of an OPT
decoder with its normalisation after each block (`do_layer_norm_before=False`, as in OPT-350m), so they are moved over as
they are; the word vectors move onto a new cased byte-level vocabulary: a token's vector is the mean of the vectors of the
word pieces that the encoder's tokenizer makes of it. Capital letters and white space, which the encoder throws away,
can then be learned.
"""

from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

PAD, END = "<|pad|>", "<|end|>"
POSITION_OFFSET = 2  # OPT keeps its first two position vectors free


def build_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int, encoder_path: Optional[Path] = None
) -> PreTrainedTokenizerFast:
    """Learn a cased byte-level BPE vocabulary from texts and, if there is an encoder, from the words it knows.

    The encoder's words (in vocabulary order, which is by frequency) are counted in by Zipf's law, as they are and
    capitalised, so that general English gets whole tokens even where `texts` come from narrow domains.

    texts (Iterable[str]): Training texts.
    vocab_size (int): Number of tokens, special ones included.
    max_length (int): The base's context in tokens.
    encoder_path (Optional[Path]): Folder of the encoder with its tokenizer.
    RETURNS (PreTrainedTokenizerFast): Lossless on any text; pad and end tokens set.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    spaced = (f" {text}" for text in texts)
    tokenizer.train_from_iterator(_with_general_words(spaced, encoder_path) if encoder_path else spaced, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def random_llama(tokenizer: PreTrainedTokenizerFast, hidden_size: int, n_layers: int, n_heads: int) -> LlamaForCausalLM:
    """A small Llama from nothing, for trying things out. RETURNS (LlamaForCausalLM): float32, embeddings tied."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def _with_general_words(texts: Iterable[str], encoder_path: Path) -> Iterator[str]:
    n_words = 0
    for text in texts:
        n_words += text.count(" ") + 1
        yield text
    vocab = AutoTokenizer.from_pretrained(encoder_path, local_files_only=True).get_vocab()
    words = [word for word, _ in sorted(vocab.items(), key=lambda item: item[1]) if word.isalpha() and len(word) > 1]
    harmonic = sum(1 / (rank + 50) for rank in range(len(words)))
    counts: Counter = Counter()
    for rank, word in enumerate(words):
        count = max(1, round(n_words / harmonic / (rank + 50)))
        counts[word] += count
        counts[word.capitalize()] += max(1, count // 4)
    for word, count in counts.items():
        yield f" {word}" * count


def decoder_from_encoder(tokenizer: PreTrainedTokenizerFast, encoder_path: Path) -> OPTForCausalLM:
    """Make the causal decoder that starts from a BERT-shaped encoder's weights.

    tokenizer (PreTrainedTokenizerFast): The vocabulary the decoder is to use.
    encoder_path (Path): Folder of a `BertModel` with its tokenizer.
    RETURNS (OPTForCausalLM): float32, input and output embeddings tied, not yet trained as a decoder.
    """
    encoder = AutoModel.from_pretrained(encoder_path, local_files_only=True, dtype=torch.float32)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=encoder.config.hidden_size,
        num_hidden_layers=encoder.config.num_hidden_layers,
        ffn_dim=encoder.config.intermediate_size,
        num_attention_heads=encoder.config.num_attention_heads,
        max_position_embeddings=encoder.config.max_position_embeddings,
        activation_function=encoder.config.hidden_act,
        do_layer_norm_before=False,
        dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    decoder = OPTForCausalLM(config)
    with torch.no_grad():
        _move_embeddings(encoder, decoder, tokenizer, encoder_path)
        for source, target in zip(encoder.encoder.layer, decoder.model.decoder.layers):
            _move_layer(source, target)
        # The tied output layer has no trained head: start with small logits.
        last = decoder.model.decoder.layers[-1].final_layer_norm
        last.weight.mul_(0.2)
        last.bias.mul_(0.2)
    return decoder


def _move_layer(source: Any, target: Any) -> None:
    pairs = [
        (source.attention.self.query, target.self_attn.q_proj),
        (source.attention.self.key, target.self_attn.k_proj),
        (source.attention.self.value, target.self_attn.v_proj),
        (source.attention.output.dense, target.self_attn.out_proj),
        (source.attention.output.LayerNorm, target.self_attn_layer_norm),
        (source.intermediate.dense, target.fc1),
        (source.output.dense, target.fc2),
        (source.output.LayerNorm, target.final_layer_norm),
    ]
    for old, new in pairs:
        new.load_state_dict(old.state_dict())


def _move_embeddings(encoder: Any, decoder: OPTForCausalLM, tokenizer: Any, encoder_path: Path) -> None:
    """Fold the encoder's embedding normalisation, which OPT lacks, into the word and position vectors."""
    embeddings = encoder.embeddings
    norm = embeddings.LayerNorm
    typed = embeddings.word_embeddings.weight + embeddings.token_type_embeddings.weight[0]
    positions = embeddings.position_embeddings.weight
    mean_position = positions.mean(0)
    centred = _mean_piece_vectors(typed, tokenizer, encoder_path) + mean_position
    spread = centred.std(1, unbiased=False, keepdim=True).clamp_min(1e-6)
    words = (centred - centred.mean(1, keepdim=True)) / spread * norm.weight + norm.bias
    shifted = positions - mean_position
    placed = (shifted - shifted.mean(1, keepdim=True)) / spread.mean() * norm.weight
    decoder.model.decoder.embed_tokens.weight.copy_(words)
    decoder.model.decoder.embed_positions.weight[POSITION_OFFSET:].copy_(placed)


def _mean_piece_vectors(vectors: torch.Tensor, tokenizer: Any, encoder_path: Path) -> torch.Tensor:
    """Mean of the encoder's word-piece vectors for each token. RETURNS (Tensor): [vocab, hidden], float32."""
    pieces = AutoTokenizer.from_pretrained(encoder_path, local_files_only=True)
    vocab, unknown = pieces.get_vocab(), pieces.unk_token_id
    rows: List[torch.Tensor] = []
    for token_id in range(len(tokenizer)):
        text = tokenizer.decode([token_id])
        ids = _piece_ids(pieces, vocab, text)
        known = [i for i in ids if i != unknown]
        rows.append(vectors[known].mean(0) if known else vectors[unknown])
    return torch.stack(rows)


def _piece_ids(pieces: Any, vocab: Dict[str, int], text: str) -> List[int]:
    if text.startswith(" ") or not text[:1].isalnum():
        return pieces(text, add_special_tokens=False)["input_ids"]
    # No space before it: the token goes on with a word, so ask for its pieces inside one.
    whole = vocab.get("##" + text.lower())
    return [whole] if whole is not None else pieces(text, add_special_tokens=False)["input_ids"]
