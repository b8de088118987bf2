"""What options are called where the engine names settings."""

from __future__ import annotations

import pytest

from polydelta.server.options import as_options


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("lower max_batch_size or block_size.", "lower --max-batch-size or --block-size."),
        ("kv_select quest, but with prefill full", "--kv-select quest, but with --prefill full"),
        ("host_adapter_bytes is no option", "host_adapter_bytes is no option"),
        ("a chunked prefill", "a chunked prefill"),
        ("kv_labels /a/kv_format/l.json", "--kv-labels /a/kv_format/l.json"),
        ("./kv_format.json and my-kv_format", "./kv_format.json and my-kv_format"),
        ("/a/prefill/nothing is not a model", "/a/prefill/nothing is not a model"),
    ],
)
def test_settings_are_named_and_paths_stay_what_they_are(message: str, shown: str) -> None:
    assert as_options(message) == shown
