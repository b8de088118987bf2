from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.registry import format_of

PREFIX = "base_model.model."
SHAPES = {
    "model.layers.0.self_attn.v_proj": (12, 36),
    "model.layers.1.mlp.gate_proj": (52, 36),
    "model.layers.2.mlp.down_proj": (36, 52),
}
V0, GATE1, DOWN2 = SHAPES
RANK, ALPHA = 5, 8
CONFIG = {"peft_type": "SORA", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.1}

GATES = {
    V0: [[0.0, -1.5, 0.0, 0.25, 0.0]],
    GATE1: [[1.0, 2.0, -3.0, 0.5, 1e-3]],
    DOWN2: [[0.0, 0.0, -0.0, 0.0, 7.0]],
}


def gated(gates: dict[str, list[list[float]]]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for module, gate in gates.items():
        out_features, in_features = SHAPES[module]
        tensors |= {
            f"{PREFIX}{module}.lora_A": torch.randn(RANK, in_features),
            f"{PREFIX}{module}.lora_B": torch.randn(out_features, RANK),
            f"{PREFIX}{module}.gate": torch.tensor(gate),
        }
    return tensors


def read(config: dict[str, Any], tensors: dict[str, Tensor], layout: BaseLayout) -> dict[str, Any]:
    _, parser = format_of(config)
    return dict(parser.read(config, tensors, layout))


def test_open_ranks_compute_what_the_gated_layer_computes(layout: BaseLayout) -> None:
    tensors = gated(GATES)
    deltas = read(CONFIG, tensors, layout)
    assert {module: delta.rank for module, (delta,) in deltas.items()} == {
        V0: 2,
        GATE1: 5,
        DOWN2: 1,
    }
    for module, (delta,) in deltas.items():
        assert isinstance(delta, LowRank)
        a, b, gate = (tensors[f"{PREFIX}{module}.{name}"] for name in ("lora_A", "lora_B", "gate"))
        x = torch.randn(6, SHAPES[module][1])
        want = ((x @ a.T).mul(gate) @ b.T) * (ALPHA / RANK)
        torch.testing.assert_close(x @ delta.dense().T, want, atol=1e-4, rtol=1e-4)


def test_a_module_whose_gates_are_all_closed_is_left_out(layout: BaseLayout) -> None:
    tensors = gated(GATES | {V0: [[0.0] * RANK]})
    assert read(CONFIG, tensors, layout).keys() == {GATE1, DOWN2}


def test_an_adapter_whose_gates_are_all_closed_is_refused(layout: BaseLayout) -> None:
    tensors = gated({V0: [[0.0] * RANK], GATE1: [[0.0] * RANK]})
    with pytest.raises(InvalidAdapterError, match="All gates of the adapter's 2 modules are 0"):
        read(CONFIG, tensors, layout)


def test_its_outline_has_the_rank_before_gates_close() -> None:
    _, parser = format_of(CONFIG)
    shapes = {name: tuple(tensor.shape) for name, tensor in gated(GATES).items()}
    outline = parser.outline(CONFIG, shapes)
    assert outline.keys() == GATES.keys()
    assert {(part.kind, part.rank) for part in outline.values()} == {(LowRank.kind, RANK)}


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "another rank": ({"r": 4}, {}, r"but rank 4 \(r in adapter_config.json\)"),
    "no rank": ({"r": None}, {}, "r is None"),
    "rank-stabilised scales": ({"use_rslora": True}, {}, "use_rslora is True"),
    "a gate without its axis": ({}, {"gate": torch.ones(RANK)}, r"\[5\], but rank 5"),
    "a gate of another rank": ({}, {"gate": torch.ones(1, 6)}, r"\[1, 6\], but rank 5"),
    "an infinite gate": ({}, {"gate": torch.full((1, RANK), torch.inf)}, "gate' has NaN or inf"),
    "an A of another layer": ({}, {"lora_A": torch.ones(RANK, 35)}, "base model's layer asks"),
    "a B of another layer": ({}, {"lora_B": torch.ones(13, RANK)}, "base model's layer asks"),
    "a foreign tensor": ({}, {"lora_C": torch.ones(1)}, "lora_C' cannot be served"),
    "PEFT's own names": ({}, {"lora_A.weight": torch.ones(1)}, "lora_A.weight' cannot be"),
}


@pytest.mark.parametrize(("option", "changed", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_served_is_refused_by_name(
    option: dict[str, Any], changed: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    tensors = gated({V0: GATES[V0]})
    tensors |= {f"{PREFIX}{V0}.{parameter}": tensor for parameter, tensor in changed.items()}
    with pytest.raises(InvalidAdapterError, match=message):
        read(CONFIG | option, tensors, layout)
