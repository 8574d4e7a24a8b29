"""What hostile code uses up; all of it bounded, see `attacks`."""

import io
import zipfile

import pytest

from tests.support import attacks

attack = attacks.attack


def test_fork_until_it_stops(attack):
  script = """
import os, time
made = 0
for _ in range(200):
  try:
    if os.fork() == 0:
      time.sleep(60)
      os._exit(0)
    made += 1
  except OSError:
    break
print("LEAK" if made > 20 else "stopped")
"""
  result = attack(script)
  assert result.stdout == b"stopped\n" and result.reason == "exit", result


def test_threads_until_they_stop(attack):
  script = """
import threading, time
made = 0
try:
  for _ in range(200):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    made += 1
except RuntimeError:
  pass
print("LEAK" if made > 20 else "stopped", flush=True)
"""
  assert attack(script, memory_bytes=1 << 30).stdout == b"stopped\n"


def test_memory_of_one_process(attack):
  script = """
held = []
try:
  for _ in range(1000):
    held.append(b"x" * (1 << 20))
  print("LEAK")
except MemoryError:
  del held
  print("stopped")
"""
  assert attack(script).stdout == b"stopped\n"


def test_memory_of_a_tree(attack):
  script = """
import os, time
for _ in range(5):
  if os.fork() == 0:
    held = b"x" * (150 << 20)
    time.sleep(30)
    os._exit(0)
time.sleep(30)
"""
  result = attack(script)
  assert (result.reason, result.returncode) == ("memory", None)
  assert 256 << 20 < result.peak_memory_bytes < 1 << 30


def test_disk(attack):
  script = """
import os
wrote = 0
try:
  for number in range(20):
    with open(f"f{number}", "wb") as file:
      for _ in range(10):
        wrote += file.write(os.urandom(1 << 20))
        file.flush()
        print(wrote, flush=True)
except OSError as error:
  print("full", error.errno)
if wrote > 100 << 20: print("LEAK")
"""
  result = attack(script)
  # In memory the file system is full; on disk the poll or a file's limit.
  assert b"full" in result.stdout or result.reason == "disk", result


def test_many_files(attack):
  script = """
import time
for number in range(5000):
  open(str(number), "w").close()
time.sleep(1)
print("LEAK")
"""
  assert attack(script).reason == "files"


def test_zip_bomb(attack):
  packed = io.BytesIO()
  with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("zeros", bytes(100 << 20))
  script = """
import zipfile
try:
  zipfile.ZipFile("bomb.zip").extractall()
  print("LEAK")
except OSError:
  print("full")
"""
  files = {"bomb.zip": packed.getvalue()}
  assert len(files["bomb.zip"]) < 1 << 20
  result = attack(script, files=files)
  assert b"full" in result.stdout or result.reason == "disk", result


@pytest.mark.parametrize("stream", ["1", "2", "int(os.environ['RESULT_FD'])"])
def test_output_flood(attack, stream):
  script = f"""
import os
for _ in range(2000):
  os.write({stream}, b"x" * 100_000)
os.write(1, b"LEAK")
"""
  result = attack(script)
  assert result.reason == "output" and result.returncode is None
  sizes = len(result.stdout), len(result.stderr), len(result.results)
  assert sum(sizes) == 100_000, sizes


def test_time_however_it_is_spent(attack):
  spins = attack("while True: pass", cpu_seconds=1)
  assert spins.reason == "cpu" and spins.seconds < 3
  stubborn = """
import signal, time
for number in range(1, 65):
  try:
    signal.signal(number, signal.SIG_IGN)
  except (OSError, ValueError):
    pass
end = time.time() + 30
while time.time() < end:
  time.sleep(0.01)
print("LEAK")
"""
  result = attack(stubborn, wall_seconds=1.0)
  assert (result.reason, result.returncode) == ("wall", None)
  assert 1 <= result.seconds < 2


def test_daemons_end_with_the_run(attack):
  script = """
import os, time
if os.fork() == 0:
  os.setsid()
  if os.fork() == 0:
    for number in range(3, 64):
      try: os.close(number)
      except OSError: pass
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3): os.dup2(null, number)
    time.sleep(60)
  os._exit(0)
os.wait()
print("left")
"""
  result = attack(script)
  assert result.stdout == b"left\n" and result.reason == "exit"
  assert result.seconds < 2


def test_deep_recursion_and_deep_folders(attack):
  script = """
import os, sys
for _ in range(150):
  os.mkdir("d" * 60); os.chdir("d" * 60)
os.chmod(".", 0)
sys.setrecursionlimit(10**5)
def deeper(n): return deeper(n + 1) + 1
try: deeper(0)
except (MemoryError, RecursionError): pass
print("back")
"""
  # Where frames are too many for the stack or the memory, that ends it.
  assert attack(script).reason in ("exit", "memory", "cpu")
