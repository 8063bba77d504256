"""A process that holds what CRIU restores in other ways than plain memory, for the tests to move.

    python3 holder.py REPORT WHAT...

WHAT is any of
  rules       nftables rules in its network namespace, which should be its own
  connection  an established TCP connection with itself, with bytes in it that nobody has read
  private, private-memfd, shared, shared-memfd
              memory in huge pages, mapped in that way

It writes the file REPORT when it is ready, and again at each SIGUSR1: a JSON object that says of each what has become of it.
"""

import json
import mmap
import os
import signal
import socket
import subprocess
import sys

MAP_HUGETLB = 0x40000
HUGE = 2 << 20
PATTERN = b"".join(number.to_bytes(8, "little") for number in range(1, 2 * HUGE // 8 + 1))


def nft(*words):
    done = subprocess.run(["nft", *words], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


class Rules:
    def __init__(self):
        nft("add", "table", "ip", "held")
        nft("add", "chain", "ip", "held", "input", "{ type filter hook input priority 0; }")
        nft("add", "rule", "ip", "held", "input", "tcp", "dport", "4711", "drop")

    def report(self):
        return "tcp dport 4711 drop" in nft("list", "ruleset")


class Connection:
    def __init__(self):
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.here = socket.create_connection(server.getsockname())
            self.there, _ = server.accept()
        for end in (self.here, self.there):
            end.settimeout(10)
        self.sent = 0
        self.send()

    def send(self):
        self.here.sendall(b"%8d" % self.sent)
        self.sent += 1

    def report(self):
        """What has come: what was sent at the last report. Then more is sent."""
        came = b""
        try:
            while len(came) < 8:
                part = self.there.recv(8 - len(came))
                if not part:
                    return False
                came += part
            expected = b"%8d" % (self.sent - 1)
            self.send()
        except OSError as error:
            return str(error)
        return came == expected


class Huge:
    def __init__(self, flags, memfd):
        self.fd = -1
        if memfd:
            self.fd = os.memfd_create("huge", os.MFD_HUGETLB)
            os.ftruncate(self.fd, len(PATTERN))
        else:
            flags |= mmap.MAP_ANONYMOUS | MAP_HUGETLB
        self.memory = mmap.mmap(self.fd, len(PATTERN), flags=flags)
        self.memory[:] = PATTERN

    def report(self):
        return self.memory[:] == PATTERN


KINDS = {
    "rules": Rules,
    "connection": Connection,
    "private": lambda: Huge(mmap.MAP_PRIVATE, False),
    "private-memfd": lambda: Huge(mmap.MAP_PRIVATE, True),
    "shared": lambda: Huge(mmap.MAP_SHARED, False),
    "shared-memfd": lambda: Huge(mmap.MAP_SHARED, True),
}


def main():
    path, *what = sys.argv[1:]
    held = {name: KINDS[name]() for name in what}

    def report(*_):
        with open(path + ".new", "w") as file:
            json.dump({name: thing.report() for name, thing in held.items()}, file)
        os.rename(path + ".new", path)

    signal.signal(signal.SIGUSR1, report)
    report()
    while True:
        signal.pause()


main()
