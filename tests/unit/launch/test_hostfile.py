"""Hostfiles and `.deepspeed_env`: every line understood, or refused by its number."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoscale.cluster.launch.hostfile import (
    Host,
    holds_secret,
    read_deepspeed_env,
    read_hostfile,
    taking_part,
)
from dinoscale.errors import LaunchError

EXAMPLE = Path(__file__).resolve().parents[3] / "launchers" / "hostfile.example"


def _read(folder: Path, text: str) -> list[Host]:
    path = folder / "hosts"
    path.write_text(text)
    return read_hostfile(path)


def test_hosts_come_in_order_without_comments(tmp_path: Path) -> None:
    text = "# all\n\n  b.cluster  slots=8   # the second\nme@a\tslots=4\r\n10.0.0.1 slots=16\n"
    found = _read(tmp_path, text)
    assert found == [Host("b.cluster", 8), Host("me@a", 4), Host("10.0.0.1", 16)]
    assert [host.address for host in found] == ["b.cluster", "a", "10.0.0.1"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("node2", "'node2' is not like 'node1 slots=8'"),
        ("node2 slots=eight", "is not like"),
        ("node2 slots = 8", "is not like"),
        ("node2 slots=8 max_slots=9", "is not like"),
        ("-oProxyCommand=reboot slots=8", "is not like"),
        ("node[1-4] slots=8", "is not like"),
        ("a,b slots=8", "is not like"),
        ("a;reboot slots=8", "is not like"),
        ("ssh:a slots=8", "is not like"),
        ("node2 slots=0", "slots=0 is not in 1..1024"),
        ("node2 slots=99999999", "slots=99999999 is not in 1..1024"),
        ("node1 slots=4", "node1 is already in line 1; name each node once"),
        ("me@node1 slots=4", "node1 is already in line 1; name each node once"),
    ],
)
def test_bad_line_is_named_by_its_number(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(LaunchError) as error:
        _read(tmp_path, f"node1 slots=8\n\n{line}\n")
    assert f"{tmp_path / 'hosts'}, line 3: " in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"# nothing\n", "names no host"),
        (b"\xff\xfe", "is not a text file"),
        (b"#" * 10**6 + b"#", "larg"),
    ],
)
def test_file_that_is_no_hostfile_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "hosts").write_bytes(content)
    with pytest.raises(LaunchError, match=said):
        read_hostfile(tmp_path / "hosts")


def test_missing_hostfile_and_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(LaunchError, match=f"^{path}: "):
            read_hostfile(path)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        hosts = read_hostfile(path)
    except LaunchError:
        return
    assert hosts
    assert not any(host.name.startswith("-") or " " in host.name for host in hosts)


def test_example_is_a_hostfile() -> None:
    assert read_hostfile(EXAMPLE) == [Host("node1", 8), Host("node2", 8)]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home; the working directory is another."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_variables_here_win_over_those_at_home(home: Path) -> None:
    (home / ".deepspeed_env").write_text("A=1\nB=two words\n")
    (home / "here" / ".deepspeed_env").write_text("A=3=4\n")
    assert read_deepspeed_env({}) == {"A": "3=4", "B": "two words"}
    assert read_deepspeed_env({"DS_ENV_FILE": "other"}) == {}


@pytest.mark.parametrize("line", ["", "# note", "NAME", "A B=1", "A;reboot=1", "export A=1"])
def test_line_that_ends_deepspeed_is_refused(home: Path, line: str) -> None:
    (home / ".deepspeed_env").write_text(f"A=1\n{line}\nB=1\n")
    with pytest.raises(LaunchError, match=r"\.deepspeed_env, line 2: .* is not NAME=value"):
        read_deepspeed_env({})


def test_example_of_variables_is_read(home: Path) -> None:
    example = EXAMPLE.with_name("deepspeed_env.example").read_text()
    (home / ".deepspeed_env").write_text(example)
    assert {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} <= read_deepspeed_env({}).keys()


@pytest.mark.parametrize(
    "line",
    [
        "WANDB_API_KEY=0123abcd",
        "AWS_SECRET_ACCESS_KEY=0123abcd",
        "DINOSCALE_SIGNATURE=0123abcd",
        "https_proxy=http://me:0123abcd@proxy:3128",
    ],
)
def test_secret_that_deepspeed_would_write_on_command_lines_is_refused(
    home: Path, line: str
) -> None:
    (home / ".deepspeed_env").write_text(f"A=1\n{line}\n")
    with pytest.raises(LaunchError, match=r"\.deepspeed_env, line 2: .* holds a secret") as caught:
        read_deepspeed_env({})
    assert "0123abcd" not in str(caught.value)
    name = line.partition("=")[0]
    (home / ".deepspeed_env").write_text(f'{name}="$(cat ~/file)"\nDINOSCALE_CACHE=/a\n')
    assert read_deepspeed_env({})[name] == '"$(cat ~/file)"'


def test_variables_that_the_program_itself_reads_are_no_secrets() -> None:
    read = re.compile(r"""environ[\w.]*[(\[]["'](DINOSCALE_[A-Z_]+)["']""")
    names = {
        name
        for folder in ("dinoscale", "data_tools")
        for file in (EXAMPLE.parents[1] / folder).rglob("*.py")
        for name in read.findall(file.read_text())
    }
    assert "DINOSCALE_CACHE_GB" in names
    assert not [name for name in sorted(names) if holds_secret(name, "100")]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ("--exclude node1", {"me@node2": 4, "node3": 8}),
        ("-e node1@node2:0,2", {"me@node2": 2, "node3": 8}),
        ("--include=node3:1@node2", {"me@node2": 4, "node3": 1}),
        ("--num_nodes 2 --num_gpus 2", {"node1": 2, "me@node2": 2}),
        ("--log_level error", {"node1": 8, "me@node2": 4, "node3": 8}),
    ],
)
def test_options_that_choose_hosts_count(options: str, left: dict[str, int]) -> None:
    hosts = [Host("node1", 8), Host("me@node2", 4), Host("node3", 8)]
    assert {host.name: host.slots for host in taking_part(hosts, options.split())} == left


@pytest.mark.parametrize(
    ("options", "said"),
    [("--exclude node4", "'node4' is not HOST"), ("--exclude node1", "leaves no host")],
)
def test_choice_of_no_host_is_refused(options: str, said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        taking_part([Host("node1", 8)], options.split())
