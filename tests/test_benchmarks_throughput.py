"""Throughput's own parts: baselines do our work, texts come once, and tiny runs go through. No times are asserted."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
import typer
from helpers import make_tiny_bank
from remembering import REMEMBERED, REMEMBERED_LABELS
from typer.testing import CliRunner

from benchmarks import common, gpu, random_model, throughput, timing
from benchmarks.baselines import Generate, SpacyLlm
from benchmarks.measures import Pipe, halves
from benchmarks.texts import Texts
from benchmarks.timing import ForwardTime, Output, race
from spacy_sam.bank import ExpertBank
from spacy_sam.corpora import load_dataset
from spacy_sam.generate.engine import Request
from spacy_sam.generate.torch_engine import TorchEngine
from spacy_sam.plan import TaskModelSpec
from spacy_sam.registered import resolve_method
from spacy_sam.train.config import expand, read_config

ROOT = Path(__file__).parents[1]
INLINE = {"name": "spacy_sam.Inline.v1", "max_labels": 40}
CPU = torch.device("cpu")
WRITTEN = """## rivers | encyclopedia
types: person; river; city
[Mungo Park|person] reached the [Niger|river].
[Khartoum|city] is far off.
Nobody swims here in May.
## novels | review
types: person; book; city; author
[Oona Vask|person] sails from [Tallinn|city].
I could not sleep.
[The Salt Ledger|book] is by [Ada Lund|author].
"""
PART = """## towns | {name}
types: person; city
[Ann {name}|person] saw [Bern|city].
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A written corpus of twelve sentences, with files where the experts of the causal bank look for theirs."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "common").mkdir()
    (folder / "common" / "ca01.txt").write_text(WRITTEN, encoding="utf8")
    for name in ("ce", "cf", "cl", "cm", "cn", "cs"):
        (folder / "common" / f"{name}01.txt").write_text(PART.format(name=name), encoding="utf8")
    return folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("banks") / "causal"
    make_tiny_bank(path, prompt=INLINE)
    return path


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results files go, in place of the project's own."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    return tmp_path


def run_command(main: Any, *arguments: Any) -> Any:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_tiny_run_has_all_figures(written, causal, results, monkeypatch):
    tagger = make_tiny_bank(results / "tagger", n_experts=2, architecture="tagger", prompt=INLINE).path
    monkeypatch.setattr(throughput, "IMAGES", results / "img")
    monkeypatch.setattr(throughput, "N_WARM", 1)
    sizes = ["--documents", 2, "--single", 1, "--memory", 4, "--repeats", 1, "--threads", 1, "--device", "cpu"]
    banks = ["--bank", causal, "--tagger-bank", tagger, "--written", written]
    done = run_command(throughput.main, *banks, *sizes, "--plots", "--name", "tiny")
    assert done.exit_code == 0, done.output
    data = json.loads((results / "tiny.json").read_text(encoding="utf8"))
    shared = ["two_models/one", "sampling_six/one", "forward_share"]
    expected = ["corpus/spacy_llm", "corpus/generate_16", "single/generate", *shared, "tagger/docs_per_s"]
    assert list(data["figures"]) == [*expected, *(f"tagger/{name}" for name in shared)]
    assert all(value > 0 for value in data["figures"].values())
    assert data["figures"]["forward_share"] < 1
    assert set(data["measured"]["causal"]["shapes"]) == {"short", "paragraphs", "forty_labels"}
    for shape in data["measured"]["causal"]["shapes"].values():
        assert len({line["n_tokens"] for line in shape["corpus"].values()}) == 1  # the same work for all
        assert shape["corpus"]["engine"]["same_answers"] == shape["single"]["engine"]["same_answers"] == 1
    assert set(data["measured"]["tagger"]["shapes"]["short"]["corpus"]) == {"sam", "engine"}
    assert (results / "img" / "throughput_linear.png").is_file()


def test_without_a_bank_it_says_how_to_make_one(tmp_path):
    done = run_command(throughput.main, "--bank", tmp_path)
    assert done.exit_code == 1
    assert "configs/causal.cfg" in done.output


@pytest.fixture(scope="module")
def remembered(remembering_bank: ExpertBank) -> Dict[str, Any]:
    """An engine of the bank that knows its answers, requests, and a `generate` on the same model."""
    engine = TorchEngine(remembering_bank, resolve_method, device="cpu")
    requests = [Request(TaskModelSpec(), REMEMBERED_LABELS, text) for text in REMEMBERED]
    return {"engine": engine, "requests": requests, "generate": Generate(engine.model, engine.encoder)}


@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("constrained", [True, False])
def test_generate_writes_what_the_engine_writes(remembering_bank, remembered, size, by_length, constrained):
    engine = TorchEngine(remembering_bank, resolve_method, device="cpu", constrained=constrained)
    completions = engine.generate(remembered["requests"])
    lengths = [len(completion.logprobs) for completion in completions]
    output = remembered["generate"](remembered["requests"], lengths, size, by_length)
    assert output == Output(tuple(completion.text for completion in completions), sum(lengths))


def test_generate_goes_on_after_the_end(remembered):
    (output,) = (remembered["generate"](remembered["requests"], [50] * 4, 4),)
    assert output.n_tokens == 200


def test_spacy_llm_writes_as_many_tokens_as_it_is_told(remembered):
    llm = SpacyLlm(remembered["generate"], REMEMBERED_LABELS)
    prompts: List[str] = []
    complete = llm.model._complete
    llm.model._complete = lambda prompt, length: prompts.append(prompt) or complete(prompt, length)  # type: ignore
    assert llm(list(REMEMBERED), [3, 1, 4, 2]) == Output((), 10)
    assert llm(list(REMEMBERED)[:1], [5]) == Output((), 5)
    assert all(f"Paragraph: {text}\n" in prompt for text, prompt in zip(REMEMBERED, prompts))
    assert "person, place" in prompts[0]


def test_recorded_requests_are_the_components_own(causal):
    pipe = Pipe(causal, halves(causal), {"@misc": "spacy_sam.TorchEngine.v1", "device": "cpu"})
    labels = [f"type {number}" for number in range(50)]
    requests, completions = pipe.recorded("Anna saw Bern.", labels)
    assert [request.text for request in requests] == ["Anna saw Bern."] * 4  # two task models, two groups of labels
    assert [request.task_model for request in requests[::2]] == list(pipe.component.plan.versions)
    assert [request.task_model.experts for request in requests[::2]] == [spec.experts for spec in halves(causal)]
    assert [completion.text for completion in pipe.engine.generate(requests)] == [c.text for c in completions]
    assert "generate" not in vars(pipe.engine)


def test_texts_come_once(written):
    texts = Texts(written)
    short = texts.take("short", 3) + texts.take("forty_labels", 3)
    assert len({*short, *texts.take("short", 6)}) == 12
    assert texts.labels("short")[:2] == ["city", "person"]
    assert "Mungo Park reached the Niger. Khartoum is far off. Nobody swims here in May." in texts.take("paragraphs", 8)
    assert Texts(written).take("short", 3) == short[:3]


def test_runners_take_turns():
    calls: List[str] = []

    def runner(name: str) -> Any:
        return lambda job: calls.append(f"{name}{job}") or Output((), 1)  # type: ignore[func-returns-value]

    found = race({"a": runner("a"), "b": runner("b")}, ["1", "2", "3"], CPU, lambda: calls.append("-"))
    assert "".join(calls) == "-a1-b1-b2-a2-a3-b3"
    assert {name: len(seconds) for name, seconds in found.seconds.items()} == {"a": 3, "b": 3}


def test_ratio_is_of_the_same_job():
    found = timing.Race({"slow": [2.0, 30.0, 8.0], "fast": [1.0, 10.0, 2.0]}, {})
    assert found.ratio("slow", "fast") == 3
    assert found.per_second("fast", [1, 10, 1]) == 1


def test_forward_time_is_that_of_the_outermost_part(monkeypatch):
    readings = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(readings))
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Linear(2, 2))
    with ForwardTime(model, CPU) as inside:
        model(torch.ones(2))
        model[0](torch.ones(2))
        model[0][0](torch.ones(2))
    assert inside.seconds == 3
    model(torch.ones(2))
    assert inside.seconds == 3


def test_causal_config_finds_its_corpora(written, tmp_path):
    command = [sys.executable, ROOT / "scripts" / "make_causal_corpora.py", tmp_path, "--written", written]
    subprocess.run([*command, "--n-records", "20"], check=True, capture_output=True)
    config = read_config(ROOT / "configs" / "causal.cfg", {"paths.data": str(tmp_path)})
    assert len(config.domains) == 6
    for section in config.domains.values():
        assert [len(load_dataset(path).records) for path in expand(section.train)] == [2]
    (vocabulary,) = expand(config.base.texts)
    texts = [record.text for record in load_dataset(vocabulary).records]
    assert any("⟨ city⟩" in text for text in texts[20:])
    assert not any("⟨" in text for text in texts[:20])


def test_gpu_benchmark_runs_tiny(results):
    done = run_command(gpu.main, "--tiny")
    assert done.exit_code == 0, done.output
    data = json.loads((results / "gpu_tiny.json").read_text(encoding="utf8"))
    assert list(data["rows"]) == ["1", "2", "4"]
    for rows, line in data["rows"].items():
        assert line["same_answers"] == 1
        for name in ("engine", "grammar", "generate"):
            assert line[name]["tokens_per_s"] > 0
        assert {f"tokens_per_s/{rows}", f"bandwidth_share/{rows}", f"peak_share/{rows}"} <= set(data["figures"])


def test_gpu_budget_has_room_for_the_rows(tmp_path):
    model = random_model.Model(random_model.TINY, CPU, torch.float32)
    work = gpu.Work((2,), new_tokens=3, words=5, n_labels=2, repeats=1, entity_bias=0.0)
    bench = gpu.Bench(model, model.bank(tmp_path), work, gpu.Card(1e9, 1e12))
    engine = bench.engine(2, 3, constrained=False)
    sizes: List[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    engine.generate(bench.requests(4))
    hook.remove()
    assert set(sizes) <= {1, 2}  # the prefix is one row
    assert sizes.count(2) >= 2 * 3


def test_sizes_of_an_8b_model():
    with torch.device("meta"):
        model = random_model.Model.__new__(random_model.Model)
        model.config = random_model.LlamaConfig(**random_model.LLAMA_8B)
        model.measure(random_model.AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16))
    assert model.n_parameters == 8_030_261_248
    assert model.token_bytes == 131_072
    assert model.step_bytes(1, 0) == 2 * (8_030_261_248 - 128_256 * 4096)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_benchmark_says_that_there_is_no_gpu(results):
    done = run_command(gpu.main)
    assert done.exit_code == 1
    assert "--tiny" in done.output
    assert not list(results.iterdir())
