"""Many clients at once, over all adapters, and clients that hang up; then the pool is clean."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import httpx
import openai
import pytest

CLIENTS = 32
MAX_TOKENS = 24


@pytest.fixture
def questions(samples, sample_tasks, base):
    """32 (model, question) pairs over the base and every sample adapter."""
    models = [base, *samples]
    asked = []
    for number in range(CLIENTS):
        model = models[number % len(models)]
        task = sample_tasks.TASKS.get(model) or sample_tasks.TASKS["iso-date"]
        asked.append((model, task.held_out(CLIENTS)[number].prompt))
    return asked


async def ask(client: openai.AsyncOpenAI, model: str, question: str, stream: bool) -> str:
    options = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }
    if not stream:
        done = await client.chat.completions.create(**options)
        return done.choices[0].message.content
    chunks = await client.chat.completions.create(stream=True, **options)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


def async_client(server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300
    )


@pytest.mark.slow
def test_32_clients_over_all_adapters_get_what_they_would_get_alone(server, questions, settled):
    async def alone() -> list[str]:
        async with async_client(server) as client:
            return [await ask(client, *question, stream=False) for question in questions]

    async def together() -> list[str]:
        async with async_client(server) as client:
            return await asyncio.gather(
                *(ask(client, *question, stream=i % 2 == 0) for i, question in enumerate(questions))
            )

    assert asyncio.run(together()) == asyncio.run(alone())
    after = settled()
    # Or the pool was too large for the test to say anything about sharing it.
    assert after["vllm:num_preemptions_total"] + after["polydelta_evictions_total"] > 0
    assert after["polydelta_pool_pages{kv}"] == 0
    assert after["polydelta_pool_pages{adapters}"] == 0


@pytest.mark.slow
def test_the_samples_are_right_where_the_base_is_not(client, base, samples, sample_tasks):
    def says(model, question):
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=64,
        )
        return answer.choices[0].message.content

    for sample in samples:
        task = sample_tasks.TASKS[sample]
        examples, right = list(task.held_out(4)), {}
        with ThreadPoolExecutor() as together:
            for model in (base, sample):
                answers = together.map(says, repeat(model), [each.prompt for each in examples])
                right[model] = sum(map(task.check, answers, [each.answer for each in examples]))
        assert right[sample] >= 3, (sample, right)
        assert right[sample] > right[base], (sample, right)


@pytest.mark.slow
def test_clients_that_hang_up_leave_nothing_behind(server, questions, base, metrics, settled):
    """Half leave in mid-stream, half before a whole body; each had asked for two choices."""
    url = f"{server.url}/v1/chat/completions"
    before = metrics()

    async def leave(client: httpx.AsyncClient, number: int, model: str, question: str) -> None:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "n": 2,
            "max_tokens": 300,
            "ignore_eos": True,
            "stream": number % 2 == 0,
        }
        if body["stream"]:
            async with client.stream("POST", url, json=body) as answer:
                # The role comes before any token: only text says that decoding is under way.
                left = 1 + number % 7
                async for line in answer.aiter_lines():
                    left -= '"content":"' in line and '"content":""' not in line
                    if left == 0:
                        return
                raise AssertionError("the stream ended before its client left")
        with pytest.raises(httpx.ReadTimeout):
            await client.post(url, json=body, timeout=httpx.Timeout(60, read=3.0))

    async def scenario() -> None:
        async with httpx.AsyncClient(timeout=120) as client:
            await asyncio.gather(
                *(leave(client, number, *asked) for number, asked in enumerate(questions))
            )

    asyncio.run(scenario())
    after = settled()
    assert after["polydelta_pool_pages{kv}"] == 0
    assert after["polydelta_pool_pages{adapters}"] == 0
    owners = ("free", "kv", "cached", "adapters", "adapters_idle")
    assert after["polydelta_pool_size_pages"] == sum(
        after[f"polydelta_pool_pages{{{owner}}}"] for owner in owners
    )
    # All 64 choices were cut off by the abort, none ran to its end, and tokens had been made.
    aborted = after["finished{abort}"] - before.get("finished{abort}", 0)
    generated = after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]
    assert aborted == CLIENTS * 2
    assert generated >= CLIENTS / 2


@pytest.mark.slow
def test_the_server_still_answers_afterwards(client, base):
    done = client.completions.create(model=base, prompt="Hello", max_tokens=2)
    assert done.usage.completion_tokens <= 2
