"""SIGTERM as a flag that a training loop polls, to save and leave in order."""

import signal

from dsv32_jax.training import processes


class StopSignal:
  """Context in which a SIGTERM sets `requested` and does nothing else.

  Enter it in the main thread. The handler that was there before comes back when
  the context is left.
  """

  def __init__(self, signals=(signal.SIGTERM,)):
    self.requested = False
    self._signals = signals
    self._before = {}

  def __enter__(self):
    for number in self._signals:
      self._before[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exception):
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before.clear()

  def _handle(self, number, frame):
    del number, frame
    self.requested = True

  def agreed(self) -> bool:
    """Tells if any process was asked to stop; every process must call it.

    All of them get the same answer, so that all save the same step. It costs
    a round of communication where there are several processes.
    """
    return any(processes.gather(self.requested))
