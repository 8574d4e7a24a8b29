"""What hostile code tries to reach; all of it bounded, see `attacks`."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from dsv32_jax.agents import sandbox
from dsv32_jax.agents.sandbox import probing
from tests.support import attacks

attack = attacks.attack


NETWORK = """
import socket, sys
for family, kind in (
  (socket.AF_INET, socket.SOCK_STREAM),
  (socket.AF_INET, socket.SOCK_DGRAM),
  (socket.AF_INET6, socket.SOCK_DGRAM),
  (socket.AF_NETLINK, socket.SOCK_RAW),
  (socket.AF_PACKET, socket.SOCK_RAW),
):
  try:
    socket.socket(family, kind)
    print("LEAK", family, kind)
  except OSError:
    pass
for target in (("127.0.0.1", int(sys.argv[1])), ("192.0.2.1", 80)):
  try:
    socket.create_connection(target, timeout=1)
    print("LEAK", target)
  except OSError:
    pass
try:
  socket.getaddrinfo("example.org", 80)
  print("LEAK names")
except OSError:
  pass
print("done")
"""


def test_network_names_and_loopback(attack):
  with socket.create_server(("127.0.0.1", 0)) as server:
    server.setblocking(False)
    result = attack(NETWORK, server.getsockname()[1])
    with pytest.raises(BlockingIOError):
      server.accept()
  assert result.stdout == b"done\n", result


def test_unix_sockets_of_the_host(attack):
  script = """
import socket, sys
for name in (sys.argv[1], "\\0" + sys.argv[2]):
  try:
    socket.socket(socket.AF_UNIX).connect(name)
    print("LEAK", name)
  except OSError:
    pass
left, right = socket.socketpair()
left.send(b"done"); print(right.recv(9))
"""
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o755)
    path = f"{folder}/open"
    with (
      socket.socket(socket.AF_UNIX) as named,
      socket.socket(socket.AF_UNIX) as abstract,
    ):
      named.bind(path)
      os.chmod(path, 0o777)
      abstract.bind("\0" + attacks.MARK + str(os.getpid()))
      named.listen()
      abstract.listen()
      result = attack(script, path, attacks.MARK + str(os.getpid()))
  assert result.stdout == b"b'done'\n", result


def test_files_outside(attack):
  script = """
import os, pathlib, sys
secret, folder = map(pathlib.Path, sys.argv[1:3])
def attempt(what, action):
  try:
    action()
    print("LEAK", what)
  except (OSError, KeyError):
    pass
attempt("read", secret.read_text)
attempt("through a link", lambda: (os.symlink(secret, "l"), open("l").read()))
attempt("hard link", lambda: os.link(secret, "h"))
attempt("list", lambda: os.listdir(folder))
attempt("write", lambda: (folder / "new").write_text("x"))
attempt("change", lambda: secret.write_text("x"))
attempt("truncate", lambda: os.truncate(secret, 0))
attempt("remove", secret.unlink)
attempt("mode", lambda: secret.chmod(0o600))
attempt("shadow", lambda: open("/etc/shadow").read())
attempt("passwd", lambda: open("/etc/passwd").read())
attempt("usr", lambda: open("/usr/lib/attack", "w"))
attempt("python", lambda: open(os.__file__, "a"))
attempt("root", lambda: os.mkdir("/attack"))
attempt("sysctl", lambda: open("/proc/sys/kernel/core_pattern", "w"))
attempt("trigger", lambda: open("/proc/sysrq-trigger", "w"))
attempt("disks", lambda: os.mknod("disk", 0o60600, os.makedev(8, 0)))
attempt("up", lambda: os.listdir("/root"))
print("done")
"""
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o777)
    secret = pathlib.Path(folder) / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    result = attack(script.replace("/root", folder), secret, folder)
    assert secret.read_text() == "secret"
    assert secret.stat().st_mode & 0o777 == 0o666
    assert os.listdir(folder) == ["secret"]
  assert result.stdout == b"done\n", result


def test_environment_of_those_above(attack, monkeypatch):
  monkeypatch.setenv("API_KEY", "LEAK")
  script = """
import os, sys
for pid in ["1", "self", str(os.getppid()), sys.argv[1]]:
  for name in ("environ", "mem", "maps", "root/etc/shadow", "cwd/setup.cfg"):
    try:
      with open(f"/proc/{pid}/{name}", "rb") as file:
        if pid == sys.argv[1]:
          print("LEAK", name)
        if name == "environ":
          print(file.read())
    except OSError:
      pass
print(os.environ, "done")
"""
  # A process of the host that does exist here, at a number that inside is
  # another's or nobody's.
  assert b"done" in attack(script, os.getppid()).stdout


def test_descriptors_of_the_host(attack):
  script = """
import os
for number in range(3, 256):
  try:
    target = os.fstat(number)
  except OSError:
    continue
  print("LEAK" if number != int(os.environ["RESULT_FD"]) else "own", number)
"""
  with tempfile.TemporaryFile() as file:
    os.set_inheritable(file.fileno(), True)
    assert attack(script).stdout.startswith(b"own ")


def test_signals_to_others(attack):
  script = """
import os, signal, sys
for pid in (int(sys.argv[1]), os.getppid(), 1):
  for send in (os.kill, os.killpg):
    if pid == 1 and send is os.killpg: continue
    try:
      send(pid, signal.SIGKILL)
    except OSError:
      pass
if os.fork() == 0:
  os.kill(-1, signal.SIGKILL)
print("done", flush=True)
os.kill(-1, signal.SIGKILL)
"""
  begin = time.monotonic()
  # A number that inside is another's: whether this process lives on tells.
  with subprocess.Popen(["sleep", "20"]) as victim:
    try:
      result = attack(script, victim.pid)
      assert victim.poll() is None
    finally:
      victim.kill()
  assert result.seconds < 3 and time.monotonic() - begin < 10


SYSCALLS = """
import ctypes, ctypes.util, os
libc = ctypes.CDLL(None, use_errno=True)
def refused(name, *arguments):
  if getattr(libc, name)(*arguments) >= 0:
    print("LEAK", name, arguments)
for flag in (0x10000000, 0x20000, 0x20000000, 0x40000000):
  refused("unshare", flag)
refused("ptrace", 16, os.getppid(), 0, 0)
refused("ptrace", 0, 0, 0, 0)
refused("mount", b"none", b"/tmp", b"tmpfs", 0, None)
refused("chroot", b".")
refused("process_vm_readv", os.getppid(), None, 0, None, 0, 0)
refused("shmget", 77, 4096, 0o1666)
refused("msgget", 77, 0o1666)
refused("semget", 77, 1, 0o1666)
refused("mq_open", b"/attack", 0o102, 0o666, None)
refused("syscall", 248, b"user", b"attack", b"x", 1, -3)  # add_key
refused("syscall", 56, 0x10000000 | 17, 0, 0, 0, 0)  # clone: user namespace
refused("syscall", 435, None, 0)  # clone3
refused("syscall", 425, 1, None)  # io_uring_setup
refused("syscall", 321, 0, None, 0)  # bpf
refused("setns", 0, 0)
refused("setuid", 0)
refused("setgid", 0)
refused("personality", 0x0400000)
for limit in (0, 6, 7, 9):  # CPU, processes, open files, address space
  import resource
  try:
    resource.setrlimit(limit, (1 << 40, 1 << 40))
    print("LEAK", limit)
  except (OSError, ValueError):
    pass
print("done")
"""


def test_system_calls_that_reach_further(attack):
  if os.uname().machine != "x86_64":
    # Some calls have no name in libc, and these numbers only there.
    pytest.skip("numbers of system calls are those of x86_64")
  result = attack(SYSCALLS)
  assert result.stdout == b"done\n", result


def test_setuid_programs_give_nothing(attack):
  script = """
import os, subprocess
for command in (["su", "-c", "id -u"], ["mount", "-t", "tmpfs", "x", "."]):
  ran = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
  if ran.returncode == 0: print("LEAK", command)
print("done")
"""
  assert attack(script).stdout == b"done\n"


def test_one_run_sees_nothing_of_another(attack):
  attack("open('left', 'w').write('x')\nimport os\nos.chmod('.', 0o777)")
  script = """
import os, glob
if os.listdir("."): print("LEAK here")
try:
  others = [p for p in os.listdir("/tmp") if p.startswith("box-")]
except OSError:
  others = []
for other in others:
  try:
    os.listdir(f"/tmp/{other}"); os.getcwd().endswith(other) or print("LEAK")
  except OSError:
    pass
if glob.glob("/dev/shm/*"): print("LEAK shm")
"""
  attack(script)


# Hidden tests that stay on this side: the code answers, the host compares.
HIDDEN = [(2, 4), (3, 9), (10, 100)]


def grade(attack, solution: str) -> float:
  """Returns the share of right answers, as the host finds them."""
  script = """
import json, os, runpy
questions = json.load(open("questions.json"))
solve = runpy.run_path("solution.py")["solve"]
answers = [solve(question) for question in questions]
os.write(int(os.environ["RESULT_FD"]), json.dumps(answers).encode())
"""
  questions = json.dumps([question for question, _ in HIDDEN])
  files = {"questions.json": questions, "solution.py": solution}
  result = attack(script, files=files)
  try:
    answers = json.loads(result.results)
  except ValueError:
    return 0.0
  if not isinstance(answers, list) or len(answers) != len(HIDDEN):
    return 0.0
  pairs = zip(answers, HIDDEN, strict=True)
  return sum(answer == right for answer, (_, right) in pairs) / len(HIDDEN)


@pytest.mark.parametrize(
  "forged",
  [
    "print('PASSED'); print('3 passed in 0.01s'); import os; os._exit(0)",
    "import os; os.write(int(os.environ['RESULT_FD']), b'PASSED'); os._exit(0)",
    "import os; os.write(int(os.environ['RESULT_FD']), b'true'); os._exit(0)",
    "class Any(int):\n  def __eq__(self, other): return True\n"
    "def solve(q): return Any(0)",
    "open('questions.json', 'w').write('[]')\ndef solve(q): return None",
    "import json; json.dumps = lambda a: '[]'\ndef solve(q): return q",
  ],
)
def test_forged_results_earn_nothing(attack, forged):
  assert grade(attack, forged) == 0.0


def test_a_right_solution_earns_all(attack):
  assert grade(attack, "def solve(q): return q * q") == 1.0


class WithoutPython:
  """A backend that mounts the system's programs only."""

  def __init__(self, backend):
    self._backend = backend
    self.has_unix_sockets = backend.has_unix_sockets

  def start(self, argv, *, readable, **options):
    return self._backend.start(argv, readable=[], **options)


def test_a_user_namespace_bounds_the_same():
  """What users who are not root get; from here, with a user id of its own.

  The Python of these tests may lie where only root reads, so a shell attacks.
  """
  found = probing.find_bubblewrap(user_namespace=os.geteuid() != 0)
  backend = found.__class__(program=found.program, user_namespace=True)
  box = sandbox.Sandbox(WithoutPython(backend))
  script = """
for path in / /etc /usr /dev; do
  if mkdir $path/attack 2> /dev/null; then echo LEAK $path; fi
done
if unshare --user --map-root-user true 2> /dev/null; then echo LEAK user; fi
if su -c id 2> /dev/null < /dev/null; then echo LEAK su; fi
if grep -v '^ *lo:' /proc/net/dev | grep ':'; then echo LEAK network; fi
head -c 30000000 /dev/zero > /dev/shm/f 2> /dev/null && echo LEAK shm
head -c 30000000 /dev/zero > full 2> /dev/null && echo LEAK disk
rm -f full /dev/shm/f
[ "$(ls /proc | grep -c '^[0-9]')" -lt 8 ] || echo LEAK processes
echo done
i=0; while [ $i -lt 60 ]; do sleep 30.25 & i=$((i+1)); done; echo LEAK fork
"""
  result = box.run(["/bin/sh", "-c", script], limits=attacks.LIMITS)
  assert result.stdout == b"done\n", result
  assert b"fork" in result.stderr and result.reason == "exit"
  assert not attacks.processes_with("30.25")


def test_what_an_owner_could_do_outside():
  """Without a user id of its own the filter has to refuse what Landlock lets.

  The filter alone, on a process of this user: it is the same for any user.
  """
  script = """
import ctypes, os, resource, sys
from dsv32_jax.agents.sandbox import confine, seccomp
path, parent = sys.argv[1], os.getppid()
rules = seccomp.program(unix_sockets=False, own_user=False)
confine.prctl("", 38, 1)
program = confine._Program(len(rules) // 8, rules)
confine.prctl("", 22, 2, ctypes.addressof(program))
reader = os.open(path, os.O_RDONLY)
for action in (
  lambda: os.chmod(path, 0),
  lambda: os.fchmod(reader, 0),
  lambda: os.chown(path, 1, 1),
  lambda: os.fchown(reader, 1, 1),
  lambda: os.utime(path, (0, 0)),
  lambda: os.setxattr(path, "user.a", b"b"),
  lambda: resource.prlimit(parent, resource.RLIMIT_NOFILE, (50, 50)),
  lambda: os.setpriority(os.PRIO_PROCESS, parent, 19),
  lambda: os.sched_setaffinity(parent, {0}),
):
  try:
    action()
    print("LEAK")
  except PermissionError:
    print("refused")
"""
  with tempfile.NamedTemporaryFile() as file:
    before = os.stat(file.name)
    ran = subprocess.run(
      [sys.executable, "-c", script, file.name],
      cwd=pathlib.Path(__file__).parents[2],
      capture_output=True,
      check=True,
    )
    after = os.stat(file.name)
  assert ran.stdout == b"refused\n" * 9, ran
  assert (before.st_mode, before.st_mtime) == (after.st_mode, after.st_mtime)
