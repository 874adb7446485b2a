"""Accelerators: the one table of peak rates, memory sizes and links.

Rates are from vendors' data sheets, per JAX device (a megacore chip of TPU v4 and v5p, one of the two chiplets of
TPU7x, a GPU), in bytes and floating-point operations per second. `roofline.ATTAINED` has the shares that are attained.
"""

import dataclasses
from collections.abc import Mapping, Sequence

GB = 1e9
GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device and its links; `link` and `slow_link` are one-way rates."""

    kinds: tuple[str, ...]  # prefixes of `jax.Device.device_kind`
    peak_flops: float  # dense bf16
    vector_ops: float  # float32 operations outside matmuls; on GPUs a multiply-add counts as one
    memory: float  # bytes of HBM that a program can use
    memory_bandwidth: float
    link: float  # TPU: one link to one neighbour; GPU: from the device into its NVLink domain
    slow_link: float  # between slices or nodes, per device
    torus: int = 0  # dimensions of a slice's torus; 0: every device of a node reaches every other
    wrap: int = 0  # a dimension forms rings only if its chips are a multiple of this (`closed`)
    platform: str = "tpu"  # for jax.experimental.topologies
    sparse_cores: bool = False  # has SparseCores, which run collectives during computation (`xla_flags.SPARSE_CORE`)
    kernels: bool = False  # TPU: attention kernels are planned to beat XLA's matmuls (docs/performance.md)
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)  # for get_topology_desc

    def closed(self, extent: Sequence[int], axis: int) -> bool:
        """Whether the chips along an axis of a slice of this extent form closed rings.

        Three-dimensional tori are closed by the switches between cubes of 4 x 4 x 4 chips: a slice of whole cubes has
        rings along all axes, any other along none. Two-dimensional ones have rings along each axis of full length.
        """
        return all(n % self.wrap == 0 for n in (extent if self.torus == 3 else extent[axis : axis + 1]))


# Sources for TPUs:
# * Peak, HBM, bandwidth, inter-chip interconnect: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}.
# * The one-way rate of a link is the chip's total divided by both directions of all its links (v4: 6 x 2 x 50 GB/s,
#   v5e: 4 x 2 x 50, v5p: 6 x 2 x 100, v6e: 4 x 2 x 100, tpu7x: 1,200 GB/s per chip, 6 links, shared by its two
#   devices), less a tenth except for tpu7x, as in "How to Scale Your Model" (Austin et al. 2025, chapter 2).
# * Memory: the size above which the compilers refuse a program (libtpu 0.0.42).
# * Vector units: cores x 8 x 128 lanes x 4 at the clock rate (guessed: v6e has that of v5p, tpu7x 2.2 GHz).
# * Between slices: a host's network cards, 200 Gbit/s for 4 chips (v4, v5p) or 8 (v5e), 400 for 4 (v6e, tpu7x).
# Sources for GPUs:
# * NVIDIA's data sheets (A100 80GB SXM, H100 SXM, H200 SXM). NVLink 3 and 4 have 300 and 450 GB/s one way. Nodes have
#   one network card per GPU, of 200 (A100) and 400 Gbit/s.
# * Memory: 92 % of what nvidia-smi reports (81,920, 81,559 and 143,771 MiB), which launch/environment.sh gives XLA.
CHIPS: Mapping[str, Chip] = {
    "v4": Chip(
        ("TPU v4",), 275e12, 8.6e12, 30.75 * GIB, 1228 * GB, 45 * GB, 6.25 * GB, torus=3, wrap=4,
        options={"chip_config_name": "megacore"},
    ),
    "v5e": Chip(
        ("TPU v5 lite", "TPU v5e"), 197e12, 6.1e12, 15.75 * GIB, 819 * GB, 45 * GB, 3.125 * GB, torus=2, wrap=16,
    ),
    "v5p": Chip(
        ("TPU v5",), 459e12, 14.3e12, 95.74 * GIB, 2765 * GB, 90 * GB, 6.25 * GB, torus=3, wrap=4, sparse_cores=True,
        kernels=True,
    ),
    "v6e": Chip(
        ("TPU v6 lite", "TPU v6e"), 918e12, 7.2e12, 31.25 * GIB, 1638 * GB, 90 * GB, 12.5 * GB, torus=2, wrap=16,
        sparse_cores=True,
    ),
    "tpu7x": Chip(
        ("TPU7x",), 1153.5e12, 9e12, 94.75 * GIB, 3690 * GB, 50 * GB, 6.25 * GB, torus=3, wrap=4, sparse_cores=True,
    ),
    "a100": Chip(("NVIDIA A100",), 312e12, 9.7e12, 73.6 * GIB, 2039 * GB, 300 * GB, 25 * GB, platform="cuda"),
    "h100": Chip(("NVIDIA H100",), 989e12, 33.5e12, 73.3 * GIB, 3350 * GB, 450 * GB, 50 * GB, platform="cuda"),
    "h200": Chip(("NVIDIA H200",), 989e12, 33.5e12, 129.2 * GIB, 4800 * GB, 450 * GB, 50 * GB, platform="cuda"),
}  # fmt: skip


_SLOWER_BOARDS = ("NVL", "PCIe")  # name endings of H100 and H200 boards with less power, which have lower peaks


def of_kind(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`, None if unknown."""
    if device_kind.endswith(_SLOWER_BOARDS):
        return None
    known = {kind: chip for chip in CHIPS.values() for kind in chip.kinds if device_kind.startswith(kind)}
    return known[max(known, key=len)] if known else None
