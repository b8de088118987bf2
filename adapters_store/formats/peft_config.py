"""`adapter_config.json` of PEFT adapters, and the rule for its keys.

Every key is honoured, known to be harmless, or refused by name. PEFT adds new variants as new keys
of the same config, so a reader that skips what it does not know computes other numbers in silence.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.strict_json import parse_json
from polydelta.adapters_store.reference import CONFIG_FILE

Config = Mapping[str, Any]

# Above all sizes, and far below those that no float holds.
_MOST = 1 << 31

MERGE_INSTEAD = "merge it into a base model of its own, or train without it"


@dataclass(frozen=True)
class KeyRules:
    """How one format treats the keys of its config."""

    # Read by the format's parser.
    honoured: frozenset[str]
    # About training, or about what the tensors' names already say.
    harmless: frozenset[str]
    # Key -> what it is and what to do instead; refused when it is switched on.
    refused: Mapping[str, str]

    def check(self, config: Config) -> None:
        """Raises InvalidAdapterError for a key that would change the numbers unnoticed."""
        for key, value in config.items():
            # Newer versions of PEFT write their new options into every config, switched off.
            if key in self.honoured or key in self.harmless or _is_off(value):
                continue
            reason = self.refused.get(
                key,
                "this option is not known here, so what it does to the weights is not either: "
                "remove the key if it is about training only",
            )
            # A key of the client's own making may be of any length, and hold any characters.
            shown = key if key.isidentifier() and len(key) <= 80 else repr(key[:80])
            raise InvalidAdapterError(f"{CONFIG_FILE}: {shown} is {reprlib.repr(value)}; {reason}.")


# Keys that all configs, or many of them, have.
COMMON_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
        # What was adapted, trained or saved; the tensors' names say it.
        "bias",
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "target_modules",
        # PEFT switches it off for layers that store weights as [out, in], as those here do.
        "fan_in_fan_out",
    }
)


def key_rules(
    honoured: Collection[str] = (),
    harmless: Collection[str] = (),
    refused: Mapping[str, str] | None = None,
) -> KeyRules:
    """The rules for a whole config, with those for its common keys; `honoured` goes before them."""
    own = frozenset(honoured)
    return KeyRules(own, (COMMON_HARMLESS | frozenset(harmless)) - own, refused or {})


def parse_config(content: bytes) -> dict[str, Any]:
    """The config as a JSON object. Raises InvalidAdapterError."""
    try:
        config = parse_json(content)
    except ValueError as error:
        raise InvalidAdapterError(
            f"{CONFIG_FILE} is not valid JSON ({error}): save the adapter again."
        ) from None
    if not isinstance(config, dict):
        raise InvalidAdapterError(
            f"{CONFIG_FILE} holds {reprlib.repr(config)} instead of an object."
        )
    return config


def positive_int(field: str, value: object) -> int:
    """Raises InvalidAdapterError for anything but an integer above 0 and below 2**31."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _MOST:
        raise _wrong(field, value, f"a whole number above 0 and below {_MOST}")
    return value


def number(field: str, value: object) -> float:
    """Raises InvalidAdapterError for anything but a finite number."""
    # Below the largest float: JSON's integers have no bound.
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    ):
        return float(value)
    raise _wrong(field, value, "a finite number")


def flag(field: str, value: object) -> bool:
    """None counts as false. Raises InvalidAdapterError for anything but a truth value."""
    if value is not None and not isinstance(value, bool):
        raise _wrong(field, value, "true or false")
    return bool(value)


def mapping(field: str, value: object) -> dict[str, Any]:
    """None counts as empty. Raises InvalidAdapterError for anything but an object."""
    if value is not None and not isinstance(value, dict):
        raise _wrong(field, value, "an object")
    return value or {}


def strings(field: str, value: object) -> list[str]:
    """None counts as empty. Raises InvalidAdapterError for anything but a list of strings."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong(field, value, "a list of strings")
    return value


def token_ids(field: str, value: object) -> list[int]:
    """None counts as empty. Raises InvalidAdapterError for anything but a list of integers that
    are not negative and below 2**31."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(
        type(item) is int and 0 <= item < _MOST for item in value
    ):
        raise _wrong(field, value, "a list of token ids")
    return value


def _wrong(field: str, value: object, wanted: str) -> InvalidAdapterError:
    return InvalidAdapterError(
        f"{CONFIG_FILE}: {field} is {reprlib.repr(value)}, but must be {wanted}."
    )


def _is_off(value: object) -> bool:
    return value is None or value is False or value in ({}, [])
