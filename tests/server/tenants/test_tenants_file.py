"""The tables that an operator writes."""

from __future__ import annotations

import hashlib
import json

import pytest

from polydelta.server.settings import SettingsError, load_settings
from polydelta.server.tenants.file import parse_tenants

WHOLE = """
# Two customers.
[acme]
keys = ["sk-acme", "env:ACME_KEY", "sha256:{digest}"]
adapters = ["acme-*", "shared-?", "v[0-9]"]
uploads = ["acme-*"]
upload_quota = "2GiB"
tokens_per_minute = 60000
max_concurrent = 8
weight = 2.0
priority = -1
private_cache = true

[other]
keys = ["sk-other"]
"""


def sha256(key):
    return hashlib.sha256(key.encode()).digest()


def table(**settings):
    """One tenant, as JSON."""
    return json.dumps({"acme": {"keys": ["sk-acme"]} | settings})


@pytest.fixture
def whole(monkeypatch):
    monkeypatch.setenv("ACME_KEY", "schlüssel")
    return WHOLE.format(digest=sha256("sk-third").hex().upper())


def test_every_setting_is_read(whole):
    acme, other = parse_tenants(whole)
    assert acme.name == "acme"
    assert acme.key_digests == tuple(map(sha256, ("sk-acme", "schlüssel", "sk-third")))
    assert acme.adapters == ("acme-*", "shared-?", "v[0-9]")
    assert acme.uploads == ("acme-*",)
    assert acme.upload_quota == 2 << 30
    assert (acme.tokens_per_minute, acme.max_concurrent) == (60_000, 8)
    assert (acme.weight, acme.priority, acme.private_cache) == (2.0, -1, True)
    assert other.key_digests == (sha256("sk-other"),)


def test_what_is_left_out_allows_the_base_model_and_nothing_else():
    (tenant,) = parse_tenants('[acme]\nkeys = ["sk"]')
    assert (tenant.adapters, tenant.uploads, tenant.upload_quota) == ((), (), None)
    assert (tenant.tokens_per_minute, tenant.max_concurrent) == (None, None)
    assert (tenant.weight, tenant.priority, tenant.private_cache) == (1.0, 0, False)
    assert not tenant.may_use("acme-dates")


def test_a_quota_may_be_a_number_of_bytes():
    (tenant,) = parse_tenants(table(upload_quota=4097, uploads=["acme-*"]))
    assert tenant.upload_quota == 4097


@pytest.mark.parametrize("file_name", ["tenants.toml", "no-suffix"])
def test_a_path_is_read_and_a_text_with_tables_is_taken_as_it_is(
    whole, tmp_path, monkeypatch, file_name
):
    path = tmp_path / file_name
    path.write_text(whole, encoding="utf-8")
    expected = parse_tenants(whole)
    assert load_settings(tenants=path).tenants == expected
    for said in (str(path), whole):
        monkeypatch.setenv("POLYDELTA_TENANTS", said)
        assert load_settings().tenants == expected


def test_a_file_may_hold_json(tmp_path):
    path = tmp_path / "tenants.json"
    path.write_text(table(weight=3), encoding="utf-8")
    assert load_settings(tenants=path).tenants == parse_tenants(table(weight=3.0))


def test_without_the_option_there_are_no_tenants():
    assert load_settings().tenants == ()


def test_neither_keys_nor_their_digests_show_in_a_print_of_the_settings():
    shown = repr(load_settings(tenants=table()))
    assert "sk-acme" not in shown
    assert repr(sha256("sk-acme")) not in shown
    assert "acme" in shown


REFUSED = [
    ("{}", "there is no tenant in it"),
    ("[]", "neither TOML nor JSON"),
    ("[acme", "neither TOML nor JSON"),
    ('{"acme": ', "neither TOML nor JSON"),
    ('[acme]\nkeys = ["a"]\n[acme]\nkeys = ["b"]', "neither TOML nor JSON"),
    ('{"acme": {"keys": ["a"]}, "acme": {"keys": ["b"]}}', "'acme' stands twice"),
    ('{"acme": {"keys": ["a"], "keys": ["b"]}}', "'keys' stands twice"),
    ('{"acme": 5}', "[acme] must be a table"),
    ('{"acme": ["sk-acme"]}', "[acme] must be a table"),
    ('{"a:b": {"keys": ["a"]}}', "'a:b' is no name for a tenant"),
    ('{"": {"keys": ["a"]}}', "'' is no name for a tenant"),
    (f'{{"{"x" * 129}": {{"keys": ["a"]}}}}', "is no name for a tenant"),
    ('{"acme": {}}', "[acme] keys: write at least one"),
    (table(keys=[]), "[acme] keys:"),
    (table(keys="sk-acme"), "[acme] keys:"),
    (table(keys=[7]), "[acme] keys.0:"),
    (table(keys=["sk", "sk"]), "[acme] keys: one stands there twice"),
    (table(keys=[""]), "[acme] keys: one is empty"),
    (table(keys=[" \t"]), "[acme] keys: one is empty"),
    (table(keys=["sk "]), "[acme] keys: one has spaces around it"),
    (table(keys=["env:NOT_THERE"]), "[acme] keys: the variable 'NOT_THERE' is not set"),
    (table(keys=["env:EMPTY_KEY"]), "[acme] keys: that of the variable 'EMPTY_KEY' is empty"),
    (table(keys=["sha256:abc"]), "[acme] keys: what follows sha256: must be 64 hex digits"),
    (table(keys=["sha256:" + sha256("").hex()]), "[acme] keys: one is the sha256 of an empty key"),
    ('{"a": {"keys": ["sk"]}, "b": {"keys": ["x", "sk"]}}', "[b] keys: one is a key of [a]"),
    (table(wieght=2.0), "[acme] wieght: there is no such setting; there are keys, adapters,"),
    (table(adapters="acme-*"), "[acme] adapters:"),
    (table(adapters=[""]), "[acme] adapters.0: '' matches no adapter id"),
    (table(adapters=["a", "acme/*"]), "[acme] adapters.1: 'acme/*' matches no adapter id"),
    (table(adapters=["acme@1"]), "[acme] adapters.0: 'acme@1' matches no adapter id"),
    (table(uploads=["acme-[ab"]), "[acme] uploads.0: 'acme-[ab' matches no adapter id"),
    (table(uploads=["acme-*\n"]), "[acme] uploads.0:"),
    (table(upload_quota="2GiB"), "[acme] upload_quota: only goes with uploads"),
    (table(uploads=["a"], upload_quota="2 apples"), "[acme] upload_quota: '2 apples' is no size"),
    (table(uploads=["a"], upload_quota=True), "[acme] upload_quota: True is no size"),
    (table(uploads=["a"], upload_quota=0), "[acme] upload_quota:"),
    (table(tokens_per_minute=0), "[acme] tokens_per_minute:"),
    (table(tokens_per_minute=1.5), "[acme] tokens_per_minute:"),
    (table(tokens_per_minute="60000"), "[acme] tokens_per_minute:"),
    (table(max_concurrent=-1), "[acme] max_concurrent:"),
    (table(max_concurrent=True), "[acme] max_concurrent:"),
    (table(weight=0), "[acme] weight:"),
    ('[acme]\nkeys = ["a"]\nweight = inf', "[acme] weight:"),
    ('[acme]\nkeys = ["a"]\nweight = nan', "[acme] weight:"),
    (table(priority=2**31), "[acme] priority:"),
    (table(priority=0.5), "[acme] priority:"),
    (table(private_cache="yes"), "[acme] private_cache:"),
    (table(private_cache=1), "[acme] private_cache:"),
]


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_what_cannot_be_used_is_refused_by_name(monkeypatch, text, reason):
    monkeypatch.setenv("EMPTY_KEY", "")
    monkeypatch.delenv("NOT_THERE", raising=False)
    with pytest.raises(SettingsError) as caught:
        load_settings(tenants=text)
    message = str(caught.value)
    assert message.startswith("--tenants (or POLYDELTA_TENANTS): ")
    assert reason in message
    assert "sk-acme" not in message


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"[acme]\xff")
    for path, reason in (
        (tmp_path / "none.toml", "No such file"),
        (tmp_path, "directory"),
        (binary, "not UTF-8"),
    ):
        with pytest.raises(SettingsError) as caught:
            load_settings(tenants=path)
        assert str(path) in str(caught.value)
        assert reason in str(caught.value)


def test_no_key_is_an_operator_s_and_a_tenant_s():
    with pytest.raises(SettingsError) as caught:
        load_settings(tenants=table(), api_key=["sk-first", "sk-acme"])
    assert "[acme] keys: one is a key of --api-key as well" in str(caught.value)
    assert "sk-acme" not in str(caught.value)
    assert len(load_settings(tenants=table(), api_key=["sk-first"]).tenants) == 1


def test_globs_mean_ids_as_a_whole_and_letters_as_they_are_written():
    (tenant,) = parse_tenants(table(adapters=["shared-?", "v[!0-9]"], uploads=["acme-*"]))
    for adapter_id in ("shared-1", "va", "acme-", "acme-dates"):
        assert tenant.may_use(adapter_id)
    for adapter_id in ("shared-12", "v1", "Acme-dates", "my-acme-dates", "acme"):
        assert not tenant.may_use(adapter_id)
    assert tenant.may_change("acme-dates")
    assert not tenant.may_change("shared-1")
