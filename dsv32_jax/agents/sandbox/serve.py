"""Answers calls inside a sandbox; a program of its own, stdlib only.

`python -I serve.py FD`: frames of 4 bytes of length, big-endian, and JSON come
and go over that socket. The first frame is {"source": text}, a Python module;
each later one is [id, function, arguments] and is answered with
[id, "value", value] or [id, "error", one line].
"""

import json
import os
import sys
import types


def read_exactly(descriptor: int, size: int) -> bytes:
  """Returns so many bytes; ends the program where the other side is gone."""
  parts = []
  while size:
    part = os.read(descriptor, min(size, 1 << 20))
    if not part:
      sys.exit(0)
    parts.append(part)
    size -= len(part)
  return b"".join(parts)


def read_frame(descriptor: int):
  """Returns the next JSON value."""
  size = int.from_bytes(read_exactly(descriptor, 4), "big")
  return json.loads(read_exactly(descriptor, size))


def write_frame(descriptor: int, content) -> None:
  """Writes a JSON value; ValueError or TypeError for what JSON has not."""
  text = json.dumps(content, allow_nan=False).encode()
  view = memoryview(len(text).to_bytes(4, "big") + text)
  while view:
    view = view[os.write(descriptor, view) :]


def one_line(error: BaseException) -> str:
  """Returns an exception as one line."""
  text = f"{type(error).__name__}: {error}"
  return " ".join(text.split())[:1000]


def main() -> None:
  """Loads the module, then answers until the socket closes."""
  descriptor = int(sys.argv[1])
  module = types.ModuleType("tools")
  sys.modules["tools"] = module
  failure = None
  try:
    source = read_frame(descriptor)["source"]
    exec(compile(source, "tools.py", "exec"), module.__dict__)
  except (Exception, SystemExit) as error:
    failure = one_line(error)
  write_frame(descriptor, [0, "error" if failure else "value", failure])
  while True:
    number, name, arguments = read_frame(descriptor)
    try:
      function = module.__dict__.get(name)
      if not callable(function):
        raise NameError(f"no function {name!r}")
      write_frame(descriptor, [number, "value", function(**arguments)])
    except (Exception, SystemExit) as error:
      write_frame(descriptor, [number, "error", one_line(error)])


if __name__ == "__main__":
  main()
