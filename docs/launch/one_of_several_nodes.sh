#!/bin/sh
# The same on several machines, once on each of them, in any order:
#   NODES=2 HEAD=address-of-one-of-them sh docs/launch/one_of_several_nodes.sh CONFIG.yaml [section.key=value ...]
# `out` and all files that the configuration names must be the same for all of them: use a shared folder.
set -eu
# (torchrun would kill after 30 s; a checkpoint of SDXL is 7 GB, and the step under way comes first.)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"
: "${PROCESSES:=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}" "${PORT:=29500}"
exec torchrun --nnodes "$NODES" --nproc-per-node "$PROCESSES" --rdzv-backend c10d --rdzv-id "${RUN:-lookahead}" \
  --rdzv-endpoint "$HEAD:$PORT" -m lcm_lookahead.cli.main train "$@"
