# syntax=docker/dockerfile:1
# The server as an image that starts as TGI's did: docker run -p 8080:80 -v $PWD/data:/data IMAGE --model-id ORG/MODEL
#   docker build -t tgi-asgi .                                  # for CPUs
#   docker build -t tgi-asgi:cuda --build-arg DEVICE=cuda .     # for NVIDIA GPUs
#   … --build-arg BASE=registry.example/debian:12               # another Debian or Ubuntu with Python 3.11 to 3.13
#   … --build-arg WHEELS=wheels                                 # a folder here with wheels, as of torch for CPUs
# The steps are scripts, so that a test can run them where there is no container engine; `make test-image` builds it
# all with buildah.
ARG DEVICE=cpu
ARG BASE=debian:12-slim
ARG CUDA_BASE=nvidia/cuda:13.0.2
ARG CUDA_SYSTEM=ubuntu24.04

# Both stages of a device have one system, and so its Python at one path: the environment is copied between them.
FROM ${BASE} AS build-cpu
FROM ${CUDA_BASE}-devel-${CUDA_SYSTEM} AS build-cuda
FROM ${BASE} AS run-cpu
FROM ${CUDA_BASE}-base-${CUDA_SYSTEM} AS run-cuda

# hadolint ignore=DL3006  # a stage of this file, not an image
FROM build-${DEVICE} AS build
ARG DEVICE
# Index of PyTorch's CPU builds; --build-arg TORCH_INDEX= where pip's own configuration or WHEELS has them.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG WHEELS=docker/wheels
WORKDIR /src
COPY docker/packages.sh docker/
RUN docker/packages.sh build
# The dependencies are a layer of their own: a change of the sources leaves it alone.
COPY docker/environment.sh docker/
COPY Makefile requirements.txt constraints.txt ./
COPY ${WHEELS} /wheels/
RUN docker/environment.sh "$DEVICE" /opt/tgi-asgi /wheels
COPY . .
RUN docker/install.sh "$DEVICE" /opt/tgi-asgi

# hadolint ignore=DL3006  # likewise
FROM run-${DEVICE}
RUN --mount=type=bind,source=docker,target=/docker /docker/packages.sh run && install -d -m 1777 /data
COPY --from=build /opt/tgi-asgi /opt/tgi-asgi
COPY docker/healthcheck.py /opt/tgi-asgi/
# All that is ever written goes to /data, so that the image runs as any user and from a read-only file system.
ENV PATH=/opt/tgi-asgi/bin:$PATH \
    PORT=80 \
    HOME=/data \
    HF_HOME=/data \
    TGI_ASGI_CACHE=/data/tgi-asgi \
    TMPDIR=/data \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /data
VOLUME /data
EXPOSE 80
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["/opt/tgi-asgi/bin/python", "-I", "/opt/tgi-asgi/healthcheck.py"]
# Signals reach the server itself, which drains on SIGTERM. SageMaker adds the argument `serve`.
ENTRYPOINT ["tgi-asgi"]
