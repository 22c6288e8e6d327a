"""Merging by tiles from factors: the same bits as the slow way on dense task vectors, ties and all."""

from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import pytest
import torch
from helpers import load_model
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from spacy_sam import adapters as adapters_module
from spacy_sam.adapters import Adapter, LoraFactors
from spacy_sam.bank import ExpertBank
from spacy_sam.errors import SamError
from spacy_sam.merge import streaming, thresholds
from spacy_sam.merge.materialise import WeightSwitch
from spacy_sam.merge.merged import merged_deltas, merged_weights
from spacy_sam.merge.methods import Dare, Mean, MergeMethod, TaskArithmetic, Ties, trim
from spacy_sam.merge.thresholds import find_cuts
from spacy_sam.merge.workers import Product, TileWorkers
from spacy_sam.plan import TaskModelSpec
from spacy_sam.registered import make_ties, resolve_method

# Products of these are exact, so that equal magnitudes, zeros and sums of exactly 0 are frequent.
VALUES = st.integers(-3, 3).map(lambda n: n / 2)
DENSITIES = st.sampled_from([0.001, 0.1, 0.2, 1 / 3, 0.5, 0.9, 1.0])
SHAPES = {"a": (21, 5), "b": (40, 3), "c": (4, 30)}


@contextmanager
def small_steps(n_threads: int = 1, sample: int = 16, inside: int = 1 << 16, small: int = 50) -> Iterator[None]:
    """Tiles of 8 rows, small samples, and as many threads as wanted, so that small matrices go all ways.

    small: Entries of the largest matrix that one thread does alone.
    """
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters_module, "TILE_SIZE", 16)
        patch.setattr(streaming, "SMALL", small)
        patch.setattr(thresholds, "LEAST_SAMPLE", sample)
        patch.setattr(thresholds, "LEAST_INSIDE", inside)
        torch.set_num_threads(n_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@st.composite
def experts(draw: st.DrawFn) -> Dict[str, Adapter]:
    """Two to four experts of different ranks; some do not change all matrices; some matrices are kept transposed."""
    transposed = draw(st.fixed_dictionaries({matrix: st.booleans() for matrix in SHAPES}))
    made = {}
    for number in range(draw(st.integers(2, 4))):
        changed = draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
        rank, scale = draw(st.integers(1, 3)), draw(st.sampled_from([0.5, 1.0, 2.0]))
        made[f"expert{number}"] = Adapter(
            {matrix: draw(factors(matrix, transposed[matrix], rank, scale)) for matrix in changed}
        )
    return made


@st.composite
def factors(draw: st.DrawFn, matrix: str, transposed: bool, rank: int, scale: float) -> LoraFactors:
    rows, columns = SHAPES[matrix][::-1] if transposed else SHAPES[matrix]
    seed = draw(st.integers(0, 5))
    values = torch.randint(-2, 3, (rank * (rows + columns),), generator=torch.Generator().manual_seed(seed)) / 2
    some = draw(st.lists(VALUES, min_size=4, max_size=4))
    values[: len(some)] = torch.tensor(some)[: len(values)]
    return LoraFactors(
        values[: rank * columns].view(rank, columns), values[rank * columns :].view(rows, rank), scale, transposed
    )


def random_factors(rows: int, columns: int, rank: int = 4, seed: int = 0, **settings: Any) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    return LoraFactors(a, b, settings.pop("scale", 0.3), **settings)


def dense(adapters: Dict[str, Adapter], matrix: str) -> torch.Tensor:
    shape = next(each.matrices[matrix].shape for each in adapters.values() if matrix in each.matrices)
    rows = [
        each.matrices[matrix].delta() if matrix in each.matrices else torch.zeros(shape) for each in adapters.values()
    ]
    return torch.stack(rows)


def slow_merge(adapters: Dict[str, Adapter], weights: Sequence[float], method: MergeMethod) -> Dict[str, torch.Tensor]:
    """The method on whole dense task vectors: of each matrix, or of all in one for a global trim."""
    matrices = list(dict.fromkeys(matrix for each in adapters.values() for matrix in each.matrices))
    stacks = {matrix: dense(adapters, matrix) for matrix in matrices}
    if getattr(method, "trim", "matrix") == "matrix":
        return {matrix: method(stack, weights) for matrix, stack in stacks.items()}
    whole = method(torch.cat([stack.flatten(1) for stack in stacks.values()], 1), weights)
    parts = whole.split([stack[0].numel() for stack in stacks.values()])
    return {matrix: part.view(stack[0].shape) for (matrix, stack), part in zip(stacks.items(), parts)}


def check_equal(adapters: Dict[str, Adapter], weights: Sequence[float], method: MergeMethod) -> None:
    merged = dict(merged_deltas(adapters, TaskModelSpec(tuple(adapters), tuple(weights), method.config), method))
    expected = slow_merge(adapters, weights, method)
    assert list(merged) == list(expected)
    for matrix, delta in merged.items():
        assert delta.dtype == torch.float32
        assert torch.equal(delta, expected[matrix]), matrix


# Sample and room decide which way the border is found: bracket, bracket that misses, histograms.
@pytest.mark.parametrize(("sample", "inside"), [(16, 1 << 16), (2, 1 << 16), (16, -(1 << 10))])
@pytest.mark.parametrize("trimmed", ["matrix", "global"])
@given(st.data(), experts(), DENSITIES, st.sampled_from([1.0, 0.7]))
def test_same_bits_as_on_dense_task_vectors(sample, inside, trimmed, data, adapters, density, scale):
    weights = data.draw(
        st.lists(st.sampled_from([1.0, 3.0, 0.25, 0.7]), min_size=len(adapters), max_size=len(adapters))
    )
    with small_steps(sample=sample, inside=inside):
        check_equal(adapters, weights, Ties(density, scale, trimmed))


@pytest.mark.parametrize("small", [0, 110, 1 << 20], ids=["by tiles", "both", "by matrices"])
@given(adapters=experts(), density=DENSITIES, n_threads=st.sampled_from([2, 5]))
def test_threads_change_nothing(small, adapters, density, n_threads):
    with small_steps(n_threads, small=small):
        for trimmed in ("matrix", "global"):
            check_equal(adapters, [1.0] * len(adapters), Ties(density, 1.0, trimmed))
        assert torch.get_num_threads() == n_threads


@pytest.mark.parametrize("method", [Mean(1.5), TaskArithmetic(0.7), Dare(0.5)], ids=lambda m: type(m).__name__)
@given(adapters=experts())
def test_other_methods_too(method, adapters):
    with small_steps():
        check_equal(adapters, [0.3, 2.0, 1.0, 1.0][: len(adapters)], method)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_matrices_of_many_tiles(density, n_threads):
    """With the sizes of tiles and samples as they are: ranks differ, and values differ much between rows."""
    adapters = {}
    for number, rank in enumerate((4, 16, 1)):
        each = random_factors(700, 1200, rank, seed=number)
        each.b[: 10 * number] *= 30
        adapters[f"expert{number}"] = Adapter({"x": each, "y": random_factors(300, 900, rank, seed=9 + number)})
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        for trimmed in ("matrix", "global"):
            check_equal(adapters, [1.0, 0.7, 2.0], Ties(density, 0.9, trimmed))
    finally:
        torch.set_num_threads(before)


def cut_vector(vector: Sequence[LoraFactors], n_keep: int) -> torch.Tensor:
    with TileWorkers() as workers:
        cuts = find_cuts([Product(each) for each in vector], n_keep, workers)
    return torch.cat([cut.trim_(each.delta(), 0).view(-1) for cut, each in zip(cuts, vector)])


def special_vectors() -> Dict[str, LoraFactors]:
    some = random_factors(90, 40)
    half = LoraFactors(some.a, torch.cat([torch.zeros(50, 4), some.b[50:]]), 1.0)
    return {
        "zeros": LoraFactors(torch.zeros(2, 40), torch.ones(90, 2), 1.0),
        "rank 0": LoraFactors(torch.zeros(0, 40), torch.zeros(90, 0), 1.0),
        "equal magnitudes": LoraFactors(torch.ones(1, 40), torch.tensor([1.0, -1.0]).repeat(45)[:, None], 0.5),
        "rows of zeros": half,
        "smallest numbers": LoraFactors(torch.full((1, 40), 1e-45), torch.arange(90.0)[:, None], 1.0),
        "one row": random_factors(1, 3000),
        "one column": random_factors(3000, 1),
        "negative scale": random_factors(90, 40, scale=-2.0),
    }


@pytest.mark.parametrize("name", special_vectors())
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("inside", [1 << 16, -(1 << 20)], ids=["bracket", "histograms"])
def test_special_task_vectors_are_trimmed_alike(name, share, inside):
    vector = special_vectors()[name]
    with small_steps(inside=inside):
        delta = vector.delta()
        expected = trim(delta[None], share)[0] if share else torch.zeros_like(delta)
        assert torch.equal(cut_vector([vector], int(share * delta.numel())), expected.view(-1))


@pytest.mark.parametrize("n_keep", [1, 700, 2799, 2800, 2801, 4000, 8399])
@pytest.mark.parametrize("inside", [1 << 16, -(1 << 20)], ids=["bracket", "histograms"])
def test_equal_magnitudes_at_the_border_are_kept_in_the_order_of_matrices(n_keep, inside):
    """Three matrices of one magnitude: the first `n_keep` entries stay, wherever in the three the last one is."""
    ones = [LoraFactors(torch.ones(1, 40), sign * torch.ones(70, 1), 1.0) for sign in (1, -1, 1)]
    with small_steps(inside=inside):
        kept = cut_vector(ones, n_keep) != 0
    assert kept[:n_keep].all()
    assert not kept[n_keep:].any()


def test_global_trim_is_that_of_the_whole_task_vector():
    """An expert's share goes where its values are large, and matrices that it does not change count as zeros."""
    large, small = random_factors(30, 20), random_factors(30, 20, seed=1, scale=0.001)
    adapters = {"x": Adapter({"m": large, "n": small}), "y": Adapter({"m": small}), "z": Adapter({"o": large})}
    spec = TaskModelSpec(tuple(adapters))
    merged = dict(merged_deltas(adapters, spec, Ties(0.25, trim="global")))
    assert not merged["n"].any()  # 450 of 1800 are kept, and `m` has 600 that are larger
    assert int((merged["o"] != 0).sum()) == 450
    check_equal(adapters, [1.0, 1.0, 1.0], Ties(0.25, trim="global"))
    per_matrix = dict(merged_deltas(adapters, spec, Ties(0.25)))
    assert int((per_matrix["n"] != 0).sum()) == int((per_matrix["o"] != 0).sum()) == 150


def test_global_trim_through_the_switch(tiny_bank_path):
    bank = ExpertBank(tiny_bank_path)
    model, base = load_model(bank.base[0]), dict(load_model(bank.base[0]).named_parameters())
    spec = TaskModelSpec(("expert0", "expert1", "expert2"), (1, 2, 1), Ties(0.3, 0.7, "global").config)
    WeightSwitch(model, bank.load_adapter, resolve_method).use(spec)
    adapters = {name: bank.load_adapter(name) for name in spec.experts}
    deltas = slow_merge(adapters, spec.weights, Ties(0.3, 0.7, "global"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, base[name] + deltas[name] if name in deltas else base[name])
    other = slow_merge(adapters, spec.weights, Ties(0.3, 0.7))
    assert any(not torch.equal(other[name], deltas[name]) for name in deltas)


def test_trim_is_a_setting_with_a_config():
    assert Ties().config == Ties(trim="matrix").config == {"@misc": "spacy_sam.TIES.v1", "density": 0.2, "scale": 1.0}
    assert Ties(0.3, trim="global").config["trim"] == "global"
    assert resolve_method(Ties(0.3, 0.5, "global").config) == make_ties(0.3, 0.5, "global") == Ties(0.3, 0.5, "global")
    assert resolve_method(Ties().config) == Ties()
    with pytest.raises(SamError, match="trim") as caught:
        Ties(trim="layer")
    assert caught.value.code == "S401"


# Into weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "method", [Ties(0.3), Ties(0.3, trim="global"), Mean(), Dare()], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("n_experts", [1, 3])
def test_weights_are_rounded_once(dtype, method, n_experts):
    adapters = {f"expert{n}": Adapter({"x": random_factors(40, 30, seed=n)}) for n in range(n_experts)}
    base = torch.nn.Parameter(torch.randn(40, 30, generator=torch.Generator().manual_seed(7)).to(dtype))
    spec = TaskModelSpec(tuple(adapters), (), method.config)
    before = base.detach().clone()
    with small_steps(2):
        ((_, weight),) = merged_weights(adapters, spec, method, lambda name: base)
        ((_, delta),) = merged_deltas(adapters, spec, method)
    assert not weight.requires_grad
    assert weight.dtype == dtype
    assert torch.equal(base, before)
    assert torch.equal(weight, (before + delta).to(dtype))
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("method", [Ties(0.5), Mean(), Dare(0.9)], ids=lambda m: type(m).__name__)
def test_sums_that_float16_cannot_hold(method):
    adapters = {f"expert{n}": Adapter({"x": random_factors(40, 30, seed=n)}) for n in range(2)}
    spec = TaskModelSpec(tuple(adapters), (), method.config)
    base = torch.full((40, 30), 65504.0, dtype=torch.float16)
    (_, weight), *_ = merged_weights(adapters, spec, method, lambda name: base)  # rounded down again
    assert weight.isfinite().all()
    large = {name: Adapter({"x": random_factors(40, 30, scale=100.0, seed=1)}) for name in adapters}
    with pytest.raises(SamError, match="'x'") as caught:
        list(merged_weights(large, spec, method, lambda name: base))
    assert caught.value.code == "S410"
    assert "float16" in str(caught.value)
    base[3, 4] = torch.inf  # what the base has itself is no fault of the merge
    (_, weight), *_ = merged_weights(adapters, spec, method, lambda name: base)
    assert weight.isinf().sum() == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("n_experts", [1, 2])
def test_task_vectors_that_float32_cannot_hold(value, n_experts):
    bad = random_factors(20, 30)
    bad.a[1, 2], bad.b[3, 1] = value, 1e20
    adapters = {"good": Adapter({"x": random_factors(20, 30)}), "bad": Adapter({"y": bad, "x": random_factors(20, 30)})}
    spec = TaskModelSpec(("bad", "good")[:n_experts], (), Ties().config)
    stream = merged_deltas(adapters, spec, Ties())
    with pytest.raises(SamError, match="'y'") as caught:
        next(stream)  # before anything is merged
    assert caught.value.code == "S410"


class Sizes(TorchDispatchMode):
    """Notes the largest storages that operations return, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Tuple[Any, ...] = (), kwargs: Optional[Dict] = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.sizes[storage.data_ptr()] = max(storage.nbytes() // 4, self.sizes.get(storage.data_ptr(), 0))
        return result

    def above(self, size: int) -> List[int]:
        return sorted(size_ for size_ in self.sizes.values() if size_ > size)


@pytest.mark.parametrize("trimmed", ["matrix", "global"])
def test_only_the_result_is_dense(trimmed):
    """No tensor but the result and the sample is larger than a tile."""
    shape = (1024, 3000)
    adapters = {f"expert{n}": Adapter({"x": random_factors(*shape, seed=n)}) for n in range(3)}
    base = torch.zeros(shape)
    with Sizes() as sizes:
        list(merged_weights(adapters, TaskModelSpec(tuple(adapters)), Ties(0.2, trim=trimmed), lambda name: base))
    large = [size for size in sizes.above(2 * adapters_module.TILE_SIZE) if size != base.numel()]
    assert large == []
    assert base.numel() in sizes.above(0)
