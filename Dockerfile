# syntax=docker/dockerfile:1
# An image that starts like TGI's: docker run -p 8080:80 -v $PWD/data:/data IMAGE --model-id ORG/MODEL
#   docker build -t tgi-asgi .                                  # for CPUs
#   docker build -t tgi-asgi:cuda --build-arg DEVICE=cuda .     # for NVIDIA GPUs
#   … --build-arg BASE=registry.example/debian:12               # another Debian or Ubuntu with Python 3.11 to 3.14
# … --build-arg WHEELS=wheels                                 # a folder here with wheels, such as torch for CPUs
# The steps are scripts, so that a test can run them without a container engine; `make test-image` builds the whole image
# with buildah.
ARG DEVICE=cpu
ARG BASE=debian:12-slim
ARG CUDA_BASE=nvidia/cuda:13.0.2
ARG CUDA_SYSTEM=ubuntu24.04

# Both stages of a device use the same system, so Python has the same path: the environment is copied between them.
FROM ${BASE} AS build-cpu
FROM ${CUDA_BASE}-devel-${CUDA_SYSTEM} AS build-cuda
FROM ${BASE} AS run-cpu
FROM ${CUDA_BASE}-base-${CUDA_SYSTEM} AS run-cuda

# hadolint ignore=DL3006  # a stage of this file, not an image
FROM build-${DEVICE} AS build
ARG DEVICE
# Index of PyTorch's CPU builds; use --build-arg TORCH_INDEX= if pip's configuration or WHEELS provides them.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG WHEELS=docker/wheels
WORKDIR /src
COPY docker/packages.sh docker/
RUN docker/packages.sh build
# The dependencies are a separate layer, which a change of the sources does not rebuild.
COPY docker/environment.sh docker/
COPY Makefile requirements.txt constraints.txt ./
COPY ${WHEELS} /wheels/
RUN docker/environment.sh "$DEVICE" /opt/tgi-asgi /wheels
COPY . .
RUN docker/install.sh "$DEVICE" /opt/tgi-asgi

# hadolint ignore=DL3006  # a stage of this file, too
FROM run-${DEVICE}
RUN --mount=type=bind,source=docker,target=/docker /docker/packages.sh run && install -d -m 1777 /data
COPY --from=build /opt/tgi-asgi /opt/tgi-asgi
COPY docker/healthcheck.py /opt/tgi-asgi/
# The server writes only to /data, so that the image runs as any user and from a read-only file system.
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
# The exec form passes signals to the server, which drains on SIGTERM. SageMaker adds the argument `serve`.
ENTRYPOINT ["tgi-asgi"]
