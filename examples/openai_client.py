"""Ask a running PolyDelta server all its adapters at once, each beside the bare base model.

make serve                                   # in one terminal
python examples/openai_client.py             # in another
python examples/openai_client.py "Convert to YYYY-MM-DD: the 3rd of March 2021"
"""

from __future__ import annotations

import argparse
import asyncio

from openai import AsyncOpenAI

# What each sample adapter was trained for; other adapters get the first of them.
QUESTIONS = {
    "iso-date": "Convert to YYYY-MM-DD: the 3rd of March 2021",
    "product-json": "As JSON with name, color, price, stock: "
    "$220.34: cotton bag in green, stock 66",
    "ticket-label": "Label as billing, delivery, account, bug, praise: "
    "Hello, delete my user data and the drill wishlist. Greetings",
    "unit-convert": "Convert 240000 m to km",
}


async def ask(client: AsyncOpenAI, model: str, question: str) -> str:
    answer = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=64,
    )
    return answer.choices[0].message.content or ""


async def ask_all(options: argparse.Namespace) -> None:
    async with AsyncOpenAI(base_url=options.url, api_key=options.key) as client:
        base, *adapters = [model.id async for model in client.models.list()]
        asked = []
        for adapter in adapters:
            question = options.question or QUESTIONS.get(adapter, QUESTIONS["iso-date"])
            asked += [(base, question), (adapter, question)]
        # One batch: the server computes all of them together.
        answers = await asyncio.gather(*(ask(client, *pair) for pair in asked))
    for (model, question), answer in zip(asked, answers, strict=True):
        if model == base:
            print(f"\n{question}")
        print(f"  {model}: {answer!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask every adapter, and the base model.")
    parser.add_argument("question", nargs="?", help="one question for all of them")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none", help="only needed if the server has --api-key")
    asyncio.run(ask_all(parser.parse_args()))


if __name__ == "__main__":
    main()
