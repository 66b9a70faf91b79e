# syntax=docker/dockerfile:1

# Targets: producer (small, no model libraries), coordinator, gateway, worker-cpu, worker-cuda.
#   docker build --target worker-cuda -t embedstream/worker-cuda .
# Each has one layer of dependencies, which changes with pyproject.toml and constraints.txt, and a small one of code.

ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS requirements
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/embedstream
ENV PATH=/opt/embedstream/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt deploy/requirements.py ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python requirements.py > wanted.txt && pip install -c constraints.txt -r wanted.txt

FROM requirements AS requirements-coordinator
RUN --mount=type=cache,target=/root/.cache/pip \
    python requirements.py coordinator > wanted.txt && pip install -c constraints.txt -r wanted.txt

FROM requirements AS requirements-gateway
RUN --mount=type=cache,target=/root/.cache/pip \
    python requirements.py gateway otel > wanted.txt && pip install -c constraints.txt -r wanted.txt

# The package index has torch with all it needs for NVIDIA devices. Another index, as of wheels for CPUs alone (a tenth of
# the size), is named by --build-arg TORCH_INDEX_URL=...; everything but torch comes from the package index.
FROM requirements AS requirements-torch
ARG TORCH_INDEX_URL=""
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps -c constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch

FROM requirements-torch AS requirements-worker-cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    python requirements.py worker cpu otel > wanted.txt && pip install -c constraints.txt -r wanted.txt

FROM requirements-torch AS requirements-worker-cuda
RUN --mount=type=cache,target=/root/.cache/pip \
    python requirements.py worker otel > wanted.txt && pip install -c constraints.txt -r wanted.txt

# Installed beside the environment, and copied into it below.
FROM requirements AS code
COPY README.md LICENSE ./
COPY embedstream embedstream
COPY producer producer
COPY worker worker
COPY coordinator coordinator
COPY gateway gateway
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps --prefix /code .

FROM python:${PYTHON} AS runtime
# The home of caches is /models: of downloaded models, and of what engines make of them. Its group may write there, as
# containers often run as the one who owns /data: give such a user group 1000, too.
RUN useradd --uid 1000 --no-create-home --home-dir /models embedstream \
    && install -d -o embedstream -g embedstream -m 2775 /models \
    && install -d -o embedstream -g embedstream /data
ENV PATH=/opt/embedstream/bin:$PATH \
    HOME=/models \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
VOLUME ["/data"]
WORKDIR /data
USER 1000:1000

FROM runtime AS producer
COPY --from=requirements /opt/embedstream /opt/embedstream
COPY --from=code /code /opt/embedstream
ENTRYPOINT ["embed-submit"]
CMD ["--help"]

FROM runtime AS coordinator
COPY --from=requirements-coordinator /opt/embedstream /opt/embedstream
COPY --from=code /code /opt/embedstream
ENTRYPOINT ["embed-coordinator"]

FROM runtime AS gateway
COPY --from=requirements-gateway /opt/embedstream /opt/embedstream
COPY --from=code /code /opt/embedstream
ENTRYPOINT ["embed-serve"]

FROM runtime AS worker-cpu
VOLUME ["/models"]
COPY --from=requirements-worker-cpu /opt/embedstream /opt/embedstream
COPY --from=code /code /opt/embedstream
HEALTHCHECK --interval=15s --timeout=10s --start-period=10m CMD ["embed-worker", "--check"]
ENTRYPOINT ["embed-worker"]

FROM runtime AS worker-cuda
# For --compile: Triton builds a module in C for each kernel. Python's headers are in the base image already.
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 1000:1000
VOLUME ["/models"]
COPY --from=requirements-worker-cuda /opt/embedstream /opt/embedstream
COPY --from=code /code /opt/embedstream
HEALTHCHECK --interval=15s --timeout=10s --start-period=10m CMD ["embed-worker", "--check"]
ENTRYPOINT ["embed-worker"]
