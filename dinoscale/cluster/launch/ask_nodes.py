"""Ask all nodes at the same time, over ssh, for their facts; each answer has a time limit."""

import asyncio
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from dinoscale.cluster.launch.hostfile import Host
from dinoscale.cluster.launch.node_probe import MARK

_CONNECT_S = 10  # limit of ssh, since a host that is down does not answer at all
_AT_ONCE = 128  # hosts asked at the same time; each needs three open files
_NEEDED_TO_START = ("PYTHON", "LD_")  # variables without which an interpreter may not start
_NO_DIRECTORY, _SSH_FAILED = 97, 255  # exit codes: our own, and the one of ssh


@dataclass(frozen=True)
class Question:
    """What to ask every node about.

    Attributes:
        config: CONFIG and settings of the training.
        run_dir: of the run, as configured.
        address: where the other ranks will look for rank 0.
        port: where the ranks meet.
        variables: set for the run on every node.
        ssh: `ssh` and its options; None to ask this machine, without ssh.
        meets: whether the first host is where rank 0 will run.
        timeout_s: for each answer of a host.
    """

    config: tuple[str, Sequence[str]]
    run_dir: str
    address: str
    port: int
    variables: Mapping[str, str]
    ssh: Sequence[str] | None
    meets: bool
    timeout_s: float


@dataclass(frozen=True)
class NodeAnswers:
    """The answers of a node.

    Attributes:
        host: of the hostfile.
        failure: why it did not answer, or None; the other attributes then keep their defaults.
        clock_s: bounds of how far its clock is ahead of this machine's, in seconds.
        looked: answer of `node_probe` to `look`.
        opened: its answer to `open`; None if the configuration is invalid there.
        met: its answer to `receive` or `visit`; None if it was not asked.
    """

    host: Host
    failure: str | None = None
    clock_s: tuple[float, float] = (0.0, 0.0)
    looked: dict[str, Any] | None = None
    opened: dict[str, Any] | None = None
    met: dict[str, Any] | None = None


def ask_all(hosts: Sequence[Host], question: Question) -> list[NodeAnswers]:
    """The answers of all hosts, in order. The first host waits until the others have called it."""
    return asyncio.run(_ask_all(hosts, question))


async def _ask_all(hosts: Sequence[Host], question: Question) -> list[NodeAnswers]:
    receiver: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()
    done, places = asyncio.Event(), asyncio.Semaphore(_AT_ONCE)

    async def visit(host: Host) -> NodeAnswers:
        async with places:
            return await _ask(host, question, receiver, done, first=False)

    first = asyncio.create_task(_ask(hosts[0], question, receiver, done, first=question.meets))
    others = await asyncio.gather(*map(visit, hosts[1:]))
    done.set()
    return [await first, *others]


async def _ask(
    host: Host,
    question: Question,
    receiver: "asyncio.Future[dict[str, Any] | None]",
    done: asyncio.Event,
    *,
    first: bool,
) -> NodeAnswers:
    """Ask one host. `receiver` becomes the marker of the first, None if it has none."""
    node = await _Node.start(host, question)
    where = {"run_dir": question.run_dir, "port": question.port}
    try:
        await node.ask("enter", variables=dict(question.variables))
        clock_s = await node.ask_clock()
        name, overrides = question.config
        run = {"config": name, "overrides": list(overrides)}
        looked, opened, met = await node.ask("look", **run), None, None
        if not looked["config"]["error"]:
            opened = await node.ask("open", **run, within_s=question.timeout_s / 2)
        if first:
            met = await node.ask("receive", **where)
            receiver.set_result(None if met["marker"]["error"] else met["marker"])
            await done.wait()
        elif question.meets:
            marker = await receiver
            if marker:
                met = await node.ask("visit", marker=marker, address=question.address, **where)
        return NodeAnswers(host, clock_s=clock_s, looked=looked, opened=opened, met=met)
    except _NoAnswerError as error:
        return NodeAnswers(host, failure=str(error))
    finally:
        if first and not receiver.done():
            receiver.set_result(None)
        await node.close()


class _NoAnswerError(Exception):
    """A node did not answer; the text gives the symptom and the remedy."""


@dataclass
class _Node:
    """A conversation with the probe on one host."""

    host: Host
    timeout_s: float
    process: asyncio.subprocess.Process
    stderr: IO[bytes]  # a file, which need not be read while the node answers

    @classmethod
    async def start(cls, host: Host, question: Question) -> "_Node":
        stderr = tempfile.TemporaryFile()  # noqa: SIM115  # `close` closes it
        process = await asyncio.create_subprocess_exec(
            *_command(host, question),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,  # so ssh has no terminal to prompt on
        )
        return cls(host, question.timeout_s, process, stderr)

    async def ask_clock(self) -> tuple[float, float]:
        """Lower and upper bound of how far the clock of the node is ahead, in seconds."""
        await self.ask("clock")  # waits for its start, so that the second answer is fast
        sent = time.time()
        there = (await self.ask("clock"))["time"]
        return there - time.time(), there - sent

    async def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps({"ask": what, **arguments}).encode() + b"\n")
            return await asyncio.wait_for(self._answer(), self.timeout_s)
        except asyncio.TimeoutError:
            raise _NoAnswerError(
                f"did not answer within {self.timeout_s:g} s; check its load and its file systems,"
                " or raise --timeout"
            ) from None
        except (OSError, ValueError) as error:
            raise _NoAnswerError(f"its answer cannot be read ({error})") from None

    async def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        while line := await self.process.stdout.readline():
            text = line.decode(errors="replace")
            if text.startswith(MARK):
                answer: dict[str, Any] = json.loads(text.removeprefix(MARK))
                return answer
        raise _NoAnswerError(self._why_it_ended(await self.process.wait()))

    def _why_it_ended(self, code: int) -> str:
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").strip().splitlines()
        said = lines[-1].strip()[:300] if lines else "nothing"
        name = self.host.name
        if code == _SSH_FAILED:
            return (
                f"cannot be reached by ssh: {said}; `ssh {name} true` must work without a prompt"
                " (key in authorized_keys, host key known, port: --ssh-options)"
            )
        if code == _NO_DIRECTORY:
            return f"has no directory {os.getcwd()}; start where all nodes have the same checkout"
        if code in (126, 127):
            return f"cannot run {sys.executable}; install the environment there at the same path"
        return f"the probe there failed (exit code {code}): {said}"

    async def close(self) -> None:
        """End the conversation: the probe ends with its input; if ssh does not, it is killed."""
        assert self.process.stdin
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), 2)
        except asyncio.TimeoutError:
            with suppress(ProcessLookupError):  # it has just ended
                self.process.kill()
            await self.process.wait()
        self.stderr.close()


def _command(host: Host, question: Question) -> list[str]:
    """The probe, with the directory, interpreter and variables that the run will have.

    The command line holds only variables that the interpreter reads, since all users can see it.
    """
    path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    variables = {"PYTHONPATH": path, **question.variables}
    early = [f"{name}={variables[name]}" for name in variables if name.startswith(_NEEDED_TO_START)]
    probe = ["env", *early, sys.executable, "-m", "dinoscale.cluster.launch.node_probe"]
    if question.ssh is None:
        return probe
    here = shlex.quote(os.getcwd())
    remote = f"cd {here} || exit {_NO_DIRECTORY}; {shlex.join(probe)}"
    quiet = ("-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_S}")
    return [*question.ssh, *quiet, host.name, remote]
