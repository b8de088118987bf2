"""Decode steps that are recorded: the same bits as without, whatever changes between them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import EMBEDDING, FINAL_NORM, BaseLayout
from polydelta.adapters_store.composition import Share, combine
from polydelta.adapters_store.delta import (
    Adapter,
    Bias,
    Delta,
    Kronecker,
    LowRank,
    NormWeight,
    Scale,
    Side,
    TokenRows,
)
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.load_times import LoadTimes
from polydelta.adapters_store.packed import PackedAdapter
from polydelta.adapters_store.packing import pack
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine import recorded_steps
from polydelta.engine.build import assemble
from polydelta.engine.config import EngineConfig
from polydelta.engine.models.base_weights import checkpoint_layout
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.recorded_steps import MOST_RECORDINGS
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.engine.sequence import Sequence as TokenSequence
from polydelta.kernels.cpu.bfloat16_kernels import MOST_RECORDED, Bfloat16Kernels
from polydelta.kernels.ops import kernels_for

CPU = torch.device("cpu")
# Adapters and their weights, of a request.
Mix = Mapping[str, float]
# Step -> requests that come before it: name, adapters, prompt tokens, tokens to generate.
Script = Mapping[int, Sequence[tuple[str, Mix, int, int]]]

LORAS = {"lora-3": 3, "lora-8": 8, "lora-17": 17, "lora-40": 40}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """An engine's thread sets the process's number."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def _native() -> None:
    if not isinstance(kernels_for(CPU, torch.bfloat16), Bfloat16Kernels):
        pytest.skip("there is no C compiler, or the machine has no AVX512-BF16")


class Adapters:
    """Packs adapters that were made in memory (`AdapterLoader`)."""

    def __init__(self, layout: BaseLayout, dtype: torch.dtype, bits: int | None) -> None:
        self._layout, self._dtype, self._bits = layout, dtype, bits
        self._chance = torch.Generator().manual_seed(7)
        shapes = layout.module_shapes
        every = list(shapes)
        deltas: dict[str, dict[str, tuple[Delta, ...]]] = {
            name: {m: (self._low_rank(shapes[m], rank),) for m in every}
            for name, rank in LORAS.items()
        }
        deltas["few-modules"] = {m: (self._low_rank(shapes[m], 5),) for m in every[::4]}
        deltas["scale-and-bias"] = {
            m: (
                Scale(1 + 0.2 * self._randn(shapes[m][0]), Side.OUTPUT),
                self._low_rank(shapes[m], 2),
                Bias(self._randn(shapes[m][0]) * 0.1),
            )
            for m in every
        }
        deltas["kronecker"] = {
            m: (
                Kronecker(self._randn(2, 2) * 0.3, self._randn(*(n // 2 for n in shapes[m])) * 0.1),
            )
            for m in every
        }
        deltas["norms"] = {
            "model.layers.1.input_layernorm": (NormWeight(1 + self._randn(60) * 0.5),),
            FINAL_NORM: (NormWeight(1 + self._randn(60) * 0.5),),
            every[0]: (self._low_rank(shapes[every[0]], 3),),
        }
        ids = torch.arange(0, 49152, 3)
        deltas["embedding"] = {EMBEDDING: (TokenRows(ids, self._randn(len(ids), 60) * 0.3),)}
        deltas["inputs"] = {
            m: (Scale(1 + 0.3 * self._randn(shapes[m][1]), Side.INPUT),)
            for m in every
            if "down_proj" in m or "k_proj" in m
        }
        self.times = LoadTimes()
        self._adapters = {
            name: Adapter(name, 1, name, "TEST", modules) for name, modules in deltas.items()
        }

    def load(self, ref: AdapterRef) -> PackedAdapter:
        return pack(self._adapters[ref.id], self._layout, self._dtype, self._bits)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._chance)

    def _low_rank(self, shape: tuple[int, int], rank: int) -> LowRank:
        out, columns = shape
        return LowRank(self._randn(rank, columns) / columns**0.5, self._randn(out, rank) / rank)


class Driver:
    """An engine whose steps are taken one by one, and everything that it computed."""

    def __init__(self, checkpoint: Checkpoint, **options: Any) -> None:
        options = {"pool_bytes": 64 << 20, "prefix_caching": False, "max_batch_size": 80} | options
        config = EngineConfig(dtype="bfloat16", check_integrity=True, **options)
        kernels = kernels_for(CPU, torch.bfloat16)
        self.engine = assemble(checkpoint, config, kernels, make_loader=Adapters)
        # Request -> the logits of each of its tokens.
        self.logits: dict[str, list[Tensor]] = {}
        # Rows of each step, and whether a recording computed it, or made one.
        self.steps: list[tuple[int, bool]] = []
        sampler = self.engine._runner._sampler
        sample = sampler.sample

        def keep(logits: Tensor, sequences: Sequence[TokenSequence]) -> Any:
            for row, sequence in zip(logits, sequences, strict=True):
                self.logits.setdefault(sequence.id, []).append(row.clone())
            return sample(logits, sequences)

        sampler.sample = keep
        recorded = self.engine._runner._recorded
        compute = recorded.compute

        def count(batch: Any) -> Tensor | None:
            logits = compute(batch)
            self.steps.append((len(batch.tokens), logits is not None))
            return logits

        recorded.compute = count

    @property
    def num_recordings(self) -> int:
        return len(self.engine._runner._recorded._recordings)

    def recorded(self, since: int = 0) -> list[int]:
        """Rows of the steps that came from a recording, or were recorded."""
        return [rows for rows, by_recording in self.steps[since:] if by_recording]

    def run(self, script: Script, adapters: Sequence[str] = ()) -> dict[str, list[Tensor]]:
        """adapters: brought into the pool before the first step, so that every run has the same
        steps."""
        engine = self.engine
        for name in adapters:
            done: Future[None] = Future()
            engine._adapters.load(ref_of(name), False, done)
            while not done.done():
                engine._step()
        number = 0
        while number <= max(script) or len(engine._answers):
            for name, mix, prompt, tokens in script.get(number, ()):
                engine._answers.add(TokenSequence(request(name, mix, prompt, tokens), self._take))
            assert engine._step() or number <= max(script)
            number += 1
        engine._scheduler.check_integrity()
        return self.logits

    def close(self) -> None:
        self.engine._close()

    def _take(self, output: Any) -> None:
        assert output.error is None, output.error


def ref_of(name: str) -> AdapterRef:
    return AdapterRef(name, 1, Path("unused"))


def request(name: str, mix: Mix, prompt: int, tokens: int) -> GenerationRequest:
    chance = random.Random(name)
    prompt_ids = [chance.randrange(3, 40000) for _ in range(prompt)]
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    shares = combine(Share(ref_of(one), weight) for one, weight in mix.items())
    return GenerationRequest(name, prompt_ids, params, shares)


@pytest.fixture
def drive(tiny_checkpoint: Checkpoint) -> Iterator[Callable[..., Driver]]:
    drivers: list[Driver] = []

    def make(**options: Any) -> Driver:
        drivers.append(Driver(tiny_checkpoint, **options))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.close()


@pytest.fixture
def both(drive: Callable[..., Driver]) -> Callable[..., Driver]:
    """Runs a script with recordings and without, compares every logit bit for bit, and returns the
    engine that recorded."""

    def compare(script: Script, adapters: Sequence[str] = (), **options: Any) -> Driver:
        recording, plain = drive(**options), drive(**options)
        got = recording.run(script, adapters)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plain.engine._runner._recorded, "compute", lambda batch: None)
            expected = plain.run(script, adapters)
        assert got.keys() == expected.keys()
        for name, logits in got.items():
            assert len(logits) == len(expected[name])
            for number, (one, other) in enumerate(zip(logits, expected[name], strict=True)):
                assert torch.equal(one, other), f"token {number} of {name}"
        return recording

    return compare


def test_sequences_come_and_go_and_adapters_change(both: Callable[..., Driver]) -> None:
    mixes: list[Mix] = [
        {}, {"lora-3": 1.0}, {"lora-40": 1.0}, {"few-modules": 1.0}, {"lora-17": 1.0},
        {"lora-8": 0.5, "lora-3": -1.5}, {"scale-and-bias": 1.0}, {"kronecker": 1.0},
        {"lora-40": 1.0, "few-modules": 0.3, "lora-17": 2.0},
    ]  # fmt: skip
    chance = random.Random(4)
    script: dict[int, list[tuple[str, Mix, int, int]]] = {}
    for number in range(40):
        step = chance.choice([0, 0, 3, 5, 9, 14, 20, 30, 45])
        one = (f"r{number}", chance.choice(mixes), chance.randint(1, 25), chance.randint(3, 25))
        script.setdefault(step, []).append(one)
    names = [*LORAS, "few-modules", "scale-and-bias", "kronecker"]
    driver = both(script, names)
    counts = driver.recorded()
    # Of most shapes there is more than one step: these were replayed.
    assert len(counts) > 2 * driver.num_recordings > 10


def test_base_and_adapters_in_the_same_number_of_rows(both: Callable[..., Driver]) -> None:
    """Two recordings of the same rows, in turn."""
    script = {
        0: [(f"base-{n}", {}, 5, 10) for n in range(3)],
        12: [(f"lora-{n}", {"lora-8": 1.0}, 4 + n, 10) for n in range(3)],
        24: [("mixed", {}, 6, 10), ("a", {"lora-3": 1.0}, 6, 10), ("b", {"lora-40": 1.0}, 6, 10)],
        36: [(f"again-{n}", {}, 9, 10) for n in range(3)],
    }
    driver = both(script, list(LORAS))
    assert driver.num_recordings == 2
    assert set(driver.recorded()) == {3}
    assert len(driver.recorded()) == 4 * 9


def test_what_goes_the_long_way_after_its_shape_was_recorded(both: Callable[..., Driver]) -> None:
    """Our kernels take 4 rows of a Kronecker product; a recording of 6 rows that was made with
    others must not be replayed without it, nor be lost."""
    script = {
        0: [(f"lora-{n}", {"lora-8": 1.0}, 5, 8) for n in range(6)],
        10: [(f"kronecker-{n}", {"kronecker": 1.0}, 5, 8) for n in range(6)],
        20: [(f"weighted-{n}", {"few-modules": 1.0, "lora-3": 0.5}, 5, 8) for n in range(6)],
    }
    driver = both(script, [*LORAS, "few-modules", "kronecker"])
    assert driver.recorded() == [6] * 14
    assert driver.num_recordings == 1


def test_the_first_step_of_a_shape_may_be_one_that_cannot_be_recorded(
    both: Callable[..., Driver],
) -> None:
    """Others of its shape are recorded all the same."""
    script = {
        0: [(f"kronecker-{n}", {"kronecker": 1.0}, 5, 4) for n in range(6)],
        6: [(f"lora-{n}", {"lora-8": 1.0}, 5, 8) for n in range(6)],
    }
    assert both(script, ["kronecker", "lora-8"]).recorded() == [6] * 7


@pytest.mark.parametrize("name", ["norms", "embedding", "inputs"])
def test_adapters_that_change_other_things_are_computed_anew(
    both: Callable[..., Driver], name: str
) -> None:
    """Alone, and beside others whose steps were recorded before."""
    script = {
        0: [("lora", {"lora-8": 1.0}, 5, 30), ("base", {}, 7, 30)],
        10: [("other", {name: 1.0}, 6, 6)],
        20: [("third", {"lora-3": 1.0}, 6, 6)],
        32: [("alone", {name: 1.0}, 5, 6)],
    }
    driver = both(script, [name, "lora-8", "lora-3"])
    # 29 tokens each after the prompt: 9 before and 14 beside others; of the 30 steps in which
    # somebody decodes, those of the adapter are no recording's.
    assert driver.recorded().count(2) >= 15
    assert driver.recorded().count(3) == 5
    assert 1 not in driver.recorded()


def test_steps_are_right_before_while_and_after_an_adapter_is_in_the_weights(
    both: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    class AtOnce:
        """A thread that has ended when it has started: the same steps in every run."""

        def __init__(self, target: Callable[[], None], **_: Any) -> None:
            self.start = target

        def is_alive(self) -> bool:
            return False

    monkeypatch.setattr("polydelta.engine.fusion.threading", _Namespace(Thread=AtOnce))
    script = {
        0: [("first", {"lora-8": 1.0}, 5, 20), ("second", {"lora-8": 1.0}, 9, 12)],
        15: [("base", {}, 5, 20)],
        28: [("third", {"lora-8": 1.0}, 5, 4)],
        36: [("other", {"lora-40": 1.0}, 5, 20), ("one more", {"lora-40": 1.0}, 5, 30)],
        60: [("bare", {}, 5, 9), ("bare too", {}, 5, 9)],
    }
    driver = both(script, list(LORAS), fuse_after=3)
    assert driver.engine._runner._fusion is not None
    assert driver.engine._runner._fusion._ref == ref_of("lora-40")
    assert len(driver.recorded()) > 20


class _Namespace:
    def __init__(self, **names: Any) -> None:
        self.__dict__ |= names


def test_more_shapes_than_are_kept(both: Callable[..., Driver]) -> None:
    """One sequence fewer in every step, down to one; and once more."""
    most = MOST_RECORDINGS + 6
    script = {
        start: [(f"{start}-{n}", {"lora-3": 1.0} if n else {}, 4, 2 + n) for n in range(most)]
        for start in (0, most + 5)
    }
    driver = both(script, ["lora-3"])
    assert sorted(set(driver.recorded())) == list(range(1, most + 1))
    assert driver.num_recordings == MOST_RECORDINGS


def test_the_recording_that_was_not_used_for_the_longest_goes(
    both: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded_steps, "MOST_RECORDINGS", 2)
    script = {
        0: [("long", {}, 4, 60)],
        5: [("second", {}, 4, 5)],  # 1, 2 rows
        20: [("third", {}, 4, 9), ("fourth", {}, 4, 4)],  # 3, 2, 1 rows
    }
    driver = both(script)
    assert driver.num_recordings == 2
    assert [shape[0] for shape in driver.engine._runner._recorded._recordings] == [2, 1]


def test_a_step_with_more_rows_than_are_recorded(both: Callable[..., Driver]) -> None:
    script = {
        0: [(f"r{n}", {"lora-3": 1.0} if n % 2 else {}, 2, 6) for n in range(MOST_RECORDED + 1)]
    }
    driver = both(script, ["lora-3"])
    assert driver.recorded() == []
    script = {0: [(f"r{n}", {"lora-3": 1.0} if n % 2 else {}, 2, 6) for n in range(MOST_RECORDED)]}
    assert set(both(script, ["lora-3"]).recorded()) == {MOST_RECORDED}


def test_prompts_in_chunks_between_decoding_steps(both: Callable[..., Driver]) -> None:
    """A step may have as many rows as a recorded one and be no decode step; one that ends no
    prompt has no logits at all."""
    script = {
        0: [("long prompt", {"lora-8": 1.0}, 50, 6)],
        9: [("short", {}, 3, 30), ("another", {"lora-3": 1.0}, 3, 30)],
        14: [("late prompt", {"lora-17": 1.0}, 40, 6)],
    }
    both(script, list(LORAS), max_batch_tokens=8)


def test_recording_is_for_steps_alone(drive: Callable[..., Driver]) -> None:
    """A prompt of one token is a decode step like others; one of two is none."""
    driver = drive()
    driver.run({0: [("one", {}, 1, 3), ("two", {}, 2, 1)]})
    assert driver.steps[0] == (3, False)
    assert driver.recorded() == [1, 1]


def test_answers_in_a_crowd_on_the_engines_own_thread_equal_those_given_alone(
    tiny_checkpoint: Checkpoint, adapter_writer: Callable, serve: Callable, run: Callable
) -> None:
    """In bfloat16, in a pool that is too small for all: prompts in chunks, decode steps of any
    rows, preempted sequences that are computed again as prompts."""
    write = adapter_writer(checkpoint_layout(tiny_checkpoint, torch.bfloat16))
    for rank in (3, 12, 19):
        write.lora(f"lora-{rank}", rank, seed=rank, scale=0.3)
    write.shira("shira", 1, targets=("k_proj", "down_proj"), scale=0.3)
    catalog = FolderCatalog([write.root])
    names = (None, "lora-3", "lora-12", "lora-19", "shira")
    requests = []
    for number in range(20):
        chance = random.Random(number)
        prompt = [chance.randrange(3, 40000) for _ in range(chance.randrange(1, 50))]
        params = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True)
        name = names[number % len(names)]
        adapters = combine([Share(catalog.resolve(name))]) if name else ()
        requests.append(GenerationRequest(f"r{number}", prompt, params, adapters))
    options = {"dtype": "bfloat16", "prefix_caching": False}
    with serve(tiny_checkpoint, **options) as engine:
        alone = {r.request_id: run(engine, [r])[r.request_id].token_ids for r in requests}
    with serve(
        tiny_checkpoint,
        **options,
        pool_bytes=108 * 3 * 1280,
        max_batch_tokens=24,
        max_batch_size=20,
    ) as engine:
        for name in names[1:]:  # in one run of pages each, half of all
            engine.load_adapter(catalog.resolve(name), pin=True).result(60)
        together = run(engine, requests)
        stats = engine.stats()
        assert engine._runner._recorded._recordings
    assert {name: answer.token_ids for name, answer in together.items()} == alone
    assert stats.preemptions > 0, "the pool was not small enough"
