"""Trees of files: listed, packed, unpacked, changed; stdlib only.

A part of the program `inside.py`, which runs in a sandbox.
"""

import fnmatch
import io
import os
import shutil
import stat
import tarfile

# Time to unpack a tree grows with the cube of it.
_MAX_DEPTH = 60


class OrderError(Exception):
  """What is wrong with an order, in words for a model."""


def extract(path: str, folder: str) -> None:
  """Unpacks a tar and removes it; nothing in it leads out of the folder."""
  os.makedirs(folder, exist_ok=True)
  with tarfile.open(path) as archive:
    archive.extractall(folder, filter="tar")
  os.unlink(path)


def paths_under(folder: str):
  """Yields (path, os.stat_result) of all below a folder, parents first.

  Raises:
    OrderError: folders are nested too deeply.
  """
  waiting = [""]
  while waiting:
    parent = waiting.pop()
    here = os.path.join(folder, parent)
    if not os.access(here, os.R_OK | os.W_OK | os.X_OK):
      os.chmod(here, 0o700)
    for entry in sorted(os.scandir(here), key=lambda entry: entry.name):
      path = os.path.join(parent, entry.name)
      if path.count("/") > _MAX_DEPTH:
        raise OrderError(f"folders are nested more than {_MAX_DEPTH} deep")
      yield path, entry.stat(follow_symlinks=False)
      if entry.is_dir(follow_symlinks=False):
        waiting.append(path)


def mark(info: os.stat_result) -> tuple:
  """What changes where a file does."""
  if stat.S_ISREG(info.st_mode):
    return info.st_mode, info.st_mtime_ns, info.st_ino, info.st_size
  return info.st_mode, 0, 0 if stat.S_ISDIR(info.st_mode) else info.st_ino, 0


def pack(folder: str, paths) -> bytes:
  """Returns a tar of these paths."""
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w") as archive:
    for path in paths:
      whole = os.path.join(folder, path)
      info = os.lstat(whole)
      if stat.S_ISREG(info.st_mode) and not os.access(whole, os.R_OK):
        os.chmod(whole, 0o600)
      if info.st_mode & 0o170000 in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
        archive.inodes = {}
        archive.add(whole, path, recursive=False)
  return out.getvalue()


def remove(path: str) -> None:
  """Removes a file, a link or a folder, if it is there."""
  if os.path.isdir(path) and not os.path.islink(path):
    shutil.rmtree(path)
  elif os.path.lexists(path):
    os.unlink(path)


def clear_way(path: str) -> None:
  """Makes the folders above a path, none of them a link, and removes it."""
  parent = ""
  for part in path.split("/")[:-1]:
    parent = os.path.join(parent, part)
    if os.path.islink(parent) or os.path.isfile(parent):
      os.unlink(parent)
    os.makedirs(parent, exist_ok=True)
  remove(path)


def is_protected(path: str, patterns) -> bool:
  """Tells whether a pattern matches the path, or without "/" a part of it."""
  for pattern in patterns:
    if "/" in pattern:
      if fnmatch.fnmatchcase(path, pattern):
        return True
    elif any(fnmatch.fnmatchcase(part, pattern) for part in path.split("/")):
      return True
  return False
