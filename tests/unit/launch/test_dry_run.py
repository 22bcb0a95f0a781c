"""The line of each way of starting, word by word, and what a shell makes of it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoscale import cli
from dinoscale.cluster.launch.commands import quote_for_pdsh
from dinoscale.errors import DinoscaleError

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden" / "launch"
TRAINING = ["vit_s16", "data.train=/data/a b/{000..099}.tar", "run_dir=/shared/$USER's 50%n"]
HOSTS = ["--hostfile", "hosts"]
WAYS = {
    "pdsh": [*HOSTS],
    "pdsh_ssh_options": [
        *HOSTS,
        *("--ssh-options", "-p 2222 -i /keys/id -F /keys/config", "--options", "--log_level error"),
        *("--master-addr", "10.0.0.1", "--master-port", "29600"),
    ],
    "pdsh_one_node": ["--hostfile", "one"],
    "openmpi": [*HOSTS, "--launcher", "openmpi", "--options", "--mca oob_tcp_if_include eth1"],
    "openmpi_ssh_options": [*HOSTS, "--launcher", "openmpi", "--ssh-options", "-p 2222"],
    "no_ssh": [*HOSTS, "--node-rank", "1"],
    "torchrun": ["--nodes", "2", "--node-rank", "1", "--master-addr", "node1"],
    "torchrun_cpu": [
        *("--nodes", "2", "--node-rank", "0", "--master-addr", "node1"),
        *("--per-node", "2", "--options", "--max-restarts 3"),
    ],
    "slurm": ["--slurm"],
    "slurm_sized": [
        *("--slurm", "--nodes", "4", "--per-node", "8"),
        *("--options", "--partition gpu --comment 'a b' --export=ALL,HF_TOKEN"),
    ],
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "hosts").write_text("node1 slots=8\nme@node2 slots=4\n")
    (tmp_path / "mpi").write_text("node1 slots=8\nnode2 slots=4\n")
    (tmp_path / "one").write_text("node1 slots=8\n")


def _line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    words = ["mpi" if "openmpi" in arguments and word == "hosts" else word for word in arguments]
    cli.run(["launch", TRAINING[0], *words, "--dry-run", *TRAINING[1:]])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return out


@pytest.mark.parametrize("way", WAYS)
def test_line_is_the_one_on_file(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = _line(capsys, *WAYS[way])
    shown = line.replace(sys.executable, "PYTHON").replace(str(ROOT), "CHECKOUT")
    assert shown == (GOLDEN / f"{way}.txt").read_text()


@pytest.mark.parametrize("way", WAYS)
def test_line_can_be_pasted_into_a_shell(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = _line(capsys, *WAYS[way])
    assert shlex.join(shlex.split(line)) + "\n" == line
    subprocess.run(["bash", "-n", "-c", line], check=True)
    told = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    words = told.stdout.split("\0")[:-1]
    assert words == shlex.split(line)
    if "pdsh" not in way:  # there, another shell is to come
        assert words[-3:] == TRAINING


def test_rank_0_is_on_a_host_that_takes_part(capsys: pytest.CaptureFixture[str]) -> None:
    line = _line(capsys, *HOSTS, "--options", "--exclude node1")
    assert "--master_addr node2" in line
    assert "--force_multi" in line  # one node is left, which is not this one


def test_deepspeed_does_not_pass_on_secrets_of_this_shell(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "0123abcd")
    assert _line(capsys, *HOSTS).startswith("env --unset=MLFLOW_TRACKING_PASSWORD env 'PDSH")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --hostfile FILE, --nodes N, or --slurm"),
        ([*HOSTS, "--nodes", "2"], "--nodes: has no effect with --hostfile"),
        ([*HOSTS, "--slurm"], "--slurm: has no effect with --hostfile"),
        ([*HOSTS, "--per-node", "8"], "--per-node: has no effect with --hostfile"),
        ([*HOSTS, "--node-rank", "2"], "--node-rank=2 is not in 0..1, the hosts of hosts"),
        ([*HOSTS, "--node-rank", "0", "--ssh-options=-4"], "have no effect with --node-rank"),
        ([*HOSTS, "--launcher", "openmpi", "--node-rank", "0"], "have no effect with --node-rank"),
        (["--hostfile", "hosts", "--launcher", "openmpi"], "mpirun does not take 'me@node2'"),
        ([*HOSTS, "--ssh-options", "-i 'a b'"], "'a b' cannot be one argument"),
        ([*HOSTS, "--ssh-options", "-i 'a"], "--ssh-options: .* cannot be split into words"),
        ([*HOSTS, "--master-port", "0"], "--master-port=0 is not in 1..65535"),
        ([*HOSTS, "--master-addr", "a b"], "--master-addr='a b' is neither a host name"),
        ([*HOSTS, "--master-addr=-x"], "--master-addr='-x' is neither a host name"),
        ([*HOSTS, "--timeout", "nan"], "--timeout: need more than 0"),
        (["--nodes", "2"], "--nodes: also needs --node-rank R and --master-addr HOST"),
        (["--nodes", "2", "--node-rank", "2", "--master-addr", "a"], "0..1, the ranks of --nodes"),
        (["--nodes", "0"], "--nodes=0 is not in 1.."),
        (["--nodes", "2", "--ssh-options", "-4"], "--ssh-options: has no effect with --nodes"),
        (["--slurm", "--per-node", "0"], "--per-node=0 is not in 1..1024"),
        (["--slurm", "--master-port", "1"], "--master-port: has no effect with --slurm"),
        (["--slurm", "--options=--export=ALL,HF_TOKEN=ab12"], "HF_TOKEN holds a secret"),
        ([*HOSTS, "--options=--export=API_KEY=ab12"], "API_KEY holds a secret"),
        ([*HOSTS, "--ssh-options=-o A=https://me:ab12@host"], "A holds a secret"),
        (["--slurm", "train.epoch=3"], "train.epoch: unknown key"),
    ],
)  # fmt: skip
def test_contradiction_is_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(DinoscaleError, match=said) as caught:
        cli.run(["launch", "vit_s16", *arguments, "--dry-run"])
    assert "ab12" not in str(caught.value)


def test_directory_that_deepspeed_would_not_quote_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(DinoscaleError, match=r"this directory, .*with space.* not quote"):
        cli.run(["launch", "vit_s16", "--hostfile", str(tmp_path / "hosts"), "--dry-run"])


def test_settings_may_follow_options_of_any_command(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["config", "vit_s16", "--world-size", "2", "optim.lr=0.25", "--json"])
    assert '"lr": 0.25' in capsys.readouterr().out
    for wrong in ("--unknown=1", "setting"):
        with pytest.raises(SystemExit) as ended:
            cli.run(["config", "vit_s16", "--json", wrong])
        assert ended.value.code == 2
        assert f"unrecognized arguments: {wrong}\n" in capsys.readouterr().err


def test_shards_of_a_pattern_without_quotes_are_told_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apart = [str(tmp_path / name) for name in ("train-0.tar", "train-1.tar")]
    for path in apart:
        Path(path).touch()
    with pytest.raises(SystemExit) as ended:
        cli.run(["evaluate", "knn", "weights", "--train", *apart, "--test", str(tmp_path)])
    assert ended.value.code == 2
    assert f"{apart[1]}; put a pattern of files in quotes" in capsys.readouterr().err


def _as_on_a_node(*arguments: str) -> list[str]:
    """What DeepSpeed, pdsh and the shell of a node, one after the other, make of words."""
    spaced = [
        '"{}"'.format(word.replace('"', '\\"')) if " " in word else word for word in arguments
    ]
    for_node = {"%%": "%", "%n": "3", "%h": "node", "%u": "user"}
    joined = re.sub("%[%nhu]", lambda match: for_node[match[0]], " ".join(spaced))
    told = subprocess.run(["sh", "-c", f"printf '%s\\0' {joined}"], capture_output=True, check=True)
    return told.stdout.decode().split("\0")[:-1]


_WORDS = st.text(alphabet="a {}$`\\'\"*;%n#&|~!\n=é-", max_size=12)


@settings(max_examples=10, deadline=None)
@given(st.lists(_WORDS, min_size=10, max_size=30))
def test_arguments_reach_the_node_unchanged(words: list[str]) -> None:
    assert _as_on_a_node(*map(quote_for_pdsh, words)) == words


def test_unquoted_arguments_do_not_reach_the_node_unchanged() -> None:
    assert _as_on_a_node("x=50%n") == ["x=503"]
    assert _as_on_a_node("x=a $HOME b") != ["x=a $HOME b"]
