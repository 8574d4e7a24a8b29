"""Schedules of TPU and GPU kernels, from short texts in the compilers' format.

The texts are made up here: a grid loop of 6 trips around an inner loop of 4,
with four delay slots after each branch, as v5p has them.
"""

import pytest

from pallas_kernels import schedule
from pallas_kernels import schedule_gpu

BUNDLES = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = smov 0 /* copy for cssa */  ;;  %3 = vsyncpa [#allocation3], 0 } /* Start region 5 */
   0x1 LB: > { %s9_s1 = sphi %s1_s0, %s8_s1 /* phi copy */ } /* Start region 10 :: Start region 11 */
   0x2   : > { %s20_s2 = smov (!%p4_p1), 0  ;;  %14 = dma.hbm_to_vmem %s3  ;;  %4 = sbr.rel (%p3_p0) target = $region12 }
   0x3   :  {}
   0x4   :  {}
   0x5   :  {}
   0x6   : > { %1468 = dma.general (%p3_p0), /*src=*/%s148_s4 /*
base_bounds: (8, 64, 1)
window_bounds: (8, 16, 1) */ } /* End region 11 */
   0x7 LB: >> { %s22_s2 = sphi %s20_s2, %s21_s2  ;;  %v1_v1 = vld [vmem:[%s2_s9]] } /* Start/End empty region 12 :: Start region 20 */
   0x8   : >> { %s21_s2 = sadd.s32 2, %s22_s2 /* copy for cssa */  ;;  %5 = vmatmul.bf16 %v1_v1 }
   0x9   : >> { %p7_p2 = scmp.ge.s32.totalorder %s21_s2, 8 /* loop exit test */ }
   0xa   : >> { %6 = sbr.rel (!%p7_p2) target = $region20 }
   0xb   :  {}
   0xc   :  {}
   0xd   : >> { %7 = vst [vmem:[%s2_s9]] %v1_v1 } /* End region 20 */
   0xe   :  {}
   0xf   : > { %s8_s1 = sadd.s32 1, %s9_s1 /* BoundsCheck 0 for %12 = dma.hbm_to_smem */  ;;  %13 = dma.done.wait [#allocation4], 16 }
  0x10   : > { %p8_p3 = scmp.ge.s32.totalorder %s8_s1, 6 /* loop exit test */ }
  0x11   : > { %8 = sbr.rel (!%p8_p3) target = $region10 }
  0x12   :  {}
  0x13   :  {}
  0x14   :  {}
  0x15   :  {} /* End region 10 */
  0x16   :  { %9 = vsyncpa [#allocation3], 1 }
  0x17 PF:  {} /* exit bundle: %made_up.1 = custom-call(%q.1, %w.1) */
"""  # noqa: E501
NUM_BUNDLES = 24
HEADER = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
"""
# All loads in 0x7, all products in 0x8, one spill in 0xd.
FILLED = {
  0x7: "0 0 2 0 0 3 1 0 0 0",
  0x8: "4 0 0 0 0 0 0 0 0 1",
  0xD: "0 0 0 0 0 0 0 1 1 0",
}


def utilization(rows=NUM_BUNDLES):
  empty = "0 0 0 0 0 0 0 0 0 0"
  return HEADER + "\n".join(FILLED.get(i, empty) for i in range(rows)) + "\n"


def test_loops_with_their_delay_slots_and_trips():
  bundles = schedule.parse_bundles(BUNDLES)
  assert len(bundles) == NUM_BUNDLES
  assert [b.depth for b in bundles[5:9]] == [0, 1, 2, 2]
  assert bundles[7].label == "LB"
  assert schedule.find_loops(bundles) == [(0x1, 0x16, 6), (0x7, 0xF, 4)]


def test_bundles_are_counted_once_and_as_executed():
  kernel = schedule.read("made_up", BUNDLES, utilization())
  (outer,) = kernel.loops
  (inner,) = outer.inner
  assert (outer.bundles, inner.bundles) == (21, 8)
  # A step is 13 bundles of its own and 4 trips of 8.
  assert (inner.step, outer.step) == (8, 13 + 4 * 8)
  assert kernel.bundles == NUM_BUNDLES
  assert kernel.executed == 3 + 6 * outer.step
  assert kernel.tile == outer.step
  # Neither waits nor the comment of a check are copies.
  assert (outer.copies, inner.copies) == (2, 0)
  assert (inner.matmuls, outer.matmuls) == (1, 1)
  # One product in each of 4 trips.
  assert (inner.least, outer.least) == (4, 16)
  assert [depth for depth, _ in kernel.every_loop()] == [0, 1]


def test_shares_of_slots():
  kernel = schedule.read("made_up", BUNDLES, utilization())
  inner = kernel.loops[0].inner[0]
  assert inner.shares == {
    "MXU": 4 / (8 * 4),
    "VALU": 2 / (8 * 4),
    "VLOAD": 3 / (8 * 3),
    "VSTORE": 1 / 8,
    "VLOAD:FILL": 1 / (8 * 3),
    "VSTORE:SPILL": 1 / 8,
  }


def test_trips_that_are_no_constant_are_unknown():
  text = BUNDLES.replace("%s21_s2, 8 /*", "%s21_s2, %s30_s3 /*")
  kernel = schedule.read("made_up", text, utilization())
  (outer,) = kernel.loops
  assert outer.inner[0].trips is None
  assert (outer.trips, outer.step, kernel.executed) == (6, None, None)
  assert kernel.tile == outer.bundles
  assert outer.least is None


def test_a_folder_holds_kernels_and_programs_of_xla(tmp_path):
  def write(name, bundles, rows):
    (tmp_path / f"{name}-71-final_bundles.txt").write_text(bundles)
    (
      tmp_path / f"{name}-69-final_hlo-static-per-bundle-utilization.txt"
    ).write_text(rows)

  write("123-made_up.1", BUNDLES, utilization())
  fusion = BUNDLES.replace("custom-call", "fusion").replace("made_up", "add")
  write("124-add.1", fusion, utilization())
  name = "123-made_up.1-70-schedule-analysis_final_bundles.txt"
  (tmp_path / name).write_text("total scheduled bundles: 24")
  (kernel,) = schedule.read_folder(tmp_path)
  assert kernel.name == "made_up.1"
  write("125-made_up.2", BUNDLES, utilization(NUM_BUNDLES - 1))
  with pytest.raises(ValueError, match="24 bundles but 23"):
    schedule.read_folder(tmp_path)


# A loop of six instructions with a jump to a wait at the end of the code, one
# that spills, and the branch to itself that follows every kernel.
SASS = """
.text.kernel:
   -:-:1:Y:02        /*0000*/                   LDC R1, c[0x0][0x28]
.L_x_0:
   1:-:-:Y:01        /*0010*/                   SYNCS.PHASECHK P0, [UR4]
   -:-:1:Y:05        /*0020*/              @!P0 BRA `(.L_x_3)
.L_x_1:
   -:-:2:Y:01        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc
   -:-:2:Y:01        /*0040*/                   FADD R2, R2, R3
   -:-:2:Y:01        /*0050*/                   ISETP.GE P1, PT, R2, 8, PT
   -:-:2:Y:01        /*0060*/              @!P1 BRA `(.L_x_0)
.L_x_2:
   -:-:2:Y:01        /*0070*/                   STL [R1], R2
   -:-:2:Y:01        /*0080*/              @!P1 BRA `(.L_x_2)
   -:-:2:Y:01        /*0090*/                   EXIT
.L_x_3:
   -:-:2:Y:01        /*00a0*/                   SYNCS.PHASECHK P0, [UR4]
   -:-:2:Y:01        /*00b0*/               @P0 BRA `(.L_x_1)
   -:-:2:Y:01        /*00c0*/                   BRA `(.L_x_3)
.L_x_4:
   -:-:2:Y:01        /*00d0*/                   BRA `(.L_x_4)
"""  # noqa: E501


def test_loops_of_machine_code():
  first, wait, spilling = schedule_gpu.loops(SASS)
  assert first.start == 0x10
  # The wait belongs to the loop, as it returns into it.
  assert first.opcodes == {
    "SYNCS": 2,
    "BRA": 4,
    "HGMMA": 1,
    "FADD": 1,
    "ISETP": 1,
  }
  assert (first.instructions, wait.start, wait.instructions) == (9, 0xA0, 3)
  assert (spilling.start, spilling.opcodes) == (0x70, {"STL": 1, "BRA": 1})
  assert schedule_gpu.spill_instructions(SASS) == 1


def test_code_without_a_loop():
  straight = "/*0000*/  MOV R1, R2 \n/*0010*/ @P0 EXIT \n/*0020*/ EXIT \n"
  assert schedule_gpu.loops(straight) == []
  assert schedule_gpu.loops("") == []
