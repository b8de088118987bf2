"""Fused mode: the adapter that every running sequence uses, in the base weights.

`fusion_policy.py` says which adapter that is; here it is made ready beside the loop, put in, and
taken out again, bit for bit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from polydelta.adapters_store.packed import PackedAdapter
from polydelta.adapters_store.packed_deltas import PackedLowRank, PackedSparse
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.delta_views import low_rank_view, sparse_view
from polydelta.engine.models.decoder import Decoder
from polydelta.kernels.delta_groups import Linear
from polydelta.kernels.delta_weights import LowRankWeights, SparseWeights
from polydelta.kernels.ops import FusableLinear, FusedDelta

logger = logging.getLogger(__name__)

# By decoder layer, then by index in `BaseLayout.linears`.
FusableLinears = Sequence[Sequence[FusableLinear]]


class FusedAdapter:
    """An adapter's deltas of all layers, ready to go into the base weights and out again.

    Memory: of a sparse delta its places, old and new values; of a low-rank one as much as the
    layers that it changes have.
    """

    def __init__(self, linears: FusableLinears, packed: PackedAdapter) -> None:
        """packed: one that is `fusable`. On any thread; reads the packed bytes only here."""
        self._deltas: list[FusedDelta] = []
        for layer, content in zip(linears, packed.layers, strict=True):
            by_linear: dict[int, list[LowRankWeights | SparseWeights]] = {}
            for delta in content.deltas:
                match delta:
                    case PackedLowRank():
                        weights = low_rank_view(delta, content.data, packed.dtype)
                        by_linear.setdefault(delta.linear, []).append(weights)
                    case PackedSparse():
                        entries = sparse_view(delta, content.data)
                        by_linear.setdefault(delta.linear, []).append(entries)
            self._deltas += [layer[index].prepare(deltas) for index, deltas in by_linear.items()]

    def fuse(self) -> None:
        """Between two steps, when no other adapter is in the weights (else RuntimeError)."""
        for delta in self._deltas:
            delta.fuse()

    def unfuse(self) -> None:
        """Between two steps, when this adapter is in the weights (else RuntimeError)."""
        for delta in self._deltas:
            delta.unfuse()


class Fusion:
    """Which adapter is in the base weights. For the engine's thread, which never waits for it: an
    adapter is made ready on a thread of its own, and its rows run unmerged until then."""

    def __init__(self, linears: FusableLinears) -> None:
        self._linears = linears
        self._inside: FusedAdapter | None = None
        # The adapter that was wanted last, ready or on its way; only this one is kept.
        self._ref: AdapterRef | None = None
        self._prepared: Future[FusedAdapter] | None = None
        # What makes one ready; only one runs at a time, because each takes as much memory as the
        # layers that it changes.
        self._thread: threading.Thread | None = None

    def settle(
        self, wanted: AdapterRef | None, packed: Callable[[AdapterRef], PackedAdapter | None]
    ) -> AdapterRef | None:
        """Before a step: brings the weights to what is wanted, as far as that is ready.

        packed: an adapter's bytes, if they are at hand; without them it stays unmerged.
        Returns the adapter that is in the weights now, whose deltas the step must not add again.
        """
        if self._inside is not None:
            if wanted == self._ref:
                return wanted
            self._inside.unfuse()
            self._inside = None
        if wanted is None:
            return None
        if wanted != self._ref or self._prepared is None:
            if self._thread is not None and self._thread.is_alive():
                return None  # whoever is wanted when it has ended comes next
            content = packed(wanted)
            if content is None or not content.fusable:
                return None
            self._ref, self._prepared = wanted, self._prepare(content, wanted)
        if not self._prepared.done() or self._prepared.exception() is not None:
            return None
        self._inside = self._prepared.result()
        self._inside.fuse()
        return wanted

    def forget(self, ref: AdapterRef) -> None:
        """Evicted or deleted: takes it out, and lets go of what was made ready."""
        if ref == self._ref:
            self.settle(None, lambda _: None)
            self._ref = self._prepared = None

    def _prepare(self, packed: PackedAdapter, ref: AdapterRef) -> Future[FusedAdapter]:
        """A thread that ends: one that stayed would keep its OpenMP team (see engine/build.py)."""
        future: Future[FusedAdapter] = Future()

        def prepare() -> None:
            try:
                future.set_result(FusedAdapter(self._linears, packed))
            except Exception as error:
                # Unmerged it is served all the same.
                logger.error("adapter %s could not be fused", ref.name, exc_info=error)
                future.set_exception(error)

        self._thread = threading.Thread(target=prepare, name="adapter-fusing", daemon=True)
        self._thread.start()
        return future


def fusable_linears(decoder: Decoder) -> list[list[FusableLinear]]:
    """The decoder's linear layers, before anything is wrapped around them."""
    linears: list[list[FusableLinear]] = []
    for block in decoder.layers:
        found: list[FusableLinear] = []

        def keep(index: int, linear: Linear, found: list[FusableLinear] = found) -> Linear:
            if not isinstance(linear, FusableLinear):
                raise TypeError(f"linear layer {index} is wrapped already: collect it before that")
            found.append(linear)
            return linear

        block.wrap_linears(keep)
        linears.append(found)
    return linears
