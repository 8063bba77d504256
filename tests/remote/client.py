#!/usr/bin/env python3
"""A client of the remote protocol: images into a snapshot by name at the proxy, and out of it at the cache.

The first part (down to "The command line") can be copied into another program. It needs Python 3.9 and nothing else.
A write's bytes go on the socket; a read's come on the socket or through a pipe.
"""
from __future__ import annotations

import argparse
import errno
import os
import select
import socket
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Callable, Iterator

READ, WRITE, APPEND = 0, 1, 0o2000  # open_mode, numbers of Linux on x86
LIST = "parent"                     # the image that is a list of snapshot ids
CHUNK = 65536
TIMEOUT = 60.0                      # no call waits for the daemon longer than so many seconds


class RemoteError(OSError):
    """The daemon answered with an error: `errno`, and its reason in `strerror`."""


class ProtocolError(Exception):
    """The daemon closed the connection, or said what the protocol does not have."""


def varint(n: int) -> bytes:
    return bytes([n]) if n < 0x80 else bytes([n & 0x7f | 0x80]) + varint(n >> 7)


def field(number: int, value: int | str) -> bytes:
    """One protobuf field: a string, or a varint."""
    if isinstance(value, str):
        return varint(number << 3 | 2) + varint(len(value.encode())) + value.encode()
    return varint(number << 3) + varint(int(value))


def fields(data: bytes) -> dict[int, int | bytes]:
    """The fields of a protobuf message by number, varints and strings; no message of the protocol has others."""
    found: dict[int, int | bytes] = {}
    at = 0

    def number() -> int:
        nonlocal at
        n = shift = 0
        while at < len(data) and shift < 64:
            n |= (data[at] & 0x7f) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                return n
        raise ProtocolError("a bad protobuf message")

    while at < len(data):
        key, value = number(), number()
        if key & 7 == 2 and value <= len(data) - at:
            found[key >> 3], at = data[at:at + value], at + value
        elif key & 7 == 0:
            found[key >> 3] = value
        else:
            raise ProtocolError("a bad protobuf message")
    return found


def framed(message: bytes) -> bytes:
    return struct.pack("<I", len(message)) + message


def header(snapshot: str, name: str, mode: int, *, finish: bool = False, pipe: bool | None = None,
           acknowledge: bool = False, images: int | None = None) -> bytes:
    optional = {16: finish or None, 17: pipe, 18: acknowledge or None, 19: images}
    return framed(field(1, name) + field(2, snapshot) + field(3, mode)
                  + b"".join(field(number, value) for number, value in optional.items() if value is not None))


class Connection(socket.socket):
    """A connection to the proxy or the cache."""

    def __init__(self, path: str) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # After settimeout() a connect to a full backlog would fail with EAGAIN at once; like this it waits.
            self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(TIMEOUT) or 1, 0))
            self.connect(path)
            self.settimeout(TIMEOUT)
        except BaseException:
            self.close()
            raise

    def say(self, data: bytes, answered: bool = True) -> None:
        """Sends all of it. A daemon that has closed meanwhile has said why, if this request is `answered` at all."""
        try:
            self.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            if answered:
                self.reply()
            raise ProtocolError("refused: the daemon has closed the connection") from None

    def exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                more = self.recv(size - len(data))
            except ConnectionResetError:
                more = b""
            if not more:
                raise ProtocolError("the daemon has closed the connection")
            data += more
        return data

    def reply(self) -> int | None:
        """Waits for a reply: its size if it has one; RemoteError if it is an error."""
        length = struct.unpack("<I", self.exactly(4))[0]
        if length > 1 << 20:  # the protocol has no limit for a reply; this one is ours
            raise ProtocolError(f"a reply of {length} bytes")
        got = fields(self.exactly(length))
        error, reason, size = got.get(1), got.get(16, b""), got.get(17)
        if not isinstance(error, int) or not isinstance(reason, bytes) or isinstance(size, bytes):
            raise ProtocolError("a reply that is none")
        if error:
            raise RemoteError(error, reason.decode(errors="replace") or os.strerror(error))
        return size

    def chunks(self, snapshot: str, name: str, pipe: bool = False) -> Iterator[bytes]:
        """Reads an image. The connection can be used again after ENOENT, and after a read through a pipe."""
        self.say(header(snapshot, name, READ, pipe=pipe))
        size = left = self.reply()
        if size is None:
            raise ProtocolError("a read without its size")
        source = self.pass_pipe() if pipe else -1
        try:
            while data := self.pipe_read(source) if pipe else self.recv(CHUNK):
                left -= len(data)
                yield data
        finally:
            if pipe:
                os.close(source)
        if left:
            raise ProtocolError(f"{size} bytes were told, {size - left} came")

    def pass_pipe(self) -> int:
        """Gives the daemon the write end of a new pipe, and returns the read end."""
        source, sink = os.pipe()
        try:
            socket.send_fds(self, [b"\0"], [sink])
        except BaseException:
            os.close(source)
            raise
        finally:
            os.close(sink)
        return source

    def pipe_read(self, source: int) -> bytes:
        poll = select.poll()
        poll.register(source, select.POLLIN)
        if not poll.poll(TIMEOUT * 1000):
            raise TimeoutError("timed out")
        return os.read(source, CHUNK)

    def read(self, snapshot: str, name: str, pipe: bool = False) -> bytes:
        return b"".join(self.chunks(snapshot, name, pipe))


@contextmanager
def writing(path: str, snapshot: str, name: str, append: bool = False,
            acknowledge: bool = False) -> Iterator[Callable[[bytes], None]]:
    """Opens an image (or a list), for `with writing(...) as write:`. The end of the block ends it and, if it is
    acknowledged, waits for the cache. An exception in the block abandons it: with `acknowledge` that damages it, as it
    should; without, the proxy takes what has come for the whole image."""
    with Connection(path) as connection:
        connection.say(header(snapshot, name, APPEND if append else WRITE, acknowledge=acknowledge), acknowledge)
        if acknowledge:
            connection.reply()
        yield lambda data: connection.say(data, acknowledge)
        if acknowledge:
            connection.shutdown(socket.SHUT_WR)
            connection.reply()


def append_id(path: str, snapshot: str, list_name: str = "") -> None:
    """Appends a snapshot's id to a list, which begins the snapshot."""
    with writing(path, list_name, LIST, append=True, acknowledge=True) as write:
        write(framed(field(1, snapshot)))


def ids(path: str, list_name: str = "") -> list[str]:
    """The ids of a list, oldest first."""
    with Connection(path) as connection:
        data = connection.read(list_name, LIST)
    found = []
    while data:
        end = 4 + struct.unpack("<I", data[:4])[0] if len(data) >= 4 else 4
        entry = fields(data[4:end]).get(1)
        if end > len(data) or not isinstance(entry, bytes):
            raise ProtocolError("a bad entry in the list")
        found.append(entry.decode())
        data = data[end:]
    return found


def finish(path: str, snapshot: str, restore: bool = False, images: int | None = None) -> None:
    """Says the end of a dump (at the proxy) or of a restore (at the cache), and waits for the answer."""
    with Connection(path) as connection:
        connection.say(header(snapshot, "", READ if restore else WRITE, finish=True, acknowledge=not restore, images=images))
        connection.reply()


# The command line

SIZES = [0, 1, 100, 4096, 4097, 20000, 65536, 300000]


class Failure(Exception):
    """What `fill` and `check` found wrong."""


def image_name(s: int, k: int) -> str:
    return f"tmpfs-dev-{s}-{k}.tar.gz.img"


def content(s: int, k: int) -> bytes:
    block = bytes((s * 31 + k * 7 + j * 13) & 255 for j in range(251))
    return (block * (SIZES[k % 8] // 251 + 1))[:SIZES[k % 8]]


def every_second(k: int) -> bool:
    """Half of the images, and half of those of each size."""
    return (k + k // 8) % 2 == 1


def parallel(threads: int, count: int, work: Callable[[Iterator[int]], None]) -> None:
    """Deals the numbers below count to threads that work at once. After an error in one the others stop, too."""
    stop = threading.Event()

    def run(thread: int) -> None:
        try:
            work(k for k in range(thread, count, threads) if not stop.is_set())
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(threads)))


def check_image(connection: Connection, snapshot: str, s: int, k: int, pipe: bool = False) -> None:
    try:
        got, want = connection.read(snapshot, image_name(s, k), pipe), content(s, k)
    except (OSError, ProtocolError) as e:
        raise Failure(f"read of {snapshot} {image_name(s, k)}: {e}") from e
    if got != want:
        raise Failure(f"{snapshot} {image_name(s, k)}: {len(got)} bytes instead of {len(want)}, or other ones")


def check_missing(connection: Connection, snapshot: str, s: int) -> None:
    try:
        connection.read(snapshot, image_name(s, 10**9))
    except RemoteError as e:
        if e.errno == errno.ENOENT:
            return
        raise
    raise Failure(f"{snapshot}: an image that nobody wrote could be read")


def check_list(a: argparse.Namespace, want: list[str]) -> None:
    got = ids(a.socket, a.list)
    if got != want:
        raise Failure(f"the list {a.list!r} is {got}, not {want}")


def shares(a: argparse.Namespace) -> list[tuple[int, str, int]]:
    """Of each snapshot the number, the id, and how many images it has."""
    n = len(a.snapshots)
    return [(s, snapshot, a.images // n + (s < a.images % n)) for s, snapshot in enumerate(a.snapshots)]


def fill(a: argparse.Namespace) -> None:
    parent, size = "", 0
    for s, snapshot, count in shares(a):
        append_id(a.socket, snapshot, a.list)
        check_list(a, a.snapshots[:s + 1])

        def put(k: int, data: bytes, append: bool, acknowledge: bool) -> None:
            try:
                with writing(a.socket, snapshot, image_name(s, k), append, acknowledge) as write:
                    write(data)
            except (OSError, ProtocolError) as e:
                raise Failure(f"write of {snapshot} {image_name(s, k)}: {e}") from e

        def work(numbers: Iterator[int]) -> None:
            for k in numbers:
                data, half = content(s, k), SIZES[k % 8] // 2
                if k % 100 == 99:
                    put(k, data[:half], append=False, acknowledge=True)
                    put(k, data[half:], append=True, acknowledge=every_second(k))
                else:
                    put(k, data, append=False, acknowledge=every_second(k))

        parallel(a.connections, count, work)
        if s:
            for k in sorted({j * size // 20 for j in range(20 if size else 0)}):
                with Connection(a.socket) as connection:
                    check_image(connection, parent, s - 1, k)
            with Connection(a.socket) as connection:
                check_missing(connection, parent, s - 1)
        finish(a.socket, snapshot, images=count + count // 100)
        parent, size = snapshot, count


def check(a: argparse.Namespace) -> None:
    check_list(a, a.snapshots)
    for s, snapshot, count in shares(a):

        def work(numbers: Iterator[int]) -> None:
            with Connection(a.socket) as kept:
                for k in numbers:
                    if every_second(k):
                        check_image(kept, snapshot, s, k, pipe=True)
                    else:
                        with Connection(a.socket) as connection:
                            check_image(connection, snapshot, s, k)

        parallel(a.connections, count, work)
        with Connection(a.socket) as connection:
            check_missing(connection, snapshot, s)
            if count:
                check_image(connection, snapshot, s, count - 1)
    finish(a.socket, a.snapshots[-1], restore=True)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(64, f"{self.format_usage()}{self.prog}: {message}\n")  # not argparse's 2, which is ENOENT


def arguments() -> argparse.Namespace:
    parser = Parser(description="A client of the remote protocol.")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="how many seconds to wait for the daemon (60)")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, positional in (("fill", ""), ("check", ""), ("get", "snapshot name"), ("put", "snapshot name"), ("ids", ""),
                             ("finish", "snapshot")):
        command = commands.add_parser(name)
        for argument in ["socket"] + positional.split():
            command.add_argument(argument)
        for option in {"put": ["--append", "--acknowledge"], "finish": ["--restore"]}.get(name, []):
            command.add_argument(option, action="store_true")
        if name in ("fill", "check"):
            command.add_argument("--snapshots", nargs="+", required=True)
            command.add_argument("--connections", type=int, default=50)
        if name in ("fill", "check", "ids"):
            command.add_argument("--list", default="")
        if name in ("fill", "check", "finish"):
            command.add_argument("--images", type=int, default=None if name == "finish" else 5000)
    return parser.parse_args()


def main() -> int:
    global TIMEOUT
    a = arguments()
    TIMEOUT = a.timeout
    try:
        if a.command in ("fill", "check"):
            start = time.monotonic()
            fill(a) if a.command == "fill" else check(a)
            size = sum(SIZES[k % 8] for _, _, count in shares(a) for k in range(count))
            print(f"{a.images} images, {size} bytes, {time.monotonic() - start:.1f} s")
        elif a.command == "get":
            with Connection(a.socket) as connection:
                for data in connection.chunks(a.snapshot, a.name):
                    sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
        elif a.command == "put":
            with writing(a.socket, a.snapshot, a.name, a.append, a.acknowledge) as write:
                while data := sys.stdin.buffer.read1(CHUNK):
                    write(data)
        elif a.command == "ids":
            print("\n".join(ids(a.socket, a.list)))
        else:
            finish(a.socket, a.snapshot, a.restore, a.images)
    except RemoteError as e:
        print(f"client.py: {errno.errorcode.get(e.errno, e.errno)}: {e.strerror}", file=sys.stderr)
        return e.errno if e.errno < 256 else 1
    except (OSError, ProtocolError, Failure) as e:
        print(f"client.py: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
