"""What the answers of the nodes mean: a sentence for each fault, naming the node."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from dinoscale.cluster.doctor.report import Check, count_text, ok, problem, warning
from dinoscale.cluster.launch.ask_nodes import Found, Question

_CLOCK_TOLERANCE_S = 1.0  # beyond it, logs and file times of the nodes cannot be compared


def judge(found: Sequence[Found], question: Question) -> list[Check]:
    """One check for each fault, named by its host; one that says so where there is none."""
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


def _slots(node: Found) -> int:
    """Processes of a node; one for each GPU unless a number is given."""
    if node.host.slots is not None:
        return node.host.slots
    return int(node.looked["num_devices"]) if node.looked else 0


def _usual(known: Sequence[Found]) -> dict[str, Any]:
    """What most nodes have, of each thing that must be equal; the first node wins a draw."""
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
    node: Found, looked: dict[str, Any], usual: dict[str, Any], question: Question, *, alone: bool
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
        yield problem(name, f"torch does not load: {looked['why_no_torch']}; install it anew")
    if looked["config"]["error"]:
        yield problem(name, f"CONFIG cannot be used there: {looked['config']['error']}")
    elif looked["config"]["digest"] != usual["digest"]:
        yield problem(name, "CONFIG says something else there; give all nodes the same file")
    least, most = node.clock_s
    if least > _CLOCK_TOLERANCE_S or most < -_CLOCK_TOLERANCE_S:
        apart = f"{least:.1f} s ahead of" if least > 0 else f"{-most:.1f} s behind"
        yield problem(
            name, f"its clock is {apart} this machine's; start a time service such as chrony"
        )
    for interface in looked["missing_interfaces"]:
        yield problem(
            name,
            f"has no network interface {interface!r}, which GLOO_SOCKET_IFNAME names; see"
            " `ip address` there and mend .deepspeed_env or the environment",
        )
    own = looked["own_address"]
    reachable = own is not None and not own.startswith("127.") and own != "::1"
    steered = "GLOO_SOCKET_IFNAME" in question.variables
    if not (alone or reachable or steered or usual["devices"]):
        yield warning(
            name,
            f"its own name means {own or 'nothing'} there, where no other node can reach it; on"
            " CPUs, write GLOO_SOCKET_IFNAME=INTERFACE into .deepspeed_env",
        )


def _judge_devices(node: Found, looked: dict[str, Any], have_devices: bool) -> Iterator[Check]:
    """Slots against GPUs; where no node has any, the run is one of CPUs."""
    there, slots = looked["num_devices"], _slots(node)
    if slots == 0:
        yield problem(node.host.name, "has no GPU; on CPUs say how many processes: --per-node N")
    if not have_devices or there == slots:
        return
    if there < slots:
        yield problem(
            node.host.name,
            f"has {count_text(there, 'GPU')} for {count_text(slots, 'slot')}; correct its slots,"
            " or look at nvidia-smi there",
        )
    else:
        yield warning(node.host.name, f"{slots} of its {there} GPUs are used; slots={there} is all")


def _judge_images(known: Sequence[Found]) -> Iterator[Check]:
    """Sets that a node cannot open, or of which it has another number of images than most."""
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


def _images(node: Found, what: str) -> dict[str, Any]:
    """Of each set, how many there are or why it cannot be opened; nothing of one not yet listed."""
    return (node.opened or {}).get(what) or {}


def _judge_meeting(known: Sequence[Found], question: Question) -> Iterator[Check]:
    """The shared run directory, and the port of rank 0."""
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
                f"run_dir {seen['run_dir']} is not shared: what the first node wrote is not seen"
                " there; put run_dir on a file system that all nodes share",
            )
        elif seen and seen["error"]:
            yield problem(
                name,
                f"cannot write to run_dir {seen['run_dir']}: {seen['error']}; give this user the"
                " right to write there",
            )
    yield from _judge_port(known, question)


def _judge_port(known: Sequence[Found], question: Question) -> Iterator[Check]:
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
            return  # so nobody can have reached it
        yield problem(
            node.host.name,
            f"cannot reach rank 0 at {where} ({error}); name another address of the first node"
            " with --master-addr, or open that port between the nodes",
        )


def table(found: Sequence[Found]) -> str:
    """A line for each node; what is odd about it follows in the checks."""
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
