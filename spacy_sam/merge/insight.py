"""How alike experts are: their task vectors against each other, from the LoRA factors.

All measures of a pair are taken over the matrices that both experts change; without one the measure is NaN ("n/a"). They do not
depend on how dW is split into factors: `(B Q^-1, Q A)` has the same measures as `(B, A)`.
"""

import zlib
from dataclasses import dataclass, fields
from typing import Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..adapters import Adapter, LoraFactors
from ..errors import SamError

ALL, ATTENTION, FEED_FORWARD, OTHER = "all", "attention", "feed-forward", "embeddings, heads, other"
KINDS = (ATTENTION, FEED_FORWARD, OTHER)
MEASURES = ("cosine", "sign_conflict", "magnitude_conflict", "column_overlap", "row_overlap")
MAX_ENTRIES = 1 << 20  # of a matrix, for signs
TILE_ENTRIES = 1 << 20  # of all experts together: 8 MiB in float64
# Parts of module names in the models of transformers, in lower case. Attention is looked for first.
ATTENTION_WORDS = ("attn", "attention")
FEED_FORWARD_WORDS = (
    *("mlp", "ffn", "fc1", "fc2", "fc_in", "fc_out", "lin1", "lin2", "intermediate", "feed_forward", "feedforward"),
    *("densereludense", "densegateddense", "moe", "experts"),
)
CONTAINERS = ("layers", "layer", "h", "block", "blocks")  # lists of layers


class Place(NamedTuple):
    """Where a weight is. `stack` is the module that holds the layers ("encoder", "model"), for models with several."""

    kind: str
    stack: str
    layer: Optional[int]


@dataclass(frozen=True)
class Group:
    """Measures of all pairs of experts over a group of matrices, each `[n_experts, n_experts]`, float64, symmetric.

    n_matrices: Matrices that any expert changes.
    shared: Matrices that both change.
    cosine: Of the task vectors.
    sign_conflict: Of the entries x, y of dW that both change (neither is 0), the share with opposite signs.
    magnitude_conflict: The same with every entry counted |x| + |y| times. Both are 0.5 for unrelated experts.
    column_overlap, row_overlap: Mean squared cosine of the principal angles between the column spaces (of B A: what
        the experts write) and the row spaces (what they read), averaged over the matrices.
    column_chance, row_chance: What random subspaces of the same ranks would have on average.
    """

    name: str
    n_matrices: int
    shared: Tensor
    cosine: Tensor
    sign_conflict: Tensor
    magnitude_conflict: Tensor
    column_overlap: Tensor
    row_overlap: Tensor
    column_chance: Tensor
    row_chance: Tensor


@dataclass(frozen=True)
class Similarity:
    """Experts against each other: all matrices, then by kind, then by layer.

    share_of_entries: Share of the entries whose signs were looked at; below 1 where rows were sampled.
    """

    names: Tuple[str, ...]
    groups: Tuple[Group, ...]
    share_of_entries: float
    seed: int


@dataclass(frozen=True)
class Profile:
    """What an expert changes in one kind of matrices.

    modules: Names of the modules, below the layer.
    ranks: Smallest and largest rank of the factors.
    n_parameters: Numbers in the factors.
    norm: Frobenius norm of dW over all the matrices.
    """

    kind: str
    modules: Tuple[str, ...]
    n_matrices: int
    ranks: Tuple[int, int]
    n_parameters: int
    norm: float


def place(matrix: str) -> Place:
    """Find a weight's kind and layer by its name.

    matrix (str): As the base names it: `model.layers.3.self_attn.q_proj.weight`.
    RETURNS (Place): The layer is the first number in the name; `OTHER` is what has no word of attention or feed-forward.
    """
    parts = matrix.removesuffix(".weight").split(".")
    first = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    path = _in_layer(matrix).lower()
    if any(word in path for word in ATTENTION_WORDS):
        kind = ATTENTION
    # BERT names the second half of its feed-forward `output.dense`, beside `attention.output.dense`.
    elif any(word in path for word in FEED_FORWARD_WORDS) or (first is not None and path == "output.dense"):
        kind = FEED_FORWARD
    else:
        kind = OTHER
    if first is None:
        return Place(kind, "", None)
    before = [part for part in parts[:first] if part not in CONTAINERS]
    return Place(kind, before[-1] if before else "", int(parts[first]))


def _in_layer(matrix: str) -> str:
    """The module's name below its layer, or its whole name outside the layers."""
    parts = matrix.removesuffix(".weight").split(".")
    first = next((index for index, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join(parts[first + 1 :])


def profile(adapter: Adapter) -> Tuple[Profile, ...]:
    """What an expert changes, by kind of matrix; kinds that it leaves alone are left out."""
    found = []
    for kind in KINDS:
        chosen = {name: factors for name, factors in adapter.matrices.items() if place(name).kind == kind}
        if chosen:
            ranks = [factors.a.shape[0] for factors in chosen.values()]
            squares = sum(float(_inner_products([factors])) for factors in chosen.values())
            modules = sorted({_in_layer(name) for name in chosen})
            size = sum(factors.a.numel() + factors.b.numel() for factors in chosen.values())
            norm = max(squares, 0.0) ** 0.5
            found.append(Profile(kind, tuple(modules), len(chosen), (min(ranks), max(ranks)), size, norm))
    return tuple(found)


def compare(adapters: Mapping[str, Adapter], max_entries: Optional[int] = MAX_ENTRIES, seed: int = 0) -> Similarity:
    """Measure how alike experts are; see `Group` for the measures.

    Cosines and overlaps are exact and never make dW: they come from products of the factors, in float64. Signs need dW
    itself. It is made in tiles, in float32 as for a merge; of a matrix with more than `max_entries` entries, random
    rows are looked at.

    adapters (Mapping[str, Adapter]): Experts by name.
    max_entries (Optional[int]): Entries of a matrix whose signs are looked at, at least one row; None for all.
    seed (int): Of the choice of rows, which also depends on the matrix's name, and on nothing else.
    RETURNS (Similarity): Measures in the order of `adapters`.
    RAISES: SamError S402 if the experts disagree on a matrix's shape.
    """
    names, n_experts = tuple(adapters), len(adapters)
    by_matrix: Dict[str, _Sums] = {}
    looked_at, n_entries = 0, 0
    for matrix in dict.fromkeys(matrix for adapter in adapters.values() for matrix in adapter.matrices):
        present = [index for index, name in enumerate(names) if matrix in adapters[name].matrices]
        factors = [adapters[names[index]].matrices[matrix] for index in present]
        _check_shapes(matrix, factors)
        rows = _choose_rows(matrix, factors[0], max_entries, seed)
        by_matrix[matrix] = _Sums.of(factors, rows).spread(present, n_experts)
        size = factors[0].b.shape[0] * factors[0].a.shape[1]
        looked_at += len(rows) * factors[0].a.shape[1]
        n_entries += size
    groups = tuple(
        _measure(name, [by_matrix[matrix] for matrix in members]) for name, members in _groups(list(by_matrix))
    )
    return Similarity(names, groups, looked_at / n_entries if n_entries else 1.0, seed)


@dataclass(frozen=True)
class _Sums:
    """What is added up over matrices, each `[n_experts, n_experts]`, float64."""

    shared: Tensor  # 1 where both change the matrix
    inner: Tensor
    squares: Tensor  # squared norm of the row's expert where the column's expert changes the matrix too
    both: Tensor  # entries that neither leaves at 0
    opposite: Tensor  # those of them with opposite signs
    magnitude: Tensor  # sum of |x| + |y| over `both`
    opposite_magnitude: Tensor
    counted: Tensor  # 1 where neither task vector is 0
    columns: Tensor
    rows: Tensor
    column_chance: Tensor
    row_chance: Tensor

    @classmethod
    def of(cls, factors: Sequence[LoraFactors], rows: Tensor) -> "_Sums":
        spaces = [_spaces(each) for each in factors]
        columns, rows_ = [column for column, _ in spaces], [row for _, row in spaces]
        ranks = torch.tensor([column.shape[1] for column in columns], dtype=torch.float64)
        counted = ((ranks[:, None] > 0) & (ranks > 0)).double()
        inner = _inner_products(factors) * counted  # no rounding errors of a dW of zeros
        larger = torch.maximum(ranks[:, None], ranks) * counted
        n_out, n_in = factors[0].b.shape[0], factors[0].a.shape[1]
        return cls(
            torch.ones_like(inner),
            inner,
            inner.diagonal()[:, None].expand_as(inner),
            *_count_signs(factors, rows),
            counted,
            _overlaps(columns),
            _overlaps(rows_),
            larger / n_out,
            larger / n_in,
        )

    def spread(self, present: Sequence[int], n_experts: int) -> "_Sums":
        """The same among all experts: 0 for those that leave the matrix alone."""
        index = torch.tensor(present)
        spread = []
        for each in fields(self):
            full = torch.zeros(n_experts, n_experts, dtype=torch.float64)
            full[index[:, None], index] = getattr(self, each.name)
            spread.append(full)
        return _Sums(*spread)


def _measure(name: str, members: Sequence[_Sums]) -> Group:
    total = _Sums(*(torch.stack([getattr(each, f.name) for each in members]).sum(0) for f in fields(_Sums)))
    return Group(
        name,
        len(members),
        total.shared.long(),
        (total.inner / (total.squares * total.squares.T).sqrt()).clamp(-1, 1),
        total.opposite / total.both,
        total.opposite_magnitude / total.magnitude,
        (total.columns / total.counted).clamp(0, 1),
        (total.rows / total.counted).clamp(0, 1),
        total.column_chance / total.counted,
        total.row_chance / total.counted,
    )


def _groups(matrices: Sequence[str]) -> Iterator[Tuple[str, List[str]]]:
    """Groups with a member, and their members."""
    places = {matrix: place(matrix) for matrix in matrices}
    layers = sorted({(p.stack, p.layer) for p in places.values() if p.layer is not None})
    several = len({stack for stack, _ in layers}) > 1
    if matrices:
        yield ALL, list(matrices)
    for kind in KINDS:
        members = [matrix for matrix in matrices if places[matrix].kind == kind]
        if members:
            yield kind, members
    for stack, layer in layers:
        name = f"{stack} layer {layer}" if several else f"layer {layer}"
        yield name, [m for m in matrices if (places[m].stack, places[m].layer) == (stack, layer)]


def _check_shapes(matrix: str, factors: Iterable[LoraFactors]) -> None:
    shapes = {each.shape for each in factors}
    if len(shapes) > 1:
        raise SamError("S402", matrix=matrix, shapes=sorted(shapes))


def _inner_products(factors: Sequence[LoraFactors]) -> Tensor:
    """`<dW_i, dW_j>` of all pairs: `scale_i scale_j trace(A_i^T B_i^T B_j A_j)`, `[n, n]`, float64."""
    a = torch.cat([each.a.double() for each in factors])
    b = torch.cat([each.scale * each.b.double() for each in factors], dim=1)
    return _block_sums((b.T @ b) * (a @ a.T), [each.a.shape[0] for each in factors])


def _spaces(factors: LoraFactors) -> Tuple[Tensor, Tensor]:
    """Orthonormal bases of dW's column space `[out, rank]` and row space `[in, rank]`; rank 0 for a dW of zeros.

    The rank is dW's own, which may be below that of its factors: singular values that may be rounding of the factors'
    product do not count.
    """
    left, left_core = torch.linalg.qr(factors.b.double())
    right, right_core = torch.linalg.qr(factors.a.double().T)
    u, values, vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    rounding = max(len(left), len(right)) * torch.finfo(torch.float64).eps * left_core.norm() * right_core.norm()
    rank = int((values > rounding).sum()) if factors.scale else 0
    return left @ u[:, :rank], right @ vh[:rank].T


def _overlaps(bases: Sequence[Tensor]) -> Tensor:
    """`|Q_i^T Q_j|^2 / min(rank_i, rank_j)` of all pairs, `[n, n]`; 0 where a rank is 0."""
    joined = torch.cat(list(bases), dim=1)
    sizes = [basis.shape[1] for basis in bases]
    ranks = torch.tensor(sizes, dtype=torch.float64)
    return _block_sums((joined.T @ joined).square(), sizes) / torch.minimum(ranks[:, None], ranks).clamp(min=1)


def _block_sums(matrix: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sums over the blocks of a matrix whose rows and columns are divided into `sizes`."""
    member = torch.repeat_interleave(torch.eye(len(sizes), dtype=matrix.dtype), torch.tensor(sizes), dim=1)
    sums = member @ matrix @ member.T
    return (sums + sums.T) / 2  # equal up to rounding


def _choose_rows(matrix: str, factors: LoraFactors, max_entries: Optional[int], seed: int) -> Tensor:
    n_out, n_in = factors.b.shape[0], factors.a.shape[1]
    n_rows = n_out if max_entries is None else max(1, max_entries // n_in)
    if n_rows >= n_out:
        return torch.arange(n_out)
    generator = torch.Generator().manual_seed(zlib.crc32(matrix.encode("utf8"), zlib.crc32(str(seed).encode())))
    return torch.randperm(n_out, generator=generator)[:n_rows].sort().values


def _count_signs(factors: Sequence[LoraFactors], rows: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """`both`, `opposite`, `magnitude` and `opposite_magnitude` of `_Sums`, as if all rows of B A were like these."""
    n, n_in = len(factors), factors[0].a.shape[1]
    both, net, magnitude, net_magnitude = (torch.zeros(n, n, dtype=torch.float64) for _ in range(4))
    for tile in rows.split(max(1, TILE_ENTRIES // (n * n_in))):
        entries = torch.stack([each.scale * (each.b[tile] @ each.a) for each in factors]).flatten(1).double()
        signs, sizes = entries.sign(), entries.abs()
        changed = signs.abs()
        both += changed @ changed.T
        net += signs @ signs.T  # entries with equal signs less those with opposite ones
        magnitude += sizes @ changed.T
        net_magnitude += entries @ signs.T
    times = factors[0].b.shape[0] / len(rows)
    conflict = (magnitude - net_magnitude).clamp(min=0)  # of the row's expert; no rounding errors below 0
    return (
        times * both,
        times * (both - net) / 2,
        times * (magnitude + magnitude.T),
        times * (conflict + conflict.T) / 2,
    )
