"""Compressed experts: what is kept of the weight change, in how many bytes, and what is refused."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load_model, make_tiny_bank
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_bank import contents, edit_json, edit_tensors, raises

from spacy_sam import evaluate as ev
from spacy_sam.adapters import Adapter, LoraFactors
from spacy_sam.bank import ExpertBank, bundled_bank_path
from spacy_sam.compress import compress, compress_bank, levels
from spacy_sam.compressed import (
    DATA_FILE,
    HEAD_FILE,
    expand,
    hash_compressed,
    is_compressed,
    pack,
    read_compressed,
    unpack,
    write_compressed,
)
from spacy_sam.merge.materialise import WeightSwitch
from spacy_sam.plan import TaskModelSpec
from spacy_sam.registered import resolve_method

NAMES = ["expert0", "expert1", "expert2"]


def random_adapter(seed=0, rank=6, shapes=((40, 30), (24, 64)), decay=0.6):
    """Factors whose singular values fall."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for number, (n_out, n_in) in enumerate(shapes):
        size = decay ** torch.arange(rank)
        a = torch.randn(rank, n_in, generator=generator) * size[:, None]
        matrices[f"layer{number}.weight"] = LoraFactors(
            a, torch.randn(n_out, rank, generator=generator), 0.5, number == 1
        )
    return Adapter(matrices)


def relative_error(adapter, other):
    assert list(adapter.matrices) == list(other.matrices)
    pairs = [(adapter.matrices[key].delta(), other.matrices[key].delta()) for key in adapter.matrices]
    lost = sum(float((first - second).square().sum()) for first, second in pairs)
    return math.sqrt(lost / sum(float(first.square().sum()) for first, _ in pairs))


def n_bytes(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.fixture
def small(tiny_bank_path, tmp_path):
    """The tiny bank, compressed."""
    return compress_bank(ExpertBank(tiny_bank_path), tmp_path / "small", 4)


# The weight change that is kept


@given(
    bits=st.sampled_from([0.5, 1, 2, 3, 4, 8]),
    seed=st.integers(0, 99),
    rank=st.integers(1, 8),
    shapes=st.sampled_from([((40, 30), (24, 64)), ((2, 3), (3, 2)), ((1, 1), (5, 1))]),
)
def test_compress_says_what_is_lost(bits, seed, rank, shapes):
    adapter = random_adapter(seed, rank, shapes)
    compressed = compress(adapter, bits)
    expanded = expand(compressed)
    for key, factors in expanded.matrices.items():
        assert factors.shape == adapter.matrices[key].shape
        assert factors.transposed == adapter.matrices[key].transposed
        assert factors.a.dtype == factors.b.dtype == torch.float32
    assert relative_error(adapter, expanded) == pytest.approx(compressed.head.error, abs=2e-3)


def test_compress_loses_less_with_more_bits():
    adapter = random_adapter(rank=8, shapes=((900, 900), (700, 1100)))
    errors = [compress(adapter, bits).head.error for bits in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.6
    assert errors[-1] < 0.02


@pytest.mark.parametrize(("size", "most"), [(4, 0.3), (16, 0.3), (60, 0.2), (200, 0.12), (500, 0.05)])
def test_compress_spends_the_bits_whatever_the_size_of_a_matrix(size, most):
    """Of short vectors, the first bit costs more than the second; it must not be passed over for that."""
    adapter = random_adapter(rank=4, shapes=((size, size),) * 3, decay=0.9)
    assert compress(adapter, 8).head.error < most


def test_compress_does_better_than_equal_bits_for_all():
    """Rounding the factors as they are, each row by its own scale, at the same bits."""
    adapter = random_adapter(rank=8, shapes=((900, 900), (700, 1100)))
    table = levels(2)

    def rounded(rows):
        size = rows.square().mean(1, keepdim=True).sqrt()
        return table[torch.bucketize(rows / size, (table[1:] + table[:-1]) / 2)] * size

    plain = Adapter(
        {k: replace(f, a=rounded(f.a), b=rounded(f.b.T.contiguous()).T) for k, f in adapter.matrices.items()}
    )
    assert compress(adapter, 2).head.error < 0.7 * relative_error(adapter, plain)


def test_compress_does_not_depend_on_the_factors_of_the_same_change():
    adapter = random_adapter()
    mixed = torch.randn(6, 6, generator=torch.Generator().manual_seed(9)) + 3 * torch.eye(6)
    turned = {
        key: replace(f, a=mixed @ f.a, b=f.b @ torch.linalg.inv(mixed), scale=f.scale)
        for key, f in adapter.matrices.items()
    }
    first, second = (expand(compress(each, 3)) for each in (adapter, Adapter(turned)))
    assert relative_error(first, second) < 0.05


def test_compress_of_nothing_is_nothing():
    adapter = random_adapter()
    zero = Adapter({key: replace(f, b=torch.zeros_like(f.b)) for key, f in adapter.matrices.items()})
    compressed = compress(zero, 2)
    assert compressed.head.error == 0
    assert not any(f.delta().any() for f in expand(compressed).matrices.values())


@pytest.mark.parametrize("width", range(1, 9))
def test_compress_levels_are_the_best_for_normal_numbers(width):
    """Each is the mean of what is rounded to it (Max 1960 has .4528 and 1.510 for two bits)."""
    table = levels(width)
    assert torch.equal(table, table.sort().values)
    torch.testing.assert_close(table, -table.flip(0), atol=1e-5, rtol=0)
    known = {1: [0.7979], 2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152]}
    if width in known:
        assert table[2 ** (width - 1) :].tolist() == pytest.approx(known[width], abs=1e-3)


@given(width=st.integers(1, 8), data=st.data())
def test_compress_codes_come_back(width, data):
    codes = data.draw(st.lists(st.integers(0, 2**width - 1), min_size=1, max_size=50))
    packed = pack(torch.tensor(codes), width)
    assert packed.dtype == np.uint8
    assert len(packed) == -(-len(codes) * width // 8)
    assert unpack(packed, len(codes), width).tolist() == codes


# Bytes


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_compress_files_of_a_real_expert_take_the_bits_that_were_asked(bits, tmp_path):
    bank = ExpertBank(bundled_bank_path())
    adapter = bank.load_adapter("news")
    write_compressed(compress(adapter, bits), tmp_path)
    numbers = sum(f.a.numel() + f.b.numel() for f in adapter.matrices.values())
    assert 0.97 * bits * numbers / 8 < n_bytes(tmp_path) <= bits * numbers / 8


# A bank of them


def test_compress_bank_works_as_its_original_does(small, tiny_bank_path):
    bank = ExpertBank(tiny_bank_path)
    assert small.check() == NAMES
    assert (small.base_hash, small.prompt, small.encoder, small.name) == (
        bank.base_hash,
        bank.prompt,
        bank.encoder,
        bank.name,
    )
    assert small.base == (str(small.path / "base"), None)
    for name in NAMES:
        assert is_compressed(small.folder(name))
        assert sorted(path.name for path in small.folder(name).iterdir()) == sorted(["card.json", HEAD_FILE, DATA_FILE])
        card = bank[name]
        kept = {
            "bits": 4.0,
            "error": pytest.approx(relative_error(bank.load_adapter(name), small.load_adapter(name)), abs=1e-3),
        }
        assert small[name] == replace(card, scores={}, training={"compressed": kept})
        assert small.adapter_hash(name) != bank.adapter_hash(name)
    model = load_model(small.base[0])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    WeightSwitch(model, small.load_adapter, resolve_method).use(TaskModelSpec(("expert0",)))
    for key, factors in small.load_adapter("expert0").matrices.items():
        torch.testing.assert_close(model.state_dict()[key], before[key] + factors.delta())


def test_compress_bank_leaves_the_original_as_it_is(tiny_bank_path, tmp_path):
    before = contents(tiny_bank_path)
    compress_bank(ExpertBank(tiny_bank_path), tmp_path / "small")
    assert contents(tiny_bank_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_compress_bank_keeps_baselines_and_settings(bank_copy, tmp_path):
    bank_copy.update_card(replace(bank_copy["expert1"], role="baseline"))
    bank_copy.entity_bias = 0.5
    small = compress_bank(bank_copy, tmp_path / "small")
    assert [card.name for card in small.baselines] == ["expert1"]
    assert small.entity_bias == 0.5
    assert ExpertBank(small.path).check() == NAMES


def test_compress_bank_may_share_the_base(bank_copy, tmp_path):
    small = compress_bank(bank_copy, tmp_path / "deeper" / "small", share_base=True)
    assert not (small.path / "base").exists()
    assert small.check() == NAMES
    both = shutil.move(tmp_path, tmp_path.with_name(tmp_path.name + "-moved"))
    assert ExpertBank(Path(both) / "deeper" / "small").check() == NAMES


def test_compress_bank_annotates(remembering_bank, tmp_path):
    from remembering import REMEMBERED, REMEMBERED_LABELS

    small = compress_bank(remembering_bank, tmp_path / "small", 4)
    found = []
    for bank in (remembering_bank, small):
        nlp, component = ev.make_pipeline(bank.path, labels=REMEMBERED_LABELS)
        component.plan = ev.plan_of(bank, ["expert0"])
        found.append([[(e.text, e.label_) for e in doc.ents] for doc in nlp.pipe(REMEMBERED)])
    assert found[0] == found[1]
    assert any(found[0])


def test_compress_expert_is_copied_into_another_bank(small, bank_copy):
    folder = small.folder("expert0")
    bank_copy.add("again", folder, small["expert0"])
    assert bank_copy.adapter_hash("again") == small.adapter_hash("expert0") == hash_compressed(folder)
    assert contents(bank_copy.folder("again")).keys() == contents(folder).keys()
    assert ExpertBank(bank_copy.path).check() == ["again", *NAMES]


# What is refused


def test_compress_bank_overwrites_nothing(bank_copy, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine", encoding="utf8")
    (tmp_path / "file").write_text("mine", encoding="utf8")
    before = contents(tmp_path)
    for out, code in ((bank_copy.path, "S117"), (tmp_path / "full", "S121"), (tmp_path / "file", "S121")):
        with raises(code):
            compress_bank(bank_copy, out)
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert compress_bank(bank_copy, tmp_path / "empty").check() == NAMES


@pytest.mark.parametrize("bits", [0, -1, 9, 0.1, float("nan"), "2", True])
def test_compress_bits_that_make_no_sense_are_refused(bits, bank_copy, tmp_path):
    with raises("S205"):
        compress_bank(bank_copy, tmp_path / "small", bits)
    assert not (tmp_path / "small").exists()


def test_compress_twice_is_refused(small, tmp_path):
    with raises("S120") as caught:
        compress_bank(small, tmp_path / "smaller", 1)
    assert "original" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_compress_bank_that_fails_leaves_nothing(bank_copy, tmp_path):
    edit_tensors(bank_copy.folder("expert2") / "adapter_model.safetensors", dict.clear)
    before = contents(tmp_path)
    with raises("S107"):
        compress_bank(bank_copy, tmp_path / "small")
    assert contents(tmp_path) == before


def set_tensor(key, value):
    def change(tensors):
        tensors[key] = value(tensors[key])

    return change


DAMAGE = {
    "nan": set_tensor("scales", lambda t: t * float("nan")),
    "infinite": set_tensor("levels", lambda t: t / 0),
    "short codes": set_tensor("codes", lambda t: t[:-1]),
    "long codes": set_tensor("codes", lambda t: torch.cat([t, t[:1]])),
    "short scales": set_tensor("scales", lambda t: t[:-1]),
    "short levels": set_tensor("levels", lambda t: t[:-1]),
    "zero width": set_tensor("widths", torch.zeros_like),
    "wide": set_tensor("widths", lambda t: t + 8),
    "other widths": set_tensor("widths", lambda t: t - t.eq(t.max()).to(t.dtype)),
    "dtype": set_tensor("scales", lambda t: t.double()),
    "dimensions": set_tensor("codes", lambda t: t[None]),
    "missing": lambda tensors: tensors.pop("levels"),
    "more": lambda tensors: tensors.update(more=torch.ones(1)),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_compress_damaged_data_is_refused(change, small, bank_copy):
    folder = small.folder("expert1")
    tensors = load_file(folder / DATA_FILE)
    change(tensors)
    save_file(tensors, folder / DATA_FILE)
    bank = ExpertBank(small.path)  # opening reads no weights
    for read in (
        bank.check,
        lambda: bank.load_adapter("expert1"),
        lambda: bank_copy.add("new", folder, bank["expert1"]),
    ):
        with raises("S120") as caught:
            read()
    assert DATA_FILE in str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_compress_truncated_data_is_refused(kept, small):
    path = small.folder("expert1") / DATA_FILE
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with raises("S120"):
        small.load_adapter("expert1")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"format_version": 2}', b'{"format_version": 1, "matrices": []}', b"\xff"],
)
def test_compress_damaged_head_is_refused_at_opening(content, small):
    (small.folder("expert1") / HEAD_FILE).write_bytes(content)
    with raises("S120") as caught:
        ExpertBank(small.path)
    assert "expert1" in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"n_out": 0}, {"n_in": -1}, {"n_directions": 99}, {"n_directions": -1}, {"colour": 1}, {"name": 5}]
)
def test_compress_impossible_matrices_are_refused(changes, small):
    path = small.folder("expert1") / HEAD_FILE
    matrices = json.loads(path.read_text(encoding="utf8"))["matrices"]
    edit_json(path, matrices=[{**matrices[0], **changes}, *matrices[1:]])
    with raises("S120"):
        ExpertBank(small.path)
    edit_json(path, matrices=[*matrices, matrices[0]])
    with raises("S120"):
        ExpertBank(small.path)


def test_compress_matrices_of_another_base_are_refused(small, bank_copy, tmp_path):
    other = make_tiny_bank(tmp_path / "opt", n_experts=1, architecture="opt")
    foreign = compress_bank(other, tmp_path / "foreign")
    with raises("S403"):
        bank_copy.add("new", foreign.folder("expert0"), replace(foreign["expert0"], base_hash=bank_copy.base_hash))


def test_compress_missing_data_is_refused(small):
    (small.folder("expert1") / DATA_FILE).unlink()
    with raises("S104"):
        ExpertBank(small.path)


def test_compress_hash_knows_data_and_matrices(small):
    folder = small.folder("expert0")
    seen = {hash_compressed(folder)}
    edit_json(folder / HEAD_FILE, error=0.9, source_hash="x")
    seen.add(hash_compressed(folder))
    assert len(seen) == 1
    matrices = json.loads((folder / HEAD_FILE).read_text(encoding="utf8"))["matrices"]
    edit_json(folder / HEAD_FILE, matrices=[{**matrices[0], "name": "other"}, *matrices[1:]])
    seen.add(hash_compressed(folder))
    edit_tensors(folder / DATA_FILE, set_tensor("scales", lambda t: t * 2))
    seen.add(hash_compressed(folder))
    assert len(seen) == 3
    assert read_compressed(folder, "x").matrices
