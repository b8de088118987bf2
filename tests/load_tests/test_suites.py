"""The table of suites."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from load_tests.made_adapters import MODULES
from load_tests.replay import Replay
from load_tests.results import describe_run
from load_tests.run import Run
from load_tests.suites import SUITES, kv
from load_tests.workload import Bursts, Shift, Synthetic, Tenants, Workload

RUNS = [(name, run) for name, suite in SUITES.items() for run in suite.runs]


def drawn_from(workload: Workload) -> list[Synthetic]:
    """What a workload is made of."""
    if isinstance(workload, Synthetic):
        return [workload]
    if isinstance(workload, Tenants):
        parts = [each for _, each in workload.of]
    else:
        assert isinstance(workload, Bursts | Shift)
        parts = [workload.of] if isinstance(workload, Bursts) else [workload.first, workload.then]
    return [one for part in parts for one in drawn_from(part)]


@pytest.mark.parametrize("name", SUITES)
def test_different_runs_of_a_suite_have_different_names(name: str):
    runs = set(SUITES[name].runs)
    assert len({run.name for run in runs}) == len(runs) > 1


@pytest.mark.parametrize(("suite", "run"), RUNS, ids=[f"{name}: {run.name}" for name, run in RUNS])
def test_a_run_can_be_made_and_told(suite: str, run: Run):
    assert run.workload.requests()
    assert run.modules in MODULES
    assert len(run.server) % 2 == 0
    assert run.adapter_set.count >= run.workload.adapters
    assert max((one.adapter or 0) for one in run.workload.requests()) < max(
        1, run.workload.adapters
    )
    told = json.dumps(describe_run(run))
    assert json.loads(told)["workload"]["kind"] == type(run.workload).__name__
    for drawn in drawn_from(run.workload):
        assert f'"kind": "{type(drawn.popularity).__name__}"' in told
        assert f'"seed": {drawn.seed}' in told


def test_the_short_suite_leaves_time_for_its_servers_in_five_minutes():
    assert sum(run.workload.duration for run in SUITES["short"].runs) <= 120


def test_the_short_suite_has_every_kind_of_load():
    loads = [run.workload for run in SUITES["short"].runs]
    assert any(load.adapters == 0 for load in loads)
    assert any(load.adapters >= 200 for load in loads)
    assert any(isinstance(load, Bursts) for load in loads)
    rates = [len(load.requests()) / load.duration for load in loads]
    assert max(rates) >= 5 * min(rates)


def test_lengths_are_an_eighth_of_those_of_s_lora():
    eighth = (8, 512 // 8)
    for name, run in RUNS:
        if name not in ("smoke", "kv") and isinstance(run.workload, Synthetic | Bursts):
            for drawn in drawn_from(run.workload):
                assert (drawn.prompt_tokens, drawn.output_tokens) == (eighth, eighth)


def test_servers_of_kv_formats_differ_in_nothing_else():
    runs = set(SUITES["kv"].runs)
    assert {run.server[-2:] for run in runs} == {
        ("--kv-format", name) for name in ("native", "int8", "int4")
    }
    alike = {replace(run, name="", server=run.server[:-2]) for run in runs}
    assert len(alike) == 1


def test_a_pool_is_too_small_for_native_kv_of_all_and_large_enough_for_int4():
    """Of requests in the middle of their answers, beside the adapters."""
    pool, open_tokens = 84 << 20, (kv.IN_FLIGHT + 1) * 56
    token, adapters = 2 * 30 * 192 * 2, 5 * 5 * 16
    prompts, answers = kv.LOAD.prompt_tokens, kv.LOAD.output_tokens
    wanted = kv.IN_FLIGHT * (sum(prompts) / 2 + sum(answers) / 4)
    native = pool / token - adapters
    int4 = (native - open_tokens) * 56 / 16
    assert native < wanted / 2
    assert int4 > wanted
    # The largest request fits an empty pool, as half of it at most.
    assert pool / token / 2 > prompts[1] + answers[1]


def test_some_runs_of_a_suite_are_chosen_by_name():
    chosen = SUITES["scale"].only("2,000")
    assert [run.name for run in chosen.runs] == ["2,000 adapters", "2,000 adapters, rate 4"]
    assert SUITES["scale"].only("nobody").runs == ()


def test_a_trace_takes_the_place_of_each_runs_workload():
    trace = Path("trace.jsonl")
    suite = SUITES["smoke"].replaying(trace)
    assert [run.workload for run in suite.runs] == [
        Replay(trace, 3.0, 0, count=12),
        Replay(trace, 3.0, 3, count=12),
    ]
    assert json.dumps(describe_run(suite.runs[0]), default=str)
