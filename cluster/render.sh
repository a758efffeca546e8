#!/usr/bin/env bash
# Renders the examples of this folder again: `make rendered`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-cluster}
render() { "${PYTHON:-.venv/bin/python}" -m rayrlhf.commands.cli render --target "$@"; }
render local jobs/configs/demo.yaml launch.gpus_per_node=0 --out "$out/local/demo.sh"
for name in ppo grpo; do
  render ray-job "jobs/configs/$name-8x-gpu.yaml" --out "$out/ray-job/$name-8x-gpu.sh"
  render kuberay "jobs/configs/$name-8x-gpu.yaml" --out "$out/kuberay/$name-8x-gpu.yaml"
  render anyscale "jobs/configs/$name-8x-gpu.yaml" --out "$out/anyscale/$name-8x-gpu.yaml"
  render slurm "jobs/configs/$name-8x-gpu.yaml" --out "$out/slurm/$name-8x-gpu.sh"
done
render kuberay jobs/configs/ppo-70b-16x-a100-80.yaml --out "$out/kuberay/ppo-70b-16x-a100-80.yaml"
render slurm jobs/configs/ppo-70b-16x-a100-80.yaml --out "$out/slurm/ppo-70b-16x-a100-80.sh"
