"""What a bank's own base starts from: lossless cased vocabularies, and the tagger made from an encoder."""

import copy
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from helpers import SENTENCES, load_model
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from spacy_sam.corpora import read_records
from spacy_sam.models import is_tagger
from spacy_sam.prompts import LinesFormat, PromptEncoder
from spacy_sam.select.encoder import offline_encoder_path
from spacy_sam.train.base import tagger_from_encoder
from spacy_sam.train.run import save_base
from spacy_sam.train.vocab import END, PAD, PieceVocabulary, build_tokenizer, cased_word_pieces

DEMO = Path(__file__).parents[1] / "assets" / "demo"
MINILM = offline_encoder_path()
CONTEXT = 128
TEXT = "the sandwich, in bern; the walnuts (in the sand)."
needs_minilm = pytest.mark.skipif(MINILM is None, reason="the offline extra is not installed")


@pytest.fixture(scope="module")
def vocabulary(tiny_encoder_path) -> PieceVocabulary:
    """All forms of the tiny encoder's pieces."""
    return cased_word_pieces(SENTENCES, tiny_encoder_path, 100_000, CONTEXT)


@pytest.fixture(scope="module")
def minilm() -> PieceVocabulary:
    """Most forms of MiniLM's word pieces."""
    return cased_word_pieces(demo_texts(), Path(str(MINILM)), 100_000, CONTEXT)


@pytest.fixture(scope="module")
def tokenizers(vocabulary, tiny_encoder_path) -> Dict[str, Any]:
    """Of every kind, large and small."""
    return {
        "learned": build_tokenizer(SENTENCES, 400, CONTEXT),
        "pieces": vocabulary.tokenizer,
        "few pieces": cased_word_pieces(SENTENCES, tiny_encoder_path, 300, CONTEXT).tokenizer,
    }


def demo_texts() -> List[str]:
    return [record.text for path in sorted(DEMO.glob("*.train.jsonl")) for record in read_records(path)]


def ids_of(tokenizer: Any, text: str) -> List[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def tokens_of(tokenizer: Any, text: str) -> List[str]:
    return tokenizer.convert_ids_to_tokens(ids_of(tokenizer, text))


def pieces_of(vocabulary: PieceVocabulary, text: str) -> List[int]:
    """The encoder's pieces that the tokens of a text stand for, which follows a space."""
    return [piece for number in ids_of(vocabulary.tokenizer, f" {text}") for piece in vocabulary.pieces[number]]


# Vocabularies

ODD = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
NEAR = st.text(st.sampled_from(" \n\t\r\x85\u2028\u3000aBß.,;|<>#ĠĊée\u0301\u200d😀東1²"), max_size=60)


@given(ODD | NEAR)
@example("")
@example("  two  spaces ")
@example(f"{END}{PAD} [UNK] [SEP] ##wich")
@example("x" * 300 + "é" * 300 + "😀" * 300)
@example(" \r\n\t\x00\x7f\u2028")
def test_vocabulary_is_lossless(tokenizers, text):
    for tokenizer in tokenizers.values():
        encoder = PromptEncoder(tokenizer, LinesFormat())
        ids = encoder.plain(text)
        assert encoder.decode(ids)[0] == text
        assert not {tokenizer.pad_token_id, tokenizer.eos_token_id} & set(ids)


@pytest.mark.parametrize("size", [258, 300, 333])
def test_vocabulary_has_the_size_asked(tiny_encoder_path, size):
    tokenizer, pieces = cased_word_pieces(SENTENCES, tiny_encoder_path, size, CONTEXT)
    assert len(tokenizer) == len(pieces) == size
    assert sorted(tokenizer.get_vocab().values()) == list(range(size))
    assert len(build_tokenizer(SENTENCES, size, CONTEXT)) == size


def test_vocabulary_is_as_large_as_there_are_forms(vocabulary):
    assert 350 < len(vocabulary.tokenizer) == len(vocabulary.pieces) < 500


def test_vocabulary_keeps_the_forms_that_the_texts_use(tiny_encoder_path):
    texts = ["Sandwich", "WALNUT"]
    for size in (300, 320):
        tokenizer = cased_word_pieces(100 * texts, tiny_encoder_path, size, CONTEXT).tokenizer
        assert tokens_of(tokenizer, " Sandwich WALNUT") == ["ĠSand", "wich", "ĠWAL", "NUT"]


@pytest.mark.parametrize("kind", ["learned", "pieces"])
def test_vocabulary_settings(tokenizers, kind, tmp_path):
    """What the tokenizer is for is kept when it is saved."""
    tokenizers[kind].save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer in (tokenizers[kind], loaded):
        assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, END)
        assert (tokenizer.bos_token_id, tokenizer.model_max_length) == (None, CONTEXT)
    for text in (*SENTENCES, f"{END}  ?"):
        assert ids_of(loaded, text) == ids_of(tokenizers[kind], text)
        assert loaded.decode(ids_of(loaded, text)) == text


def test_vocabulary_cuts_where_the_encoder_does(vocabulary, tiny_encoder_path):
    """With the encoder's own pieces, signs after words among them, whatever the case."""
    encoder = AutoTokenizer.from_pretrained(tiny_encoder_path)
    wanted = ids_of(encoder, TEXT)
    assert encoder.unk_token_id not in wanted
    for text in (TEXT, TEXT.title(), TEXT.upper()):
        assert pieces_of(vocabulary, text) == wanted
    assert len({tuple(ids_of(vocabulary.tokenizer, text)) for text in (TEXT, TEXT.title(), TEXT.upper())}) == 3


@needs_minilm
def test_vocabulary_cuts_where_minilm_does(minilm):
    """Words that MiniLM knows stay whole; of others, few are cut elsewhere: a token says not whether it begins a word."""
    encoder = AutoTokenizer.from_pretrained(str(MINILM))
    known = encoder.get_vocab()
    words = sorted(
        {word for text in demo_texts() for word in text.lower().split() if word.isascii() and word.isalpha()}
    )
    same = {word: pieces_of(minilm, word) == ids_of(encoder, word) for word in words}
    whole = [word for word in words if word in known]
    assert 200 < len(whole) < len(words)
    assert all(same[word] for word in whole)
    assert sum(same.values()) > 0.95 * len(words)
    assert pieces_of(minilm, "so: a | b), c; d.") == ids_of(encoder, "so: a | b), c; d.")


# The base


@pytest.fixture(scope="module")
def base(vocabulary, tiny_encoder_path) -> Any:
    torch.manual_seed(0)
    return tagger_from_encoder(vocabulary.tokenizer, vocabulary.pieces, tiny_encoder_path).eval()


@pytest.fixture(scope="module")
def encoder(tiny_encoder_path) -> Any:
    return AutoModel.from_pretrained(tiny_encoder_path).eval()


@torch.no_grad()
def test_base_encoder_gives_what_it_gave(base, encoder, vocabulary):
    """Its layers, positions and normalisation, exactly; rows that are padded, too."""
    ids = [pieces_of(vocabulary, text) for text in (TEXT, "in bern")]
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    vectors = encoder.embeddings.word_embeddings(padded)
    wanted = encoder(inputs_embeds=vectors, attention_mask=mask).last_hidden_state
    found = base.bert(inputs_embeds=vectors, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_base_word_vectors_are_the_encoder_s_and_can_be_told_apart(base, encoder, vocabulary):
    own, given = base.get_input_embeddings().weight, encoder.embeddings.word_embeddings.weight
    wanted = torch.stack([given[list(ids)].mean(0) for ids in vocabulary.pieces])
    assert cosine_similarity(own, wanted, dim=-1).min() > 0.7
    assert len({tuple(row) for row in own.tolist()}) == len(own)


@torch.no_grad()
def test_base_capitals_are_a_direction(base, encoder, vocabulary):
    """The same for all words, so that a word never seen with a capital is known to have one; in capitals is another."""
    own, given = base.get_input_embeddings().weight, encoder.embeddings.word_embeddings.weight
    moved = own - torch.stack([given[list(ids)].mean(0) for ids in vocabulary.pieces])
    tokens = vocabulary.tokenizer.convert_ids_to_tokens(range(len(own)))
    words = [vocabulary.tokenizer.convert_tokens_to_string([token]).strip() for token in tokens]
    forms = {
        "lower": [at for at, word in enumerate(words) if word.islower() and len(word) > 1],
        "title": [at for at, word in enumerate(words) if word.istitle()],
        "upper": [at for at, word in enumerate(words) if word.isupper() and len(word) > 1],
    }
    means = {name: moved[places].mean(0) for name, places in forms.items()}
    for name, places in forms.items():
        assert len(places) > 5
        near = cosine_similarity(moved[places], means[name][None], dim=-1)
        assert near.mean() < 0.6 if name == "lower" else near.min() > 0.6
    assert abs(cosine_similarity(means["title"], means["upper"], dim=0)) < 0.5


@torch.no_grad()
def test_base_compares_states_at_the_beginning(base, vocabulary):
    """Queries and keys are the states times one number; no entity is likelier than any, and nothing begins or goes on."""
    ids = torch.tensor([pieces_of(vocabulary, TEXT)])
    states = base.bert(ids).last_hidden_state[0]
    outputs = base(ids).logits[0]
    size = states.shape[1]
    queries, keys, rest = outputs[:, :size], outputs[:, size : 2 * size], outputs[:, 2 * size :]
    torch.testing.assert_close(queries, keys)
    torch.testing.assert_close(queries, states * (queries[0, 0] / states[0, 0]))
    assert rest.shape[1] == 2
    assert torch.equal(rest, rest[:1].expand_as(rest))
    assert rest[0, 0] > 0 == rest[0, 1]


def test_base_on_disk(base, vocabulary, tmp_path):
    """Saved, it loads as a tagger that says the same, in bfloat16's precision."""
    wanted = copy.deepcopy(base).to(torch.bfloat16).to(torch.float32)
    save_base(copy.deepcopy(base), vocabulary.tokenizer, tmp_path / "base")
    loaded = load_model(tmp_path / "base")
    assert is_tagger(loaded.config)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, wanted(ids).logits)


@needs_minilm
@torch.no_grad()
def test_base_from_minilm_encodes_lower_case_text_as_minilm_does(minilm):
    """Nearly: the cased forms of a piece start a little apart."""
    torch.manual_seed(0)
    base = tagger_from_encoder(minilm.tokenizer, minilm.pieces, Path(str(MINILM))).eval()
    encoder, tokenizer = AutoModel.from_pretrained(str(MINILM)).eval(), AutoTokenizer.from_pretrained(str(MINILM))
    for text in ("the president of france met the band in london, they said.", "types: person; place | so ( text )"):
        ids = torch.tensor([ids_of(tokenizer, text)])
        wanted = encoder(input_ids=ids).last_hidden_state
        found = base.bert(torch.tensor([ids_of(minilm.tokenizer, f" {text}")])).last_hidden_state
        assert cosine_similarity(found, wanted, dim=-1).mean() > 0.99
