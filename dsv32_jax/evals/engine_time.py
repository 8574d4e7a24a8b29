"""An engine in the middle of long answers, to time its steps."""

from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation import requests


class LongRunning(engine_lib.Engine):
  """An engine whose requests have long prompts that nobody computed.

  The cache holds random numbers of unit size, as the normed latents are: what
  is held does not change the work.
  """

  def start(self, batch: int, length: int, *, num_tokens: int) -> None:
    """Begins requests that hold `length` tokens each.

    Args:
      batch: how many; each step then draws a token of each.
      length: tokens that are in the cache before the first step.
      num_tokens: steps that can be run.

    Raises:
      ValueError: if the requests do not fit, or others are live.
    """
    if self.has_work:
      raise ValueError(f"{len(self._live)} requests are live")
    self._programs.fill(seed=0)
    for number in range(batch):
      sampling = requests.SamplingParameters(
        max_tokens=num_tokens + 1, ignore_eos=True, seed=number
      )
      self.submit(requests.Request(prompt_ids=[0] * length, sampling=sampling))
    self._scheduler.admit()
    running = self._scheduler.running()
    if len(running) < batch:
      raise ValueError(f"{batch=} requests exceed the engine's rows or pages")
    for one in running:
      # As if the first token of its answer had just been drawn.
      one.tokens.append(0)
      self._scheduler.ensure(one, length + num_tokens + 1)
      one.held = length
