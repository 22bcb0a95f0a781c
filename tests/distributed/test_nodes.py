"""Three ranks on what they take for two hosts: each named, what differs between them refused."""

import logging
import os
import pickle
import shutil
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

import pytest
from PIL import Image

from tests.distributed.tiny_run import tiny_config
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

HOSTS = ["gpu-01", "gpu-02", "gpu-02"]


class _Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname[0]} {record.getMessage()}")


def start_on_two_hosts(folder: str) -> dict[str, list[str]]:
    """On every rank, by what is odd: what was logged, and last what was raised, if anything."""
    from dinoscale.cluster.agreement import gather_members, keep_logs, require_alike, require_shared
    from dinoscale.cluster.doctor import marker
    from dinoscale.runtime import distributed
    from dinoscale.runtime.launcher_env import read_process

    process, said = read_process(os.environ), _Said()
    rank, root = distributed.rank(), logging.getLogger()
    root.addHandler(said)
    root.setLevel(logging.INFO)

    def of(odd_rank: int, name: str, odd: Any) -> Any:
        """Another function in place of `name` on one rank."""
        return (
            patch(name, odd)
            if rank == odd_rank
            else patch("dinoscale.cluster.agreement.__doc__", "")
        )

    def start(run_dir: Path, **changes: dict[str, Any]) -> None:
        config = tiny_config(run_dir=str(run_dir), **changes)
        members = gather_members(config, process)
        require_alike(config, process, members)
        require_shared(run_dir, [member.host for member in members])
        keep_logs(run_dir, process, members)

    def told(begin: Callable[[], None]) -> list[str]:
        said.lines.clear()
        try:
            begin()
        except Exception as error:
            return [*said.lines, f"{type(error).__name__} {error}"]
        return list(said.lines)

    own, shared = Path(folder) / str(rank), Path(folder) / "shared"
    own.mkdir()
    os.chdir(own)
    if rank == 2:  # a file where its log should be made
        (Path(folder) / "no_log" / "logs" / "rank_00002.log").mkdir(parents=True)
    found: dict[str, list[str]] = {}
    clock = time.time
    with (
        patch.object(socket, "gethostname", lambda: HOSTS[rank]),
        patch.object(marker, "_SEEN_WITHIN_S", 1.0),
    ):
        found["nothing"] = told(lambda: start(shared))
        with of(1, "dinoscale.runtime.versions.version", lambda _: "9.9"):
            found["version"] = told(lambda: start(shared))
        batch = {"batch_size": 12 if rank == 2 else 6}
        found["configuration"] = told(lambda: start(shared, train=batch))
        with of(1, "dinoscale.cluster.agreement.time.time", lambda: clock() - 100):
            found["clock"] = told(lambda: start(shared))
        found["run_dir"] = told(lambda: start(Path("run")))
        found["log file"] = told(lambda: start(Path(folder) / "no_log"))
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("nodes")
    results = run_distributed(
        f"{__name__}:start_on_two_hosts", world_size=3, timeout_s=240, folder=str(folder)
    )
    for rank, result in enumerate(results):
        logs = folder / "shared" / "logs" / f"rank_{rank:05d}.log"
        result["file"] = logs.read_text().splitlines()
    shutil.rmtree(folder)
    return results


def test_each_node_is_named_once_by_rank_0(told: list[dict[str, list[str]]]) -> None:
    first, *others = (of_rank["nothing"] for of_rank in told)
    one, two = (line for line in first if line.startswith("I node "))
    assert one.startswith("I node gpu-01: rank 0 on the CPU, started by torchrun, ")
    assert ", torch " in one
    assert two == "I node gpu-02: ranks 1-2 on the CPU, started by torchrun"
    assert not [line for of_rank in others for line in of_rank if "node" in line]


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ("version", ["deepspeed is", "torch is", " on rank 0 (gpu-01) but 9.9 on rank 1 (gpu-02)"]),
        ("configuration", ["`batch_size: 6`, rank 2 (gpu-02) `batch_size: 12`"]),
        (
            "run_dir",
            ["ranks 1-2 (gpu-02) cannot see", "rank 0 (gpu-01) wrote to", "all nodes share"],
        ),
    ],
)
def test_what_differs_between_hosts_is_refused_on_all_ranks(
    told: list[dict[str, list[str]]], odd: str, says: list[str]
) -> None:
    for of_rank in told:
        raised = of_rank[odd][-1]
        assert raised.startswith("LaunchError ")
        for words in says:
            assert words in raised


def test_line_of_a_node_tells_its_other_versions(told: list[dict[str, list[str]]]) -> None:
    two = told[0]["version"][1]
    assert two.endswith("started by torchrun, dinoscale 9.9, torch 9.9, deepspeed 9.9")


def test_clock_that_is_off_is_a_warning(told: list[dict[str, list[str]]]) -> None:
    (warning,) = (line for line in told[0]["clock"] if line.startswith("W"))
    assert warning.startswith("W clocks: rank 1 (gpu-02) up to 100.")
    assert "behind rank 0" in warning
    assert not [line for of_rank in told for line in of_rank["clock"] if "Error" in line]


def test_every_rank_has_a_log_with_a_header_for_each_start(
    told: list[dict[str, list[str]]],
) -> None:
    for rank, of_rank in enumerate(told):
        headers = [line for line in of_rank["file"] if f"rank {rank} of 3 on {HOSTS[rank]}" in line]
        assert len(headers) == 2  # the starts that were not refused
        assert of_rank["file"][0] == headers[0]


def test_log_that_cannot_be_written_is_said_once(told: list[dict[str, list[str]]]) -> None:
    said = [line for of_rank in told for line in of_rank["log file"] if line.startswith("W")]
    assert len(said) == 1
    assert said[0].startswith("W no log files of rank 2 (gpu-02): cannot write to ")
    assert said[0].endswith("(Is a directory)")


def _open_by_nodes(folder: str) -> dict[str, object]:
    """Ranks 0 and 1 are one node, rank 2 another one, which takes longer."""
    from dinoscale.data.sources.source import Source, open_source
    from dinoscale.errors import DataError
    from dinoscale.runtime import distributed
    from dinoscale.runtime.opening import on_all_ranks, on_first_rank, open_once_per_node

    rank, opened, signs, posts = distributed.rank(), [], [], []  # type: ignore[var-annotated]
    keys: set[str] = set()
    set_text = distributed.KeyValueStore.set

    def setting(store: distributed.KeyValueStore, key: str, text: str) -> None:
        posts.append(text)
        keys.add(key)
        set_text(store, key, text)

    def opening(heartbeat: Callable[[], None], slow: int = 2, failing: int = -1) -> Source:
        opened.append(True)
        for _ in range(5 if rank == slow else 0):
            time.sleep(0.3)
            heartbeat()
        if rank == failing:
            raise DataError("no disk")
        return open_source(folder, heartbeat=heartbeat)

    def counts() -> list[int]:
        found = [len(opened), len(signs), len(posts)]
        for counted in (opened, signs, posts):
            counted.clear()
        return found

    def open_it(**how: int) -> Source:
        hosts = ["a", "a", "b"]
        return open_once_per_node(
            partial(opening, **how), hosts, lambda: signs.append(time.monotonic())
        )

    def full(_: Source, file: BinaryIO) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    found: dict[str, object] = {}
    with patch.object(distributed.KeyValueStore, "set", setting):
        source = open_it()
        found["forgotten"] = distributed.KeyValueStore().get_all([*keys]) == [None] * len(keys)
        found |= {"well": counts(), "paths": [os.path.basename(source.path(i)) for i in range(2)]}
        for first in (0, 2):
            with pytest.raises(DataError) as error:
                open_it(failing=first)
            found[f"failed {first}"] = counts()[0], str(error.value)
        own = Path(f"{folder}-{rank}")
        own.mkdir()
        with (
            patch("dinoscale.runtime.opening.pickle.dump", full if rank == 0 else pickle.dump),
            patch("tempfile.tempdir", str(own)),
        ):
            again = open_it(slow=1)
            found |= {"alone": counts(), "images": len(again), "left": len([*own.glob("*.source")])}
    of_first: list[float] = []

    def slowly(heartbeat: Callable[[], None]) -> str:
        for _ in range(5):
            time.sleep(0.3)
            heartbeat()
        return "made"

    made = on_first_rank(slowly, lambda: of_first.append(time.monotonic()))
    of_all: list[float] = []
    done: list[int] = []

    def own(heartbeat: Callable[[], None]) -> str:
        return slowly(heartbeat) if rank == 2 else "at once"

    found["by all"] = on_all_ranks(
        own, lambda: of_all.append(time.monotonic()), lambda: done.append(len(of_all))
    )
    found |= {"of_all": len(of_all), "before done": done}
    return found | {"made": made, "of_first": len(of_first)}


def test_one_rank_of_a_node_lists_and_the_others_take_what_it_found(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    ranks = run_distributed(
        f"{__name__}:_open_by_nodes", world_size=3, timeout_s=180, folder=str(tmp_path)
    )
    opened, signs, posts = zip(*(rank["well"] for rank in ranks), strict=True)
    assert opened == (1, 0, 1)
    assert [rank["paths"] for rank in ranks] == 3 * [["a.png", "b.png"]]
    assert min(signs) >= 2  # those that wait hear of those that work
    assert [rank["forgotten"] for rank in ranks] == 3 * [True]
    assert posts[1] == 0 < min(posts[0], posts[2])  # only what others read
    told = "rank 0: no disk"
    assert [rank["failed 0"] for rank in ranks] == [(1, "no disk"), (0, told), (1, told)]
    assert [rank["failed 2"][0] for rank in ranks] == [1, 0, 1]
    opened, signs, _ = zip(*(rank["alone"] for rank in ranks), strict=True)
    assert opened == (1, 1, 1)  # rank 1 for itself: nothing was put aside for it
    assert min(signs) >= 2
    assert [rank["images"] for rank in ranks] == [2, 2, 2]
    assert ranks[0]["left"] == 0  # nor left half
    assert [rank["made"] for rank in ranks] == ["made", None, None]
    assert all(rank["of_first"] >= 2 for rank in ranks)
    assert [rank["by all"] for rank in ranks] == ["at once", "at once", "made"]
    assert all(rank["of_all"] >= 2 for rank in ranks)
    assert [rank["before done"] for rank in ranks] == [[0], [0], [5]]


def _opened(spec: str, heartbeat: Callable[[], None]) -> Any:
    from dinoscale.data.sources.source import open_source

    return open_source(spec, heartbeat=heartbeat)


def _open_for_measurements(folder: str) -> dict[str, list[int]]:
    """How often this rank lists folders, by what opens them."""
    from dinoscale.cluster.doctor.images import look
    from dinoscale.data.sources import source
    from dinoscale.evaluate.classification.labelled_sets import LabelledSets
    from dinoscale.planning.bench.step import _input_of
    from dinoscale.runtime import distributed
    from dinoscale.runtime.launcher_env import read_process

    rank, listed, found = distributed.rank(), list[str](), dict[str, list[int]]()
    list_folder = source.list_folder

    def listing(root: str, heartbeat: Callable[[], None]) -> Any:
        listed.append(root)
        return list_folder(root, heartbeat)

    def count(name: str, images: list[int]) -> None:
        found[name] = [len(listed), *images]
        listed.clear()

    sets = {"train": folder, "test": folder}
    config = tiny_config(data={"train": folder, "subset_size": None}, eval=sets)
    with patch.object(source, "list_folder", listing):
        both = LabelledSets.open(
            folder, folder, lambda *at: source.open_source(at[0], heartbeat=at[1])
        )
        count("evaluate", [len(both.bank), len(both.test), *both.renumber.tolist()])
        _, source = _input_of(config, read_process(os.environ))
        count("bench", [len(source)])
        hosts = distributed.gather_objects(socket.gethostname())
        looked = look(config, hosts, rank=rank, timeout_s=60)
        count("doctor", [of_set.num_images for of_set in looked.values()])
        own = tiny_config(data={"train": f"{folder}/{'ab'[rank]}"}, eval=sets)
        looked = look(own, hosts, rank=rank, timeout_s=60)
        count("own", [of_set.num_images for of_set in looked.values()])
        missing = tiny_config(data={"train": f"{folder}/{'ac'[rank]}"})
        looked = look(missing, hosts, rank=rank, timeout_s=60)
        found["missing"] = [int(of_set.error is None) for of_set in looked.values()]
    return found


def test_measurements_and_the_doctor_list_a_folder_once_a_node(tmp_path: Path) -> None:
    for number in range(12):
        path = tmp_path / "ab"[number % 4 == 0] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(path)
    first, second = run_distributed(
        f"{__name__}:_open_for_measurements", world_size=2, timeout_s=180, folder=str(tmp_path)
    )
    assert first["evaluate"] == [2, 12, 12, 0, 1]
    assert second["evaluate"] == [0, 12, 12, 0, 1]
    assert (first["bench"], second["bench"]) == ([1, 12], [0, 12])
    assert (first["doctor"], second["doctor"]) == ([3, 12, 12, 12], [0, 12, 12, 12])
    assert (first["own"], second["own"]) == ([3, 9, 12, 12], [1, 3, 12, 12])
    assert (first["missing"], second["missing"]) == ([1], [0])
