#!/usr/bin/env bash
# Everything that needs a GPU, in two stages of at most six minutes, what is worth most first.
#
#     bash benchmarks/gpu.sh OUT first      # smoke tests, crossovers, whole steps of ViT-B, GPT-2 and ResNet-50
#     bash benchmarks/gpu.sh OUT second     # what has not run yet: tests, races, layers, CSR, BSR, small operators, ...
#     bash benchmarks/gpu.sh OUT steps_vit_base memcheck      # single parts by name
#
# Each part has its most seconds, and no part begins or lasts beyond the stage's end (STAGE_SECONDS, 350). Results go to
# the folder OUT, a file a part and written after each case, so that a run that is cut short leaves what it had.
# Crossovers are written to sparse_moon/ops/tables, for the steps after them, and copied to OUT.
#
# Both compiled extensions can be brought along, built where there is no GPU with the same version of Python:
# `python setup.py build_ext --inplace`. Where they are missing, they are built first, which takes minutes.
# Triton's kernels and the networks are compiled in parallel before anything is timed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash benchmarks/gpu.sh OUT first|second|part ...}
parts="${2:?usage: bash benchmarks/gpu.sh OUT first|second|part ...} ${*:3}"
mkdir -p "$out"
out=$(realpath "$out")
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/build/inductor}
python=${PYTHON:-python3}
[ -e sparse_moon/kernels ] || ln -s ../kernels sparse_moon/kernels # what an installation calls sparse_moon.kernels

case " $parts " in
*" first "*) parts="build compile compile_vit_base compile_gpt2_1.3b compile_resnet50 smoke crossovers steps_vit_base
    steps_gpt2_1.3b steps_resnet50" ;;
*" second "*) parts="build compile_more tests racecheck norms csr bsr small autotune_vit_base autotune_resnet50 steps_resnet18
    autotune_gpt2_1.3b layers_bf16 layers_fp32 steps_gpt2_350m steps_vit_small memcheck tune" ;;
esac
parts=" $(echo $parts) "
end=$((SECONDS + ${STAGE_SECONDS:-350}))

run() { # name, most seconds, command ...
    local name=$1 most=$2 begin=$SECONDS code
    shift 2
    if [[ $parts != *" $name "* ]]; then return; fi
    if ((most > end - SECONDS)); then most=$((end - SECONDS)); fi
    if ((most < 5)); then
        echo "== $name: no time left"
        return
    fi
    timeout -k 5 "$most" "$@" >"$out/$name.log" 2>&1
    code=$?
    echo "== $name: exit code $code after $((SECONDS - begin)) of $most s: $*"
    tail -n "${TAIL:-15}" "$out/$name.log"
}

steps() { # a network and options ...: its steps
    local name=$1
    shift
    echo "$python" benchmarks/flops_and_time.py step --device cuda --quick --case "$name" --case-seconds 60 "$@"
}

parallel=()
test_on_gpu=("$python" -m pytest -m gpu -q --import-mode=importlib -p no:benchmark)
"$python" -c "import xdist" 2>/dev/null && parallel=(-n 8 --dist worksteal) # most of the time Triton compiles
sanitize=("$python" -m pytest -m gpu -q --import-mode=importlib -p no:benchmark
    -k "test_cuda and (uneven or hard or strided or other_memory or not_aligned or other_layouts)")
valued="--sparsity 0.9 0.95 0.8 --pattern block64 block32 block128 vector16"
bench="$python benchmarks/flops_and_time.py --device cuda --quick"

built="from sparse_moon.ops.native import native, native_cuda; assert native and native_cuda"
if ! "$python" -W ignore -c "$built" 2>/dev/null; then
    run build 240 "$python" setup.py -q build_ext --inplace --build-temp build/gpu
fi

# at the same time: these are for the CPU's cores
run compile 100 "$python" benchmarks/compile_kernels.py --case vit_base gpt2_1.3b resnet50 &
for name in vit_base gpt2_1.3b resnet50; do
    run "compile_$name" 100 $(steps $name --dense compiled --compile-sparse --sparsity 0.9 --pattern block64) &
done
wait

run smoke 45 "${test_on_gpu[@]}" "${parallel[@]}" -k "triton_products or triton_batch_norm or captured_step"
run crossovers 70 "$python" benchmarks/tune.py --device cuda --case vit_base gpt2_1.3b resnet50 --seconds 60
if [[ $parts == *" crossovers "* ]]; then cp sparse_moon/ops/tables/crossover_cuda_*.json "$out"; fi
for name in vit_base gpt2_1.3b resnet50; do
    run "steps_$name" 75 $(steps $name --dense compiled eager --compile-sparse $valued --seconds 70 \
        --json "$out/cuda_step_$name.json")
done

run compile_more 40 "$python" benchmarks/compile_kernels.py --case resnet18 gpt2_350m vit_small &
run tests 80 "${test_on_gpu[@]}" "${parallel[@]}"
wait
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
run racecheck 50 compute-sanitizer --tool racecheck --error-exitcode 1 "${sanitize[@]}"
unset PYTORCH_NO_CUDA_MEMORY_CACHING
run norms 45 $bench batch_norm --graph --dtype bfloat16 --json "$out/cuda_batch_norm.json"
run csr 20 $bench layers --backend kernel --case linear --sparsity 0.9 0.95 0.99 --json "$out/cuda_layers_csr.json"
run bsr 20 $bench layers --backend kernel --case linear --dtype bfloat16 --sparsity 0.8 0.9 0.95 \
    --pattern block64 block128 --json "$out/cuda_layers_bsr.json"
run small 20 $bench update loss average --graph --sparsity 0.9 --json "$out/cuda_small.json"
for name in vit_base resnet50; do
    run "autotune_$name" 75 $(steps $name --dense compiled max-autotune --sparsity 0.9 --pattern block64 \
        --json "$out/cuda_step_${name}_autotune.json")
done
run steps_resnet18 40 $(steps resnet18 --dense compiled eager --sparsity 0.9 --pattern block32 block64 --seconds 35 \
    --json "$out/cuda_step_resnet18.json")
run autotune_gpt2_1.3b 60 $(steps gpt2_1.3b --dense compiled max-autotune reduce-overhead --sparsity 0.9 \
    --pattern block64 --json "$out/cuda_step_gpt2_1.3b_autotune.json")
run layers_bf16 40 $bench layers --graph --backend kernel --dtype bfloat16 --sparsity 0.9 0.95 \
    --pattern block32 block64 block128 vector16 --json "$out/cuda_layers_bf16.json"
run layers_fp32 25 $bench layers --graph --backend kernel --sparsity 0.9 0.95 0.99 --json "$out/cuda_layers_fp32.json"
run steps_gpt2_350m 50 $(steps gpt2_350m --dense compiled --sparsity 0.9 --pattern block64 block32 \
    --json "$out/cuda_step_gpt2_350m.json")
run steps_vit_small 60 $(steps vit_small --dense compiled --sparsity 0.9 --pattern block64 block32 \
    --json "$out/cuda_step_vit_small.json")
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
run memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 1 "${sanitize[@]}"
unset PYTORCH_NO_CUDA_MEMORY_CACHING
run tune 300 "$python" benchmarks/tune.py --device cuda
