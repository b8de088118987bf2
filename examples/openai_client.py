"""Ask a running PolyDelta server the same thing as the base model and as each of its adapters.

make serve                                   # in one terminal
python examples/openai_client.py             # in another
python examples/openai_client.py "Convert to YYYY-MM-DD: the 3rd of March 2021"
"""

from __future__ import annotations

import argparse

from openai import OpenAI

QUESTION = "Convert to YYYY-MM-DD: the 3rd of March 2021"


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask the base model and every adapter.")
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none", help="only needed if the server has --api-key")
    options = parser.parse_args()

    client = OpenAI(base_url=options.url, api_key=options.key)
    for model in client.models.list():
        print(f"{model.id}: ", end="", flush=True)
        chunks = client.chat.completions.create(
            model=model.id,
            messages=[{"role": "user", "content": options.question}],
            temperature=0,
            max_tokens=64,
            stream=True,
        )
        for chunk in chunks:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
