"""Published figures of GPUs by name, and the parser of memory sizes.

Sources: datasheets of NVIDIA A10 (2021), A100 (2021, SXM), H100 (2023, SXM and PCIe), H200 (2024,
SXM), L40S (2023), GeForce RTX 4090 (Ada architecture whitepaper, 2022, bf16 summed in float32), and
of AMD MI300X (2023). FLOP/s are dense: half of what is printed "with sparsity".
"""

import re
from dataclasses import dataclass

from dinoscale.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """Published figures of a GPU.

    Attributes:
        bf16_flops: dense FLOP/s of bfloat16 matrix products.
        fp32_flops: FLOP/s of float32 matrix products, without TF32.
        memory_bytes: size of its memory.
        memory_bandwidth: bytes/s to that memory.
        link_bandwidth: bytes/s to the other GPUs of its node, one way; PCIe if there is no faster
            link.
    """

    bf16_flops: float
    fp32_flops: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float


GPUS = {
    "a10": Gpu(125e12, 31.2e12, 24e9, 600e9, 32e9),
    "a100": Gpu(312e12, 19.5e12, 80e9, 2.04e12, 300e9),
    "a100-40gb": Gpu(312e12, 19.5e12, 40e9, 1.56e12, 300e9),
    "h100": Gpu(989e12, 67e12, 80e9, 3.35e12, 450e9),
    "h100-pcie": Gpu(756e12, 51e12, 80e9, 2e12, 64e9),
    "h200": Gpu(989e12, 67e12, 141e9, 4.8e12, 450e9),
    "l40s": Gpu(362e12, 91.6e12, 48e9, 864e9, 32e9),
    "mi300x": Gpu(1307e12, 163e12, 192e9, 5.3e12, 448e9),
    "rtx4090": Gpu(165e12, 82.6e12, 24e9, 1.01e12, 32e9),
}

NETWORK = 50e9  # bytes/s of one GPU, one way: an adapter of 400 Gbit/s each, as in DGX H100

_UNITS = {"": 1.0, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2.0**20, "GIB": 2.0**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def find_gpu(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
        ConfigError: the name is not in the table.
    """
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise ConfigError(f"--gpu: unknown name {name!r}; known: {', '.join(GPUS)}") from None


def parse_bytes(text: str, *, option: str) -> float:
    """Read a size of memory such as 80GB or 24GiB.

    Args:
        text: number and unit.
        option: named in the error.

    Returns:
        Bytes, above 0.

    Raises:
        ConfigError: the text is not a size above 0.
    """
    match = _SIZE.fullmatch(text)
    size = float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0
    if size <= 0:
        raise ConfigError(f"{option}: need a size such as 80GB or 24GiB, got {text!r}")
    return size
