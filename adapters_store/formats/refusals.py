"""Types of PEFT adapters that are refused whatever their config: no delta describes what they do,
or their files do not hold all of it."""

from __future__ import annotations

from collections.abc import Mapping

# By `peft_type`: why, and what to do instead.
REFUSALS: Mapping[str, str] = {
    "ADAMSS": (
        "which rows of a layer each of its parts changes is not in the file, but comes of "
        "clustering the base's weights again: merge it with PEFT's merge_and_unload(), and make a "
        "one-bit delta of the result with `polydelta adapters distill-delta`"
    ),
    "ADAPTION_PROMPT": (
        "its prompts have an attention of their own in the last layers, beside that over the "
        "sequence, so they are no part of the cache: train with PREFIX_TUNING instead"
    ),
    "LILY": (
        "its router averages over all tokens that are computed together, so an answer would depend "
        "on the other requests of a batch: train a LoRA instead"
    ),
    "SHADOW": (
        "it runs a second model beside the base, with hidden states of its own: train a LoRA "
        "instead"
    ),
    "XLORA": (
        "it runs the model twice for every token, the first time to weigh its LoRA adapters: serve "
        "these by themselves, or merge them with `polydelta adapters merge`"
    ),
}
