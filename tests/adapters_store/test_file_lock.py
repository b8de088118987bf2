from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from polydelta.adapters_store.file_lock import Presence, Turn

TIMEOUT = 30

HOLDER = """
import sys
from pathlib import Path
from polydelta.adapters_store.file_lock import Presence, Turn

path = Path(sys.argv[2])
if sys.argv[1] == "presence":
    presence = Presence(path)
    presence.settle()
    print(presence.alone, flush=True)
    sys.stdin.readline()
else:
    with Turn(path).taken():
        print("taken", flush=True)
        sys.stdin.readline()
"""

Hold = Callable[[str, Path], "subprocess.Popen[str]"]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Starts a process that holds a lock until it is killed."""
    holders: list[subprocess.Popen[str]] = []

    def hold(what: str, path: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, what, str(path)]
        pipe = subprocess.PIPE
        holders.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        assert holders[-1].stdout is not None
        assert holders[-1].stdout.readline().strip() in ("True", "taken")
        return holders[-1]

    yield hold
    for holder in holders:
        holder.kill()
        holder.communicate()


def test_the_first_is_alone_and_the_next_one_is_not(tmp_path: Path) -> None:
    first = Presence(tmp_path / "lock")
    first.settle()
    second = Presence(tmp_path / "lock")
    assert (first.alone, second.alone) == (True, False)
    first.close()
    third = Presence(tmp_path / "lock")
    assert not third.alone
    second.close()
    third.close()


def test_who_comes_after_the_last_has_gone_is_alone(tmp_path: Path) -> None:
    for _ in range(2):
        presence = Presence(tmp_path / "lock")
        assert presence.alone
        presence.close()
        presence.close()


def test_who_comes_later_waits_until_the_first_has_settled(tmp_path: Path) -> None:
    first, came = Presence(tmp_path / "lock"), threading.Event()

    def come() -> None:
        Presence(tmp_path / "lock").close()
        came.set()

    thread = threading.Thread(target=come)
    thread.start()
    assert not came.wait(0.2)
    first.settle()
    assert came.wait(TIMEOUT)
    thread.join()
    first.close()


def test_a_process_that_dies_lets_go(tmp_path: Path, hold: Hold) -> None:
    process = hold("presence", tmp_path / "lock")
    second = Presence(tmp_path / "lock")
    assert not second.alone
    second.close()
    process.kill()
    process.wait(TIMEOUT)
    third = Presence(tmp_path / "lock")
    assert third.alone
    third.close()


def test_one_thread_at_a_time_has_the_turn_and_an_error_ends_it(tmp_path: Path) -> None:
    turn, inside, most = Turn(tmp_path / "lock"), [0], [0]

    def fail() -> None:
        with turn.taken():
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            inside[0] -= 1
            raise KeyError

    def take() -> None:
        for _ in range(20):
            with pytest.raises(KeyError):
                fail()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert most == [1]


def test_a_turn_waits_for_another_process_and_goes_on_when_that_dies(
    tmp_path: Path, hold: Hold
) -> None:
    process, came = hold("turn", tmp_path / "lock"), threading.Event()

    def take() -> None:
        with Turn(tmp_path / "lock").taken():
            came.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert not came.wait(0.2)
    process.kill()
    assert came.wait(TIMEOUT)
    thread.join()
