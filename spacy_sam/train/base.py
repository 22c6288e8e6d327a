"""A small base from given weights: a pretrained encoder, and a short decoder that starts from its layers.

No small pretrained generative model has to be fetched. The layers of a BERT-shaped encoder (MiniLM) are those of a BART
encoder, which also normalises after each block, so they are moved over as they are and give what they gave before; the
decoder's layers start from some of them, attention to the text included (Rothe et al. 2020, arXiv 1907.12461).
"""

from pathlib import Path
from typing import Any, List, Sequence, Tuple

import torch
from transformers import (
    AutoModel,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

POSITION_OFFSET = 2  # BART keeps its first two position vectors free
# Capitals are two directions in the space of word vectors, the same for all words, so that what is learned of one capitalised
# word holds for all. As long as this share of a mean word vector: seen by every layer, and little against what the word means.
CASE_LENGTH = 0.3
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


def seq2seq_from_encoder(
    tokenizer: PreTrainedTokenizerFast, pieces: Sequence[Tuple[int, ...]], encoder_path: Path, n_decoder_layers: int
) -> BartForConditionalGeneration:
    """Make the encoder-decoder that starts from a BERT-shaped encoder's weights.

    tokenizer (PreTrainedTokenizerFast): The vocabulary the model is to use.
    pieces (Sequence[Tuple[int, ...]]): For each of its tokens, the encoder's word pieces that it stands for.
    encoder_path (Path): Folder of a `BertModel`.
    n_decoder_layers (int): Layers of the decoder, started from layers at even distances, the last one among them.
    RETURNS (BartForConditionalGeneration): float32, all embeddings tied, the decoder not yet trained.
    """
    encoder = AutoModel.from_pretrained(encoder_path, local_files_only=True, dtype=torch.float32)
    model = BartForConditionalGeneration(_config(encoder.config, tokenizer, n_decoder_layers))
    with torch.no_grad():
        model.model.shared.weight.copy_(_word_vectors(encoder, pieces, tokenizer))
        for part in (model.model.encoder, model.model.decoder):
            _move_positions(encoder.embeddings, part)
        for source, target in zip(encoder.encoder.layer, model.model.encoder.layers):
            _move_layer(source, target)
        for source, target in zip(_evenly(encoder.encoder.layer, n_decoder_layers), model.model.decoder.layers):
            _move_layer(source, target)
            _move_attention(source.attention, target.encoder_attn, target.encoder_attn_layer_norm)
    return model


def _config(encoder: Any, tokenizer: PreTrainedTokenizerFast, n_decoder_layers: int) -> BartConfig:
    return BartConfig(
        vocab_size=len(tokenizer),
        d_model=encoder.hidden_size,
        encoder_layers=encoder.num_hidden_layers,
        decoder_layers=n_decoder_layers,
        encoder_ffn_dim=encoder.intermediate_size,
        decoder_ffn_dim=encoder.intermediate_size,
        encoder_attention_heads=encoder.num_attention_heads,
        decoder_attention_heads=encoder.num_attention_heads,
        max_position_embeddings=encoder.max_position_embeddings,
        activation_function=encoder.hidden_act,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
    )


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


def _move_positions(embeddings: Any, target: Any) -> None:
    """Position vectors with the vector of the first token type, which every token has, and their normalisation."""
    placed = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
    target.embed_positions.weight[POSITION_OFFSET:].copy_(placed)
    target.layernorm_embedding.load_state_dict(embeddings.LayerNorm.state_dict())


def _move_layer(source: Any, target: Any) -> None:
    _move_attention(source.attention, target.self_attn, target.self_attn_layer_norm)
    target.fc1.load_state_dict(source.intermediate.dense.state_dict())
    target.fc2.load_state_dict(source.output.dense.state_dict())
    target.final_layer_norm.load_state_dict(source.output.LayerNorm.state_dict())


def _move_attention(source: Any, target: Any, norm: Any) -> None:
    target.q_proj.load_state_dict(source.self.query.state_dict())
    target.k_proj.load_state_dict(source.self.key.state_dict())
    target.v_proj.load_state_dict(source.self.value.state_dict())
    target.out_proj.load_state_dict(source.output.dense.state_dict())
    norm.load_state_dict(source.output.LayerNorm.state_dict())


def _evenly(layers: Sequence[Any], count: int) -> List[Any]:
    return [layers[(number + 1) * len(layers) // count - 1] for number in range(count)]
