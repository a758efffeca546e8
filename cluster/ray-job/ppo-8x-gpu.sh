#!/usr/bin/env bash
# Rendered from jobs/configs/ppo-8x-gpu.yaml by `rayrlhf render`; change that, then render again.
# 8 slots on 1 node of 8 GPUs.
# RAY_API_SERVER_ADDRESS is the dashboard's, http://head:8265; SHARED a folder of all nodes.
# Run it in the root of the repository.
# If Ray requires a token: RAY_AUTH_MODE=token, and the token in ~/.ray/auth_token, mode 600.
set -euo pipefail
: "${RAY_API_SERVER_ADDRESS:?the address of the dashboard, http://head:8265}"
: "${SHARED:?a folder that every node can read and write}"
absolute() { if [ -e "$1" ]; then realpath -- "$1"; else printf %s "$1"; fi; }
exec ray job submit --address "$RAY_API_SERVER_ADDRESS" \
  --working-dir . --entrypoint-num-cpus 1 \
  --runtime-env-json '{"excludes": ["/.venv/", "/.git/", "/runs/", "/models/", "wandb/"]}' -- \
  python jobs/ppo.py jobs/configs/ppo-8x-gpu.yaml \
  "model.path=$(absolute OpenRLHF/Llama-3-8b-sft-mixture)" \
  "critic.path=$(absolute OpenRLHF/Llama-3-8b-rm-mixture)" \
  "data.train=parquet@$(absolute data/prompts/train)" \
  "data.eval=parquet@$(absolute data/prompts/test)" \
  "reward.sources.0.path=$(absolute OpenRLHF/Llama-3-8b-rm-mixture)" \
  "run.dir=$SHARED/runs"
