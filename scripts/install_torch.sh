#!/usr/bin/env bash
# Install torch into an environment: the small CPU build where there is no NVIDIA GPU, the default build elsewhere.
# Usage: [TORCH_VERSION=2.13.0|newest] scripts/install_torch.sh PYTHON
set -euo pipefail

TORCH_VERSION="${TORCH_VERSION:-2.13.0}"
CPU_INDEX="${CPU_INDEX:-https://download.pytorch.org/whl/cpu}"

python="$1"
install() { "$python" -m pip install --disable-pip-version-check "$@"; }
try_install() { install --quiet --retries 1 --timeout 20 "$@" 2>/dev/null; }

if "$python" -c "import torch" 2>/dev/null; then
    echo "torch: already in this environment."
elif [ "$(uname -s)" != Linux ]; then
    echo "torch: the default build, which needs no CUDA outside Linux."
    install "torch>=2.8"
elif command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    echo "torch: an NVIDIA GPU is here, so the default build with CUDA."
    install "torch>=2.8"
elif [ "$TORCH_VERSION" = newest ]; then
    echo "torch: the newest CPU build of ${CPU_INDEX}."
    install --index-url "$CPU_INDEX" torch
else
    echo "torch: no NVIDIA GPU here, so the CPU build ${TORCH_VERSION}+cpu (about 200 MB)."
    if try_install "torch==${TORCH_VERSION}+cpu"; then
        exit 0
    fi
    echo "torch: pip's own indexes do not have it; asking ${CPU_INDEX}."
    if try_install --extra-index-url "$CPU_INDEX" "torch==${TORCH_VERSION}+cpu"; then
        exit 0
    fi
    echo "torch: no CPU build ${TORCH_VERSION} for $("$python" --version) to be had; installing the default build."
    echo "torch: that one brings several GB of CUDA libraries; it runs on the CPU all the same."
    install "torch>=2.8"
fi
