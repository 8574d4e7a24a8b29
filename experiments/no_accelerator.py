"""Importing this first lets a program compile for TPUs on a machine with none.

libtpu reads these when it is loaded: run JAX itself on the CPU, ask no
metadata server, and let several compilations load the library at once.
"""

import os

_SETTINGS = {
  "JAX_PLATFORMS": "cpu",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
}
for _name, _value in _SETTINGS.items():
  os.environ.setdefault(_name, _value)
