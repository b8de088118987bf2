"""Adapters that act from a token on: they share the base's prefix cache up to there. That each row
is computed with what should act on it, and finds KV that was, is checked by every `world.step`
(see `conftest.py`)."""

from __future__ import annotations

from typing import Any

import pytest

from polydelta.adapters_store.traits import AdapterTraits
from polydelta.engine.sequence import NEVER

# The class `World` of conftest.py.
Worlds = Any

INVOCATION = (90, 91)
BLOCK = 4


def activation_world(world: Worlds, **changes: Any) -> Any:
    activated = AdapterTraits(invocation=INVOCATION)
    changes.setdefault("num_pages", 40)
    return world(
        block_size=BLOCK,
        adapters={"x": 1, "y": 1, "one token": 1, "ordinary": 1},
        traits={"x": activated, "y": activated, "one token": AdapterTraits(invocation=(90,))},
        **changes,
    )


def answer(w: Any, prompt: list[int], adapter: str | None = None, max_tokens: int = 1) -> int:
    """Runs a request to its end. Returns the prompt tokens that it found in the cache."""
    sequence = w.submit(prompt, adapter, max_tokens)
    w.drain()
    assert w.finished[-1] is sequence
    assert sequence.num_cached is not None
    return int(sequence.num_cached)


SHARED = list(range(10))
# Acts from index 10 on: within the third block.
ASKED = [*SHARED, *INVOCATION, 50, 51, 52]


def test_it_finds_what_the_base_computed_before_its_activation(world: Worlds) -> None:
    w = activation_world(world)
    answer(w, ASKED)
    assert answer(w, ASKED, "x") == 8
    assert answer(w, ASKED, "y") == 8
    assert answer(w, ASKED, "ordinary") == 0


def test_the_base_finds_what_it_computed_before_its_activation(world: Worlds) -> None:
    w = activation_world(world)
    answer(w, ASKED, "x")
    assert answer(w, ASKED) == 8
    assert answer(w, ASKED, "y") == 8
    assert answer(w, ASKED, "x") == 12


def test_a_block_that_ends_where_it_begins_to_act_is_still_the_bases(world: Worlds) -> None:
    w = activation_world(world)
    prompt = [*range(8), *INVOCATION, 50, 51, 52]
    answer(w, prompt)
    assert answer(w, prompt, "x") == 8
    assert answer(w, prompt, "x") == 12


def test_a_block_whose_last_token_it_acts_on_is_not_the_bases(world: Worlds) -> None:
    w = activation_world(world)
    prompt = [*range(7), *INVOCATION, 50, 51, 52, 53]
    answer(w, prompt)
    assert answer(w, prompt, "x") == 4


def test_from_its_first_token_on_it_shares_nothing(world: Worlds) -> None:
    w = activation_world(world)
    prompt = [*INVOCATION, *range(10)]
    answer(w, prompt)
    assert answer(w, prompt, "x") == 0
    assert answer(w, prompt, "y") == 0
    assert answer(w, prompt, "x") == 8


def test_one_that_is_never_activated_is_the_base_to_its_last_block(world: Worlds) -> None:
    w = activation_world(world)
    plain, with_adapter = (w.submit(range(13), name, 6) for name in (None, "x"))
    w.drain()
    assert with_adapter.activation == NEVER
    assert with_adapter.token_ids == plain.token_ids
    assert answer(w, plain.token_ids, "y") == 16
    for block in w.kv._known.by_hash.values():
        assert block.adapters == ()


def test_the_last_occurrence_counts_and_decides_what_is_shared(world: Worlds) -> None:
    w = activation_world(world)
    twice = [*SHARED, *INVOCATION, *range(20, 28), *INVOCATION, 60]
    answer(w, twice)
    assert answer(w, twice, "x") == 20
    # Up to the first occurrence it is the same prompt, but with that one the adapter acts on it.
    assert answer(w, twice[:16], "x") == 8


def test_blocks_of_equal_tokens_that_begin_to_act_at_different_places_are_not_shared(
    world: Worlds,
) -> None:
    w = activation_world(world)
    # The first three tokens are equal with each, but the first block's last one says more to the
    # second: that its prompt calls the adapter again.
    once, again = [90, 1, 90, 2, 3], [90, 1, 90, 2, 90, 2, 3]
    answer(w, once, "one token")
    assert answer(w, again, "one token") == 0
    across = [[*INVOCATION, 7, 90, *rest, 8, 8] for rest in ([1], [91])]
    assert [answer(w, prompt, "x") for prompt in across] == [0, 0]
    assert [answer(w, prompt, "x") for prompt in across] == [4, 4]


def test_what_the_answer_says_does_not_activate_it(world: Worlds) -> None:
    w = activation_world(world, max_batch_tokens=4)
    quiet = w.submit(range(6), "one token", max_tokens=5)
    w.step()
    w.host.finish()
    w.step()
    for tokens in (quiet.token_ids, w.tokens[quiet]):
        tokens.append(90)  # as if it had been sampled
    w.drain()
    assert quiet.activation == NEVER
    assert 90 in quiet.output_token_ids


def test_preempted_and_computed_again_it_acts_from_the_same_token(world: Worlds) -> None:
    prompts = [[start, start + 1, start + 2, *INVOCATION, 7, 8] for start in (0, 20, 40)]
    crowded, roomy = (activation_world(world, num_pages=pages) for pages in (7, 60))
    for w in (crowded, roomy):
        for prompt in prompts:
            w.submit(prompt, "x", max_tokens=10)
        w.drain()
    assert crowded.scheduler.num_preemptions > 0
    assert [s.activation for s in crowded.submitted] == [3, 3, 3]
    assert [s.token_ids for s in crowded.submitted] == [s.token_ids for s in roomy.submitted]


def test_blocks_of_the_base_outlive_the_version_that_happened_to_compute_them(
    world: Worlds,
) -> None:
    w = activation_world(world)
    answer(w, ASKED, "x")
    answer(w, ASKED, "ordinary")
    w.forget("x")
    w.forget("ordinary")
    w.check()
    assert answer(w, ASKED) == 8


@pytest.mark.parametrize("budget", [1, 3, 64])
def test_a_prompt_in_chunks_acts_from_the_same_token(world: Worlds, budget: int) -> None:
    """Whether a chunk ends before, within or after the invocation."""
    w = activation_world(world, max_batch_tokens=budget)
    answer(w, ASKED, "x", max_tokens=3)
    assert answer(w, [*ASKED, 3], "x") == 12
