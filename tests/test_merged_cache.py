"""Merged weights on disk: found again, bounded, sound after damage, and safe under several processes."""

import logging
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
import torch
from helpers import load_model, make_card, save_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipelines import raises
from safetensors.torch import load_file
from torch import Tensor

from spacy_sam.bank import ExpertBank
from spacy_sam.errors import SamError
from spacy_sam.generate.engine import Request
from spacy_sam.generate.torch_engine import TorchEngine
from spacy_sam.merge import cache as cache_module
from spacy_sam.merge.cache import MergedCache
from spacy_sam.merge.materialise import WeightSwitch
from spacy_sam.merge.methods import Mean, Ties
from spacy_sam.plan import TaskModelSpec
from spacy_sam.registered import make_torch_engine, resolve_method

NAMES = [f"{number:016x}" for number in range(6)]
TIES = TaskModelSpec(("expert0", "expert1"), (), Ties(0.4).config)
MEAN = TaskModelSpec(("expert0", "expert2"), (), Mean().config)


def some_weights(seed: int = 0) -> Dict[str, Tensor]:
    """Weights of all dtypes, of sizes that leave gaps when they are lined up."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = {"b": torch.bfloat16, "a": torch.float32, "d": torch.float16, "c": torch.float64}
    return {name: torch.randn(3, 5 + seed % 3, generator=generator).to(dtype) for name, dtype in dtypes.items()}


def write(cache: MergedCache, name: str, weights: Dict[str, Tensor]) -> None:
    passed = dict(cache.keep(name, weights, iter(weights.items())))
    assert all(passed[matrix] is weight for matrix, weight in weights.items())


def read(cache: MergedCache, name: str, like: Dict[str, Tensor]) -> Any:
    found = cache.open(name, like)
    if found is None:
        return None
    with closing(found):
        return dict(found)


def same(found: Dict[str, Tensor], expected: Dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == weight.dtype and torch.equal(found[name], weight) for name, weight in expected.items()
    )


def files(folder: Path) -> List[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def cache(tmp_path) -> MergedCache:
    return MergedCache(tmp_path / "made" / "cache", 1 << 20, "base")


def test_weights_are_found_again(cache):
    assert cache.open(NAMES[0], some_weights()) is None
    for number, name in enumerate(NAMES):
        write(cache, name, some_weights(number))
    for number, name in enumerate(NAMES):
        assert same(read(cache, name, some_weights(number)), some_weights(number))
        assert same(load_file(cache.folder / f"{name}.safetensors"), some_weights(number))
    assert files(cache.folder) == [f"{name}.safetensors" for name in NAMES]


def test_weights_in_memory_are_no_map_of_the_file(cache):
    write(cache, NAMES[0], some_weights())
    found = read(cache, NAMES[0], some_weights())
    file = cache.folder / f"{NAMES[0]}.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert same(found, some_weights())


def test_bytes_are_bounded_and_the_least_recently_used_goes(tmp_path):
    write(MergedCache(tmp_path, 1 << 20, "base"), NAMES[0], some_weights())
    size = (tmp_path / f"{NAMES[0]}.safetensors").stat().st_size
    cache = MergedCache(tmp_path, int(3.5 * size), "base")
    (tmp_path / "of something else.safetensors").write_bytes(bytes(9 * size))
    for number, name in enumerate(NAMES[:3]):
        write(cache, name, some_weights())
        os.utime(tmp_path / f"{name}.safetensors", (number, number))
    assert read(cache, NAMES[0], some_weights()) is not None
    write(cache, NAMES[3], some_weights())
    assert files(tmp_path) == [f"{NAMES[n]}.safetensors" for n in (0, 2, 3)] + ["of something else.safetensors"]
    large = {"a": torch.zeros(4 * size)}
    write(cache, NAMES[4], large)  # never fits, and drops no other
    assert read(cache, NAMES[4], large) is None
    assert len(files(tmp_path)) == 4


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, GeneratorExit])
def test_half_a_task_model_is_not_kept(cache, error):
    def stops() -> Iterator[Tuple[str, Tensor]]:
        yield from list(some_weights().items())[:2]
        raise error

    with pytest.raises(error):
        list(cache.keep(NAMES[0], some_weights(), stops()))
    assert files(cache.folder) == []
    given = cache.keep(NAMES[0], some_weights(), iter(some_weights().items()))
    next(given)
    given.close()
    assert files(cache.folder) == []


def test_what_a_killed_process_left_is_removed(cache):
    old, new = cache.folder / ".writing-old", cache.folder / ".writing-new"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, time.time() - 2 * cache_module.ABANDONED))
    write(cache, NAMES[0], some_weights())
    assert files(cache.folder) == [".writing-new", f"{NAMES[0]}.safetensors"]


def test_full_disk_is_a_warning(cache, monkeypatch, caplog):
    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, content: Any) -> None:
            raise OSError(28, "No space left on device")

    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r": Full(real_open(path, mode)))
    write(cache, NAMES[0], some_weights())
    assert "No space left" in caplog.text
    assert files(cache.folder) == []


def test_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with raises("S414"):
            MergedCache(folder, 1, "base")


# Damage


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_any_damage_is_noticed_and_mended(cache, data):
    """Any byte that is another one, any length: what is read is what was written, or nothing."""
    weights = some_weights()
    write(cache, NAMES[0], weights)
    file = cache.folder / f"{NAMES[0]}.safetensors"
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    file.unlink()
    file.write_bytes(content)
    try:
        found = read(cache, NAMES[0], weights)
    except cache_module.Damaged:
        return
    assert same(found, weights) if found is not None else not file.exists()


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(3, 3, dtype=torch.float64)},
        {"b": torch.zeros(3, 3)},
    ],
    ids=["shape", "dtype", "name"],
)
def test_weights_for_another_model_are_not_used(cache, other, caplog):
    write(cache, NAMES[0], {"a": torch.zeros(3, 3)})
    assert cache.open(NAMES[0], other) is None
    assert "damaged" in caplog.text
    assert files(cache.folder) == []


# With a model


class Counted:
    """A bank's adapters, and what was read of them."""

    def __init__(self, bank: ExpertBank) -> None:
        self.bank, self.loaded = bank, Counter()

    def __call__(self, name: str, version: str) -> Any:
        self.loaded[name] += 1
        return self.bank.load_adapter(name, version)


def make_switch(
    bank: ExpertBank, folder: Path, dtype: torch.dtype = torch.float32, base: str = "base"
) -> Tuple[WeightSwitch, Any, Counted]:
    model, loader = load_model(bank.base[0], dtype), Counted(bank)
    stored = MergedCache(folder, 1 << 30, base)
    return WeightSwitch(model, loader, resolve_method, 0, bank.adapter_hash, stored), model, loader


def state(model: Any) -> Dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def merged(bank_copy) -> Callable[..., Dict[str, Tensor]]:
    def find(spec: TaskModelSpec, dtype: torch.dtype = torch.float32) -> Dict[str, Tensor]:
        model = load_model(bank_copy.base[0], dtype)
        WeightSwitch(model, bank_copy.load_adapter, resolve_method).use(spec)
        return state(model)

    return find


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_switch_merges_once_for_all_runs(bank_copy, merged, tmp_path, dtype):
    for number in range(2):
        switch, model, loader = make_switch(bank_copy, tmp_path / "cache", dtype)
        for spec in (TIES, MEAN, TIES, TaskModelSpec(), MEAN):
            switch.use(spec)
            assert same(state(model), merged(spec, dtype))
        assert loader.loaded == ({"expert0": 2, "expert1": 1, "expert2": 1} if not number else {})
        switch.restore()
        assert same(state(model), merged(TaskModelSpec(), dtype))
    assert len(files(tmp_path / "cache")) == 2


def test_switch_keeps_no_single_experts(bank_copy, tmp_path):
    switch, _, _ = make_switch(bank_copy, tmp_path / "cache")
    switch.use(TaskModelSpec(("expert0",)))
    assert files(tmp_path / "cache") == []


def test_names_are_of_all_that_decides_the_weights(bank_copy, merged, tmp_path):
    """Another version of an expert, weights, method, dtype or base: another file. Another name of an expert: the same."""
    folder = tmp_path / "cache"
    specs = [
        TIES,
        TaskModelSpec(TIES.experts, (2.0, 1.0), TIES.method),
        TaskModelSpec(TIES.experts, (), Ties(0.3).config),
        MEAN,
    ]
    for number, spec in enumerate(specs):
        make_switch(bank_copy, folder)[0].use(spec)
        assert len(files(folder)) == number + 1
    make_switch(bank_copy, folder, torch.bfloat16)[0].use(TIES)
    make_switch(bank_copy, folder, base="another")[0].use(TIES)
    assert len(files(folder)) == 6
    shutil.copytree(bank_copy.folder("expert1"), tmp_path / "expert1")
    bank_copy.add("zebra", tmp_path / "expert1", bank_copy["expert1"])
    switch, model, loader = make_switch(bank_copy, folder)
    switch.use(TaskModelSpec(("expert0", "zebra"), (), TIES.method))
    assert loader.loaded == {}
    assert same(state(model), merged(TIES))
    bank_copy.remove("expert1")
    bank_copy.add("expert1", save_adapter(tmp_path / "new", bank_copy.base[0], seed=5), make_card(bank_copy, 1))
    switch, model, _ = make_switch(bank_copy, folder)
    switch.use(TIES)
    assert len(files(folder)) == 7
    assert same(state(model), merged(TIES))


@pytest.mark.parametrize("place", ["header", "first weight", "last weight", "gone"])
def test_switch_replaces_damaged_files(bank_copy, merged, tmp_path, caplog, place):
    folder = tmp_path / "cache"
    make_switch(bank_copy, folder)[0].use(TIES)
    (file,) = folder.iterdir()
    sound = file.read_bytes()
    at = {"header": 20, "first weight": -len(sound) + int.from_bytes(sound[:8], "little") + 9, "last weight": -1}
    file.unlink()
    if place != "gone":
        content = bytearray(sound)
        content[at[place]] ^= 1
        file.write_bytes(content)
    switch, model, loader = make_switch(bank_copy, folder)
    switch.use(MEAN)
    loader.loaded.clear()
    with caplog.at_level(logging.WARNING, "spacy_sam"):
        switch.use(TIES)
    assert ("damaged" in caplog.text) == (place != "gone")
    assert loader.loaded == {"expert0": 1, "expert1": 1}
    assert same(state(model), merged(TIES))
    assert file.read_bytes() == sound
    switch.restore()
    assert same(state(model), merged(TaskModelSpec()))


# Settings of the engine


def test_engine_finds_what_another_engine_merged(bank_copy, tmp_path):
    folder = tmp_path / "cache"
    requests = [Request(spec, ("person", "place"), "Anna Keller moved to Bern.") for spec in (TIES, MEAN)]
    make = make_torch_engine("cpu", cache_bytes=0, cache_dir=str(folder), cache_dir_bytes=1 << 20)
    first = [answer.text for answer in make(bank_copy).generate(requests)]
    kept = [TIES, MEAN]
    assert len(files(folder)) == len(kept)
    versions = [bank_copy.of_versions(spec) for spec in kept]
    second: Any = make(bank_copy)
    bank_copy.remove("expert0")  # its merged weights are there
    asked = [request._replace(task_model=spec) for request, spec in zip(requests, versions)]
    assert [answer.text for answer in second.generate(asked)] == first
    assert (second.switch.cache.max_bytes, second.switch.cache.n_bytes) == (0, 0)


def test_engine_keeps_nothing_on_disk_by_default(bank_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    engine = TorchEngine(bank_copy, resolve_method, device="cpu")
    engine.generate([Request(TIES, ("person",), "Anna")])
    assert files(tmp_path) == before
    assert engine.switch.cache.max_bytes == 1 << 30
    assert engine.switch.cache.n_bytes > 0


@pytest.mark.parametrize("setting", ["cache_bytes", "cache_dir_bytes"])
@pytest.mark.parametrize("value", [-1, "128", 1.5, True, None])
def test_engine_bad_sizes_are_refused_before_loading(setting, value):
    with pytest.raises(SamError) as caught:
        make_torch_engine(**{setting: value})
    assert caught.value.code == "S205"
    assert caught.value.fields["setting"] == setting


def test_engine_folder_that_cannot_be_used(bank_copy, tmp_path):
    (tmp_path / "file").write_text("")
    with raises("S414"):
        make_torch_engine("cpu", cache_dir=str(tmp_path / "file"))(bank_copy)


# Several processes

HAMMER = """
import random, sys
from pathlib import Path
import torch
from spacy_sam.merge.cache import Damaged, MergedCache

folder, seed, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
choose = random.Random(seed)
cache = MergedCache(folder, size, "base")
n_found = 0
for _ in range(300):
    number = choose.randrange(6)
    weights = {f"w{n}": torch.full((50, 20), number + n / 7) for n in range(8)}
    stored = cache.open(f"{number:016x}", weights)
    if stored is None:
        found = dict(cache.keep(f"{number:016x}", weights, iter(weights.items())))
    else:
        found = dict(stored)
        stored.close()
        n_found += 1
    assert all(torch.equal(found[name], weight) for name, weight in weights.items()), "another task model's weights"
print(n_found)
"""


def test_processes_share_a_folder(tmp_path):
    """They write the same files, remove them, and read them meanwhile: nobody fails, and the folder keeps its bound."""
    size = 3 * (8 * 50 * 20 * 4 + 1500)  # of three of six
    command = [sys.executable, "-c", HAMMER, str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(seed), str(size)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    done = [(*process.communicate(timeout=240), process.returncode) for process in processes]
    for out, messages, code in done:
        assert (messages, code) == ("", 0)
        assert int(out) > 0
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= size
    assert all(path.name.endswith(".safetensors") for path in tmp_path.iterdir())


def test_reader_goes_on_when_its_file_is_removed_or_replaced(cache):
    if sys.platform == "win32":
        pytest.skip("open files cannot be removed there")
    weights = some_weights()
    for change in (lambda file: file.unlink(), lambda file: write(cache, NAMES[0], weights)):
        write(cache, NAMES[0], weights)
        stored = cache.open(NAMES[0], weights)
        assert stored is not None
        with closing(stored):
            reading = iter(stored)
            found = dict([next(reading)])
            change(cache.folder / f"{NAMES[0]}.safetensors")
            found.update(reading)
        assert same(found, weights)
