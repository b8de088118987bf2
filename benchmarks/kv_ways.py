"""The ways to store and read KV that benchmarks compare, and what each of them reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import typer

from benchmarks.kv_reader import Way
from polydelta.engine.kv_spec import KVSpec
from polydelta.kernels.kv_formats.by_name import FORMATS
from polydelta.kernels.kv_selection import (
    H2O,
    DoubleSparsity,
    InfLLM,
    Quest,
    Selection,
    SnapKV,
    Window,
)

NATIVE = Way()


def ways(context: int, prompt: int) -> list[Way]:
    """Native full attention first. context: tokens that selections are made for: their budgets are
    the authors' defaults cut down to about a quarter of it, but for double sparsity, whose choice
    is the finest, and h2o, which keeps a fifth. prompt: how many of these tokens are one."""
    part, share = context // 32, 0.1 * context / prompt
    selections = (
        f"window:4+{8 * part - 4}",
        # A quarter of what the tokens of an answer see on average, behind a prompt as long as it.
        f"quest:{6 * part}",
        f"double-sparsity:{2 * part}",
        f"infllm:{part}+{4 * part}+{3 * part}",
        f"snapkv:{8 * part}",
        f"h2o:{share:g}+{share:g}",
    )
    window, quest, *_ = selections
    return [
        *(Way(format) for format in FORMATS),
        *(Way(selection=selection) for selection in selections),
        Way(prefill="xattention"),
        Way("int4", quest),
        Way("int8", window),
    ]


def named(all_ways: Iterable[Way], only: str | None) -> list[Way]:
    """Native full attention, and those of the others that `only` names: formats, selections without
    their numbers, or combinations with a plus, such as "int8,quest,int4+quest"; None for all."""
    each = {key(way): way for way in all_ways}
    if only is None:
        return list(each.values())
    wanted = [name.strip() for name in only.split(",")]
    if unknown := [name for name in wanted if name not in each]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(each)}.")
    return [way for name, way in each.items() if name in wanted or way == NATIVE]


def key(way: Way) -> str:
    """Its name without numbers."""
    parts = [part.partition(":")[0] for part in way.name.split(", ")]
    return "+".join(parts)


def bytes_read(spec: KVSpec, selection: Selection, prompt: int, context: int) -> float:
    """Of the KV cache, all layers together, by a token of an answer that sees `context` tokens,
    itself included, of which `prompt` are the prompt's."""
    config, size = spec.config, spec.block_size
    native = 2 * config.kv_size * spec.dtype.itemsize
    stored = token_bytes(spec)
    # The page at the end is not encoded yet.
    own = (context - 1) % size + 1 if spec.format.by_page else 0
    tokens = tokens_read(selection, size, prompt, context)
    dense = Quest.dense_layers if isinstance(selection, Quest) else 0

    def layer(read: int, notes: float) -> float:
        newest = min(own, read)
        return (read - newest) * stored + newest * native + notes

    chosen = layer(tokens, _notes_read(spec, selection, context) if tokens < context else 0)
    return dense * layer(context, 0) + (config.num_layers - dense) * chosen


def token_bytes(spec: KVSpec) -> float:
    """Keys and values of one token in one layer, as they lie in a full page."""
    names = spec.kind(spec.shape(None, spec.block_size)).stored
    return sum(spec.layout.section(name).nbytes for name in names) / spec.block_size


def tokens_read(selection: Selection, block_size: int, prompt: int, context: int) -> int:
    """By each kv head, where it does not read all; pages that are read as a whole count so."""
    match selection:
        case Window(sinks, recent):
            tokens = sinks + recent
        case Quest() as quest:
            tokens = quest.num_pages(block_size) * block_size
        case DoubleSparsity(budget):
            tokens = budget
        case InfLLM() as infllm:
            chosen = infllm.num_chosen(block_size) * block_size
            tokens = infllm.sinks + infllm.recent + chosen
        case SnapKV():
            tokens = selection.kept(prompt) + context - prompt
        case H2O():
            tokens = selection.kept(prompt) + 1
        case _:
            tokens = context
    return min(context, tokens)


def _notes_read(spec: KVSpec, selection: Selection, context: int) -> float:
    """Bytes of one layer that a choice is made by."""
    pages, key_bytes = context / spec.block_size, spec.config.kv_size * spec.dtype.itemsize
    match selection:
        case Quest():
            return 2 * pages * key_bytes
        case DoubleSparsity(label_share=share):
            return context * key_bytes / share
        case InfLLM(sinks, recent, representatives=count):
            return max(0, context - sinks - recent) / spec.block_size * count * key_bytes
    return 0


def read_share(spec: KVSpec, selection: Selection, prompt: int, contexts: Sequence[int]) -> float:
    """Bytes that tokens of an answer read, of what they read of native KV in full."""
    full = 2 * spec.config.kv_size * spec.dtype.itemsize * spec.config.num_layers * sum(contexts)
    return sum(bytes_read(spec, selection, prompt, context) for context in contexts) / full
