# syntax=docker/dockerfile:1
# PolyDelta on an NVIDIA GPU. From the root of the repository:
#
#   docker build -f docker/cuda.Dockerfile -t polydelta:cuda .
#
# Not on nvidia/cuda: PyTorch's wheels bring all of CUDA that it needs, Triton's its own assembler, and
# the NVIDIA Container Toolkit mounts the host's driver. That base would be a second copy of gigabytes.
#
# Base images are named by tag: add @sha256:... for builds that are the same for ever.

# 3.11, 3.12 or 3.13; the tests run with 3.11.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm AS base

FROM base AS builder
# Empty: PyPI, whose build for Linux is for CUDA 13, which needs a driver of 580 or later. For older
# ones: https://download.pytorch.org/whl/cu126
ARG TORCH_INDEX=""
# s3 and gcs may be added. constraints.txt does not pin what they bring.
ARG EXTRAS="postgres tracing"
WORKDIR /source
COPY pyproject.toml constraints.txt ./
COPY docker/install.sh docker/
RUN --mount=type=cache,target=/root/.cache/pip docker/install.sh dependencies /opt/polydelta
COPY README.md LICENSE ./
COPY server server/
COPY engine engine/
COPY kernels kernels/
COPY adapters_store adapters_store/
RUN docker/install.sh package /opt/polydelta /package

FROM base
# gcc and libc6-dev: Triton compiles the C that launches its kernels, against Python's headers, which
# this base has; the result is kept in the cache volume, as the kernels are. tini: a process with the
# id 1 ignores SIGTERM until it has a handler, and the server has none while the model loads.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 polydelta \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent \
        --shell /usr/sbin/nologin polydelta \
    && install -d -o 10001 -g 10001 /var/lib/polydelta /var/cache/polydelta
COPY docker/healthcheck.py /usr/local/lib/polydelta/
# Two layers: another version of PolyDelta brings only the second one, of 17 MB.
COPY --from=builder /opt/polydelta /opt/polydelta
COPY --from=builder /package /opt/polydelta

# All that is written: uploads and their catalog; compiled kernels, their measured tiles, and models
# from the hub. And /tmp.
ENV PATH=/opt/polydelta/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    POLYDELTA_DEVICE=cuda \
    POLYDELTA_HOST=0.0.0.0 \
    POLYDELTA_PORT=8000 \
    POLYDELTA_STORE=/var/lib/polydelta \
    XDG_CACHE_HOME=/var/cache/polydelta \
    TRITON_CACHE_DIR=/var/cache/polydelta/triton \
    CUDA_CACHE_PATH=/var/cache/polydelta/cuda
# What the NVIDIA Container Toolkit reads: compute is libcuda, utility is nvidia-smi.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME ["/var/lib/polydelta", "/var/cache/polydelta"]
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
EXPOSE 8000
# While the model loads, /health says 503: failures count from the tenth minute, or from the first
# success.
HEALTHCHECK --interval=15s --timeout=5s --retries=3 --start-period=10m \
    CMD ["python", "/usr/local/lib/polydelta/healthcheck.py"]
ENTRYPOINT ["tini", "--", "polydelta"]
CMD ["serve"]

ARG REVISION=unknown
LABEL org.opencontainers.image.title="PolyDelta" \
    org.opencontainers.image.description="Serve one base language model and thousands of fine-tuned variants of it from one process." \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.revision="${REVISION}"
