"""The training loop: steps, metrics, checkpoints, an orderly stop."""

import contextlib
import dataclasses
import os
import time

import jax
import numpy as np

from dsv32_jax.training import metrics as metrics_lib
from dsv32_jax.training import profiling
from dsv32_jax.training import run as run_lib
from dsv32_jax.training import run_folder
from dsv32_jax.training import stop_signal


def train(
  config: run_lib.TrainConfig,
  workdir: str,
  *,
  title: str = "train",
  profile: bool = False,
  root: str | None = None,
) -> run_lib.Run:
  """Runs a stage to its end, from the newest checkpoint if there is one.

  The folder gets `checkpoints/`, `config.json`, `tokenizer.json`,
  `metrics.jsonl` (the same bytes for the same command) and `timings.jsonl`.

  Args:
    config: of the stage.
    workdir: folder of this stage alone.
    title: of the progress bar.
    profile: write a profile of some steps to `profile/`, and `parts.json`
      beside it: seconds of a step by part of the model. Compiles once more.
    root: folder of the experiment that the run is a part of, if any; see
      `run_folder.check`.

  Returns:
    The finished run; its data and checkpoint folder are closed.

  Raises:
    ValueError: for a config that does not fit its folder, has too few steps
      left to profile or more steps than data; or after too many steps in a row
      whose gradients were not finite; the last batch is left in the folder.
    checkpoint.SaveError: if the disk does not take a checkpoint.
    run_lib.Stopped: after a SIGTERM, once the state is saved.
  """
  os.makedirs(workdir, exist_ok=True)
  run_folder.check(config, workdir, _MAY_CHANGE, root)
  run = run_lib.Run(config, workdir)
  try:
    start = run.resume()
    tracer = _tracer(workdir, start, config.steps) if profile else None
    run_folder.claim(config, workdir, _MAY_CHANGE, root)
    speaks = jax.process_index() == 0
    writer = metrics_lib.SilentWriter()
    if speaks:
      writer = metrics_lib.MetricsWriter(workdir, resume_step=start or None)
    bar = metrics_lib.progress(
      config.steps, initial=start, title=title, shown=speaks
    )
    with writer, bar, stop_signal.StopSignal() as stop:
      _loop(run, start, writer, bar, stop, workdir, tracer)
  finally:
    run.close()
  return run


def _loop(run, start, writer, bar, stop, workdir, tracer) -> None:
  config = run.config
  clock = _Clock()
  for step in range(start + 1, config.steps + 1):
    with clock.waiting():
      rows = next(run.batches, None)
    if rows is None:
      raise ValueError(
        f"steps={config.steps}: data.num_epochs={config.data.num_epochs} has"
        f" batches for {step - 1} of them"
      )
    with jax.set_mesh(run.mesh):
      batch = run.place(rows)
      if tracer is not None:
        tracer.begin(step)
      run.state, metrics = run.step(run.state, batch)
      if tracer is not None and tracer.end(step, (run.state, metrics)):
        with clock.standing_still():
          _write_parts(run, batch, tracer)
    clock.steps += 1
    if step % config.log_every == 0 or step == config.steps:
      metrics = jax.device_get(metrics)
      writer.write(step, metrics)
      _check(run, step, metrics, rows, workdir)
      writer.write_timings(step, clock.read(float(metrics["tokens"])))
      bar.set_postfix(loss=f"{float(metrics['loss']):.3f}", refresh=False)
    bar.update(1)
    stopping = stop.agreed()
    due = step % config.checkpoint.every_steps == 0 or step == config.steps
    if due or stopping:
      with clock.standing_still():
        _save(run, step, writer)
    if stopping and step < config.steps:
      run.checkpointer.wait()
      raise run_lib.Stopped(f"stopped at step {step} of {config.steps}")


def _tracer(workdir, start: int, steps: int) -> profiling.StepTracer:
  """Profiles three steps, after one that compiles.

  Raises:
    ValueError: if there are not that many.
  """
  if steps - start < 4:
    raise ValueError(
      f"a profile takes 4 steps, from {start} to config.{steps=} are fewer"
    )
  folder = os.path.join(workdir, "profile")
  return profiling.StepTracer(folder, start + 2, start + 4)


def _write_parts(run, batch, tracer) -> None:
  """Writes the share of each part, by one process."""
  if jax.process_index() == 0:
    compiled = run.step.lower(run.state, batch).compile()
    tracer.write_parts(compiled.as_text())


def _save(run, step: int, writer) -> None:
  """Measures what is held out and starts saving."""
  measured = run.held_out_metrics()
  if measured is None:
    run.save(step)
    return
  writer.write(step, measured, name="held_out")
  run.save(step, float(measured["loss"]))


class _Clock:
  """Time of the steps since it was last read.

  Attributes:
    steps: counted by the loop.
  """

  def __init__(self):
    self.steps, self._waited, self._since = 0, 0.0, time.perf_counter()

  @contextlib.contextmanager
  def waiting(self):
    """Counts as waiting for data."""
    began = time.perf_counter()
    yield
    self._waited += time.perf_counter() - began

  @contextlib.contextmanager
  def standing_still(self):
    """Does not count."""
    began = time.perf_counter()
    yield
    self._since += time.perf_counter() - began

  def read(self, tokens: float) -> dict[str, float]:
    """Returns a row of timings a step, and starts anew.

    Args:
      tokens: of a step.
    """
    seconds = (time.perf_counter() - self._since) / self.steps
    waited = self._waited / self.steps
    self.__init__()
    return {
      "seconds": seconds,
      "data_seconds": waited,
      "tokens_per_second": tokens / seconds,
    }


def _check(run, step: int, metrics, rows, workdir) -> None:
  """Stops a run whose gradients stay infinite or NaN, and leaves the batch."""
  limit = run.config.optimizer.max_consecutive_skips
  skipped = int(run.state.optimizer.consecutive_skips)
  if skipped < limit:
    return
  name = f"not_finite_step{step}_process{jax.process_index()}.npz"
  path = os.path.join(workdir, name)
  np.savez(path, **dataclasses.asdict(rows), **metrics)
  raise ValueError(
    f"step {step}: the gradients of {skipped} steps in a row were not finite"
    f" (loss={np.asarray(metrics['loss'])}); the batch is in {path}"
  )


# What a run may be continued with: it changes no number of the result.
_MAY_CHANGE = frozenset({"steps", "mesh", "log_every", "checkpoint"})
