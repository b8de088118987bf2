"""What the tests of uploads share: a sound adapter as bytes, and ways to send it."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from polydelta.adapters_store.upload.limits import UploadLimits
from polydelta.adapters_store.upload.staging import StagedAdapter, Staging

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Files = Mapping[str, bytes]
Send = Callable[..., StagedAdapter]


@pytest.fixture
def sound(adapter_files: Any) -> dict[str, bytes]:
    """The two files of a LoRA, by name."""
    folder = adapter_files.lora("sound")
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.fixture
def staging_root(tmp_path: Path) -> Path:
    return tmp_path / "staging"


@pytest.fixture
def send(staging_root: Path) -> Send:
    """Stages files, given as pairs of name and content, and leaves nothing behind."""

    def send(files: Iterable[tuple[str, bytes]], limits: UploadLimits | None = None, **check: Any):
        with Staging(staging_root, limits or UploadLimits()).begin() as upload:
            for name, content in files:
                upload.open(name)
                upload.write(content)
                upload.close()
            staged = upload.finish()
            found = {path.name: path.read_bytes() for path in staged.folder.iterdir()}
            assert found.keys() == {CONFIG, WEIGHTS}
            assert found == check.get("expected", found)
        assert list(staging_root.iterdir()) == []
        return staged

    return send


def zipped(files: Files, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def tarred(files: Files, mode: str = "w:gz", format: int = tarfile.PAX_FORMAT) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode, format=format) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mtime = 1.5  # pax writes a header for a fraction
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


PACKERS: dict[str, Callable[[Files], bytes]] = {
    "zip": zipped,
    "stored zip": lambda files: zipped(files, zipfile.ZIP_STORED),
    "tar": lambda files: tarred(files, "w"),
    "tar.gz": tarred,
    "tar.gz of GNU": lambda files: tarred(files, format=tarfile.GNU_FORMAT),
    "tar.gz of ustar": lambda files: tarred(files, format=tarfile.USTAR_FORMAT),
}


@pytest.fixture(params=PACKERS.values(), ids=PACKERS.keys())
def pack(request: pytest.FixtureRequest) -> Callable[[Files], bytes]:
    return request.param


@pytest.fixture(scope="session")
def packers() -> dict[str, Callable[[Files], bytes]]:
    return PACKERS


@pytest.fixture
def other_config(sound: Files) -> bytes:
    return json.dumps(json.loads(sound[CONFIG]) | {"lora_alpha": 7}).encode()
