"""The tables of `kv_quality.py`."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from benchmarks.kv_measuring import Outcome
from benchmarks.kv_ways import NATIVE


def cost_table(model: str, outcomes: Sequence[Outcome], judged: bool) -> Table:
    """What each way costs. outcomes: native full attention first; judged: whether there was enough
    to read for a bar."""
    native = outcomes[0]
    title = f"{model}: perplexity of native full attention {native.perplexity:.4f}"
    columns = ("bytes", "page", "read", "windows", "perplexity", "±", "bar", "KL", "same")
    table = _table(title, columns)
    for one in outcomes:
        cost, error = one.cost(native)
        table.add_row(
            one.way.name,
            f"{one.token_bytes:,.0f}",
            f"{one.page_tokens}",
            f"{one.read_share:.0%}",
            f"{len(one.losses)}",
            "" if one.way == NATIVE else f"{cost:+.2%}",
            "" if one.way == NATIVE or error is None else f"{error:.2%}",
            _judged(one, native) if judged else "",
            f"{one.divergence / one.compared:.4f}",
            f"{one.same / one.compared:.1%}",
        )
    table.caption = (
        "bytes: of a token in the pool; page: tokens of one; read: KV bytes by an answer's token, "
        "of native in full; ±: one standard error, from window to window; KL: nats; same: most "
        "likely next token"
    )
    return table


def retrieval_table(model: str, outcomes: Sequence[Outcome]) -> Table:
    """Digits found, by task and length of the text."""
    found = list(outcomes[0].scores)
    columns = [f"{task.split('-')[0]}\n{length}" for task, length in found]
    table = _table(f"{model}: digits of hidden keys found again, %", columns)
    for one in outcomes:
        shares = (one.scores[each].digits_share for each in found)
        table.add_row(one.way.name, *(f"{100 * share:.0f}" for share in shares))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _judged(one: Outcome, native: Outcome) -> str:
    if one.bar is None:
        return ""
    met = one.met(native)
    return f"[{'green' if met else 'red'}]{one.bar:.1%} {'met' if met else 'missed'}[/]"
