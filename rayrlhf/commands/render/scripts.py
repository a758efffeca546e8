"""Shell scripts that run a job on a local cluster, on a running cluster, or on one in a Slurm allocation."""

from __future__ import annotations

import json
import math
import shlex

from rayrlhf.commands.render.rendering import EXCLUDED, Rendering, commented, paths_of
from rayrlhf.config.job_kinds import script_of
from rayrlhf.placement.plan import DATA_CPUS
from rayrlhf.storage.urls import is_url

START = "#!/usr/bin/env bash\n"
# An existing path becomes absolute; a hub id, and a path of other machines, are unchanged.
ABSOLUTE = 'absolute() { if [ -e "$1" ]; then realpath -- "$1"; else printf %s "$1"; fi; }\n'


def render_local(job: Rendering) -> str:
    """Starts a local Ray head, submits the job to it, follows it, and stops the head."""
    cpus = math.ceil(job.nodes.num_slots * job.config.placement.cpus_per_slot + DATA_CPUS) + 1
    gpus = job.nodes.num_slots if job.nodes.gpus else 0
    note = "Run it in the root of the repository, after `make install`."
    lines = [
        START,
        commented([*job.header("this machine"), note]),
        "set -euo pipefail\n",
        _required(job),
        ABSOLUTE,
        f"exec .venv/bin/python -m cluster.local.submit --num-cpus {cpus} --num-gpus {gpus} -- \\\n",
        _command(job, "$PWD"),
    ]
    return "".join(lines)


def render_ray_job(job: Rendering) -> str:
    """Submits to a running cluster."""
    runtime = {"excludes": list(EXCLUDED), **({"env_vars": job.env} if job.env else {})}
    notes = [
        "RAY_API_SERVER_ADDRESS is the dashboard's, http://head:8265; SHARED a folder of all nodes.",
        "Run it in the root of the repository.",
        "If Ray requires a token: RAY_AUTH_MODE=token, and the token in ~/.ray/auth_token, mode 600.",
    ]
    if job.secrets:
        names = ", ".join(job.secrets)
        notes.append(f"The nodes must have {names} already: Ray shows a job's environment to everyone.")
    return "".join(
        [
            START,
            commented([*job.header(), *notes]),
            "set -euo pipefail\n",
            ': "${RAY_API_SERVER_ADDRESS:?the address of the dashboard, http://head:8265}"\n',
            ': "${SHARED:?a folder that every node can read and write}"\n',
            ABSOLUTE,
            'exec ray job submit --address "$RAY_API_SERVER_ADDRESS" \\\n',
            "  --working-dir . --entrypoint-num-cpus 1 \\\n",
            f"  --runtime-env-json {shlex.quote(json.dumps(runtime))} -- \\\n",
            _command(job, "$SHARED"),
        ]
    )


def _required(job: Rendering) -> str:
    """Lines that end a script at once if a secret is not in its environment, which its job inherits."""
    return "".join(
        f': "${{{variable}:?set it to the value of {name}; it is written nowhere}}"\n'
        for variable, (name, _) in job.secrets.items()
    )


def _command(job: Rendering, root: str) -> str:
    """The job's command with absolute paths, one argument per line; a relative run.dir is below `root`."""
    words = ["python", script_of(job.config), *job.argv]
    given = [shlex.join(words)]
    for key, path in paths_of(job.argv).items():
        kind, at, bare = path.partition("@")
        if at and "/" not in kind:  # a type of data; else it is an id's revision
            given.append(f'"{key}={kind}@$(absolute {shlex.quote(bare)})"')
        else:
            given.append(f'"{key}=$(absolute {shlex.quote(path)})"')
    run = getattr(job.config, "run", None)
    if run is not None and not run.dir.startswith("/") and not is_url(run.dir):
        given.append(f'"run.dir={root}/{run.dir}"')
    return "  " + " \\\n  ".join(given) + "\n"


def render_slurm(job: Rendering) -> str:
    """One task per node: a head with a driver, then workers; the job starts when all have joined."""
    slurm = job.config.launch.slurm
    directives = {
        "job-name": job.name,
        "nodes": job.nodes.count,
        "ntasks-per-node": 1,
        "cpus-per-task": job.nodes.cpus,
        "mem": 0,  # all of the node's
        "gres": f"gpu:{job.nodes.gpus}" if job.nodes.gpus else None,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "output": f"{job.name}-%j.log",
        # The whole job ends when a node is lost, and is requeued: it resumes from its newest checkpoint.
        "requeue": True,
    }
    sbatch = "".join(
        f"#SBATCH --{key}" + ("\n" if value is True else f"={value}\n")
        for key, value in directives.items()
        if value is not None
    )
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in job.env.items())
    notes = ["sbatch this file in the root of the repository, on a file system that all nodes share."]
    return "".join(
        [
            START,
            sbatch,
            commented([*job.header(), *notes]),
            "set -euo pipefail\n",
            exports,
            _required(job),
            *(f"{line}\n" for line in slurm.setup),
            ABSOLUTE,
            _SLURM_BODY.format(
                port=slurm.port,
                # Ports of Ray's own services, next to the head's: fixed, so that none is taken by chance.
                services=slurm.port + 1,
                num_nodes=job.nodes.count,
                cpus=job.nodes.cpus,
                gpus=job.nodes.gpus,
                command=_command(job, "$PWD"),
            ),
        ]
    )


_SLURM_BODY = """
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${{nodes[0]}}
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{{print $1}}')
export RAY_ADDRESS=$address:{port}

# One token for this cluster, unreadable for other users.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$PWD/.ray-token-$SLURM_JOB_ID
(umask 077 && head -c 32 /dev/urandom | base64 | tr -dc 'a-zA-Z0-9' > "$RAY_AUTH_TOKEN_PATH")

steps=()
clean_up() {{
  for step in "${{steps[@]}}"; do kill "$step" 2> /dev/null || true; done
  rm -f "$RAY_AUTH_TOKEN_PATH"
}}
trap clean_up EXIT
trap 'exit 143' TERM

# srun does not take the CPUs per task from sbatch: without them a step may be bound to one core.
whole_node=(--nodes=1 --ntasks=1 --overlap --cpus-per-task="${{SLURM_CPUS_PER_TASK:-{cpus}}}")
# The ports of workers begin above those of Ray's services.
common=(--num-cpus={cpus} --num-gpus={gpus} --min-worker-port=20000 --max-worker-port=29999 --block)
srun "${{whole_node[@]}}" -w "$head" \\
  ray start --head --node-ip-address="$address" --port={port} --dashboard-port={services} "${{common[@]}}" &
steps+=($!)
for node in "${{nodes[@]:1}}"; do
  srun "${{whole_node[@]}}" -w "$node" ray start --address="$RAY_ADDRESS" "${{common[@]}}" &
  steps+=($!)
done

python -m rayrlhf.commands.render.wait_for_nodes {num_nodes}

srun "${{whole_node[@]}}" -w "$head" \\
{command}"""
