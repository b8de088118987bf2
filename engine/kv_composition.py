"""What KV formats, selections and prefill methods compose with: each other, prefix caching, chunked
prefill, adapters and machines. Imports no torch.

The rows are what `kv_setup` checks and what `polydelta kv-formats` prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from polydelta.kernels.kv_selection import (
    PREFILLS,
    SELECTIONS,
    SnapKV,
    XAttention,
    parse_prefill,
    parse_selection,
)

# Settings that a method may need.
HOST_KV, LABELS = "host_kv_gib", "kv_labels"


class Option(StrEnum):
    """Where a method is named."""

    FORMAT = "kv_format"
    SELECT = "kv_select"
    PREFILL = "prefill"


class Shared(StrEnum):
    """What other requests find in the prefix cache."""

    PAGES = "all full pages"
    # Answers' KV depends on what their queries chose.
    PROMPT_PAGES = "full pages of prompts"
    PROMPT_BLOCKS = f"prompts, in steps of {XAttention.block} tokens"
    NOTHING = "nothing: pages are private"


class PerRequest(StrEnum):
    """Whether a request may ask for it; for exactly what the server does, it always may."""

    ALWAYS = "yes"
    # Pages note what the server's own selection asks of them.
    SAME_KIND = "where it is the server's, with any numbers"
    NEVER = "only the server's own"


@dataclass(frozen=True)
class Row:
    """Methods that compose alike. All of them go with any adapters in a batch, with chunked prefill
    and with weights of any number of bits."""

    option: Option
    names: tuple[str, ...]
    prefix_caching: Shared
    # Where prompts may be cut, and the tokens of one that a step must have room for.
    chunks: str = "anywhere"
    prompt_step: int = 1
    # Names that it does not go with; of two rows either may say it.
    apart: tuple[str, ...] = ()
    per_request: PerRequest = PerRequest.NEVER
    # A setting that it takes besides.
    needs: str | None = None
    # Whether it is served on GPUs, with models whose layers have sliding windows, and with adapters
    # that put virtual tokens before a sequence.
    on_gpu: bool = True
    sliding_windows: bool = True
    virtual_tokens: bool = True

    @property
    def limits(self) -> str:
        """What else it asks for; "" for nothing."""
        asked = {
            f"needs {self.needs}": self.needs is not None,
            "CPUs only": not self.on_gpu,
            "no sliding windows": not self.sliding_windows,
            "no virtual tokens": not self.virtual_tokens,
        }
        return ", ".join(text for text, applies in asked.items() if applies)


_BY_TOKEN = ("native", "int8")
_UNROTATED = ("mustafar-50", "mustafar-70", "kivi-4", "kivi-2", "gear")
# What a few channels had is spread over all of them.
_ROTATED = ("int4", "fp8")
_BY_PAGE = (*_UNROTATED, *_ROTATED)
_VOTES_TOGETHER = f"the last {SnapKV.window} tokens together"

ROWS = (
    Row(Option.FORMAT, _BY_TOKEN, Shared.PAGES),
    Row(Option.FORMAT, _ROTATED, Shared.PAGES),
    Row(Option.FORMAT, _UNROTATED, Shared.PAGES),
    Row(Option.SELECT, ("full",), Shared.PAGES, per_request=PerRequest.ALWAYS),
    Row(
        Option.SELECT,
        ("window",),
        Shared.PAGES,
        apart=("xattention",),
        per_request=PerRequest.ALWAYS,
        sliding_windows=False,
    ),
    Row(
        Option.SELECT,
        ("quest",),
        Shared.PROMPT_PAGES,
        per_request=PerRequest.SAME_KIND,
        sliding_windows=False,
    ),
    Row(
        Option.SELECT,
        ("double-sparsity",),
        Shared.PROMPT_PAGES,
        # Its labels are channels that matter more than others.
        apart=_ROTATED,
        per_request=PerRequest.SAME_KIND,
        needs=LABELS,
        sliding_windows=False,
    ),
    Row(
        Option.SELECT,
        ("infllm",),
        Shared.PROMPT_PAGES,
        apart=("xattention",),
        needs=HOST_KV,
        on_gpu=False,
        sliding_windows=False,
    ),
    Row(
        Option.SELECT,
        ("snapkv",),
        Shared.NOTHING,
        chunks=_VOTES_TOGETHER,
        prompt_step=SnapKV.window,
        apart=("xattention",),
        per_request=PerRequest.ALWAYS,
        sliding_windows=False,
        virtual_tokens=False,
    ),
    Row(
        Option.SELECT,
        ("h2o",),
        Shared.NOTHING,
        chunks=_VOTES_TOGETHER,
        prompt_step=SnapKV.window,
        # With each token of an answer one leaves, and another moves within a page that is encoded.
        apart=(*_BY_PAGE, "xattention"),
        per_request=PerRequest.ALWAYS,
        sliding_windows=False,
        virtual_tokens=False,
    ),
    Row(Option.PREFILL, ("full",), Shared.PAGES),
    Row(
        Option.PREFILL,
        ("xattention",),
        Shared.PROMPT_BLOCKS,
        chunks=f"at multiples of {XAttention.block} tokens",
        prompt_step=XAttention.block,
        # Where pages are encoded as a whole, queries attend page by page and not in its blocks.
        apart=_BY_PAGE,
        sliding_windows=False,
    ),
)


def check_method(option: Option, text: str) -> None:
    """Raises ValueError for one that there is not, saying what there is."""
    match option:
        case Option.SELECT:
            parse_selection(text)
        case Option.PREFILL:
            parse_prefill(text)
        case Option.FORMAT if text not in (names := names_of(option)):
            raise ValueError(f"KV format {text!r} is not known: use one of {', '.join(names)}.")


def names_of(option: Option) -> list[str]:
    """Of its methods, in the order of the rows."""
    return [name for row in ROWS if row.option is option for name in row.names]


def in_full(name: str) -> str:
    """A method as it may be written, with the numbers that it has where none are given."""
    if name in SELECTIONS:
        return str(parse_selection(name))
    return str(parse_prefill(name)) if name in PREFILLS else name


def row_of(option: Option, name: str) -> Row:
    return next(row for row in ROWS if row.option is option and name in row.names)


def apart(first: Row, second: Row) -> bool:
    """Whether methods of two rows exclude each other."""
    return bool({*first.apart} & {*second.names} or {*second.apart} & {*first.names})


def not_with(row: Row) -> list[str]:
    """Names of all methods that one of the row does not go with."""
    return [name for other in ROWS if apart(row, other) for name in other.names]
