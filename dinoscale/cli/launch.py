"""`dinoscale launch`: check every node, print the command line that starts the run, execute it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from dinoscale.cli.arguments import add_config

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands

_EPILOG = """examples:
  dinoscale launch my_run.yaml --hostfile hostfile run_dir=/shared/runs/first
  dinoscale launch my_run.yaml --hostfile hostfile --check
  dinoscale launch my_run.yaml --hostfile hostfile --launcher openmpi --dry-run
  dinoscale launch my_run.yaml --hostfile hostfile --node-rank 1        (on the second node)
  dinoscale launch my_run.yaml --nodes 2 --node-rank 1 --master-addr node1
  dinoscale launch my_run.yaml --slurm --nodes 4 --per-node 8 --options '--partition gpu'"""


def add_launch(commands: SubCommands) -> None:
    """Add `launch`."""
    launch = commands.add_parser(
        "launch",
        help="check several nodes, then start a run on them",
        description="Start `dinoscale train CONFIG ...` on several nodes: check the nodes, print"
        " the command line,\nand execute it; its exit code is passed on. Choose one way:"
        " --hostfile FILE (ssh or MPI),\n--nodes N (torchrun, called on every node), or --slurm."
        "\n\nWith --hostfile every node is asked over ssh, all at the same time: versions, code,"
        " GPUs, clock,\nconfiguration, images, whether run_dir is shared and whether rank 0's port"
        " can be reached.\nThe other ways, and --node-rank, check this node alone; --slurm asks"
        " sbatch.\nThe results go to stderr. If there is a problem, nothing is started and the exit"
        " code is 2.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(launch)
    _add_ways(launch)
    launch.add_argument(
        "--options",
        default="",
        metavar="TEXT",
        help="more options for deepspeed, mpirun (with --launcher openmpi), torchrun or sbatch,"
        " quoted as one argument",
    )
    launch.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long a node may take for each answer (default 60)",
    )
    only = launch.add_mutually_exclusive_group()
    only.add_argument(
        "--dry-run",
        action="store_true",
        help="print the command line on stdout; check and start nothing",
    )
    only.add_argument(
        "--check",
        action="store_true",
        help="check the nodes and start nothing; print one JSON object on stdout",
    )
    launch.set_defaults(run=_launch)


def _add_ways(launch: argparse.ArgumentParser) -> None:
    launch.add_argument(
        "--hostfile",
        metavar="FILE",
        help="use DeepSpeed's launcher on the nodes of FILE: a line `node1 slots=8` for each",
    )
    launch.add_argument(
        "--launcher",
        choices=["pdsh", "openmpi"],
        default="pdsh",
        help="with --hostfile: the program that reaches the nodes (default pdsh, over ssh)",
    )
    launch.add_argument(
        "--ssh-options",
        default="",
        metavar="TEXT",
        help="with --hostfile: options of every ssh, such as '-p 2222 -i KEY' or '-F FILE'",
    )
    launch.add_argument(
        "--nodes",
        type=int,
        metavar="N",
        help="use torchrun on N nodes: call this command on each, with its own --node-rank; with"
        " --slurm: nodes of the job",
    )
    launch.add_argument(
        "--node-rank",
        type=int,
        metavar="R",
        help="number of this node, from 0; with --hostfile: start only its processes, without ssh",
    )
    launch.add_argument(
        "--per-node",
        type=int,
        metavar="N",
        help="processes per node (default: one per GPU with torchrun, as the script says with"
        " --slurm)",
    )
    launch.add_argument(
        "--master-addr",
        metavar="HOST",
        help="name or address of rank 0's node (default: the first host of the hostfile)",
    )
    launch.add_argument(
        "--master-port", type=int, metavar="PORT", help="port of rank 0 (default 29500)"
    )
    launch.add_argument(
        "--slurm", action="store_true", help="submit launchers/slurm.sbatch as a job"
    )


def _launch(options: argparse.Namespace) -> None:
    from dinoscale.cluster.launch.start import LaunchRequest, check, choose
    from dinoscale.config import load_config
    from dinoscale.errors import ConfigError, LaunchError

    if not 0 < options.timeout <= 86400:
        raise ConfigError(f"--timeout: need more than 0 and at most a day, got {options.timeout}")
    run_dir = load_config(options.config, options.overrides).run_dir
    request = LaunchRequest(
        config=options.config,
        overrides=options.overrides,
        hostfile=options.hostfile,
        launcher=options.launcher,
        ssh_options=_words("--ssh-options", options.ssh_options),
        nodes=options.nodes,
        node_rank=options.node_rank,
        per_node=options.per_node,
        master_addr=options.master_addr,
        master_port=options.master_port,
        slurm=options.slurm,
        options=_words("--options", options.options),
    )
    method = choose(request)
    line = shlex.join(method.command)
    if options.dry_run:
        print(line)
        return
    found, report = check(method, request, run_dir=run_dir, timeout_s=options.timeout)
    problems = [entry for entry in report.checks if entry.verdict == "problem"]
    if options.check:
        nodes = [asdict(node) for node in found]
        print(json.dumps({**report.as_json(), "nodes": nodes, "command": line}), flush=True)
        raise SystemExit(2 if problems else 0)
    if problems:
        more = f"; {len(problems) - 1} more above" if len(problems) > 1 else ""
        raise LaunchError(f"nothing was started. {problems[0].name}: {problems[0].text}{more}")
    print(line, file=sys.stderr, flush=True)
    # A Slurm job inherits PATH and finds its `python` there: make it this one, which was checked.
    paths = [os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]
    os.execvpe(method.command[0], method.command, {**os.environ, "PATH": os.pathsep.join(paths)})


def _words(flag: str, text: str) -> list[str]:
    from dinoscale.errors import LaunchError

    try:
        return shlex.split(text)
    except ValueError as error:
        raise LaunchError(f"{flag}: {text!r} cannot be split into words ({error})") from None
