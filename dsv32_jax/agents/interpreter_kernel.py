"""Keeps a Jupyter kernel and runs cells in it, inside a sandbox.

`python -I interpreter_kernel.py FD`: a program of its own, of jupyter_client
and the standard library. Frames of 4 bytes of length, big-endian, and JSON
come and go over that socket: first {"output_characters": n}, answered when the
kernel is ready; then {"code": text, "seconds": n} for each cell, answered with
{"status", "output", "truncated", "lost_state"}. The kernel is reached through
unix sockets in the working folder: there is no network.
"""

import json
import os
import queue
import re
import sys
import time

import jupyter_client

_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# What an interrupted cell may take to clean up before the kernel is killed.
_GRACE_SECONDS = 3.0
_START_SECONDS = 60.0
# No history file.
_OPTIONS = ["--HistoryManager.enabled=False"]


def read_frame(stream):
  """Returns the next JSON value, or None where the other side is gone."""
  size = int.from_bytes(stream.read(4), "big")
  return json.loads(stream.read(size)) if size else None


def write_frame(stream, content) -> None:
  """Writes a JSON value."""
  text = json.dumps(content).encode()
  stream.write(len(text).to_bytes(4, "big") + text)
  stream.flush()


class Output:
  """Text of one cell, at most so many characters of it."""

  def __init__(self, most: int):
    self._parts = []
    self._room = most
    self.truncated = False

  def add(self, text: str) -> None:
    """Appends what there is room for, without colours."""
    text = _COLOURS.sub("", text)
    self.truncated |= len(text) > self._room
    self._parts.append(text[: self._room])
    self._room -= len(self._parts[-1])

  def text(self) -> str:
    """Returns what was kept."""
    return "".join(self._parts)


class Kernel:
  """One Jupyter kernel, started again when it ends."""

  def __init__(self):
    folder = os.path.join(os.getcwd(), ".kernel")
    os.mkdir(folder)
    self._manager = jupyter_client.KernelManager(
      transport="ipc", ip=os.path.join(folder, "k")
    )
    self._manager.start_kernel(extra_arguments=_OPTIONS)
    self._connect()

  def _connect(self) -> None:
    self._client = self._manager.blocking_client()
    self._client.start_channels()
    self._client.wait_for_ready(timeout=_START_SECONDS)

  def _restart(self) -> None:
    self._client.stop_channels()
    self._manager.restart_kernel(now=True)
    self._connect()

  def run(self, code: str, seconds: float, most: int) -> dict:
    """Runs a cell; returns the answer to its frame."""
    output = Output(most)
    asked = self._client.execute(code, allow_stdin=False)
    deadline = time.monotonic() + seconds
    status = self._follow(asked, output, deadline)
    lost_state = status == "died"
    if status == "timeout":
      self._manager.interrupt_kernel()
      grace = time.monotonic() + _GRACE_SECONDS
      lost_state = self._follow(asked, Output(0), grace) in ("timeout", "died")
    if lost_state:
      self._restart()
    return {
      "status": status,
      "output": output.text(),
      "truncated": output.truncated,
      "lost_state": lost_state,
    }

  def _follow(self, asked: str, output: Output, deadline: float) -> str:
    """Collects what a cell says until it is over, or the time is."""
    status = "ok"
    while True:
      left = deadline - time.monotonic()
      if left <= 0:
        return "timeout"
      try:
        message = self._client.get_iopub_msg(timeout=min(left, 0.2))
      except queue.Empty:
        if not self._manager.is_alive():
          return "died"
        continue
      if message["parent_header"].get("msg_id") != asked:
        continue
      content = message["content"]
      match message["msg_type"]:
        case "stream":
          output.add(content["text"])
        case "execute_result" | "display_data":
          output.add(content["data"].get("text/plain", "") + "\n")
        case "error":
          status = "error"
          output.add("\n".join(content["traceback"]) + "\n")
        case "status" if content["execution_state"] == "idle":
          return status


def main() -> None:
  """Answers until the socket closes."""
  descriptor = int(sys.argv[1])
  with (
    open(descriptor, "rb") as reader,
    open(os.dup(descriptor), "wb") as writer,
  ):
    order = read_frame(reader)
    kernel = Kernel()
    write_frame(writer, {"status": "ready"})
    while (cell := read_frame(reader)) is not None:
      most = order["output_characters"]
      write_frame(writer, kernel.run(cell["code"], cell["seconds"], most))


if __name__ == "__main__":
  main()
