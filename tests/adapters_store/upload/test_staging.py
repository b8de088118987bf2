from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from polydelta.adapters_store.errors import InvalidAdapterError, TooLargeError
from polydelta.adapters_store.formats.files import content_digest, folder_digest
from polydelta.adapters_store.upload.limits import UploadLimits
from polydelta.adapters_store.upload.staging import Staging

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Files = Mapping[str, bytes]
Send = Callable[..., Any]


@pytest.fixture
def staging(staging_root: Path) -> Staging:
    return Staging(staging_root, UploadLimits())


def test_two_files_in_pieces_of_any_size_are_an_adapter(
    staging: Staging, sound: Files, adapter_files: Any
) -> None:
    with staging.begin() as upload:
        for name, content in reversed(sound.items()):
            upload.open(name)
            for byte in range(0, len(content), 7):
                upload.write(content[byte : byte + 7])
            upload.close()
        staged = upload.finish()
        assert {path.name: path.read_bytes() for path in staged.folder.iterdir()} == sound
        assert adapter_files.read(staged.folder).digest == staged.digest
    assert staged.digest == content_digest(sound[CONFIG], sound[WEIGHTS])
    assert staged.nbytes == sum(map(len, sound.values()))
    assert staged.ignored == ()


def test_a_folder_that_was_renamed_away_stays(
    staging: Staging, staging_root: Path, sound: Files, tmp_path: Path
) -> None:
    with staging.begin() as upload:
        for name, content in sound.items():
            upload.open(name)
            upload.write(content)
        upload.finish().folder.rename(tmp_path / "kept")
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == sound
    assert list(staging_root.iterdir()) == []


def test_uploads_at_the_same_time_do_not_meet(
    staging: Staging, sound: Files, other_config: bytes
) -> None:
    with staging.begin() as one, staging.begin() as two:
        for name in sound:
            one.open(name)
            two.open(name)
            one.write(sound[name])
            two.write(other_config if name == CONFIG else sound[name])
        assert one.finish().digest == content_digest(sound[CONFIG], sound[WEIGHTS])
        assert two.finish().digest == content_digest(other_config, sound[WEIGHTS])


def test_whatever_ends_an_upload_its_folder_goes(
    staging: Staging, staging_root: Path, sound: Files
) -> None:
    def interrupted() -> None:
        with staging.begin() as upload:
            upload.open(CONFIG)
            upload.write(sound[CONFIG])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(staging_root.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a\\b", "", "x\0"])
def test_a_bad_name_is_refused_at_once(name: str, staging: Staging) -> None:
    with staging.begin() as upload, pytest.raises(InvalidAdapterError, match="is not accepted"):
        upload.open(name)


def test_a_pickle_beside_the_files_is_refused(sound: Files, send: Send) -> None:
    files = [*sound.items(), ("training_args.bin", pickle.dumps({"lr": 1e-4}))]
    with pytest.raises(InvalidAdapterError, match=r"'training_args.bin' is a pickle"):
        send(files)


def test_a_pickle_in_place_of_the_weights_is_refused(sound: Files, send: Send) -> None:
    with pytest.raises(InvalidAdapterError, match=f"{WEIGHTS} is a pickle under another name"):
        send([(CONFIG, sound[CONFIG]), (WEIGHTS, pickle.dumps({"a": [1.0]}))])


def test_companions_are_named(sound: Files, send: Send) -> None:
    staged = send([("README.md", b"# hi"), *sound.items(), ("merges.txt", b"")], expected=sound)
    assert staged.ignored == ("README.md", "merges.txt")


@pytest.mark.parametrize("order", [1, -1])
def test_a_file_that_comes_twice_is_refused(order: int, sound: Files, send: Send) -> None:
    with pytest.raises(InvalidAdapterError, match="is there twice"):
        send([*sound.items(), (WEIGHTS, b"")][::order])


@pytest.mark.parametrize("files", [[], [CONFIG], [WEIGHTS], ["README.md"]])
def test_an_incomplete_upload_names_what_is_missing(
    files: list[str], sound: Files, send: Send
) -> None:
    with pytest.raises(InvalidAdapterError, match=r"adapter_\S+ is missing"):
        send([(name, sound.get(name, b"hi")) for name in files])


@pytest.mark.parametrize("config", [b"", b"{'r': 1}", b"[]", b'{"r": 1, "r": 2}', b"[" * 9999])
def test_a_config_that_is_no_object_is_refused(config: bytes, sound: Files, send: Send) -> None:
    with pytest.raises(InvalidAdapterError, match=CONFIG):
        send([(CONFIG, config), (WEIGHTS, sound[WEIGHTS])])


@pytest.mark.parametrize("kept", [0, 7, 50, -1])
def test_weights_that_were_cut_off_are_refused(kept: int, sound: Files, send: Send) -> None:
    with pytest.raises(InvalidAdapterError, match="not a complete safetensors file"):
        send([(CONFIG, sound[CONFIG]), (WEIGHTS, sound[WEIGHTS][:kept])])


def test_a_header_of_any_claimed_length_is_refused(sound: Files, send: Send) -> None:
    weights = (2**60).to_bytes(8, "little") + sound[WEIGHTS][8:]
    with pytest.raises(InvalidAdapterError, match=f"claims {2**60} bytes"):
        send([(CONFIG, sound[CONFIG]), (WEIGHTS, weights)])


def test_a_file_is_refused_with_the_first_byte_too_many(staging_root: Path) -> None:
    with Staging(staging_root, UploadLimits(max_file_bytes=10)).begin() as upload:
        upload.open(WEIGHTS)
        upload.write(bytes(10))
        with pytest.raises(TooLargeError, match=f"'{WEIGHTS}' is larger than 10 bytes"):
            upload.write(b"x")
        assert sum(file.stat().st_size for file in staging_root.rglob("*") if file.is_file()) <= 10


def test_an_upload_is_refused_with_the_first_byte_too_many_in_all(staging_root: Path) -> None:
    with Staging(staging_root, UploadLimits(max_total_bytes=15)).begin() as upload:
        for number in range(3):
            upload.open(f"{number}.txt")
            upload.write(bytes(5))
        with pytest.raises(TooLargeError, match="larger than 15 bytes in all"):
            upload.write(b"x")


def test_files_without_bytes_are_counted_too(staging_root: Path) -> None:
    with Staging(staging_root, UploadLimits(max_files=2)).begin() as upload:
        upload.open("0.txt")
        upload.open("1.txt")
        with pytest.raises(TooLargeError, match="more than 2 files"):
            upload.open("2.txt")


def test_bytes_of_no_file_are_a_mistake_of_the_caller(staging: Staging) -> None:
    with staging.begin() as upload, pytest.raises(RuntimeError, match="No file"):
        upload.write(b"x")


def test_a_local_folder_is_copied_and_its_other_files_are_not_opened(
    staging: Staging, adapter_files: Any
) -> None:
    folder = adapter_files.lora("mine")
    (folder / "optimizer.pt").write_bytes(pickle.dumps({}))
    (folder / "checkpoints").mkdir()
    os.mkfifo(folder / "pipe")
    os.symlink("/etc/passwd", folder / "link")
    Path(os.fsdecode(bytes(folder) + b"/\xff")).touch()
    with staging.begin() as upload:
        upload.take(folder, [])
        staged = upload.finish()
        assert adapter_files.read(staged.folder).digest == staged.digest
    assert staged.ignored == ("checkpoints", "link", "optimizer.pt", "pipe", "\ufffd")
    assert staged.digest == folder_digest(folder)


def link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [link, pipe, directory, Path.unlink])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_local_file_that_is_no_plain_file_is_refused(
    name: str, spoil: Callable[[Path], None], staging: Staging, adapter_files: Any
) -> None:
    folder = adapter_files.lora("mine")
    spoil(folder / name)

    def take() -> None:
        with staging.begin() as upload:
            upload.take(folder, [])
            upload.finish()

    with pytest.raises(InvalidAdapterError, match=name) as error:
        take()
    assert str(adapter_files.root) not in str(error.value)


@pytest.mark.parametrize("make", [lambda path: None, Path.touch])
def test_a_local_folder_that_is_none_is_refused(
    make: Callable[[Path], None], staging: Staging, tmp_path: Path
) -> None:
    make(tmp_path / "nowhere")
    with (
        pytest.raises(InvalidAdapterError, match="folder cannot be read") as error,
        staging.begin() as upload,
    ):
        upload.take(tmp_path / "nowhere", [])
    assert "nowhere" not in str(error.value)


def test_a_local_folder_is_measured_too(staging_root: Path, adapter_files: Any) -> None:
    folder = adapter_files.lora("mine")
    limits = UploadLimits(max_file_bytes=(folder / WEIGHTS).stat().st_size - 1)
    with (
        pytest.raises(TooLargeError, match=WEIGHTS),
        Staging(staging_root, limits).begin() as upload,
    ):
        upload.take(folder, [])


# One process that has imported what it needs, and a copy of it for each moment: the copy is killed
# before the n-th of its calls that change the disk. Prints how each ended.
KILLED = """
import os, signal, sys
from pathlib import Path
from polydelta.adapters_store.upload.limits import UploadLimits
from polydelta.adapters_store.upload.staging import Staging

root, source = map(Path, sys.argv[1:3])
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

def upload(moment):
    staging, left = Staging(root / str(moment), UploadLimits()), moment

    def die_in_turn(event, arguments):
        nonlocal left
        if event in CHANGES:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die_in_turn)
    with staging.begin() as upload:
        upload.take(source, [])
        os.rename(upload.finish().folder, root / f"{moment}-kept")
    os._exit(0)

for moment in range(200):
    child = os.fork()
    if child == 0:
        upload(moment)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status))
    if status == 0:
        break
"""


def test_a_kill_at_any_moment_leaves_all_or_nothing_and_what_is_swept(
    staging_root: Path, sound: Files, adapter_files: Any
) -> None:
    staging_root.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, staging_root, adapter_files.root / "sound"],
        check=True,
        capture_output=True,
        text=True,
    )
    *killed, last = map(int, done.stdout.split())
    assert (set(killed), last) == ({-9}, 0)
    left_over, whole = 0, 0
    for moment in range(len(killed) + 1):
        root = staging_root / str(moment)
        left_over += root.exists() and any(root.iterdir())
        kept = staging_root / f"{moment}-kept"
        if kept.exists():
            whole += 1
            assert {path.name: path.read_bytes() for path in kept.iterdir()} == sound
    assert left_over > 10
    assert 1 < whole < len(killed)


def test_links_are_followed_below_the_roots_only(
    staging: Staging, adapter_files: Any, tmp_path: Path
) -> None:
    """The hub's cache keeps files as links to blobs beside the snapshots."""
    blobs, snapshot = adapter_files.lora("blobs"), tmp_path / "snapshot"
    snapshot.mkdir()
    for name in (CONFIG, WEIGHTS):
        (snapshot / name).symlink_to(blobs / name)
    with staging.begin() as upload:
        upload.take(snapshot, [tmp_path.resolve()])
        assert upload.finish().digest == folder_digest(blobs)
    with staging.begin() as upload, pytest.raises(InvalidAdapterError, match="a link"):
        upload.take(snapshot, [snapshot])


def test_the_digest_of_a_folder_is_that_of_its_bytes(adapter_files: Any) -> None:
    folder = adapter_files.lora("one")
    config, weights = ((folder / name).read_bytes() for name in (CONFIG, WEIGHTS))
    assert folder_digest(folder) == content_digest(config, weights)
    (folder / CONFIG).write_bytes(config + weights)
    (folder / WEIGHTS).write_bytes(b"")
    assert folder_digest(folder) != content_digest(config, weights)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InvalidAdapterError, match=WEIGHTS):
        folder_digest(folder)


def test_a_config_with_extras_stays_as_it_was_sent(sound: Files, send: Send) -> None:
    config = json.dumps(json.loads(sound[CONFIG]), indent=7).encode() + b"\n"
    files = {CONFIG: config, WEIGHTS: sound[WEIGHTS]}
    send(files.items(), expected=files)
