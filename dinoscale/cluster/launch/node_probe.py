"""The other end of nodes.py: runs on a node and answers questions about it, a line of JSON each.

`python -m dinoscale.cluster.launch.node_probe` reads `{"ask": NAME, ...}` from stdin until it is
closed, and leaves nothing behind. It knows nothing of the other nodes.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from dinoscale.cluster.doctor.marker import Marker, look_for, remove_marker, write_marker
from dinoscale.cluster.doctor.versions import installed
from dinoscale.config import RunConfig, dump_config, load_config
from dinoscale.data.decoding.decode import Decoder
from dinoscale.data.sources.mixture import open_sources
from dinoscale.data.sources.source import open_source
from dinoscale.errors import DinoscaleError
from dinoscale.runtime.versions import commit, package_version

MARK = "dinoscale-probe "  # before each answer: the shell of a node may print lines of its own
_CONNECT_S = 5.0
_GREETING = b"dinoscale"  # else any server on that port would do


def main() -> None:
    """Answer until stdin ends."""
    with _state() as probe:
        for line in sys.stdin:
            request = json.loads(line)
            if request["ask"] == "enter":
                _start_again_with(request["variables"])
            answer = _QUESTIONS[request.pop("ask")](probe, **request)
            print(MARK + json.dumps(answer), flush=True)


def _start_again_with(variables: dict[str, str]) -> None:
    """Answer, and be a process that has these variables from its start, as the run's will.

    They come over stdin: a command line is seen by every user. Nothing of it is read ahead, since
    the next question waits for the answer.
    """
    values = {name: _of_shell(value) for name, value in variables.items()}
    print(MARK + json.dumps({}), flush=True)
    again = [sys.executable, "-m", "dinoscale.cluster.launch.node_probe"]
    os.execve(sys.executable, again, {**os.environ, **values})


def _of_shell(value: str) -> str:
    """What the shell of this node makes of a value, as it will for the run: "$(cat FILE)"."""
    if not {"$", "`"} & set(value):
        return value
    script = f'value="{value}"; printf %s "$value"'  # DeepSpeed puts it in these quotes
    done = subprocess.run(["sh"], input=script, stdout=subprocess.PIPE, text=True)
    return done.stdout


class Probe:
    """What must be undone at the end: a marker in run_dir, a port that is listened on."""

    def __init__(self) -> None:
        self.server: socket.socket | None = None
        self.made: list[Path] = []
        self.marker: Marker | None = None


@contextmanager
def _state() -> Iterator[Probe]:
    probe = Probe()
    try:
        yield probe
    finally:
        if probe.marker:
            remove_marker(Path(probe.marker.run_dir), probe.marker, probe.made)
        if probe.server:
            probe.server.close()


def _clock(_probe: Probe) -> dict[str, float]:
    return {"time": time.time()}


def _look(_probe: Probe, config: str, overrides: list[str]) -> dict[str, Any]:
    """Versions, accelerators and what the configuration says here."""
    num_devices, why_no_torch = _count_devices()
    return {
        "versions": {**installed(), "dinoscale": package_version("dinoscale"), "code": code()},
        "num_devices": num_devices,
        "why_no_torch": why_no_torch,
        "config": _read_config(config, overrides),
        "missing_interfaces": _missing_interfaces(),
        "own_address": _own_address(),
    }


def _count_devices() -> tuple[int, str | None]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return 0, (str(error).splitlines() or ["unknown reason"])[0][:200]
    return torch.cuda.device_count() if torch.cuda.is_available() else 0, None


def code() -> str:
    """Hash of the package's source files, and its commit where it is a checkout."""
    package = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    known = commit()
    return digest.hexdigest()[:12] + (f" (commit {known[:12]})" if known else "")


def _read_config(name: str, overrides: list[str]) -> dict[str, str | None]:
    try:
        loaded = load_config(name, overrides)
    except DinoscaleError as error:
        return {"error": str(error), "digest": None}
    return {"error": None, "digest": hashlib.sha256(dump_config(loaded).encode()).hexdigest()[:12]}


def _missing_interfaces() -> list[str]:
    """Of GLOO_SOCKET_IFNAME; gloo would say so after a minute, and without the name."""
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "")
    present = {name for _, name in socket.if_nameindex()}
    return [name for name in wanted.split(",") if name and name not in present]


def _own_address() -> str | None:
    """What the name of this node means here, None if nothing."""
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None)[0][4][0])
    except (OSError, UnicodeError):
        return None


def _open(_probe: Probe, config: str, overrides: list[str], within_s: float) -> dict[str, Any]:
    """Open the images as the run will; how many there are, or why not, as far as time allows."""
    found: dict[str, dict[str, Any]] = {"images": {}, "errors": {}}
    opening = threading.Thread(
        target=_open_all, args=(load_config(config, overrides), found), daemon=True
    )
    opening.start()
    opening.join(within_s)
    return {"images": dict(found["images"]), "errors": dict(found["errors"])}


def _open_all(config: RunConfig, found: dict[str, dict[str, Any]]) -> None:
    data, decoder = config.data, Decoder(config.data.channels, config.data.max_pixel_value)
    sets: dict[str, Callable[[], Sized]] = {}
    if data.sources:
        sets["data.train"] = partial(
            open_sources,
            [part.source for part in data.sources],
            decoder,
            manifest=data.manifest,
            subset_size=data.subset_size,
            max_lost=data.max_bad_fraction,
        )
    for key, spec in (("eval.train", config.eval.train), ("eval.test", config.eval.test)):
        if spec is not None:
            sets[key] = partial(open_source, spec, decoder)
    for key, opened in sets.items():
        _count(key, opened, found)


def _count(key: str, opened: Callable[[], Sized], found: dict[str, dict[str, Any]]) -> None:
    try:
        found["images"][key] = len(opened())
    except (DinoscaleError, OSError) as error:
        found["errors"][key] = str(error)


def _receive(probe: Probe, run_dir: str, port: int) -> dict[str, Any]:
    """On the first node: write a marker into run_dir, and listen where rank 0 will."""
    probe.marker = write_marker(Path(run_dir).absolute(), probe.made)
    error = None
    try:
        probe.server = socket.create_server(("", port), backlog=128)
        _answer_calls(probe.server)
    except OSError as caught:
        error = os.strerror(caught.errno) if caught.errno else str(caught)
    return {"marker": asdict(probe.marker), "port_error": error}


def _answer_calls(server: socket.socket) -> None:
    def answer() -> None:
        while True:
            try:
                caller, _ = server.accept()
            except OSError:  # closed: we are done
                return
            with closing(caller):
                caller.sendall(_GREETING)

    threading.Thread(target=answer, daemon=True).start()


def _visit(
    _probe: Probe, run_dir: str, marker: dict[str, Any], address: str, port: int
) -> dict[str, Any]:
    """On the other nodes: look for the marker, and call the first node."""
    own = f"{socket.gethostname()}_{os.getpid()}"
    seen = look_for(Path(run_dir).absolute(), Marker(**marker), own=own)
    return {"seen": asdict(seen), "port_error": _call(address, port)}


def _call(address: str, port: int) -> str | None:
    """Why the first node cannot be reached there, None if it answers."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][4][0]
    except (OSError, UnicodeError) as error:
        return f"the name is not known there ({error})"
    try:
        with socket.create_connection((address, port), timeout=_CONNECT_S) as connection:
            said = connection.recv(len(_GREETING), socket.MSG_WAITALL)
    except OSError as error:
        return f"{found}: {error.strerror or error}"
    return None if said == _GREETING else f"{found}: another program answers"


_QUESTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "clock": _clock,
    "look": _look,
    "open": _open,
    "receive": _receive,
    "visit": _visit,
}

if __name__ == "__main__":
    main()
    os._exit(0)  # images may still be opened
