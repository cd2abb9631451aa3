"""An internet of the tests' own: a server in one network namespace, and an engine in another, which sees no more.

Addresses that look public lead to the server, and so do some that are closed: whatever reaches one of those is an
escape. Nothing leaves this machine, and all of it ends with the two processes.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import own_state
from tests.machine import EngineProcess

SITE, OTHER, SITE_6 = "8.8.4.4", "9.9.9.9", "2606:4700::1111"
"""Where the server is, as far as sandboxes should know."""

ENGINE, ENGINE_6 = "8.8.4.1", "2606:4700::1"
"""The engine's own addresses, public ones."""

CLOSED = (
    "10.1.2.3",
    "172.16.5.5",
    "192.168.7.7",
    "100.100.100.200",
    "169.254.169.254",
    "168.63.129.16",
    "192.0.2.80",
    "fd00:ec2::254",
    "fec0::1",
)
"""Where it is as well, and must never be found."""

NAMES = {
    "site.test": (SITE,),
    "six.test": (SITE_6,),
    "inner.test": ("10.1.2.3",),
    "mixed.test": ("10.1.2.3", SITE),
    "metadata.test": ("169.254.169.254", "fd00:ec2::254"),
    "own.test": (ENGINE,),
}

_SERVER = """
import http.server, json, socket, sys, threading
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = json.dumps({"path": self.path, "host": self.headers["Host"], "at": self.connection.getsockname()[0],
                           "connection": self.headers["Connection"], "proxy": self.headers["Proxy-Connection"]})
        if self.path.startswith("/big"):
            body = "x" * (32 << 20)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(str(len(body)))))
        self.end_headers()
        self.wfile.write(str(len(body)).encode())
    def log_message(self, *_):
        print(self.connection.getsockname()[0], self.path, flush=True)
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    def server_bind(self):
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()
def echo():
    listening = socket.create_server(("0.0.0.0", 7000))
    while True:
        connection, _ = listening.accept()
        def talk(connection=connection):
            while data := connection.recv(65536):
                connection.sendall(data)
        threading.Thread(target=talk, daemon=True).start()
threading.Thread(target=echo, daemon=True).start()
server = Server(("::", 80), Handler)
print("ready", flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def engine_with_internet(*options: str) -> Iterator[tuple[EngineProcess, Path]]:
    """An engine whose host has nothing but that internet, and the server's log: a line for each request."""
    with own_state() as state:
        log, hosts = state / "server.log", state / "hosts"
        hosts.write_text("".join(f"{address} {name}\n" for name, where in NAMES.items() for address in where))
        with log.open("wb") as out:
            server = subprocess.Popen(["unshare", "--net", sys.executable, "-c", _SERVER], stdout=out, stderr=out)
        try:
            while "ready" not in log.read_text():
                assert server.poll() is None, log.read_text()
                time.sleep(0.02)
            prefix = ("unshare", "--net", "--mount", "sh", "-ec", _joined(server.pid, hosts), "sh")
            engine = EngineProcess(state, prefix=prefix, options=options).start()
            try:
                yield engine, log
            finally:
                if engine.process is None or engine.process.poll() is not None:
                    engine.start()
                engine.clear()
                engine.stop()
                assert engine.containers() == []
        finally:
            server.kill()
            server.wait()


def _joined(server: int, hosts: Path) -> str:
    """A script that joins its network namespace to the server's, then becomes the engine."""
    there = [f"{each}/{128 if ':' in each else 32}" for each in (SITE, OTHER, SITE_6, *CLOSED)]
    inside = ["ip link set lo up", "ip link set inside up"]
    inside += [f"ip addr add {each} dev inside {'nodad' if ':' in each else ''}" for each in there]
    inside += [f"ip route add {ENGINE}/32 dev inside", f"ip -6 route add {ENGINE_6}/128 dev inside"]
    # An engine that was killed leaves its end behind for as long as its sandboxes live.
    own = [f"nsenter --net=/proc/{server}/ns/net ip link del inside 2>/dev/null || true"]
    own += ["ip link set lo up", f"ip link add outside type veth peer name inside netns {server}"]
    own += [f"ip addr add {ENGINE}/32 dev outside", f"ip addr add {ENGINE_6}/128 dev outside nodad"]
    own += ["ip link set outside up", f"nsenter --net=/proc/{server}/ns/net sh -ec '{'; '.join(inside)}'"]
    own += [f"ip {'-6' if ':' in each else ''} route add {each} dev outside" for each in there]
    own += [f"mount --bind {hosts} /etc/hosts", "mount --bind /dev/null /etc/resolv.conf"]
    return "\n".join([*own, 'exec "$@"'])
