#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build in place, test, look for races, time, and measure the crossovers.
#
#     bash benchmarks/gpu.sh OUT [build test memcheck racecheck tune layers small step]
#
# Results go to the folder OUT, a file a stage, so that a run that is cut short leaves what it had. Without names of
# stages all run, in this order.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash benchmarks/gpu.sh OUT [stage ...]}
stages=${*:2}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
[ -e sparse_moon/kernels ] || ln -s ../kernels sparse_moon/kernels # what an installation calls sparse_moon.kernels

run() { # name, command ...
    local name=$1
    shift
    if [ -n "$stages" ] && [[ " $stages " != *" $name "* ]]; then return; fi
    echo "== $name: $*"
    local begin=$SECONDS
    "$@" >"$out/$name.log" 2>&1
    echo "== $name: exit code $? after $((SECONDS - begin)) s"
    tail -n "${TAIL:-15}" "$out/$name.log"
}

bench() { # results file, sections and options ...
    "$python" benchmarks/flops_and_time.py "${@:2}" --device cuda --quick --json "$out/$1.json"
}

test_on_gpu() {
    local parallel=()
    "$python" -c "import xdist" 2>/dev/null && parallel=(-n 8 --dist worksteal) # most of the time Triton compiles
    "$python" -m pytest -m gpu -q --import-mode=importlib -p no:benchmark "${parallel[@]}" "$@"
}

sanitize() { # a tool; on tests that are quick without it
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 \
        "$python" -m pytest -m gpu -q --import-mode=importlib -p no:benchmark \
        -k "test_cuda and (uneven or hard or strided or other_memory or not_aligned or other_layouts)"
}

layers() {
    bench cuda_layers_bf16 layers --graph --backend kernel --dtype bfloat16 --sparsity 0.9 0.95 \
        --pattern block32 block64 block128 vector16
    bench cuda_layers_fp32 layers --graph --backend kernel --sparsity 0.9 0.95 0.99
    bench cuda_layers_csr layers --backend kernel --case linear --sparsity 0.9 0.95 0.99
    bench cuda_layers_bsr layers --backend kernel --case linear --dtype bfloat16 --sparsity 0.8 0.9 0.95 \
        --pattern block64 block128
}

run build "$python" setup.py -q build_ext --inplace --build-temp build/gpu
run test test_on_gpu
run memcheck sanitize memcheck
run racecheck sanitize racecheck
run tune "$python" benchmarks/tune.py --device cuda
run layers layers
run small bench cuda_small update loss average --graph --sparsity 0.9
run step bench cuda_step step --graph --backend kernel --dtype bfloat16 --case resnet18 --sparsity 0.9 0.95 \
    --pattern block32
