# docker build -t labelwise .          (compose.yaml has a box with GPUs, docs/examples several machines)
# mkdir -p runs
# docker run --gpus all --user "$(id -u):$(id -g)" --shm-size 1g --stop-timeout 60 \
#     -v "$PWD/photos:/data:ro" -v "$PWD/runs:/runs" -v labelwise-cache:/cache labelwise pretrain /data
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

ARG DEBIAN_FRONTEND=noninteractive
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PATH=/opt/labelwise/bin:$PATH \
    LABELWISE_CACHE=/cache \
    HF_HOME=/cache/huggingface \
    MPLCONFIGDIR=/cache/matplotlib

# The torch wheel brings its own CUDA libraries; the base image brings only what the driver hooks into.
# Any user may write to /runs and /cache: a volume takes over the rights of the folder that it is put upon.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/labelwise \
    && useradd --create-home --uid 10001 --gid 0 labelwise \
    && mkdir /data /runs /cache \
    && chmod 1777 /runs /cache

WORKDIR /src
COPY requirements.txt ./
RUN pip install --require-hashes --requirement requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY labelwise ./labelwise
COPY recipes ./recipes
RUN pip install --no-deps --no-build-isolation .

USER 10001
WORKDIR /
VOLUME ["/data", "/runs", "/cache"]
# The page of `labelwise annotate --host 0.0.0.0`, for -p 127.0.0.1:8707:8707.
EXPOSE 8707
# Work on a run that has done no step for twenty minutes is stuck.
HEALTHCHECK --interval=5m --timeout=1m --start-period=5m CMD ["labelwise", "status", "/runs", "--max-age", "1200"]
ENTRYPOINT ["labelwise"]
CMD ["--help"]
