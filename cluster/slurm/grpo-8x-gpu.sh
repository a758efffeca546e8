#!/usr/bin/env bash
#SBATCH --job-name=llama3-8b-grpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --gres=gpu:8
#SBATCH --time=2-00:00:00
#SBATCH --output=llama3-8b-grpo-%j.log
#SBATCH --requeue
# Rendered from jobs/configs/grpo-8x-gpu.yaml by `rayrlhf render`; change that, then render again.
# 8 slots on 1 node of 8 GPUs.
# sbatch this file in the root of the repository, on a file system that all nodes share.
set -euo pipefail
absolute() { if [ -e "$1" ]; then realpath -- "$1"; else printf %s "$1"; fi; }

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}')
export RAY_ADDRESS=$address:6379

# One token for this cluster, unreadable for other users.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$PWD/.ray-token-$SLURM_JOB_ID
(umask 077 && head -c 32 /dev/urandom | base64 | tr -dc 'a-zA-Z0-9' > "$RAY_AUTH_TOKEN_PATH")

steps=()
clean_up() {
  for step in "${steps[@]}"; do kill "$step" 2> /dev/null || true; done
  rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap clean_up EXIT
trap 'exit 143' TERM

# srun does not take the CPUs per task from sbatch: without them a step may be bound to one core.
whole_node=(--nodes=1 --ntasks=1 --overlap --cpus-per-task="${SLURM_CPUS_PER_TASK:-96}")
# The ports of workers begin above those of Ray's services.
common=(--num-cpus=96 --num-gpus=8 --min-worker-port=20000 --max-worker-port=29999 --block)
srun "${whole_node[@]}" -w "$head" \
  ray start --head --node-ip-address="$address" --port=6379 --dashboard-port=6380 "${common[@]}" &
steps+=($!)
for node in "${nodes[@]:1}"; do
  srun "${whole_node[@]}" -w "$node" ray start --address="$RAY_ADDRESS" "${common[@]}" &
  steps+=($!)
done

python -m rayrlhf.commands.render.wait_for_nodes 1

srun "${whole_node[@]}" -w "$head" \
  python jobs/ppo.py jobs/configs/grpo-8x-gpu.yaml \
  "model.path=$(absolute OpenRLHF/Llama-3-8b-sft-mixture)" \
  "data.train=parquet@$(absolute data/math/train)" \
  "data.eval=parquet@$(absolute data/math/test)" \
  "run.dir=$PWD/runs"
