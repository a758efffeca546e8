# Image for nodes with NVIDIA GPUs: docker build -f cluster/docker/cuda.Dockerfile -t rayrlhf:latest .
# In the root of the repository. `make check` lints it; no test builds it.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# nvcc (of the devel image) and gcc compile kernels of DeepSpeed, vLLM and Triton at run time; Python is 3.12 here.
# wget is what KubeRay's probes call; ibverbs is for RDMA.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential ibverbs-providers libibverbs1 libnuma1 make \
        python3 python3-dev python3-venv wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 ray

WORKDIR /rayrlhf
RUN chown ray:ray /rayrlhf
USER 10001

# The environment, which changes less often than the code.
COPY --chown=ray:ray requirements requirements
COPY --chown=ray:ray pyproject.toml Makefile README.md LICENSE ./
COPY --chown=ray:ray rayrlhf rayrlhf
RUN make install LOCK=gpu && rm -rf ~/.cache

COPY --chown=ray:ray jobs jobs
COPY --chown=ray:ray cluster cluster
ENV PATH=/rayrlhf/.venv/bin:$PATH PYTHONUNBUFFERED=1
CMD ["rayrlhf", "doctor"]
