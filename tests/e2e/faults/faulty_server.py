"""`polydelta` with faults that a test calls up: `python faulty_server.py FOLDER serve ...`.

A file in FOLDER is a fault, for as long as it is there:

    wait-ID         loading the adapter of this id waits
    raise-ID        reading its files raises what the file names, such as RuntimeError
    engine-fails    the engine's next step raises

The system keeps little of what a client has not read, where it would otherwise keep 3 MB.
"""

from __future__ import annotations

import builtins
import socket
import sys
import time
from pathlib import Path
from typing import Any

from polydelta.adapters_store import disk_tier
from polydelta.adapters_store.disk_tier import DiskTier
from polydelta.engine.runner import Runner
from polydelta.server.cli import main

FAULTS = Path(sys.argv.pop(1))

load, read_adapter, launch = DiskTier.load, disk_tier.read_adapter, Runner.launch
listen = socket.socket.listen


def load_or_wait(tier: DiskTier, ref: Any) -> Any:
    while (FAULTS / f"wait-{ref.id}").exists():
        time.sleep(0.005)
    return load(tier, ref)


def read_or_raise(ref: Any, layout: Any) -> Any:
    fault = FAULTS / f"raise-{ref.id}"
    if fault.exists():
        raise getattr(builtins, fault.read_text())("a fault that a test has called up")
    return read_adapter(ref, layout)


def launch_or_raise(runner: Runner, *args: Any) -> Any:
    if (FAULTS / "engine-fails").exists():
        raise RuntimeError("a fault that a test has called up")
    return launch(runner, *args)


def listen_with_small_buffers(listener: socket.socket, *args: Any) -> None:
    # Those that it accepts inherit the size, in bytes.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
    listen(listener, *args)


socket.socket.listen = listen_with_small_buffers
disk_tier.read_adapter = read_or_raise
DiskTier.load = load_or_wait
Runner.launch = launch_or_raise

main()
