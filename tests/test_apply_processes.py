"""`sam apply` on processes and on Ray: the same bytes whatever does the work, and whoever is killed."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

import psutil
import pytest
from scale_stub import run

from spacy_sam.errors import SamError
from spacy_sam.scale.schedule import Tally

TESTS = Path(__file__).parent
ROOT = TESTS.parent
STUB = TESTS / "scale_stub.py"
N_SHARDS, N_DOCS, N_KILLS = 24, 10, 20


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for shard in range(N_SHARDS):
        rows = [{"text": f"Anna met number {n} of Shard {shard}.", "id": [shard, n]} for n in range(N_DOCS + shard % 3)]
        (folder / f"{shard:02d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return folder


def outputs(out: Path) -> Dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.jsonl")}


def start(out: Path, corpus: Path, n_process: int = 2, engine: str = "local", delay: float = 0.0) -> Any:
    paths = os.pathsep.join([str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "SAM_STUB_DELAY": str(delay)}
    command = [sys.executable, str(STUB), str(out), str(n_process), engine, str(corpus)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def finish(*args: Any, timeout: float = 200, **more: Any) -> List[int]:
    """Documents, skipped shards and all shards of a run that nobody disturbs."""
    process = start(*args, **more)
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        end(process)
    assert process.returncode == 0
    return [int(n) for n in said.split()]


def end(process: Any) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    process.stdout.close()


def workers(process: Any) -> List[Any]:
    try:
        return [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.timeout(900)
def test_apply_kills(corpus, tmp_path, capsys):
    """Workers and driver are killed at random; the same command goes on, and the outputs are those of an undisturbed run."""
    calm, out = tmp_path / "calm", tmp_path / "out"
    n_documents = N_SHARDS * N_DOCS + N_SHARDS
    assert finish(calm, corpus, 1) == [n_documents, 0, N_SHARDS]
    random_ = random.Random(0)
    kills = {"worker": 0, "driver": 0}
    while sum(kills.values()) < N_KILLS:
        process = start(out, corpus, delay=0.08)
        while sum(kills.values()) < N_KILLS and process.poll() is None:
            seen = len(outputs(out))
            busy = time.monotonic() + random_.uniform(0, 0.5)
            while process.poll() is None and (time.monotonic() < busy or not workers(process)):
                time.sleep(0.01)
            kind = "driver" if random_.random() < 0.4 else "worker"
            victims = workers(process) if kind == "worker" else [process]
            if victims and process.poll() is None:
                random_.choice(victims).kill()
                kills[kind] += 1
            while kind == "worker" and process.poll() is None and len(outputs(out)) == seen:
                time.sleep(0.01)  # something gets done between two kills
            if kind == "driver":
                process.wait()
        end(process)
        if len(outputs(out)) == N_SHARDS:  # all done before the last kill: something is to do again
            for path in sorted(out.glob("*.jsonl"))[:8]:
                path.unlink()
    documents, _, shards = finish(out, corpus)
    with capsys.disabled():
        print(f"\nkilled {kills['worker']} workers and {kills['driver']} drivers")
    assert (documents, shards) == (n_documents, N_SHARDS)
    assert min(kills.values()) > 0
    assert outputs(out) == outputs(calm)
    assert not list(out.rglob("*.sam-tmp"))
    assert finish(out, corpus) == [n_documents, N_SHARDS, N_SHARDS]


def test_apply_four_processes(corpus, tmp_path):
    finish(tmp_path / "one", corpus, 1)
    finish(tmp_path / "four", corpus, 4)
    assert len(outputs(tmp_path / "one")) == N_SHARDS
    assert outputs(tmp_path / "one") == outputs(tmp_path / "four")


def test_apply_workers_end_with_their_driver(corpus, tmp_path):
    process = start(tmp_path / "out", corpus, delay=0.05)
    try:
        while not workers(process):
            time.sleep(0.01)
        orphans = workers(process)
    finally:
        end(process)
    _, alive = psutil.wait_procs(orphans, timeout=60)
    assert alive == []


def write(path: Path, *rows: Dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return path


def test_apply_worker_killed_once(tmp_path):
    """Its shard is done by another worker."""
    once = write(tmp_path / "once.jsonl", {"text": "Anna KILL", "once": str(tmp_path / "killed")})
    retried: List[str] = []
    done = run([once], tmp_path / "out", tally=Tally(on_retry=lambda key, reason: retried.append(key + reason)))
    assert retried == ["oncea worker died over it (signal SIGKILL)"]
    assert (done.all_well, done.documents, done.entities) == (True, 1, 1)


def test_apply_shard_that_kills_is_given_up(tmp_path):
    bad, good = write(tmp_path / "bad.jsonl", {"text": "KILL"}), write(tmp_path / "good.jsonl", {"text": "Anna"})
    done = run([bad, good], tmp_path / "out", retries=1)
    assert (done.unreadable, done.documents, done.all_well) == (1, 1, False)
    assert [path.name for path in (tmp_path / "out").glob("*.jsonl")] == ["good.jsonl"]
    (problem,) = [json.loads(line) for line in done.problems.read_text(encoding="utf8").splitlines()]
    assert problem["input"] == str(bad)
    assert "SIGKILL" in problem["problem"]


@pytest.mark.parametrize(("device", "reason"), [("cpu:dies", "SIGKILL"), ("cpu:fails", "no such thing")])
def test_apply_workers_that_do_not_start(tmp_path, device, reason):
    good = write(tmp_path / "good.jsonl", {"text": "Anna"})
    with pytest.raises(SamError, match=rf"^\[S816\].*{reason}"):
        run([good], tmp_path / "out", devices=(device,))


def test_apply_bug_and_coded_error(tmp_path):
    """Of an error that nobody foresaw, the shard is reported; a coded one is the user's to mend, and ends the run."""
    bug, good = write(tmp_path / "bug.jsonl", {"text": "BUG"}), write(tmp_path / "good.jsonl", {"text": "Anna"})
    done = run([bug, good], tmp_path / "out")
    assert (done.unreadable, done.documents) == (1, 1)
    coded = write(tmp_path / "coded.jsonl", {"text": "CODED"})
    with pytest.raises(SamError, match=r"^\[S401\]"):
        run([coded], tmp_path / "other")


# Ray

RAY = """
import json, sys
from pathlib import Path
import ray
from scale_stub import run
from spacy_sam.errors import SamError
from spacy_sam.scale.schedule import Tally

def finished(result):
    "What is there when a shard ends."
    events.append([result.key, len(list(out.glob("*.jsonl")))])

if __name__ == "__main__":
    out, n_process, cpus, *inputs = sys.argv[1:]
    out, events, retried = Path(out), [], []
    if int(cpus):
        ray.init(num_cpus=int(cpus), include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    tally = Tally(on_result=finished, on_retry=lambda key, reason: retried.append(key))
    done = run([Path(i) for i in inputs], out, engine="ray", n_process=int(n_process), tally=tally)
    print(json.dumps([done.documents, done.unreadable, events, retried]))
"""


def on_ray(tmp_path: Path, out: Path, n_process: int, cpus: int, *inputs: Path) -> Any:
    """A run on Ray, in a process of its own, so that a hang is a failure. cpus: Of a cluster that is there before; 0 for none."""
    script = tmp_path / "on_ray.py"
    script.write_text(RAY, encoding="utf8")
    paths = os.pathsep.join([str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), str(out), str(n_process), str(cpus), *map(str, inputs)],
        env={**os.environ, "PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(600)
def test_apply_on_ray(corpus, tmp_path):
    """As on one process; each output is there when its shard is done, not at the end; a killed actor is replaced."""
    pytest.importorskip("ray")
    write(corpus / "once.jsonl", {"text": "Anna KILL", "once": str(tmp_path / "killed")})
    documents, unreadable, events, retried = on_ray(tmp_path, tmp_path / "ray", 2, 0, corpus)
    assert (documents, unreadable) == (N_SHARDS * N_DOCS + N_SHARDS + 1, 0)
    assert retried == ["once"]
    finish(tmp_path / "local", corpus, 1)
    assert len(outputs(tmp_path / "ray")) == N_SHARDS + 1
    assert outputs(tmp_path / "ray") == outputs(tmp_path / "local")
    assert events[0][1] <= 3
    assert all(there >= number for number, (_, there) in enumerate(events, 1))


@pytest.mark.timeout(600)
def test_apply_on_ray_without_spare_cpus(corpus, tmp_path):
    """More workers than the cluster has CPUs: those that there is room for do it all."""
    pytest.importorskip("ray")
    documents, unreadable, *_ = on_ray(tmp_path, tmp_path / "out", 3, 1, corpus)
    assert (documents, unreadable) == (N_SHARDS * N_DOCS + N_SHARDS, 0)


@pytest.mark.timeout(600)
def test_apply_on_ray_goes_on_after_its_driver_was_killed(corpus, tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    process = start(out, corpus, engine="ray", delay=0.3)
    try:
        while process.poll() is None and len(outputs(out)) < 3:
            time.sleep(0.05)
        assert process.poll() is None
    finally:
        end(process)
    documents, skipped, shards = finish(out, corpus, engine="local")
    assert (documents, shards) == (N_SHARDS * N_DOCS + N_SHARDS, N_SHARDS)
    assert skipped >= 3
    finish(tmp_path / "calm", corpus, 1)
    assert outputs(out) == outputs(tmp_path / "calm")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_apply_ray_cluster_that_does_not_answer(tmp_path, address):
    pytest.importorskip("ray")
    with pytest.raises(SamError, match=r"^\[S815\]"):
        run([write(tmp_path / "a.jsonl", {"text": "Anna"})], tmp_path / "out", engine="ray", address=address)


# A real model


@pytest.mark.timeout(600)
def test_apply_a_real_model_on_processes(remembering_bank, tmp_path):
    """Selected by one worker, annotated by one or two: the same bytes, and what the model knows."""
    from pipelines import make_nlp
    from remembering import REMEMBERED

    from spacy_sam.scale.job import PipelineSpec
    from spacy_sam.scale.run import Settings, apply_corpus

    settings = {
        "engine": {"@misc": "spacy_sam.TorchEngine.v1", "device": "cpu"},
        "strategy": {"@misc": "spacy_sam.SaM.v1", "selectors": {"similarity": None}},
        "batch_size": 3,
    }
    nlp, _ = make_nlp(remembering_bank, **settings)
    nlp.to_disk(tmp_path / "pipeline")
    for number in range(4):
        (tmp_path / "corpus").mkdir(exist_ok=True)
        write(tmp_path / "corpus" / f"{number}.jsonl", *({"text": text} for text in list(REMEMBERED) * 2))
    spec = PipelineSpec(pipeline=str(tmp_path / "pipeline"))
    plans = set()
    for n in (1, 2):
        done = apply_corpus([tmp_path / "corpus"], tmp_path / str(n), Settings(spec=spec, n_process=n))
        assert (done.documents, done.all_well) == (4 * 2 * len(REMEMBERED), True)
        plans.add(done.plan.fingerprint)
    assert len(plans) == 1
    assert outputs(tmp_path / "1") == outputs(tmp_path / "2")
    rows = [json.loads(line) for line in outputs(tmp_path / "1")["0.jsonl"].splitlines()]
    assert [[tuple(entity[:3]) for entity in row["entities"]] for row in rows] == list(REMEMBERED.values()) * 2
