"""The operations that the engine needs, each named once, and the choice of who computes them.

`reference.py` is the plain truth; the folders beside it are faster versions, tested against it.
A set of kernels is chosen once, when the engine starts, and handed down: there is no global.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from polydelta.kernels.delta_groups import (
    AdapterPlaces,
    AdapterSites,
    AddDelta,
    ChangeOutput,
    DeltaGroup,
    DeltaSegment,
    Linear,
    SiteDeltas,
)
from polydelta.kernels.delta_weights import (
    AddWeights,
    ChangeWeights,
    LowRankWeights,
    SparseWeights,
)
from polydelta.kernels.kv_selection import FULL, Selection
from polydelta.kernels.quantized_weight import QuantizedWeight
from polydelta.kernels.sampling import SamplingRows


@dataclass(frozen=True)
class SequenceSlice:
    """One sequence's part of a step: its query rows and where its keys and values lie."""

    # Rows of the flat batch: start : start + length.
    start: int
    length: int
    # Tokens with KV once this step's are stored; the queries are the last `length` of them.
    context: int
    # Page ids; page i holds tokens i * block_size and on. Below 0 where a page was given back: no
    # query of these reads it.
    pages: Sequence[int]
    # What the queries read of the context; where it chooses by query, there is one query.
    selection: Selection = FULL
    # The sequence's number among those that run, which nobody else has meanwhile; below 0 for none.
    slot: int = -1
    # Tokens of the sequence's prompt, virtual ones counted, for what is evicted when it is done.
    prompt: int = 0


@dataclass(frozen=True)
class AttentionShape:
    """Sizes that attention needs; the same for every layer but for the window."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    # Tokens in one page.
    block_size: int
    # How many tokens back a query sees, itself included; None sees all.
    window: int | None = None
    # Of the longest sequence that there will be; None where nobody says.
    max_pages: int | None = None


class FusedDelta(Protocol):
    """An adapter's change of one linear layer, ready to go into its weight and out of it again.

    What is in the weight is `W + dW`, summed in float32 and rounded once to W's dtype; what is
    there afterwards is W, bit for bit.
    """

    def fuse(self) -> None:
        """Raises RuntimeError when something is in the weight already."""

    def unfuse(self) -> None:
        """Raises RuntimeError when this is not what is in the weight."""


@runtime_checkable
class FusableLinear(Protocol):
    """A linear layer whose weight can take one adapter in."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def prepare(self, deltas: Sequence[LowRankWeights | SparseWeights]) -> FusedDelta:
        """What fusing the sum of the deltas needs, made once. On any thread, whatever is in the
        weight meanwhile; the deltas' memory is not needed after it. The memory that it takes is
        that of the class that comes back.

        Entries of one SparseWeights must differ; those of several may meet.
        """


class RecordedStep(Protocol):
    """A step that was computed once and can be computed again with other inputs."""

    def replay(self, inputs: Sequence[Any]) -> Tensor:
        """inputs: like those that it was recorded with. The result is overwritten by the next."""


class Kernels(Protocol):
    """One device's versions of every operation; for one thread at a time."""

    # Where the tensors are that it takes and gives.
    device: torch.device

    def enter_thread(self) -> None:
        """To be called by the thread that runs the steps, before its first."""

    def zeros(self, *shape: int) -> Tensor:
        """uint8, for the pool: much of it is not used for long."""

    def linear(self, weight: Tensor, bias: Tensor | None) -> FusableLinear:
        """`x @ weight.T + bias`, the weight (`[out, in]`) laid out once as the device likes it."""

    def head(self, weight: Tensor) -> Linear:
        """`x @ weight.T` in float32, whatever the dtype of x and of the weight (`[out, in]`)."""

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        """Rows `[n]` int64 of a table `[*, size]` -> `[n, size]`. Whether the table has them is not
        checked."""

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y, in the place of x; both `[tokens, size]`, dense."""

    def argmax(self, x: Tensor) -> Tensor:
        """x: `[rows, size]` float32, dense -> `[rows]` int64, where each row is largest."""

    def sample(self, logits: Tensor, rows: SamplingRows) -> Tensor:
        """logits: `[rows, vocab]` float32, dense -> token ids `[rows]` int64, drawn at random."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x: `[..., hidden]`, weight: `[hidden]` (arXiv:1910.07467)."""

    def add_rms_norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x + y, in the place of x, and the norm of that: `[tokens, size]` each, dense."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of x `[tokens, heads, head_dim]`, perhaps in its place; cos, sin:
        `[tokens, head_dim]`, as `rope_tables` makes them."""

    def silu_mul(self, x: Tensor) -> Tensor:
        """x: `[tokens, 2 * n]`, dense, gate beside up -> `silu(gate) * up`, `[tokens, n]`."""

    def store_kv(self, kv: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Writes keys and values `[tokens, kv_heads, head_dim]` into one layer of the pool.

        kv: `[pages, 2, block_size, kv_heads, head_dim]`, keys at 0 and values at 1 of the second
        axis; slots: `[tokens]` int64, page * block_size + place in the page; one below 0, which a
        backend with `recorded_rows` must know, is stored nowhere.
        """

    def plan_attention(
        self, shape: AttentionShape, sequences: Sequence[SequenceSlice], dtype: torch.dtype
    ) -> Any:
        """What `attention` needs to know of a step; made once and used by every layer."""

    def attention(self, plan: Any, queries: Tensor, kv: Tensor) -> Tensor:
        """Causal attention over paged KV: queries `[tokens, heads, head_dim]` -> the same shape.
        kv as in `store_kv`, with this step's keys and values already stored."""

    def add_delta(self, weights: AddWeights) -> AddDelta:
        """What the weights say of x, added to y; prepared once for the weights where they lie."""

    def change_output(self, weights: ChangeWeights) -> ChangeOutput:
        """What the weights make of y; prepared once for the weights where they lie."""

    def bind_sites(self, sites: Sequence[SiteDeltas | None]) -> AdapterSites:
        """An adapter whose weights stay where they are, ready to be grouped with others."""

    def group_deltas(self, segments: Sequence[DeltaSegment]) -> DeltaGroup:
        """The adapters of a step. Segments with the same rows are a sum; all others have none in
        common."""

    def recorded_rows(self, rows: int) -> int | None:
        """How many rows a decode step of so many is to be recorded with: those that are missing are
        added, with slots below 0 and no context. None: it is better not recorded."""

    def sizes_to_record(self, most_rows: int) -> Sequence[int]:
        """Numbers of rows, up to one for `most_rows`, that steps are to be recorded with before
        anybody waits for them; empty where a recording costs no more than the step."""

    def write_pages(self, storage: Tensor, pages: Sequence[int], layers: Sequence[Tensor]) -> None:
        """Copies an adapter's bytes from host memory into pages of the pool.

        storage: `[layers, pages, page_bytes]` uint8; layers: `[nbytes]` uint8 each, cut over these
        pages of their layer. May return before it is done: what is computed later waits for it.
        """

    def record(
        self, inputs: Sequence[Any], run: Callable[[], Tensor]
    ) -> tuple[Tensor, RecordedStep | None]:
        """What `run` gives, and the way to compute it again, where the backend has one.

        inputs: tensors, attention plans and delta groups that `run` works with. Those of a replay
        have the same shapes, and take the place of these. `run` may be called twice.
        """


@runtime_checkable
class PagedKernels(Kernels, Protocol):
    """Kernels that read adapters through page tables, wherever their pages lie."""

    def bind_pages(self, places: AdapterPlaces, others: AdapterSites) -> AdapterSites:
        """An adapter ready to be grouped with others. others: the same deltas as views of the pool
        or copies, for kinds that are not read through page tables."""


@runtime_checkable
class QuantizedKernels(Kernels, Protocol):
    """Kernels that multiply with weights of 4 or 8 bits: as with `dequantized()`, rounded to the
    dtype of x. No adapter can be fused into such a weight."""

    def quantized_linear(self, weight: QuantizedWeight, bias: Tensor | None) -> Linear:
        """As `linear`."""

    def quantized_head(self, weight: QuantizedWeight) -> Linear:
        """As `head`."""


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels for a device and the dtype of the model."""
    if device.type == "cpu":
        from polydelta.kernels.cpu.choice import cpu_kernels

        return cpu_kernels(dtype)
    from polydelta.kernels.triton.kernels import TritonKernels

    return TritonKernels(device)
