"""Sampling and learning side by side, with bounded staleness.

A thread draws rollouts while the learner learns from earlier ones. Rollouts are
learned in the order of their numbers, and rollout n is begun only when the
policy has learned n - max_staleness of them: what is learned was drawn by a
policy at most so many versions ago, however slow either side is. The newest
policy is handed over in memory, as a copy.

The numbers of the prompts follow from a rollout's number, and a rollout is
learned whole or not at all. So a checkpoint, which holds the learned rollouts'
count, loses and repeats no prompt: what was drawn and not learned when a run
died is drawn anew.
"""

from collections.abc import Iterator
import queue
import threading

import jax

from dsv32_jax.rl import sampling


class _Sampling:
  """The thread, and what it shares with the learner."""

  def __init__(self, policy, sampler):
    self._config, self._sampler = policy.config, sampler
    self._mesh, self._first = policy.mesh, policy.version
    self._change = threading.Condition()
    self._stopped = False
    # A copy: the learner's step gives the policy's arrays up.
    self._newest = self._copied(policy)
    self.finished: queue.SimpleQueue = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._run, name="sampling")
    self._thread.start()

  def hand_over(self, policy) -> None:
    """Gives the sampler the policy of a new version."""
    newest = self._copied(policy)
    with self._change:
      self._newest = newest
      self._change.notify_all()

  def stop(self) -> None:
    """Waits for the rollout under way, and ends the thread."""
    with self._change:
      self._stopped = True
      self._change.notify_all()
    self._thread.join()

  def _copied(self, policy):
    return sampling.handed_over(policy.model()), policy.version

  def _run(self):
    # Whatever goes wrong is raised where the rollout is waited for.
    try:
      with jax.set_mesh(self._mesh):
        for number in range(self._first, self._config.rollouts):
          newest = self._awaited(number)
          if newest is None:
            return
          self._sampler.load(*newest)
          del newest
          self.finished.put(self._sampler.rollout(number))
    except BaseException as error:
      self.finished.put(error)

  def _awaited(self, number):
    """The newest policy once it is new enough, or None to stop."""
    least = number - self._config.max_staleness
    with self._change:
      self._change.wait_for(lambda: self._stopped or self._newest[1] >= least)
      return None if self._stopped else self._newest


def rollouts(policy, sampler) -> Iterator[sampling.Rollout]:
  """Yields rollouts from the policy's version on; close it to stop sampling.

  The policy must have learned from a rollout when the next one is asked for.
  """
  side = _Sampling(policy, sampler)
  try:
    for _ in range(policy.version, policy.config.rollouts):
      rollout = side.finished.get()
      if isinstance(rollout, BaseException):
        raise rollout
      yield rollout
      side.hand_over(policy)
  finally:
    side.stop()
