"""Configurations from elsewhere are only text; secrets of the environment stay where they are."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from dinoscale import cli
from dinoscale.config import RunConfig, dump_config, load_config, parse_config
from dinoscale.config.yaml_io import read_yaml, write_yaml
from dinoscale.convert.conversion import convert
from dinoscale.errors import ConfigError, DinoscaleError
from tests.e2e.hostile import ROOT, SYNTHETIC, dinoscale, refused, settings

TAGGED = {
    "apply": "!!python/object/apply:os.system ['touch FIRED']",
    "apply, long": "!!python/object/apply:subprocess.check_call\nargs: [[touch, FIRED]]",
    "new": "!!python/object/new:list [[!!python/object/apply:os.system ['touch FIRED']]]",
    "verbatim": "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch FIRED']",
    "handle": "%TAG !p! tag:yaml.org,2002:python/\n---\n!p!object/apply:os.system ['touch FIRED']",
    "in a list": "[1, !!python/object/apply:os.system ['touch FIRED']]",
    "in a key": "? !!python/object/apply:os.system ['touch FIRED']\n: 1",
    "eval": "!!python/object/apply:eval [\"open('FIRED', 'w')\"]",
}
TAGS = (  # these only name things, or make values that YAML of numbers and text has no use for
    "!!python/name:os.system",
    "!!python/module:antigravity",
    "!!python/tuple [1]",
    "!!timestamp soon",
    "!!timestamp 2020-01-01",
    "!!binary aGk=",
    "!!float ''",
    "!!bool maybe",
    "!!set {a}",
    "!!str 1",
    "!mine 1",
    "! 1",
)
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)


@pytest.fixture(autouse=True)
def arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, as anything that is executed would."""
    folder = tmp_path / "arena"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def _file(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", TAGGED)
def test_tags_execute_nothing_wherever_they_are(name: str, tmp_path: Path, arena: Path) -> None:
    text = TAGGED[name]
    with suppress(yaml.YAMLError, TypeError):  # some are nonsense, but only after the fact
        yaml.unsafe_load(text)
    (arena / "FIRED").unlink()  # an unguarded loader would have run it
    nested = "\n".join(f"  {line}" for line in text.splitlines())
    tagged = _file(tmp_path / "tagged.yaml", text)
    for file in (
        tagged,
        _file(tmp_path / "value.yaml", f"seed:\n{nested}\n"),
        _file(tmp_path / "defaults.yaml", f"defaults: [{tagged}]\n"),
        _file(tmp_path / "name.yaml", f"defaults:\n{nested}\n"),
    ):
        with pytest.raises(ConfigError, match=r"\.yaml"):
            load_config(file)
    for key in ("seed", "model.backbone", "defaults"):
        with pytest.raises(ConfigError):
            load_config("vit_s16", [f"{key}={text}"])
    with pytest.raises(ConfigError):
        parse_config({"seed": text, "model": text})
    assert not list(arena.iterdir())


@pytest.mark.parametrize("tag", TAGS)
def test_no_tag_is_read_at_all(tag: str) -> None:
    for text in (tag, f"seed: {tag}", f"crops: {{num_local: {tag} }}", f"[{tag} ]"):
        with pytest.raises(ConfigError, match=r"line 1: tags \('.*'\) are not allowed"):
            read_yaml(text)


def test_command_line_executes_nothing_in_a_configuration(tmp_path: Path, arena: Path) -> None:
    text = "model: {backbone: !!python/object/apply:os.system ['touch FIRED']}\n"
    tagged = _file(tmp_path / "tagged.yaml", text)
    child = _file(tmp_path / "child.yaml", "defaults: [tagged.yaml]\n")
    override = f"model.depth={TAGGED['apply']}"
    refused(dinoscale("config", tagged, cwd=arena), tagged, "tags")
    refused(dinoscale("train", child, cwd=arena), tagged, "tags")
    refused(dinoscale("train", "vit_t16", override, cwd=arena), "model.depth", "tags")
    refused(dinoscale("config", _file(tmp_path / "bomb.yaml", BOMB), cwd=arena), "aliases")
    assert not list(arena.iterdir())


def test_aliases_cannot_multiply() -> None:
    for text in (BOMB, "a: &a [*a]", "a: &a {b: *a}", "x: &x 1\ny: {<<: *x}"):
        with pytest.raises(ConfigError, match=r"aliases \(\*name\) are not allowed"):
            read_yaml(text)


def test_files_that_name_each_other_twice_are_read_once(tmp_path: Path) -> None:
    for i in range(40):
        _file(tmp_path / f"{i}.yaml", f"defaults: [{i + 1}.yaml, {i + 1}.yaml]\n")
    _file(tmp_path / "40.yaml", "seed: 1\n")
    assert load_config(str(tmp_path / "0.yaml")).seed == 1


def test_long_chain_of_files_ends_in_a_sentence(tmp_path: Path) -> None:
    for i in range(2000):
        _file(tmp_path / f"{i}.yaml", f"defaults: [{i + 1}.yaml]\n")
    with pytest.raises(ConfigError, match="more than 100 files"):
        load_config(str(tmp_path / "0.yaml"))


DEFAULTS = {
    "/dev/zero": "is a folder or a device",
    "/dev/stdin": "is a folder or a device|cannot be read|needs a mapping",
    "PIPE": "is a folder or a device",
    "/": "is a folder or a device",
    "..": "is a folder or a device",
    "": "is a folder or a device",
    "../../../../../../../../etc/passwd": "not valid YAML|needs a mapping",
    "/etc/passwd": "not valid YAML|needs a mapping",
    "/proc/self/environ": "not valid YAML|needs a mapping",
    "PASSWORDS": "needs a mapping of keys to values, got text",
    "LOOP": "cannot be read",
    "$(touch FIRED)": "cannot be read",
    "~/x.yaml": "cannot be read",
    "a\0b": "cannot be the name of a file",
    "a\ud800b": "cannot be the name of a file",
    "x" * 5000: "cannot be read",
    "https://example.invalid/x.yaml": "cannot be read",
}


@pytest.mark.skipif(sys.platform != "linux", reason="names files of Linux")
@pytest.mark.timeout(120)  # a pipe that nobody writes to is waited for without end
@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_name_small_files_and_never_show_what_is_in_them(
    name: str, tmp_path: Path, arena: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = secrets.token_hex()
    monkeypatch.setenv("SECRET", secret)
    _file(tmp_path / "PASSWORDS", f"SECRET={secret}\nmachine x login y password {secret}\n")
    os.mkfifo(tmp_path / "PIPE")
    (tmp_path / "LOOP").symlink_to(tmp_path / "LOOP")
    # written with escapes: PyYAML writes what it would not read
    file = _file(tmp_path / "config.yaml", f"defaults: [{json.dumps(name)}]\n")
    with pytest.raises(ConfigError, match=DEFAULTS[name]) as caught:
        load_config(file)
    for part in (secret, "root:", "/bin/"):
        assert part not in str(caught.value)
    assert not list(arena.iterdir())


SHELL = (
    "$(touch FIRED)",
    "`touch FIRED`",
    "; touch FIRED",
    "| touch FIRED",
    "x && touch FIRED &",
    "$(touch${IFS}FIRED)",
    "pipe:touch FIRED",
    "__import__('os').system('touch FIRED')",
    "{__import__('os').system('touch FIRED')}",
    TAGGED["apply"],
    "${SECRET}",
    "$SECRET",
    "%(SECRET)s",
    "%SECRET%",
    "%s%n%d",
    "{SECRET}",
    "{0.__class__.__init__.__globals__}",
    "~",
    "~/x",
    "~root/x",
    "hf-hub:someone/something",
    "local-dir:.",
    "file:///etc/passwd",
    "\x1b]0;title\x07\x1b[2J",
    "two\nlines",
    "nul\0.tar",
    "x" * 10000,
)


def _text_fields(
    model: type[BaseModel] = RunConfig, prefix: str = ""
) -> Iterator[tuple[str, bool]]:
    """Every key of the schema that takes text, or one of some words; whether any text will do."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _text_fields(kind, f"{prefix}{name}.")
        elif kind is str or str in _alternatives(kind):
            yield f"{prefix}{name}", True
        elif any(isinstance(one, str) for one in _alternatives(kind)):
            yield f"{prefix}{name}", False
        else:
            assert "str" not in str(kind), f"{prefix}{name}: this test puts no text into {kind}"


def _alternatives(kind: Any) -> Iterator[Any]:
    """What a type is put together from, unions in unions included."""
    for part in get_args(kind):
        yield part
        yield from _alternatives(part)


FIELDS = dict(_text_fields())


def _sections(key: str, text: str) -> dict[str, Any]:
    section, _, leaf = key.rpartition(".")
    values: dict[str, Any] = {section: {leaf: text}} if section else {leaf: text}
    if section == "eval":  # the two go together
        values["eval"] = {"train": text, "test": text}
    return values


def test_fields_that_take_text_are_found() -> None:
    known = {"run_dir", "model.backbone", "data.train", "eval.train", "optim.name"}
    assert known | {"eval.test", "log.wandb_project", "data.manifest"} <= set(FIELDS)


@pytest.mark.parametrize("key", FIELDS)
def test_text_stays_text_in_every_field(
    key: str, arena: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = secrets.token_hex()
    monkeypatch.setenv("SECRET", secret)
    file = arena.parent / "config.yaml"
    for text in SHELL if FIELDS[key] else SHELL[::3]:  # what takes some words refuses all others
        _file(file, write_yaml(_sections(key, text)))
        with suppress(ConfigError):
            config = load_config(str(file))
            value: Any = config
            for name in key.split("."):
                value = getattr(value, name)
            assert value in (text, os.path.expanduser(text))  # of paths, a leading ~ is replaced
            assert parse_config(read_yaml(dump_config(config))) == config  # type: ignore[arg-type]
            assert parse_config(json.loads(config.model_dump_json())) == config
        try:
            cli.run(["config", str(file), f"{key}={json.dumps(text)}"])
        except DinoscaleError as error:
            print(error)
        assert secret not in "".join(capsys.readouterr())
        assert not list(arena.iterdir())


_TRAIN_EACH = """
import sys
from dinoscale import cli
from dinoscale.runtime import distributed
from dinoscale.errors import DinoscaleError
for file in sys.argv[1:]:
    try:
        cli.run(["train", file])
    except DinoscaleError as error:
        print("refused:", error)
    distributed.stop()
"""


@pytest.mark.slow
def test_training_executes_and_expands_nothing_in_any_field(tmp_path: Path, arena: Path) -> None:
    secret = secrets.token_hex()
    text = "$(touch FIRED)`touch FIRED`;touch FIRED|touch FIRED ${SECRET} {SECRET} %(SECRET)s ~"
    files = []
    for number, key in enumerate(key for key in FIELDS if key.partition(".")[0] != "optim"):
        more = {"data__train": SYNTHETIC, "run_dir": f"run{number}"}
        if key == "log.wandb_project":
            more["log__wandb"] = "true"
        config = load_config("vit_t16", settings(**more)).model_dump(mode="json")
        for section, values in _sections(key, text).items():
            config[section] = config[section] | values if isinstance(values, dict) else values
        files.append(_file(tmp_path / f"{number}.yaml", write_yaml(config)))
    done = subprocess.run(
        [sys.executable, "-c", _TRAIN_EACH, *files],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=arena,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SECRET": secret, "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    results = done.stdout.splitlines()
    assert sum(line.startswith(("{", "refused:")) for line in results) == len(files), results
    assert (arena / text / "checkpoints").is_dir()
    assert secret not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        assert path.name != "FIRED"
        assert secret not in path.name
        assert not path.is_file() or secret.encode() not in path.read_bytes()


@pytest.mark.slow
def test_secrets_of_the_environment_reach_no_file_and_no_log(
    tmp_path: Path, arena: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained where wandb looks around: a checkout with a token in its remote and open changes."""
    names = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "ORDINARY_VARIABLE")
    variables = {name: secrets.token_hex(20) for name in names}
    token, change = secrets.token_hex(20), secrets.token_hex(20)
    _checkout(arena, f"https://{token}:x-oauth-basic@example.invalid/x.git", change)
    for name, secret in variables.items():
        monkeypatch.setenv(name, secret)
    run = tmp_path / "run"
    arguments = settings(data__train=SYNTHETIC, run_dir=run, log__wandb="true")
    done = dinoscale("train", "vit_t16", *arguments, cwd=arena, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert list(run.glob("wandb/*/*.wandb")), "wandb did not run"
    report = convert(run, run / "weights.safetensors", to="dino")
    written = {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    written["output"] = f"{done.stdout}{done.stderr}{report}".encode()
    for name, secret in {**variables, "remote": token, "change": change}.items():
        for path, content in written.items():
            assert secret[:12].encode() not in content, (name, path)


def _checkout(folder: Path, remote: str, change: str) -> None:
    (folder / "file").write_text("committed\n")
    who = ("-c", "user.name=n", "-c", "user.email=e@example.invalid")
    for words in (
        ("init", "--quiet"),
        ("add", "file"),
        (*who, "commit", "--quiet", "--message", "x"),
        ("remote", "add", "origin", remote),
    ):
        subprocess.run(["git", *words], cwd=folder, check=True)
    (folder / "file").write_text(f"PASSWORD={change}\n")
