"""Shards that can only be read from front to back, from a web server and from commands."""

import base64
import http.server
import json
import logging
import shutil
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset.tariterators  # noqa: F401 # else its memory would count below

from dinoscale.data.augmentation.multi_crop import MultiCrop
from dinoscale.data.loader import train_batches
from dinoscale.data.shards.remote import TransferError, open_remote, read_all
from dinoscale.data.shards.stream import StreamSource
from dinoscale.data.shards.tar_headers import read_members
from dinoscale.data.shards.tar_source import TarSource
from dinoscale.data.sources.mixture import open_sources
from dinoscale.data.sources.source import open_source
from dinoscale.errors import DataError, UnavailableError
from tests.unit.data.conftest import jpeg, write_tar

CROPS = MultiCrop(global_size=12, local_size=6, num_local=1)
COUNTS = (5, 12, 1, 9, 7)


@dataclass
class Server:
    """A web server of a folder; `broken` says what happens to the next requests of a file."""

    url: str
    folder: Path
    broken: dict[str, list[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    told: list[tuple[str, str | None]] = field(default_factory=list)  # query, authorization


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    first = 0
    for number, count in enumerate(COUNTS):
        members = []
        for i in range(first, first + count):
            members += [(f"{i:03}.cls", b"1"), (f"{i:03}.jpg", jpeg(i)), (f"{i:03}.mask.png", b"")]
        write_tar(folder / f"train-{number:03}.tar", members)
        first += count
    _manifest(folder, COUNTS)
    return folder


def _manifest(folder: Path, counts: tuple[int, ...]) -> None:
    shards = [{"name": f"train-{i:03}.tar", "samples": count} for i, count in enumerate(counts)]
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "shards": shards}))


@pytest.fixture
def server(shards: Path, tmp_path: Path) -> Iterator[Server]:
    folder = shutil.copytree(shards, tmp_path / "served")
    served = Server("", folder)
    done = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.lstrip("/").partition("?")[0]
            served.asked.append(name)
            query = self.path.partition("?")[2]
            served.told.append((query, self.headers.get("Authorization")))
            fault = served.broken.get(name, [])
            kind = fault.pop(0) if fault else ""
            path = folder / name
            if kind.isdigit() or not path.is_file():
                self.send_error(int(kind or 404))
                return
            data = path.read_bytes()
            self.send_response(200)
            if kind == "between":  # two files: without a length, it looks like the end
                self.end_headers()
                self.wfile.write(data[: [*read_members(str(path))][-3].offset - 512])
                return
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if kind:
                self.wfile.write(data[: len(data) * 2 // 3])
                self.wfile.flush()
            if kind == "silent":
                done.wait(200)
            if kind == "cut":
                self.connection.shutdown(socket.SHUT_RDWR)
            if not kind:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        served.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        done.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOSCALE_ALLOW_PIPE", "1")


def _local(shards: Path) -> TarSource:
    return TarSource([str(shards / f"train-{i:03}.tar") for i in range(len(COUNTS))])


def _stream(shards: Path, *, block: int = 4, counts: tuple[int, ...] = COUNTS) -> StreamSource:
    urls = [f"pipe:cat {shards}/train-{i:03}.tar" for i in range(len(COUNTS))]
    return StreamSource(urls, counts, block_size=block, pauses_s=(0.0, 0.0))


def _served(server: Server) -> StreamSource:
    urls = [f"{server.url}/train-{i:03}.tar" for i in range(len(COUNTS))]
    return StreamSource(urls, COUNTS, block_size=4, pauses_s=(0.0, 0.01))


@pytest.mark.usefixtures("pipes")
def test_a_stream_holds_the_pictures_of_the_same_local_shards(shards: Path) -> None:
    local, stream = _local(shards), _stream(shards)
    assert len(stream) == len(local) == sum(COUNTS)
    for index in [*range(len(local)), 3, 0, 33]:  # out of order too, if slowly
        np.testing.assert_array_equal(stream.picture(index).pixels(), local.picture(index).pixels())
    assert stream.path(17).endswith("train-002.tar::0")
    for index in (-1, 34):
        with pytest.raises(IndexError):
            stream.picture(index)


def _ids_and_crops(
    source: StreamSource, *, steps: tuple[int, int], workers: int = 0, world: int = 1
) -> list[tuple[list[int], torch.Tensor]]:
    """Of every step, over all ranks."""
    ranks = [
        list(
            train_batches(
                source,
                CROPS,
                batch_size=4,
                micro_batch_size=2,
                seed=0,
                rank=rank,
                world_size=world,
                start_step=steps[0],
                stop_step=steps[1],
                num_workers=workers,
                stream_readers=2,
            )
        )
        for rank in range(world)
    ]
    parts = [part for micro in zip(*ranks, strict=True) for part in micro]
    steps_taken = zip(parts[::2], parts[1::2], strict=True)  # of two micro-batches
    return [
        (
            [*a.sample_ids.tolist(), *b.sample_ids.tolist()],
            torch.cat([a.global_crops, b.global_crops], 1),
        )
        for a, b in steps_taken
    ]


@pytest.mark.usefixtures("pipes")
@pytest.mark.parametrize(
    ("workers", "world", "start"), [(2, 1, 0), (4, 1, 0), (3, 1, 5), (0, 2, 3), (2, 2, 11)]
)
def test_workers_ranks_and_resuming_change_no_batch(
    shards: Path, workers: int, world: int, start: int
) -> None:
    whole = _ids_and_crops(_stream(shards), steps=(0, 13))  # eight steps an epoch
    assert len({i for ids, _ in whole[:8] for i in ids}) == 32
    parts = _ids_and_crops(_stream(shards), steps=(start, 13), workers=workers, world=world)
    for (ids, crops), (theirs, their_crops) in zip(parts, whole[start:], strict=True):
        assert ids == theirs
        assert torch.equal(crops, their_crops)


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_each_shard_is_fetched_once_an_epoch_by_each_lane_in_it(
    server: Server, workers: int
) -> None:
    _ids_and_crops(_served(server), steps=(0, 8), workers=workers)
    lanes = 4  # two for each of two micro-batches; an end of a lane lies within a shard
    assert len(COUNTS) <= len(server.asked) <= len(COUNTS) + lanes


def test_resuming_skips_whole_shards(server: Server) -> None:
    _ids_and_crops(_served(server), steps=(6, 8))
    assert len(set(server.asked)) < len(COUNTS)


def test_unreadable_image_is_replaced_from_its_block(server: Server) -> None:
    members = [(f"{i}.jpg", jpeg(i) if i not in (2, 9) else b"damaged") for i in range(12)]
    write_tar(server.folder / "train-001.tar", members)
    source = _served(server)
    found = []
    for workers in (0, 2):
        batches = train_batches(
            source, CROPS, batch_size=4, micro_batch_size=2, seed=0, rank=0, world_size=1,
            start_step=0, stop_step=16, num_workers=workers, stream_readers=2,
        )  # fmt: skip
        found.append([bad for batch in batches for bad in batch.bad])
    assert found[0] == found[1]
    assert {bad.sample_id for bad in found[0]} == {7, 14}
    for bad in found[0]:
        assert bad.replaced_by in source.blocks.block_of(bad.sample_id)
        assert "train-001.tar::" in bad.path
        assert bad.path.endswith("(2.jpg)" if bad.sample_id == 7 else "(9.jpg)")


@pytest.mark.parametrize("fault", ["cut", "503", "between"])
def test_a_broken_transfer_is_retried(
    server: Server, shards: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.broken["train-001.tar"] = [fault, fault]
    local, source = _local(shards), _served(server)
    with caplog.at_level(logging.WARNING):
        for index in range(sum(COUNTS)):
            np.testing.assert_array_equal(
                source.picture(index).pixels(), local.picture(index).pixels()
            )
    assert server.asked.count("train-001.tar") == 3
    assert "trying again" in caplog.text


@pytest.mark.parametrize(
    ("fault", "says", "code"),
    [
        ("cut", r"train-001\.tar cannot be read: picture 5: curl ended with exit code 18", 69),
        ("503", r"train-001\.tar cannot be read: .*503.*; tried 3 times in 0 s", 69),
        ("429", r"train-001\.tar cannot be read: .*429.*; tried 3 times in 0 s", 69),
        ("404", r"train-001\.tar cannot be read: curl ended with exit code 22.*404.*name", 2),
        ("403", r"cannot be read: .*403.*refuses access: correct user, password or signature", 2),
        ("401", r"cannot be read: .*401.*refuses access: correct user, password or signature", 2),
        ("between", r"picture 11: it ends between two files, without the end mark of a tar", 2),
    ],
)
@pytest.mark.parametrize("through_a_worker", [False, True])
def test_a_transfer_that_fails_at_every_try_says_what_to_do(
    server: Server, fault: str, says: str, code: int, through_a_worker: bool
) -> None:
    server.broken["train-001.tar"] = [fault] * 99
    read = partial(_ids_and_crops, steps=(0, 8), workers=1) if through_a_worker else _read_all
    with pytest.raises(DataError, match=says) as refused:
        read(_served(server))
    assert refused.value.exit_code == code


def test_a_manifest_out_of_reach_is_no_bad_input(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    server.broken["manifest.json"] = ["503"] * 99
    with pytest.raises(UnavailableError, match=r"manifest\.json cannot be read"):
        open_sources([f"{server.url}/train-{{000..004}}.tar"])
    assert sum(slept) > 120  # minutes


@pytest.mark.usefixtures("pipes")
@pytest.mark.parametrize(
    ("said", "says"),
    [
        ("fatal error: An error occurred (404) when calling HeadObject: Not Found", "its name"),
        ("fatal error: An error occurred (403) when calling HeadObject: Forbidden", "signature"),
        ("An error occurred (AccessDenied) when calling GetObject: Access Denied", "signature"),
        ("CommandException: No URLs matched: gs://bucket/a.tar", "its name"),
        ("cat: /data/a.tar: No such file or directory", "its name"),
        ("curl: (3) URL rejected: No host part in the URL", "its name"),
        ("An error occurred (SlowDown) when calling GetObject", "start again"),
        ("Could not connect to the endpoint, port 40301", "start again"),
    ],
)
def test_what_clients_say_decides_what_to_correct(said: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as refused:
        read_all(f"pipe:echo '{said}' >&2; exit 1", limit=9, pauses_s=(0.0,))
    assert isinstance(refused.value, UnavailableError) == (says == "start again")


def _read_all(source: StreamSource) -> None:
    for index in range(len(source)):
        source.picture(index)


def test_a_silent_server_is_no_hang(server: Server) -> None:
    server.broken["train-001.tar"] = ["silent"]
    begin = time.monotonic()
    file = open_remote(f"{server.url}/train-001.tar", idle_timeout_s=0.3)
    with file, pytest.raises(TransferError, match=r"curl sent nothing for 0\.3 s"):
        file.readall()
    assert time.monotonic() - begin < 100  # not 200


@pytest.mark.usefixtures("pipes")
@pytest.mark.parametrize(
    ("count", "says"),
    [
        (13, r"train-001\.tar holds only 12 pictures, but its manifest says 13"),
        (11, r"train-001\.tar holds more pictures, but its manifest says 11"),
    ],
)
def test_a_shard_of_another_length_is_an_error(shards: Path, count: int, says: str) -> None:
    source = _stream(shards, counts=(5, count, 1, 9, 7))
    with pytest.raises(DataError, match=says):
        _read_all(source)


@pytest.mark.usefixtures("pipes")
@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("pipe:exit 3", "exit code 3"),
        ("pipe:echo oops >&2; exit 4", "exit code 4: oops"),
        ("pipe:true", "empty file"),
        ("pipe:echo '<html>'", "truncated header"),
        ("pipe:head -c 5000 {shards}/train-001.tar", "unexpected end of data"),
        ("pipe:head -c 5000 {shards}/train-001.tar; exit 5", "exit code 5"),
        ("pipe:gzip -c {shards}/train-001.tar", "header"),
        ("pipe:cat {shards}/train-001.tar {shards}/none", "only|exit code"),
        ("pipe:no-such-command-at-all", "exit code 127"),
    ],
)
def test_an_output_that_is_no_shard_is_an_error(shards: Path, command: str, says: str) -> None:
    source = StreamSource([command.format(shards=shards)], [13], block_size=13, pauses_s=(0.0,))
    with pytest.raises(DataError, match=says):
        source.picture(0)


@pytest.mark.usefixtures("pipes")
def test_a_file_that_comes_twice_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", jpeg(0)), ("1.jpg", jpeg(1))])
    source = StreamSource([f"pipe:cat {tmp_path}/a.tar"], [2], block_size=2, pauses_s=())
    with pytest.raises(DataError, match=r"1\.jpg: duplicate file name"):
        source.picture(0)


@pytest.mark.usefixtures("pipes")
def test_a_reader_that_is_closed_ends_its_command_and_what_that_started(tmp_path: Path) -> None:
    later = tmp_path / "later"
    file = open_remote(f"pipe:echo; (sleep 0.5; touch {later}) & wait")
    assert file.read(1) == b"\n"
    file.close()
    time.sleep(0.8)
    assert not later.exists()


@pytest.mark.usefixtures("pipes")
@pytest.mark.parametrize("first", [0, 599])
def test_memory_is_a_block_for_each_lane_not_the_shard(tmp_path: Path, first: int) -> None:
    members = [(f"{i:04}.jpg", bytes(20_000)) for i in range(600)]  # 12 MB
    write_tar(tmp_path / "a.tar", members)
    source = StreamSource([f"pipe:cat {tmp_path}/a.tar"], [600], block_size=20)
    tracemalloc.start()
    try:
        for index in range(first, 600):
            source._reader(index).take(index)
        assert tracemalloc.get_traced_memory()[1] < 4e6  # two megabytes are the read buffer's
    finally:
        tracemalloc.stop()
    assert len(source._readers) == 1


@pytest.mark.usefixtures("pipes")
def test_a_block_that_was_used_up_is_not_kept(shards: Path) -> None:
    source = _stream(shards)
    for index in range(len(source)):
        source.picture(index)
        assert len(source._readers) == 1


# Opening: patterns, manifests, and what a configuration from a stranger may not do.


def test_a_pattern_of_urls_is_opened_by_its_manifest(server: Server) -> None:
    source = open_sources([f"{server.url}/train-{{000..004}}.tar?token=secret"])
    assert len(source) == sum(COUNTS)
    assert server.asked == ["manifest.json"]
    assert source.path(6) == f"{server.url}/train-001.tar::1"  # without the token
    source.picture(6)


@pytest.mark.usefixtures("pipes")
def test_counts_of_a_command_come_from_the_manifest_named(server: Server, shards: Path) -> None:
    spec = f"pipe:cat {shards}/train-{{000..004}}.tar"
    for manifest in (str(shards / "manifest.json"), f"{server.url}/manifest.json"):
        assert len(open_sources([spec], manifest=manifest)) == sum(COUNTS)
    with pytest.raises(DataError, match=r"Name the manifest\.json .* data\.manifest="):
        open_sources([spec])
    with pytest.raises(DataError, match=r"manifest\.json knows more than one shard named in"):
        open_sources([f"pipe:cat {shards}/train-000.tar {shards}/train-001.tar"], manifest=manifest)


def test_shards_without_images_are_passed_over(server: Server) -> None:
    _manifest(server.folder, (5, 0, 1, 0, 7))
    source = open_sources([f"{server.url}/train-{{000..004}}.tar"])
    assert len(source) == 13
    assert "train-002.tar" in source.path(5)
    _manifest(server.folder, (0,) * 5)
    with pytest.raises(DataError, match="counts no images"):
        open_sources([f"{server.url}/train-{{000..004}}.tar"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, r"the number of images in each shard is not known.*nothing\.json"),
        ("{", "is not a manifest of shards .JSONDecodeError"),
        ("[" * 100_000, "is not a manifest of shards .RecursionError"),
        ("{}", "is not a manifest of shards .KeyError: 'format'"),
        ('{"format": 2, "shards": []}', "format 2, not 1"),
        ('{"format": 1, "shards": [{"name": "a"}]}', "'samples'"),
        (
            '{"format": 1, "shards": [{"name": "a", "samples": -1}]}',
            "-1 is not a number of samples",
        ),
        ('{"format": 1, "shards": [{"name": "a", "samples": 1e999}]}', "inf is not a number"),
        (
            '{"format": 1, "shards": [{"name": "a.tar", "samples": 1}]}',
            "names there are like a.tar",
        ),
    ],
)
def test_a_useless_manifest_says_what_to_do(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "nothing.json").write_text(text)
    with pytest.raises(DataError, match=f"(?s){says}"):
        open_sources(["https://x.invalid/b.tar"], manifest=str(tmp_path / "nothing.json"))


def test_a_missing_manifest_beside_the_shards_says_what_to_do(server: Server) -> None:
    (server.folder / "manifest.json").unlink()
    says = r"(?s)manifest\.json cannot be read: curl.*404.*build-shards.*data\.manifest="
    with pytest.raises(DataError, match=says):
        open_sources([f"{server.url}/train-000.tar"])
    assert server.asked == ["manifest.json"]  # what is not there is not asked for again


def test_a_home_that_is_not_known_is_refused() -> None:
    with pytest.raises(DataError, match="No such file"):
        open_sources(["https://x.invalid/b.tar"], manifest="~no-such-user/manifest.json")


def test_a_manifest_without_end_is_refused() -> None:
    with pytest.raises(DataError, match="is a folder or a device"):
        open_sources(["https://x.invalid/b.tar"], manifest="/dev/zero")


@pytest.mark.usefixtures("pipes")
def test_reading_all_of_too_much_is_refused() -> None:
    with pytest.raises(DataError, match="longer than 100 bytes"):
        read_all("pipe:cat /dev/zero", limit=100, pauses_s=())


@pytest.mark.parametrize("manifest", [None, "http://[x/manifest.json"])
def test_what_is_no_url_is_refused(manifest: str | None) -> None:
    spec = "https://[host/a.tar" if manifest is None else "https://x.invalid/a.tar"
    with pytest.raises(DataError, match="is not a URL"):
        open_sources([spec], manifest=manifest)


def test_streams_are_not_mixed(server: Server) -> None:
    with pytest.raises(DataError, match="streamed cannot be mixed"):
        open_sources(["synthetic:shapes?images=3&size=8", f"{server.url}/train-000.tar"])


@pytest.mark.parametrize("allowed", ["", "0", "true", None])
def test_a_command_runs_only_where_the_environment_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: str | None
) -> None:
    if allowed is None:
        monkeypatch.delenv("DINOSCALE_ALLOW_PIPE", raising=False)
    else:
        monkeypatch.setenv("DINOSCALE_ALLOW_PIPE", allowed)
    fired = tmp_path / "fired"
    calls: list[Callable[[], object]] = [
        lambda: open_sources([f"pipe:touch {fired}"]),
        lambda: open_sources([f"PIPE:touch {fired}"]),
        lambda: open_sources(["https://x.invalid/a.tar"], manifest=f"pipe:touch {fired}"),
        lambda: StreamSource([f"pipe:touch {fired}"], [1], block_size=1).picture(0),
    ]
    for call in calls:
        with pytest.raises(DataError, match="DINOSCALE_ALLOW_PIPE=1"):
            call()
    assert not fired.exists()


@pytest.mark.parametrize(
    "name",
    [
        "'; touch FIRED'.tar",
        "$(touch FIRED).tar",
        "`touch FIRED`.tar",
        "a.tar|touch FIRED",
        'x" && touch FIRED #.tar',
        "-o FIRED.tar",
        "a.tar -o FIRED",
        "a.tar\ntouch FIRED",
        'a.tar"\noutput = "FIRED',
        'a.tar\\" output = "FIRED',
    ],
)
def test_a_url_is_never_a_command(
    name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for url in (f"{server.url}/{name}", f"http:{name}", f"s3://none/{name}", f"gs://none/{name}"):
        source = StreamSource([url], [1], block_size=1, pauses_s=())
        if not url.startswith("http"):
            monkeypatch.setenv("PATH", str(tmp_path))  # no client: nothing may run instead
        with pytest.raises(DataError, match=r"cannot be read|cannot run `(aws|gsutil)`"):
            source.picture(0)
    assert sorted(tmp_path.rglob("*")) == before


def test_secrets_come_from_the_environment_and_netrc_and_reach_the_server_only(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DINOSCALE_TOKEN", 'se"cr\\et')
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login bob password hidden\n")
    host = server.url.removeprefix("http://")
    for user in ("", "bob:${DINOSCALE_TOKEN}@"):
        url = f"http://{user}{host}/train-000.tar?token=${{DINOSCALE_TOKEN}}"
        with open_remote(url) as file:
            assert file._process.args[0] == "curl"  # type: ignore[index] # a list
            assert not [word for word in file._process.args if "cr" in str(word)]  # type: ignore[union-attr]
            assert len(file.readall()) == (server.folder / "train-000.tar").stat().st_size
    bob = [base64.b64encode(f"bob:{word}".encode()).decode() for word in ("hidden", 'se"cr\\et')]
    assert server.told == [('token=se"cr\\et', f"Basic {told}") for told in bob]


def test_a_stranger_s_configuration_sends_no_other_variable(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    for name, says in (
        ("AWS_SECRET_ACCESS_KEY", "export DINOSCALE_AWS_SECRET_ACCESS_KEY and write that"),
        ("DINOSCALE_NOWHERE", "is not set; export DINOSCALE_NOWHERE"),
    ):
        with pytest.raises(DataError, match=says):
            open_remote(f"{server.url}/train-000.tar?token=${{{name}}}")
    assert server.asked == []


@pytest.mark.parametrize("password", ["hidden", "x/hidden", "x#hidden", "x?hidden"])
@pytest.mark.parametrize("scheme", ["https", "s3", "sftp", "abfs"])
def test_refusals_show_no_password(scheme: str, password: str) -> None:
    spec = f"{scheme}://bob:{password}@host.invalid/a.tar?sig=hidden"
    with pytest.raises(DataError, match=r"host\.invalid/a\.tar") as alone:
        open_source(spec)
    with pytest.raises(DataError, match=r"host\.invalid/a\.tar") as mixed:
        open_sources([spec, "/data"])
    assert "hidden" not in f"{alone.value}{mixed.value}"
