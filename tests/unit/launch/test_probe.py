"""What a node finds out about itself and its neighbours."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dinoscale.cluster.launch import node_probe
from tests.ports import free_port


def _ask(*questions: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers of a probe whose input then ends, as when the one who asks has gone."""
    text = "".join(json.dumps(question) + "\n" for question in questions)
    done = subprocess.run(
        [sys.executable, "-m", "dinoscale.cluster.launch.node_probe"],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [json.loads(line.removeprefix(node_probe.MARK)) for line in done.stdout.splitlines()]


def test_probe_that_is_left_alone_ends_and_cleans_up(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    (answer,) = _ask({"ask": "receive", "run_dir": str(run_dir), "port": free_port()})
    assert answer["port_error"] is None
    assert answer["marker"]["error"] is None
    assert not run_dir.parent.exists()


def test_values_are_those_that_the_shell_of_the_run_makes(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("two words\n")
    assert node_probe._of_shell(f'"$(cat {tmp_path}/secret)"') == "two words"
    assert node_probe._of_shell("two words; 'x") == "two words; 'x"
    assert node_probe._of_shell("$((1 + 1)) words; more") == "2 words; more"


def test_port_in_use_and_directory_that_cannot_be_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        (answer,) = _ask({"ask": "receive", "run_dir": str(tmp_path / "file/run"), "port": port})
    assert answer["port_error"] == "Address already in use"
    assert answer["marker"]["error"] == "Not a directory"


def test_call_says_why_nobody_answers() -> None:
    assert "Connection refused" in str(node_probe._call("127.0.0.1", free_port()))
    assert "the name cannot be resolved there" in str(node_probe._call("no.such.host.invalid", 1))


def test_call_recognises_another_program() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        probe_state = node_probe.Probe()
        node_probe._answer_calls(server)
        assert node_probe._call("127.0.0.1", server.getsockname()[1]) is None
        assert probe_state.server is None
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        import threading

        def hang_up() -> None:
            stranger.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        said = node_probe._call("127.0.0.1", stranger.getsockname()[1])
        assert said == "127.0.0.1: another program answers"


def test_missing_interfaces_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth77")
    assert node_probe._missing_interfaces() == ["eth77"]
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert node_probe._missing_interfaces() == []


def test_configuration_that_cannot_be_read_is_reported() -> None:
    good = node_probe._read_config("vit_s16", ["optim.lr=0.5"])
    assert good["error"] is None
    assert good["digest"] != node_probe._read_config("vit_s16", [])["digest"]
    assert "unknown key" in str(node_probe._read_config("vit_s16", ["optim.lrr=0.5"])["error"])


def test_an_eval_set_with_too_much_left_out_is_an_error(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(path)
    overrides = [f"eval.train={tmp_path}", f"eval.test={tmp_path}"]
    question = {"ask": "open", "config": "vit_s16", "overrides": overrides, "within_s": 60}
    (whole,) = _ask(question)
    assert whole == {"images": {"eval.train": 4, "eval.test": 4}, "errors": {}}
    (tmp_path / "a" / "4.png").symlink_to("gone.png")
    (lacking,) = _ask(question)
    assert lacking["images"] == {}
    assert "1 of 5 pictures" in lacking["errors"]["eval.train"]
    assert "1 of 5 pictures" in lacking["errors"]["eval.test"]
