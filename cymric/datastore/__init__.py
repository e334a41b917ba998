"""Where values live: the datastore port, its etcd and memory adapters, and the syncer.

gRPC must be told before it is first imported not to meddle with forks: with its fork support on, a
process that forks while a channel is open can hang. So that is said here, above every adapter.
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
