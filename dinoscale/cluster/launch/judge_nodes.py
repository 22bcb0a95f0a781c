"""Judge the answers of the nodes: a sentence for each fault, naming the node."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from dinoscale.cluster.doctor.report import Check, count_text, ok, problem, warning
from dinoscale.cluster.launch.ask_nodes import NodeAnswers, Question

_CLOCK_TOLERANCE_S = 1.0  # beyond it, logs and file times of the nodes cannot be compared


def judge(found: Sequence[NodeAnswers], question: Question) -> list[Check]:
    """One check for each fault, named by its host; a single `ok` if there are no faults."""
    known = [node for node in found if node.looked]
    checks = [problem(node.host.name, f"{node.failure}") for node in found if node.failure]
    if known:
        usual = _usual(known)
        for node in known:
            assert node.looked
            checks += _judge_node(node, node.looked, usual, question, alone=len(found) == 1)
            checks += _judge_devices(node, node.looked, usual["devices"])
        checks += _judge_images(known)
        checks += _judge_meeting(known, question)
    slots = sum(_slots(node) for node in found)
    fine = f"{count_text(len(found), 'node')} with {count_text(slots, 'slot')} can start"
    return checks or [ok("nodes", fine)]


def _slots(node: NodeAnswers) -> int:
    """Processes of a node; one for each GPU unless a number is given."""
    if node.host.slots is not None:
        return node.host.slots
    return int(node.looked["num_devices"]) if node.looked else 0


def _usual(known: Sequence[NodeAnswers]) -> dict[str, Any]:
    """What most nodes have of everything that must be equal; the first node decides a tie."""
    looked = [node.looked for node in known if node.looked]
    versions = {
        name: Counter(of["versions"].get(name) for of in looked).most_common(1)[0][0]
        for name in looked[0]["versions"]
    }
    digests = [of["config"]["digest"] for of in looked if of["config"]["digest"]]
    return {
        "versions": versions,
        "digest": Counter(digests).most_common(1)[0][0] if digests else None,
        "devices": any(of["num_devices"] for of in looked),
    }


def _judge_node(
    node: NodeAnswers,
    looked: dict[str, Any],
    usual: dict[str, Any],
    question: Question,
    *,
    alone: bool,
) -> Iterator[Check]:
    name = node.host.name
    for package, version in usual["versions"].items():
        own = looked["versions"].get(package)
        if own != version:
            yield problem(
                name,
                f"{package} is {own or 'absent'} there, {version or 'absent'} elsewhere; use one"
                " environment and one checkout on all nodes",
            )
    if looked["why_no_torch"]:
        yield problem(name, f"torch does not load: {looked['why_no_torch']}; reinstall it")
    if looked["config"]["error"]:
        yield problem(name, f"CONFIG is invalid there: {looked['config']['error']}")
    elif looked["config"]["digest"] != usual["digest"]:
        yield problem(name, "CONFIG differs there; give all nodes the same file")
    least, most = node.clock_s
    if least > _CLOCK_TOLERANCE_S or most < -_CLOCK_TOLERANCE_S:
        apart = f"{least:.1f} s ahead of" if least > 0 else f"{-most:.1f} s behind"
        yield problem(
            name, f"its clock is {apart} this machine's; run a time service such as chrony"
        )
    for interface in looked["missing_interfaces"]:
        yield problem(
            name,
            f"has no network interface {interface!r}, which GLOO_SOCKET_IFNAME names; run"
            " `ip address` there and correct .deepspeed_env or the environment",
        )
    own = looked["own_address"]
    reachable = own is not None and not own.startswith("127.") and own != "::1"
    steered = "GLOO_SOCKET_IFNAME" in question.variables
    if not (alone or reachable or steered or usual["devices"]):
        yield warning(
            name,
            f"its own name resolves to {own or 'nothing'} there, which other nodes cannot reach; on"
            " CPUs, write GLOO_SOCKET_IFNAME=INTERFACE into .deepspeed_env",
        )


def _judge_devices(
    node: NodeAnswers, looked: dict[str, Any], have_devices: bool
) -> Iterator[Check]:
    """Compare slots with GPUs; if no node has any, the run is on CPUs."""
    there, slots = looked["num_devices"], _slots(node)
    if slots == 0:
        yield problem(node.host.name, "has no GPU; to train on CPUs, give --per-node N")
    if not have_devices or there == slots:
        return
    if there < slots:
        yield problem(
            node.host.name,
            f"has {count_text(there, 'GPU')} for {count_text(slots, 'slot')}; correct its slots,"
            " or check nvidia-smi there",
        )
    else:
        text = f"{slots} of its {there} GPUs are used; slots={there} uses all"
        yield warning(node.host.name, text)


def _judge_images(known: Sequence[NodeAnswers]) -> Iterator[Check]:
    """Find sets that a node cannot open, or that have another number of images on most nodes."""
    for key in ("data.train", "eval.train", "eval.test"):
        counts = Counter(of for node in known if (of := _images(node, "images").get(key)))
        usual = counts.most_common(1)[0][0] if counts else None
        for node in known:
            own, error = _images(node, "images").get(key), _images(node, "errors").get(key)
            if error:
                yield problem(node.host.name, f"{key} cannot be opened there: {error}")
            elif own is not None and own != usual:
                yield problem(
                    node.host.name,
                    f"{key} has {own} images there, {usual} elsewhere; give all nodes the same"
                    " files",
                )


def _images(node: NodeAnswers, what: str) -> dict[str, Any]:
    """The number of images, or the errors, by set; sets that are not yet open are missing."""
    return (node.opened or {}).get(what) or {}


def _judge_meeting(known: Sequence[NodeAnswers], question: Question) -> Iterator[Check]:
    """Judge the shared run directory, and the port of rank 0."""
    for node in known:
        met, name = node.met, node.host.name
        if met is None:
            continue
        marker, seen = met.get("marker"), met.get("seen")
        if marker and marker["error"]:
            yield problem(
                name,
                f"cannot write to run_dir {marker['run_dir']}: {marker['error']}; choose another"
                " with run_dir=PATH",
            )
        if seen and not seen["seen"]:
            yield problem(
                name,
                f"run_dir {seen['run_dir']} is not shared: a file of the first node is missing"
                " there; put run_dir on a file system that all nodes share",
            )
        elif seen and seen["error"]:
            yield problem(
                name,
                f"cannot write to run_dir {seen['run_dir']}: {seen['error']}; give this user the"
                " right to write there",
            )
    yield from _judge_port(known, question)


def _judge_port(known: Sequence[NodeAnswers], question: Question) -> Iterator[Check]:
    where = f"{question.address}:{question.port}"
    for node in known:
        met = node.met or {}
        error = met.get("port_error")
        if not error:
            continue
        if "marker" in met:
            yield problem(
                node.host.name,
                f"port {question.port} cannot be used there: {error}; choose another with"
                " --master-port",
            )
            return  # then no node can have reached it
        yield problem(
            node.host.name,
            f"cannot reach rank 0 at {where} ({error}); give another address of the first node"
            " with --master-addr, or open that port between the nodes",
        )


def table(found: Sequence[NodeAnswers]) -> str:
    """A table with a line for each node; faults follow in the checks."""
    rows: list[tuple[str, ...]] = [
        ("node", "slots", "GPUs", "python", "torch", "deepspeed", "code", "clock")
    ]
    for node in found:
        if node.looked is None:
            rows.append((node.host.name, str(_slots(node)), *("-",) * 6))
            continue
        versions = node.looked["versions"]
        shown = [versions.get(name) or "-" for name in ("python", "torch", "deepspeed", "code")]
        rows.append(
            (
                *(node.host.name, str(_slots(node)), str(node.looked["num_devices"])),
                *(version.split()[0] for version in shown),
                f"{sum(node.clock_s) / 2:+.2f} s",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)
