from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from polydelta.adapters_store.delta import Adapter, Delta, LowRank, Sparse
from polydelta.adapters_store.errors import CompositionError
from polydelta.adapters_store.merge_recipe import Election, MergeRecipe, Method
from polydelta.adapters_store.merging import merge

Q, K, DOWN = (f"model.layers.0.{part}" for part in ("self_attn.q", "self_attn.k", "mlp.down"))
SHAPES = {Q: (13, 17), K: (5, 17), DOWN: (17, 29)}
THINNING = [method for method in Method if method.thins]


def low_rank(shape: tuple[int, int], rank: int) -> LowRank:
    return LowRank(torch.randn(rank, shape[1]), torch.randn(shape[0], rank))


def sparse(shape: tuple[int, int], nnz: int) -> Sparse:
    dense = torch.zeros(shape[0] * shape[1])
    dense[torch.randperm(len(dense))[:nnz]] = torch.randn(nnz)
    return sparse_of(dense.view(shape))


def sparse_of(dense: Tensor) -> Sparse:
    rows, columns = dense.nonzero(as_tuple=True)
    pointers = torch.zeros(dense.shape[0] + 1, dtype=torch.int32)
    pointers[1:] = rows.bincount(minlength=dense.shape[0]).cumsum(0)
    return Sparse(tuple(dense.shape), pointers, columns.int(), dense[rows, columns])


def adapter(**modules: Delta) -> Adapter:
    return made({{"q": Q, "k": K, "down": DOWN}[name]: d for name, d in modules.items()})


def made(modules: dict[str, Delta]) -> Adapter:
    return Adapter("made-here", 1, "", "", {name: (delta,) for name, delta in modules.items()})


def of_entries(*rows: Sequence[float]) -> Adapter:
    """One module whose change is written out."""
    return made({Q: sparse_of(torch.tensor(rows, dtype=torch.float32))})


def dense(modules: Any) -> dict[str, Tensor]:
    return {name: sum(d.dense() for d in deltas) for name, deltas in modules.items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=atol, rtol=1e-5)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(5)


# Linear


@given(
    kinds=st.sampled_from(["low", "sparse"]),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_a_linear_merge_is_the_weighted_sum_of_the_changes(
    kinds: str, sizes: list[int], data: st.DataObject
) -> None:
    make = low_rank if kinds == "low" else sparse
    weights = data.draw(
        st.lists(st.floats(-2, 2), min_size=len(sizes), max_size=len(sizes)), label="weights"
    )
    held = [data.draw(st.sets(st.sampled_from(list(SHAPES)), min_size=1)) for _ in sizes]
    adapters = [
        made({name: make(SHAPES[name], size) for name in sorted(names)})
        for size, names in zip(sizes, held, strict=True)
    ]
    merged = merge(list(zip(adapters, weights, strict=True)), MergeRecipe())
    want: dict[str, Tensor] = {}
    for each, weight in zip(adapters, weights, strict=True):
        for name, change in dense(each.modules).items():
            want[name] = want.get(name, torch.zeros_like(change)) + weight * change
    assert_same(dense(merged.modules), want)
    assert merged.error == 0


def test_ranks_add_up_where_adapters_meet() -> None:
    one, two = (
        adapter(q=low_rank(SHAPES[Q], 2)),
        adapter(q=low_rank(SHAPES[Q], 3), k=low_rank(SHAPES[K], 3)),
    )
    merged = merge([(one, 1.0), (two, 1.0)], MergeRecipe())
    assert {name: d.rank for name, (d,) in merged.modules.items()} == {Q: 5, K: 3}


@pytest.mark.parametrize("make", [low_rank, sparse])
def test_one_adapter_with_weight_1_comes_out_as_it_was(make: Any) -> None:
    one = adapter(q=make(SHAPES[Q], 4), down=make(SHAPES[DOWN], 7))
    merged = merge([(one, 1.0)], MergeRecipe())
    for name, want in dense(one.modules).items():
        assert torch.equal(merged.modules[name][0].dense(), want)


def test_an_adapter_less_itself_is_nothing() -> None:
    one = adapter(q=low_rank(SHAPES[Q], 4), k=low_rank(SHAPES[K], 4))
    merged = merge([(one, 0.75), (one, -0.75)], MergeRecipe())
    assert_same(dense(merged.modules), {n: torch.zeros(SHAPES[n]) for n in (Q, K)})


def test_a_sparse_sum_has_the_entries_of_all_in_order() -> None:
    merged = merge(
        [(of_entries([0, 1, 0], [4, 0, 0]), 1.0), (of_entries([2, 3, 0], [0, 0, 5]), 2)],
        MergeRecipe(),
    )
    (delta,) = merged.modules[Q]
    assert delta.row_pointers.tolist() == [0, 2, 4]
    assert delta.columns.tolist() == [0, 1, 0, 2]
    assert delta.values.tolist() == [4, 7, 4, 10]
    assert (delta.columns.dtype, delta.row_pointers.dtype) == (torch.int32, torch.int32)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_given_rank_takes_the_nearest_change_and_tells_what_it_leaves_out(rank: int) -> None:
    """The factored way (low-rank only) and the dense one (with a sparse adapter) are both best."""
    one, two = adapter(q=low_rank(SHAPES[Q], 4)), adapter(q=low_rank(SHAPES[Q], 3))
    spread = adapter(q=sparse(SHAPES[Q], 40))
    for sources in ([(one, 0.7), (two, -1.2)], [(one, 0.7), (spread, 2.0)], [(spread, 1.0)]):
        merged = merge(sources, MergeRecipe(rank=rank))
        whole = sum(weight * each.modules[Q][0].dense() for each, weight in sources)
        (delta,) = merged.modules[Q]
        assert isinstance(delta, LowRank)
        assert delta.rank == rank
        singular = torch.linalg.svdvals(whole)
        lost = (whole - delta.dense()).norm()
        torch.testing.assert_close(lost, singular[rank:].norm(), atol=1e-4, rtol=1e-4)
        assert merged.error == pytest.approx(float(lost / whole.norm()), abs=1e-4)
        assert merged.by_module[Q].error == merged.error


def test_a_rank_with_room_for_everything_loses_nothing() -> None:
    sources = [(adapter(k=low_rank(SHAPES[K], r)), 0.5) for r in (2, 8)]
    merged = merge(sources, MergeRecipe(rank=64))
    assert merged.modules[K][0].rank == 5, "a matrix of 5 rows has no higher rank"
    assert merged.error == 0
    assert_same(dense(merged.modules), dense(merge(sources, MergeRecipe()).modules))


def test_the_error_of_all_modules_weighs_each_by_its_size() -> None:
    one = adapter(q=sparse_of(torch.diag(torch.tensor([3.0, 4.0]))))
    two = adapter(k=sparse_of(torch.diag(torch.tensor([12.0, 0.1]))))
    merged = merge([(one, 1.0), (two, 1.0)], MergeRecipe(rank=1))
    assert merged.by_module[Q].error == pytest.approx(3 / 5)
    assert merged.error == pytest.approx(math.hypot(3, 0.1) / math.hypot(3, 4, 12, 0.1))


# Thinning and election


@pytest.mark.parametrize("method", THINNING)
def test_what_is_left_of_sparse_adapters_stays_sparse(method: Method) -> None:
    sources = [(adapter(down=sparse(SHAPES[DOWN], 60)), 1.0) for _ in range(3)]
    recipe = MergeRecipe(method, density=0.05)
    (delta,) = merge(sources, recipe).modules[DOWN]
    assert isinstance(delta, Sparse)
    assert 0 < delta.nnz < 180
    assert (delta.values != 0).all()


@pytest.mark.parametrize("method", THINNING)
def test_the_rank_is_by_default_the_largest_that_goes_in(method: Method) -> None:
    sources = [
        (adapter(q=low_rank(SHAPES[Q], 2)), 1.0),
        (adapter(q=sparse(SHAPES[Q], 9), down=low_rank(SHAPES[DOWN], 7)), 0.5),
        (adapter(k=sparse(SHAPES[K], 9)), 0.5),
    ]
    merged = merge(sources, MergeRecipe(method, density=0.5))
    assert {name: d.rank for name, (d,) in merged.modules.items()} == {Q: 7, DOWN: 7, K: 5}
    assert merged.error > 0


def test_magnitude_sums_the_largest_entries_of_each() -> None:
    one, two = of_entries([5, -4, 3, 1]), of_entries([0.1, 0.2, -0.4, 0.3])
    merged = merge([(one, 2.0), (two, 10.0)], MergeRecipe(Method.MAGNITUDE, density=0.5))
    torch.testing.assert_close(dense(merged.modules)[Q], torch.tensor([[10.0, -8, -4, 3]]))


def test_ties_takes_the_mean_of_those_that_agree_with_the_elected_sign() -> None:
    sources = [
        (of_entries([4, 1, -2, 0, 3]), 1.0),
        (of_entries([2, -3, -4, 0, -3]), 1.0),
        (of_entries([6, 1, 5, -7, 0]), 1.0),
    ]
    merged = merge(sources, MergeRecipe(Method.TIES, density=1.0))
    # Sums 12, -1, -1, -7 and 0, which counts as positive.
    torch.testing.assert_close(dense(merged.modules)[Q], torch.tensor([[4.0, -3, -3, -7, 3]]))
    by_count = MergeRecipe(Method.TIES, density=1.0, election=Election.COUNT)
    got = dense(merge(sources, by_count).modules)[Q]
    torch.testing.assert_close(got, torch.tensor([[4.0, 1, -3, -7, 3]]))


def test_ties_of_agreeing_signs_at_full_density_is_the_mean() -> None:
    changes = [torch.rand(SHAPES[Q]) + 0.1 for _ in range(4)]
    sources = [(adapter(q=sparse_of(change)), 1.0) for change in changes]
    merged = merge(sources, MergeRecipe(Method.TIES, density=1.0))
    torch.testing.assert_close(dense(merged.modules)[Q], sum(changes) / 4)


def test_ties_trims_before_it_elects() -> None:
    """Two small negatives would outvote the positive one, were they not trimmed away."""
    one, two = of_entries([3, 0.5, 0, 0]), of_entries([-2, 0, 9, 8])
    merged = merge([(one, 1.0), (two, 1.0), (two, 1.0)], MergeRecipe(Method.TIES, density=0.5))
    torch.testing.assert_close(dense(merged.modules)[Q], torch.tensor([[3.0, 0.5, 9, 8]]))


def test_weights_scale_what_was_elected_without_them() -> None:
    one, two = of_entries([3.0, -1.0]), of_entries([-1.0, 3.0])
    merged = merge([(one, 0.5), (two, -8.0)], MergeRecipe(Method.TIES, density=1.0))
    torch.testing.assert_close(dense(merged.modules)[Q], torch.tensor([[1.5, -24.0]]))


@pytest.mark.parametrize("method", [Method.DARE, Method.DARE_TIES])
def test_the_same_seed_draws_the_same(method: Method) -> None:
    sources = [(adapter(q=sparse(SHAPES[Q], 90), k=sparse(SHAPES[K], 50)), 1.0) for _ in range(2)]
    turned = [(made({n: a.modules[n][0] for n in reversed(a.modules)}), w) for a, w in sources]
    first, again, other = (
        dense(merge(s, MergeRecipe(method, density=0.5, seed=seed)).modules)
        for s, seed in ((sources, 3), (turned, 3), (sources, 4))
    )
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_the_given_share_scaled_so_that_the_mean_stays(density: float) -> None:
    one = made({DOWN: sparse_of(torch.ones(300, 200))})
    got = dense(merge([(one, 0.7)], MergeRecipe(Method.DARE, density=density)).modules)[DOWN]
    kept = got != 0
    torch.testing.assert_close(got[kept], torch.full_like(got[kept], 0.7 / density))
    # Five standard deviations of 60,000 draws.
    slack = 5 * math.sqrt(density * (1 - density) / got.numel())
    assert float(kept.float().mean()) == pytest.approx(density, abs=slack)


@pytest.mark.parametrize("method", [Method.DARE, Method.MAGNITUDE])
def test_full_density_is_the_linear_sum(method: Method) -> None:
    sources = [(adapter(q=sparse(SHAPES[Q], 30)), w) for w in (0.5, -2.0)]
    got = dense(merge(sources, MergeRecipe(method, density=1.0)).modules)
    assert_same(got, dense(merge(sources, MergeRecipe()).modules))


@pytest.mark.parametrize("method", THINNING)
def test_the_same_change_merges_the_same_whatever_kind_it_is_held_in(method: Method) -> None:
    held = [low_rank(SHAPES[Q], 3) for _ in range(2)]
    recipe = MergeRecipe(method, density=0.4, rank=13)
    as_low_rank = merge([(adapter(q=d), 0.5) for d in held], recipe)
    as_sparse = merge([(adapter(q=sparse_of(d.dense())), 0.5) for d in held], recipe)
    assert_same(dense(as_low_rank.modules), dense(as_sparse.modules), atol=1e-4)


def test_several_deltas_of_a_module_are_thinned_as_their_sum() -> None:
    parts = sparse_of(torch.tensor([[3.0, 1, 0]])), sparse_of(torch.tensor([[-3.0, 1, 1]]))
    one = Adapter("two-parts", 1, "", "", {Q: parts})
    got = merge([(one, 1.0)], MergeRecipe(Method.MAGNITUDE, density=0.34)).modules
    torch.testing.assert_close(dense(got)[Q], torch.tensor([[0.0, 2, 0]]))


def test_progress_counts_modules() -> None:
    seen: list[tuple[int, int]] = []
    one = adapter(
        q=low_rank(SHAPES[Q], 1), k=low_rank(SHAPES[K], 1), down=low_rank(SHAPES[DOWN], 1)
    )
    merge([(one, 1.0)], MergeRecipe(), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# Refusals


def test_an_exact_sum_of_both_kinds_is_refused_with_what_to_do() -> None:
    one, two = adapter(q=low_rank(SHAPES[Q], 2)), adapter(down=sparse(SHAPES[DOWN], 4))
    with pytest.raises(CompositionError, match=r"LowRank and Sparse.*give a rank"):
        merge([(one, 1.0), (two, 1.0)], MergeRecipe())


@dataclass(frozen=True)
class Rotation:
    kind = "Rotate"
    shape = SHAPES[Q]


@pytest.mark.parametrize(
    "recipe", [MergeRecipe(), MergeRecipe(Method.TIES, 0.2), MergeRecipe(rank=2)]
)
def test_a_kind_that_is_not_handled_is_refused_by_name(recipe: MergeRecipe) -> None:
    turning = Adapter("turning", 1, "", "", {Q: (Rotation(),)})  # type: ignore[dict-item]
    with pytest.raises(CompositionError, match="'turning' has deltas of kind Rotate"):
        merge([(adapter(q=low_rank(SHAPES[Q], 2)), 1.0), (turning, 1.0)], recipe)


def test_adapters_of_different_bases_are_refused() -> None:
    sources = [(adapter(q=low_rank(shape, 2)), 1.0) for shape in ((13, 17), (13, 18))]
    with pytest.raises(CompositionError, match=f"'{Q}' differ in shape"):
        merge(sources, MergeRecipe())


def test_nothing_to_merge_is_refused() -> None:
    with pytest.raises(CompositionError, match="none to merge"):
        merge([], MergeRecipe())


def test_weights_that_overflow_are_refused() -> None:
    one = adapter(q=low_rank(SHAPES[Q], 2))
    with pytest.raises(CompositionError, match=f"change of '{Q}' is not finite"):
        merge([(one, 3e38)], MergeRecipe(rank=1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": Method.TIES}, "density is not given"),
        ({"density": 0.5}, "density is 0.5, but method 'linear'"),
        ({"method": Method.DARE, "density": 0.0}, "density is 0.0"),
        ({"method": Method.DARE, "density": 1.5}, "density is 1.5"),
        ({"method": Method.DARE, "density": math.nan}, "density is nan"),
        ({"rank": 0}, "rank is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 63}, "seed is 9223372036854775808"),
        ({"election": Election.COUNT}, "election is 'count', but method 'linear'"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CompositionError, match=message):
        MergeRecipe(**fields)
