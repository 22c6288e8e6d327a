"""Cost of merging: TIES of large matrices beside peft, memory, thresholds, an 8B model, and the bundled bank from a sample on.

Example: python -m benchmarks.merging
"""

import time
from typing import Any, Dict, List

import torch
import typer

from benchmarks import merge_costs as costs
from benchmarks.common import write_results
from benchmarks.latency import LABELS, texts
from spacy_sam import evaluate as ev
from spacy_sam.merge.methods import Ties
from spacy_sam.plan import TaskModelSpec
from spacy_sam.settings import DENSITY, SCALE

N_SAMPLE, N_RUNS = 10, 5
SVD_SHAPE = (1024, 4096)
NOTES = {
    "ties/peft": "Time of peft.utils.merge_utils.ties on dense dW that are given, divided by the time of ours, which makes dW "
    "from the factors; three random experts of rank 16, density .2, runs in turns, medians; the smallest of the shapes.",
    "ties_svd/peft": "peft add_weighted_adapter('ties_svd', svd_rank=16) on one linear layer of 1024 x 4096, divided by ours in "
    "its weight. A smaller layer than the others, for peft's singular values. peft's result has rank 16, ours is TIES itself.",
    "peak_matrices": "Resident memory from before the merge to its highest, in float32 matrices of 4096 x 14336, in a process of "
    "its own; the result is counted, factors and base are not. peft's is from before it has dense dW.",
    "select_merge_s": "From a loaded pipeline with ten new texts to the first document annotated: six single experts, "
    "selection, and the merges of up to two task models. Encoder and engine are loaded before, and no merged weights are "
    "cached; median of 5.",
    "switch_ms": "Between two task models whose merged weights are cached, bundled bank, median.",
    "floor_share": "A merge must at least read the base and write the result. Time of copying a float32 matrix, divided by the "
    "time of our merge to float32, over all matrices of the 8B model: the share of the memory's speed that is reached.",
    "8B": "Seconds of a matrix times the number of such matrices in a Llama of 8 B parameters; base and result in bfloat16, "
    "without reading and writing files. The floor is the time of copying them. peft's ends with dW in float32.",
    "mergekit": "mergekit 0.1.5, only if it is installed: its trimming sorts all entries. Its functions on dense dW, as "
    "for peft, one run. Its LoRA path also writes each expert as a whole model first, which is not counted.",
}


def measure_shapes(device: str, repeats: int) -> Dict[str, Dict[str, float]]:
    """Seconds by shape and way."""
    found = {}
    for shape in costs.SHAPES:
        found[f"{shape[0]} x {shape[1]}"] = costs.compare_with_peft(shape, device, repeats)
        print(shape, {name: round(value, 4) for name, value in found[f"{shape[0]} x {shape[1]}"].items()})
    return found


def of_8b(by_shape: Dict[str, Dict[str, float]], way: str) -> float:
    """Seconds for all matrices of the 8B model."""
    return sum(count * times[way] for count, times in zip(costs.SHAPES.values(), by_shape.values()))


def measure_pipeline(device: str) -> Dict[str, float]:
    """Seconds of loading, and from a new sample to the first document, with the bundled bank."""
    nlp, component = ev.make_pipeline(None, LABELS, engine={"@misc": "spacy_sam.TorchEngine.v1", "device": device})
    found = {"engine_load_s": costs.seconds(lambda: component.parts.annotator)}
    found["encoder_load_s"] = costs.seconds(lambda: component.parts.encoder(["Some text."]))
    engine: Any = component.parts.annotator.engine
    fresh = texts((N_RUNS + 1) * N_SAMPLE)
    times: List[float] = []
    for run in range(N_RUNS + 1):  # the first is not counted
        engine.switch.restore()
        engine.switch._cache.clear()
        sample = fresh[run :: N_RUNS + 1]
        start = time.perf_counter()
        plan = component.select(sample)
        next(iter(component.pipe([nlp.make_doc(sample[0])], plan=plan)))
        times.append(time.perf_counter() - start)
    found["select_merge_s"] = costs.median(times[1:])
    method = Ties(DENSITY, SCALE).config
    names = [expert.name for expert in component.parts.bank.experts]
    specs = [TaskModelSpec(tuple(names[:3]), (), method), TaskModelSpec(tuple(names[3:6]), (), method)]
    found["merge_ms"] = 1000 * costs.median([_merge_anew(engine.switch, specs[run % 2]) for run in range(6)])
    found["switch_ms"] = costs.switch_ms(engine.switch, specs)
    return found


def _merge_anew(switch: Any, spec: TaskModelSpec) -> float:
    switch._cache.clear()
    return costs.seconds(lambda: switch.use(spec))


def main(
    device: str = typer.Option("cpu", help="cpu or cuda."),
    repeats: int = typer.Option(3, min=1, help="Runs of each way."),
    name: str = typer.Option("merging", help="Name of the results file."),
) -> None:
    """Measure and write `results/NAME.json`."""
    pipeline = measure_pipeline(device)
    print({key: round(value, 3) for key, value in pipeline.items()})
    by_shape = measure_shapes(device, repeats)
    svd = costs.compare_ties_svd(SVD_SHAPE, device, repeats)
    peak = {way: costs.peak_matrices(way, costs.LARGEST, device) for way in ("ours", "peft")}
    figures = {
        "ties/peft": round(min(times["peft"] / times["ours"] for times in by_shape.values()), 1),
        "ties_svd/peft": round(svd["peft"] / svd["ours"], 1),
        "peak_matrices": round(peak["ours"], 2),
        "select_merge_s": round(pipeline["select_merge_s"], 2),
        "switch_ms": round(pipeline["switch_ms"], 1),
        "floor_share": round(of_8b(by_shape, "copy") / of_8b(by_shape, "ours"), 3),
        "8B merge_s": round(of_8b(by_shape, "ours into bfloat16"), 1),
        "8B floor_s": round(of_8b(by_shape, "copy of bfloat16"), 1),
        "8B peft_s": round(of_8b(by_shape, "peft"), 1),
    }
    details: Dict[str, Any] = {
        "notes": NOTES,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "seconds": _rounded(by_shape),
        "matrices_of_8B": {f"{rows} x {columns}": count for (rows, columns), count in costs.SHAPES.items()},
        "ties_svd_seconds": _rounded(svd),
        "peak": _rounded(peak),
        "pipeline": _rounded(pipeline),
    }
    if device == "cpu":
        details["thresholds_seconds"] = _rounded(costs.compare_thresholds(costs.LARGEST))
    if costs.has_mergekit():
        details["mergekit_seconds"] = _rounded(_mergekit(device))
    print(write_results(name, figures, **details))
    print(figures)


def _mergekit(device: str) -> Dict[str, float]:
    """One run on one of the smaller shapes: it sorts all entries."""
    experts = costs.random_experts((4096, 4096), device)
    deltas = [each.matrices["x"].delta() for each in experts.values()]
    return {
        "4096 x 4096, mergekit": costs.seconds(lambda: costs.mergekit_merge(deltas), device),
        "4096 x 4096, ours": costs.seconds(lambda: costs.merge(experts), device),
    }


def _rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _rounded(value) for key, value in values.items()}
    return float(f"{values:.4g}")


if __name__ == "__main__":
    typer.run(main)
