"""Adapters made elsewhere: what is merged is what peft computes un-merged, and what cannot be merged exactly is refused."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ENCODER, ENCODER_DIMENSION, INIT_RANGE, PROMPT, load_model, make_tiny_bank, save_adapter
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from test_bank import CONFIG, WEIGHTS, contents, edit_json, edit_tensors, raises
from transformers import GPT2Config, GPT2LMHeadModel

from spacy_sam.adapters import hash_adapter, read_adapter
from spacy_sam.bank import ExpertBank, bundled_bank_path
from spacy_sam.foreign import import_adapter
from spacy_sam.lora_config import alpha_choices, rank_choices
from spacy_sam.merge.materialise import WeightSwitch
from spacy_sam.merge.methods import Ties, ties
from spacy_sam.plan import TaskModelSpec
from spacy_sam.registered import resolve_method

TEXTS = ["Acids react with bases.", "Iron rusts in wet air.", "Gold does not."]
IDS = torch.arange(2, 42).reshape(2, 20)


class FakeEncoder:
    """Embeds a text by its letters."""

    def __init__(self, name, *, path=None):
        self.name, self.path = name, path

    def __call__(self, texts):
        rows = [[text.count(chr(97 + i)) for i in range(ENCODER_DIMENSION)] for text in texts]
        return np.array(rows, dtype=np.float32)


@pytest.fixture(autouse=True)
def encoder(monkeypatch):
    monkeypatch.setattr("spacy_sam.foreign.SentenceEncoder", FakeEncoder)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "chemistry.txt"
    path.write_text("\n".join([*TEXTS, "", " "]), encoding="utf8")
    return path


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    """A bank without experts for each architecture: not to be changed."""
    root = tmp_path_factory.mktemp("banks")
    made = {kind: make_tiny_bank(root / kind, n_experts=0, architecture=kind) for kind in ("llama", "gpt2", "opt")}
    return {**made, "gpt2-untied": untied_gpt2(root / "gpt2-untied", made["gpt2"])}


def untied_gpt2(path, tied):
    """A GPT-2 with Conv1D layers and a Linear head of its own."""
    shutil.copytree(Path(tied.base[0]), path / "base")
    config = GPT2Config.from_pretrained(path / "base", tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        GPT2LMHeadModel(config).save_pretrained(path / "base")
    return ExpertBank.create(path, base="base", prompt=PROMPT, encoder=ENCODER)


@pytest.fixture
def bank_of(banks, tmp_path):
    """A bank of an architecture that the test may change."""
    return lambda kind: ExpertBank(shutil.copytree(banks[kind].path, tmp_path / kind))


def peft_logits(base, adapter):
    """What peft computes with the adapter beside the base's weights."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load_model(base), str(adapter)).eval()(IDS).logits


def our_logits(bank, name):
    """What the base computes with the bank's expert in its weights."""
    model = load_model(bank.base[0])
    WeightSwitch(model, bank.load_adapter, resolve_method).use(TaskModelSpec((name,)))
    with torch.no_grad():
        return model(IDS).logits


def assert_same_as_peft(bank, adapter, texts):
    base = bank.base[0]
    import_adapter(bank, "new", adapter, domain="chemistry", texts=texts)
    expected = peft_logits(base, adapter)
    with torch.no_grad():
        assert (load_model(base)(IDS).logits - expected).abs().max() > 0.01, "the adapter does something"
    torch.testing.assert_close(our_logits(ExpertBank(bank.path), "new"), expected, rtol=1e-4, atol=1e-4)
    bank.check()


EXACT = [
    ("llama", {}),
    ("llama", {"r": 7, "lora_alpha": 3}),
    ("llama", {"lora_alpha": 2.5}),
    ("llama", {"target_modules": ["v_proj"]}),
    ("llama", {"target_modules": r".*layers\.1\.mlp\..*_proj"}),
    ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    ("llama", {"target_modules": ["embed_tokens"]}),
    ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True}),
    ("llama", {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]}),
    ("llama", {"exclude_modules": ["q_proj"]}),
    ("llama", {"use_rslora": True}),
    ("llama", {"rank_pattern": {"q_proj": 2, "up_proj": 6}}),
    ("llama", {"alpha_pattern": {"q_proj": 1, "down_proj": 40}}),
    ("llama", {"rank_pattern": {r"layers\.0\..*_proj": 2, "q_proj": 6}, "alpha_pattern": {".*mlp.*": 20}}),
    ("llama", {"rank_pattern": {r"layers\.0\..*_proj": 2, "q_proj": 6}, "use_rslora": True}),
    ("llama", {"rank_pattern": {"proj": 6, "model.layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"k_proj": 1}}),
    ("llama", {"init_lora_weights": False}),
    ("llama", {"init_lora_weights": "gaussian", "lora_dropout": 0.3}),
    ("llama", {"init_lora_weights": "orthogonal"}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": ["c_proj"], "fan_in_fan_out": False}),
    ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_rslora": True, "rank_pattern": {"c_fc": 2}}),
    ("gpt2-untied", {"target_modules": ["lm_head", "c_proj", "c_attn"]}),
    ("gpt2-untied", {"target_modules": ["wte", "wpe", "c_proj"]}),
    ("opt", {"target_modules": ["fc1", "out_proj"], "alpha_pattern": {"fc1": 1}}),
]


@pytest.mark.parametrize(("kind", "kwargs"), EXACT, ids=str)
def test_foreign_adapters_compute_what_peft_computes(kind, kwargs, bank_of, texts, tmp_path):
    bank = bank_of(kind)
    adapter = save_adapter(tmp_path / "adapter", bank.base[0], seed=3, **kwargs)
    assert_same_as_peft(bank, adapter, texts)


@pytest.mark.parametrize(("kind", "says"), [("gpt2", False), ("llama", True)])
def test_foreign_layout_is_that_of_the_layer_whatever_the_config_says(kind, says, bank_of, texts, tmp_path):
    """Square weights fit either way round, so that no shape gives a wrong layout away."""
    bank = bank_of(kind)
    target = "attn.c_proj" if kind == "gpt2" else "q_proj"
    adapter = save_adapter(tmp_path / "adapter", bank.base[0], target_modules=[target])
    edit_json(adapter / CONFIG, fan_in_fan_out=says)
    assert_same_as_peft(bank, adapter, texts)


def test_foreign_base_whose_files_name_weights_otherwise_than_the_model(banks, texts, tmp_path):
    """The files of the first GPT-2 on the hub have no `transformer.` before their names; transformers puts it there."""
    base = Path(shutil.copytree(banks["gpt2"].base[0], tmp_path / "bank" / "base"))
    tensors = load_file(base / "model.safetensors")
    save_file({key.removeprefix("transformer."): t for key, t in tensors.items()}, base / "model.safetensors")
    bank = ExpertBank.create(tmp_path / "bank", base="base", prompt=PROMPT, encoder=ENCODER)
    assert_same_as_peft(bank, save_adapter(tmp_path / "adapter", base), texts)


@pytest.mark.parametrize("kind", ["bart", "tagger"])
def test_foreign_adapters_of_other_kinds_of_base_are_taken(kind, texts, tmp_path):
    bank = make_tiny_bank(tmp_path / "bank", n_experts=1, architecture=kind)
    import_adapter(bank, "new", bank.folder("expert0"), domain="x", texts=texts)
    assert bank.adapter_hash("new") == bank.adapter_hash("expert0")
    assert bank.check() == ["expert0", "new"]


def test_foreign_adapter_converted_from_pissa_computes_what_peft_computes(bank_of, texts, tmp_path):
    """peft's own conversion takes the change of the base's weights into the factors."""
    bank = bank_of("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
        model = get_peft_model(load_model(bank.base[0]), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = "pissa"
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=INIT_RANGE)
            expected = model.eval()(IDS).logits
        model.save_pretrained(tmp_path / "pissa")
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with raises("S106") as caught:
        import_adapter(bank, "new", tmp_path / "pissa", domain="x", texts=texts)
    assert "path_initial_model_for_weight_conversion" in str(caught.value)
    import_adapter(bank, "new", tmp_path / "plain", domain="x", texts=texts)
    torch.testing.assert_close(our_logits(bank, "new"), expected, rtol=1e-4, atol=1e-4)


def test_foreign_experts_of_different_ranks_and_targets_are_merged(bank_of, texts, tmp_path):
    bank = bank_of("llama")
    kinds = [{"r": 2, "target_modules": ["q_proj", "v_proj"]}, {"r": 6, "use_rslora": True}, {"lora_alpha": 1}]
    models = []
    for number, kwargs in enumerate(kinds):
        adapter = save_adapter(tmp_path / str(number), bank.base[0], seed=number, **kwargs)
        import_adapter(bank, f"new{number}", adapter, domain="x", texts=texts)
        base = load_model(bank.base[0])
        merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict()
        models.append({key: merged[key].clone() for key in merged})
    model = load_model(bank.base[0])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    switch = WeightSwitch(model, bank.load_adapter, resolve_method)
    switch.use(TaskModelSpec(("new0", "new1", "new2"), (1.0, 2.0, 3.0), Ties(1.0, 1.0).config))
    changed = 0
    for key, tensor in model.state_dict().items():
        vectors = torch.stack([each[key] - before[key] for each in models])
        expected = before[key] + ties(vectors, [1.0, 2.0, 3.0], 1.0, 1.0)
        changed += bool(vectors.any())
        # an entry whose weighted sum is all but 0 may be elected either way after rounding
        close = torch.isclose(tensor, expected, rtol=1e-4, atol=1e-4)
        assert close.float().mean() > 0.999
    assert changed == 14


NAMES = st.sampled_from(
    ["model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up_proj", "lm_head", "q_proj", "a.xq_proj"]
)
PATTERNS = st.sampled_from(
    [
        "q_proj",
        "_proj",
        ".*_proj",
        r"layers\.1",
        r"layers\.0\..*",
        "lm_head",
        "^lm_head",
        "head",
        "q.proj",
        "(q|up)_proj",
        "model.layers.0.self_attn.q_proj",
    ]
)


@given(
    name=NAMES, ranks=st.dictionaries(PATTERNS, st.integers(1, 9)), alphas=st.dictionaries(PATTERNS, st.integers(1, 9))
)
def test_foreign_patterns_match_as_they_do_in_peft(name, ranks, alphas):
    """One of the choices is what peft takes in the order at hand; a single choice is what it takes in any order."""
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": ranks, "alpha_pattern": alphas}
    for patterns, default, choices in (
        (ranks, 4, rank_choices(config, name)),
        (alphas, 8, alpha_choices(config, name)),
    ):
        orders = [list(patterns), list(reversed(patterns)), sorted(patterns)]
        taken = {patterns.get(get_pattern_key(order, name), default) for order in orders}
        assert taken <= choices
        assert len(taken) == 1 or len(choices) > 1


def test_foreign_alphas_whose_order_peft_lost_are_refused(bank_of, texts, tmp_path):
    """peft writes patterns in the order of the alphabet, `layers` before `q_proj`, and the first that matches counts."""
    bank = bank_of("llama")
    kwargs = {"alpha_pattern": {"q_proj": 1, r"layers\.0\..*": 40}}
    adapter = save_adapter(tmp_path / "adapter", bank.base[0], **kwargs)
    with raises("S106") as caught:
        import_adapter(bank, "new", adapter, domain="x", texts=texts)
    assert "alpha_pattern" in str(caught.value)
    assert "model.layers.0.self_attn.q_proj" in str(caught.value)


def test_foreign_ranks_whose_order_peft_lost_are_those_of_the_factors(bank_of, texts, tmp_path):
    """peft itself cannot load such an adapter; in the model that was trained, it does what it does here."""
    bank = bank_of("llama")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 6, r"layers\.0\..*": 2})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = get_peft_model(load_model(bank.base[0]), config).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, INIT_RANGE)
        expected = model(IDS).logits
        model.save_pretrained(tmp_path / "adapter")
        with pytest.raises(RuntimeError, match="size mismatch"):
            peft_logits(bank.base[0], tmp_path / "adapter")
    import_adapter(bank, "new", tmp_path / "adapter", domain="x", texts=texts, same_base=True)
    torch.testing.assert_close(our_logits(bank, "new"), expected, rtol=1e-4, atol=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"use_dora": True}, "depends on that weight"),
        ({"lora_bias": True}, "biases"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "whole modules"),
        ({"trainable_token_indices": [1, 2], "target_modules": ["q_proj"]}, "rows of the embedding"),
        ({"target_parameters": ["self_attn.q_proj.weight"], "target_modules": []}, "parameter"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "more than once"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    ],
    ids=str,
)
def test_foreign_adapters_that_are_not_exact_are_refused_with_the_reason(kwargs, said, bank_of, texts, tmp_path):
    bank = bank_of("llama")
    adapter = save_adapter(tmp_path / "odd", bank.base[0], **kwargs)
    before = contents(bank.path)
    with raises("S106") as caught:
        import_adapter(bank, "odd", adapter, domain="x", texts=texts)
    assert said in str(caught.value)
    assert contents(bank.path) == before


@pytest.mark.parametrize(
    "entry",
    [
        "use_qalora",
        "alora_invocation_tokens",
        "arrow_config",
        "use_bdlora",
        "monteclora_config",
        "velora_config",
        "kasa_config",
        "megatron_config",
    ],
)
@pytest.mark.parametrize("value", [True, {}, {"some": 1}], ids=str)
def test_foreign_kinds_of_lora_are_refused_by_their_entry(entry, value, banks, tmp_path):
    adapter = save_adapter(tmp_path / "odd", banks["llama"].base[0], target_modules=["q_proj"])
    edit_json(adapter / CONFIG, **{entry: value})
    with raises("S106") as caught:
        read_adapter(adapter, "odd")
    assert entry in str(caught.value)


def test_foreign_adapter_of_tied_weights_is_refused_at_import(bank_of, texts, tmp_path):
    bank = bank_of("gpt2")
    adapter = save_adapter(tmp_path / "tied", bank.base[0], target_modules=["wte"])
    edit_tensors(adapter / WEIGHTS, lambda tensors: [tensors.pop(key) for key in list(tensors) if "lora" not in key])
    with raises("S404"):
        import_adapter(bank, "new", adapter, domain="x", texts=texts)
    assert len(bank) == 0


def test_foreign_pickled_weights_are_refused_with_the_way_out(bank_of, texts, tmp_path):
    """The lines in the documentation make of them what is taken."""
    bank = bank_of("llama")
    adapter = save_adapter(tmp_path / "old", bank.base[0])
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    with raises("S118"):
        import_adapter(bank, "old", adapter, domain="x", texts=texts)
    tensors = torch.load(adapter / "adapter_model.bin", weights_only=True, map_location="cpu")
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, adapter / WEIGHTS)
    assert_same_as_peft(bank, adapter, texts)


# Weights of the base in the adapter's file


@pytest.fixture
def with_copies(banks, tmp_path):
    adapter = save_adapter(tmp_path / "copies", banks["llama"].base[0], target_modules=["embed_tokens", "q_proj"])
    assert any(key.endswith("embed_tokens.base_layer.weight") for key in load_file(adapter / WEIGHTS))
    return adapter


def test_foreign_copies_of_the_base_are_left_out_if_they_are_equal(with_copies, bank_of, texts):
    bank = bank_of("llama")
    with raises("S106"):
        read_adapter(with_copies, "new")
    before = contents(with_copies)
    import_adapter(bank, "new", with_copies, domain="x", texts=texts)
    assert all("lora" in key for key in load_file(bank.folder("new") / WEIGHTS))
    assert contents(with_copies) == before


@pytest.mark.parametrize("change", [lambda t: t.add_(0.5), lambda t: torch.cat([t, t[:2]])], ids=["trained", "resized"])
def test_foreign_copies_of_the_base_are_refused_if_they_differ(change, with_copies, bank_of, texts):
    bank = bank_of("llama")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    edit_tensors(with_copies / WEIGHTS, lambda tensors: tensors.update({key: change(tensors[key]).contiguous()}))
    with raises("S106") as caught:
        import_adapter(bank, "new", with_copies, domain="x", texts=texts)
    assert "differs from the base's" in str(caught.value)


# The base that the config names


@pytest.mark.parametrize(
    ("named", "base", "good"),
    [
        ("someone/model", "someone/model", True),
        ("Someone/Model", "someone/model", True),
        ("/home/me/models/model", "someone/model", True),
        ("other/model", "someone/model", False),
        ("someone/model-instruct", "someone/model", False),
        ("", "someone/model", False),
        (None, "someone/model", False),
    ],
)
def test_foreign_base_is_compared_by_name(named, base, good, banks, tmp_path, texts, monkeypatch):
    structure = load_model(banks["llama"].base[0])
    monkeypatch.setattr("spacy_sam.foreign.load_structure", lambda source, revision: structure)
    bank = ExpertBank.create(tmp_path / "hub", base=base, prompt=PROMPT, encoder=ENCODER)
    adapter = save_adapter(tmp_path / "adapter", banks["llama"].base[0])
    edit_json(adapter / CONFIG, base_model_name_or_path=named)
    if not good:
        with raises("S119") as caught:
            import_adapter(bank, "new", adapter, domain="x", texts=texts)
        assert base in str(caught.value)
        assert len(bank) == 0
    import_adapter(bank, "new", adapter, domain="x", texts=texts, same_base=not good)
    assert "new" in bank


def test_foreign_base_of_another_revision_is_refused(banks, tmp_path, texts):
    bank = ExpertBank.create(tmp_path / "hub", base="a/b", revision="v2", prompt=PROMPT, encoder=ENCODER)
    adapter = save_adapter(tmp_path / "adapter", banks["llama"].base[0])
    edit_json(adapter / CONFIG, base_model_name_or_path="a/b", revision="v1")
    with raises("S119"):
        import_adapter(bank, "new", adapter, domain="x", texts=texts)


def test_foreign_base_in_a_folder_is_compared_by_content(bank_of, banks, tmp_path, texts):
    bank = bank_of("llama")
    other = make_tiny_bank(tmp_path / "other", n_experts=0, seed=5)
    adapter = save_adapter(tmp_path / "adapter", other.base[0])
    with raises("S119") as caught:
        import_adapter(bank, "new", adapter, domain="x", texts=texts)
    assert other.base_hash in str(caught.value)
    import_adapter(bank, "new", adapter, domain="x", texts=texts, same_base=True)
    shutil.rmtree(other.path)
    with raises("S119"):
        import_adapter(bank, "newer", adapter, domain="x", texts=texts)


# Card and centroid


def test_foreign_card_has_what_was_given_and_the_texts_centroid(bank_of, texts, tmp_path):
    bank = bank_of("llama")
    adapter = save_adapter(tmp_path / "adapter", bank.base[0], r=2, use_rslora=True)
    card = import_adapter(bank, "chem", adapter, domain="chemistry", texts=texts, labels=["metal", "acid"])
    assert card == bank["chem"] == ExpertBank(bank.path)["chem"]
    assert (card.domain, card.labels, card.role, card.scores) == ("chemistry", ("acid", "metal"), "expert", {})
    assert [(c.name, c.n_records, c.labels) for c in card.corpora] == [("chemistry", 3, ("acid", "metal"))]
    assert card.lora == {"rank": 2, "alpha": 8, "use_rslora": True}
    assert (card.centroid.encoder, card.centroid.n_texts) == (ENCODER, 3)
    assert card.centroid.vector == pytest.approx(FakeEncoder("")(TEXTS).mean(0).tolist(), abs=1e-6)


def test_foreign_labels_are_those_annotated_in_the_texts(bank_of, tmp_path):
    bank = bank_of("llama")
    adapter = save_adapter(tmp_path / "adapter", bank.base[0])
    rows = [{"text": "Iron rusts.", "entities": [[0, 4, "metal"]]}, {"text": "So it does.", "entities": []}]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    assert import_adapter(bank, "one", adapter, domain="x", texts=path).labels == ("metal",)
    path.write_text("\n".join(json.dumps({"text": row["text"]}) for row in rows), encoding="utf8")
    card = import_adapter(bank, "two", adapter, domain="x", texts=path, n_texts=1)
    assert (card.labels, card.centroid.n_texts, card.corpora[0].n_records) == ((), 1, 2)


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [("none.jsonl", None, "S602"), ("some.jsonl", "{", "S603"), ("some.txt", " \n", "S604"), ("some.pdf", "x", "S602")],
)
def test_foreign_texts_that_cannot_be_read_are_refused(name, content, code, bank_of, tmp_path):
    bank = bank_of("llama")
    adapter = save_adapter(tmp_path / "adapter", bank.base[0])
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf8")
    before = contents(bank.path)
    with raises(code):
        import_adapter(bank, "new", adapter, domain="x", texts=tmp_path / name)
    assert contents(bank.path) == before


def test_foreign_names_that_are_taken_are_refused_before_anything_is_read(bank_copy, tmp_path):
    for name, code in (("expert0", "S109"), ("../x", "S114")):
        with raises(code):
            import_adapter(bank_copy, name, tmp_path / "nothing", domain="x", texts=tmp_path / "nothing")


# The hash


def test_foreign_hash_knows_what_decides_the_weight_change(banks, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", banks["llama"].base[0])
    plain = hash_adapter(adapter)
    edit_json(adapter / CONFIG, use_rslora=False, rank_pattern={}, alpha_pattern=None, lora_dropout=0.1)
    assert hash_adapter(adapter) == plain
    seen = {plain}
    for changes in (
        {"use_rslora": True},
        {"use_rslora": False, "rank_pattern": {"q_proj": 1, "v_proj": 2}},
        {"rank_pattern": {"q_proj": 2, "v_proj": 1}},
        {"rank_pattern": {}, "alpha_pattern": {"q_proj": 1, "v_proj": 2}},
    ):
        edit_json(adapter / CONFIG, **changes)
        seen.add(hash_adapter(adapter))
    assert len(seen) == 5
    edit_json(adapter / CONFIG, alpha_pattern={"v_proj": 2, "q_proj": 1})
    assert hash_adapter(adapter) in seen


def test_foreign_hash_of_the_bundled_experts_has_not_changed():
    """Plans on disk hold them."""
    bank = ExpertBank(bundled_bank_path())
    for name in ("news", "unified"):
        folder = bank.folder(name)
        config = json.loads((folder / CONFIG).read_text(encoding="utf8"))
        entries = [config["r"], config["lora_alpha"], config["fan_in_fan_out"]]
        content = (folder / WEIGHTS).read_bytes() + repr(entries).encode("utf8")
        assert bank.adapter_hash(name) == hashlib.sha256(content).hexdigest()[:16]
