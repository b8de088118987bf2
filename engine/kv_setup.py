"""How a server keeps and reads KV, checked against what composes. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from polydelta.engine.config import EngineConfig
from polydelta.engine.kv_composition import (
    HOST_KV,
    LABELS,
    ROWS,
    Option,
    PerRequest,
    apart,
    check_method,
    row_of,
)
from polydelta.kernels.kv_selection import (
    FULL,
    SELECTIONS,
    Selection,
    parse_prefill,
    parse_selection,
    usage,
)

__all__ = ["KVSetup", "Selection", "problem", "requested"]


@dataclass(frozen=True)
class KVSetup:
    """How a server keeps and reads KV, and what bears on it."""

    format: str = "native"
    selection: Selection = FULL
    prefill: Selection = FULL
    # Whether there is host RAM for KV, and a file of labels.
    host_kv: bool = False
    labels: bool = False
    on_gpu: bool = False
    # Whether a layer of the model has one.
    sliding_windows: bool = False
    # Of one step.
    max_batch_tokens: int = 512
    max_batch_size: int = 64

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        on_gpu: bool,
        sliding_windows: bool,
        max_batch_tokens: int,
        max_batch_size: int,
    ) -> KVSetup:
        """Raises ValueError for a name that there is not, and for what does not compose."""
        check_method(Option.FORMAT, config.kv_format)
        setup = cls(
            config.kv_format,
            parse_selection(config.kv_select),
            parse_prefill(config.prefill),
            config.host_kv_bytes > 0,
            config.kv_labels is not None,
            on_gpu,
            sliding_windows,
            max_batch_tokens,
            max_batch_size,
        )
        if said := problem(setup):
            raise ValueError(said)
        if (
            config.kv_labels is not None
            and row_of(Option.SELECT, setup.selection.name).needs != LABELS
        ):
            reading = [name for row in ROWS if row.needs == LABELS for name in row.names]
            raise ValueError(
                f"kv_labels {config.kv_labels} is not read with kv_select {setup.selection}: leave "
                f"it out, or use kv_select {', '.join(reading)}."
            )
        return setup


def problem(setup: KVSetup) -> str | None:
    """Why a server cannot be set up like this, in one line that says what can be done; None if it
    can."""
    return next(_problems(setup), None)


def requested(setup: KVSetup, text: str) -> Selection:
    """The selection that a request asks of such a server. Raises ValueError for one that there is
    not, or not here."""
    name = text.partition(":")[0]
    if name not in SELECTIONS:
        raise ValueError(f"{text!r} is not known: ask for one of {_allowed(setup)}.")
    selection = parse_selection(text)
    if _may_ask(setup, selection):
        return selection
    raise ValueError(
        f"{text!r} does not go with how this server keeps KV (kv_format {setup.format}, kv_select "
        f"{setup.selection}, prefill {setup.prefill}): ask for one of {_allowed(setup)}."
    )


def _allowed(setup: KVSetup) -> str:
    """What a request may ask for."""
    return ", ".join(
        str(setup.selection)
        if row_of(Option.SELECT, name).per_request is PerRequest.NEVER
        else usage(name)
        for name in SELECTIONS
        if name == setup.selection.name or _may_ask(setup, parse_selection(name))
    )


def _may_ask(setup: KVSetup, selection: Selection) -> bool:
    if selection == setup.selection:
        return True
    match row_of(Option.SELECT, selection.name).per_request:
        case PerRequest.NEVER:
            return False
        case PerRequest.SAME_KIND if selection.name != setup.selection.name:
            return False
    return problem(replace(setup, selection=selection)) is None


def _problems(setup: KVSetup) -> Iterator[str]:
    chosen = {
        Option.FORMAT: setup.format,
        Option.SELECT: str(setup.selection),
        Option.PREFILL: str(setup.prefill),
    }
    rows = {option: row_of(option, text.partition(":")[0]) for option, text in chosen.items()}
    for first, second in combinations(Option, 2):
        if apart(rows[first], rows[second]):
            others = [
                name
                for row in ROWS
                if row.option is second and not apart(rows[first], row)
                for name in row.names
            ]
            yield (
                f"{first} {chosen[first]} does not go with {second} {chosen[second]}, but with "
                f"{', '.join(others)}: leave one of them out."
            )
    for option, row in rows.items():
        method = f"{option} {chosen[option]}"
        if setup.sliding_windows and not row.sliding_windows:
            yield (
                f"{method} is not served with a model whose layers have sliding windows, which "
                f"read a part of the context already: leave out {option}."
            )
        if setup.on_gpu and not row.on_gpu:
            yield f"{method} is served on CPUs only: use device cpu, or leave out {option}."
        if row.needs == HOST_KV and not setup.host_kv:
            yield f"{method} keeps what it does not read in host RAM: give it host_kv_gib."
        if row.needs == LABELS and not setup.labels:
            yield (
                f"{method} needs to know which channels matter: write a file with `polydelta "
                "calibrate`, and name it as kv_labels."
            )
        # Beside a token of each other sequence.
        least = row.prompt_step + setup.max_batch_size - 1
        if row.prompt_step > 1 and setup.max_batch_tokens < least:
            yield (
                f"{method} computes {row.prompt_step} tokens of a prompt in one step, and "
                f"max_batch_tokens {setup.max_batch_tokens} may leave fewer beside those of "
                f"max_batch_size {setup.max_batch_size} sequences: raise it to {least}."
            )
