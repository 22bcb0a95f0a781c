"""Hosts of their own on one machine: Linux namespaces joined by a bridge, with an sshd in each.

A host has its own network, host name, processes, mounts and shared memory; files are shared, as on
a cluster with one file system, unless `Host.put` lays other ones over them. The bridge is in a
network namespace too. No namespace has a name: it lives as long as its first process, and the
kernel kills that one when the test run ends, in whatever way. So nothing can be left behind, and
nothing of the system is changed.
"""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
INTERFACE = "eth0"
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # not every root has these two, where `ip` is
_TOOLS = {**os.environ, "PATH": _PATH}
_NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")
_LAUNCHERS_OWN = r"(RANK|WORLD_SIZE|LOCAL_|MASTER_|SLURM|OMPI_|PMI|TORCHELASTIC|PDSH_|GLOO_)"

_SSH_CONFIG = """\
Host *
  BatchMode yes
  ConnectTimeout 5
  IdentityFile /etc/ssh/key
  LogLevel ERROR
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
"""
_SSHD_CONFIG = """\
AuthorizedKeysFile /etc/ssh/key.pub
HostKey /etc/ssh/key
MaxStartups 100
PermitRootLogin prohibit-password
StrictModes no
UseDNS no
UsePAM no
"""
# The first process of a host: makes it what it is, and goes on as the sshd that reaps all others.
_BOOT = """\
set -e
hostname "$1"
ip link set lo up
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
mount --bind "$2/ssh" /etc/ssh
if [ -d ~/.ssh ]; then mount -t tmpfs none ~/.ssh; fi
mount -t tmpfs none /dev/shm
mount -t tmpfs none /run
mkdir -m 755 /run/sshd
exec "$(command -v sshd)" -D -e
"""


class NotPermittedError(Exception):
    """This machine lets us make no hosts; the message says why."""


@dataclass(frozen=True)
class Done:
    """A program that has ended.

    Attributes:
        code: exit code.
        said: stdout and stderr together.
        seconds: from its start to its end.
    """

    code: int
    said: str
    seconds: float


class Program:
    """A program that was started on a host."""

    def __init__(self, process: "subprocess.Popen[bytes]", output: Path) -> None:
        self._process, self._output, self._begin = process, output, time.monotonic()

    def said(self) -> str:
        """What it has printed so far."""
        return self._output.read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Signal the program itself; its parent, nsenter, passes nothing on."""
        (inside,) = psutil.Process(self._process.pid).children()
        inside.send_signal(number)

    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait(self, *, timeout_s: float) -> Done:
        """Wait for its end; one that does not come in time is a failure."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end in {timeout_s} s\n{self.said()[-6000:]}") from None
        return Done(code, self.said(), time.monotonic() - self._begin)


class Host:
    """One host; `Cluster` makes it and plugs it in."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self._folder = name, address, folder
        self._holder = _hold(
            [*_NAMESPACES, "--mount-proc"],
            ["bash", "-c", _BOOT, "boot", name, str(folder)],
            folder / f"{name}.sshd.txt",
        )
        self._numbers = itertools.count(1)

    @property
    def init(self) -> int:
        """Its first process, as the machine numbers it."""
        return _first_process(self._holder)

    def start(self, words: Sequence[str], **variables: str) -> Program:
        """Start a program in the home directory; `variables` are added to its environment."""
        output = self._folder / f"{self.name}.{next(self._numbers)}.txt"
        home = self._folder / "home"
        programs = f"{Path(sys.executable).parent}:{_PATH}"
        kept = {k: v for k, v in os.environ.items() if not re.match(_LAUNCHERS_OWN, k)}
        ours = {"HOME": str(home), "PATH": programs, "PYTHONPATH": str(ROOT)}
        with output.open("w") as file:
            process = subprocess.Popen(
                [*_enter(self.init, *_NAMESPACES), "env", f"--chdir={home}", *words],
                env={**kept, **ours, "OMP_NUM_THREADS": "1", **variables},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        return Program(process, output)

    def run(self, words: Sequence[str], *, timeout_s: float = 100.0, **variables: str) -> Done:
        """Start a program and wait for its end."""
        return self.start(words, **variables).wait(timeout_s=timeout_s)

    def plug(self, *, connected: bool) -> None:
        """Join the host to the network or cut its link; nobody is told of a cut."""
        state = "up" if connected else "down"
        _do([*_enter(self.init, "--net"), "ip", "link", "set", INTERFACE, state])

    @contextlib.contextmanager
    def put(self, source: Path, *, over: Path) -> Iterator[None]:
        """Lay a file or directory over another one, on this host alone."""
        mounts = _enter(self.init, "--mount", "--pid")  # umount looks itself up in /proc
        _do([*mounts, "mount", "--bind", str(source), str(over)])
        try:
            yield
        finally:
            _do([*mounts, "umount", "--lazy", str(over)])

    def processes(self) -> list[psutil.Process]:
        """All that live on this host, without sshd and its sessions."""
        own = _pid_namespace(self.init)
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, PermissionError):
                is_here = _pid_namespace(process.pid) == own
                lives = process.status() != psutil.STATUS_ZOMBIE
                if is_here and lives and process.name() not in ("sshd", "nsenter"):
                    found.append(process)
        return found

    def kill_all(self, *, sessions: bool = False) -> None:
        """Kill every process on this host but the first, and with `sessions` those of sshd too."""
        while found := self.processes():
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.02)
        if sessions:
            for session in psutil.Process(self.init).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    session.kill()

    def power_off(self) -> None:
        """Kill the first process, and with it all others and the network."""
        self._holder.kill()
        self._holder.wait()


class Cluster:
    """Some hosts named node1, node2 ... on one network, which reach each other by ssh."""

    def __init__(self, folder: Path, *, size: int) -> None:
        """Make the hosts.

        Args:
            folder: for keys, settings and outputs; "home" in it is the home directory.
            size: how many.

        Raises:
            NotPermittedError: namespaces or sshd are not permitted here.
        """
        self.folder = folder
        names = {f"node{i}": f"10.77.0.{i}" for i in range(1, size + 1)}
        _write_settings(folder, names)
        self._switch = _hold(["--net"], ["sleep", "infinity"], folder / "switch.txt")
        self.hosts: list[Host] = []
        try:
            switch = [*_enter(_first_process(self._switch), "--net"), "ip"]
            _do([*switch, "link", "add", "bridge", "type", "bridge"])
            _do([*switch, "link", "set", "bridge", "up"])
            for name, address in names.items():
                self.hosts.append(Host(name, address, folder))
                _connect(self.hosts[-1], switch)
            for host in self.hosts:
                self._wait_for_ssh(host)
        except NotPermittedError:
            self.close()
            raise

    def close(self) -> None:
        """End everything on all hosts, and the hosts."""
        for host in self.hosts:
            host.power_off()
        self._switch.kill()
        self._switch.wait()

    def clear(self) -> None:
        """Make the hosts idle and connected again."""
        for host in self.hosts:
            host.kill_all(sessions=True)
            host.plug(connected=True)

    def left_behind(self, *, timeout_s: float = 60.0) -> dict[str, list[str]]:
        """Host -> command lines of what still runs there after some time; empty: all is gone."""
        end = time.monotonic() + timeout_s
        while any(host.processes() for host in self.hosts) and time.monotonic() < end:
            time.sleep(0.2)
        found = {}
        for host in self.hosts:
            if processes := host.processes():
                found[host.name] = [" ".join(process.cmdline()) for process in processes]
        return found

    def hostfile(self, *names: str) -> Path:
        """A DeepSpeed hostfile with one slot for each host, or each of `names`."""
        path = self.folder / "home" / "hostfile"
        chosen = names or [host.name for host in self.hosts]
        path.write_text("".join(f"{name} slots=1\n" for name in chosen))
        return path

    def _wait_for_ssh(self, host: Host) -> None:
        end = time.monotonic() + 200
        while (done := self.hosts[0].run(["ssh", host.name, "hostname"])).code:
            if time.monotonic() > end:
                log = (self.folder / f"{host.name}.sshd.txt").read_text()
                raise NotPermittedError(f"no ssh to {host.name}: {done.said}{log}"[-800:])
            time.sleep(0.1)
        assert done.said.strip() == host.name, done.said


def _write_settings(folder: Path, names: dict[str, str]) -> None:
    """What is laid over the hosts' /etc, and their home directory."""
    (folder / "ssh").mkdir()
    (folder / "home").mkdir()
    (folder / "ssh" / "ssh_config").write_text(_SSH_CONFIG)
    (folder / "ssh" / "sshd_config").write_text(_SSHD_CONFIG)
    key = str(folder / "ssh" / "key")
    _do(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key])
    lines = [f"{address} {name}\n" for name, address in names.items()]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    # no name server is in reach, and each question to one would take half a minute
    (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")


def _connect(host: Host, switch: Sequence[str]) -> None:
    port = f"to-{host.name}"
    end = ["peer", "name", INTERFACE, "netns", str(host.init)]
    _do([*switch, "link", "add", port, "type", "veth", *end])
    _do([*switch, "link", "set", port, "master", "bridge", "up"])
    inside = [*_enter(host.init, "--net"), "ip"]
    _do([*inside, "address", "add", f"{host.address}/24", "dev", INTERFACE])
    host.plug(connected=True)


def _hold(
    namespaces: Sequence[str], words: Sequence[str], output: Path
) -> "subprocess.Popen[bytes]":
    """Start a program in new namespaces; it and all in them die with this process."""
    with output.open("w") as file:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", "unshare", "--kill-child", *namespaces, *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=_TOOLS,
        )


def _first_process(holder: "subprocess.Popen[bytes]") -> int:
    """The child of `unshare`."""
    end = time.monotonic() + 100
    while holder.poll() is None and time.monotonic() < end:
        for child in psutil.Process(holder.pid).children():
            if child.name() != "unshare":  # it has its namespaces, and is what it is to be
                return child.pid
        time.sleep(0.01)
    raise NotPermittedError("a namespace could not be made, or its first process has ended")


def _enter(pid: int, *namespaces: str) -> list[str]:
    return ["nsenter", f"--target={pid}", *namespaces]


def _pid_namespace(pid: int) -> int:
    return Path(f"/proc/{pid}/ns/pid").stat().st_ino


def _do(words: Sequence[str]) -> None:
    """Run a tool that takes no time.

    Raises:
        NotPermittedError: it failed.
    """
    done = subprocess.run(
        words, env=_TOOLS, capture_output=True, text=True, timeout=200, check=False
    )
    if done.returncode:
        raise NotPermittedError(f"{' '.join(words)}: {done.stderr.strip()}")


def require_permission(*, slurm: bool = False) -> None:
    """Install what the hosts are made of, where it is missing.

    Raises:
        NotPermittedError: no root, no namespaces or no packages.
    """
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        raise NotPermittedError("network namespaces need Linux and root")
    if shutil.which("unshare"):
        _do(["unshare", *_NAMESPACES, "--fork", "--mount-proc", "true"])
    script = Path(__file__).with_name("install.sh")
    words = [str(script), "--slurm"] if slurm else [str(script)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=850, check=False)
    except subprocess.TimeoutExpired as error:
        raise NotPermittedError(f"packages were not installed in {error.timeout:.0f} s") from None
    if done.returncode:
        raise NotPermittedError(done.stderr.strip()[-500:])
