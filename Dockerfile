# The image that graders run: inference/, its weights and what they need, nothing else (see .dockerignore).
#
#     docker build --target slim -t samcancer .            # ONNX Runtime alone; also what no target gives
#     docker build --target torch -t samcancer:torch .     # with torch, for `--engine torch`
#
# hadolint's rules, where this file departs from what it or a reader may expect:
#   DL3002 (last user is not root): there is no USER line. Graders mount an outputs/ that root owns, mode 0755, so the default
#          user has to be root; any other `--user` works as well, because nothing is written outside outputs/.
#   DL3006, DL3007 (pin the tag): 3.11-slim moves with Python's and Debian's fixes on purpose; what decides the masks, the
#          Python packages, is pinned exactly in the locks, with what they need and with hashes (what DL3013 asks for).
#          `--build-arg BASE=python:3.11-slim@sha256:…` fixes the base as well.
#   SC2086 (quote variables): UNUSED is a list of patterns.
ARG BASE=python:3.11-slim
# Of what packages install goes what nothing here loads: cuDNN's part for recurrent networks and attention (its other parts do not
# refer to it), second copies, headers, what makes models. Of slim also what cuFFT needs for callbacks, of the target torch what its
# compiler, its linear algebra and several machines need.
ARG UNUSED="nvidia/*/include nvidia/cudnn/lib/libcudnn_adv.so.9 nvidia/cuda_nvrtc/lib/*.alt.* nvidia/cublas/lib/libnvblas.so.* \
    nvidia/cufft/lib/libcufftw.so.* onnxruntime/transformers onnxruntime/quantization onnxruntime/tools onnxruntime/datasets"
FROM ${BASE} AS base

LABEL org.opencontainers.image.title="samcancer" \
      org.opencontainers.image.description="Fully automatic cancer segmentation in CT: reads /workspace/inputs, writes /workspace/outputs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"

WORKDIR /workspace

# No run writes outside outputs/: bytecode is compiled below, and a cache of CUDA's compiler would die with the container.
# The NVIDIA_ variables ask the NVIDIA runtime for the devices where `--gpus` is not given, and for NVML besides CUDA.
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    CUDA_CACHE_DISABLE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# CMD, not ENTRYPOINT: graders give their own command, /bin/bash -c "sh predict.sh".
CMD ["/bin/bash", "-c", "sh predict.sh"]


FROM base AS program

COPY weights/ weights/
COPY inference/ inference/
COPY predict.sh ./
# Hashes, not times, tie the bytecode to its source: they survive tools that rewrite file times. Any `--user` can read all of it,
# whatever the umask of the checkout was.
RUN python -m compileall -q --invalidation-mode checked-hash inference \
    && find . \( ! -perm -004 -o -type d ! -perm -005 \) -exec chmod a+rX {} + \
    && mkdir -p inputs outputs


# In both targets the slow layer comes first: it stays as it is while code and weights change. pip compiles what it installs, so
# no start pays for that. The pins decide alone: constraints that the builder's pip may be set up with name files that are not
# there in a build.
FROM base AS slim

ARG UNUSED
COPY requirements.lock ./
RUN chmod a+r requirements.lock \
    && PIP_CONSTRAINT=/dev/null pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
        --require-hashes -r requirements.lock \
    && cd "$(python -c 'import nvidia; print(*nvidia.__path__)')/.." \
    && rm -r $UNUSED nvidia/nvjitlink \
    && find numpy nibabel -type d -name tests -prune -exec rm -r {} +
COPY --from=program /workspace /workspace


FROM base AS torch

ARG UNUSED
COPY requirements-torch.lock ./
RUN chmod a+r requirements-torch.lock \
    && PIP_CONSTRAINT=/dev/null pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
        --require-hashes -r requirements-torch.lock \
    && cd "$(python -c 'import nvidia; print(*nvidia.__path__)')/.." \
    && rm -r $UNUSED triton nvidia/cusolver torch/lib/libtorch_cuda_linalg.so torch/include torch/share \
    && find nvidia/nvshmem/lib -type f ! -name 'libnvshmem_host.so*' -exec rm {} + \
    && find numpy nibabel -type d -name tests -prune -exec rm -r {} +
COPY --from=program /workspace /workspace
# torch's own compiler is not used; should some part of torch import it, it makes the folder for its cache at once, named after a
# user that `--user` may not have; one that exists is left as it is.
ENV TORCHINDUCTOR_CACHE_DIR=/tmp


FROM slim
