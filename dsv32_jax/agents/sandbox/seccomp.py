"""System calls that sandboxed code is refused."""

import errno
import functools
import os
import tempfile

import pyseccomp

# Namespaces (from linux/sched.h): a new one would bring its owner powers.
_NAMESPACE_FLAGS = (
  0x00000080,  # time
  0x00020000,  # mount
  0x02000000,  # cgroup
  0x04000000,  # uts
  0x08000000,  # ipc
  0x10000000,  # user
  0x20000000,  # pid
  0x40000000,  # net
)
_AF_UNIX = 1
# Reach other processes, the kernel's own machinery, or things that outlive
# the run: shared memory, queues and keys that belong to no process.
_REFUSED = [
  "acct",
  "add_key",
  "bpf",
  "chroot",
  "delete_module",
  "finit_module",
  "fsconfig",
  "fsmount",
  "fsopen",
  "fspick",
  "init_module",
  "io_uring_enter",
  "io_uring_register",
  "io_uring_setup",
  "kcmp",
  "kexec_file_load",
  "kexec_load",
  "keyctl",
  "mount",
  "mount_setattr",
  "move_mount",
  "mq_open",
  "msgget",
  "name_to_handle_at",
  "open_by_handle_at",
  "open_tree",
  "perf_event_open",
  "personality",
  "pidfd_getfd",
  "pivot_root",
  "process_madvise",
  "process_vm_readv",
  "process_vm_writev",
  "ptrace",
  "quotactl",
  "reboot",
  "request_key",
  "semget",
  "setns",
  "shmget",
  "swapoff",
  "swapon",
  "syslog",
  "umount2",
  "unshare",
  "userfaultfd",
]
# What the owner of a file may do to it wherever it lies; Landlock has no say.
_OF_OWNERS = (
  "chmod",
  "chown",
  "fchmod",
  "fchmodat",
  "fchmodat2",
  "fchown",
  "fchownat",
  "fremovexattr",
  "fsetxattr",
  "futimesat",
  "lchown",
  "lremovexattr",
  "lsetxattr",
  "removexattr",
  "setxattr",
  "utime",
  "utimensat",
  "utimes",
)
# setxattrat, removexattrat, file_setattr: the library may not know the names.
_OF_OWNERS_NEW = (463, 466, 469)
# Calls newer than these lists, whose numbers are the same on every machine.
_UNKNOWN = range(470, 512)
# What a user may do to all processes of the user: the argument that names one.
_OF_USERS = {
  "ioprio_set": 1,
  "sched_setaffinity": 0,
  "sched_setattr": 0,
  "sched_setparam": 0,
  "sched_setscheduler": 0,
  "setpriority": 1,
}


@functools.cache
def program(*, unix_sockets: bool, own_user: bool) -> bytes:
  """Returns the filter as BPF instructions.

  Args:
    own_user: whether the user id is the run's alone, or no file and process
      outside can be named. Else the modes, owners and times of files, and the
      priorities of other processes, cannot be set.
    unix_sockets: whether `socket` may make AF_UNIX sockets. Pairs of connected
      ones (`socketpair`) may always be made; no other family ever.
  """
  syscalls = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
  refuse = pyseccomp.ERRNO(errno.EPERM)
  for name in _REFUSED:
    syscalls.add_rule(refuse, name)
  for flag in _NAMESPACE_FLAGS:
    argument = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, flag, flag)
    syscalls.add_rule(refuse, "clone", argument)
  # Its flags lie in memory, where no filter sees them; libraries fall back.
  syscalls.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
  others = pyseccomp.Arg(0, pyseccomp.NE, 0)
  syscalls.add_rule(refuse, "prlimit64", others)
  if not own_user:
    for name in _OF_OWNERS:
      # A library older than a system call does not know its name.
      if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) != -1:
        syscalls.add_rule(refuse, name)
    for number in _OF_OWNERS_NEW:
      syscalls.add_rule(refuse, number)
    for name, position in _OF_USERS.items():
      others = pyseccomp.Arg(position, pyseccomp.NE, 0)
      syscalls.add_rule(refuse, name, others)
  for number in _UNKNOWN:
    syscalls.add_rule(pyseccomp.ERRNO(errno.ENOSYS), number)
  # ZeroMQ takes this as a machine without network, any other as an accident.
  refuse_socket = pyseccomp.ERRNO(errno.EOPNOTSUPP)
  if unix_sockets:
    family = pyseccomp.Arg(0, pyseccomp.NE, _AF_UNIX)
    syscalls.add_rule(refuse_socket, "socket", family)
  else:
    syscalls.add_rule(refuse_socket, "socket")
  # TIOCSTI types into the terminal of whoever started the run.
  tiocsti = pyseccomp.Arg(1, pyseccomp.MASKED_EQ, 0xFFFFFFFF, 0x5412)
  syscalls.add_rule(refuse, "ioctl", tiocsti)
  with tempfile.TemporaryFile() as file:
    syscalls.export_bpf(file)
    file.seek(0)
    return file.read()


def descriptor(*, unix_sockets: bool) -> int:
  """Returns an open file that holds the filter, to be closed by the caller."""
  content = program(unix_sockets=unix_sockets, own_user=True)
  return memory_file("seccomp", content)


def memory_file(name: str, content: bytes) -> int:
  """Returns a descriptor of an unnamed file with this content, at its start."""
  file = os.memfd_create(name)
  view = memoryview(content)
  while view:
    view = view[os.write(file, view) :]
  os.lseek(file, 0, os.SEEK_SET)
  return file
