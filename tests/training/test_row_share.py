"""Which rows a process reads, over meshes of processes that are not there."""

from typing import NamedTuple

import pytest

from dsv32_jax.training import placement


class Layout:
  """Rows (start, stop) of each process's devices."""

  def __init__(self, rows_of_process):
    self._rows = rows_of_process

  def devices_indices_map(self, shape):
    places = [
      (process, rows)
      for process, many in enumerate(self._rows)
      for rows in many
    ]
    return {
      Device(process, number): (slice(*rows), slice(shape[1]))
      for number, (process, rows) in enumerate(places)
    }


class Device(NamedTuple):
  process_index: int
  number: int


@pytest.mark.parametrize(
  "rows_of_process,shares",
  [
    # A process alone, of one device and of two.
    ([[(0, 8)]], [(0, 1)]),
    ([[(0, 4), (4, 8)]], [(0, 1)]),
    # Rows over processes, and over their devices.
    ([[(0, 4)], [(4, 8)]], [(0, 2), (1, 2)]),
    ([[(0, 2), (2, 4)], [(4, 6), (6, 8)]], [(0, 2), (1, 2)]),
    # In whatever order the mesh has the processes.
    ([[(4, 8)], [(0, 4)]], [(1, 2), (0, 2)]),
    # Tokens of a row over devices, then over processes too.
    ([[(0, 4), (0, 4)], [(4, 8), (4, 8)]], [(0, 2), (1, 2)]),
    ([[(0, 4)], [(0, 4)], [(4, 8)], [(4, 8)]], [(0, 2)] * 2 + [(1, 2)] * 2),
    ([[(0, 8)], [(0, 8)]], [(0, 1)] * 2),
    ([[(None, None)], [(None, None)]], [(0, 1)] * 2),
    # Rows apart from one another: each reads all.
    ([[(0, 2), (4, 6)], [(2, 4), (6, 8)]], [(0, 1)] * 2),
    ([[(0, 2)], [(2, 8)]], [(0, 1)] * 2),
  ],
)
def test_shares_of_a_batch(rows_of_process, shares):
  layout = Layout(rows_of_process)
  found = [
    placement.row_share(layout, (8, 16), process)
    for process in range(len(rows_of_process))
  ]
  assert found == shares
