"""Documents and tokens per second against transformers' `generate` and spacy-llm, on one causal model with the same prompts.

    python scripts/make_causal_corpora.py runs/causal/corpora
    python -m spacy sam train configs/causal.cfg runs/causal/bank --no-score
    python -m benchmarks.throughput --plots

All take turns on the same texts, which no engine has seen before; figures are medians over the repetitions. Prompts are those
that the component makes. A baseline writes as many tokens for a document as our answer has, so that the work is the same however
well the model does without a grammar. The bundled bank of taggers, which `generate` is no measure for, is measured alone.
"""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import torch
import typer
from spacy import registry
from wasabi import msg

from benchmarks.baselines import Generate, SpacyLlm
from benchmarks.common import write_results
from benchmarks.measures import Pipe, forward_share, halves, sampling, stream, two_models
from benchmarks.texts import SHAPES, WRITTEN, Texts
from benchmarks.timing import Output, Race, race
from spacy_sam.bank import bundled_bank_path
from spacy_sam.generate.engine import Completion, Request

BANK = Path("runs/causal/bank")
IMAGES = Path("docs/img")
VLLM = "spacy_sam.VLLMEngine.v1"
VLLM_SETTINGS = '{"options": {"gpu_memory_utilization": 0.2}}'  # on the CPU, too: the share of memory that it takes
BATCH = 16
SHARE = {"paragraphs": 4}  # of so many documents one, as they are longer
N_WARM = 4


@dataclass(frozen=True)
class Settings:
    """documents: Of a corpus. single: Documents that come one by one. memory: Documents of the long stream."""

    documents: int
    single: int
    memory: int
    repeats: int
    device: Optional[str]
    dtype: Optional[str]
    threads: int

    @property
    def engine(self) -> Dict[str, Any]:
        return {"@misc": "spacy_sam.TorchEngine.v1", "device": self.device, "dtype": self.dtype}


@dataclass(frozen=True)
class Job:
    """Texts, what is asked of them, and the requests and completions of each by the component."""

    texts: List[str]
    labels: List[str]
    asked: List[List[Request]]
    given: List[List[Completion]]

    @property
    def requests(self) -> List[Request]:
        return [request for of_text in self.asked for request in of_text]

    @property
    def completions(self) -> List[Completion]:
        return [completion for of_text in self.given for completion in of_text]

    @property
    def lengths(self) -> List[int]:
        """Tokens of each completion: what a baseline writes for its request."""
        return [max(1, len(completion.logprobs)) for completion in self.completions]

    @property
    def text_lengths(self) -> List[int]:
        return [max(1, sum(len(completion.logprobs) for completion in of_text)) for of_text in self.given]


class Measured:
    """One bank: its pipelines, and what is measured on them."""

    def __init__(self, bank: Path, texts: Texts, settings: Settings, rival: Optional[Dict[str, Any]] = None) -> None:
        """bank (Path): Its folder. rival (Optional[Dict]): Config block of vLLM's engine, to compare it on the same bank."""
        self.texts = texts
        self.settings = settings
        specs = halves(bank)
        # Each has an engine of its own: what one remembers of a text must not help another.
        self.reference, self.sam, self.other = (Pipe(bank, specs[:1], settings.engine) for _ in range(3))
        self.both = Pipe(bank, specs, settings.engine)
        self.device: torch.device = self.sam.engine.device
        self.rival = registry.resolve({"engine": rival})["engine"](self.sam.bank) if rival is not None else None
        self.is_tagger = self.sam.engine.tagger is not None

    def jobs(self, shape: str, size: int, count: int) -> List[Job]:
        """Jobs of texts that were never used, with the answers of the reference, which is used for nothing else."""
        labels = self.texts.labels(shape)
        made = []
        for _ in range(count):
            texts = self.texts.take(shape, size)
            calls = [self.reference.recorded(text, labels) for text in texts]
            made.append(Job(texts, labels, [asked for asked, _ in calls], [given for _, given in calls]))
        return made

    def shape(self, shape: str) -> Dict[str, Any]:
        """Texts of one shape: as a corpus, and one by one."""
        settings = self.settings
        (warm,) = self.jobs(shape, N_WARM, 1)
        size = max(1, settings.documents // SHARE.get(shape, 1))
        found: Dict[str, Any] = {}
        for name, runners, count in (
            ("corpus", self._corpus(warm.labels), size),
            ("single", self._single(), max(1, settings.single // SHARE.get(shape, 1))),
        ):
            for run in runners.values():
                run(warm)
            jobs = self.jobs(shape, count, settings.repeats)
            found[name] = self._table(race(runners, jobs, self.device), jobs)
        return found

    def _corpus(self, labels: Sequence[str]) -> Dict[str, Any]:
        runners: Dict[str, Any] = {
            "sam": lambda job: self._sam(job, [job.texts]),
            "engine": lambda job: self._engine(self.other.engine, [job.requests]),
        }
        if self.is_tagger:
            return runners
        generate = self.generate
        llm = SpacyLlm(generate, labels)
        runners["generate_16"] = lambda job: generate(job.requests, job.lengths, BATCH)
        runners["generate_16_by_length"] = lambda job: generate(job.requests, job.lengths, BATCH, by_length=True)
        runners["spacy_llm"] = lambda job: llm(job.texts, job.text_lengths)
        if self.rival is not None:
            runners["vllm_cpu"] = lambda job: self._engine(self.rival, [job.requests])
        return runners

    def _single(self) -> Dict[str, Any]:
        runners: Dict[str, Any] = {
            "sam": lambda job: self._sam(job, [[text] for text in job.texts]),
            "engine": lambda job: self._engine(self.other.engine, job.asked),
        }
        if not self.is_tagger:
            generate = self.generate
            runners["generate"] = lambda job: generate(job.requests, job.lengths, 1)
        return runners

    @property
    def generate(self) -> Generate:
        """On the reference's model, which has the task model's weights by now."""
        return Generate(self.reference.engine.model, self.reference.engine.encoder)

    def _sam(self, job: Job, parts: Sequence[Sequence[str]]) -> Output:
        for part in parts:
            self.sam.run(part, job.labels)
        return Output((), self._n_tokens(job))

    def _engine(self, engine: Any, parts: Sequence[Sequence[Request]]) -> Output:
        completions = [completion for part in parts for completion in engine.generate(part)]
        return Output(tuple(c.text for c in completions), sum(len(c.logprobs) for c in completions))

    def _n_tokens(self, job: Job) -> int:
        """Tokens that are written; of a tagger, which writes none, those of the texts."""
        if self.is_tagger:
            return sum(len(self.reference.engine.token_starts(text)) for text in job.texts)
        return sum(len(completion.logprobs) for completion in job.completions)

    def _table(self, found: Race, jobs: Sequence[Job]) -> Dict[str, Any]:
        """By runner, what it does in a second, how long it takes against `sam`, and how many of its answers are ours."""
        table: Dict[str, Any] = {}
        for name, outputs in found.outputs.items():
            table[name] = {
                "docs_per_s": found.per_second(name, [len(job.texts) for job in jobs]),
                "tokens_per_s": found.per_second(name, [output.n_tokens for output in outputs]),
                "time/sam": found.ratio(name, "sam"),
                "n_tokens": sum(output.n_tokens for output in outputs),
                "seconds": found.seconds[name],
            }
            pairs = [pair for job, o in zip(jobs, outputs) for pair in zip(job.completions, o.answers)]
            if pairs:
                table[name]["same_answers"] = sum(ours.text == theirs for ours, theirs in pairs) / len(pairs)
        return table

    def close(self) -> None:
        """End the other engine's process, if there is one."""
        if self.rival is not None:
            self.rival.close()

    def everything(self) -> Dict[str, Any]:
        """All measurements, as the results file has them."""
        settings, labels = self.settings, self.texts.labels("short")
        found: Dict[str, Any] = {"shapes": {}}
        for shape in SHAPES:
            found["shapes"][shape] = self.shape(shape)
            _say(shape, found["shapes"][shape])

        def take(size: int) -> List[List[str]]:
            return [self.texts.take("short", size) for _ in range(settings.repeats)]

        found["two_models/one"] = two_models(self.sam, self.both, labels, take(settings.documents))
        found["sampling_six/one"] = sampling(self.sam, self.other, labels, take(10))
        found["forward_share"] = forward_share(self.sam, labels, take(settings.documents))
        found["stream"] = stream(self.sam, labels, self.texts.take("short", settings.memory))
        return found


def _say(shape: str, found: Dict[str, Any]) -> None:
    for name, table in found.items():
        rates = ", ".join(f"{runner} {line['docs_per_s']:.1f}" for runner, line in table.items())
        print(f"{shape}, {name}, documents a second: {rates}", flush=True)


def figures(causal: Optional[Dict[str, Any]], tagger: Optional[Dict[str, Any]]) -> Dict[str, float]:
    """The ratios that are quoted, of short sentences. How much longer a baseline takes than `nlp.pipe` with our component."""
    found: Dict[str, float] = {}
    shared = ("two_models/one", "sampling_six/one", "forward_share")
    if causal is not None:
        corpus, single = causal["shapes"]["short"]["corpus"], causal["shapes"]["short"]["single"]
        for name in ("spacy_llm", "generate_16", "vllm_cpu"):
            if name in corpus:
                found[f"corpus/{name}"] = corpus[name]["time/sam"]
        found["single/generate"] = single["generate"]["time/sam"]
        found.update({name: causal[name] for name in shared})
    if tagger is not None:
        found["tagger/docs_per_s"] = tagger["shapes"]["short"]["corpus"]["sam"]["docs_per_s"]
        found.update({f"tagger/{name}": tagger[name] for name in shared})
    return {name: round(value, 3) for name, value in found.items()}


NOTES = {
    "figures": "of short sentences; those of other shapes are in the details, as are documents and tokens a second",
    "lengths": "each baseline writes exactly as many tokens for a document as our answer has, whatever they are",
    "spacy_llm": "prompt and answers are of its own kind, and the prompt is longer: only the number of new tokens is the same",
    "same_answers": "share of answers that are those of the engine when it gets each text alone; those of generate are others, "
    "as the base learned only what the grammar leaves open",
    "tokens": "new tokens; of a tagger, those of the texts (sam) or of the answers it stands for (engine)",
}


def plot(streams: Dict[str, Dict[str, Any]], path: Path) -> None:
    """Time and memory by the number of documents."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(6, 6), layout="constrained")
    for name, line in streams.items():
        above.plot(line["documents"], line["seconds"], marker=".", label=name)
        below.plot(line["documents"], line["resident_mb"], marker=".", label=name)
    above.set_ylabel("seconds")
    above.legend()
    below.set(xlabel="documents", ylabel="memory of the process, MB", ylim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _banks(bank: Path, tagger: bool, tagger_bank: Optional[Path]) -> Iterator[tuple]:
    yield "causal", bank
    if tagger:
        yield "tagger", tagger_bank or bundled_bank_path()


def main(
    bank: Path = typer.Option(BANK, help="The causal bank; see configs/causal.cfg."),
    tagger: bool = typer.Option(True, help="Measure the bundled bank, too."),
    tagger_bank: Optional[Path] = typer.Option(None, help="Another bank of taggers in its place."),
    documents: int = typer.Option(96, min=1, help="Documents of a corpus; of paragraphs a quarter."),
    single: int = typer.Option(16, min=1, help="Documents that come one by one."),
    memory: int = typer.Option(10_000, min=2, help="Documents of the long stream."),
    repeats: int = typer.Option(5, min=1, help="Repetitions, each on other texts."),
    written: Path = typer.Option(WRITTEN, help="Folder of the written corpus."),
    vllm_python: Optional[Path] = typer.Option(None, help="A Python with vLLM, to measure that, too."),
    vllm_settings: str = typer.Option(VLLM_SETTINGS, help=f"Settings of {VLLM}, as JSON."),
    device: Optional[str] = typer.Option(None, help="cpu or cuda."),
    dtype: Optional[str] = typer.Option(None, help="Of the task models: float32 or bfloat16."),
    threads: int = typer.Option(2, min=1, help="Cores."),
    plots: bool = typer.Option(False, "--plots", help=f"Write {IMAGES}/throughput_linear.png."),
    name: str = typer.Option("throughput", help="Name of the results file."),
) -> None:
    """Measure, and write `results/NAME.json`."""
    if not (bank / "bank.json").is_file():
        msg.fail(f"There is no bank in {bank}: make it as configs/causal.cfg says", exits=1)
    torch.set_num_threads(threads)
    settings = Settings(documents, single, memory, repeats, device, dtype, threads)
    measured: Dict[str, Dict[str, Any]] = {}
    for kind, folder in _banks(bank, tagger, tagger_bank):
        rival = None
        if kind == "causal" and vllm_python is not None:
            rival = {"@misc": VLLM, "python": str(vllm_python), **json.loads(vllm_settings)}
        one = Measured(folder, Texts(written), settings, rival)
        measured[kind] = one.everything()
        one.close()
    if plots:
        plot({kind: found["stream"] for kind, found in measured.items()}, IMAGES / "throughput_linear.png")
    if vllm_python is not None:
        measured["causal"]["vllm_settings"] = json.loads(vllm_settings)
    found = figures(measured.get("causal"), measured.get("tagger"))
    print(json.dumps(found, indent=2))
    versions = {name: version(name) for name in ("spacy-llm",)}
    print(write_results(name, found, settings=asdict(settings), notes=NOTES, more_versions=versions, measured=measured))


if __name__ == "__main__":
    typer.run(main)
