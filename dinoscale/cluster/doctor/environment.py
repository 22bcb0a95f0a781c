"""Environment variables that affect libraries, by name only, since a value may be secret."""

from collections.abc import Mapping, Sequence

from dinoscale.cluster.doctor.report import Check, ok, warning
from dinoscale.config import RunConfig
from dinoscale.runtime.hosts import ranks_text

_STEERING = (
    *("NCCL_", "TORCH_NCCL_", "GLOO_", "OMP_", "DS_", "CUDA_LAUNCH_", "CUDA_DEVICE_ORDER"),
    *("DINOSCALE_", "AWS_", "CLOUDSDK_", "GOOGLE_", "BOTO_", "HADOOP_", "CURL_", "SSL_CERT_"),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "NETRC"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "HF_", "WANDB_", "TORCH_HOME", "XDG_CACHE_HOME"),
)
_WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun")


def steering_names(environ: Mapping[str, str]) -> list[str]:
    """Names of the set variables that affect compute, communication, loading or image reading."""
    return sorted(name for name in environ if name.startswith(_STEERING))


def judge_variables(of_ranks: Sequence[list[str]], hosts: list[str]) -> Check:
    """Find variables that only some ranks have, since the launcher did not pass them on."""
    names = sorted({name for found in of_ranks for name in found})
    for name in names:
        without = [rank for rank, found in enumerate(of_ranks) if name not in found]
        if without:
            return warning(
                "environment",
                f"{name} is set on other ranks but not on {ranks_text(without, hosts)}; pass it on"
                " (deepspeed: .deepspeed_env, srun: --export=ALL)",
            )
    return ok("environment", f"set: {', '.join(names)}" if names else "no special variables set")


def judge_wandb(config: RunConfig, environ: Mapping[str, str]) -> Check:
    """Where Weights & Biases stores the curves."""
    if not config.log.wandb:
        return ok("wandb", "off")
    mode = environ.get("WANDB_MODE")
    if mode is not None and mode not in _WANDB_MODES:
        modes = ", ".join(_WANDB_MODES)
        return warning("wandb", f"WANDB_MODE is none of {modes}; wandb will get no curves")
    if mode in (None, "offline", "dryrun"):
        where = f"logs stay offline in {config.run_dir}/wandb"
        return ok("wandb", f"{where}; WANDB_MODE=online uploads them" if mode is None else where)
    if mode == "online" and "WANDB_API_KEY" not in environ:
        return ok("wandb", "online, with the login of this machine (`wandb login`)")
    return ok("wandb", mode or "offline")
