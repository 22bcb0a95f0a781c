"""Asking nodes that answer, refuse, hang, or are not like the others, through a program for ssh."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dinoscale.cluster.doctor.report import Check
from dinoscale.cluster.launch.ask_nodes import NodeAnswers, Question, ask_all
from dinoscale.cluster.launch.hostfile import Host
from dinoscale.cluster.launch.judge_nodes import judge, table
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[3]

LOOKED: dict[str, Any] = {
    "versions": {
        "python": "3.12.3",
        "torch": "2.9.0",
        "deepspeed": "0.19.8",
        "code": "ab (commit c)",
    },
    "num_devices": 8,
    "why_no_torch": None,
    "config": {"error": None, "digest": "d1"},
    "missing_interfaces": [],
    "own_address": "10.0.0.1",
}
MARKER = {"run_dir": "/shared/run", "name": ".doctor_1", "token": "t", "error": None}
SEEN = {"run_dir": "/shared/run", "seen": True, "error": None}

# `ssh [OPTION ...] HOST COMMAND`: does what HOST.json says; without one, it is no known host.
_SSH = f"""#!{sys.executable} -S
import json, sys, time
from pathlib import Path
host, command = sys.argv[-2:]
folder = Path(__file__).parent
(folder / (host + ".called")).write_text(json.dumps(sys.argv[1:]))
does = json.loads((folder / (host + ".json")).read_text())
if "exit" in does:
    print(does["says"], file=sys.stderr)
    sys.exit(does["exit"])
print("Welcome to", host, flush=True)
for line in sys.stdin:
    asked = json.loads(line)["ask"]
    if asked == does.get("hangs_at"):
        time.sleep(250)
    answer = does["answers"].get(asked, {{"time": time.time() + does.get("ahead_s", 0)}})
    print("dinoscale-probe " + json.dumps(answer), flush=True)
(folder / (host + ".left")).touch()
"""


class Cluster:
    """Hosts behind a program for ssh."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts: list[Host] = []
        program = folder / "ssh"
        program.write_text(_SSH)
        program.chmod(0o755)

    def add(
        self,
        name: str,
        *,
        looked: dict[str, Any] | None = None,
        met: dict[str, Any] | None = None,
        opened: dict[str, Any] | None = None,
        slots: int = 8,
        **does: Any,
    ) -> None:
        first = {"marker": MARKER, "port_error": None}
        other = {"seen": SEEN, "port_error": None}
        answers = {"look": LOOKED | (looked or {}), "open": opened or {}}
        answers["visit" if self.hosts else "receive"] = (other if self.hosts else first) | (
            met or {}
        )
        (self.folder / f"{name}.json").write_text(json.dumps({"answers": answers, **does}))
        self.hosts.append(Host(name, slots))

    def ask(self, timeout_s: float = 30.0) -> tuple[list[NodeAnswers], list[Check]]:
        question = Question(
            config=("c.yaml", ["a.b=1"]),
            run_dir="/shared/run",
            address="a",
            port=29500,
            variables={"NAME": "two words"},
            ssh=[str(self.folder / "ssh"), "-p", "2222"],
            meets=True,
            timeout_s=timeout_s,
        )
        found = ask_all(self.hosts, question)
        return found, judge(found, question)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def _problems(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.text for check in checks if check.verdict == "problem"}


def test_equal_nodes_can_start_and_are_left_alone(cluster: Cluster) -> None:
    for name in ("a", "b", "me@c"):
        cluster.add(name)
    found, checks = cluster.ask()
    assert checks == [Check("nodes", "ok", "3 nodes with 24 slots can start")]
    assert [node.host.name for node in found] == ["a", "b", "me@c"]
    assert len(list(cluster.folder.glob("*.left"))) == 3  # each conversation was ended
    lines = table(found).splitlines()
    assert [line.split()[:7] for line in lines[1:]] == [
        [name, "8", "8", "3.12.3", "2.9.0", "0.19.8", "ab"] for name in ("a", "b", "me@c")
    ]


def test_ssh_asks_nothing_and_is_given_the_options(cluster: Cluster) -> None:
    cluster.add("a")
    cluster.ask()
    *options, host, command = json.loads((cluster.folder / "a.called").read_text())
    assert options[:2] == ["-p", "2222"]
    assert "BatchMode=yes" in options
    assert "ConnectTimeout=10" in options
    assert host == "a"
    assert command.startswith(f"cd {os.getcwd()} || exit 97; env PYTHONPATH=")
    assert command.endswith(f" {sys.executable} -m dinoscale.cluster.launch.node_probe")
    assert "two words" not in command  # which every user of the node could read


def test_nodes_with_other_images_or_none_are_named(cluster: Cluster) -> None:
    few = {"images": {"data.train": 9}, "errors": {}}
    many = {"images": {"data.train": 10}, "errors": {}}
    none = {"images": {}, "errors": {"data.train": "/data does not exist."}}
    for name, opened in {"a": many, "b": few, "c": many, "d": none, "e": {}}.items():
        cluster.add(name, opened=opened)
    _, checks = cluster.ask()
    assert _problems(checks) == {
        "b": "data.train has 9 images there, 10 elsewhere; give all nodes the same files",
        "d": "data.train cannot be opened there: /data does not exist.",
    }


@pytest.mark.parametrize(
    ("code", "says", "said"),
    [
        (
            255,
            "ssh: connect to host b port 22: Connection refused",
            "Connection refused; `ssh b tr",
        ),
        (
            255,
            "b: Permission denied (publickey).",
            "by ssh: b: Permission denied (publickey).; `ss",
        ),
        (97, "cd: no such file", f"has no directory {os.getcwd()}; start where all nodes"),
        (127, "env: not found", f"cannot run {sys.executable}; install the environment there"),
        (
            1,
            "Traceback\nModuleNotFoundError: No module named 'x'",
            "code 1): ModuleNotFoundError: N",
        ),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_host_that_cannot_be_asked_is_named(
    cluster: Cluster, first: bool, code: int, says: str, said: str
) -> None:
    for name in ("b", "a") if first else ("a", "b"):
        cluster.add(name, **({"exit": code, "says": says} if name == "b" else {}))
    begin = time.monotonic()
    found, checks = cluster.ask(timeout_s=200.0)
    assert time.monotonic() - begin < 100  # nobody waited for it to answer
    assert _problems(checks).keys() == {"b"}
    assert said in _problems(checks)["b"]
    assert "b     8      -" in table(found)


@pytest.mark.parametrize("question", ["clock", "visit"])
def test_host_that_hangs_is_named_in_time(cluster: Cluster, question: str) -> None:
    cluster.add("a")
    cluster.add("b", hangs_at=question)
    begin = time.monotonic()
    _, checks = cluster.ask(timeout_s=2.0)
    assert time.monotonic() - begin < 200  # not 250
    assert "did not answer within 2 s" in _problems(checks)["b"]
    assert _problems(checks).keys() == {"b"}


def test_versions_are_compared_with_those_of_most_nodes(cluster: Cluster) -> None:
    other = {"versions": LOOKED["versions"] | {"torch": "2.8.0", "deepspeed": None}}
    cluster.add("odd", looked=other)
    cluster.add("b")
    cluster.add("c")
    _, checks = cluster.ask()
    assert [check.name for check in checks] == ["odd", "odd"]
    assert checks[0].text.startswith("torch is 2.8.0 there, 2.9.0 elsewhere; use one environment")
    assert checks[1].text.startswith("deepspeed is absent there, 0.19.8 elsewhere")


@pytest.mark.parametrize(("ahead_s", "said"), [(90.0, "90.0 s ahead"), (-90.0, "90.0 s behind")])
def test_wrong_clock_is_measured(cluster: Cluster, ahead_s: float, said: str) -> None:
    cluster.add("a")
    cluster.add("b", ahead_s=ahead_s)
    found, checks = cluster.ask()
    measured = float(_problems(checks)["b"].split()[3])
    assert 80 < measured <= 90.05
    assert said.split()[-1] in _problems(checks)["b"]
    assert f"{ahead_s:+.0f}" in table(found) or abs(sum(found[1].clock_s) / 2 - ahead_s) < 5


@pytest.mark.parametrize(
    ("looked", "said"),
    [
        ({"num_devices": 4}, "has 4 GPUs for 8 slots; correct its slots"),
        ({"num_devices": 0}, "has 0 GPUs for 8 slots"),
        ({"why_no_torch": "libcudart.so: cannot open"}, "torch does not load: libcudart.so"),
        ({"config": {"error": "no such file", "digest": None}}, "CONFIG is invalid there: no"),
        ({"config": {"error": None, "digest": "d2"}}, "CONFIG differs there"),
        ({"missing_interfaces": ["eth9"]}, "has no network interface 'eth9', which GLOO"),
    ],
)
def test_unfit_node_is_named_with_the_remedy(
    cluster: Cluster, looked: dict[str, Any], said: str
) -> None:
    cluster.add("a")
    cluster.add("b", looked=looked)
    _, checks = cluster.ask()
    assert _problems(checks).keys() == {"b"}
    assert said in _problems(checks)["b"]


@pytest.mark.parametrize(
    ("met", "said"),
    [
        (
            {"seen": SEEN | {"seen": False}},
            "run_dir /shared/run is not shared: a file of the first",
        ),
        (
            {"seen": SEEN | {"error": "Read-only file system"}},
            "cannot write to run_dir /shared/run",
        ),
        (
            {"port_error": "10.0.0.1: No route to host"},
            "cannot reach rank 0 at a:29500 (10.0.0.1: No",
        ),
    ],
)
def test_node_that_cannot_meet_the_first_is_named(
    cluster: Cluster, met: dict[str, Any], said: str
) -> None:
    cluster.add("a")
    cluster.add("b", met=met)
    cluster.add("c")
    _, checks = cluster.ask()
    assert _problems(checks).keys() == {"b"}
    assert said in _problems(checks)["b"]


def test_first_node_is_blamed_for_its_own_faults_alone(cluster: Cluster) -> None:
    broken = MARKER | {"error": "Permission denied"}
    cluster.add("a", met={"marker": broken, "port_error": "Address already in use"})
    cluster.add("b")
    _, checks = cluster.ask()
    assert [check.name for check in checks] == ["a", "a"]
    assert "cannot write to run_dir /shared/run: Permission denied; choose" in checks[0].text
    assert "port 29500 cannot be used there: Address already in use; choose" in checks[1].text


def test_idle_gpus_and_loopback_names_are_warnings(cluster: Cluster) -> None:
    cluster.add("a", slots=2)
    _, checks = cluster.ask()
    assert checks == [Check("a", "warning", "2 of its 8 GPUs are used; slots=8 uses all")]
    on_cpu = {"num_devices": 0, "own_address": "127.0.1.1"}
    pair = Cluster(cluster.folder)
    pair.add("a", looked=on_cpu)
    pair.add("b", looked=on_cpu | {"own_address": "10.0.0.2"})
    _, checks = pair.ask()
    (warned,) = checks
    assert (warned.name, warned.verdict) == ("a", "warning")
    assert "its own name resolves to 127.0.1.1 there" in warned.text
    assert "GLOO_SOCKET_IFNAME=" in warned.text


_TORCH = """from types import SimpleNamespace
cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 3)
"""


def test_real_probes_meet_and_leave_nothing(tmp_path: Path) -> None:
    """The probe, twice on this machine, through a program for ssh that runs it here."""
    program = tmp_path / "ssh"
    program.write_text('#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n')
    program.chmod(0o755)
    (tmp_path / "torch.py").write_text(_TORCH)  # the real one takes seconds
    (tmp_path / "interface").write_text("lo\n")
    (tmp_path / "images").mkdir()
    for number in range(2):
        (tmp_path / "images" / f"{number}.png").touch()
    question = Question(
        config=("quickstart", ["train.epochs=3", f"data.train={tmp_path}/images"]),
        run_dir=str(tmp_path / "new" / "run"),
        address="127.0.0.1",
        port=free_port(),
        variables={
            "GLOO_SOCKET_IFNAME": f'"$(cat {tmp_path}/interface)"',
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
        },
        ssh=[str(program)],
        meets=True,
        timeout_s=120,
    )
    found = ask_all([Host("a", 3), Host("b", 3)], question)
    assert judge(found, question) == [Check("nodes", "ok", "2 nodes with 6 slots can start")]
    first, second = found
    assert first.looked == second.looked
    assert second.met
    assert second.met["seen"]["seen"]
    assert second.opened
    assert second.opened["images"] == {"data.train": 2, "eval.train": 1600, "eval.test": 800}
    assert not (tmp_path / "new").exists()
