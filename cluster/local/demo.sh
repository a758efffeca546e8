#!/usr/bin/env bash
# Rendered from jobs/configs/demo.yaml launch.gpus_per_node=0 by `rayrlhf render`; change that, then render again.
# 1 slot on this machine.
# placement.gpus_per_slot=auto: no GPU per slot, as launch.gpus_per_node=0.
# Run it in the root of the repository, after `make install`.
set -euo pipefail
absolute() { if [ -e "$1" ]; then realpath -- "$1"; else printf %s "$1"; fi; }
exec .venv/bin/python -m cluster.local.submit --num-cpus 3 --num-gpus 0 -- \
  python jobs/ppo.py jobs/configs/demo.yaml launch.gpus_per_node=0 \
  "model.path=$(absolute models/SmolLM2-135M-Instruct)" \
  "data.train=jsonl@$(absolute jobs/demo/data/train.jsonl)" \
  "data.eval=jsonl@$(absolute jobs/demo/data/test.jsonl)" \
  "run.dir=$PWD/runs"
