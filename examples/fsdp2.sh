#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# examples/fsdp2.sh PROCESSES [--setting value ...]: examples/fsdp2.yaml on that many GPUs of this machine.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
modes=$(python -c 'import importlib.resources as r; print(r.files("fastgrpo") / "accelerate_configs")')
exec accelerate launch --config_file "$modes/fsdp2.yaml" --num_processes "${1:-2}" --no_python \
    fastgrpo train --config "$here/fsdp2.yaml" "${@:2}"
