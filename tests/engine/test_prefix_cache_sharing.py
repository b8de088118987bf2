"""What requests find in the prefix cache, over a vocabulary so small that prompts meet often. That
each reads nothing but what it would have computed itself is checked by every `world.step` (see
`conftest.py`)."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings, strategies as st

from polydelta.adapters_store.traits import AdapterTraits

# The class `World` of conftest.py.
Worlds = Any

TRAITS = {
    "ordinary": AdapterTraits(),
    "prefix of 3": AdapterTraits(3),
    "prefix of 4": AdapterTraits(4),
    "called by 1": AdapterTraits(invocation=(1,)),
    "called by 0 1": AdapterTraits(invocation=(0, 1)),
    "both": AdapterTraits(4, invocation=(1, 1)),
}

REQUESTS = st.tuples(
    st.sampled_from([None, *TRAITS]), st.lists(st.integers(0, 1), min_size=1, max_size=9)
)


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(REQUESTS, min_size=2, max_size=12),
    block_size=st.integers(1, 4),
    max_batch_tokens=st.sampled_from([2, 5, 64]),
    lag=st.integers(0, 1),
)
def test_a_request_finds_what_it_would_have_computed(
    world: Worlds,
    requests: list[tuple[str | None, list[int]]],
    block_size: int,
    max_batch_tokens: int,
    lag: int,
) -> None:
    w = world(
        num_pages=300,
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        adapters=dict.fromkeys(TRAITS, 1),
        traits=TRAITS,
        lag=lag,
    )
    for adapter, prompt in requests:
        w.submit(prompt, adapter, max_tokens=3)
        w.drain()
    # Once more: all that is full is there, whoever computed it first.
    for adapter, prompt in requests:
        again = w.submit(prompt, adapter)
        w.drain()
        shift = w.num_virtual(again) % block_size
        full = (shift + len(prompt) - 1) // block_size
        assert again.num_cached == max(0, full * block_size - shift)
