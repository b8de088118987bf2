"""What can be chosen when Locust is started: the arguments of `locustfile.py`, beside Locust's own.

Locust's `--help` has only its own; `python -m load_tests.locust_options` prints these.
"""

from __future__ import annotations

import math
import random
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locust.argument_parser import LocustArgumentParser

SAMPLES = Path(__file__).parents[1] / "adapters_store" / "samples"


@dataclass(frozen=True)
class Range:
    """Whole numbers from `least` to `most`, both included, each as likely as the others."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Range:
        """`MIN,MAX`, or one number. Raises ValueError."""
        least, comma, most = text.partition(",")
        bounds = cls(int(least), int(most if comma else least))
        if not 1 <= bounds.least <= bounds.most:
            raise ValueError(f"{text!r} is no MIN,MAX with 1 <= MIN <= MAX")
        return bounds

    def draw(self) -> int:
        return random.randint(self.least, self.most)


@dataclass(frozen=True)
class Options:
    """The arguments, as users need them."""

    # Empty: all that the server lists.
    models: tuple[str, ...]
    alpha: float
    prompt_tokens: Range
    output_tokens: Range
    chat: bool
    ignore_eos: bool
    disconnect_share: float
    uploads: str
    upload_share: float
    upload_folder: Path
    api_key: str
    max_fail_ratio: float

    @classmethod
    def of(cls, parsed: Namespace) -> Options:
        """parsed: Locust's, in which its web interface may have changed what is no boolean.

        Raises ValueError.
        """
        return cls(
            models=tuple(filter(None, map(str.strip, parsed.models.split(",")))),
            alpha=parsed.alpha,
            prompt_tokens=Range.parse(parsed.prompt_tokens),
            output_tokens=Range.parse(parsed.output_tokens),
            chat=parsed.chat,
            ignore_eos=parsed.ignore_eos,
            disconnect_share=parsed.disconnect_share,
            uploads=parsed.uploads,
            upload_share=parsed.upload_share,
            upload_folder=Path(parsed.upload_folder),
            api_key=parsed.api_key,
            max_fail_ratio=parsed.max_fail_ratio,
        )

    def headers(self) -> dict[str, str]:
        """Of every request. A compressed stream would come in blocks, not token by token."""
        headers = {"Accept-Encoding": "identity"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers


def add_arguments(parser: LocustArgumentParser) -> None:
    """Three groups; each argument has an environment variable, and all but the key are fields of
    Locust's web interface."""
    requests = parser.add_argument_group("Completions")
    uploads = parser.add_argument_group("Uploads of adapters (servers with /v1/adapters)")
    server = parser.add_argument_group("Server and outcome")

    def add(group: Any, flag: str, help_text: str, shown: bool = True, **settings: Any) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        settings = {"env_var": f"LOCUST_{name.upper()}"} | settings
        if default := settings.get("default"):
            help_text += f" (default: {default})"
        action = group.add_argument(flag, help=help_text, **settings)
        # Locust's own parameter of this name is the parser's alone, not its groups'.
        action.include_in_web_ui = shown

    add(
        requests,
        "--models",
        "Names to ask for, separated by commas; without it all that GET /v1/models lists",
        default="",
        metavar="NAME,...",
    )
    add(
        requests,
        "--alpha",
        "Skew of the choice of a model: numpy's power distribution over the list of models, as in "
        "S-LoRA. 1: all alike; the smaller, the more for the first",
        default=0.3,
        type=_number("a number over 0", lambda value: 0 < value < math.inf),
    )
    add(
        requests,
        "--prompt-tokens",
        "Length of prompts, in words of about one token each",
        default="16,64",
        type=_range_text,
        metavar="MIN,MAX",
    )
    add(
        requests,
        "--output-tokens",
        "max_tokens of requests",
        default="8,32",
        type=_range_text,
        metavar="MIN,MAX",
    )
    add(
        requests,
        "--chat",
        "Ask /v1/chat/completions in place of /v1/completions",
        action="store_true",
    )
    add(
        requests,
        "--ignore-eos",
        "Always generate max_tokens; vLLM, SGLang and PolyDelta know the field, others may refuse",
        action="store_true",
    )
    add(
        requests,
        "--disconnect-share",
        "Share of the streams whose client leaves after a random number of tokens",
        default=0.05,
        type=_share,
    )
    add(
        uploads,
        "--uploads",
        "Whether users upload, replace, roll back and delete adapters, each its own. auto: where "
        "GET /v1/adapters answers",
        default="auto",
        choices=["auto", "on", "off"],
    )
    add(
        uploads,
        "--upload-share",
        "Share of the actions that are one of these, where there are uploads",
        default=0.05,
        type=_share,
    )
    add(
        uploads,
        "--upload-folder",
        "An adapter of the served base model, or a folder of such; they are sent with changes that "
        "make each upload's content new. PolyDelta's samples are for its default model",
        default=str(SAMPLES),
        metavar="DIR",
    )
    add(
        server,
        "--api-key",
        "Sent as bearer token",
        shown=False,
        default="",
        env_var="OPENAI_API_KEY",
        metavar="KEY",
    )
    add(
        server,
        "--max-fail-ratio",
        "The exit code is 1 when a larger share of the requests failed, or when none was made",
        default=0.0,
        type=_share,
    )


def _number(wanted: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """An argument's type."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


_share = _number("a number from 0 to 1", lambda value: 0 <= value <= 1)


def _range_text(text: str) -> str:
    """Stays a text, for that is what Locust's web interface can change."""
    try:
        Range.parse(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no MIN,MAX with 1 <= MIN <= MAX") from None
    return text


if __name__ == "__main__":
    arguments = LocustArgumentParser("locust -f load_tests/locustfile.py", add_help=False)
    add_arguments(arguments)
    arguments.print_help()
