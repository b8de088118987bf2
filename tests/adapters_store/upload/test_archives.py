from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from polydelta.adapters_store.errors import AdapterError, InvalidAdapterError, TooLargeError
from polydelta.adapters_store.upload.limits import UploadLimits

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Files = Mapping[str, bytes]
Pack = Callable[[Files], bytes]
Send = Callable[..., Any]


def tar_of(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=format) as archive:
        for member, data in members:
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def zip_of(*members: tuple[zipfile.ZipInfo | str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, data in members:
            archive.writestr(info, data)
    return content.getvalue()


def refusal(
    send: Send, content: bytes, error: type[AdapterError] = InvalidAdapterError, **kwargs: Any
) -> str:
    with pytest.raises(error) as raised:
        send([("upload.bin", content)], **kwargs)
    assert "staging" not in str(raised.value)
    assert len(str(raised.value)) < 700
    return str(raised.value)


@pytest.mark.parametrize("name", ["adapter.zip", "adapter.tar.gz", "file", CONFIG])
@pytest.mark.parametrize("folder", ["", "./", "my adapter/", "a/b/c/"])
def test_an_archive_is_unpacked_whatever_its_name_and_folder(
    name: str, folder: str, pack: Pack, sound: Files, send: Send
) -> None:
    content = pack({folder + inside: data for inside, data in sound.items()})
    staged = send([(name, content)], expected=sound)
    assert staged.ignored == ()


def test_an_archive_has_the_digest_of_its_files(pack: Pack, sound: Files, send: Send) -> None:
    assert send([("a", pack(sound))]).digest == send(sound.items()).digest


def test_folders_are_passed_over(sound: Files, send: Send) -> None:
    folders = (member(name, type=tarfile.DIRTYPE) for name in (".", "./x", "other"))
    files = (member(f"x/{name}", data) for name, data in sound.items())
    send([("a", tar_of(*folders, *files))], expected=sound)
    send([("a", zip_of(("x/", b""), *((f"x/{n}", d) for n, d in sound.items())))], expected=sound)


def test_companions_are_named_and_not_kept(pack: Pack, sound: Files, send: Send) -> None:
    companions = {
        "x/README.md": b"# hi",
        "x/tokenizer.json": b"{}",
        "x/empty.txt": b"",
        "__MACOSX/x/._adapter_config.json": b"\0\5",
    }
    files = {f"x/{name}": data for name, data in sound.items()}
    staged = send([("a", pack({**companions, **files}))], expected=sound)
    assert staged.ignored == tuple(companions)


ESCAPES = [
    f"/etc/{CONFIG}",
    f"../{CONFIG}",
    f"x/../../{CONFIG}",
    f"x/..\\..\\{CONFIG}",
    f"C:\\{CONFIG}",
    f"C:/{CONFIG}",
    f"\\\\host\\share\\{CONFIG}",
    f"x//{CONFIG}",
    f"x\n/{CONFIG}",
    "../../../../tmp/README.md",
    "x" * 200 + "/" + "x" * 100 + ".md",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_leads_elsewhere_is_refused(
    name: str, pack: Pack, sound: Files, send: Send, tmp_path: Path
) -> None:
    try:
        content = pack({name: b"{}", WEIGHTS: sound[WEIGHTS]})
    except ValueError:
        pytest.skip("ustar has no room for the name")
    assert "is not accepted" in refusal(send, content)
    assert not (tmp_path.parent / CONFIG).exists()


@pytest.mark.parametrize("name", ["/abs", "..", "x/../..", "C:", "a\\b"])
def test_a_folder_that_leads_elsewhere_is_refused(name: str, sound: Files, send: Send) -> None:
    content = tar_of(member(name, type=tarfile.DIRTYPE), *(member(n, d) for n, d in sound.items()))
    assert "is not accepted" in refusal(send, content)
    assert "is not accepted" in refusal(send, zip_of((f"{name}/", b""), *sound.items()))


def test_a_zip_name_is_not_cut_at_a_nul(sound: Files, send: Send) -> None:
    content = zip_of(*sound.items()).replace(b"adapter_config.json", b"adapter_config.jso\0")
    assert "is not accepted" in refusal(send, content)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a named pipe"),
        (tarfile.CONTTYPE, "no plain file"),
        (b"Z", "no plain file"),
    ],
)
def test_what_is_no_plain_file_in_a_tar_is_refused(
    kind: bytes, what: str, sound: Files, send: Send
) -> None:
    content = tar_of(
        member(CONFIG, type=kind, linkname="/etc/passwd"), member(WEIGHTS, sound[WEIGHTS])
    )
    assert f"'{CONFIG}' is {what}" in refusal(send, content)


@pytest.mark.parametrize("mode", [0o120777, 0o020666, 0o010666, 0o140666, 0o040755])
def test_what_is_no_plain_file_in_a_zip_is_refused(mode: int, sound: Files, send: Send) -> None:
    info = zipfile.ZipInfo(CONFIG)
    info.external_attr = mode << 16
    content = zip_of((info, b"/etc/passwd"), (WEIGHTS, sound[WEIGHTS]))
    assert f"'{CONFIG}' is a link, or no plain file" in refusal(send, content)


def test_an_encrypted_member_is_refused(sound: Files, send: Send) -> None:
    content = bytearray(zip_of(*sound.items()))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    assert "is encrypted" in refusal(send, bytes(content))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_of_another_compression_is_refused(method: int, sound: Files, send: Send) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        archive.writestr(CONFIG, sound[CONFIG])
    assert "neither stored nor deflated" in refusal(send, content.getvalue())


@pytest.mark.parametrize("other", [CONFIG, CONFIG.upper(), CONFIG.title()])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice_is_refused(other: str, sound: Files, send: Send) -> None:
    twice = (*sound.items(), (other, b"{}"))
    for content in (zip_of(*twice), tar_of(*(member(name, data) for name, data in twice))):
        assert "is there twice" in refusal(send, content)


def test_files_of_two_folders_are_refused(pack: Pack, sound: Files, send: Send) -> None:
    content = pack({f"a/{CONFIG}": sound[CONFIG], f"b/{WEIGHTS}": sound[WEIGHTS]})
    assert f"'b/{WEIGHTS}' lies in another folder" in refusal(send, content)


@pytest.mark.parametrize("name", ["optimizer.pt", "run.py", "config.yaml", "a.safetensors", "x"])
def test_an_unknown_file_is_refused_by_name(
    name: str, pack: Pack, sound: Files, send: Send
) -> None:
    message = refusal(send, pack({**sound, name: b"anything"}))
    assert f"'{name}' is no file that an adapter is known to have" in message


@pytest.mark.parametrize("inner", ["zip", "tar", "tar.gz"])
def test_an_archive_in_an_archive_is_refused(
    inner: str, packers: Mapping[str, Pack], pack: Pack, sound: Files, send: Send
) -> None:
    content = pack({**sound, "README.md": packers[inner](sound)})
    assert "'README.md' is an archive" in refusal(send, content)


def test_a_file_of_torch_save_is_refused_as_a_pickle(send: Send) -> None:
    content = io.BytesIO()
    torch.save({"a": torch.ones(2)}, content)
    assert "is a pickle" in refusal(send, content.getvalue())


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (bz2.compress(b"x"), "bzip2"),
        (lzma.compress(b"x"), "xz"),
        (b"7z\xbc\xaf\x27\x1c", "7z"),
        (b"Rar!\x1a\x07\x01\0", "rar"),
        (b"\x28\xb5\x2f\xfd\x04", "zstd"),
    ],
)
def test_other_archives_are_refused_by_kind(content: bytes, kind: str, send: Send) -> None:
    message = refusal(send, content)
    assert f"of the kind {kind}" in message
    assert ".tar.gz" in message


def test_more_files_than_the_limit_are_too_large(pack: Pack, sound: Files, send: Send) -> None:
    files = {**{f"{number}.txt": b"" for number in range(9)}, **sound}
    assert "more than 10 files" in refusal(
        send, pack(files), TooLargeError, limits=UploadLimits(max_files=10)
    )
    send([("a", pack(files))], limits=UploadLimits(max_files=11))


def test_folders_count_as_files(send: Send) -> None:
    content = tar_of(*(member(f"f{number}", type=tarfile.DIRTYPE) for number in range(65)))
    assert "more than 64 files" in refusal(send, content, TooLargeError)


@pytest.mark.parametrize("size", [5000, 5001])
def test_a_file_in_an_archive_is_measured_as_it_unpacks(
    size: int, pack: Pack, sound: Files, send: Send
) -> None:
    content = pack({**sound, "notes.txt": bytes(size)})
    # Room for the archive itself, stored ones included.
    limits = UploadLimits(max_file_bytes=5000)
    if len(content) > 5000:
        pytest.skip("refused as a file already")
    if size == 5000:
        send([("a", content)], limits=limits)
    else:
        assert "'notes.txt' is larger than 5000" in refusal(
            send, content, TooLargeError, limits=limits
        )


def test_the_sum_is_measured_as_it_unpacks(pack: Pack, sound: Files, send: Send) -> None:
    total = sum(map(len, sound.values())) + 40_000
    content = pack({**sound, **{f"{number}.txt": bytes(10_000) for number in range(4)}})
    limits = UploadLimits(max_total_bytes=total - 1)
    if len(content) >= total:
        pytest.skip("refused as a file already")
    assert "in all" in refusal(send, content, TooLargeError, limits=limits)


def test_a_member_that_unpacks_too_far_is_refused(pack: Pack, sound: Files, send: Send) -> None:
    content = pack({**sound, "notes.txt": bytes(1 << 20)})
    if len(content) > 1 << 20:
        pytest.skip("not compressed")
    limits = UploadLimits(ratio_free_bytes=1 << 19)
    assert "more than 200 times its size" in refusal(send, content, limits=limits)
    send([("a", content)])


def bomb_zip(nbytes: int, declared: int) -> bytes:
    """One member that says it has `declared` bytes and unpacks to `nbytes`."""
    content = bytearray(zip_of(("notes.txt", bytes(nbytes))))
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", content, content.rindex(signature) + place, declared)
    return bytes(content)


def bomb_tar(nbytes: int, kind: bytes = b"0") -> bytes:
    """A gzipped tar of zeros, packed piece by piece; its only header says `kind`."""
    pack = zlib.compressobj(9, wbits=31)
    info = tarfile.TarInfo("notes.txt")
    info.size, info.type = nbytes, kind
    parts = [pack.compress(info.tobuf(tarfile.USTAR_FORMAT))]
    piece = bytes(1 << 20)
    parts += [pack.compress(piece) for _ in range(nbytes >> 20)]
    return b"".join([*parts, pack.flush()])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb_zip(64 << 20, 64 << 20), "200 times"),
        (bomb_zip(64 << 20, 100), "cannot be unpacked"),
        (bomb_tar(64 << 20), "200 times"),
        (bomb_tar(64 << 20, tarfile.GNUTYPE_LONGNAME), "its headers are too large"),
        (bomb_tar(64 << 20, tarfile.XHDTYPE), "its headers are too large"),
        (gzip.compress(bytes(64 << 20)), "200 times"),
        (gzip.compress(b"x" * (64 << 20)), "not unpacked|cannot be unpacked"),
    ],
    ids=["zip", "a small zip", "tar.gz", "a long name", "a pax header", "nothing", "no tar"],
)
def test_a_bomb_is_refused_in_little_memory(content: bytes, message: str, send: Send) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidAdapterError, match=message):
            send([("bomb", content)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20


def test_a_zip_directory_of_any_declared_size_is_not_read(send: Send) -> None:
    content = bytearray(zip_of((CONFIG, b"{}")) + bytes(0))
    end = content.rindex(b"PK\x05\x06")
    padding = bytes(3 << 20)
    struct.pack_into("<II", content, end + 12, len(padding) + 60, 0)
    content[end:end] = padding
    assert "its directory claims 3145788 bytes" in refusal(send, bytes(content))


def test_a_chain_of_pax_headers_is_refused(sound: Files, send: Send) -> None:
    record = b"13 comment=x\n"
    header, _ = member("x", record, type=tarfile.XHDTYPE)
    block = header.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
    files = tar_of(*(member(name, data) for name, data in sound.items()))
    send([("a", block * 4 + files)], expected=sound)
    assert "headers are too large" in refusal(send, block * 5 + files)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"11 size=10\n", "sets b'size'"),
        (b"22 GNU.sparse.major=1\n", "sets b'GNU.sparse.major'"),
        (b"99 path=a\n", "pax header is damaged"),
        (b"path=a\n", "pax header is damaged"),
        (b"0 path=a\n", "pax header is damaged"),
        (b"2 path=a\n", "pax header is damaged"),
        (b"12 path=\xff\xfe\xfd\n", "cannot be unpacked"),
        (b"1" * 60_000, "pax header is damaged"),
    ],
)
def test_a_pax_header_that_changes_what_follows_is_refused(
    record: bytes, message: str, sound: Files, send: Send
) -> None:
    header, _ = member("x", record, type=tarfile.XHDTYPE)
    padding = bytes(-len(record) % 512)
    files = tar_of(*(member(name, data) for name, data in sound.items()))
    content = header.tobuf(tarfile.USTAR_FORMAT) + record + padding + files
    assert message in refusal(send, content)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_an_archive_that_was_cut_off_is_refused(
    kept: float, pack: Pack, sound: Files, send: Send
) -> None:
    content = pack(sound)
    if content.endswith(bytes(1024)):
        content = content.rstrip(b"\0")
    assert "cannot be unpacked" in refusal(send, content[: int(len(content) * kept)])


def test_an_archive_with_something_behind_its_end_is_refused(
    packers: Mapping[str, Pack], sound: Files, send: Send
) -> None:
    for kind in ("tar", "tar.gz"):
        message = refusal(send, packers[kind](sound) + b"more")
        assert "something follows its end" in message


def test_a_damaged_byte_of_the_content_is_seen(
    packers: Mapping[str, Pack], sound: Files, send: Send
) -> None:
    for kind in ("zip", "stored zip", "tar.gz"):
        content = bytearray(packers[kind](sound))
        content[len(content) // 2] ^= 0x10
        refusal(send, bytes(content))


def test_an_empty_archive_lacks_the_files(pack: Pack, send: Send) -> None:
    message = refusal(send, pack({}))
    assert f"{CONFIG} is missing" in message or "no file that an adapter" in message


def test_an_archive_beside_another_file_is_refused(pack: Pack, sound: Files, send: Send) -> None:
    with pytest.raises(InvalidAdapterError, match=r"'a.zip' is an archive .* among other files"):
        send([(CONFIG, sound[CONFIG]), ("a.zip", pack(sound))])


def test_an_adapter_of_a_large_config_is_measured_by_its_own_limit(
    packers: Mapping[str, Pack], sound: Files, send: Send
) -> None:
    config = sound[CONFIG] + b" " * (2 << 20)
    message = refusal(send, packers["zip"]({**sound, CONFIG: config}))
    assert "larger than 1048576 bytes" in message
