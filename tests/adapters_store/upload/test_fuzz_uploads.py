"""Damaged uploads of every kind: taken, or refused with a reason; soon, and in little memory."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from polydelta.adapters_store.errors import AdapterError, InvalidAdapterError
from polydelta.adapters_store.formats.safetensors_header import DTYPE_BYTES, read_header
from polydelta.adapters_store.upload.contents import split_name
from polydelta.adapters_store.upload.limits import UploadLimits
from polydelta.adapters_store.upload.outline import check_outline
from polydelta.adapters_store.upload.staging import Staging

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Files = Mapping[str, bytes]
Pack = Callable[[Files], bytes]
Try = Callable[[Mapping[str, bytes]], str]
Mutation = Callable[[random.Random, bytes], bytes]

# CPU seconds of one example, a thousand times what it takes.
PATIENCE = 10.0

ODD_VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    3,
    1.5,
    1e308,
    2**31,
    2**63,
    10**400,
    "",
    "none",
    "x" * 3000,
    "\0",
    "\ud800",
    "F16",
    "(a+)+b",
    "[" * 500,
    [],
    [[]],
    [0, -4],
    {},
    {"": {}},
    {".*": 2},
    {"q_proj": 2**40},
]


def flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 16))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def splice(rng: random.Random, content: bytes) -> bytes:
    """A piece of it put elsewhere, in place of another or between."""
    start, at = rng.randrange(len(content)), rng.randrange(len(content))
    piece = content[start : start + rng.randrange(1, 64)]
    return content[:at] + piece + content[at + rng.choice((0, len(piece), 3 * len(piece))) :]


def overwrite(rng: random.Random, content: bytes) -> bytes:
    """Some bytes in a row become numbers that are extreme in any field."""
    at = rng.randrange(len(content))
    value = rng.choice((b"\xff", b"\0", b"\x7f", b"9", b"\x80")) * rng.choice((1, 2, 4, 8, 12))
    return content[:at] + value + content[at + len(value) :]


def change_json(rng: random.Random, value: Any) -> Any:
    """One place in a JSON value, however deep, is left out, renamed, doubled or replaced."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        match rng.randrange(6):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {(k if k != key else k + rng.choice("x.\n\0")): v for k, v in value.items()}
            case 2:
                return {**value, rng.choice(("r", "use_dora", "x", "\ud800", "__metadata__")): 1}
            case _:
                return {**value, key: change_json(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        return [*value[:at], change_json(rng, value[at]), *value[at + rng.randrange(2) :]]
    if type(value) is int and rng.random() < 0.6:
        return value + rng.choice((-value, 1, -1, 4, 2**32, -(2**62)))
    if isinstance(value, str) and value in DTYPE_BYTES:
        return rng.choice((*DTYPE_BYTES, "F4", "C64", "f32"))
    return rng.choice(ODD_VALUES)


def change_config(rng: random.Random, content: bytes) -> bytes:
    return json.dumps(change_json(rng, json.loads(content))).encode()


def change_header(rng: random.Random, content: bytes) -> bytes:
    """The header's JSON is changed, and its length is right again."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(change_json(rng, json.loads(content[8:end]))).encode()
    return len(header).to_bytes(8, "little") + header + content[end:]


def change_length(rng: random.Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    other = rng.choice(
        (0, 1, length - 1, length + 1, len(content) - 8, len(content), 2**60, 2**64 - 1)
    )
    return other.to_bytes(8, "little") + content[8:]


def change_numbers(rng: random.Random, content: bytes) -> bytes:
    """Weights become NaN, infinite or enormous; indices anything."""
    end = 8 + int.from_bytes(content[:8], "little")
    at = end + 4 * rng.randrange((len(content) - end) // 4)
    value = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\xff\xff\xff\xff"))
    return content[:at] + value + content[at + 4 :]


ANY: tuple[Mutation, ...] = (flip, cut, splice, overwrite)
# What is sent, and how the file that it is about is changed.
CASES: dict[str, tuple[str, tuple[Mutation, ...], int]] = {
    "config": (CONFIG, (*ANY, change_config, change_config, change_config), 2000),
    "weights": (WEIGHTS, (*ANY, change_length, change_numbers, *[change_header] * 4), 3000),
    "zip": ("", ANY, 1000),
    "stored zip": ("", ANY, 1000),
    "tar": ("", ANY, 1000),
    "tar.gz": ("", ANY, 1000),
}


@contextmanager
def patience() -> Iterator[None]:
    """Ends what takes too long: of CPU time, so that a busy machine changes nothing."""

    def give_up(signum: int, frame: object) -> None:
        raise TimeoutError("The upload took too long.")

    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@pytest.fixture
def attempt(staging_root: Path, adapter_files: Any) -> Try:
    """Why files are refused; an empty text when they were taken and read as an adapter."""
    staging = Staging(staging_root, UploadLimits(max_total_bytes=1 << 24))

    def attempt(files: Mapping[str, bytes]) -> str:
        try:
            with patience(), staging.begin() as upload:
                for name, content in files.items():
                    upload.open(name)
                    upload.write(content)
                staged = upload.finish()
                check_outline(staged.folder, UploadLimits())
                adapter_files.read(staged.folder)
        except AdapterError as error:
            reason = str(error)
            assert reason
            assert str(staging_root) not in reason
            assert len(reason.encode()) < 1500
            return reason
        finally:
            assert list(staging_root.iterdir()) == []
        return ""

    return attempt


@pytest.mark.parametrize("format", ["lora", "shira"])
@pytest.mark.parametrize("case", CASES)
def test_a_changed_upload_is_taken_or_refused_with_a_reason(
    case: str, format: str, attempt: Try, adapter_files: Any, packers: Mapping[str, Pack]
) -> None:
    folder = getattr(adapter_files, format)(rank_pattern={}) if format == "lora" else None
    folder = folder or adapter_files.shira()
    sound = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    name, mutations, examples = CASES[case]
    files = sound if name else {"upload": packers[case]({**sound, "README.md": b"hello " * 20})}
    assert attempt(files) == ""
    rng = random.Random(f"{case} {format}")
    outcomes: Counter[bool] = Counter()
    for _ in range(examples // 2):
        mutate = rng.choice(mutations)
        changed = {**files, (name or "upload"): mutate(rng, files[name or "upload"])}
        outcomes[attempt(changed) == ""] += 1
    # Some changes are harmless, such as one of a number or of a time in a tar; most are not.
    assert outcomes[False] > examples / 8


def test_a_changed_file_inside_a_sound_archive_is_taken_or_refused_with_a_reason(
    attempt: Try, sound: Files, packers: Mapping[str, Pack]
) -> None:
    rng = random.Random(7)
    for _ in range(500):
        name = rng.choice((CONFIG, WEIGHTS))
        mutate = rng.choice((flip, cut, change_config if name == CONFIG else change_header))
        pack = packers[rng.choice(("zip", "tar", "tar.gz"))]
        attempt({"upload": pack({**sound, name: mutate(rng, sound[name])})})


@pytest.mark.parametrize(
    "patterns",
    [
        {"[" * 900: 2},
        {"[" * 900_000: 2},
        {"(" * 900: 2},
        {"(.*.*)" * 100: 2},
        {f".*.*.*x{number}": 2 for number in range(900)},
        {f"x{number}": 2 for number in range(60_000)},
    ],
    ids=["classes", "a long one", "groups", "repeats", "many slow ones", "many"],
)
def test_patterns_that_would_take_ages_are_refused(
    patterns: dict[str, int], attempt: Try, sound: Files
) -> None:
    config = json.loads(sound[CONFIG]) | {"rank_pattern": patterns}
    assert "rank_pattern" in attempt({**sound, CONFIG: json.dumps(config).encode()})


def test_a_scale_that_makes_weights_infinite_is_refused(attempt: Try, sound: Files) -> None:
    config = json.loads(sound[CONFIG]) | {"lora_alpha": 1e300}
    assert "check the scales in the config" in attempt(
        {**sound, CONFIG: json.dumps(config).encode()}
    )


@given(
    st.binary(max_size=200)
    | st.builds(lambda tail: len(tail).to_bytes(8, "little") + tail, st.binary())
)
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_a_header_or_a_value_error(content: bytes) -> None:
    with suppress(ValueError):
        read_header(BytesIO(content), len(content))


@given(st.text() | st.from_regex(r"[/.\\a:~\x00]{0,12}", fullmatch=True))
@settings(deadline=None, max_examples=500)
def test_any_name_is_refused_or_stays_where_it_is(name: str) -> None:
    try:
        parts = split_name(name)
    except InvalidAdapterError as error:
        str(error).encode()
        return
    folder = Path("/root/folder")
    assert (folder / name).is_relative_to(folder)
    assert Path(*parts) == Path(name)
    assert not any(part.startswith("..") and len(part) == 2 for part in parts)


# Takes names of files as pairs of config and weights; prints why each is refused.
IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from polydelta.adapters_store.errors import AdapterError
from polydelta.adapters_store.upload.limits import UploadLimits
from polydelta.adapters_store.upload.staging import Staging

root, room = Path(sys.argv[1]), int(sys.argv[2])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
for upload in sorted(root.iterdir()):
    try:
        with Staging(root.parent / "staging", UploadLimits()).begin() as staged:
            for file in sorted(upload.iterdir()):
                staged.open(file.name)
                with file.open("rb") as source:
                    while chunk := source.read(1 << 16):
                        staged.write(chunk)
            staged.finish()
        print("taken")
    except AdapterError as error:
        print(str(error).replace(chr(10), " "))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_what_claims_or_unpacks_to_gigabytes_is_refused_in_little_memory(
    sound: Files, packers: Mapping[str, Pack], tmp_path: Path
) -> None:
    zeros = bytes(200 << 20)
    lists = b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"
    hostile: list[tuple[dict[str, bytes], str]] = [
        ({**sound, WEIGHTS: (2**60).to_bytes(8, "little") + sound[WEIGHTS]}, "claims"),
        ({**sound, WEIGHTS: (2**24).to_bytes(8, "little") + sound[WEIGHTS]}, "claims"),
        ({**sound, WEIGHTS: len(lists).to_bytes(8, "little") + lists}, "lists more than"),
        ({**sound, CONFIG: b"[" + b"[]," * 340_000 + b"[]]"}, "instead of an object"),
        ({"bomb": packers["zip"]({**sound, "a.txt": zeros})}, "200 times"),
        ({"bomb": packers["tar.gz"]({**sound, "a.txt": zeros})}, "200 times"),
        (dict(sound), "taken"),
    ]
    del zeros
    for number, (files, _) in enumerate(hostile):
        folder = tmp_path / "uploads" / str(number)
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY, tmp_path / "uploads", str(96 << 20)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for (_, reason), line in zip(hostile, done.stdout.splitlines(), strict=True):
        assert reason in line
