"""The results of the CPU benchmark as text: a line each, and the table."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform

from experiments import readme_block

BEGIN = "<!-- benchmark: begin -->"
END = "<!-- benchmark: end -->"
PACKAGES = ("jax", "flax", "torch", "transformers")


def machine() -> dict:
  """Says where and when: processor, threads, versions, date."""
  model = platform.processor() or platform.machine()
  for row in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
    if row.startswith("model name"):
      model = row.split(":", 1)[1].strip()
      break
  return {
    "cpu": model,
    "cpus_allowed": len(os.sched_getaffinity(0)),
    "python": platform.python_version(),
    "versions": _versions(),
    "date": datetime.date.today().isoformat(),
  }


def _versions() -> dict[str, str]:
  """Of the packages that are here: a program may need no peer."""
  found = {}
  for name in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def line(result: dict) -> str:
  """Describes one result on a line."""
  head = "{job} {side} {variant} {length}".format(**result)
  if "skipped" in result:
    return f"{head}: skipped, {result['skipped']}"
  if result["job"] == "parity":
    return (
      f"{head}: error {result['error']:.1e}, {result['rows_that_differ']} of"
      f" {result['rows']} rows differ by a tie"
    )
  if result["job"] == "parts":
    parts = sorted(result["milliseconds"].items(), key=lambda item: -item[1])
    return f"{head}: " + ", ".join(f"{n} {ms:.1f} ms" for n, ms in parts)
  return (
    f"{head}: {1000 * result['seconds']:.0f} ms, first"
    f" {result['first_seconds']:.1f} s, peak"
    f" {result['peak_rss_bytes'] / 1e9:.2f} GB, {result['other_cpus']:.1f}"
    " CPUs busy elsewhere"
  )


def write(results: pathlib.Path, readme: pathlib.Path) -> None:
  """Replaces what is between the markers of a file by the table.

  Raises:
    ValueError: the file lacks the markers, or a result is missing.
  """
  rows = [json.loads(row) for row in results.read_text().splitlines()]
  readme_block.replace(readme, BEGIN, END, table(rows))


def table(rows: list[dict]) -> str:
  """Renders Markdown of the last result of each row."""
  latest = {
    (row["job"], row["side"], row["variant"], row["length"]): row
    for row in rows
  }
  blocks = [
    _about(latest),
    _timings(latest, "prefill", "Prefill, tokens a second", _per_second),
    _timings(latest, "train", "Forward and backward, seconds", _seconds),
    _timings(latest, "decode", "Decode, milliseconds a token", _milliseconds),
    _memory(latest),
    _gathered(latest),
  ]
  return "\n\n".join(block for block in blocks if block)


def _per_second(row) -> str:
  return f"{row['length'] / row['seconds']:.0f}"


def _seconds(row) -> str:
  return f"{row['seconds']:.2f}"


def _milliseconds(row) -> str:
  return f"{1000 * row['seconds']:.1f}"


LABELS = {
  ("prefill", "default"): "ours, sparse",
  ("prefill", "expanded"): "ours, sparse, masked form",
  ("prefill", "gathered"): "ours, sparse, gathered form",
  ("train", "default"): "ours, LM loss, sparse",
  ("train", "dense"): "ours, LM loss, dense",
  ("train", "sparse_stage"): "ours, whole step of the sparse stage",
  ("decode", "default"): "ours, sparse",
}


def _label(job, side, variant) -> str:
  if side == "transformers":
    return f"transformers, {variant.split('/')[0]}"
  return LABELS.get((job, variant), f"ours, {variant}")


def _timings(latest, job, title, show) -> str:
  lengths = sorted({key[3] for key in latest if key[0] == job})
  kinds = list(dict.fromkeys(key[1:3] for key in latest if key[0] == job))
  if not lengths:
    return ""
  lines = [
    f"| {title} | " + " | ".join(str(length) for length in lengths) + " |",
    "|---" * (len(lengths) + 1) + "|",
  ]
  for side, variant in kinds:
    cells = []
    for length in lengths:
      row = latest.get((job, side, variant, length))
      if row is None:
        cells.append("")
      elif "skipped" in row:
        cells.append("does not fit")
      else:
        cells.append(show(row))
    label = _label(job, side, variant)
    lines.append(f"| {label} | " + " | ".join(cells) + " |")
  ratios = [_ratio(latest, job, length) for length in lengths]
  lines.append("| faster than transformers | " + " | ".join(ratios) + " |")
  return "\n".join(lines)


def _ratio(latest, job, length) -> str:
  """Our default over the faster of transformers' ways."""
  ours = latest.get((job, "ours", "default", length))
  peers = [
    row["seconds"]
    for key, row in latest.items()
    if key[:2] == (job, "transformers")
    and key[3] == length
    and "seconds" in row
  ]
  if ours is None or not peers:
    return ""
  return f"{min(peers) / ours['seconds']:.1f}x"


def _memory(latest) -> str:
  rows = [
    row
    for key, row in latest.items()
    if key[:3] == ("prefill", "ours", "default")
  ]
  if not rows:
    return ""
  longest = max(rows, key=lambda row: row["length"])
  return (
    f"Peak memory of our prefill at {longest['length']} tokens, all logits"
    f" included: {longest['peak_rss_bytes'] / 1e9:.1f} GB."
  )


def _gathered(latest) -> str:
  """Attention time a token of the gathered form, against the length."""
  found = {
    key[3]: row["milliseconds"]["attention_gathered"] / key[3]
    for key, row in latest.items()
    if key[0] == "parts"
  }
  if not found:
    return ""
  parts = ", ".join(
    f"{1000 * found[length]:.0f} us at {length}" for length in sorted(found)
  )
  return (
    "The gathered form's attention, indexer and selection apart, a token and"
    f" layer: {parts}."
  )


def _about(latest) -> str:
  """Says what was measured, where and when, and that both sides agree."""
  last = list(latest.values())[-1]
  versions = ", ".join(f"{k} {v}" for k, v in last["versions"].items())
  text = (
    f"65M parameters, float32, {last['threads']} threads of {last['cpu']},"
    f" {versions}, {last['date']}; `python -m experiments.benchmark`."
  )
  disturbed = max(row.get("other_cpus", 0.0) for row in latest.values())
  if disturbed > 0.2:
    text += (
      f" Other programs kept up to {disturbed:.1f} CPUs busy meanwhile: only"
      " ratios mean something."
    )
  parity = [row for row in latest.values() if row["job"] == "parity"]
  if not parity:
    raise ValueError("no result of the job parity: times of what?")
  return text + (
    f" At {parity[0]['length']} tokens the logits differ by"
    f" {parity[0]['error']:.0e} of the largest,"
    f" {parity[0]['rows_that_differ']} of {parity[0]['rows']} selections by"
    " a tie."
  )
