# Image for nodes without GPUs: docker build -f cluster/docker/cpu.Dockerfile -t rayrlhf:cpu .
# In the root of the repository. `make check` lints it; a test builds the CPU image where Docker is.
FROM python:3.12-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# gcc compiles DeepSpeed's CPU Adam and torch's kernels at run time; wget is what KubeRay's probes call.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential libnuma1 make wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 ray

WORKDIR /rayrlhf
RUN chown ray:ray /rayrlhf
USER 10001

# The environment, which changes less often than the code.
COPY --chown=ray:ray requirements requirements
COPY --chown=ray:ray pyproject.toml Makefile README.md LICENSE ./
COPY --chown=ray:ray rayrlhf rayrlhf
RUN make install LOCK=cpu && rm -rf ~/.cache

COPY --chown=ray:ray jobs jobs
COPY --chown=ray:ray cluster cluster
ENV PATH=/rayrlhf/.venv/bin:$PATH PYTHONUNBUFFERED=1
CMD ["rayrlhf", "doctor"]
