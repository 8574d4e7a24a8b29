"""The page of the gallery: reading episodes, putting them into the template."""

import base64
import hashlib
import json
import math
import pathlib
import string
from typing import Any

from dsv32_jax.agents import tables

_HERE = pathlib.Path(__file__).parent


def read(path: pathlib.Path, first: int) -> list[dict[str, Any]]:
  """Reads episodes.

  Args:
    path: of the JSONL file.
    first: most to read.

  Raises:
    ValueError: naming file and line, if a row is no episode.
  """
  episodes = []
  for number, row in enumerate(tables.read_jsonl(path), 1):
    if len(episodes) == first:
      break
    messages = row.get("messages")
    try:
      if isinstance(messages, str):
        messages = json.loads(messages)
      _check(messages, row)
      json.dumps(messages, allow_nan=False)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise ValueError(f"{path}:{number} is no episode: {error}") from error
    episodes.append({**row, "messages": messages})
  if not episodes:
    raise ValueError(f"{path} has no episodes")
  return episodes


def _check(messages: Any, row: dict[str, Any]) -> None:
  """Raises ValueError, TypeError or KeyError unless the page can show it."""
  if not isinstance(messages, list) or not messages:
    raise ValueError("it has no messages")
  if not isinstance(row["id"], str):
    raise ValueError(f"id={row['id']!r} is no text")
  for name in ("reward", "seconds"):
    value = row[name] if name == "reward" else row.get(name, 0.0)
    if not isinstance(value, int | float) or not math.isfinite(value):
      raise ValueError(f"{name}={value!r} is no number")
  for message in messages:
    for name in ("role", "content", "reasoning_content", "malformed"):
      if not isinstance(message.get(name) or "", str):
        raise ValueError(f"{name} of a message is no text")
    for entry in message.get("tool_calls") or ():
      if not isinstance(entry["function"]["arguments"], str):
        raise ValueError("arguments of a call are no text")
    for entry in message.get("tools") or ():
      entry["function"]["name"]


def page(episodes: list[dict[str, Any]]) -> str:
  """Returns the page.

  What was written in episodes is data, and no script but the page's own can
  run: its hash is the page's policy.
  """
  script = (_HERE / "gallery.js").read_text(encoding="utf-8")
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  policy = (
    f"default-src 'none'; style-src 'unsafe-inline'; script-src"
    f" 'sha256-{digest}'"
  )
  data = json.dumps(episodes).replace("<", "\\u003c")
  template = (_HERE / "gallery.html").read_text(encoding="utf-8")
  return string.Template(template).substitute(
    policy=policy, data=data, script=script
  )
