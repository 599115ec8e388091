# kvcat-nemo on an NGC-style NeMo image, which brings CUDA, torch, Transformer Engine and apex.
#
#   docker build -t kvcat:1 --build-arg REVISION="$(git rev-parse HEAD)" .
#   docker build -t kvcat:cpu --build-arg BASE_IMAGE=… .          any image with Python 3.11 or newer, pip and bash
#
# docs/cluster.md has the rest; `make image-test` builds it on a CPU base made from nothing and trains in the result.
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:25.11
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
USER 0
WORKDIR /opt/kvcat
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1

# What is pinned comes first: this layer is the large one and changes seldom. torch, Transformer Engine, apex and what else
# the base has built for its CUDA stay as they are, and the build fails if pip touched them.
COPY pyproject.toml constraints.txt ./
COPY launch/image/ launch/image/
RUN bash launch/image/install.sh dependencies

COPY . .
# The user has a number, so that Kubernetes can see that it is not root. Any other user works too (Slurm's, in pyxis).
RUN bash launch/image/install.sh project \
 && groupadd --gid 10001 kvcat \
 && useradd --uid 10001 --gid 10001 --create-home --shell /bin/bash kvcat

ENV HOME=/home/kvcat \
    NEMORUN_HOME=/tmp/nemo_run \
    MLFLOW_DISABLE_TELEMETRY=true
USER 10001:10001
WORKDIR /home/kvcat
# As the user who will run it: TE, apex, Megatron and every recipe, or the build fails.
RUN python /opt/kvcat/launch/image/versions.py

HEALTHCHECK --interval=10m --timeout=3m --start-period=5m --retries=2 CMD ["kvcat", "train", "doctor", "--fast"]
CMD ["kvcat", "--help"]

# Last: a new revision changes no layer before it.
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="kvcat-nemo" \
      org.opencontainers.image.description="KV-CAT continued pretraining on NeMo 2 and Megatron-core" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
