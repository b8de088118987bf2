"""The table of suites: what `python -m load_tests.report NAME` runs.

Rates, lengths and pools are for two cores and the default model, which is about an eighth as wide
as S-LoRA's Llama-7B. What S-LoRA (arXiv 2311.03285) publishes is divided by eight: lengths, uniform
in [8, 64) where it has [8, 512), ranks, and the tokens that the pool has room for. Its rates are
times four: 8 a second is a little more than two cores do with the 200 adapters of setting S2 (7.4),
as 2 a second was there (1.6).
"""

from __future__ import annotations

from load_tests.suites import kv, pressure, scale, short, slora, smoke

SUITES = {
    "short": short.suite(),
    "slora": slora.suite(),
    "scale": scale.suite(),
    "pressure": pressure.suite(),
    "kv": kv.suite(),
    "smoke": smoke.suite(),
}
