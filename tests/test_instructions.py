"""How single instructions of compiled programs are counted, and the seconds they take."""

import pytest

from lina_jax import hlo, mesh, roofline
from lina_jax.chips import CHIPS
from lina_jax.config import MeshConfig

CHIP = CHIPS["h200"]


def module(instructions: str) -> hlo.Module:
    return hlo.Module(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n{instructions}}}\n")


def estimate(instructions: str) -> roofline.Estimate:
    return roofline.estimate(module(instructions), CHIP, mesh.build(MeshConfig()))


@pytest.mark.parametrize(
    ("text", "operations"),
    [
        ("%sum = f32[8]{0} add(%p, %p)", 8),
        ("%exp = f32[8]{0} exponential(%p)", 8 * 8),  # a polynomial
        ("%all = f32[]{} reduce(%p), dimensions={0}, to_apply=%add", 8),  # by what it reads, not by what it produces
    ],
    ids=["add", "exponential", "reduce"],
)
def test_vector_operations_are_counted_by_what_units_do(text, operations):
    assert roofline.count(module(f"  ROOT {text}\n")).vector_ops == operations


@pytest.mark.parametrize(
    ("work", "rate", "bound"),
    [
        (hlo.Work(matmul_flops=1e12, vector_ops=1.0, traffic=1e9), CHIP.peak_flops, "matmul"),
        (hlo.Work(matmul_flops=1e9, vector_ops=1e12, traffic=1e9), CHIP.vector_ops, "vector"),
        (hlo.Work(matmul_flops=1e9, vector_ops=1.0, traffic=1e12), CHIP.memory_bandwidth, "memory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_instruction_takes_the_longest_of_its_three_times(work, rate, bound):
    seconds = 1e12 / (roofline.ATTAINED["cuda"][bound] * rate)
    assert roofline.instruction_seconds(work, CHIP) == (seconds, bound)


def test_an_instruction_is_never_free():
    """However little each does, thousands of them add up over a step."""
    assert estimate("  ROOT %sum = f32[8]{0} add(%p, %p)\n").seconds > 0.1e-6


def test_the_slowest_instructions_stand_first():
    text = """  %little = f32[8]{0} add(%p, %p)
  ROOT %much = f32[8,1048576]{1,0} broadcast(%little), dimensions={0}
"""
    assert [name for _, name, *_ in estimate(text).slowest] == ["much", "little"]
