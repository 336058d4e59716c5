"""Collectives as XLA writes them down."""

from vvt_jax.costs.hlo import Collective, collectives

_TEXT = """
HloModule jit_step
%region { ROOT %add = f32[] add(f32[] %a, f32[] %b) }
ENTRY %main {
  %all-reduce.1 = f32[96,48]{1,0} all-reduce(%x), channel_id=1, to_apply=%region
  %both = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(%x, %y), channel_id=2, to_apply=%region
  %permute = (bf16[1,8]{1,0}, bf16[1,8]{1,0}, u32[], u32[]) collective-permute-start(%z)
  %done = bf16[1,8]{1,0} collective-permute-done(%permute)
  %gather = (f32[1,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%w), dimensions={0}
  %scatter = f32[2]{0} reduce-scatter(%v), dimensions={0}
  %exchange = s32[8]{0} all-to-all(%u), dimensions={0}
  %unrelated = f32[8]{0} fusion(%all-reduce.1), calls=%fused
}
"""


def test_every_kind_with_its_bytes():
    assert collectives(_TEXT) == [
        Collective("all-reduce", ((96, 48),), 96 * 48 * 4),
        Collective("all-reduce", ((4,), (2, 3)), 4 * 4 + 6 * 2),
        Collective("collective-permute", ((1, 8),), 16),
        Collective("all-gather", ((4, 8),), 128),
        Collective("reduce-scatter", ((2,),), 8),
        Collective("all-to-all", ((8,),), 32),
    ]


def test_none():
    assert collectives("ENTRY %main { ROOT %x = f32[] parameter(0) }") == []
