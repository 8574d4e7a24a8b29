"""A repository at a commit as a tar, by what git stores.

Nothing is checked out: no hook, filter or attribute of the repository has a
say, and no history comes along in which an agent could find what it is to do.
"""

import io
import os
import pathlib
import subprocess
import tarfile

_MAX_BYTES = 256 << 20
_SECONDS = 300
# What a repository's own settings could make git start.
_SAFE = (
  "-c",
  "core.hooksPath=/dev/null",
  "-c",
  "core.fsmonitor=false",
  "-c",
  "protocol.file.allow=never",
  "-c",
  "diff.external=",
)


def git(repository: str | os.PathLike, *arguments: str, stdin=b"") -> bytes:
  """Returns what a git command prints.

  Raises:
    ValueError: git fails; the message is its first line.
  """
  command = ["git", *_SAFE, "-C", os.fspath(repository), *arguments]
  environment = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LC_ALL": "C",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_TERMINAL_PROMPT": "0",
    # The repository may be another user's: it is only read.
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "safe.directory",
    "GIT_CONFIG_VALUE_0": "*",
  }
  done = subprocess.run(
    command,
    input=stdin,
    capture_output=True,
    check=False,
    env=environment,
    timeout=_SECONDS,
  )
  if done.returncode:
    told = done.stderr.decode("utf-8", "replace").strip().split("\n")[0]
    raise ValueError(f"git {arguments[0]} in {repository}: {told[:300]}")
  return done.stdout


def resolve(repository: str | os.PathLike, revision: str) -> str:
  """Returns the full name of a commit; ValueError if there is none."""
  if not pathlib.Path(repository).is_dir():
    raise ValueError(f"{repository=} is no folder")
  arguments = ["rev-parse", "--verify", "--end-of-options"]
  found = git(repository, *arguments, f"{revision}^{{commit}}")
  return found.decode().strip()


def read(repository: str | os.PathLike, commit: str) -> bytes:
  """Returns the tree of a commit as a tar, the same bytes each time.

  Raises:
    ValueError: no such commit, or its files are too large.
  """
  listing = git(repository, "ls-tree", "-r", "-z", "--full-tree", commit)
  entries = []
  for line in listing.split(b"\0")[:-1]:
    kind, _, path = line.partition(b"\t")
    mode, _, name = kind.decode().split()
    entries.append((mode, name, os.fsdecode(path)))
  # Of a submodule only the name of a commit is there.
  stored = [entry for entry in entries if entry[0] != "160000"]
  wanted = "".join(f"{name}\n" for _, name, _ in stored).encode()
  blobs = io.BytesIO(git(repository, "cat-file", "--batch", stdin=wanted))
  out, size = io.BytesIO(), 0
  with tarfile.open(fileobj=out, mode="w") as archive:
    for mode, name, path in stored:
      header = blobs.readline().split()
      if len(header) != 3:
        raise ValueError(f"{repository}: {name} of {path!r} is missing")
      content = blobs.read(int(header[2]))
      blobs.read(1)
      size += len(content)
      if size > _MAX_BYTES:
        raise ValueError(f"{commit} holds more than {_MAX_BYTES} bytes")
      member = tarfile.TarInfo(path)
      if mode == "120000":
        member.type, member.linkname = tarfile.SYMTYPE, os.fsdecode(content)
        archive.addfile(member)
        continue
      member.size = len(content)
      member.mode = 0o755 if mode == "100755" else 0o644
      archive.addfile(member, io.BytesIO(content))
  return out.getvalue()
