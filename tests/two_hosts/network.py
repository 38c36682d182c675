"""Network name spaces as hosts, joined by a cable that can be pulled."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# In name spaces of its own: a host's name, and who has which address. `ip netns exec` makes the one
# of mounts, so that nobody else's /etc/hosts changes.
AT_HOME = (
    "unshare", "--uts", "sh", "-ec",
    'echo "$0" >/proc/sys/kernel/hostname; mount --bind "$1" /etc/hosts; shift; exec "$@"',
)  # fmt: skip


@dataclass(frozen=True)
class Host:
    """A host of the run.

    Attributes:
        name: As it calls itself.
        space: Its network name space.
        card: Its end of the cable.
        address: In the network that both share.
        hosts: A file with the addresses of both.
    """

    name: str
    space: str
    card: str
    address: str
    hosts: Path

    def start(self, command: Sequence[str], folder: Path) -> subprocess.Popen[str]:
        """A command on this host; what it says goes to one pipe."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.space, *AT_HOME, self.name, str(self.hosts), *command],
            cwd=folder,
            env={**os.environ, "GLOO_SOCKET_IFNAME": self.card},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def plug(self, *, into: bool) -> None:
        """Plug the cable in, or pull it."""
        _call("ip", "-n", self.space, "link", "set", self.card, "up" if into else "down")


def missing() -> str:
    """What is wanting for this here; "" if nothing is."""
    if sys.platform != "linux":
        return "network name spaces are Linux's"
    try:
        with joined():
            return ""
    except (OSError, subprocess.SubprocessError) as error:
        told = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        return f"network name spaces cannot be made here (needs root and iproute2): {told}"


@contextmanager
def joined() -> Iterator[tuple[Host, Host]]:
    """Within this context there are two hosts that reach each other."""
    number = os.getpid()
    addresses = {"a": "10.77.0.1", "b": "10.77.0.2"}
    lines = [f"{address} machine-{letter}" for letter, address in addresses.items()]
    names = Path(tempfile.mkdtemp()) / "hosts"
    names.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]), encoding="utf-8")
    first, second = (
        Host(
            f"machine-{letter}", f"lora-{number}-{letter}", f"lora{letter}{number}", address, names
        )
        for letter, address in addresses.items()
    )
    try:
        for host in (first, second):
            _call("ip", "netns", "add", host.space)
            _call("ip", "-n", host.space, "link", "set", "lo", "up")
        _call("ip", "link", "add", first.card, "netns", first.space, "type", "veth",
              "peer", "name", second.card, "netns", second.space)  # fmt: skip
        for host in (first, second):
            _call("ip", "-n", host.space, "address", "add", f"{host.address}/24", "dev", host.card)
            host.plug(into=True)
            alive = host.start(["true"], Path.cwd())
            if alive.wait(20) != 0:
                raise OSError(alive.communicate()[0])
        yield first, second
    finally:
        shutil.rmtree(names.parent)
        for host in (first, second):
            _remove(host.space)


def _remove(space: str) -> None:
    """A name space, and whatever still runs in it."""
    found = subprocess.run(
        ["ip", "netns", "pids", space], capture_output=True, encoding="utf-8", check=False
    )
    for pid in map(int, found.stdout.split()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)


def _call(*command: str) -> None:
    subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=True)
