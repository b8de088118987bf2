"""`polydelta generate`: one answer on the terminal, without a server."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from polydelta.engine.request import (
    FinishReason,
    GenerationRequest,
    RequestOutput,
    SamplingParams,
)
from polydelta.server import options
from polydelta.server.loading import load_engine
from polydelta.server.settings import ServerSettings, load_settings
from polydelta.server.stores import disk_tier, open_store

if TYPE_CHECKING:  # the engine imports torch, which takes seconds
    from polydelta.adapters_store.composition import Shares
    from polydelta.engine.build import MakeLoader
    from polydelta.engine.engine import Engine

REQUEST_ID = "generate"


class GenerateError(Exception):
    """The prompt could not be answered; the message says why."""


def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer.")],
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", help="Adapter id or id@version.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="0 takes the likeliest token each time.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="A user's message, or text to continue as it is.")
    ] = True,
    model: options.Model = None,
    adapters: options.Adapters = None,
    store: options.Store = None,
    device: options.Device = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = None,
    dtype: options.Dtype = None,
    quantization: options.Quantization = None,
    pool: options.Pool = None,
    adapter_bits: options.AdapterBits = None,
    kv_format: options.KvFormat = None,
    kv_select: options.KvSelect = None,
    prefill: options.Prefill = None,
    kv_labels: options.KvLabels = None,
    host_kv_gib: options.HostKvGib = None,
) -> None:
    """Answer one prompt and leave; tokens are printed as they come.

    [bold]Examples[/bold]

    [cyan]polydelta generate "What is the capital of France?"[/cyan]
    the default model, as a chat

    [cyan]polydelta generate "the 3rd of May 2021" --adapter iso-date[/cyan]
    the same, changed by an adapter

    [cyan]polydelta generate --raw "Once upon a time" --temperature 0.8 --seed 1[/cyan]
    text continued as it stands
    """
    settings = load_settings(
        model=model,
        adapters=adapters,
        store=store,
        device=device,
        gpu_memory_utilization=gpu_memory_utilization,
        dtype=dtype,
        quantization=quantization,
        pool=pool,
        adapter_bits=adapter_bits,
        kv_format=kv_format,
        kv_select=kv_select,
        prefill=prefill,
        kv_labels=kv_labels,
        host_kv_gib=host_kv_gib,
    )
    console = Console(stderr=True)
    # The name first: a wrong one should not cost the wait for the model.
    with _leased(adapter, settings) as (make_loader, shares):
        engine = load_engine(settings, console, make_loader)
        token_ids = _encode(engine, prompt, chat)
        limit = min(max_tokens, engine.max_model_len - len(token_ids))
        sampling = SamplingParams(max_tokens=limit, temperature=temperature, seed=seed)
        request = GenerationRequest(REQUEST_ID, token_ids, sampling, shares)
        outputs: SimpleQueue[RequestOutput] = SimpleQueue()
        engine.start()
        try:
            started = time.monotonic()
            engine.submit(request, outputs.put)
            count = _print_all(outputs)
            seconds = time.monotonic() - started
        finally:
            engine.shutdown()
    console.print(f"[dim]{count} tokens, {count / seconds:.1f} a second[/dim]")


@contextmanager
def _leased(adapter: str | None, settings: ServerSettings) -> Iterator[tuple[MakeLoader, Shares]]:
    """What the engine loads adapters with, and those that it computes. For the base model alone the
    store is not opened: that makes its folder, which may be impossible here."""
    if adapter is None:
        from polydelta.adapters_store.disk_tier import FolderLoader

        yield FolderLoader, ()
        return
    with closing(open_store(settings)) as opened, opened.lease([(adapter, 1.0)]) as lease:
        yield disk_tier(opened, settings), lease.shares


def _encode(engine: Engine, prompt: str, chat: bool) -> list[int]:
    """Raises GenerateError for a prompt that cannot be answered."""
    try:
        if chat:
            token_ids = engine.tokenizer.chat([{"role": "user", "content": prompt}])
        else:
            token_ids = engine.tokenizer.encode(prompt)
    except ValueError as error:
        raise GenerateError(f"{error} Try --raw.") from None
    if not 0 < len(token_ids) < engine.max_model_len:
        raise GenerateError(
            f"The prompt has {len(token_ids)} tokens; it must have one at least, and leave room"
            f" in the context window of {engine.max_model_len}."
        )
    return token_ids


def _print_all(outputs: SimpleQueue[RequestOutput]) -> int:
    """Prints text until the request has finished; the number of tokens. Raises GenerateError."""
    count = 0
    while True:
        output = outputs.get()
        sys.stdout.write(output.text)
        sys.stdout.flush()
        count += len(output.token_ids)
        if output.finish_reason is FinishReason.ERROR:
            raise GenerateError(output.error.message if output.error else "The engine failed.")
        if output.finished:
            sys.stdout.write("\n")
            return count
