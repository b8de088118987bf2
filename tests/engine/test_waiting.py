"""The queue of those that wait, over random histories."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, strategies as st

from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.engine.sequence import Sequence
from polydelta.engine.waiting import Flow, Key, WaitingQueue, flow_name

REFS = [AdapterRef(name, 1, Path("unused")) for name in "ab"]

kinds = st.tuples(st.sampled_from(["", "t"]), st.sampled_from([None, 0, 1]), st.integers(0, 1))


def sequence(number: int, tenant: str, adapter: int | None, priority: int) -> Sequence:
    adapters = () if adapter is None else (Share(REFS[adapter]),)
    prompt = range(number % 5 + 1)
    request = GenerationRequest(
        str(number),
        prompt,
        SamplingParams(),
        adapters,
        tenant=tenant,
        priority=priority,
        arrived=float(number),
    )
    return Sequence(request, lambda output: None)


def by_arrival(flow: Flow) -> Key:
    return 0.0, flow.head.request.arrived


@given(st.lists(kinds, max_size=30), st.data())
def test_it_holds_what_was_added_and_not_removed_and_counts_it(
    each: list[tuple[str, int | None, int]], data: st.DataObject
) -> None:
    queue, model = WaitingQueue(), []
    for number, kind in enumerate(each):
        model.append(sequence(number, *kind))
        queue.add(model[-1])
        if data.draw(st.booleans(), "leaves"):
            gone = model.pop(data.draw(st.integers(0, len(model) - 1), "who"))
            queue.remove(gone)
            assert gone not in queue
            if data.draw(st.booleans(), "comes back"):
                queue.add_first(gone)
                model.append(gone)
    assert set(queue) == set(model)
    assert len(queue) == len(model)
    assert bool(queue) == bool(model)
    assert queue.num_tokens == sum(one.num_prompt_tokens for one in model)
    for ref in REFS:
        assert queue.needs(ref) == any(one.uses(ref) for one in model)
    for flow in queue.flows:
        assert len({(one.account, one.request.priority) for one in flow}) == 1


@given(st.lists(kinds, max_size=30), st.integers(1, 12), st.data())
def test_in_turn_is_the_order_of_the_keys_and_skips_the_flows_of_those_that_stay(
    each: list[tuple[str, int | None, int]], most: int, data: st.DataObject
) -> None:
    queue = WaitingQueue()
    sequences = [sequence(number, *kind) for number, kind in enumerate(each)]
    for one in sequences:
        queue.add(one)
    line = queue.line(most, by_arrival)
    heads = sorted((flow.head for flow in queue.flows), key=lambda one: one.request.arrived)
    assert [flow.head for flow in line.flows] == heads[:most]
    looked_at = {one for flow in line.flows for one in flow}
    blocked: set[object] = set()
    taken: set[Sequence] = set()
    for one in line.in_turn():
        rivals = [
            other for other in queue if other in looked_at and flow_name(other) not in blocked
        ]
        assert one is min(rivals, key=lambda other: other.request.arrived)
        if data.draw(st.booleans(), "enters"):
            queue.remove(one)
            taken.add(one)
        else:
            blocked.add(flow_name(one))
    assert all(flow_name(one) in blocked for one in looked_at - taken)
    assert taken | set(queue) == set(sequences)
