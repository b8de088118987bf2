"""Applied unmerged from the pool, deltas of every kind give what a model with the merged weights
gives; alone, several in a layer, and beside others in a step. float32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from polydelta.adapters_store.base_layout import EMBEDDING, FINAL_NORM, HEAD, BaseLayout
from polydelta.adapters_store.delta import (
    Adapter,
    Bias,
    Circulant,
    Columns,
    Delta,
    Kronecker,
    LowRank,
    NormWeight,
    OneBit,
    Rotate,
    Rows,
    Scale,
    Side,
    Sparse,
    TokenRows,
)
from polydelta.adapters_store.merged_weight import merge_into

TOLERANCE = 1e-3
VOCAB = 211
Shape = tuple[int, int]


def low_rank(shape: Shape, rank: int = 5) -> LowRank:
    return LowRank(torch.randn(rank, shape[1]) * 0.2, torch.randn(shape[0], rank) * 0.2)


def sparse(shape: Shape) -> Sparse:
    dense = torch.randn(shape) * (torch.rand(shape) < 0.05)
    csr = dense.to_sparse_csr()
    return Sparse(shape, csr.crow_indices().int(), csr.col_indices().int(), csr.values())


def columns(shape: Shape) -> Columns:
    indices = torch.randperm(shape[1])[:7].sort().values.int()
    return Columns(shape[1], indices, torch.randn(shape[0], 7) * 0.2)


def rows(shape: Shape) -> Rows:
    indices = torch.randperm(shape[0])[:5].sort().values.int()
    return Rows(shape[0], indices, torch.randn(5, shape[1]) * 0.2)


def one_bit(shape: Shape) -> OneBit:
    bits = torch.randint(0, 256, (shape[0], -(-shape[1] // 8)), dtype=torch.uint8)
    return OneBit(shape[1], bits, 0.07)


def kronecker(shape: Shape) -> Kronecker:
    return Kronecker(torch.randn(4, 2) * 0.2, torch.randn(shape[0] // 4, shape[1] // 2) * 0.2)


def circulant(shape: Shape) -> Circulant:
    return Circulant(torch.randn(shape[0] // 4, shape[1] // 4, 4) * 0.1)


def output_scale(shape: Shape) -> Scale:
    return Scale(1 + 0.3 * torch.randn(shape[0]), Side.OUTPUT)


def input_scale(shape: Shape) -> Scale:
    return Scale(1 + 0.3 * torch.randn(shape[1]), Side.INPUT)


def rotate(shape: Shape) -> Rotate:
    partner = torch.arange(shape[0]).view(-1, 2, 2).flip(1).flatten().int()
    return Rotate(1 + 0.2 * torch.randn(shape[0]), 0.3 * torch.randn(shape[0]), partner)


def bias(shape: Shape) -> Bias:
    return Bias(0.3 * torch.randn(shape[0]))


MAKERS: dict[str, Callable[[Shape], Delta]] = {
    make.__name__: make
    for make in (
        low_rank, sparse, columns, rows, one_bit, kronecker, circulant, output_scale, input_scale,
        rotate, bias,
    )
}  # fmt: skip


@pytest.fixture(scope="module", params=["no-biases-tied", "biases-untied"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    torch.manual_seed(5)
    biased = request.param == "biases-untied"
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=60, intermediate_size=92, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=12, max_position_embeddings=512,
        tie_word_embeddings=not biased, attention_bias=biased, mlp_bias=biased,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model


def on_all_linears(layout: BaseLayout, *makers: Callable[[Shape], Delta]) -> Adapter:
    torch.manual_seed(len(makers))
    modules = {
        name: tuple(make(shape) for make in makers) for name, shape in layout.module_shapes.items()
    }
    return Adapter("id", 1, "", "TEST", modules)


def merged(base: LlamaForCausalLM, layout: BaseLayout, adapter: Adapter) -> LlamaForCausalLM:
    """transformers' model with the adapter in its weights."""
    model = copy.deepcopy(base)
    model.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.clone())
    with torch.no_grad():
        for name, deltas in adapter.modules.items():
            module = model.get_submodule(name)
            if name in (EMBEDDING, HEAD):
                set_rows(module.weight, deltas)
            linear = [delta for delta in deltas if not isinstance(delta, TokenRows)]
            if name in layout.module_shapes or name == HEAD:
                weight, own = merge_into(module.weight.clone(), layout.bias(name), linear)
                module.weight.copy_(weight)
                module.bias = None if own is None else torch.nn.Parameter(own)
            elif name == EMBEDDING:
                weight, _ = merge_into(module.weight.T.clone(), None, linear)
                module.weight = torch.nn.Parameter(weight.T.contiguous())
            else:
                (norm,) = deltas
                assert isinstance(norm, NormWeight)
                module.weight.copy_(norm.weight)
    return model


def set_rows(weight: Tensor, deltas: Sequence[Delta]) -> None:
    for delta in deltas:
        if isinstance(delta, TokenRows):
            weight[delta.ids] = delta.rows


def check(
    paged: Callable, model: LlamaForCausalLM, adapter: Adapter, scattered: bool = False
) -> None:
    decoder = paged(model)
    loaded = decoder.load_adapter(adapter, scattered)
    tokens = torch.randint(0, VOCAB, (21,)).tolist()
    got = torch.cat(
        [decoder.feed((0, tokens[a:b], loaded))[0] for a, b in [(0, 17), (17, 20), (20, 21)]]
    )
    with torch.inference_mode():
        want = merged(model, decoder.layout, adapter)(torch.tensor([tokens])).logits[0]
        base = model(torch.tensor([tokens])).logits[0]
    assert (want - base).abs().max() > 0.05, "the adapter does nothing"
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("scattered", [False, True], ids=["in-one-run", "scattered-pages"])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_kind_on_all_linear_layers_equals_the_merged_weights(
    kind: str, scattered: bool, model: LlamaForCausalLM, paged: Callable
) -> None:
    check(paged, model, on_all_linears(paged(model).layout, MAKERS[kind]), scattered)


def test_all_kinds_in_one_layer_equal_the_merged_weights(
    model: LlamaForCausalLM, paged: Callable
) -> None:
    makers = [make for name, make in MAKERS.items() if name != "input_scale"]
    check(paged, model, on_all_linears(paged(model).layout, *makers, low_rank, rows))


def random_rows(ids: Sequence[int]) -> TokenRows:
    return TokenRows(torch.tensor(ids), 0.3 * torch.randn(len(ids), 60))


BY_TOKEN: Mapping[str, Callable[[], Mapping[str, tuple[Delta, ...]]]] = {
    "rows of the embedding": lambda: {EMBEDDING: (random_rows(range(0, VOCAB, 2)),)},
    "all rows of the head": lambda: {HEAD: (random_rows(range(VOCAB)),)},
    "a few rows of both": lambda: {
        EMBEDDING: (random_rows([3, 5, 210]),),
        HEAD: (random_rows([0, 5, 6, 209]),),
    },
    "low-rank embedding and head": lambda: {
        EMBEDDING: (low_rank((60, VOCAB)),),
        HEAD: (low_rank((VOCAB, 60), 3),),
    },
    "head scaled, shifted and low-rank": lambda: {
        HEAD: (output_scale((VOCAB, 60)), low_rank((VOCAB, 60)), bias((VOCAB, 60)))
    },
    "embedding scaled and low-rank": lambda: {
        EMBEDDING: (output_scale((60, VOCAB)), low_rank((60, VOCAB), 9))
    },
    "other deltas on top of replaced rows": lambda: {
        EMBEDDING: (random_rows(range(0, VOCAB, 2)), low_rank((60, VOCAB))),
        HEAD: (random_rows(range(VOCAB)), output_scale((VOCAB, 60)), low_rank((VOCAB, 60))),
    },
    "norms": lambda: {
        "model.layers.1.input_layernorm": (NormWeight(1 + 0.5 * torch.randn(60)),),
        "model.layers.2.post_attention_layernorm": (NormWeight(torch.randn(60)),),
        FINAL_NORM: (NormWeight(1 + 0.5 * torch.randn(60)),),
    },
}


@pytest.mark.parametrize("scattered", [False, True], ids=["in-one-run", "scattered-pages"])
@pytest.mark.parametrize("name", BY_TOKEN)
def test_what_changes_embedding_head_and_norms_equals_the_merged_weights(
    name: str, scattered: bool, model: LlamaForCausalLM, paged: Callable
) -> None:
    torch.manual_seed(2)
    check(paged, model, Adapter("id", 1, "", "TEST", BY_TOKEN[name]()), scattered)
