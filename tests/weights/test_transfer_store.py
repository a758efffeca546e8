"""Unauthorised connections to a transfer store: possible attacks are refused and counted."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import zmq
from torch._C._distributed_c10d import TCPStore

from rayrlhf.weights.buckets import check
from rayrlhf.weights.shared_memory import SharedBuffer, attach
from rayrlhf.weights.store import TensorSlice
from rayrlhf.weights.transfer_failure import TransferFailed
from rayrlhf.weights.transfer_group import Receiver, TransferGroup, join
from rayrlhf.weights.transfer_store import LOOPBACK, SENDER_GONE, Member, TransferStore

CPU = torch.device("cpu")
SECONDS = 30.0


@pytest.fixture
def store() -> Iterator[TransferStore]:
    opened = TransferStore()
    yield opened
    opened.close()


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def port_of(store: TransferStore) -> int:
    return int(store.address.endpoint.rpartition(":")[2])


def value_of(store: TransferStore, key: str, seconds: float = SECONDS) -> bytes | None:
    member = Member(store.address, SECONDS)
    member.ask(key)
    deadline = time.monotonic() + seconds
    while key not in member.values and time.monotonic() < deadline:
        member.pump(0.05)
    member.close()
    return member.values.get(key)


def test_members_get_values_posted_before_and_after_the_request(store: TransferStore) -> None:
    first, second = Member(store.address, SECONDS), Member(store.address, SECONDS)
    first.ask("late")
    second.post("early", b"\x00\xff")
    second.post("late", b"2")
    wait_until(lambda: first.pump(0.01) is None and "late" in first.values)
    assert first.values == {"late": b"2"} and value_of(store, "early") == b"\x00\xff"
    assert second.end("engine 1: out of memory") == "engine 1: out of memory"
    assert first.end("another reason") == "engine 1: out of memory", "the first reason is kept"
    for member in (first, second):
        member.close()
    late = Member(store.address, SECONDS)
    wait_until(lambda: late.pump(0.01) is None and late.end_reason is not None)
    assert late.end_reason == "engine 1: out of memory"
    late.close()
    wait_until(lambda: store.refused == 0)


def test_a_pickle_sent_to_the_port_is_refused(store: TransferStore, tmp_path: Path) -> None:
    """It worked on a TCPStore on all interfaces without a secret, whose values engines unpickled."""
    marker = tmp_path / "owned"
    planted = pickle.dumps(Evil(marker))
    transfer_group = TransferGroup("ipc", store.address, {0: Receiver(1, ("node",))}, SECONDS)
    reader = join(transfer_group, rank=1, device=CPU, key="node")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reader.receive, 8)
        with pytest.raises(dist.DistError):
            TCPStore(LOOPBACK, port_of(store), is_master=False, timeout=timedelta(seconds=1)).set(
                "bucket/node/0", planted.decode("latin-1")
            )
        wait_until(lambda: store.refused > 0)
        assert not waiting.done() and not marker.exists(), "the engine still waits for its bucket"
        # Even a member cannot get it executed.
        insider = Member(store.address, SECONDS)
        insider.post("bucket/node/0", planted)
        with pytest.raises(TransferFailed, match="bucket 0 cannot be read: a handle that is not JSON"):
            waiting.result(SECONDS)
        insider.close()
    reader.end("done")
    assert not marker.exists()


def test_connections_without_the_keys_are_refused_and_counted(store: TransferStore) -> None:
    public, secret = zmq.curve_keypair()
    unauthorised = {
        "no member": replace(store.address, member_key=public, member_secret=secret),
        "another store": replace(store.address, store_key=public),
    }
    for name, address in unauthorised.items():
        before = store.refused
        with pytest.raises(TransferFailed, match=r"did not answer within 1 s"):
            Member(address, 1.0)
        assert store.refused > before, name
    before = store.refused
    for count, request in enumerate([b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04" + b"x" * 200]):
        with socket.create_connection((LOOPBACK, port_of(store)), timeout=SECONDS) as connection:
            connection.sendall(request)
            wait_until(partial(lambda wanted: store.refused >= wanted, before + count + 1))
            connection.settimeout(SECONDS)
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(1000):
                    pass
    before = store.refused
    plain = zmq.Context()
    end = plain.socket(zmq.DEALER)
    end.connect(store.address.endpoint)
    end.send_multipart([b"post", b"bucket/node/0", b"planted"])
    wait_until(lambda: store.refused > before)
    plain.destroy(linger=0)
    assert value_of(store, "bucket/node/0", seconds=0.3) is None


def test_a_recorded_connection_cannot_be_replayed(store: TransferStore) -> None:
    """Every byte that a member sent, sent again over another, unauthorised connection."""
    recorded = bytearray()
    listener = socket.create_server((LOOPBACK, 0))

    def forward(source: socket.socket, sink: socket.socket, record: bool) -> None:
        while data := source.recv(65536):
            if record:
                recorded.extend(data)
            sink.sendall(data)

    def relay() -> None:
        member, _ = listener.accept()
        to_store = socket.create_connection((LOOPBACK, port_of(store)))
        back = threading.Thread(target=forward, args=(to_store, member, False), daemon=True)
        back.start()
        forward(member, to_store, True)
        to_store.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    endpoint = f"tcp://{LOOPBACK}:{listener.getsockname()[1]}"
    member = Member(replace(store.address, endpoint=endpoint), SECONDS)
    member.post("bucket/node/0", b"the first, which has been read")
    assert value_of(store, "bucket/node/0") == b"the first, which has been read"
    member.drop("bucket/node/0")
    member.close()
    thread.join(SECONDS)
    listener.close()
    assert b"which has been read" not in recorded and b"bucket" not in recorded, (
        "nor can it be read in transit"
    )
    before = store.refused
    with socket.create_connection((LOOPBACK, port_of(store)), timeout=SECONDS) as connection:
        connection.sendall(bytes(recorded))
        wait_until(lambda: store.refused > before)
    assert value_of(store, "bucket/node/0", seconds=0.3) is None


def test_on_one_machine_a_transfer_listens_only_on_loopback(store: TransferStore) -> None:
    """Neither the store nor gloo's connections listen on other interfaces."""
    before = listening()
    transfer_group = TransferGroup("gloo", store.address, {0: Receiver(1, ("node",))}, SECONDS)
    with ThreadPoolExecutor(2) as pool:
        links = [pool.submit(join, transfer_group, rank=rank, device=CPU, key="node") for rank in (0, 1)]
        ends = [link.result(SECONDS) for link in links]
    assert {host for host, _ in listening()} - {host for host, _ in before} <= {LOOPBACK}
    assert (LOOPBACK, port_of(store)) in listening()
    for host in other_addresses():
        with pytest.raises(OSError):
            socket.create_connection((host, port_of(store)), timeout=5).close()
    for end in ends:
        end.end("done")


def listening() -> set[tuple[str, int]]:
    connections = psutil.Process().net_connections(kind="tcp")
    return {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}


def other_addresses() -> list[str]:
    """127.0.0.2 is an address of every Linux machine."""
    outside = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    return ["127.0.0.2", *outside]


def test_a_foreign_address_is_an_error_and_not_replaced_by_all_interfaces() -> None:
    with pytest.raises(TransferFailed, match=r"cannot listen on 203\.0\.113\.7"):
        TransferStore("203.0.113.7")


def test_keys_are_not_part_of_any_repr(store: TransferStore) -> None:
    transfer_group = TransferGroup("ipc", store.address, {}, 1.0)
    for key in (store.address.store_key, store.address.member_key, store.address.member_secret):
        assert key.decode() not in repr(transfer_group) + str(store.address)
    again = TransferStore()
    assert again.address.member_secret != store.address.member_secret, "made for one store alone"
    again.close()


def test_members_are_notified_when_the_sender_is_gone(store: TransferStore) -> None:
    member = Member(store.address, SECONDS)
    store.close()
    wait_until(lambda: member.pump(0.01) is None and member.end_reason is not None)
    assert member.end_reason == SENDER_GONE
    member.close()


@pytest.mark.parametrize(
    "change, why",
    [
        ({"pid": -1}, "whose pid is -1"),
        ({"pid": True}, "whose pid is True"),
        ({"file": "../../../etc/passwd"}, "whose file is"),
        ({"more": 1}, "fields"),
        ({"memory": "cuda"}, "not one of a memory file"),
    ],
)
def test_handles_of_shared_memory_are_checked_field_by_field(change: dict[str, Any], why: str) -> None:
    buffer = SharedBuffer(8, CPU)
    fields = json.loads(buffer.handle)
    assert fields == {"memory": "file", "pid": os.getpid(), "file": fields["file"]}
    with pytest.raises(ValueError, match=why):
        attach(json.dumps(fields | change).encode(), CPU, 8)


def test_only_a_memory_file_of_the_right_size_is_mapped(tmp_path: Path) -> None:
    """Mapping must neither extend a shorter file nor accept any file that is named."""
    buffer = SharedBuffer(8, CPU)
    with pytest.raises(ValueError, match=r"has 8 bytes of user \d+, not 16"):
        attach(buffer.handle, CPU, 16)
    with (tmp_path / "precious").open("w+") as file:
        named = json.dumps({"memory": "file", "pid": os.getpid(), "file": file.fileno()}).encode()
        with pytest.raises(ValueError, match="is not a memory file of weights"):
            attach(named, CPU, 8)
        assert os.fstat(file.fileno()).st_size == 0
    for handle in (b"[1]", b"x" * 300_000, b"\xff\xfe"):
        with pytest.raises(ValueError, match="a handle"):
            attach(handle, CPU, 8)


GOOD = TensorSlice("w", "float32", (2, 3), 0, 24)


@pytest.mark.parametrize(
    "bad, why",
    [
        (replace(GOOD, dtype="load"), "'load' is not a dtype"),
        (replace(GOOD, shape=(2, -3)), "is not a shape"),
        (replace(GOOD, num_bytes=10**12), "not 24"),
        (replace(GOOD, offset_bytes=16), "the previous tensor ends at 0"),
        (replace(GOOD, offset_bytes=8), "not a multiple of 16"),
    ],
)
def test_slices_are_validated_before_allocation(bad: TensorSlice, why: str) -> None:
    check([GOOD, replace(GOOD, offset_bytes=32), replace(GOOD, shape=(), num_bytes=4, offset_bytes=64)])
    with pytest.raises(ValueError, match=why):
        check([bad])
