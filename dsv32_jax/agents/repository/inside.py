"""Carries out one order on a tree of files; runs in a sandbox.

A program of this file, `folders` and the standard library. The order is JSON
on stdin, the answer goes to the descriptor that the first argument names: a
line of JSON with the order's nonce, then a tar. The folder holds `image.tar`,
the tree, and maybe `delta.tar`, what was changed in it since. Commands run as
children in `repository/`. They cannot reach the channel: this process is
closed to them, and before the answer is written every other process of the
sandbox has ended.
"""

import ctypes
import json
import os
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import time

from dsv32_jax.agents.repository import folders

TREE = "repository"
_NOT_DUMPABLE = 4
_CHUNK = 1 << 16
_REPORT_BYTES = 8 << 20


def merge(order) -> None:
  """Puts changes into the tree, but for what is protected."""
  protected = order.get("protected", [])
  kept = _protected_files(protected)
  for path in reversed(order.get("removed", [])):
    ours = os.path.join(TREE, path)
    if os.path.isdir(ours) and not os.path.islink(ours):
      if not os.listdir(ours):
        os.rmdir(ours)
    elif not folders.is_protected(path, protected):
      folders.remove(ours)
  if os.path.exists("delta.tar"):
    folders.extract("delta.tar", "theirs")
    for path, info in list(folders.paths_under("theirs")):
      if not folders.is_protected(path, protected):
        _take(path, info)
    shutil.rmtree("theirs")
  # A folder of theirs may have been put where one with such files was.
  for path, (content, mode) in kept.items():
    folders.clear_way(path)
    with open(path, "wb") as file:
      file.write(content)
    os.chmod(path, mode)


def _take(path: str, info: os.stat_result) -> None:
  """Moves a file of theirs into the tree, or makes a folder like theirs."""
  ours = os.path.join(TREE, path)
  if not stat.S_ISDIR(info.st_mode):
    folders.clear_way(ours)
    os.rename(os.path.join("theirs", path), ours)
    return
  if os.path.islink(ours) or not os.path.isdir(ours):
    folders.clear_way(ours)
    os.mkdir(ours)
  os.chmod(ours, info.st_mode & 0o7777)


def _protected_files(patterns) -> dict:
  found = {}
  for path, info in folders.paths_under(TREE) if patterns else ():
    if stat.S_ISREG(info.st_mode) and folders.is_protected(path, patterns):
      whole = os.path.join(TREE, path)
      with open(whole, "rb") as file:
        found[whole] = file.read(), stat.S_IMODE(info.st_mode)
  return found


def place(files) -> None:
  """Writes files, {path: text or None for one that must not be there}."""
  for path, text in files.items():
    ours = os.path.join(TREE, path)
    folders.clear_way(ours)
    if text is not None:
      with open(ours, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def end_others() -> None:
  """Ends every other process of the sandbox."""
  for _ in range(100):
    try:
      os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
      return
    try:
      while os.waitpid(-1, os.WNOHANG)[0]:
        pass
    except ChildProcessError:
      pass
    time.sleep(0.002)


def run(argv, seconds: float, most: int) -> dict:
  """Runs a command; keeps the two ends of what it says."""
  os.makedirs("scratch", exist_ok=True)
  process = subprocess.Popen(
    ["/usr/bin/env", f"TMPDIR={os.path.abspath('scratch')}", *argv],
    cwd=TREE,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    start_new_session=True,
  )
  head, tail, left_out = bytearray(), bytearray(), 0

  def keep(chunk):
    nonlocal left_out
    room = most - most // 2 - len(head)
    head.extend(chunk[:room])
    tail.extend(chunk[max(0, room) :])
    over = len(tail) - most // 2
    if over > 0:
      left_out += over
      del tail[:over]

  source = process.stdout.fileno()
  os.set_blocking(source, False)
  deadline, is_over = time.monotonic() + seconds, False
  with selectors.DefaultSelector() as selector:
    selector.register(source, selectors.EVENT_READ)
    while not is_over and time.monotonic() < deadline:
      is_over = process.poll() is not None
      if not is_over and not selector.select(0.02):
        continue
      try:
        chunk = os.read(source, _CHUNK)
      except BlockingIOError:
        continue
      if chunk:
        keep(chunk)
      else:
        selector.unregister(source)
        while process.poll() is None and time.monotonic() < deadline:
          time.sleep(0.005)
        break
  code = process.poll()
  end_others()
  process.wait()
  # What is left of it in the pipe; all who could write more have ended.
  while code is not None and (chunk := _read(source)):
    keep(chunk)
  process.stdout.close()
  shutil.rmtree("scratch", ignore_errors=True)
  note = f"\n... {left_out} bytes left out ...\n".encode() if left_out else b""
  output = bytes(head) + note + bytes(tail)
  return {"code": code, "output": output.decode("utf-8", "replace")}


def _read(source: int) -> bytes:
  try:
    return os.read(source, _CHUNK)
  except BlockingIOError:
    return b""


def shell(order) -> dict:
  """Runs a command line, or what builds the tree, one after another."""
  found = {"code": 0, "output": ""}
  for command in order["commands"]:
    argv = ["/bin/bash", "-c", command]
    found = run(argv, order["seconds"], order["characters"])
    if found["code"] != 0:
      break
  return found


def _within(path: str) -> str:
  """Returns where a path of the tree is; OrderError if it leads elsewhere."""
  try:
    os.fsencode(path)
  except UnicodeEncodeError:
    path += "\0"
  if "\0" in path:
    raise folders.OrderError("there is no file of that name")
  whole, root = os.path.join(TREE, path), os.path.realpath(TREE)
  real = os.path.realpath(whole)
  if os.path.commonpath([root, real]) != root:
    raise folders.OrderError(f"{path} leads out of the repository")
  if os.path.exists(real) and not (os.path.isfile(real) or os.path.isdir(real)):
    raise folders.OrderError(f"{path} is no file")
  return whole


def view(order) -> dict:
  """Shows numbered lines of a file, or what a folder holds."""
  path = _within(order["path"])
  try:
    if os.path.isdir(path):
      names = sorted(os.listdir(path))
      is_folder = lambda name: os.path.isdir(os.path.join(path, name))
      lines = [f"{name}/" if is_folder(name) else name for name in names]
      return {"output": "\n".join(lines)}
    with open(path, encoding="utf-8", errors="replace") as file:
      lines = file.read(order["characters"] * 50).split("\n")
  except OSError as error:
    raise folders.OrderError(f"{order['path']}: {error.strerror}") from error
  first, last = order["first"], order["last"] or len(lines)
  shown = enumerate(lines[first - 1 : last], first)
  return {"output": "\n".join(f"{number}\t{line}" for number, line in shown)}


def edit(order) -> dict:
  """Replaces a text that a file holds once; an empty one begins a file."""
  path, old = _within(order["path"]), order["old"]
  try:
    if not old:
      if os.path.lexists(path):
        raise folders.OrderError(f"{order['path']} is there already")
      os.makedirs(os.path.dirname(path), exist_ok=True)
      text, old = "", ""
    else:
      with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
      count = text.count(old)
      if count != 1:
        raise folders.OrderError(
          f"{order['path']} holds the old text {count} times"
        )
    with open(path, "w", encoding="utf-8", newline="") as file:
      file.write(text.replace(old, order["new"]) if old else order["new"])
  except UnicodeError as error:
    raise folders.OrderError(f"{order['path']}: {error}") from error
  except OSError as error:
    raise folders.OrderError(f"{order['path']}: {error.strerror}") from error
  return {"output": "done"}


def apply(order) -> dict:
  """Applies a unified diff."""
  with open("patch.diff", "w", encoding="utf-8", newline="") as file:
    file.write(order["patch"])
  command = ["git", "apply", "--whitespace=nowarn", "../patch.diff"]
  return run(command, order["seconds"], order["characters"])


def grade(order) -> dict:
  """Runs tests whose files are placed now; returns their reports as text.

  Each batch meets the tree as it was prepared: what it tests may have written
  tests or reports of the next.
  """
  place(order["hidden"])
  prepared = folders.pack(TREE, [path for path, _ in folders.paths_under(TREE)])
  reports, found = [], {"code": None, "output": ""}
  for number, files in enumerate(order["batches"]):
    if number:
      for name in os.listdir():
        folders.remove(name)
      with open("image.tar", "wb") as file:
        file.write(prepared)
      folders.extract("image.tar", TREE)
    report = os.path.abspath(f"report-{os.urandom(8).hex()}.xml")
    argv = _of_tests(order["command"], files, report)
    found = run(argv, order["seconds"], order["characters"])
    reports.append(_report(report))
  return {"reports": reports, **found}


def test(order) -> dict:
  """Runs tests as they lie in the tree."""
  argv = _of_tests(order["command"], order["files"], "/dev/null")
  return run(argv, order["seconds"], order["characters"])


def _of_tests(command, files, report):
  argv = []
  for part in command:
    argv += files if part == "{files}" else [part.replace("{report}", report)]
  return argv


def _report(path: str) -> str:
  try:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
  except OSError:
    return ""
  with open(descriptor, "rb") as file:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
      return ""
    return file.read(_REPORT_BYTES).decode("utf-8", "replace")


OPERATIONS = {
  "apply": apply,
  "edit": edit,
  "grade": grade,
  "shell": shell,
  "test": test,
  "view": view,
}


def kept(before, what: str) -> tuple:
  """Returns what was removed since, and a tar of what is to be kept."""
  if os.path.islink(TREE):
    raise folders.OrderError("its folder is a link")
  after = {path: folders.mark(info) for path, info in folders.paths_under(TREE)}
  changed = [
    path
    for path, found in after.items()
    if what == "everything" or before.get(path) != found
  ]
  return [path for path in before if path not in after], folders.pack(
    TREE, changed
  )


def main() -> None:
  """Carries out the order of stdin."""
  ctypes.CDLL(None).prctl(_NOT_DUMPABLE, 0, 0, 0, 0)
  channel = int(sys.argv[1])
  os.set_inheritable(channel, False)
  order = json.loads(sys.stdin.buffer.read())
  folders.extract("image.tar", TREE)
  before = {
    path: folders.mark(info) for path, info in folders.paths_under(TREE)
  }
  merge(order)
  archive = b""
  try:
    answer = OPERATIONS[order["operation"]](order)
  except folders.OrderError as error:
    answer = {"error": str(error)}
  if order["keep"] != "nothing" and "error" not in answer:
    try:
      answer["removed"], archive = kept(before, order["keep"])
    except (folders.OrderError, OSError) as error:
      answer = {"error": f"the tree is not kept: {error}"}
  answer["nonce"] = order["nonce"]
  with open(channel, "wb") as file:
    file.write(json.dumps(answer).encode() + b"\n" + archive)


if __name__ == "__main__":
  main()
