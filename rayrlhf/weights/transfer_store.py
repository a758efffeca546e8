"""The store of direct pushes: a few small values through which their members find each other.

Rank 0 of the trainers opens it on one address; members post values under keys, and get those that they asked
for once they are there. A member that fails ends it for all, with a reason.

A process that reaches the port meets CurveZMQ (https://rfc.zeromq.org/spec/26/): both ends prove keys that
were made for this store alone, and every message is encrypted, authenticated and numbered, so that a stranger
can neither read nor inject nor replay. The keys travel in an `Address` as arguments of Ray's actor calls, not
in a file, an environment or a log. What is refused is counted. Messages are frames of bytes: nothing is
unpickled.
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

from rayrlhf.weights.failures import MeetingEnded

LOOPBACK = "127.0.0.1"
HOST_GONE = "its host, rank 0 of the trainers, has gone"
MAX_MESSAGE_BYTES = 2**20
MAX_KEY_BYTES = 512
HANDSHAKE_SECONDS = 30.0  # of a connection, before it is cut; a busy process needs some of them
HEARTBEAT_SECONDS, SILENT_SECONDS = 5.0, 30.0  # by libzmq's own thread: a busy process answers, too
LINGER_SECONDS = 1.0  # for the last words
REASON_SECONDS = 1.0  # for the store's word on why it ended

Event: Any = zmq.Event
FAILURES = Event.HANDSHAKE_FAILED_NO_DETAIL | Event.HANDSHAKE_FAILED_PROTOCOL | Event.HANDSHAKE_FAILED_AUTH
HANDSHAKES = Event.ACCEPTED | Event.HANDSHAKE_SUCCEEDED | FAILURES
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Address:
    """Where a store is, and the keys that open it. Neither key is part of its text."""

    endpoint: str  # tcp://127.0.0.1:41234
    store_key: bytes = field(repr=False)  # the store's public key
    member_key: bytes = field(repr=False)  # of all members alike
    member_secret: bytes = field(repr=False)

    @property
    def host(self) -> str:
        return self.endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")


class TransferStore:
    """Runs in a thread of its own until `close`."""

    def __init__(self, host: str = LOOPBACK) -> None:
        """Listens on this address of the machine alone. Raises `MeetingEnded` when it cannot."""
        self.last_refusal = ""
        self._strangers = 0  # connections made, less those that had the keys
        self._nonsense = 0  # messages of members that none of ours sends
        self._failures = 0
        self._values: dict[bytes, bytes] = {}
        self._asked: defaultdict[bytes, set[bytes]] = defaultdict(set)  # key -> members who wait for it
        self._members: set[bytes] = set()
        self._ended: bytes | None = None
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
        self._reasons: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._bell = self._context.socket(zmq.PAIR)
        self._bell.bind("inproc://bell")
        self._rope = self._context.socket(zmq.PAIR)
        self._rope.connect("inproc://bell")
        self._lock = threading.Lock()
        try:
            self._router.bind(f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise MeetingEnded(f"the store of the transfer cannot listen on {host}: {error}") from error
        endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self.address = Address(endpoint, public, member_public, member_secret)
        self._thread = threading.Thread(target=self._serve, daemon=True, name="transfer-store")
        self._thread.start()

    def end(self, why: str) -> None:
        """For all members; the first reason stays."""
        self._reasons.put(why)
        with self._lock:
            if not self._rope.closed:
                self._rope.send(b"end")

    def close(self) -> None:
        """Members that are still there learn that their host has gone."""
        with self._lock:
            if self._rope.closed:
                return
            self._rope.send(b"close")
            self._rope.close(linger=-1)
        self._thread.join(LINGER_SECONDS + 5)

    def _serve(self) -> None:
        handlers = {
            self._router: lambda: self._answer(self._router.recv_multipart()),
            self._zap: lambda: self._zap.send_multipart(self._judge(self._zap.recv_multipart())),
            self._handshakes: self._count_handshake,
        }
        poller = zmq.Poller()
        for end in (*handlers, self._bell):
            poller.register(end, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if self._bell in ready:
                    if self._bell.recv() == b"close":
                        break
                    self._end(self._reasons.get().encode())
                for end, handle in handlers.items():
                    if end in ready:
                        handle()
        finally:
            self._end(HOST_GONE.encode())
            self._router.disable_monitor()
            self._context.destroy(linger=int(LINGER_SECONDS * 1000))

    def _judge(self, request: list[bytes]) -> list[bytes]:
        """May this connection be made? A request and a reply of ZAP: the member's key decides."""
        version, number, _domain, address, _identity, mechanism, *credentials = request
        good = mechanism == b"CURVE" and len(credentials) == 1
        if good and secrets.compare_digest(credentials[0], self._member_key):
            return [version, number, b"200", b"OK", b"", b""]
        logger.debug("a stranger at %s has been refused", address)
        return [version, number, b"400", b"not a member of this transfer", b"", b""]

    @property
    def refused(self) -> int:
        """Connections of those who had no business here, silent ones too, and messages that are nonsense."""
        return self._strangers + self._nonsense

    def _count_handshake(self) -> None:
        kind = Event(recv_monitor_message(self._handshakes)["event"])
        if kind == Event.ACCEPTED:
            self._strangers += 1
        elif kind == Event.HANDSHAKE_SUCCEEDED:
            self._strangers -= 1
        else:
            self._report(f"a connection without the keys of this transfer ({kind.name})")

    def _report(self, what: str) -> None:
        self.last_refusal = what
        self._failures += 1
        if self._failures & (self._failures - 1) == 0:  # 1, 2, 4, …: nobody can fill a disk with it
            logger.warning("%s: refused %s; %d so far", self.address.endpoint, what, self._failures)

    def _answer(self, frames: list[bytes]) -> None:
        match frames:
            case [member, b"hello"]:
                self._members.add(member)
                self._router.send_multipart([member, b"welcome"])
                if self._ended is not None:
                    self._router.send_multipart([member, b"ended", self._ended])
            case [_, b"post", key, value] if len(key) <= MAX_KEY_BYTES:
                self._values[key] = value
                for member in self._asked.pop(key, ()):
                    self._router.send_multipart([member, b"value", key, value])
            case [member, b"ask", key] if len(key) <= MAX_KEY_BYTES:
                if key in self._values:
                    self._router.send_multipart([member, b"value", key, self._values[key]])
                else:
                    self._asked[key].add(member)
            case [_, b"drop", key]:
                self._values.pop(key, None)
            case [_, b"end", why]:
                self._end(why)
            case _:
                self._nonsense += 1
                self._report("a message that is none of this protocol")

    def _end(self, why: bytes) -> None:
        if self._ended is not None:
            return
        self._ended = why
        for member in self._members:
            self._router.send_multipart([member, b"ended", why])


class Member:
    """One end of a connection to a store; for any number of threads."""

    def __init__(self, address: Address, timeout_seconds: float) -> None:
        """Raises `MeetingEnded` at the deadline."""
        self.address = address
        self.ended: str | None = None
        self.values: dict[str, bytes] = {}  # that were asked for, and are there
        self._welcome = False
        self._lock = threading.RLock()
        context = zmq.Context()
        self._socket = context.socket(zmq.DEALER)
        _set_options(self._socket, address.host)
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, address.store_key)
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, address.member_key)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, address.member_secret)
        self._lost: Any = self._socket.get_monitor_socket(Event.DISCONNECTED)
        # Also where somebody forgets to close it: a context that goes waits for its sockets.
        self._close = weakref.finalize(self, _close_all, context, self._socket, self._lost)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._lost, zmq.POLLIN)
        self._socket.connect(address.endpoint)
        self._send(b"hello")
        deadline = time.monotonic() + timeout_seconds
        while not self._welcome:
            left = deadline - time.monotonic()
            if left <= 0:
                self.close()
                why = f"no answer within {timeout_seconds:g} s"
                raise MeetingEnded(f"the store of the transfer at {address.endpoint} was not reached: {why}")
            self.pump(left)

    def post(self, key: str, value: bytes = b"") -> None:
        self._send(b"post", key.encode(), value)

    def ask(self, key: str) -> None:
        """To have it in `values` as soon as it is there."""
        self._send(b"ask", key.encode())

    def drop(self, key: str) -> None:
        """Nobody will ask for it any more."""
        self.values.pop(key, None)
        self._send(b"drop", key.encode())

    def end(self, why: str) -> str:
        """For everybody; the first reason stays, and is returned."""
        self._send(b"end", why.encode())
        deadline = time.monotonic() + REASON_SECONDS
        while self.ended is None and self._close.alive and time.monotonic() < deadline:
            self.pump(0.1)
        return self.ended or why

    def pump(self, seconds: float) -> None:
        """Take in what has come, or comes in that time."""
        with self._lock:
            if not self._close.alive:
                return
            ready = dict(self._poller.poll(max(0, int(seconds * 1000))))
            while self._socket in ready and int(self._socket.EVENTS) & int(zmq.POLLIN):
                self._take(self._socket.recv_multipart())
            if self._lost in ready:
                recv_monitor_message(self._lost)
                # Before the welcome it is a port that refuses, and libzmq tries it again.
                if self._welcome and self.ended is None:
                    self.ended = HOST_GONE

    def close(self) -> None:
        with self._lock:
            if self._close.alive:
                self._close()

    def local_host(self) -> str:
        """The address of this machine on the way to the store."""
        host = self.address.host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # UDP: only looks up the route
            return probe.getsockname()[0]

    def _take(self, frames: list[bytes]) -> None:
        match frames:
            case [b"welcome"]:
                self._welcome = True
            case [b"value", key, value]:
                self.values[key.decode()] = value
            case [b"ended", why]:
                self.ended = self.ended or why.decode(errors="replace")
            case _:
                raise MeetingEnded(f"the store of the transfer sent {len(frames)} frames of another protocol")

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
    end.setsockopt(zmq.SNDHWM, 0)  # no message is dropped
    end.setsockopt(zmq.RCVHWM, 0)
    end.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    end.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_SECONDS * 1000))
    end.setsockopt(zmq.HEARTBEAT_IVL, int(HEARTBEAT_SECONDS * 1000))
    end.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(SILENT_SECONDS * 1000))
