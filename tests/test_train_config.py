"""The training config: what is read, and every problem at once."""

from pathlib import Path

import pytest
from test_train import BASE_STEPS, CONFIG, DEMO, raises

from spacy_sam.train.config import expand, read_config


def write(folder: Path, text: str) -> Path:
    path = folder / "train.cfg"
    path.write_text(text, encoding="utf8")
    return path


def test_train_config(tmp_path):
    path = write(tmp_path, CONFIG)
    plain = read_config(path)
    assert plain.domains["cooking"].train == [f"{DEMO.as_posix()}/cooking.train.jsonl"]
    assert plain.seed == 5
    other = read_config(path, {"paths.data": "elsewhere", "training.seed": 8, "expert_training.max_steps": 2})
    assert other.domains["cooking"].dev == ["elsewhere/cooking.dev.jsonl"]
    assert (other.seed, other.expert_training.max_steps) == (8, 2)
    assert other.unified_training == plain.unified_training


def test_train_config_stages(tmp_path):
    """In the order of the file; each may have corpora of its own."""
    section = "[base_training.{}]\nmax_steps = {}\nlearning_rate = 0.1\n\n"
    stages = section.format("z", 2) + section.format("a", 3).replace("\n\n", '\ncorpora = ["x/*.jsonl"]\n\n')
    config = read_config(write(tmp_path, CONFIG.replace("[lora]", f"{stages}[lora]")))
    assert [(name, stage.max_steps) for name, stage in config.base_training.items()] == [
        ("all", BASE_STEPS),
        ("z", 2),
        ("a", 3),
    ]
    assert [stage.corpora for stage in config.base_training.values()] == [[], [], ["x/*.jsonl"]]
    without = CONFIG[: CONFIG.index("[base_training]")] + CONFIG[CONFIG.index("[lora]") :]
    assert read_config(write(tmp_path, without)).base_training == {}


def test_train_config_lists_all_problems(tmp_path):
    text = CONFIG.replace('kind = "random"', 'kind = "magic"').replace("rank = 2", "rank = 0\nrang = 3")
    text = text.replace("[base_training.all]", '[base_training.all]\ncorpus = "x"')
    text = text.replace("max_labels = 3", 'max_labels = "few"').replace('dev = ["${paths.data}/sport.dev.jsonl"]', "")
    with raises("S601") as info:
        read_config(write(tmp_path, text.replace("seed = 5", "sead = 5")))
    for problem in ("base.kind", "base_training.all.corpus", "lora.rank", "lora.rang", "data.max_labels", "sead"):
        assert f"  {problem}: " in str(info.value)
    assert "domains" not in str(info.value).replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (CONFIG.replace("[lora]", "[lora"), "lora"),
        (CONFIG.replace("${paths.data}", "${paths.nothing}"), "nothing"),
        (CONFIG.replace("[expert_training]", "[expert]"), "expert_training"),
        (CONFIG.replace("[base_training.all]", ""), "base_training.max_steps"),
        (CONFIG.replace("[base_training]", ""), "base_training"),
        ("", "base"),
    ],
)
def test_train_config_that_cannot_be_read(tmp_path, text, part):
    path = write(tmp_path, text)
    with raises("S601") as info:
        read_config(path)
    assert str(path) in str(info.value)
    assert part in str(info.value)


def test_train_config_missing_file_and_override(tmp_path):
    with raises("S601"):
        read_config(tmp_path / "nothing.cfg")
    with raises("S601"):
        read_config(tmp_path)
    with raises("S601"):
        read_config(write(tmp_path, CONFIG), {"nothing.here": 1})


def test_train_expand(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text("", encoding="utf8")
    (tmp_path / "d.jsonl").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in expand([str(tmp_path / "*.jsonl")])] == ["a.jsonl", "b.jsonl"]
    assert [path.name for path in expand(["c.txt", "*.jsonl"])] == ["c.txt", "a.jsonl", "b.jsonl"]
    with raises("S602"):
        expand(["*.jsonl", "*.conll"])
