"""One small adapter of every format that is read, as PEFT or its authors write it."""

from __future__ import annotations

import copy
import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Adapter
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.reference import AdapterRef

HIDDEN = 36

# CPU seconds of one example, a thousand times what it takes.
PATIENCE = 5.0
# What the process may take above what it has.
ROOM = 2 << 30

MODULE = "model.layers.1.self_attn.q_proj"
TWO = {"target_modules": ["layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"]}
ONE = {"target_modules": ["layers.1.self_attn.q_proj"]}

# What PEFT is asked for; the first word is the type.
PEFT: Mapping[str, Mapping[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 9, **TWO},
    "BEFT": ONE,
    "BOFT": {"boft_block_size": 4, "boft_n_butterfly_factor": 1, **ONE},
    "C3A": {"block_size": 4, **TWO},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {"cpt_token_ids": [3, 1, 4]},
    "DEFT": {"r": 3, **ONE},
    "DEFT of orthonormal vectors": {"r": 3, "decomposition_method": "qr", "alpha": 5, **ONE},
    "DELORA": {"r": 3, "rank_pattern": {"down_proj": 2}, **TWO},
    "FOURIERFT": {"n_frequency": 30, **ONE},
    "FROD": {"progressbar": False, **ONE},
    "GLORA": {"r": 3, **ONE},
    "GLORA of columns": {"config_A_B": "vector", "config_C": "vector", **ONE},
    "GRALORA": {"r": 4, "gralora_k": 2, "hybrid_r": 3, **TWO},
    "HIRA": {"r": 3, **ONE},
    "HRA": {"r": 4, **ONE},
    "HRA of orthogonal vectors": {"r": 4, "apply_GS": True, **ONE},
    "IA3": {**TWO, "feedforward_modules": ["layers.1.mlp.down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LOHA": {"r": 3, "alpha_pattern": {"q_proj": 2}, **TWO},
    "LOKR": {"r": 3, **TWO},
    "LOKR of products": {"r": 1, "decompose_both": True, **ONE},
    "LORA": {"r": 3, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 2}, **TWO},
    "LORA of tokens": {"r": 2, "trainable_token_indices": [3, 5], **ONE},
    "LORA with a bias": {"r": 2, "lora_bias": True, "bias": "lora_only", **ONE},
    "LORA with saved modules": {"r": 2, "modules_to_save": ["norm"], **ONE},
    "LORA in blocks": {
        "r": 4,
        "use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": [], "nblocks": 2},
        **ONE,
    },
    "LORA that is activated": {"r": 2, "alora_invocation_tokens": [3, 5], **ONE},
    "LORA of DoRA": {"r": 2, "use_dora": True, **ONE},
    "LORA of KaSA": {"r": 2, "kasa_config": {}, **ONE},
    "MISS": {"r": 4, **TWO},
    "MISS mini": {"r": 4, "mini_r": 2, "init_weights": "mini", **ONE},
    "MISS bat": {"r": 4, "init_weights": "bat", **ONE},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 1, "num_ranks": 2},
    "OFT": {"oft_block_size": 4, **ONE},
    "OFT with the inverse": {"oft_block_size": 4, "use_cayley_neumann": False, "coft": True, **ONE},
    "OSF": {"effective_rank": 9, **ONE},
    "PEANUT": {"r": 3, "depth": 1, **ONE},
    "POLY": {"r": 4, "n_tasks": 1, "n_skills": 2, "n_splits": 2, **ONE},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PSOFT": {"r": 4, **ONE},
    "PSOFT by iteration": {
        "r": 4,
        "psoft_svd": "lowrank",
        "use_cayley_neumann": True,
        "cayley_neumann_eps": 0.5,
        **ONE,
    },
    "PVERA": {"r": 6, **TWO},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "RANDLORA": {"r": 6, **ONE},
    "RANDLORA of a seed": {"r": 6, "save_projection": False, "sparse": True, **ONE},
    "ROAD": {"group_size": 4, **TWO},
    "SHIRA": {"r": 1, **ONE},
    "SUPERTUNING": {"sparsity": 0.9, **ONE},
    "SUPERTUNING of a LoRA": {"r": 2, "save_precomputed_indices": False, "sparsity": 0.9, **ONE},
    "TINYLORA": {"r": 2, "u": 4, **TWO},
    "TINYLORA of a seed": {"r": 2, "u": 4, "save_projection": False, **TWO},
    "TRAINABLE_TOKENS": {"token_indices": [2, 7, 21]},
    "UNILORA": {"r": 2, "save_indices": True, "theta_d_length": 9, **TWO},
    "UNILORA of a seed": {"r": 2, "theta_d_length": 9, **TWO},
    "VBLORA": {"r": 4, "num_vectors": 8, "vector_length": 4, **ONE},
    "VBLORA of chosen vectors": {
        "r": 4,
        "num_vectors": 8,
        "vector_length": 4,
        "save_only_topk_weights": True,
        **ONE,
    },
    "VERA": {"r": 6, **TWO},
    "VERA of a seed": {"r": 6, "save_projection": False, **TWO},
    "WAVEFT": {"n_frequency": 30, **ONE},
    "WAVEFT without wavelets": {"n_frequency": 30, "use_idwt": False, **ONE},
}


def of_others() -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Config and tensors of the module's parameters, where PEFT has no such type."""
    a, b = torch.randn(3, HIDDEN), torch.randn(HIDDEN, 3)
    lora = {"r": 3, "lora_alpha": 6}
    latent = {"default_lora_latent_mapping.weight": torch.randn(3, 3)}
    svd = {"n_iter": 3, "random_state": 1}
    return {
        "BITDELTA": (
            {},
            {
                "bitdelta_bits": torch.randint(256, (HIDDEN, 5), dtype=torch.uint8),
                "bitdelta_scale": torch.tensor([0.1]),
                "bitdelta_bias": torch.randn(HIDDEN),
            },
        ),
        "BITFIT": ({"bias": "all"}, {"bias": torch.randn(HIDDEN)}),
        "BONE": ({"r": 4}, {"bone_block": torch.randn(4, HIDDEN)}),
        "DYLORA": (
            {**lora, "polydelta_rank": 2},
            {"lora_A.weight": a, "lora_B.weight": b},
        ),
        "FLYLORA": ({"r": 3, "k": 2, "alpha": 6}, {"A": a, "B": b, "d": torch.randn(3)}),
        "LORA_SB": (lora, {"lora_A.weight": a, "lora_B.weight": b, **latent}),
        "LORA_XS": ({**lora, "reconstruct_config": {"svd": svd}}, latent),
        "PACA": (
            {"r": 3, "paca_alpha": 6},
            {"paca_indices": torch.tensor([3, 0, 9]), "paca_w": b},
        ),
        "S2FT": ({}, {"s2ft_indices": torch.tensor([3, 0, 9]), "s2ft_rows": a}),
        "SFT": (
            {},
            {
                "sft_indices": torch.tensor([[0, 1, 1], [4, 3, 2]], dtype=torch.int32),
                "sft_values": torch.randn(3),
                "sft_bias": torch.randn(HIDDEN),
            },
        ),
        "SORA": (lora, {"lora_A": a, "lora_B": b, "gate": torch.randn(1, 3)}),
    }


@dataclass(frozen=True)
class Sound:
    """An adapter that is read."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


@pytest.fixture(scope="package")
def hostile_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=52,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        vocab_size=40,
        attention_bias=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="package")
def sound_adapters(
    hostile_model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Sound]:
    """By the names of `PEFT`, and the types of the others."""
    root = tmp_path_factory.mktemp("sound")
    torch.manual_seed(1)
    found: dict[str, Sound] = {}
    for number, (name, options) in enumerate(PEFT.items()):
        folder = root / str(number)
        config = PEFT_TYPE_TO_CONFIG_MAPPING[name.split()[0]](task_type="CAUSAL_LM", **options)
        peft = get_peft_model(copy.deepcopy(hostile_model), config)
        with torch.no_grad():
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        peft.save_pretrained(folder, save_embedding_layers=False)
        written = json.loads((folder / "adapter_config.json").read_text())
        found[name] = Sound(
            {key: value for key, value in written.items() if value is not None},
            load_file(folder / "adapter_model.safetensors"),
        )
    for name, (own, tensors) in of_others().items():
        prefixed = {f"base_model.model.{MODULE}.{key}": value for key, value in tensors.items()}
        found[name] = Sound({"peft_type": name, **own}, prefixed)
    return found


@pytest.fixture
def hostile_layout(
    hostile_model: LlamaForCausalLM, layout_of: Callable[[LlamaForCausalLM], BaseLayout]
) -> BaseLayout:
    return layout_of(hostile_model)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Mapping[str, Any], Mapping[str, Tensor]], Path]:
    """A folder with this adapter, over the one before."""

    def write(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(stored, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return write


@pytest.fixture
def read(
    write: Callable[[Mapping[str, Any], Mapping[str, Tensor]], Path], hostile_layout: BaseLayout
) -> Callable[[Mapping[str, Any], Mapping[str, Tensor]], Adapter]:
    return lambda config, tensors: read_adapter(
        AdapterRef("hostile", 1, write(config, tensors)), hostile_layout
    )


@contextmanager
def limited_time() -> Iterator[None]:
    def give_up(signum: int, frame: object) -> None:
        raise TimeoutError("The adapter took too long.")

    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@pytest.fixture
def patience() -> Callable[[], AbstractContextManager[None]]:
    """Ends what takes too long: of CPU time, so that a busy machine changes nothing."""
    return limited_time


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What does not fit raises, as torch has it, a RuntimeError."""
    if sys.platform != "linux":
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
