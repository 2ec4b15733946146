#!/usr/bin/env bash
# Everything that needs a GPU, in two stages of at most six minutes, what is worth most first.
#
#     bash benchmarks/gpu.sh OUT first      # crossovers and whole steps of ViT-B, ResNet-50 and GPT-2, smoke tests
#     bash benchmarks/gpu.sh OUT second     # what has not run yet: tests, races, layers, CSR, BSR, small operators, ...
#     bash benchmarks/gpu.sh OUT steps_vit_base memcheck      # single parts by name
#
# Each part has its most seconds, and no part begins or lasts beyond the stage's end (STAGE_SECONDS, 350). Results go to
# the folder OUT, written after each case, so that a run that is cut short leaves what it had: a JSON file a part, log.txt
# with what all of them printed, and crossover_cuda_*.json, which the steps of this stage and the next one take from
# sparse_moon/ops/tables. Where few files come back from the machine, pack them: tar czf first.tgz OUT
#
# What the machine lacks of the dependencies can be brought along in build/site, where nothing needs to be compiled:
# `pip install --no-deps --target build/site jsonargparse`. What cannot be imported is said before any time is spent.
# Both compiled extensions can be brought along, built where there is no GPU with the same version of Python:
# `python setup.py build_ext --inplace`. Where they are missing, they are built first, for this GPU alone.
# Triton's kernels and the networks are compiled in parallel before anything is timed.
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

case " $parts " in
*" first "*) parts="build compile compile_vit_base compile_gpt2_1.3b compile_resnet50 crossovers_vit_base steps_vit_base
    smoke crossovers_resnet50 steps_resnet50 crossovers_gpt2_1.3b steps_gpt2_1.3b" ;;
*" second "*) parts="build compile_more tests steps_resnet18 racecheck norms layers_bf16 csr bsr small steps_gpt2_350m
    steps_vit_small layers_fp32 memcheck autotune_vit_base autotune_resnet50 autotune_gpt2_1.3b tune" ;;
esac
parts=" $(echo $parts) "
end=$((SECONDS + ${STAGE_SECONDS:-350}))

run() { # name, most seconds, command ...
    local name=$1 most=$2 begin=$SECONDS code log
    shift 2
    if [[ $parts != *" $name "* ]]; then return; fi
    if ((most > end - SECONDS)); then most=$((end - SECONDS)); fi
    if ((most < 5)); then
        echo "== $name: no time left" | tee -a "$out/log.txt"
        return
    fi
    log=$(mktemp)
    timeout -k 5 "$most" "$@" >"$log" 2>&1
    code=$?
    { # at once, because parts run beside each other
        echo "== $name: exit code $code after $((SECONDS - begin)) of $most s: $*"
        cat "$log"
    } >>"$out/log.txt"
    echo "== $name: exit code $code after $((SECONDS - begin)) of $most s"
    tail -n "${TAIL:-15}" "$log"
    rm -f "$log"
}

steps() { # a network and options ...: its steps
    local name=$1
    shift
    echo "$python" benchmarks/flops_and_time.py step --device cuda --quick --case "$name" --case-seconds 60 "$@"
}

crossovers() { # a network: the choice for its layers
    run "crossovers_$1" 40 "$python" benchmarks/tune.py --device cuda --case "$1" --seconds 25
    if [[ $parts == *" crossovers_$1 "* ]]; then cp sparse_moon/ops/tables/crossover_cuda_*.json "$out"; fi
}

parallel=()
"$python" -c "import xdist" 2>/dev/null && parallel=(-n 8 --dist worksteal) # most of the time Triton compiles
pytest=("$python" -m pytest -q --import-mode=importlib -p no:benchmark)
triton=(tests/test_triton_*.py) # of which all run on the GPU, not only what needs one
others=()
for file in tests/test_*.py; do
    if [[ $file != tests/test_triton_* ]] && grep -q "mark.gpu" "$file"; then others+=("$file"); fi
done
sanitize=("${pytest[@]}" -m gpu tests/test_cuda_*.py
    -k "uneven or hard or strided or other_memory or not_aligned or other_layouts")
valued="--sparsity 0.9 0.95 0.8 --pattern block64 block32 block128 vector16"
bench="$python benchmarks/flops_and_time.py --device cuda --quick"

for table in "$out"/crossover_cuda_*.json; do # of an earlier stage
    if [ -e "$table" ]; then cp "$table" sparse_moon/ops/tables; fi
done
needed="import sys; sys.path.insert(0, 'benchmarks'); import flops_and_time, compile_kernels, tune, timm, pytest, hypothesis"
if ! "$python" -W ignore -c "$needed" >>"$out/log.txt" 2>&1; then
    tail -n 5 "$out/log.txt"
    echo "gpu.sh: bring along what is missing: pip install --no-deps --target build/site NAME" >&2
    exit 2
fi
built="from sparse_moon.ops.native import native, native_cuda; assert native and native_cuda"
if ! "$python" -W ignore -c "$built" 2>/dev/null; then
    architecture=$("$python" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())" 2>/dev/null || echo 90)
    run build 200 env SPARSE_MOON_CUDA_ARCHITECTURES="$architecture" MAX_JOBS="$(nproc)" \
        "$python" setup.py -q build_ext --inplace --build-temp build/gpu
fi

# at the same time: these are for the CPU's cores
run compile 100 "$python" benchmarks/compile_kernels.py --case vit_base gpt2_1.3b resnet50 &
for name in vit_base gpt2_1.3b resnet50; do
    run "compile_$name" 100 $(steps $name --dense compiled --compile-sparse --sparsity 0.9 --pattern block64) &
done
wait

for name in vit_base resnet50 gpt2_1.3b; do
    crossovers $name
    run "steps_$name" 60 $(steps $name --dense compiled eager --compile-sparse $valued --seconds 55 \
        --json "$out/cuda_step_$name.json")
    if [[ $name == vit_base ]]; then
        run smoke 30 "${pytest[@]}" "${parallel[@]}" tests/test_triton_products.py tests/test_triton_batch_norm_relu.py \
            tests/test_triton_gelu_mlp.py tests/test_captured_step.py
    fi
done

run compile_more 40 "$python" benchmarks/compile_kernels.py --case resnet18 gpt2_350m vit_small &
run tests 80 "${pytest[@]}" "${parallel[@]}" "${triton[@]}" "${others[@]}"
wait
run steps_resnet18 40 $(steps resnet18 --dense compiled eager --sparsity 0.9 --pattern block32 block64 --seconds 35 \
    --json "$out/cuda_step_resnet18.json")
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
run racecheck 50 compute-sanitizer --tool racecheck --error-exitcode 1 "${sanitize[@]}"
unset PYTORCH_NO_CUDA_MEMORY_CACHING
run norms 45 $bench batch_norm --graph --dtype bfloat16 --json "$out/cuda_batch_norm.json"
run layers_bf16 40 $bench layers --graph --backend kernel --dtype bfloat16 --sparsity 0.9 0.95 \
    --pattern block32 block64 block128 vector16 --json "$out/cuda_layers_bf16.json"
run csr 20 $bench layers --backend kernel --case linear --sparsity 0.9 0.95 0.99 --json "$out/cuda_layers_csr.json"
run bsr 20 $bench layers --backend kernel --case linear --dtype bfloat16 --sparsity 0.8 0.9 0.95 \
    --pattern block64 block128 --json "$out/cuda_layers_bsr.json"
run small 20 $bench update loss average --graph --sparsity 0.9 --json "$out/cuda_small.json"
run steps_gpt2_350m 50 $(steps gpt2_350m --dense compiled --sparsity 0.9 --pattern block64 block32 \
    --json "$out/cuda_step_gpt2_350m.json")
run steps_vit_small 60 $(steps vit_small --dense compiled --sparsity 0.9 --pattern block64 block32 \
    --json "$out/cuda_step_vit_small.json")
run layers_fp32 25 $bench layers --graph --backend kernel --sparsity 0.9 0.95 0.99 --json "$out/cuda_layers_fp32.json"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
run memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 1 "${sanitize[@]}"
unset PYTORCH_NO_CUDA_MEMORY_CACHING
for name in vit_base resnet50; do # whose compilation may take more than it has
    run "autotune_$name" 75 $(steps $name --dense compiled max-autotune --sparsity 0.9 --pattern block64 \
        --json "$out/cuda_step_${name}_autotune.json")
done
run autotune_gpt2_1.3b 60 $(steps gpt2_1.3b --dense compiled max-autotune reduce-overhead --sparsity 0.9 \
    --pattern block64 --json "$out/cuda_step_gpt2_1.3b_autotune.json")
run tune 300 "$python" benchmarks/tune.py --device cuda
