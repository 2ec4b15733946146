#!/usr/bin/env bash
# Everything that needs a GPU, in two stages of at most six minutes, what is worth most first.
#
#     bash benchmarks/gpu.sh OUT first      # crossovers and whole steps of ViT-B, GPT-2 and ResNet-50, smoke tests
#     bash benchmarks/gpu.sh OUT second     # what the first stage had no time for, and what has not run yet
#     bash benchmarks/gpu.sh OUT steps_vit_base memcheck      # single parts by name
#
# On a machine to which files are copied, without the repository's history, and from which few come back:
#
#     pip install --no-deps --target build/site jsonargparse setuptools    # before, and copy build/site as well
#     SPARSE_MOON_COMMIT=$HASH PACK=FILE.tgz bash benchmarks/gpu.sh build/out first
#     SPARSE_MOON_COMMIT=$HASH PACK=FILE.tgz bash benchmarks/gpu.sh build/out second    # on the same machine
#
# Each part has its most seconds, and no part begins or lasts beyond the stage's end (STAGE_SECONDS, 350). Results go to
# the folder OUT, written after each case, so that a run that is cut short leaves what it had: a JSON file and a log a
# part, log.txt with how each ended, and crossover_cuda_*.json, which the steps of this stage and the next one take from
# sparse_moon/ops/tables. PACK is written after every part: OUT in one file.
#
# build/site holds what the machine lacks of the dependencies, where nothing needs to be compiled. What cannot be
# imported is said before any time is spent. Both compiled extensions can be brought along, built where there is no GPU
# with the same version of Python: `python setup.py build_ext --inplace`. Where they are missing, they are built, for
# this GPU alone, while Triton's kernels and the networks are compiled in parallel, before anything is timed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash benchmarks/gpu.sh OUT first|second|part ...}
parts="${2:?usage: bash benchmarks/gpu.sh OUT first|second|part ...} ${*:3}"
mkdir -p "$out"
out=$(realpath "$out")
export PYTHONPATH=$PWD:$PWD/build/site PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/build/inductor}
python=${PYTHON:-python3}
[ -e sparse_moon/kernels ] || ln -s ../kernels sparse_moon/kernels # what an installation calls sparse_moon.kernels
end=$((SECONDS + ${STAGE_SECONDS:-350}))

targets="vit_base gpt2_1.3b resnet50" # by their value
first="build compile"
for name in $targets; do first+=" compile_$name"; done
for name in $targets; do first+=" crossovers_$name steps_$name"; done
missing= # of the first stage
for name in $targets; do
    if ! grep -qs '"pass": "sparse' "$out/cuda_step_$name.json"; then
        missing+=" compile compile_$name crossovers_$name steps_$name"
    fi
done
if ! grep -qs "^== smoke: exit code 0" "$out/log.txt"; then missing+=" smoke"; fi
case " $parts " in
*" first "*) parts="$first smoke" ;;
*" second "*) parts="build $missing compile_more tests crossovers_resnet18 steps_resnet18 csr bsr small racecheck norms
    layers_bf16 reduce_overhead crossovers_gpt2_350m steps_gpt2_350m crossovers_vit_small steps_vit_small layers_fp32
    memcheck autotune_vit_base autotune_resnet50 autotune_gpt2_1.3b tune" ;;
esac
parts=" $(echo $parts) "

say() { echo "$*" | tee -a "$out/log.txt"; }

pack() {
    local new
    if [ -n "${PACK:-}" ]; then
        new=$(mktemp)
        tar czf "$new" -C "$(dirname "$out")" "$(basename "$out")" # a log may grow meanwhile
        mv "$new" "$PACK"
    fi
}

run() { # name, most seconds, command ...
    local name=$1 most=$2 begin=$SECONDS signal=TERM code
    shift 2
    if [[ $parts != *" $name "* ]]; then return; fi
    if ((most > end - SECONDS)); then most=$((end - SECONDS)); fi
    if ((most < 5)); then
        say "== $name: no time left"
        return
    fi
    if [[ " $* " == *" pytest "* ]]; then signal=INT; fi # which says what has failed by then
    echo "$*" >"$out/$name.log"
    timeout -s $signal -k 10 "$most" "$@" >>"$out/$name.log" 2>&1
    code=$?
    say "== $name: exit code $code after $((SECONDS - begin)) of $most s"
    tail -n "${TAIL:-15}" "$out/$name.log"
    pack
}

steps() { # a network and options ...: its steps
    local name=$1
    shift
    echo "$python" benchmarks/flops_and_time.py step --device cuda --quick --case "$name" --case-seconds 60 "$@"
}

crossovers() { # a network, seconds and patterns ...: the choice for its layers
    run "crossovers_$1" $(($2 + 14)) "$python" benchmarks/tune.py --device cuda --case "$1" --seconds "$2" \
        --pattern "${@:3}"
    if [[ $parts == *" crossovers_$1 "* ]]; then cp sparse_moon/ops/tables/crossover_cuda_*.json "$out"; fi
}

patterns() { # of a network, that of its target first: few layers of ResNet-50 are divided by more than 64
    if [[ $1 == resnet* ]]; then echo block32 block64; else echo block64 block32 block128 vector16; fi
}

parallel=()
"$python" -c "import xdist" 2>/dev/null && parallel=(-n 8 --dist worksteal) # most of the time Triton compiles
pytest=("$python" -m pytest -v --import-mode=importlib -p no:benchmark)
triton=(tests/test_triton_*.py) # of which all run on the GPU, not only what needs one
others=()
for file in tests/test_*.py; do
    if [[ $file != tests/test_triton_* ]] && grep -q "mark.gpu" "$file"; then others+=("$file"); fi
done
sanitize=("${pytest[@]}" -m gpu tests/test_cuda_*.py
    -k "uneven or hard or strided or other_memory or not_aligned or other_layouts")
bench="$python benchmarks/flops_and_time.py --device cuda --quick"

for table in "$out"/crossover_cuda_*.json; do # of an earlier stage
    if [ -e "$table" ]; then cp "$table" sparse_moon/ops/tables; fi
done
if [ -z "${SPARSE_MOON_COMMIT:-}" ] && ! git rev-parse -q HEAD >/dev/null 2>&1; then
    say "gpu.sh: results will name no commit: neither SPARSE_MOON_COMMIT nor the repository's history is here"
fi
check="import sys, torch; sys.path.insert(0, 'benchmarks'); import sparse_moon.ops.native as n
import flops_and_time, compile_kernels, tune, timm, pytest, hypothesis, setuptools
built = bool(n.native and n.native_cuda)
assert built or int(setuptools.__version__.split('.')[0]) >= 77, 'setuptools is older than 77'
print('built' if built else '%d%d' % torch.cuda.get_device_capability())"
if ! architecture=$("$python" -W ignore -c "$check" 2>>"$out/log.txt" | tail -n 1); then
    tail -n 5 "$out/log.txt"
    echo "gpu.sh: bring along what is missing: pip install --no-deps --target build/site NAME" >&2
    exit 2
fi

# at the same time: these are for the CPU's cores
if [ "$architecture" != built ]; then
    {
        run build 90 env SPARSE_MOON_CUDA_ARCHITECTURES="$architecture" MAX_JOBS="$(nproc)" \
            "$python" setup.py -q build_ext --inplace --build-temp build/gpu
        built=$("$python" -W ignore -c "$check" 2>/dev/null | tail -n 1)
        if [ "$built" != built ]; then say "gpu.sh: WITHOUT the compiled extensions, see build.log"; fi
    } &
fi
run compile 90 "$python" benchmarks/compile_kernels.py --case $targets &
for name in $targets; do
    run "compile_$name" 90 $(steps $name --compile-only --dense compiled --compile-sparse compiled --sparsity 0.9 \
        --pattern $(patterns $name)) &
done
wait

for name in $targets; do
    if [[ $name == resnet50 ]]; then most=36; else most=18; fi # for 20 layers, or 4
    crossovers $name $most $(patterns $name)
    run "steps_$name" 50 $(steps $name --dense compiled eager --compile-sparse compiled --sparsity 0.9 0.95 0.8 \
        --pattern $(patterns $name) --seconds 38 --json "$out/cuda_step_$name.json")
done
run smoke 60 "${pytest[@]}" "${parallel[@]}" tests/test_triton_products.py tests/test_triton_batch_norm_relu.py \
    tests/test_triton_gelu_mlp.py tests/test_captured_step.py

run compile_more 40 "$python" benchmarks/compile_kernels.py --case resnet18 gpt2_350m vit_small &
run tests 80 "${pytest[@]}" "${parallel[@]}" "${triton[@]}" "${others[@]}"
wait
crossovers resnet18 16 block32 block64
run steps_resnet18 40 $(steps resnet18 --dense compiled eager --compile-sparse compiled --sparsity 0.9 \
    --pattern block32 block64 --seconds 28 --json "$out/cuda_step_resnet18.json")
run csr 20 $bench layers --backend kernel --case linear --sparsity 0.9 0.95 0.99 --json "$out/cuda_layers_csr.json"
run bsr 20 $bench layers --backend kernel --case linear --dtype bfloat16 --sparsity 0.8 0.9 0.95 \
    --pattern block64 block128 --json "$out/cuda_layers_bsr.json"
run small 20 $bench update loss average --graph --sparsity 0.9 --json "$out/cuda_small.json"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
run racecheck 50 compute-sanitizer --tool racecheck --error-exitcode 1 "${sanitize[@]}"
unset PYTORCH_NO_CUDA_MEMORY_CACHING
run norms 45 $bench batch_norm --graph --dtype bfloat16 --json "$out/cuda_batch_norm.json"
run layers_bf16 40 $bench layers --graph --backend kernel --dtype bfloat16 --sparsity 0.9 0.95 \
    --pattern block32 block64 block128 vector16 --json "$out/cuda_layers_bf16.json"
run reduce_overhead 60 $(steps vit_base --dense compiled reduce-overhead --compile-sparse reduce-overhead \
    --sparsity 0.9 --pattern block64 --json "$out/cuda_step_vit_base_reduce_overhead.json")
for name in gpt2_350m vit_small; do
    crossovers $name 12 block64 block32
    run "steps_$name" 50 $(steps $name --dense compiled --compile-sparse compiled --sparsity 0.9 \
        --pattern block64 block32 --seconds 38 --json "$out/cuda_step_$name.json")
done
run layers_fp32 25 $bench layers --graph --backend kernel --sparsity 0.9 0.95 0.99 --json "$out/cuda_layers_fp32.json"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
run memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 1 "${sanitize[@]}"
unset PYTORCH_NO_CUDA_MEMORY_CACHING
for name in vit_base resnet50 gpt2_1.3b; do # whose compilation may take more than it has
    run "autotune_$name" 75 $(steps $name --dense compiled max-autotune --sparsity 0.9 \
        --pattern $(patterns $name | cut -d" " -f1) --json "$out/cuda_step_${name}_autotune.json")
done
run tune 300 "$python" benchmarks/tune.py --device cuda
