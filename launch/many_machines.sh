#!/bin/sh
# Train on many machines: the same command on each of them, in any order, and again on one that
# comes back. The run goes on with MIN to MAX machines.
#
#   launch/many_machines.sh HOST:PORT MIN:MAX WORKERS NAME [flags of trm_dist train]
#
# HOST is one of the machines; the others meet there, so the run pauses when that one is lost. The
# checkpoint directory must be one that all of them see, such as s3://BUCKET/RUN.
#
# IS_HOST=1 or 0 says whether this machine is HOST, where its name does not tell.
set -eu
if [ $# -lt 4 ]; then
    echo "usage: $0 HOST:PORT MIN:MAX WORKERS NAME [flags of trm_dist train]" >&2
    exit 2
fi
endpoint=$1 nodes=$2 workers=$3 name=$4
shift 4

# Without it the workers look for each other through the agents' store, whose address torch keeps
# although its owner has gone: after the loss of a machine they would not find each other again.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# A machine that is silent for 3 x 1 s is lost. Two tries would be too few: a busy machine has been
# taken for lost and both halves went on. Latecomers are waited for 1 s instead of 30.
rendezvous=last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3
rendezvous=$rendezvous,join_timeout=600${IS_HOST:+,is_host=$IS_HOST}

# Each loss of a machine costs the others one restart; it is not a sign of a fault.
exec torchrun --nnodes="$nodes" --nproc-per-node="$workers" \
    --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$name" --rdzv-conf="$rendezvous" \
    --max-restarts=1000 -m trm_dist train "$@"
