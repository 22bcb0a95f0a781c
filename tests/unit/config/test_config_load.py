"""Reading a configuration: YAML, defaults, overrides, messages, and the way back."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoscale.config import (
    RunConfig,
    dump_config,
    list_presets,
    load_config,
    parse_config,
    text_override,
)
from dinoscale.config.yaml_io import read_yaml, write_yaml
from dinoscale.errors import ConfigError


def _write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def _message(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.fixture
def empty(tmp_path: Path) -> str:
    return _write(tmp_path, "empty.yaml", "# nothing but defaults\n")


def test_import_brings_no_torch() -> None:
    code = (
        "import sys, dinoscale.config as c; c.load_config('vit_s16');"
        "print([m for m in ('torch', 'timm', 'deepspeed', 'numpy') if m in sys.modules])"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_empty_file_is_the_default_configuration(empty: str) -> None:
    assert load_config(empty) == RunConfig()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2e-4", 2e-4),
        ("5E-4", 5e-4),
        ("1e4", 1e4),
        ("1.e-3", 1e-3),
        (".5", 0.5),
        ("-2", -2),
        ("+3", 3),
        ("65_536", 65536),
        ("010", 10),
        ("true", True),
        ("on", "on"),
        ("yes", "yes"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("null", None),
        ("~", None),
        ("'2'", "2"),
        ("synthetic:shapes?images=2", "synthetic:shapes?images=2"),
        ("[1, 0.5]", [1, 0.5]),
    ],
)
def test_plain_scalars_read_as_people_mean_them(text: str, value: object) -> None:
    read = read_yaml(text)
    assert read == value
    assert type(read) is type(value)


_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
    | st.sampled_from(["1e4", "1:30", "on", "null", "0x1f", "010", "1_0", ".inf", "~", "<<", "="])
)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text(st.characters(codec="utf-8")), _scalars | st.lists(_scalars)))
def test_yaml_reads_back_what_it_wrote(values: dict[str, object]) -> None:
    read = read_yaml(write_yaml(values))
    assert read == values
    assert isinstance(read, dict)
    assert [type(value) for value in read.values()] == [type(v) for v in values.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lr: 1\n  lr: 2\n", "line 3: duplicate key 'lr', first given on line 2"),
        ("seed: 1\nseed: 1\n", "line 2: duplicate key 'seed', first given on line 1"),
        ("seed: 1\n2: 3\n", "line 2: a key must be text, got 2"),
        ("seed: &a 1\nresume: *a\n", r"line 2: aliases \(\*name\) are not allowed"),
        ("optim:\n  lr: 1\n x: 2\n", "line 3, column 2: not valid YAML"),
        ("seed: !!python/name:os.system\n", r"line 1: tags \(.*os\.system'\) are not allowed"),
        ("seed: !!timestamp soon\n", "line 1: tags"),
        ("seed: 1\n---\nseed: 2\n", "line 2, column 1: not valid YAML"),
        ("- 1\n", r"needs a mapping of keys to values, got \[1\]"),
        ("[" * 400, "not valid YAML"),
        ("defaults: a.yaml\n", r"defaults: needs a list of file paths, got 'a.yaml' \(text\)"),
        ("defaults:\n", "defaults: needs a list of file paths, got nothing"),
        ("defaults: [1]\n", r"defaults: needs a list of file paths, got \[1\]"),
    ],
)
def test_bad_file_is_explained_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = _write(tmp_path, "bad.yaml", text)
    with pytest.raises(ConfigError, match=f"bad.yaml.*{message}"):
        load_config(path)


def test_file_that_is_not_text_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "image.yaml"
    path.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(str(path))


def test_later_default_wins_and_file_wins_over_both(tmp_path: Path) -> None:
    _write(tmp_path, "base/a.yaml", "crops: {num_local: 1, global_scale: [0.1, 0.2]}\nseed: 1\n")
    _write(tmp_path, "base/b.yaml", "crops: {num_local: 2, local_size: 80}\nseed: 2\n")
    path = _write(
        tmp_path,
        "run/c.yaml",
        "defaults: [../base/a.yaml, ../base/b.yaml]\nseed: 3\ncrops: {local_size: 64}\n",
    )
    config = load_config(path)
    assert config.seed == 3
    assert config.crops.num_local == 2
    assert config.crops.local_size == 64
    assert config.crops.global_scale == (0.1, 0.2)  # merged, not replaced with the mapping
    assert load_config(path, ["seed=4", "seed=5"]).seed == 5


def test_default_paths_are_relative_to_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, "deep/base/a.yaml", "defaults: [more/b.yaml]\n")
    _write(tmp_path, "deep/base/more/b.yaml", "seed: 7\n")
    _write(tmp_path, "deep/c.yaml", "defaults: [base/a.yaml]\n")
    monkeypatch.chdir(tmp_path)
    assert load_config("deep/c.yaml").seed == 7


def test_same_default_twice_is_no_cycle(tmp_path: Path) -> None:
    _write(tmp_path, "base.yaml", "seed: 7\n")
    _write(tmp_path, "left.yaml", "defaults: [base.yaml]\n")
    _write(tmp_path, "right.yaml", "defaults: [base.yaml]\n")
    assert load_config(_write(tmp_path, "c.yaml", "defaults: [left.yaml, right.yaml]")).seed == 7


def test_cycle_is_named(tmp_path: Path) -> None:
    _write(tmp_path, "a.yaml", "defaults: [b.yaml]\n")
    _write(tmp_path, "b.yaml", "defaults: [a.yaml]\n")
    path = _write(tmp_path, "run.yaml", "defaults: [a.yaml]\n")
    assert "a.yaml -> b.yaml -> a.yaml" in _message(path)


def test_nothing_in_a_file_is_not_null(tmp_path: Path) -> None:
    path = _write(tmp_path, "run.yaml", "train:\n  init_from:\n  stop_after_steps: null\n")
    assert _message(path).startswith("train.init_from: needs text that is not empty, or null,")


def test_a_parent_of_two_files_is_merged_once(tmp_path: Path) -> None:
    _write(tmp_path, "base.yaml", "head: {num_prototypes: 65536}\nseed: 1\n")
    _write(tmp_path, "small.yaml", "defaults: [base.yaml]\nhead: {num_prototypes: 128}\n")
    _write(tmp_path, "other.yaml", "defaults: [./base.yaml]\nseed: 2\n")
    config = load_config(_write(tmp_path, "c.yaml", "defaults: [small.yaml, other.yaml]"))
    assert (config.head.num_prototypes, config.seed) == (128, 2)


def test_a_default_that_could_not_win_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, "base.yaml", "seed: 1\n")
    _write(tmp_path, "child.yaml", "defaults: [base.yaml]\nseed: 2\n")
    path = _write(tmp_path, "c.yaml", "defaults: [child.yaml, base.yaml]")
    assert "c.yaml: defaults: base.yaml cannot win over child.yaml" in _message(path)
    assert load_config(_write(tmp_path, "d.yaml", "defaults: [base.yaml, child.yaml]")).seed == 2


@pytest.mark.parametrize("name", ["vit_b16", "vit_b16.yaml"])
def test_a_preset_is_inherited_by_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "vit_b16").mkdir()  # a folder of that name, such as of a run
    path = _write(tmp_path, "mine.yaml", f"defaults: [{name}]\nrun_dir: runs/vit_b16\n")
    assert load_config(path) == load_config("vit_b16")


def test_a_backbone_does_not_keep_the_sizes_of_another(tmp_path: Path) -> None:
    named = "model.backbone=vit_base_patch16_224"
    model = load_config("quickstart", [named]).model
    assert (model.embed_dim, model.depth, model.num_heads) == (None, None, None)
    assert model.patch_size == 4  # the crops are multiples of it
    model = load_config("quickstart", ["model.depth=2", named, "model.num_heads=6"]).model
    assert (model.embed_dim, model.depth, model.num_heads) == (None, 2, 6)
    child = "defaults: [quickstart]\nmodel: {backbone: vit_base_patch16_224, depth: 1}\n"
    model = load_config(_write(tmp_path, "child.yaml", child)).model
    assert (model.embed_dim, model.depth) == (None, 1)
    sized = _write(tmp_path, "sized.yaml", "model: {embed_dim: 96, num_heads: 2}\n")
    assert load_config(sized, [named]).model.embed_dim is None
    assert load_config(sized).model.embed_dim == 96
    same = load_config("quickstart", ["model.backbone=vit_tiny_patch16_224"])
    assert same == load_config("quickstart")
    net = ["model.backbone=resnet50", "engine.checkpoint_every_k_blocks=0"]
    assert load_config("quickstart", net).model.patch_size is None


def test_a_leading_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    mixed = "data.train=[{source: ~/a}, {source: b~}]"
    settings = ["run_dir=~/runs/a", "train.init_from=~/w", mixed, "data.manifest=~/m"]
    config = load_config("quickstart", [*settings, "eval.train=~/t", "eval.test='~'"])
    assert (config.run_dir, config.train.init_from) == ("/home/me/runs/a", "/home/me/w")
    assert [part.source for part in config.data.sources] == ["/home/me/a", "b~"]
    assert config.data.manifest == "/home/me/m"
    assert (config.eval.train, config.eval.test) == ("/home/me/t", "/home/me")


def test_missing_default_names_the_file_that_wants_it(tmp_path: Path) -> None:
    path = _write(tmp_path, "run.yaml", "defaults: [gone.yaml]\n")
    message = _message(path)
    assert "gone.yaml: cannot be read" in message
    assert "in the defaults of" in message
    assert "run.yaml" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_s6", "vit_s6: unknown preset, did you mean 'vit_s16'?"),
        ("zzz", "zzz: unknown preset. Presets: "),
        ("runs/zzz.yaml", "runs/zzz.yaml: no such file. Presets: "),
        ("vit_b16.yaml", "vit_b16.yaml: no such file, did you mean 'vit_b16'?"),
        (".", "is a folder"),
        ("x" * 5000, "unknown preset"),
    ],
)
def test_unknown_name_suggests_and_lists_presets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text = _message(name)
    assert message in text
    if name != ".":
        assert ", ".join(list_presets()) in text


# Names of files that YAML would read as something else, or not at all.
TEXTS = [
    *("2026", "1e5", "007", "true", "/data/a #1", "a: b", "*.tar", "@x", "%x", "&a", "!x", "{a}"),
    *("- a", "'a", "'a' and 'b'", " a ", "[a]/x", "[a] [b]", "[x]", "null"),
]


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("optim.lr=1e-4", lambda c: c.optim.lr, 1e-4),
        ("optim.clip_grad=0", lambda c: c.optim.clip_grad, 0.0),
        ("crops.local_scale=[0.05, 0.25]", lambda c: c.crops.local_scale, (0.05, 0.25)),
        ("data.mean=[0,0,1]", lambda c: c.data.mean, (0.0, 0.0, 1.0)),
        ("resume=false", lambda c: c.resume, False),
        ("data.train=synthetic:shapes?images=9&size=32", lambda c: c.data.train[-7:], "size=32"),
        ("data.train='5'", lambda c: c.data.train, "5"),
        ("train.stop_after_steps=null", lambda c: c.train.stop_after_steps, None),
        (" seed = 3 ", lambda c: c.seed, 3),
        (" run_dir = a b ", lambda c: c.run_dir, "a b"),
        *((f"run_dir={text}", lambda c: c.run_dir, text) for text in TEXTS),
        *((f"data.train={text}", lambda c: c.data.train, text) for text in TEXTS[:-2]),
        ("run_dir='it''s #1'", lambda c: c.run_dir, "it's #1"),
        (r'run_dir="a \" b"', lambda c: c.run_dir, 'a " b'),
        ("data.train=[{source: '[a]x'}] # b", lambda c: c.data.train[0].source, "[a]x"),
        ("run_dir='a #1'", lambda c: c.run_dir, "a #1"),
        ("data.train=null", lambda c: c.data.train, None),
    ],
)
def test_override_is_read_as_yaml(empty: str, override: str, get, value: object) -> None:  # type: ignore[no-untyped-def] # a lambda
    got = get(load_config(empty, ["train.stop_after_steps=9", override]))
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("text", [*TEXTS, "'a #1'", '"a"', "'it''s'"])
def test_an_override_made_of_a_path_is_that_path(text: str) -> None:
    assert load_config("quickstart", [text_override("run_dir", text)]).run_dir == text


@pytest.mark.parametrize("text", ["null", "[a]", "[a, b]", "2026"])
def test_an_override_made_of_a_source_is_that_source(text: str) -> None:
    assert load_config("quickstart", [text_override("data.train", text)]).data.train == text


def test_a_pattern_of_shards_that_the_shell_took_apart_is_refused(empty: str) -> None:
    apart = [f"data.train=/data/train-{number:03}.tar" for number in range(3)]
    with pytest.raises(ConfigError, match=r"^data\.train: .*train-000\.tar and .*in quotes"):
        load_config(empty, ["seed=1", *apart])
    assert load_config(empty, [apart[0], "seed=1", apart[1]]).data.train == "/data/train-001.tar"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("crops.num_local", "override 'crops.num_local': needs section.key=value, such as"),
        ("--seed=1", "override '--seed=1': needs section.key=value"),
        ("=1", "override '=1': needs section.key=value"),
        ("crops..num_local=1", "needs section.key=value"),
        ("defaults=[a.yaml]", "defaults can be given in a file only"),
        ("data.train=[1", "the value is not YAML"),
        ("crops.num_local=@x", "the value is not YAML"),
        ("data.train=b\udce9", r"data.train: 'b\udce9' is not UTF-8"),
        ("run_dir=b\udce9", "make a link to it"),
        ("crops={num_local: 1}", "the value is a mapping; give one override per key"),
        ("crops=3", "crops: needs a mapping of keys to values, got 3 (command line)"),
    ],
)
def test_bad_override_is_explained(empty: str, override: str, message: str) -> None:
    assert message in _message(empty, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("crops.num_locl=3", "crops.num_locl: unknown key, did you mean 'num_local'?"),
        ("optm.lr=3", "optm: unknown key, did you mean 'optim'?"),
        ("sed=3", "sed: unknown key, did you mean 'seed'?"),
        ("lr=3", "lr: unknown key, did you mean 'optim.lr' or 'schedules.lr'?"),
        ("train.lr=3", "train.lr: unknown key, did you mean 'optim.lr' or 'schedules.lr'?"),
        ("train.seed=3", "train.seed: unknown key, did you mean 'seed'?"),
        ("log.zzz=3", "log.zzz: unknown key; known are every_steps, wandb, wandb_project"),
        ("zzz.a.b=3", "zzz: unknown key; known are seed, run_dir"),
        ("crops.num_local.x=3", "crops.num_local: needs a whole number, got a mapping"),
        ("crops.num_local='2'", "crops.num_local: needs a whole number, got '2' (text)"),
        ("crops.num_local=2.0", "crops.num_local: needs a whole number, got 2.0"),
        ("crops.num_local=true", "crops.num_local: needs a whole number, got true"),
        ("crops.num_local=", "crops.num_local: needs a whole number, got nothing (null)"),
        ("train.init_from=", "train.init_from: needs text that is not empty, or null, got ''"),
        ("train.init_from= ", "train.init_from: needs text that is not empty, or null, got ''"),
        ("data.train=", "data.train: needs text that is not empty, or null, got ''"),
        (
            "train.stop_after_steps=",
            "train.stop_after_steps: needs a whole number, or null, got ''",
        ),
        ("data.max_pixel_value=", "data.max_pixel_value: needs a number, or null, got ''"),
        ("optim.lr='2'", "optim.lr: needs a number, got '2' (text)"),
        ("optim.lr=true", "optim.lr: needs a number, got true"),
        ("optim.lr=.nan", "optim.lr: needs a finite number, got nan"),
        ("optim.lr=.inf", "optim.lr: needs a finite number, got inf"),
        ("engine.zero_stage=true", "engine.zero_stage: needs a whole number, got true"),
        ("resume=yes", "resume: needs true or false, got 'yes' (text)"),
        ("resume=1", "resume: needs true or false, got 1"),
        ("run_dir=''", "run_dir: needs text that is not empty, got '' (text)"),
        ("optim.name=adam", "optim.name: needs one of 'adamw', 'sgd', got 'adam' (text)"),
        ("crops.local_scale=0.1", "crops.local_scale: needs a list, got 0.1"),
        ("crops.local_scale=[0.1]", "crops.local_scale: needs a list of 2 numbers, got [0.1]"),
        (
            "data.mean=[0,0,0,0]",
            "data.mean: needs one number for each of 3 channels (data.channels), got 4; "
            "`dinoscale data dataset-stats` measures them",
        ),
        ("augment.blur_probs=[]", "augment.blur_probs: needs a list of 3 numbers, got []"),
        ("data.mean=[0,x,0]", "data.mean: item 2 of the list needs a number, got 'x' (text)"),
        (f"crops.num_local=[{'x' * 200}]", "xxx..."),
    ],
)
def test_mistake_is_one_sentence_with_key_value_and_what_is_allowed(
    empty: str, override: str, message: str
) -> None:
    text = _message(empty, override)
    assert message in text
    assert text.endswith(" (command line)")
    assert "\n" not in text
    assert "pydantic" not in text


def test_every_mistake_is_reported_with_its_file(tmp_path: Path) -> None:
    _write(tmp_path, "base.yaml", "optim: {lr: fast}\n")
    path = _write(
        tmp_path, "run.yaml", "defaults: [base.yaml]\ncrops: {num_locl: 1}\ncrops.num_local: 2\n"
    )
    first, second, third = sorted(_message(path, "seed=-1").splitlines())[:3]
    assert first.startswith("crops.num_local: unknown key; in a file, 'num_local' stands indented")
    assert second == f"crops.num_locl: unknown key, did you mean 'num_local'? ({path})"
    assert third.startswith("optim.lr: needs a number, got 'fast' (text) (")
    assert third.endswith("base.yaml)")


def test_parse_config_reports_the_same_way() -> None:
    assert parse_config({"seed": 3}).seed == 3
    with pytest.raises(ConfigError, match=r"^sed: unknown key, did you mean 'seed'\? \(old run\)$"):
        parse_config({"sed": 3}, origin="old run")


def _fractions(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, width=64)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    run_dir=st.text(st.characters(codec="utf-8"), min_size=1),
    lr=_fractions(1e-3, 1e3),
    min_lr=_fractions(0, 1e-6),
    scale=st.tuples(_fractions(1e-9, 0.5), _fractions(0.51, 1.0)),
    train=st.none() | st.text(st.characters(codec="utf-8"), min_size=1),
    resume=st.booleans(),
)
def test_load_of_dump_is_the_same_configuration(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    run_dir: str,
    lr: float,
    min_lr: float,
    scale: tuple[float, float],
    train: str | None,
    resume: bool,
) -> None:
    values = {
        "seed": seed,
        "run_dir": run_dir,
        "resume": resume,
        "optim": {"lr": lr, "min_lr": min_lr},
        "crops": {"global_scale": list(scale)},
        "data": {"train": train},
    }
    config = parse_config(values)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8", newline="")
    assert load_config(str(path)) == config


@pytest.mark.parametrize("name", list_presets())
def test_dump_of_every_preset_names_every_field_and_loads(tmp_path: Path, name: str) -> None:
    config = load_config(name)
    text = dump_config(config)
    assert load_config(_write(tmp_path, "config.yaml", text)) == config
    read = read_yaml(text)
    assert isinstance(read, dict)
    assert set(read) == set(RunConfig.model_fields)
