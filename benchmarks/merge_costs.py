"""Parts of the merging benchmark: random experts of given shapes, and seconds and memory of merging them in several ways."""

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import torch

from spacy_sam.adapters import Adapter, LoraFactors
from spacy_sam.merge import thresholds
from spacy_sam.merge.methods import Ties
from spacy_sam.merge.streaming import merge_by_tiles
from spacy_sam.merge.workers import Product, TileWorkers

N_EXPERTS, RANK, DENSITY = 3, 16, 0.2
# Linear layers of a Llama with 8 B parameters: how many matrices it has of each shape.
SHAPES = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}
LARGEST = (4096, 14336)
Shape = Tuple[int, int]


def random_experts(shape: Shape, device: str, seed: int = 0) -> Dict[str, Adapter]:
    """Three random experts of rank 16 that change one matrix, `x`."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for number in range(N_EXPERTS):
        a = torch.randn(RANK, shape[1], generator=generator).to(device)
        b = 0.01 * torch.randn(shape[0], RANK, generator=generator).to(device)
        made[f"expert{number}"] = Adapter({"x": LoraFactors(a, b, 2.0)})
    return made


def merge(experts: Dict[str, Adapter], base: Any = None, trim: str = "matrix") -> torch.Tensor:
    """Ours: from factors, to the merged dW, or to base + merged dW."""
    original = None if base is None else lambda name: base
    ((_, merged),) = merge_by_tiles(experts, [1.0] * len(experts), Ties(DENSITY, trim=trim), original)
    return merged


def peft_merge(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """peft's TIES of dense dW."""
    from peft.utils.merge_utils import ties

    return ties(list(deltas), torch.ones(len(deltas), device=deltas[0].device), DENSITY)


def mergekit_merge(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """mergekit's TIES of dense dW: its functions in the order of its merge."""
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask
    from mergekit.sparsify import magnitude

    kept = torch.stack([magnitude(delta, DENSITY) for delta in deltas])
    mask = get_mask(kept, method="sum", mask_dtype=kept.dtype)
    return (kept * mask).sum(0) / mask.sum(0).clamp(min=1e-8)


def has_mergekit() -> bool:
    return importlib.util.find_spec("mergekit") is not None


def seconds(work: Callable[[], Any], device: str = "cpu") -> float:
    """Of one call."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def alternate(ways: Dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> Dict[str, float]:
    """Median seconds of each way, run in turns so that a busy spell of the machine hits all of them."""
    times: Dict[str, List[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            times[name].append(seconds(work, device))
    return {name: statistics.median(found) for name, found in times.items()}


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def compare_with_peft(shape: Shape, device: str, repeats: int) -> Dict[str, float]:
    """Seconds of peft's TIES, of ours to dW and into a bfloat16 base, and of copies that move the least there is to move.

    RETURNS (Dict[str, float]): Also `difference`, the largest one between peft's result and ours.
    """
    experts = random_experts(shape, device)
    deltas = [each.matrices["x"].delta() for each in experts.values()]
    base = torch.randn(shape, device=device).bfloat16()
    result, copied, copied_base = (torch.empty_like(each) for each in (deltas[0], deltas[0], base))
    expected, merged = peft_merge(deltas), merge(experts)
    ways: Dict[str, Callable[[], Any]] = {
        "peft": lambda: peft_merge(deltas),
        "ours": lambda: merge(experts),
        "ours into bfloat16": lambda: merge(experts, base),
        "ours, global trim": lambda: merge(experts, trim="global"),
        "copy": lambda: copied.copy_(result),
        "copy of bfloat16": lambda: copied_base.copy_(base),
    }
    found = alternate(ways, repeats, device)
    found["difference"] = float((expected - merged).abs().max())
    found["peft keeps otherwise"] = float(((expected == 0) != (merged == 0)).sum())
    return found


def compare_thresholds(shape: Shape) -> Dict[str, float]:
    """Seconds for one exact trimming threshold: ways that need dense magnitudes (given), and ours, which make dW themselves."""
    factors = random_experts(shape, "cpu")["expert0"].matrices["x"]
    magnitudes = factors.delta().abs().view(-1)
    n_keep = int(DENSITY * magnitudes.numel())
    place = magnitudes.numel() - n_keep
    found: Dict[str, float] = {}

    def dense(name: str, work: Callable[[], Any]) -> float:
        values: List[float] = []
        found[f"{name} (dense)"] = seconds(lambda: values.append(float(work())))
        return values[0]

    def partition() -> Any:
        copy = magnitudes.numpy().copy()
        copy.partition(place)
        return copy[place]

    values = {
        dense("numpy.partition", partition),
        dense("torch.kthvalue", lambda: magnitudes.kthvalue(place + 1).values),
        dense("torch.topk", lambda: magnitudes.topk(n_keep).values[-1]),
        dense("torch.sort", lambda: magnitudes.sort(descending=True).values[n_keep - 1]),
    }
    with TileWorkers() as workers:
        product = Product(factors)
        cuts: List[Any] = []
        find = {
            "bracket and one pass (from factors)": lambda: cuts.append(
                thresholds.find_cuts([product], n_keep, workers)[0].value
            ),
            "histograms of bits (from factors)": lambda: cuts.append(
                thresholds._by_histograms([product], n_keep, workers)[0]
            ),
        }
        for name, work in find.items():
            found[name] = seconds(work)
    if len(values | set(cuts)) != 1:
        raise AssertionError(f"the ways differ: {values}, {cuts}")
    return found


def compare_ties_svd(shape: Shape, device: str, repeats: int) -> Dict[str, float]:
    """Seconds of peft's `add_weighted_adapter` with "ties_svd" on a module of one linear layer, and of ours into its weight."""
    from peft import LoraConfig, get_peft_model

    rows, columns = shape
    module = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False)).to(device)
    experts = random_experts(shape, device)
    model: Any = get_peft_model(module, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"]), "expert0")
    for name in list(experts)[1:]:
        model.add_adapter(name, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"]))
    layer = model.base_model.model[0]
    for name, expert in experts.items():
        layer.lora_A[name].weight.data.copy_(expert.matrices["x"].a)
        layer.lora_B[name].weight.data.copy_(expert.matrices["x"].b)

    def peft() -> None:
        model.add_weighted_adapter(list(experts), [1.0] * 3, "merged", "ties_svd", svd_rank=RANK, density=DENSITY)
        model.delete_adapter("merged")

    base = layer.base_layer.weight.detach()
    merge(experts, base)
    return alternate({"peft": peft, "ours": lambda: merge(experts, base)}, repeats, device)


def peak_matrices(way: str, shape: Shape, device: str) -> float:
    """Memory in a process of its own, from before the merge to its highest, in float32 matrices of the shape.

    way (str): "ours", from factors with the base in memory, result included; or "peft", dense dW and result included.
    """
    command = [sys.executable, "-m", "benchmarks.merge_costs", way, json.dumps(shape), device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def _measure_peak(way: str, shape: Shape, device: str) -> float:
    experts, base = random_experts(shape, device), torch.randn(shape, device=device)
    small = random_experts((512, 512), device)
    merge(small)  # threads, libraries' buffers
    peft_merge([each.matrices["x"].delta() for each in small.values()])
    work = {
        "ours": lambda: merge(experts, base),
        "peft": lambda: peft_merge([each.matrices["x"].delta() for each in experts.values()]),
    }[way]
    if device.startswith("cuda"):
        allocated = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - allocated) / base.nbytes
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the highest so far becomes what it is now
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / base.nbytes


def _status(name: str) -> float:
    """Bytes, of this process, as Linux counts them."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(f"{name}:"))
    return 1024 * float(line.split()[1])


def switch_ms(switch: Any, specs: Sequence[Any], repeats: int = 40) -> float:
    """Median milliseconds of switching between two task models whose weights are cached."""
    for spec in specs:
        switch.use(spec)
    times = [seconds(lambda spec=spec: switch.use(spec)) for _ in range(repeats // 2) for spec in specs]  # type: ignore[misc]
    return 1000 * statistics.median(times)


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


if __name__ == "__main__":
    print(_measure_peak(sys.argv[1], tuple(json.loads(sys.argv[2])), sys.argv[3]))
