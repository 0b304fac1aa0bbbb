#!/bin/sh
# All GPUs of one machine:   sh docs/launch/one_node.sh trainer/configs/sdxl_paper.yaml [section.key=value ...]
# PROCESSES=2 for fewer; ACCELERATE_USE_CPU=true to try it without a GPU. Stop it with Ctrl-C, start it again to go on.
# `batch` is over all processes: more of them make a run faster, not other.
set -eu
# (torchrun would kill after 30 s; a checkpoint of SDXL is 7 GB, and the step under way comes first.)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"
: "${PROCESSES:=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
exec torchrun --standalone --nproc-per-node "$PROCESSES" -m lcm_lookahead.cli.main train "$@"
