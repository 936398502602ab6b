#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The first minutes on a GPU: correctness, then the figures that choose the design, then a table.
#
#   bench/gpu.sh prepare                              where there is a network, before the GPU is there
#   bench/gpu.sh [--device cpu] [--small] [--out FOLDER] [correctness|figures|STAGE ...]
#
# `prepare` downloads the peers' wheels into build/gpu/wheels and builds the compiled parts in place
# (ARCHS, default 90a; GPU_PYTHON, the Python version there, default this one's). Without a stage both
# groups run. A stage has its bound in seconds and never stops the next; its text goes to
# FOLDER/<stage>.txt, the figures with hardware and versions to FOLDER/*.json, and what each goal
# came to is printed at the end (bench/goals.py). Nothing here touches clocks, MIG or the driver.
# Exit status 1 when a stage failed.
set -u
cd "$(dirname "$0")/.." || exit 1
root=$PWD py=${PYTHON:-python3} device=cuda small="" out=""

prepare() {
    mkdir -p build/gpu/wheels
    $py -m pip download -q --no-deps --only-binary=:all: ${GPU_PYTHON:+--python-version $GPU_PYTHON} \
        -c requirements/constraints.txt -d build/gpu/wheels -r requirements/gpu.txt &&
        FASTGRPO_BUILD_CUDA=1 FASTGRPO_CUDA_ARCHS=${ARCHS:-90a} $py setup.py -q build_ext --inplace &&
        PYTHONPATH=.:kernels $py -c "from fastgrpo.cli import main; main([\"doctor\"])" | grep "kernels "
}

# The package is imported from an installation or from a folder of links: the tests and `python
# bench/x.py` keep the checkout's root itself off the path.
find_package() {
    (cd / && $py -c "import fastgrpo, fastgrpo_kernels") 2>/dev/null && return
    local links
    links=$(mktemp -d)
    ln -s "$root/fastgrpo" "$root/kernels/fastgrpo_kernels" "$links"
    if compgen -G "build/gpu/wheels/*.whl" >/dev/null; then
        $py -m pip install -q --no-index --no-deps --no-compile --target "$links" build/gpu/wheels/*.whl
    fi
    export PYTHONPATH=$links${PYTHONPATH:+:$PYTHONPATH}
}

failed=0
stage() {  # stage NAME SECONDS COMMAND...
    local name=$1 limit=$2 from=$SECONDS rc
    shift 2
    [ "$device" = cuda ] || limit=$((4 * limit)) # a dry run shares its processor
    echo "== $name (at most $limit s)"
    timeout -k 5 "$limit" "$@" >"$out/$name.txt" 2>&1
    rc=$?
    tail -n 25 "$out/$name.txt"
    echo "-- $name: exit status $rc after $((SECONDS - from)) s"
    printf '{"stage": "%s", "device": "%s", "status": %d, "seconds": %d}\n' \
        "$name" "$device" "$rc" $((SECONDS - from)) >>"$out/stages.jsonl"
    [ "$rc" = 0 ] || failed=1
}
bench() { stage "$1" "$2" "$py" "bench/bench_$1.py" --device "$device" $small --save --results "$out"; }

correctness="doctor tests sanitize"
figures="roofs linear_grpo attention step whole_step linear_logprob tiles grpo_loss linear_kl group_advantages gather_rows box_iou match_boxes"
run() {
    case $1 in
        correctness) for s in $correctness; do run "$s"; done ;;
        figures) for s in $figures; do run "$s"; done ;;
        doctor) stage doctor 90 "$py" -c "from fastgrpo.cli import main; main()" doctor --json "$out/doctor.json" ;;
        tests) stage tests 400 "$py" -m pytest -q -m gpu $workers -p no:cacheprovider --junitxml="$out/tests.xml" tests ;;
        sanitize)
            if [ "$device" = cuda ]; then
                PYTHON=$py stage sanitize 400 bench/sanitize.sh
            else
                stage sanitize 400 "$py" bench/sanitize.py --device "$device"
            fi ;;
        attention) bench shared_prefix_attention 240 ;;
        tiles)
            if [ "$device" = cuda ]; then
                stage tiles 240 "$py" bench/occupancy.py --measure --save --lines "$out/attention_tiles_sm_90.json"
            else
                stage tiles 60 "$py" bench/occupancy.py --read
            fi ;;
        roofs | gather_rows | group_advantages | grpo_loss) bench "$1" 60 ;;
        linear_grpo | step) bench "$1" 240 ;;
        whole_step) bench "$1" 300 ;;
        linear_logprob | linear_kl | box_iou | match_boxes) bench "$1" 120 ;;
        *) echo "no stage $1; there are $correctness $figures" >&2; exit 2 ;;
    esac
}

[ "${1:-}" != prepare ] || { prepare; exit; }
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        --small) small=--small; shift ;;
        --out) out=$2; shift 2 ;;
        -*) sed -n '2,14s/^# \{0,1\}//p' bench/gpu.sh; exit 2 ;;
        *) break ;;
    esac
done
out=$(mkdir -p "${out:=build/gpu/results}" && cd "$out" && pwd) || exit 1
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
find_package
workers=$($py -c "import xdist" 2>/dev/null && echo "-n 6")
for name in "${@:-correctness figures}"; do
    for part in $name; do run "$part"; done
done
$py bench/goals.py "$out" | tee "$out/goals.md"
exit $failed
