"""Authenticated key-value store for the rendezvous of a transfer group.

Rank 0 of the trainers opens it on one address. Members post small values under keys and receive the values of
keys that they requested as soon as these are posted. A member that fails ends the transfer for all members,
with a reason.

Connections use CurveZMQ (https://rfc.zeromq.org/spec/26/): both ends prove keys that are generated for this
store alone, and every message is encrypted, authenticated and numbered, so that an unauthorised process can
neither read, inject nor replay messages. The keys are passed in an `Address` as arguments of Ray actor calls,
not in a file, an environment variable or a log. Refused connections are counted. Messages are frames of
bytes: nothing is unpickled.
"""

from __future__ import annotations

import logging
import queue
import secrets
import socket
import threading
import time
import weakref
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from rayrlhf.weights.transfer_failure import TransferFailed

LOOPBACK = "127.0.0.1"
SENDER_GONE = "the sender, rank 0 of the trainers, is gone"
MAX_MESSAGE_BYTES = 2**20
MAX_KEY_BYTES = 512
HANDSHAKE_SECONDS = 30.0  # then the connection is closed; a busy process may need several seconds
HEARTBEAT_SECONDS, SILENT_SECONDS = 5.0, 30.0  # answered by libzmq's thread, also in a busy process
LINGER_SECONDS = 1.0  # to deliver the last messages
REASON_SECONDS = 1.0  # to receive the end reason from the store

Event: Any = zmq.Event
FAILURES = Event.HANDSHAKE_FAILED_NO_DETAIL | Event.HANDSHAKE_FAILED_PROTOCOL | Event.HANDSHAKE_FAILED_AUTH
HANDSHAKES = Event.ACCEPTED | Event.HANDSHAKE_SUCCEEDED | FAILURES
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Address:
    """Endpoint of a store and the keys to connect to it. The keys are not part of its repr."""

    endpoint: str  # tcp://127.0.0.1:41234
    store_key: bytes = field(repr=False)  # the store's public key
    member_key: bytes = field(repr=False)  # shared by all members
    member_secret: bytes = field(repr=False)

    @property
    def host(self) -> str:
        return self.endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")


class TransferStore:
    """Runs in a separate thread until `close`."""

    def __init__(self, host: str = LOOPBACK) -> None:
        """Listen on this address of the machine only. Raises `TransferFailed` if that is not possible."""
        self.last_refusal = ""
        self._unauthorised = 0  # accepted connections minus successful handshakes
        self._invalid_messages = 0  # messages outside the protocol
        self._failures = 0
        self._values: dict[bytes, bytes] = {}
        self._requested: defaultdict[bytes, set[bytes]] = defaultdict(set)  # key -> members that wait for it
        self._members: set[bytes] = set()
        self._end_reason: bytes | None = None
        self._context = zmq.Context()
        public, secret = zmq.curve_keypair()
        member_public, member_secret = zmq.curve_keypair()
        self._member_key = z85.decode(member_public)
        self._router = self._context.socket(zmq.ROUTER)
        _set_options(self._router, host)
        self._router.setsockopt(zmq.CURVE_SERVER, 1)
        self._router.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self._router.setsockopt(zmq.ZAP_DOMAIN, b"transfer")
        self._zap = self._context.socket(zmq.REP)
        self._zap.bind("inproc://zeromq.zap.01")  # https://rfc.zeromq.org/spec/27/
        self._handshakes: Any = self._router.get_monitor_socket(HANDSHAKES)
        self._end_reasons: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._commands = self._context.socket(zmq.PAIR)
        self._commands.bind("inproc://commands")
        self._command_sender = self._context.socket(zmq.PAIR)
        self._command_sender.connect("inproc://commands")
        self._lock = threading.Lock()
        try:
            self._router.bind(f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise TransferFailed(f"the transfer store cannot listen on {host}: {error}") from error
        endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self.address = Address(endpoint, public, member_public, member_secret)
        self._thread = threading.Thread(target=self._serve, daemon=True, name="transfer-store")
        self._thread.start()

    def end(self, reason: str) -> None:
        """End the transfer for all members; only the first reason is kept."""
        self._end_reasons.put(reason)
        with self._lock:
            if not self._command_sender.closed:
                self._command_sender.send(b"end")

    def close(self) -> None:
        """Close the store. Connected members receive `SENDER_GONE` as end reason."""
        with self._lock:
            if self._command_sender.closed:
                return
            self._command_sender.send(b"close")
            self._command_sender.close(linger=-1)
        self._thread.join(LINGER_SECONDS + 5)

    def _serve(self) -> None:
        handlers = {
            self._router: lambda: self._answer(self._router.recv_multipart()),
            self._zap: lambda: self._zap.send_multipart(self._authenticate(self._zap.recv_multipart())),
            self._handshakes: self._count_handshake,
        }
        poller = zmq.Poller()
        for end in (*handlers, self._commands):
            poller.register(end, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if self._commands in ready:
                    if self._commands.recv() == b"close":
                        break
                    self._end(self._end_reasons.get().encode())
                for end, handle in handlers.items():
                    if end in ready:
                        handle()
        finally:
            self._end(SENDER_GONE.encode())
            self._router.disable_monitor()
            self._context.destroy(linger=int(LINGER_SECONDS * 1000))

    def _authenticate(self, request: list[bytes]) -> list[bytes]:
        """Answer a ZAP request: accept the connection if it has the member key."""
        version, number, _domain, address, _identity, mechanism, *credentials = request
        is_curve = mechanism == b"CURVE" and len(credentials) == 1
        if is_curve and secrets.compare_digest(credentials[0], self._member_key):
            return [version, number, b"200", b"OK", b"", b""]
        logger.debug("refused an unauthorised connection from %s", address)
        return [version, number, b"400", b"not a member of this transfer", b"", b""]

    @property
    def refused(self) -> int:
        """Number of unauthorised connections, including those that sent nothing, and of invalid messages."""
        return self._unauthorised + self._invalid_messages

    def _count_handshake(self) -> None:
        kind = Event(recv_monitor_message(self._handshakes)["event"])
        if kind == Event.ACCEPTED:
            self._unauthorised += 1
        elif kind == Event.HANDSHAKE_SUCCEEDED:
            self._unauthorised -= 1
        else:
            self._report(f"a connection without the keys of this transfer ({kind.name})")

    def _report(self, what: str) -> None:
        self.last_refusal = what
        self._failures += 1
        if self._failures & (self._failures - 1) == 0:  # 1, 2, 4, …: an attacker cannot fill a disk with it
            logger.warning("%s: refused %s; %d so far", self.address.endpoint, what, self._failures)

    def _answer(self, frames: list[bytes]) -> None:
        match frames:
            case [member, b"hello"]:
                self._members.add(member)
                self._router.send_multipart([member, b"welcome"])
                if self._end_reason is not None:
                    self._router.send_multipart([member, b"ended", self._end_reason])
            case [_, b"post", key, value] if len(key) <= MAX_KEY_BYTES:
                self._values[key] = value
                for member in self._requested.pop(key, ()):
                    self._router.send_multipart([member, b"value", key, value])
            case [member, b"ask", key] if len(key) <= MAX_KEY_BYTES:
                if key in self._values:
                    self._router.send_multipart([member, b"value", key, self._values[key]])
                else:
                    self._requested[key].add(member)
            case [_, b"drop", key]:
                self._values.pop(key, None)
            case [_, b"end", reason]:
                self._end(reason)
            case _:
                self._invalid_messages += 1
                self._report("a message outside the protocol")

    def _end(self, reason: bytes) -> None:
        if self._end_reason is not None:
            return
        self._end_reason = reason
        for member in self._members:
            self._router.send_multipart([member, b"ended", reason])


class Member:
    """Client connection of a group member to a transfer store. Thread-safe."""

    def __init__(self, address: Address, timeout_seconds: float) -> None:
        """Connect. Raises `TransferFailed` after `timeout_seconds`."""
        self.address = address
        self.end_reason: str | None = None  # set once the transfer has ended
        self.values: dict[str, bytes] = {}  # received values of requested keys
        self._accepted = False
        self._lock = threading.RLock()
        context = zmq.Context()
        self._socket = context.socket(zmq.DEALER)
        _set_options(self._socket, address.host)
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, address.store_key)
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, address.member_key)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, address.member_secret)
        self._lost: Any = self._socket.get_monitor_socket(Event.DISCONNECTED)
        # Also without `close`: a context that is collected blocks until its sockets are closed.
        self._close = weakref.finalize(self, _close_all, context, self._socket, self._lost)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._lost, zmq.POLLIN)
        self._socket.connect(address.endpoint)
        self._send(b"hello")
        deadline = time.monotonic() + timeout_seconds
        while not self._accepted:
            left = deadline - time.monotonic()
            if left <= 0:
                self.close()
                raise TransferFailed(
                    f"the transfer store at {address.endpoint} did not answer within {timeout_seconds:g} s"
                )
            self.pump(left)

    def post(self, key: str, value: bytes = b"") -> None:
        self._send(b"post", key.encode(), value)

    def ask(self, key: str) -> None:
        """Request a key; its value appears in `values` once it has been posted."""
        self._send(b"ask", key.encode())

    def drop(self, key: str) -> None:
        """Delete a key that no member will request again."""
        self.values.pop(key, None)
        self._send(b"drop", key.encode())

    def end(self, reason: str) -> str:
        """End the transfer for all members. Returns the reason; if there was an earlier one, that one."""
        self._send(b"end", reason.encode())
        deadline = time.monotonic() + REASON_SECONDS
        while self.end_reason is None and self._close.alive and time.monotonic() < deadline:
            self.pump(0.1)
        return self.end_reason or reason

    def pump(self, seconds: float) -> None:
        """Process messages that have arrived or arrive within `seconds`."""
        with self._lock:
            if not self._close.alive:
                return
            ready = dict(self._poller.poll(max(0, int(seconds * 1000))))
            while self._socket in ready and int(self._socket.EVENTS) & int(zmq.POLLIN):
                self._take(self._socket.recv_multipart())
            if self._lost in ready:
                recv_monitor_message(self._lost)
                # Before the welcome, the port refused the connection, and libzmq retries.
                if self._accepted and self.end_reason is None:
                    self.end_reason = SENDER_GONE

    def close(self) -> None:
        with self._lock:
            if self._close.alive:
                self._close()

    def local_host(self) -> str:
        """This machine's address on the route to the store."""
        host = self.address.host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # UDP: only looks up the route
            return probe.getsockname()[0]

    def _take(self, frames: list[bytes]) -> None:
        match frames:
            case [b"welcome"]:
                self._accepted = True
            case [b"value", key, value]:
                self.values[key.decode()] = value
            case [b"ended", reason]:
                self.end_reason = self.end_reason or reason.decode(errors="replace")
            case _:
                raise TransferFailed(f"the transfer store sent {len(frames)} frames outside the protocol")

    def _send(self, *frames: bytes) -> None:
        with self._lock:
            if self._close.alive:
                self._socket.send_multipart(frames)


def _close_all(context: zmq.Context[Any], connection: zmq.Socket[Any], monitor: zmq.Socket[Any]) -> None:
    connection.disable_monitor()
    monitor.close(linger=0)
    connection.close()
    context.term()


def _set_options(end: zmq.Socket[Any], host: str) -> None:
    end.setsockopt(zmq.IPV6, int(":" in host))
    end.setsockopt(zmq.LINGER, int(LINGER_SECONDS * 1000))
    end.setsockopt(zmq.SNDHWM, 0)  # drop no message
    end.setsockopt(zmq.RCVHWM, 0)
    end.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    end.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_SECONDS * 1000))
    end.setsockopt(zmq.HEARTBEAT_IVL, int(HEARTBEAT_SECONDS * 1000))
    end.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(SILENT_SECONDS * 1000))
