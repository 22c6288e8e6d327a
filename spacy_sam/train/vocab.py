"""Cased, lossless byte-level vocabularies: BPE learned from texts, or an encoder's own word pieces with capitals."""

import string
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, NamedTuple, Tuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

PAD, END = "<|pad|>", "<|end|>"
SPACE = "Ġ"  # how the byte-level alphabet writes a space
# A word or one sign, each with the space before it. A word is cut at 64 characters, so that no match is long.
WORDS = Regex(r" ?[\p{L}\p{N}\p{M}]{1,64}| ?[^\s\p{L}\p{N}\p{M}]|\s")
CONTINUES = "##"  # how a BERT vocabulary marks pieces inside a word


def build_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary.

    texts (Iterable[str]): Training texts.
    vocab_size (int): Number of tokens, special ones included.
    max_length (int): The base's context in tokens.
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
    tokenizer.train_from_iterator((f" {text}" for text in texts), trainer)
    return _finish(tokenizer, max_length)


class PieceVocabulary(NamedTuple):
    """A tokenizer, and for each of its tokens the word pieces of the encoder that it stands for."""

    tokenizer: PreTrainedTokenizerFast
    pieces: List[Tuple[int, ...]]


def cased_word_pieces(
    texts: Iterable[str], encoder_path: Path, vocab_size: int, max_length: int, marks: str = ""
) -> PieceVocabulary:
    """Make a cased vocabulary out of an uncased encoder's word pieces.

    A text is cut where the encoder's tokenizer cuts it, so that the encoder's vectors fit as they are. Each piece may be
    there in lower case, capitalised and in capitals, after a space and without one; the `vocab_size` forms that the texts
    and general English (the encoder's order is by frequency, counted in by Zipf's law) use most are kept.

    texts (Iterable[str]): Texts that show which forms are needed.
    encoder_path (Path): Folder of a BERT-shaped, uncased encoder's tokenizer.
    vocab_size (int): Number of tokens, special ones and the 256 bytes included.
    max_length (int): The base's context in tokens.
    marks (str): Characters of the answer format that get tokens of their own.
    RETURNS (PieceVocabulary): Lossless on any text; bytes have the pieces of their character, or the unknown one.
    """
    encoder = AutoTokenizer.from_pretrained(encoder_path, local_files_only=True)
    pieces: Dict[str, int] = encoder.get_vocab()
    forms = _forms(pieces)
    counts = _count(texts, _word_piece_tokenizer([*_alphabet(), *forms]))
    for form, count in _general_counts(pieces, sum(counts.values())):
        counts[form] += count
    ranked = sorted(forms, key=lambda form: (-counts[form], forms[form], form))
    alphabet = [*_alphabet(), *map(_bytes, marks)]
    bytes_ = set(alphabet)
    kept = [form for form in ranked if form not in bytes_][: vocab_size - len(alphabet) - 2]
    vocabulary = [PAD, END, *alphabet, *kept]
    unknown = (encoder.unk_token_id,)
    sources = [forms.get(token, unknown) for token in vocabulary]
    return PieceVocabulary(_finish(_word_piece_tokenizer(vocabulary), max_length), sources)


def _forms(pieces: Dict[str, int]) -> Dict[str, Tuple[int, ...]]:
    """Every cased form of every piece in the byte-level alphabet, with the piece's id."""
    found: Dict[str, Tuple[int, ...]] = {}
    for piece, number in sorted(pieces.items(), key=lambda item: item[1]):
        if piece.startswith("[") and piece.endswith("]") and len(piece) > 1:
            continue
        inside = piece.startswith(CONTINUES) and len(piece) > len(CONTINUES)
        text = piece[len(CONTINUES) :] if inside else piece
        if inside and _is_sign(text):
            continue  # the encoder's tokenizer parts signs from words, so this piece was never used
        for form in dict.fromkeys((text, text.capitalize(), text.upper())):
            if form.lower() != text:
                continue
            if not inside:
                found.setdefault(SPACE + _bytes(form), (number,))
                found.setdefault(_bytes(form), (number,))
            else:  # a form without a space is inside a word more often than after a sign
                found[_bytes(form)] = (number,)
    return found


def _is_sign(text: str) -> bool:
    """Whether a text is what a BERT tokenizer takes for punctuation."""
    return len(text) == 1 and (text in string.punctuation or unicodedata.category(text).startswith("P"))


def _general_counts(pieces: Dict[str, int], n_tokens: int) -> Iterator[Tuple[str, int]]:
    """As many words of general English as the texts have tokens, by Zipf's law; a fifth of them capitalised."""
    words = [word for word, _ in sorted(pieces.items(), key=lambda item: item[1]) if word.isalpha() and len(word) > 1]
    harmonic = sum(1 / (rank + 50) for rank in range(len(words)))
    for rank, word in enumerate(words):
        count = n_tokens / harmonic / (rank + 50)
        yield SPACE + _bytes(word), max(1, round(count))
        yield SPACE + _bytes(word.capitalize()), max(1, round(count / 5))


def _count(texts: Iterable[str], tokenizer: Tokenizer) -> Counter:
    counts: Counter = Counter()
    for text in texts:
        counts.update(tokenizer.encode(f" {text}", add_special_tokens=False).tokens)
    return counts


def _word_piece_tokenizer(vocabulary: Iterable[str]) -> Tokenizer:
    vocab = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    model = models.WordPiece(
        vocab, unk_token=next(iter(vocab)), max_input_chars_per_word=1000, continuing_subword_prefix=""
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _alphabet() -> List[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _bytes(text: str) -> str:
    """A text as the byte-level alphabet writes it."""
    ((written, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return written


def _finish(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
