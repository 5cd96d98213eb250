# Prefab with vLLM and the training packages, for a CPU or for NVIDIA GPUs.
#
#   docker build -t prefab --build-arg PIP_EXTRA_INDEX_URL=ADDRESS .      # PyTorch's index of CPU builds (README, Set-up)
#   docker run --rm --shm-size=4g -v "$PWD:/data" prefab demo
#
#   docker build -t prefab-cuda --build-arg REQUIREMENTS=requirements-gpu.txt .
#   docker run --rm --gpus all --shm-size=4g -v "$PWD:/data" prefab-cuda demo
#
# vLLM's processes share memory, of which a container has 64 MB unless --shm-size gives it more.
# The packages for GPUs bring CUDA's libraries; the host needs its driver (580 or newer) and the NVIDIA container toolkit.
# The program runs as the user UID (1000), which must be able to write to the folder at /data: --build-arg UID=$(id -u).
FROM python:3.12-slim

# vLLM compiles the models that it serves.
RUN apt-get update && apt-get install -y --no-install-recommends g++ libnuma1 && rm -rf /var/lib/apt/lists/*

ARG REQUIREMENTS=requirements.txt
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /src
COPY requirements.txt requirements-gpu.txt overrides-cpu.txt ./
RUN pip install --no-cache-dir --no-deps -r "${REQUIREMENTS}"
COPY . .
ARG UID=1000
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && useradd --create-home --uid "${UID}" prefab && install -d -o prefab -g prefab /data

USER prefab
ENV VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
WORKDIR /data
ENTRYPOINT ["prefab"]
CMD ["--help"]
