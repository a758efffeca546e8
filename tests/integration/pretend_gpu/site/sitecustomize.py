"""Run by every Python process that has this folder on its path."""

import os

if os.environ.get("RAYRLHF_PRETEND_GPU"):
    from tests.integration.pretend_gpu.install import install

    install()
