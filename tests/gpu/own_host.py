"""`python -m trm_dist`, for a worker whose NCCL takes it for alone on its machine.

NCCL refuses two workers of one machine on one GPU. With the name of a machine for each worker they
speak to each other over sockets, as workers on several machines do.
"""

import os
import sys

from trm_dist.cli import main

os.environ |= {
    "NCCL_HOSTID": f"machine-{os.environ['RANK']}",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
}
sys.exit(main(sys.argv[1:]))
