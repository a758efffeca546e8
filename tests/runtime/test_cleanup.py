"""kill -9 of a driver ends what it had started, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

DRIVER = """
import subprocess, sys, time
from rayrlhf.runtime.cleanup import start_watchdog
watchdog = start_watchdog()
# Like Ray's agents: a separate session, so that no signal of the driver's reaches it.
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, watchdog.pid, flush=True)
time.sleep(600)
"""


def wait_until_gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.2)
    return False


def test_a_killed_driver_leaves_nothing() -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        child, watchdog = map(int, driver.stdout.readline().split())
        time.sleep(4.5)  # the watchdog looks every two seconds
        assert psutil.pid_exists(child)
        driver.kill()
        driver.wait()
        assert wait_until_gone(child, 20), "the driver's child must be ended"
        assert wait_until_gone(watchdog, 5), "and the watchdog with it"
        assert bystander.poll() is None, "an unrelated process must survive"
    finally:
        driver.kill()
        bystander.kill()
        bystander.wait()
