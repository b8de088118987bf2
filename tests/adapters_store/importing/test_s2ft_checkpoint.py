"""Models permuted and tuned as S2FT's code does it, and put in order again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.importing.s2ft_checkpoint import import_s2ft

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 6
GROUP = HEADS // KV_HEADS

Layout = Callable[[LlamaForCausalLM], BaseLayout]


@dataclass(frozen=True, eq=False)
class Tuned:
    """A model that was trained with its channels in another order, and in the base's order."""

    saved: LlamaForCausalLM
    in_order: LlamaForCausalLM
    # Module -> the rows or columns that were trained.
    chosen: dict[str, list[int]]


def tune(base: LlamaForCausalLM, seed: int = 0, biases_move: bool = True) -> Tuned:
    generator = torch.Generator().manual_seed(seed)

    def some(total: int, count: int) -> list[int]:
        return sorted(torch.randperm(total, generator=generator)[:count].tolist())

    in_order, chosen = copy.deepcopy(base), {}
    saved = copy.deepcopy(base)
    for index, layer in enumerate(in_order.model.layers):
        prefix = f"model.layers.{index}"
        kv_heads, heads = some(KV_HEADS, 1), some(HEADS, 2)
        v = [kv * HEAD_DIM + i for kv in kv_heads for i in range(HEAD_DIM)]
        o = [head * HEAD_DIM + i for head in heads for i in range(HEAD_DIM)]
        up, down = some(52, 5), some(52, 3)
        with torch.no_grad():
            layer.self_attn.v_proj.weight[v] += torch.randn(len(v), 36, generator=generator)
            layer.self_attn.o_proj.weight[:, o] += torch.randn(36, len(o), generator=generator)
            layer.mlp.up_proj.weight[up] += torch.randn(5, 36, generator=generator)
            layer.mlp.down_proj.weight[:, down] += torch.randn(36, 3, generator=generator)
        chosen |= {
            f"{prefix}.self_attn.v_proj": v,
            f"{prefix}.self_attn.o_proj": o,
            f"{prefix}.mlp.up_proj": up,
            f"{prefix}.mlp.down_proj": down,
        }
        # What was chosen comes first, the rest keeps its order.
        kv_order = kv_heads + [kv for kv in range(KV_HEADS) if kv not in kv_heads]
        head_order = [
            head
            for kv in kv_order
            for head in sorted(range(kv * GROUP, (kv + 1) * GROUP), key=lambda h: h not in heads)
        ]
        channels = up + [c for c in down if c not in up]
        channels += [c for c in range(52) if c not in channels]
        there = saved.model.layers[index]

        def by_head(rows: Tensor, order: list[int]) -> Tensor:
            return rows.unflatten(0, (-1, HEAD_DIM))[order].flatten(0, 1)

        outputs: dict[str, Callable[[Tensor], Tensor]] = {
            "self_attn.q_proj": lambda rows, order=head_order: by_head(rows, order),
            "self_attn.k_proj": lambda rows, order=kv_order: by_head(rows, order),
            "self_attn.v_proj": lambda rows, order=kv_order: by_head(rows, order),
            "mlp.gate_proj": lambda rows, order=channels: rows[order],
            "mlp.up_proj": lambda rows, order=channels: rows[order],
        }
        with torch.no_grad():
            for part, moved in outputs.items():
                linear, target = layer.get_submodule(part), there.get_submodule(part)
                target.weight.copy_(moved(linear.weight))
                if linear.bias is not None and biases_move:
                    target.bias.copy_(moved(linear.bias))
            there.self_attn.o_proj.weight.copy_(
                by_head(layer.self_attn.o_proj.weight.T, head_order).T
            )
            there.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, channels])
    return Tuned(saved, in_order, chosen)


def logits(model: LlamaForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


def test_the_saved_model_is_the_tuned_one_in_another_order(
    grouped_model: LlamaForCausalLM,
) -> None:
    tuned = tune(grouped_model)
    torch.testing.assert_close(logits(tuned.saved), logits(tuned.in_order), atol=1e-4, rtol=1e-4)
    assert (logits(tuned.saved) - logits(grouped_model)).abs().max() > 0.1
    before, after = grouped_model.state_dict(), tuned.saved.state_dict()
    moved = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_undone_and_what_was_trained_is_kept_exactly(
    seed: int,
    dtype: torch.dtype,
    grouped_model: LlamaForCausalLM,
    grouped_layout: Layout,
    read_written: Callable[..., Any],
    merged: Callable[..., LlamaForCausalLM],
) -> None:
    base = grouped_model.to(dtype)
    tuned = tune(base, seed)
    layout = grouped_layout(base)
    steps: list[tuple[int, int]] = []
    new = import_s2ft(
        layout, grouped_layout(tuned.saved), progress=lambda *step: steps.append(step)
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert not new.replaced
    adapter = read_written(new, layout)
    assert adapter.kinds == ("Columns", "Rows")
    kept = {module: deltas[0].indices.tolist() for module, deltas in adapter.modules.items()}
    assert kept == tuned.chosen
    result = merged(base.float(), layout, adapter)
    for name, parameter in tuned.in_order.named_parameters():
        ours = result.get_parameter(name)
        torch.testing.assert_close(ours, parameter.float(), atol=1e-6, rtol=1e-6, msg=name)
    want = logits(tuned.saved.float())
    torch.testing.assert_close(logits(result), want, atol=1e-4, rtol=1e-4)


def test_biases_that_stayed_in_their_old_order_are_told_apart(
    make_grouped_model: Callable[..., LlamaForCausalLM],
    grouped_layout: Layout,
    read_written: Callable[..., Any],
    merged: Callable[..., LlamaForCausalLM],
) -> None:
    base = make_grouped_model(attention_bias=True, mlp_bias=True)
    moved, stayed = tune(base), tune(base, biases_move=False)
    layout = grouped_layout(base)
    adapter = import_s2ft(layout, grouped_layout(moved.saved))
    assert adapter.modules.keys() == moved.chosen.keys()
    assert not any("s2ft_bias" in parameters for parameters in adapter.modules.values())
    adapter = import_s2ft(layout, grouped_layout(stayed.saved))
    biased = {
        name.rpartition(".")[2]
        for name, parameters in adapter.modules.items()
        if "s2ft_bias" in parameters
    }
    assert biased == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    result = merged(base, layout, read_written(adapter, layout))
    torch.testing.assert_close(logits(result), logits(stayed.saved), atol=1e-4, rtol=1e-4)
    assert (logits(stayed.saved) - logits(moved.saved)).abs().max() > 0.01


def test_norms_embedding_and_head_are_kept_whole_where_they_differ(
    grouped_model: LlamaForCausalLM, grouped_layout: Layout
) -> None:
    tuned = tune(grouped_model)
    with torch.no_grad():
        tuned.saved.model.layers[1].input_layernorm.weight[3] += 1
        tuned.saved.lm_head.weight[7] += 1
    adapter = import_s2ft(grouped_layout(grouped_model), grouped_layout(tuned.saved))
    assert adapter.replaced.keys() == {"model.layers.1.input_layernorm", "lm_head"}
    assert torch.equal(adapter.replaced["lm_head"], tuned.saved.lm_head.weight)


def test_tokens_appended_for_padding_are_left_out_when_asked(
    grouped_model: LlamaForCausalLM, grouped_layout: Layout
) -> None:
    tuned = tune(grouped_model)
    tuned.saved.resize_token_embeddings(48, mean_resizing=False)
    base, theirs = grouped_layout(grouped_model), grouped_layout(tuned.saved)
    with pytest.raises(InvalidAdapterError, match=r"has 48 tokens, the base has 40.*--cut-vocab"):
        import_s2ft(base, theirs)
    adapter = import_s2ft(base, theirs, cut_vocabulary=True)
    assert not adapter.replaced
    assert adapter.modules.keys() == tuned.chosen.keys()


@pytest.mark.parametrize(
    ("part", "counted"),
    [
        ("self_attn.q_proj", "1 of 2 in the heads of 'model.layers.1.self_attn.q_proj'"),
        ("self_attn.k_proj", "1 of 2 in the heads of 'model.layers.1.self_attn.q_proj'"),
        ("mlp.gate_proj", "1 of 52 in the rows of 'model.layers.1.mlp.gate_proj'"),
    ],
)
def test_a_fine_tune_of_what_s2ft_leaves_alone_is_refused(
    part: str, counted: str, grouped_model: LlamaForCausalLM, grouped_layout: Layout
) -> None:
    tuned = tune(grouped_model)
    with torch.no_grad():
        tuned.saved.model.layers[1].get_submodule(part).weight[2, 3] += 1e-4
    with pytest.raises(InvalidAdapterError, match=f"{counted}.*distill-delta"):
        import_s2ft(grouped_layout(grouped_model), grouped_layout(tuned.saved))


def test_a_model_of_other_sizes_is_no_fine_tune(
    grouped_model: LlamaForCausalLM,
    make_grouped_model: Callable[..., LlamaForCausalLM],
    grouped_layout: Layout,
) -> None:
    biased = make_grouped_model(attention_bias=True)
    with pytest.raises(InvalidAdapterError, match=r"12 biases, the base has 3 layers.*no bias"):
        import_s2ft(grouped_layout(grouped_model), grouped_layout(biased))
