"""Small bases that need no hub: a tagger from a pretrained encoder's weights, and a Llama from nothing."""

import copy
from pathlib import Path
from typing import Any, Sequence, Tuple

import torch
from transformers import (
    AutoModel,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ..generate.tagging import N_SINGLE

# Capitals are two directions in the space of word vectors, the same for all words, so that what is learned of one capitalised
# word holds for all. As long as this share of a mean word vector: seen by every layer, and little against what the word means.
CASE_LENGTH = 0.3
WORD_VECTORS = "embeddings.word_embeddings.weight"
POINTER_SCALE = 100.0  # the logit of a word for a type whose states are the word's own, at the beginning
NO_ENTITY = 4.0  # the logit of no entity at the beginning: most words are in none
FORM_SPREAD = 0.15  # how far apart the forms of one word piece start otherwise, in standard deviations of the vectors


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


def tagger_from_encoder(
    tokenizer: PreTrainedTokenizerFast, pieces: Sequence[Tuple[int, ...]], encoder_path: Path
) -> BertForTokenClassification:
    """Make the tagger (`generate.tagging`) that starts from a BERT-shaped encoder's weights.

    Queries and keys begin as the states themselves, so that a word is first compared with a type's name as a sentence encoder
    compares them, which is right far more often than chance.

    tokenizer (PreTrainedTokenizerFast): The vocabulary the model is to use.
    pieces (Sequence[Tuple[int, ...]]): For each of its tokens, the encoder's word pieces that it stands for.
    encoder_path (Path): Folder of a `BertModel`.
    RETURNS (BertForTokenClassification): float32, of 2 * hidden + 2 outputs, not yet trained.
    """
    encoder = AutoModel.from_pretrained(encoder_path, local_files_only=True, dtype=torch.float32)
    size = encoder.config.hidden_size
    config = copy.deepcopy(encoder.config)
    config.update(
        {
            "vocab_size": len(tokenizer),
            "num_labels": 2 * size + N_SINGLE,
            "pad_token_id": tokenizer.pad_token_id,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "classifier_dropout": 0.0,
        }
    )
    model = BertForTokenClassification(config)
    own = {key: value for key, value in encoder.state_dict().items() if not key.startswith(("pooler.", WORD_VECTORS))}
    own[WORD_VECTORS] = _word_vectors(encoder, pieces, tokenizer)
    last = encoder.encoder.layer[-1].output.LayerNorm
    with torch.no_grad():
        scale = (POINTER_SCALE / float(last.weight.square().sum() + last.bias.square().sum())) ** 0.5
        model.bert.load_state_dict(own)
        model.classifier.weight.zero_()
        model.classifier.weight[: 2 * size].copy_(scale * torch.eye(size).repeat(2, 1))
        model.classifier.bias.zero_()
        model.classifier.bias[2 * size] = NO_ENTITY
    return model


def _word_vectors(encoder: Any, pieces: Sequence[Tuple[int, ...]], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """[vocab, hidden]: the mean of each token's pieces, a direction for capitals, and a little noise of its own."""
    vectors = encoder.embeddings.word_embeddings.weight
    moved = torch.stack([vectors[list(ids)].mean(0) for ids in pieces])
    directions = torch.nn.functional.normalize(torch.randn(2, moved.shape[1]), dim=1)
    words = [
        tokenizer.convert_tokens_to_string([token]).strip()
        for token in tokenizer.convert_ids_to_tokens(list(range(len(pieces))))
    ]
    cases = torch.tensor([[_is_capitalised(word), _is_in_capitals(word)] for word in words], dtype=moved.dtype)
    moved = moved + CASE_LENGTH * vectors.norm(dim=1).mean() * cases @ directions
    return moved + FORM_SPREAD * vectors.std() * torch.randn(moved.shape)


def _is_capitalised(word: str) -> bool:
    return word[:1].isupper() and not _is_in_capitals(word)


def _is_in_capitals(word: str) -> bool:
    return len(word) > 1 and word.isupper()
