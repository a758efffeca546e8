"""Jobs that start Serve on one cluster in the same moment."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.integration.fake_cluster import fake_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_JOBS = 4
# Each looks for Serve's controller before any has made one: none finds it, all try to create it.
JOB = """
import sys, time
import ray
from ray.serve._private import api
from rayrlhf.runtime.ray_session import start_serve

ray.init(namespace="serve-start", log_to_driver=False)
look, looked = api._get_global_client, []

def look_and_wait(*args, **kwargs):
    if looked:
        return look(*args, **kwargs)
    looked.append(True)
    try:
        return look(*args, **kwargs)
    finally:
        print("looked", flush=True)
        sys.stdin.readline()

api._get_global_client = look_and_wait
start_serve(proxy_location="Disabled")
print(len(ray.get(look()._controller.list_deployments_internal.remote())), "deployments")
"""


@pytest.mark.long
def test_jobs_that_all_find_no_serve_share_the_one_that_comes_up() -> None:
    with fake_cluster(nodes=1, cpus=2, gpus=0) as cluster:
        jobs = [
            subprocess.Popen(
                [sys.executable, "-c", JOB],
                env=cluster.environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(NUM_JOBS)
        ]
        try:
            for job in jobs:
                assert job.stdout is not None and job.stdin is not None
                assert job.stdout.readline() == "looked\n"
            for job in jobs:
                assert job.stdin is not None
                job.stdin.write("\n")
                job.stdin.flush()
            for job in jobs:
                output, problems = job.communicate(timeout=120)
                assert job.returncode == 0, problems
                assert output == "0 deployments\n"
        finally:
            for job in jobs:
                job.kill()
                job.wait()
