"""All checks in order; every rank runs the same command, rank 0 prints the findings."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dinoscale.cluster.doctor import environment, machine, network, versions
from dinoscale.cluster.doctor.configs import judge_configs
from dinoscale.cluster.doctor.report import Check, Report, ok, problem
from dinoscale.config import RunConfig, dump_config, load_config, phases_of, split_batch
from dinoscale.errors import ConfigError, DinoscaleError, LaunchError, RunFailedError
from dinoscale.runtime import distributed
from dinoscale.runtime.distributed import gather_objects
from dinoscale.runtime.hosts import ranks_text
from dinoscale.runtime.launcher_env import Process
from dinoscale.runtime.versions import commit

_UTILIZATION = 0.5  # of the speed of large matrix products: about what a step reaches


def examine(
    name: str | None, overrides: Sequence[str], process: Process, *, timeout_s: float
) -> Report:
    """Check this machine or allocation, and whether it fits the run `name`.

    All ranks call it instead of `distributed.start`, with the settings of the training.

    Args:
        name: preset or YAML file, None to check the machine only.
        overrides: `section.key=value` settings that override it.
        process: rank and node of this process.
        timeout_s: how long to wait for a rank that does not answer, in seconds.

    Returns:
        The same checks on every rank; printed on rank 0.

    Raises:
        LaunchError: on all ranks but 0, if the ranks cannot meet.
    """
    report = Report(active=process.rank == 0)
    variables = environment.steering_names(os.environ)  # before we set any ourselves
    try:
        report.section("ranks", [_meet(process, timeout_s)])
        _together(report, name, overrides, process, variables, timeout_s=timeout_s)
    except RunFailedError as error:
        report.lost = str(error)
        report.section("ranks", [problem("answer", report.lost)])
    report.close()
    return report


def _meet(process: Process, timeout_s: float) -> Check:
    try:
        return _start(process, timeout_s)
    except LaunchError as error:
        if process.rank != 0:
            raise
        return problem("meeting", f"{error}; the following checks cover rank 0 only")


def _start(process: Process, timeout_s: float) -> Check:
    address = network.require_address(process, os.environ)
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a timeout raises instead of aborting
    begin = time.monotonic()
    distributed.start(process, timeout_s=timeout_s)
    ranks = gather_objects(process.rank)  # the first collective: NCCL connects only now
    took = f"{len(ranks)} met in {time.monotonic() - begin:.1f} s"
    return ok("meeting", f"{address}; {took}" if len(ranks) > 1 else address)


def _together(
    report: Report,
    name: str | None,
    overrides: Sequence[str],
    process: Process,
    variables: list[str],
    *,
    timeout_s: float,
) -> None:
    """Everything after the meeting; all ranks take the same branches."""
    facts = gather_objects(machine.look(process))
    hosts = [of_rank.host for of_rank in facts]
    loads = _libraries(report, hosts)
    config, config_checks = _config(name, overrides, hosts)
    num_workers = config.data.num_workers if config else None
    report.section(
        "machine",
        [
            *machine.judge_devices(facts),
            *machine.judge_sharing(facts, config),
            *machine.judge_cores(facts, num_workers=num_workers),
            *machine.judge_speed(facts),
            machine.judge_precision(facts, precision=config.engine.precision if config else None),
            machine.judge_shared_memory(facts, config),
            machine.judge_open_files(facts),
            environment.judge_variables(gather_objects(variables), hosts),
        ],
    )
    parameters = None
    if name is not None:
        report.section("configuration", config_checks)
    if config is not None and loads:
        parameters = _run(report, config, hosts, process, timeout_s)
    measured = gather_objects(network.measure(process.device))
    report.section(
        "network",
        network.judge_network(
            measured,
            hosts,
            world_size=process.world_size,
            gradient_bytes=_gradient_bytes(config, parameters, world_size=process.world_size),
            compute_s=_compute_s(config, facts) if loads else None,
        ),
    )


def _libraries(report: Report, hosts: list[str]) -> bool:
    """Check versions and imports; returns whether everything loads on all ranks."""
    found = versions.installed()
    failures = gather_objects(versions.load())
    loads = not any(failures)
    if loads:
        found["commit"] = commit()
    checks = versions.judge_versions(gather_objects(found), hosts)
    if loads:
        has_operators = gather_objects(versions.torchvision_has_operators())
        checks += versions.judge_operators(has_operators, hosts)
    report.section("libraries", [*checks, *versions.judge_loading(failures, hosts)])
    return loads


def _config(
    name: str | None, overrides: Sequence[str], hosts: list[str]
) -> tuple[RunConfig | None, list[Check]]:
    """The configuration of this rank; None on all ranks if it is invalid on any."""
    if name is None:
        return None, []
    config, error = None, None
    try:
        config = load_config(name, overrides)
    except DinoscaleError as caught:
        error = str(caught)
    errors = gather_objects(error)
    wrong = [rank for rank, text in enumerate(errors) if text]
    if wrong:
        where = "" if len(wrong) == len(hosts) else f"{ranks_text(wrong, hosts)}: "
        return None, [problem("config", f"{where}{errors[wrong[0]]}")]
    assert config is not None
    same = judge_configs(gather_objects(dump_config(config)), hosts)
    return config, [ok("config", f"{name} is valid") if same.verdict == "ok" else same]


def _run(
    report: Report, config: RunConfig, hosts: list[str], process: Process, timeout_s: float
) -> int | None:
    """Check data, plan and storage; returns the number of weights, None if the model is invalid."""
    from dinoscale.cluster.doctor import images, storage  # here, since they import the libraries

    looked = images.look(config, hosts, rank=process.rank, timeout_s=timeout_s)
    found = gather_objects(looked)
    train = found[0].get("data.train")
    report.section(
        "data",
        [
            *images.judge_images(found, hosts),
            *(
                images.judge_plan(
                    run,
                    world_size=process.world_size,
                    ranks_of_node=process.local_world_size,
                    num_images=train.source_sizes if train and not train.error else None,
                )
                for run in phases_of(config)
            ),
        ],
    )
    parameters, model = _model(config)
    shared = storage.check_shared(Path(config.run_dir), hosts)
    checks = [model, shared]
    if shared.verdict == "ok":  # else the user will choose another run_dir
        checks.append(storage.check_resume(config))
        if parameters is not None and process.rank == 0:  # it has removed its marker by now
            checks.append(
                storage.check_disk(config, parameters=parameters, world_size=process.world_size)
            )
    checks.append(environment.judge_wandb(config, os.environ))
    report.section("run", distributed.broadcast_object(checks))  # rank 0's disk, model, login
    return parameters


def _model(config: RunConfig) -> tuple[int | None, Check]:
    from dinoscale.engine.build import num_parameters

    try:
        parameters = num_parameters(config)
    except DinoscaleError as error:
        return None, problem("model", str(error))
    said = f"{config.model.backbone}, {parameters / 1e6:.2f} M parameters with head"
    return parameters, ok("model", said)


def _gradient_bytes(
    config: RunConfig | None, parameters: int | None, *, world_size: int
) -> int | None:
    """Bytes that a step reduces over ranks; stages 2 and 3 reduce after every micro-batch."""
    if config is None or parameters is None:
        return None
    passes = 1
    if config.engine.zero_stage >= 2 and config.train.micro_batch_size != "auto":
        with suppress(ConfigError):  # the check of the plan reports it
            passes = split_batch(config, world_size=world_size).accumulation_steps
    return passes * parameters * {"fp32": 4, "bf16": 2}[config.engine.communication_dtype]


def _compute_s(config: RunConfig | None, facts: Sequence[machine.Machine]) -> float | None:
    """Seconds of compute in a step, from the speed of matrix products on the slowest rank."""
    from dinoscale.engine.model_sizes import dims_of, flops_of
    from dinoscale.engine.precision import product_flops

    if config is None:
        return None
    try:
        flops = flops_of(dims_of(config)).total * config.train.batch_size / len(facts)
    except DinoscaleError:  # not a ViT, or an invalid one
        return None
    slowest_s = max(of_rank.product_s[config.engine.precision] for of_rank in facts)
    device = "cpu" if facts[0].device is None else "cuda"
    return flops * slowest_s / product_flops(device) / _UTILIZATION
