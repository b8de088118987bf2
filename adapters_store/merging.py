"""Several adapters made into one: task arithmetic, magnitude pruning, TIES and DARE.

All of them work on the change itself, `dW`, and not on its factors: sums of A and sums of B, which
some tools offer too, have cross terms that none of the adapters was trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.delta import Adapter, Delta, LowRank, Matrix, Sparse
from polydelta.adapters_store.errors import CompositionError
from polydelta.adapters_store.merge_recipe import Election, MergeRecipe
from polydelta.adapters_store.nearest_low_rank import (
    Approximation,
    Truncation,
    nearest_low_rank,
    nearest_of_product,
    total_error,
)

# An adapter, and the weight that it enters with; a negative one takes its change away.
Source = tuple[Adapter, float]
# What one adapter does to one module, and the adapter's weight.
Weighted = tuple[tuple[Matrix, ...], float]


@dataclass(frozen=True, eq=False)
class MergedAdapter:
    """What a merge gives, before it has files."""

    # By full module path.
    by_module: Mapping[str, Approximation[Delta]]

    @property
    def modules(self) -> dict[str, tuple[Delta, ...]]:
        """As in `Adapter.modules`."""
        return {name: (module.delta,) for name, module in self.by_module.items()}

    @property
    def error(self) -> float:
        """Relative Frobenius error of all modules together."""
        return total_error(self.by_module.values())


def merge(
    sources: Sequence[Source],
    recipe: MergeRecipe,
    progress: Callable[[int, int], None] | None = None,
) -> MergedAdapter:
    """Merges adapters of one base, in float32; calls `progress(done, total)` after each module.

    A linear sum is exact: low-rank factors side by side, sparse entries added one by one. With
    `recipe.rank` it becomes the nearest change of that rank (Eckart and Young), and so does what
    the other methods give, by default at the largest rank that goes in; sparse adapters alone stay
    sparse. A module that only some of the adapters change is merged from those. Beside the adapters
    this takes the memory of one module's dense changes.

    Raises CompositionError for kinds that cannot be added and for sums that no file can hold.
    """
    if not sources:
        raise CompositionError("adapters: there is none to merge; name one at least.")
    kinds = _kinds(sources)
    rank = recipe.rank
    exact = kinds in ([LowRank.kind], [Sparse.kind])
    if rank is None and not exact and not recipe.method.thins:
        raise CompositionError(
            f"rank is not given, and no adapter file holds the exact sum of {' and '.join(kinds)} "
            "changes: give a rank to write the nearest low-rank adapter, or let the server add "
            "them exactly, by the field `adapters` of a request."
        )
    if rank is None and recipe.method.thins:
        # 0 when all are sparse.
        rank = max(adapter.max_rank for adapter, _ in sources) or None
    truncation = None if rank is None else Truncation(rank)
    # Sorted, so that the draws of a seed do not depend on the order within files.
    names = sorted({name for adapter, _ in sources for name in adapter.modules})
    generator = torch.Generator().manual_seed(recipe.seed)
    by_module: dict[str, Approximation[Delta]] = {}
    for name in names:
        changes = [
            (_matrices(a.modules[name]), weight) for a, weight in sources if name in a.modules
        ]
        by_module[name] = _merge_module(name, changes, recipe, truncation, generator)
        if progress is not None:
            progress(len(by_module), len(names))
    return MergedAdapter(by_module)


def _kinds(sources: Sequence[Source]) -> list[str]:
    """Those that occur. Raises CompositionError for one that is not handled here."""
    kinds: set[str] = set()
    for adapter, _ in sources:
        for deltas in adapter.modules.values():
            for delta in deltas:
                if not isinstance(delta, Matrix):
                    raise CompositionError(
                        f"adapters: {adapter.id!r} has deltas of kind {delta.kind}, which cannot "
                        "be merged, because it is no matrix that is added to a weight: leave it "
                        "out."
                    )
                kinds.add(delta.kind)
    return sorted(kinds)


def _matrices(deltas: Iterable[Delta]) -> tuple[Matrix, ...]:
    """All of them, as `_kinds` has checked."""
    return tuple(delta for delta in deltas if isinstance(delta, Matrix))


def _merge_module(
    name: str,
    changes: Sequence[Weighted],
    recipe: MergeRecipe,
    truncation: Truncation | None,
    generator: torch.Generator,
) -> Approximation[Delta]:
    if len({delta.shape for deltas, _ in changes for delta in deltas}) > 1:
        raise CompositionError(
            f"adapters: their changes of {name!r} differ in shape: merge adapters of one base."
        )
    low_rank = [(d, w) for deltas, w in changes for d in deltas if isinstance(d, LowRank)]
    sparse = [(d, w) for deltas, w in changes for d in deltas if isinstance(d, Sparse)]
    others = len(low_rank) + len(sparse) < sum(len(deltas) for deltas, _ in changes)
    is_low_rank = not recipe.method.thins and not sparse and not others
    if truncation is None:
        if is_low_rank:
            return Approximation(_side_by_side(low_rank))
        if recipe.method.thins:
            return Approximation(_sparse(_combined(changes, recipe, generator)))
        return Approximation(_entry_by_entry(sparse))
    try:
        if is_low_rank:
            return nearest_of_product(_side_by_side(low_rank), truncation)
        return nearest_low_rank(_combined(changes, recipe, generator), truncation)
    except FloatingPointError:
        raise CompositionError(
            f"weights: the merged change of {name!r} is not finite; give smaller ones."
        ) from None


def _side_by_side(changes: Sequence[tuple[LowRank, float]]) -> LowRank:
    """The exact sum; its rank is the sum of the ranks."""
    return LowRank(
        torch.cat([delta.a for delta, _ in changes]),
        torch.cat([delta.b * weight for delta, weight in changes], dim=1),
    )


def _entry_by_entry(changes: Sequence[tuple[Sparse, float]]) -> Sparse:
    """The exact sum; it has an entry wherever one of them has."""
    shape = changes[0][0].shape
    places = torch.cat([_places(delta) for delta, _ in changes])
    values = torch.cat([delta.values * weight for delta, weight in changes])
    kept, slots = places.unique(return_inverse=True)
    return _csr(shape, kept, torch.zeros(len(kept)).index_add_(0, slots, values))


def _combined(
    changes: Sequence[Weighted], recipe: MergeRecipe, generator: torch.Generator
) -> Tensor:
    """The merged change, `[out, in]`: every adapter's is thinned, then they are put together.

    As in PEFT, signs are elected before weights come in, and the mean divides by the number of
    those that agree, not by their weights.
    """
    thinned = [_thinned(_dense(deltas), recipe, generator) for deltas, _ in changes]
    total = torch.zeros_like(thinned[0])
    if not recipe.method.elects:
        for change, (_, weight) in zip(thinned, changes, strict=True):
            total.add_(change, alpha=weight)
        return total
    by_count = recipe.election is Election.COUNT
    votes = torch.zeros_like(total)
    for change in thinned:
        votes += change.sign() if by_count else change
    elected = torch.where(votes >= 0, 1.0, -1.0)
    agreeing = torch.zeros_like(total)
    for change, (_, weight) in zip(thinned, changes, strict=True):
        agrees = change.sign() == elected
        total += torch.where(agrees, change * weight, 0.0)
        agreeing += agrees
    return total / agreeing.clamp(min=1.0)


def _thinned(dense: Tensor, recipe: MergeRecipe, generator: torch.Generator) -> Tensor:
    """dense: [out, in]. What is kept by chance is scaled up, so that the expectation stays."""
    density = recipe.density
    if density is None or density == 1:
        return dense
    if recipe.method.draws:
        mask = torch.bernoulli(torch.full_like(dense, density), generator=generator)
        return dense * mask / density
    flat = dense.flatten()
    largest = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, largest, flat[largest]).view_as(dense)


def _dense(deltas: Sequence[Matrix]) -> Tensor:
    total = deltas[0].dense()
    for delta in deltas[1:]:
        total = total + delta.dense()
    return total


def _sparse(dense: Tensor) -> Sparse:
    """The entries of `[out, in]` that are not 0."""
    rows, columns = dense.shape
    places = dense.flatten().nonzero().squeeze(1)
    return _csr((rows, columns), places, dense.flatten()[places])


def _places(delta: Sparse) -> Tensor:
    """[nnz] int64: row * in + column of each entry, ascending."""
    rows = torch.arange(delta.shape[0]).repeat_interleave(delta.row_pointers.diff().long())
    return rows * delta.shape[1] + delta.columns


def _csr(shape: tuple[int, int], places: Tensor, values: Tensor) -> Sparse:
    """places: [nnz] int64, as in `_places`; values: [nnz]."""
    row_pointers = torch.zeros(shape[0] + 1, dtype=torch.int32)
    row_pointers[1:] = (places // shape[1]).bincount(minlength=shape[0]).cumsum(0)
    return Sparse(shape, row_pointers, (places % shape[1]).to(torch.int32), values)
