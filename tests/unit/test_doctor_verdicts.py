"""What the pre-flight concludes from given facts."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dinoscale.cluster.doctor import environment, examine, machine, network, storage, versions
from dinoscale.cluster.doctor.images import SetFacts, judge_images, judge_plan, sample_ids
from dinoscale.cluster.doctor.machine import Device, Machine
from dinoscale.cluster.doctor.marker import RunDirFacts
from dinoscale.cluster.doctor.network import LARGE_BYTES, Network
from dinoscale.cluster.doctor.report import Check, Report, size_text
from dinoscale.config import list_presets, load_config, phases_of
from dinoscale.runtime.launcher_env import Process
from tests.distributed.tiny_run import tiny_config

HOSTS = ["a", "b"]
GOOD = {
    "python": "3.12.3",
    "torch": "2.13.0+cpu",
    "torchvision": "0.28.0",
    "deepspeed": "0.19.8",
    "timm": "1.0.31",
    "webdataset": "1.0.2",
    "numpy": "2.4.6",
    "pillow": "13.0.0",
    "safetensors": "0.8.0",
    "pydantic": "2.14.3",
    "commit": "abc",
}
GPU = Device("H100", total_bytes=80 * 10**9, free_bytes=79 * 10**9)
CPU_NODE = Machine(
    host="a",
    num_devices=0,
    device=None,
    why_no_device=None,
    cores=frozenset(range(8)),
    quota=None,
    threads=4,
    shared_free_bytes=10**10,
    open_files=1024,
    product_s={"bf16": 0.01, "fp32": 0.02},
)
GPU_NODE = replace(CPU_NODE, num_devices=2, device=GPU)
EIGHT = Process(0, 8, 0, 8)  # the first of the ranks of a node


def _one(checks: list[Check]) -> Check:
    (check,) = checks
    return check


def _verdicts(checks: list[Check]) -> list[str]:
    return [check.verdict for check in checks]


@pytest.mark.parametrize(
    ("package", "found", "says"),
    [
        ("deepspeed", "0.19.7", "deepspeed>=0.19.8,<0.20"),
        ("timm", "1.0.9", "timm>=1.0.24"),
        ("torch", "2.5.1+cu124", "torch>=2.6"),
        ("torchvision", None, "no torchvision"),
    ],
)
def test_known_bad_versions_are_a_problem(package: str, found: str | None, says: str) -> None:
    check = _one(versions.judge_versions([{**GOOD, package: found}], ["a"]))
    assert check.verdict == "problem"
    assert says in check.text


@pytest.mark.parametrize(("package", "found"), [("torch", "2.14.0"), ("deepspeed", "0.20.1")])
def test_a_version_newer_than_the_tests_have_is_a_warning(package: str, found: str) -> None:
    newer = {**GOOD, package: found}
    check = _one(versions.judge_versions([newer, newer], HOSTS))
    assert check.verdict == "warning"
    assert f"rank 0 (a) has {package} {found}, newer than" in check.text


def test_known_good_versions_are_ok() -> None:
    assert _one(versions.judge_versions([GOOD, GOOD], HOSTS)).verdict == "ok"


@pytest.mark.parametrize("name", ["torch", "python", "commit"])
def test_versions_that_differ_between_ranks_are_a_problem(name: str) -> None:
    other = {**GOOD, name: "2.12.9"}
    check = _one(versions.judge_versions([GOOD, other], HOSTS))
    assert check.verdict == "problem"
    assert f"{name} is {GOOD[name]} on rank 0 (a) but 2.12.9 on rank 1 (b)" in check.text


def test_supported_versions_are_those_of_the_package() -> None:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    for package, (first, after) in versions.SUPPORTED.items():
        wanted = f"{package}>={first}" + (f",<{after}" if after else "")
        assert re.search(rf'^  "{re.escape(wanted)}",$', text, re.MULTILINE), wanted


def test_operators_of_another_build_are_a_warning() -> None:
    check = _one(versions.judge_operators([True, False], HOSTS))
    assert check.verdict == "warning"
    assert "rank 1 (b)" in check.text


def test_devices() -> None:
    two = [GPU_NODE, GPU_NODE]
    assert _one(machine.judge_devices(two)).text == "2 x H100 with 80 GB"
    assert "1 of 2 accelerators" in _one(machine.judge_devices(two[:1])).text
    busy = replace(GPU_NODE, device=replace(GPU, free_bytes=10**10))
    assert "70 GB of 80 GB are in use" in _one(machine.judge_devices([GPU_NODE, busy])).text
    slow = replace(GPU_NODE, device=replace(GPU, name="T4"))
    assert _one(machine.judge_devices([GPU_NODE, slow])).verdict == "warning"


def test_missing_devices() -> None:
    assert _one(machine.judge_devices([CPU_NODE])).verdict == "ok"
    odd = replace(CPU_NODE, host="b", why_no_device="the driver is too old")
    check = _one(machine.judge_devices([odd, odd]))
    assert check.verdict == "problem"
    assert "the driver is too old" in check.text
    hidden = replace(CPU_NODE, why_no_device="CUDA_VISIBLE_DEVICES hides all")
    assert _one(machine.judge_devices([hidden])).verdict == "warning"
    check = _one(machine.judge_devices([GPU_NODE, odd]))
    assert check.verdict == "problem"
    assert "rank 1 (b)" in check.text


def test_cores() -> None:
    two = [CPU_NODE, CPU_NODE]
    assert _verdicts(machine.judge_cores(two, num_workers=4)) == ["ok"]
    assert "data.num_workers=4 fits" in _one(machine.judge_cores(two, num_workers=5)).text
    threads = [replace(node, threads=5) for node in two]
    assert "OMP_NUM_THREADS=4" in _one(machine.judge_cores(threads, num_workers=0)).text
    limited = [replace(node, quota=1.5, threads=1) for node in two]
    assert "share 2 cores of a" in _one(machine.judge_cores(limited, num_workers=2)).text
    apart = [replace(CPU_NODE, threads=8), replace(CPU_NODE, host="b", threads=8)]
    assert _verdicts(machine.judge_cores(apart, num_workers=8)) == ["ok"]


@pytest.mark.parametrize(
    ("precision", "verdict"), [("bf16", "warning"), ("fp32", "ok"), (None, "ok")]
)
def test_slow_bf16_is_a_warning_where_the_run_asks_for_it(
    precision: str | None, verdict: str
) -> None:
    slow = replace(CPU_NODE, product_s={"bf16": 0.08, "fp32": 0.02})
    check = machine.judge_precision([CPU_NODE, slow], precision=precision)
    assert check.verdict == verdict
    assert machine.judge_precision([CPU_NODE], precision=precision).verdict == "ok"


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_divides_over_the_ranks_of_a_node(name: str) -> None:
    for run in phases_of(load_config(name)):
        check = judge_plan(run, world_size=8, ranks_of_node=8, num_images=8192)
        assert check.verdict == "ok", check.text


@pytest.mark.parametrize("name", ["dinov3_vit7b16", "dinov3_vitl16_in1k", "quickstart_dinov3"])
def test_presets_of_dinov3_are_judged_whole(name: str, tmp_path: Path) -> None:
    """But for the disk, whose free space is not ours."""
    file = tmp_path / "file"
    file.touch()
    images = "synthetic:shapes?images=8192&size=16"
    config = load_config(name, [f"data.train={images}", f"run_dir={file}/run"])
    report = Report(active=False)
    parameters = examine._run(report, config, ["a"], EIGHT, timeout_s=10.0)
    assert parameters is not None
    assert {c.name for c in report.checks if c.verdict == "problem"} == {"run_dir"}
    assert len([c for c in report.checks if c.name == "plan"]) == max(len(config.phases), 1)
    assert examine._compute_s(config, [CPU_NODE] * 8)
    assert examine._gradient_bytes(config, parameters, world_size=8)


def test_a_rank_slower_than_most_is_named() -> None:
    slow = replace(GPU_NODE, host="b", product_s={"bf16": 0.2, "fp32": 0.02})
    check = _one(machine.judge_speed([GPU_NODE] * 15 + [slow]))
    assert check.verdict == "warning"
    assert check.text.startswith(
        "rank 15 (b): matrix products in bf16 take up to 20.0 times as long as"
    )
    assert _verdicts(machine.judge_speed([GPU_NODE, slow])) == ["warning"]
    assert machine.judge_speed([GPU_NODE] * 16) == []
    busy = replace(CPU_NODE, product_s={"bf16": 0.02, "fp32": 0.02})
    assert machine.judge_speed([CPU_NODE, busy]) == []


def test_small_shared_memory_is_a_warning_for_data_workers_only() -> None:
    small = replace(CPU_NODE, shared_free_bytes=2**14)
    run = tiny_config(data={"num_workers": 4})
    assert machine.judge_shared_memory([CPU_NODE, small], run).verdict == "warning"
    assert machine.judge_shared_memory([CPU_NODE], run).verdict == "ok"
    assert machine.judge_shared_memory([small], tiny_config()).verdict == "ok"
    assert machine.judge_shared_memory([small], None).verdict == "warning"


def test_open_files_are_counted_where_all_ranks_meet() -> None:
    many = [GPU_NODE] * 256
    assert machine.judge_open_files([*many]).verdict == "ok"
    check = machine.judge_open_files([*many, GPU_NODE])
    assert check.verdict == "problem"
    assert check.text.startswith(
        "1024 are allowed on a, but 257 ranks that meet there need about 1027"
    )
    assert machine.judge_open_files([CPU_NODE] * 256).verdict == "problem"  # gloo's besides
    assert machine.judge_open_files([replace(GPU_NODE, open_files=2**16)] * 4000).verdict == "ok"


def test_gpu_for_one_process_is_a_problem_for_trials_only() -> None:
    alone = replace(GPU_NODE, device=replace(GPU, one_process=True))
    auto = tiny_config(train={"micro_batch_size": "auto"})
    (check,) = machine.judge_sharing([GPU_NODE, alone], auto)
    assert check.verdict == "problem"
    assert "rank 1 (a) serves one process at a time" in check.text
    assert machine.judge_sharing([GPU_NODE, alone], tiny_config()) == []
    assert machine.judge_sharing([GPU_NODE], auto) == []


def _network(*, latency_s: float = 1e-4, speed: float = 1e9, clock: float = 0.0) -> Network:
    return Network(latency_s, LARGE_BYTES / speed, [clock, clock + 1.0])


def _judge(*of_ranks: Network) -> list[Check]:
    return network.judge_network(of_ranks, HOSTS, world_size=2, gradient_bytes=10**8)


def test_network() -> None:
    fast = _network()
    assert _verdicts(_judge(fast, fast)) == ["ok", "ok"]
    assert "the gradients of a step take about 0.1 s" in _judge(fast, fast)[0].text
    assert _judge(fast, _network(latency_s=0.02))[0].verdict == "warning"
    assert _judge(fast, _network(speed=1e7))[0].verdict == "warning"
    late = _judge(fast, _network(clock=-3.0))[1]
    assert late.verdict == "warning"
    assert "rank 1 (b) up to 3.0 s behind rank 0" in late.text


@pytest.mark.parametrize(
    ("gradient_bytes", "compute_s", "verdict"),
    [(1.3e9, 1.0, "warning"), (1.3e9, 5.0, "ok"), (4e7, 0.01, "ok"), (4e9, None, "warning")],
)
def test_bandwidth_is_judged_by_what_a_step_sums(
    gradient_bytes: float, compute_s: float | None, verdict: str
) -> None:
    between_nodes = _network(speed=1e9)
    check, _ = network.judge_network(
        [between_nodes] * 2,
        HOSTS,
        world_size=2,
        gradient_bytes=int(gradient_bytes),
        compute_s=compute_s,
    )
    assert check.verdict == verdict


def test_one_slow_barrier_is_not_taken_for_a_wrong_clock() -> None:
    disturbed = Network(1e-4, 0.01, [5.0, 1.0])
    assert _judge(_network(), disturbed)[1].verdict == "ok"


@pytest.mark.parametrize(
    ("free_bytes", "num_present", "verdict"),
    [(299, 0, "ok"), (300, 0, "ok"), (199, 0, "warning"), (99, 0, "problem"), (100, 1, "ok")],
)
def test_free_disk_against_checkpoints(free_bytes: int, num_present: int, verdict: str) -> None:
    check = storage.judge_disk(
        free_bytes=free_bytes,
        checkpoint_bytes=100,
        num_checkpoints=2,
        num_present=num_present,
        path="/runs",
    )
    assert check.verdict == verdict


@pytest.mark.parametrize(
    ("limits", "verdict", "says"),
    [
        ({"refused": "Disk quota exceeded"}, "problem", "are refused (Disk quota exceeded)"),
        ({"free_files": 9}, "problem", "only for 9 files (inodes"),
        ({"free_files": 19}, "warning", "2 checkpoints need 20"),
        ({"free_files": 20}, "ok", "fit"),
    ],
)
def test_quotas_and_inodes_limit_checkpoints(
    limits: dict[str, Any], verdict: str, says: str
) -> None:
    room = {"free_bytes": 1000, "checkpoint_bytes": 100, "checkpoint_files": 10}
    more = {"num_checkpoints": 2, "num_present": 0, "path": "/runs"}
    check = storage.judge_disk(**room, **more, **limits)
    assert check.verdict == verdict
    assert says in check.text


@pytest.mark.parametrize(("gpus", "should"), [("", False), ("0", False), ("4", True)])
def test_a_job_of_slurm_has_the_gpus_that_it_was_given(
    monkeypatch: pytest.MonkeyPatch, gpus: str, should: bool
) -> None:
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))  # no driver, no bus
    monkeypatch.setattr(Path, "exists", lambda *_: False)
    monkeypatch.delenv("SLURM_JOB_GPUS", raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", gpus)
    assert machine._should_have_device() is should


def test_space_is_reserved_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage._why_no_space(tmp_path, 10**6) is None
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")  # the reason is compared
    assert storage._why_no_space(tmp_path, 2**62) in (None, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_size_and_number() -> None:
    assert storage.checkpoint_bytes(1000, optimizer="adamw") == 16_000
    assert storage.checkpoint_bytes(1000, optimizer="sgd") == 12_000
    assert storage.checkpoint_bytes(1000, optimizer="adamw", gram=True) == 20_000
    assert storage.num_checkpoints(tiny_config(train={"epochs": 100})) == 3  # no k-NN, no best
    labelled = {"train": "synthetic:shapes", "test": "synthetic:shapes"}
    config = tiny_config(train={"epochs": 100}, checkpoint={"keep_every": 25}, eval=labelled)
    assert storage.num_checkpoints(config) == 8
    named = tiny_config(train={"epochs": 100}, checkpoint={"keep_steps": [7, 9]})
    assert storage.num_checkpoints(named) == 5
    guard = {"every_steps": 5, "images": "a", "on_fall": "roll_back"}
    kept = tiny_config(checkpoint={"keep_last": 3}, guard=guard)
    assert storage.num_checkpoints(kept) == 3 + 1 + 1 + 3, "those of a fall lie aside"


def test_ranks_that_cannot_use_run_dir_are_named() -> None:
    good, blind = (
        RunDirFacts("/runs", seen=True, error=None),
        RunDirFacts("/runs", seen=False, error=None),
    )
    assert storage.judge_shared([good, good], HOSTS).verdict == "ok"
    check = storage.judge_shared([good, blind], HOSTS)
    assert check.verdict == "problem"
    assert check.text.startswith("rank 1 (b) cannot see")
    refused = RunDirFacts("/runs", seen=True, error="Permission denied")
    check = storage.judge_shared([good, refused], HOSTS)
    assert check.verdict == "problem"
    assert "rank 1 (b) cannot write to /runs: Permission denied" in check.text


def test_run_that_may_not_be_resumed_is_a_problem(tmp_path: Path) -> None:
    config = tiny_config(run_dir=str(tmp_path))
    assert "starts from the beginning" in storage.check_resume(config).text
    (tmp_path / "checkpoints" / "step_00000012").mkdir(parents=True)
    assert "step_00000012" in storage.check_resume(config).text
    refused = config.model_copy(update={"resume": False})
    assert storage.check_resume(refused).verdict == "problem"


def test_samples_are_spread_over_the_set_and_over_ranks() -> None:
    first, second = (sample_ids(num_images=1600, rank=r, world_size=2) for r in range(2))
    assert first == list(range(0, 1600, 200))
    assert second == list(range(100, 1600, 200))
    assert sample_ids(num_images=3, rank=1, world_size=2) == [0, 1, 2]


def test_images() -> None:
    good = SetFacts("/data", num_images=100, num_decoded=8, seconds=0.1)
    key = "data.train"

    def judge(*found: SetFacts) -> Check:
        return _one(judge_images([{key: one} for one in found], HOSTS))

    assert judge(good, good).verdict == "ok"
    assert "80 images/s" in judge(good, good).text
    slow = replace(good, seconds=10.0)
    assert judge(good, slow).text.startswith("rank 1 (b): reads and decodes 0.8 images/s")
    assert judge(good, slow).verdict == "warning"
    fewer = replace(good, num_images=99)
    assert "100 images on rank 0 but 99 on rank 1 (b)" in judge(good, fewer).text
    some = replace(good, num_decoded=7, bad=["/data/x.jpg: truncated"])
    assert judge(good, some).verdict == "warning"
    assert "/data/x.jpg: truncated" in judge(good, some).text
    most = replace(good, num_decoded=1, bad=["x", "y"])
    assert judge(most).verdict == "problem"
    assert "rank 1 (b): gone" in judge(good, SetFacts("/data", error="gone")).text
    assert _one(judge_images([{}], HOSTS)).verdict == "problem"


def test_plan() -> None:
    config = tiny_config()
    assert (
        "4 steps per epoch" in judge_plan(config, world_size=2, ranks_of_node=2, num_images=24).text
    )
    assert judge_plan(config, world_size=4, ranks_of_node=4, num_images=24).verdict == "problem"
    assert judge_plan(config, world_size=4, ranks_of_node=4, num_images=None).verdict == "problem"
    assert judge_plan(config, world_size=2, ranks_of_node=2, num_images=None).verdict == "ok"
    assert judge_plan(config, world_size=2, ranks_of_node=2, num_images=5).verdict == "problem"
    auto = judge_plan(
        tiny_config(train={"micro_batch_size": "auto"}),
        world_size=2,
        ranks_of_node=2,
        num_images=24,
    )
    assert (auto.verdict, "as large as fit (auto)" in auto.text) == ("ok", True)


def test_variables_are_named_and_never_shown() -> None:
    names = environment.steering_names({"NCCL_DEBUG": "secret", "HOME": "/root"})
    assert names == ["NCCL_DEBUG"]
    others = ("AWS_PROFILE", "LD_LIBRARY_PATH", "DINOSCALE_KEY", "https_proxy")
    assert environment.steering_names(dict.fromkeys(others, "secret")) == sorted(others)
    assert environment.judge_variables([names, names], HOSTS).text == "set: NCCL_DEBUG"
    check = environment.judge_variables([names, []], HOSTS)
    assert check.verdict == "warning"
    assert "NCCL_DEBUG is set on other ranks but not on rank 1 (b)" in check.text


def test_wandb_says_where_the_curves_go() -> None:
    on = tiny_config(log={"wandb": True})
    key = {"WANDB_API_KEY": "secret"}
    assert environment.judge_wandb(tiny_config(), {}).text == "off"
    assert "offline in unused/wandb" in environment.judge_wandb(on, key).text
    assert "wandb login" in environment.judge_wandb(on, {"WANDB_MODE": "online"}).text
    assert environment.judge_wandb(on, key | {"WANDB_MODE": "online"}).text == "online"
    assert environment.judge_wandb(on, {"WANDB_MODE": "ofline"}).verdict == "warning"


def test_sizes_are_readable() -> None:
    assert [size_text(n) for n in (999, 25_300_000_000, 7e17)] == ["999 B", "25.3 GB", "700000 TB"]


def test_meeting_place_on_one_process_is_tried() -> None:
    alone = Process(rank=0, world_size=1, local_rank=0, local_world_size=1)
    assert "free port" in network.require_address(alone, {})
