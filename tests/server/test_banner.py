"""What `polydelta serve` says of itself when it is ready."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from polydelta.engine.kv_setup import KVSetup
from polydelta.engine.stats import EngineStats
from polydelta.kernels.kv_selection import parse_prefill, parse_selection
from polydelta.server.cli_serve import print_banner
from polydelta.server.settings import load_settings


def banner(
    setup: KVSetup | None = None, served_len: int = 8192, **options: str | int | None
) -> str:
    """served_len: tokens that the engine serves at most, of the 8,192 that the model knows."""
    engine = SimpleNamespace(
        device="cpu",
        pool_bytes=2 << 30,
        kv_setup=setup or KVSetup(),
        max_model_len=served_len,
        context_length=8192,
        stats=lambda: EngineStats(kv_tokens=12345),
    )
    store = SimpleNamespace(ids=lambda: iter(["some", "others"]))
    console = Console(file=io.StringIO(), width=160)
    print_banner(console, "http://here", "base", store, engine, load_settings(**options))  # type: ignore[arg-type]
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_it_says_how_kv_is_kept_and_how_much_has_room() -> None:
    out = banner(KVSetup("int8", parse_selection("window")), kv_format="int8", kv_select="window")
    assert "int8, window:4+512: room for 12,345 tokens" in out
    assert "2 (some, others)" in out
    setup = KVSetup(prefill=parse_prefill("xattention"))
    out = banner(setup, prefill="xattention")
    assert "native, full, prefill xattention:8+0.9: room" in out


@pytest.mark.parametrize(
    ("served_len", "asked", "said"),
    [
        (8192, None, "8,192 tokens at most"),
        (100, 100, "100 tokens at most"),
        (176, None, "176 tokens at most, half of what the pool holds (the model's: 8,192)"),
    ],
)
def test_a_context_that_the_pool_shortens_is_told(
    served_len: int, asked: int | None, said: str
) -> None:
    out = banner(served_len=served_len, max_model_len=asked)
    lines = [line.strip("│ ").strip() for line in out.splitlines()]
    assert f"context   {said}" in lines
