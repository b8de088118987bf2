"""PEFT's mixed-batch generation over transformers, as a side of `vs_peft`, and adapters for all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GgufConfig

from polydelta.engine.models.checkpoint import default_model


def load_reference() -> Any:
    """The default model in bfloat16."""
    path = default_model()
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.bfloat16,
        # Without it transformers multiplies with packed 4-bit weights, slowly.
        quantization_config=GgufConfig(dequantize=True),
    ).eval()


def write_adapters(folder: Path, ranks: Sequence[int]) -> list[str]:
    """Saves random adapters with PEFT, on every linear layer, B not zero; their names."""
    names = []
    base = load_reference()
    for number, rank in enumerate(ranks):
        torch.manual_seed(number)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        model = get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01 / rank**0.5)
        names.append(f"adapter-{number:02d}")
        model.save_pretrained(str(folder / names[-1]))
        base = model.unload()
    return names


class PeftSide:
    """PEFT's mixed-batch generation; without adapters the bare transformers model."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.bare = load_reference()
        # Without it PEFT fills every adapter with random numbers first.
        quick: Any = {"low_cpu_mem_usage": True}
        self.mixed: Any = PeftModel.from_pretrained(
            load_reference(), folder / names[0], adapter_name=names[0], **quick
        )
        for name in names[1:]:
            self.mixed.load_adapter(folder / name, adapter_name=name, **quick)
        self.mixed.eval()

    @torch.inference_mode()
    def run(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str | None], new_tokens: int
    ) -> list[list[int]]:
        """New tokens of each prompt."""
        model: Any = self.mixed if any(names) else self.bare
        mixed = {"adapter_names": list(names)} if any(names) else {}
        ids = torch.tensor(prompts)
        tokens = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            **mixed,
        )
        new: list[list[int]] = tokens[:, ids.shape[1] :].tolist()
        return new
