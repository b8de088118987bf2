"""The engine as its callers see it: submit, abort, stats, shutdown."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.errors import AdapterError
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.engine import Engine, EngineDeadError
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.decoder import base_layout
from polydelta.engine.models.errors import ModelError
from polydelta.engine.request import FinishReason, GenerationRequest, SamplingParams

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
PROMPT = list(range(100, 150))


def request(name: str, prompt: list[int] = PROMPT, **changes: object) -> GenerationRequest:
    adapter = changes.pop("adapter", None)
    adapters = () if adapter is None else (Share(adapter),)
    return GenerationRequest(name, prompt, changes.pop("sampling", GREEDY), adapters)


def pages_in_use(engine: Engine) -> int:
    stats = engine.stats()
    return stats.pages_kv + stats.pages_adapters


def test_an_answer_is_bounded_by_max_tokens(
    tiny_checkpoint: Checkpoint, serve: Callable, run: Callable
) -> None:
    with serve(tiny_checkpoint) as engine:
        answer = run(engine, [request("a")])["a"]
        assert len(answer.token_ids) == 8
        assert answer.finish_reason is FinishReason.LENGTH
        stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (50, 8)
    assert {reason: n for reason, n in stats.finished.items() if n} == {"length": 1}


def test_an_answer_ends_where_the_models_context_window_does(
    tiny_checkpoint: Checkpoint, serve: Callable, run: Callable
) -> None:
    """As behind an adapter's virtual tokens, which are not known when a request comes in."""
    with serve(tiny_checkpoint) as engine:
        limits = engine._scheduler._limits
        engine._scheduler._limits = replace(limits, max_positions=len(PROMPT) + 3)
        answer = run(engine, [request("a")])["a"]
        assert len(answer.token_ids) == 3
        assert answer.finish_reason is FinishReason.LENGTH
        assert pages_in_use(engine) == 0


def test_the_second_request_finds_the_prompt_of_the_first_in_the_cache(
    tiny_checkpoint: Checkpoint, serve: Callable, run: Callable
) -> None:
    with serve(tiny_checkpoint) as engine:
        first = run(engine, [request("a")])["a"]
        second = run(engine, [request("b")])["b"]
        assert first.outputs[0].cached_tokens == 0
        assert second.outputs[0].cached_tokens == 48
        assert second.token_ids == first.token_ids
        assert pages_in_use(engine) == 0


def test_prefix_caching_can_be_switched_off(
    tiny_checkpoint: Checkpoint, serve: Callable, run: Callable
) -> None:
    with serve(tiny_checkpoint, prefix_caching=False) as engine:
        run(engine, [request("a")])
        assert run(engine, [request("b")])["b"].outputs[0].cached_tokens == 0
        assert engine.stats().pages_free == engine.stats().pages_total


def test_an_aborted_request_frees_its_pages_and_says_no_more(
    tiny_checkpoint: Checkpoint, serve: Callable, run: Callable
) -> None:
    outputs, started = [], threading.Event()

    def take(output: object) -> None:
        outputs.append(output)
        started.set()

    endless = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    with serve(tiny_checkpoint) as engine:
        engine.submit(request("endless", sampling=endless), take)
        assert started.wait(60)
        engine.abort("endless")
        run(engine, [request("other")])  # the engine has taken the abort before this one ends
        assert pages_in_use(engine) == 0
        assert engine.stats().finished["abort"] == 1
        assert not any(output.finished for output in outputs)


def test_aborting_what_is_not_there_changes_nothing(
    tiny_checkpoint: Checkpoint, serve: Callable, run: Callable
) -> None:
    with serve(tiny_checkpoint) as engine:
        engine.abort("nobody")
        assert run(engine, [request("a")])["a"].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "no tokens"), ([5] * 512, r"512 tokens, but the context window is 512")],
    ids=["empty", "too-long"],
)
def test_a_prompt_that_cannot_be_served_is_answered_with_the_reason(
    prompt: list[int], message: str, tiny_checkpoint: Checkpoint, serve: Callable, run: Callable
) -> None:
    with serve(tiny_checkpoint) as engine:
        answer = run(engine, [request("a", prompt)])["a"]
        assert answer.finish_reason is FinishReason.ERROR
        assert message in str(answer.error)
        assert run(engine, [request("b")])["b"].finish_reason is FinishReason.LENGTH


def test_a_damaged_adapter_fails_its_requests_and_nobody_elses(
    tiny_checkpoint: Checkpoint, adapter_writer: Callable, serve: Callable, run: Callable
) -> None:
    write = adapter_writer(base_layout(tiny_checkpoint.config, tiny_checkpoint.id))
    damaged = write.lora("damaged", 4)
    (damaged / "adapter_model.safetensors").write_bytes(b"not safetensors at all")
    write.lora("sound", 4)
    catalog = FolderCatalog([write.root])
    with serve(tiny_checkpoint) as engine:
        answers = run(
            engine,
            [
                request("1", adapter=catalog.resolve("damaged")),
                request("2", adapter=catalog.resolve("sound")),
                request("3"),
                request("4", adapter=catalog.resolve("damaged")),
            ],
        )
    reasons = {name: answer.finish_reason for name, answer in answers.items()}
    error, length = FinishReason.ERROR, FinishReason.LENGTH
    assert reasons == {"1": error, "2": length, "3": length, "4": error}
    assert "adapter_model.safetensors" in str(answers["1"].error)


def test_an_adapter_that_changes_under_its_name_gives_new_answers(
    tiny_checkpoint: Checkpoint, adapter_writer: Callable, serve: Callable, run: Callable
) -> None:
    """Neither its weights nor the KV that the old version made may be used again."""
    write = adapter_writer(base_layout(tiny_checkpoint.config, tiny_checkpoint.id))
    folder = write.lora("bot", 6, seed=1)
    replacement: Path = write.lora("other", 6, seed=2)
    catalog = FolderCatalog([write.root])
    with serve(tiny_checkpoint) as engine:
        old = run(engine, [request("1", adapter=catalog.resolve("bot"))])["1"]
        shutil.rmtree(folder)
        shutil.copytree(replacement, folder)
        assert catalog.resolve("bot").version == 2
        new = run(engine, [request("2", adapter=catalog.resolve("bot"))])["2"]
        other = run(engine, [request("3", adapter=catalog.resolve("other"))])["3"]
    assert new.outputs[0].cached_tokens == 0
    assert new.token_ids == other.token_ids != old.token_ids
    assert other.outputs[0].cached_tokens == 0, "who may use the one may not know of the other"


def test_logprobs_come_with_each_token(
    tiny_checkpoint: Checkpoint, serve: Callable, run: Callable
) -> None:
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=3)
    with serve(tiny_checkpoint) as engine:
        answer = run(engine, [request("a", sampling=params)])["a"]
    for output in answer.outputs:
        (logprob,) = output.logprobs
        assert logprob.token_id == output.token_ids[0] == logprob.top[0][0]
        assert logprob.logprob == logprob.top[0][1] <= 0
        assert [value for _, value in logprob.top] == sorted(
            (value for _, value in logprob.top), reverse=True
        )
        assert len(logprob.top) == 3


def test_shutdown_aborts_what_runs_and_refuses_what_comes(
    tiny_checkpoint: Checkpoint, serve: Callable
) -> None:
    outputs, started = [], threading.Event()

    def take(output: object) -> None:
        outputs.append(output)
        started.set()

    endless = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    with serve(tiny_checkpoint, ends_alive=False) as engine:
        engine.submit(request("endless", sampling=endless), take)
        assert started.wait(60)
        engine.shutdown()
        assert outputs[-1].finish_reason is FinishReason.ABORT
        assert not engine.alive
        with pytest.raises(EngineDeadError):
            engine.submit(request("late"), take)


def test_a_client_that_cannot_take_its_output_does_not_stop_the_engine(
    tiny_checkpoint: Checkpoint, serve: Callable, run: Callable
) -> None:
    def refuse(output: object) -> None:
        raise ConnectionError

    with serve(tiny_checkpoint) as engine:
        engine.submit(request("rude"), refuse)
        assert run(engine, [request("a")])["a"].finish_reason is FinishReason.LENGTH


def test_a_window_that_the_pool_cannot_hold_is_refused_with_both_numbers(
    tiny_checkpoint: Checkpoint, serve: Callable
) -> None:
    # 10 pages of 16 tokens.
    with (
        pytest.raises(ModelError, match="512 leaves no room in a pool of 160 tokens"),
        serve(tiny_checkpoint, pool_bytes=10 * 3 * 2560, max_model_len=512),
    ):
        pass


def test_without_a_window_of_its_own_a_small_pool_bounds_it(
    tiny_checkpoint: Checkpoint, serve: Callable
) -> None:
    with serve(tiny_checkpoint, pool_bytes=10 * 3 * 2560) as engine:
        assert engine.max_model_len == 80


def test_who_stands_behind_a_request_that_fails_is_answered_though_nothing_else_happens(
    tiny_checkpoint: Checkpoint, adapter_writer: Callable, serve: Callable, run: Callable
) -> None:
    write = adapter_writer(base_layout(tiny_checkpoint.config, tiny_checkpoint.id))
    for name in ("first", "second"):
        write.lora(name, 4)
    catalog = FolderCatalog([write.root])
    all_pages = SamplingParams(max_tokens=99, temperature=0.0, ignore_eos=True)
    # 10 pages of 16 tokens: the window alone fits, beside an adapter it does not.
    with serve(
        tiny_checkpoint, pool_bytes=10 * 3 * 2560, max_model_len=159, max_batch_size=1
    ) as engine:
        answers = run(
            engine,
            [
                request("1", adapter=catalog.resolve("first"), sampling=all_pages, prompt=[5] * 60),
                request("2", adapter=catalog.resolve("second")),
            ],
        )
    assert "needs 1" in str(answers["1"].error)
    assert answers["2"].finish_reason is FinishReason.LENGTH


def test_an_order_that_is_withdrawn_before_it_is_carried_out_ends(
    tiny_checkpoint: Checkpoint, adapter_writer: Callable, serve: Callable, run: Callable
) -> None:
    write = adapter_writer(base_layout(tiny_checkpoint.config, tiny_checkpoint.id))
    write.lora("bot", 4)
    ref, both_given = FolderCatalog([write.root]).resolve("bot"), threading.Event()
    with serve(tiny_checkpoint) as engine:
        engine._commands.give(lambda: both_given.wait(60))
        order = engine.load_adapter(ref, pin=True)
        engine.withdraw(order)
        both_given.set()
        with pytest.raises(AdapterError, match="'bot@1' was withdrawn"):
            order.result(60)
        assert run(engine, [request("a")])["a"].finish_reason is FinishReason.LENGTH
        assert engine.stats().pages_adapters == 0


def test_a_crash_answers_those_whose_orders_were_not_taken_yet(
    tiny_checkpoint: Checkpoint, serve: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a command does while the engine ends, those behind it are answered."""
    ended: list[object] = []
    with serve(tiny_checkpoint, ends_alive=False) as engine:
        holding, held = threading.Event(), threading.Event()

        def crash() -> None:
            held.set()
            holding.wait(60)
            raise RuntimeError("the engine is to crash")

        def fail() -> None:
            raise RuntimeError("as a command may, when nothing is certain")

        engine._commands.give(crash)
        assert held.wait(60)
        engine._commands.give(fail)
        engine.submit(request("behind"), ended.append)
        order = engine.load_adapter(AdapterRef("a", 1, Path("nowhere")))
        holding.set()
        assert isinstance(order.exception(timeout=60), AdapterError)
        engine._thread.join(60)
        assert [output.finish_reason for output in ended] == [FinishReason.ERROR]
        assert engine.stats().num_running == engine.stats().num_waiting == 0
