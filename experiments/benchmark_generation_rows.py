"""What the generation benchmark measures, a row each, and how a row reads."""

# Batches that transformers runs.
PEER_BATCHES = (1, 16)


def rows(positions, batches, context: int, threads: int):
  """Yields the rows: job, side, variant, batch and length."""

  def row(job, side, variant, batch, length):
    return dict(
      job=job,
      side=side,
      variant=variant,
      batch=batch,
      length=length,
      threads=threads,
    )

  for variant in ("engine", "dsa", "dense"):
    for position in positions:
      yield row("position", "ours", variant, 1, position)
  for batch in batches:
    yield row("throughput", "ours", "engine", batch, context)
  for variant in ("eager/grouped_mm", "sdpa/grouped_mm"):
    for batch in batches:
      if batch in PEER_BATCHES:
        yield row("throughput", "transformers", variant, batch, context)
  for variant in ("float32", "bfloat16"):
    yield row("gap", "ours", variant, 4, 512)
  for count in (1, 4, 8):
    yield row("prompts", "ours", f"{count} rows", 64, 64)
  for position in sorted({min(positions), max(positions)}):
    yield row("speculation", "ours", "steps", 1, position)
  yield row("speculation", "ours", "trained", 1, 256)


def integers(name: str, values) -> list[int]:
  """Reads a list flag of positive integers.

  Raises:
    ValueError: names the flag.
  """
  if not values or not all(text.isdecimal() and int(text) for text in values):
    raise ValueError(f"--{name}={','.join(values)} must be positive integers")
  return [int(text) for text in values]


def line(result: dict) -> str:
  """Describes one result on a line."""
  head = "{job} {side} {variant} batch {batch} length {length}".format(**result)
  if result["job"] == "gap":
    return (
      f"{head}: mean {result['mean']:.1e}, largest {result['largest']:.1e} of"
      f" {result['tokens']} tokens"
    )
  if result["job"] == "speculation":
    return f"{head}: {_speculation(result)}"
  return (
    f"{head}: {1000 * result['seconds']:.1f} ms a step, fastest"
    f" {1000 * min(result['runs']):.1f}, CPU"
    f" {1000 * result['cpu_seconds']:.1f} ms, {result['other_cpus']:.1f} CPUs"
    " busy elsewhere"
  )


def _speculation(result):
  if result["variant"] == "steps":
    return "CPU {:.1f} ms a step with a draft, {:.1f} without: {:.2f}x".format(
      1000 * result["cpu_seconds"],
      1000 * result["plain_cpu_seconds"],
      result["ratio"],
    )
  parts = [
    "{} {:.0%} of drafts right, {:.2f} tokens a step, CPU {:.2f} ms a token,"
    " {:.2f} without drafts: {:.2f}x faster".format(
      name,
      result[name]["acceptance"],
      result[name]["tokens_per_step"],
      1000 * result[name]["cpu_seconds"],
      1000 * result[name]["plain_cpu_seconds"],
      result[name]["speedup"],
    )
    for name in ("greedy", "sampled")
  ]
  return f"{result['parameters'] / 1e6:.1f}M parameters; {'; '.join(parts)}"
