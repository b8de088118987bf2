"""The KV of virtual tokens, put into pages when an adapter comes into the pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import MODEL, BaseLayout
from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.delta import Adapter, Delta, LowRank, Prompt
from polydelta.adapters_store.packed import PackedAdapter, PackedPrefix
from polydelta.adapters_store.packing import pack
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.decoder import Decoder
from polydelta.engine.models.weights import Weights
from polydelta.engine.paged_kv import PagedKV
from polydelta.engine.pool_adapter import PoolAdapter
from polydelta.engine.prefix_kv import fill_prefix
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.engine.runner import Runner
from polydelta.engine.sequence import ScheduledSequence, Sequence as TokenSequence
from polydelta.kernels.cpu.kernels import CpuKernels
from polydelta.kernels.ops import Kernels
from polydelta.kernels.reference import ReferenceKernels

BLOCK_SIZE, NUM_PAGES = 8, 60
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
KERNELS = pytest.mark.parametrize("kernels", [ReferenceKernels(), CpuKernels()], ids=["ref", "cpu"])
# Fewer than a page, exactly two, and some of a third; in no order.
PAGES = pytest.mark.parametrize(
    ("num_tokens", "pages"), [(1, [9]), (7, [4]), (16, [11, 2]), (19, [5, 17, 0])]
)


@dataclass
class Filled:
    """A pool whose pages were full of junk, and the decoder that it belongs to."""

    checkpoint: Checkpoint
    kernels: Kernels
    dtype: torch.dtype

    def __post_init__(self) -> None:
        torch.manual_seed(4)
        self.decoder = decoder_of(self.checkpoint, self.kernels, self.dtype)
        config = self.decoder.config
        self.spec = KVSpec.of(config, self.dtype, BLOCK_SIZE)
        elements = self.spec.page_bytes // self.dtype.itemsize
        shape = (config.num_layers, NUM_PAGES, elements)
        self.storage = torch.randn(shape).to(self.dtype).view(torch.uint8)
        self.before = self.storage.clone()
        self.kv = PagedKV(self.storage, self.spec, self.kernels)

    @torch.inference_mode()
    def fill(self, values: Tensor, pages: Sequence[int]) -> None:
        prefix = PackedPrefix(values.to(self.dtype))
        fill_prefix(prefix, pages, 0, self.kv, self.decoder)

    def places(self, storage: Tensor) -> Tensor:
        """`[layers, pages, 2, block_size, kv_heads, head_dim]`"""
        config = self.decoder.config
        shape = (2, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        return storage.view(self.dtype).unflatten(-1, shape)

    def keys_values(self, num_tokens: int, pages: Sequence[int]) -> Tensor:
        """What lies there in the order of tokens, `[layers, 2, n, kv_heads, head_dim]`."""
        return self.places(self.storage)[:, pages].transpose(1, 2).flatten(2, 3)[:, :, :num_tokens]

    def check_rest(self, num_tokens: int, pages: Sequence[int]) -> None:
        """Whatever is not the virtual tokens' is as it was, bit for bit."""
        rest = torch.ones(NUM_PAGES, BLOCK_SIZE, dtype=torch.bool)
        for place in range(num_tokens):
            rest[pages[place // BLOCK_SIZE], place % BLOCK_SIZE] = False
        was, now = (self.places(s).transpose(2, 3)[:, rest] for s in (self.before, self.storage))
        assert torch.equal(now, was)


def decoder_of(checkpoint: Checkpoint, kernels: Kernels, dtype: torch.dtype) -> Decoder:
    weights = Weights(checkpoint.tensors, dtype, lambda done, total: None)
    return Decoder(checkpoint.config, weights, kernels, 64, dtype)


@PAGES
@DTYPES
@KERNELS
def test_ready_made_keys_and_values_are_stored_as_they_are_and_nothing_else_is_written(
    tiny_checkpoint: Checkpoint,
    kernels: Kernels,
    dtype: torch.dtype,
    num_tokens: int,
    pages: list[int],
) -> None:
    pool = Filled(tiny_checkpoint, kernels, dtype)
    values = torch.randn(3, 2, num_tokens, 2, 10)
    pool.fill(values, pages)
    assert torch.equal(pool.keys_values(num_tokens, pages), values.to(dtype))
    pool.check_rest(num_tokens, pages)


@PAGES
@DTYPES
@KERNELS
def test_embeddings_give_the_keys_and_values_that_transformers_gives(
    tiny_checkpoint: Checkpoint,
    tiny_model: LlamaForCausalLM,
    kernels: Kernels,
    dtype: torch.dtype,
    num_tokens: int,
    pages: list[int],
) -> None:
    pool = Filled(tiny_checkpoint, kernels, dtype)
    embeddings = torch.randn(num_tokens, 60) / 3
    pool.fill(embeddings, pages)
    with torch.no_grad():
        cache = tiny_model(inputs_embeds=embeddings[None], use_cache=True).past_key_values
    got = pool.keys_values(num_tokens, pages).float()
    for layer, of_layer in enumerate(cache.layers):
        want = torch.stack((of_layer.keys[0], of_layer.values[0])).transpose(1, 2)
        tolerance = 1e-4 if dtype is torch.float32 else 0.1 * float(want.abs().max())
        torch.testing.assert_close(got[layer], want, atol=tolerance, rtol=0)
    pool.check_rest(num_tokens, pages)


class Host:
    """Packed adapters by their id, as those that are fused are asked for."""

    def __init__(self, packed: dict[str, PackedAdapter]) -> None:
        self.packed = packed

    def peek(self, ref: AdapterRef) -> PackedAdapter | None:
        return self.packed[ref.id]


class Serving:
    """A runner that computes the same step again and again for one adapter."""

    LORA = AdapterRef("lora", 1, Path("lora"))

    def __init__(self, checkpoint: Checkpoint, lora: PackedAdapter, fuse_after: int | None) -> None:
        kernels = CpuKernels()
        decoder = decoder_of(checkpoint, kernels, torch.float32)
        host: Any = Host({"lora": lora})
        spec = KVSpec.of(decoder.config, torch.float32, BLOCK_SIZE)
        self.runner = Runner(decoder, kernels, NUM_PAGES, spec, host, fuse_after)
        need = -(-lora.bytes_per_layer // self.runner._storage.shape[-1])
        self._bound = self.runner.bind_adapter(lora, range(20, 20 + need))
        params = SamplingParams(temperature=0.0, logprobs=0)
        request = GenerationRequest("one", [5, 9, 3], params, (Share(self.LORA),))
        self._sequence = TokenSequence(request, lambda output: None)
        self._sequence.block_table = [19]

    def step(self) -> float:
        """The likeliest token's log probability."""
        (token,) = self.runner.launch(
            [ScheduledSequence(self._sequence, 3)], lambda ref: self._bound
        ).wait()
        assert token is not None
        assert token.logprob is not None
        return token.logprob.logprob

    def bind(self, packed: PackedAdapter) -> PoolAdapter:
        """Into pages 3 and 1."""
        return self.runner.bind_adapter(packed, [3, 1])

    @property
    def own_pages(self) -> Tensor:
        return self.runner._storage[:, [3, 1]]

    @property
    def is_fused(self) -> bool:
        fusion = self.runner._fusion
        return fusion is not None and fusion._inside is not None


@pytest.fixture
def packed_of(tiny_layout: BaseLayout) -> Callable[[dict[str, tuple[Delta, ...]]], PackedAdapter]:
    return lambda modules: pack(
        Adapter("id", 1, "digest", "TEST", modules), tiny_layout, torch.float32
    )


@pytest.fixture
def lora(tiny_layout: BaseLayout, packed_of: Callable[..., PackedAdapter]) -> PackedAdapter:
    """Of every linear layer."""
    torch.manual_seed(5)
    return packed_of(
        {
            module: (LowRank(torch.randn(2, shape[1]) / 8, torch.randn(shape[0], 2)),)
            for module, shape in tiny_layout.module_shapes.items()
        }
    )


@pytest.fixture
def prompt(packed_of: Callable[..., PackedAdapter]) -> PackedAdapter:
    """11 virtual tokens and no weights."""
    torch.manual_seed(6)
    return packed_of({MODEL: (Prompt(torch.randn(11, 60) / 3),)})


@pytest.mark.parametrize("fuse_after", [None, 0], ids=["unmerged", "fused"])
def test_virtual_tokens_are_the_bare_bases_whoever_was_served_before(
    tiny_checkpoint: Checkpoint, lora: PackedAdapter, prompt: PackedAdapter, fuse_after: int | None
) -> None:
    alone = Serving(tiny_checkpoint, lora, None)
    alone.bind(prompt)
    serving = Serving(tiny_checkpoint, lora, fuse_after)
    before = serving.step()
    deadline = time.monotonic() + 60
    while fuse_after is not None and not serving.is_fused:
        assert time.monotonic() < deadline
        serving.step()
    bound = serving.bind(prompt)
    assert torch.equal(serving.own_pages, alone.own_pages)
    assert serving.own_pages.any()
    assert not serving.is_fused
    # The prompt's weights are none, and the other adapter goes on as it was.
    assert bound.linear(0, 0) is None
    assert serving.step() == pytest.approx(before, abs=1e-4)
    assert serving.is_fused == (fuse_after is not None)


def test_weights_lie_in_the_first_pages_and_virtual_tokens_in_the_others(
    tiny_checkpoint: Checkpoint,
    tiny_layout: BaseLayout,
    lora: PackedAdapter,
    packed_of: Callable[..., PackedAdapter],
    prompt: PackedAdapter,
) -> None:
    module = "model.layers.1.self_attn.o_proj"
    delta = LowRank(torch.randn(1, 60), torch.randn(60, 1))
    both = packed_of({module: (delta,), MODEL: (Prompt(prompt.prefix.values),)})
    serving, alone = Serving(tiny_checkpoint, lora, None), Serving(tiny_checkpoint, lora, None)
    alone.bind(prompt)
    need = -(-both.bytes_per_layer // serving.runner._storage.shape[-1])
    assert need == 1
    bound = serving.runner.bind_adapter(both, [7, 3, 1])
    assert torch.equal(serving.own_pages, alone.own_pages)
    x, y = torch.randn(4, 60), torch.zeros(4, 60)
    changes = bound.linear(1, 1)
    assert changes is not None
    changes.apply(y, x, 1.0, lambda x: x)
    torch.testing.assert_close(y, x @ delta.dense().T)
    # A prompt is the bare base's even where its own adapter has weights.
    assert serving.runner._deltas.group is None
