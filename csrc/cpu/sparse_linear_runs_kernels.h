// The linear layer's product for more than a few tokens, one instruction set's: blocks of kRunGroups vectors of tokens,
// whose panel, chunk by chunk, is read from L1 (see sparse_linear_runs.h). An entry then costs its multiplications,
// where sparse_linear_kernels.h waits for L2: 172 GFLOP/s in place of 75 for 4096 to 4096 features, 256 tokens, 90 %,
// on two cores of a Xeon, 150 in place of 81 at 95 %; packing and listing are not in it.
#pragma once
#include "sparse_linear_kernels.h"

namespace sparse_moon {
namespace SPARSE_MOON_ISA {

constexpr int64_t kRunGroups = kLanes == 16 ? 4 : 8;  // sums of a run in registers, and 256 bytes a feature or fewer
constexpr int64_t kPackedFeatures = 4096;             // at a time: a panel of 1 MB, in L2
constexpr int64_t kFeatureBytes = kRunGroups * kVecBytes;

typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

// Columns, integers that were loaded as floats, as places in a chunk.
SPARSE_MOON_INLINE void store_features(uint16_t* feature, Vec columns, int32_t first_feature) {
    IntVec bits;
    std::memcpy(&bits, &columns, sizeof(bits));
    const HalfVec places = __builtin_convertvector(bits - first_feature, HalfVec);
    std::memcpy(feature, &places, sizeof(places));
}

// The runs of a group as streams of values and of features within their chunk.
inline void list_runs(const LinearRunsJob& job, int64_t group) {
    const Rows rows{job.linear.matrix, job.linear.transposed};
    const SparseMatrix& matrix = job.linear.matrix;
    const RunGroups& runs = job.groups;
    const int64_t width = rows.feature_block();
    const int64_t first_row = group / runs.chunks * runs.block_rows;
    const int64_t first_feature = group % runs.chunks * runs.chunk_features;
    float* value = job.values + runs.entry_starts[group];
    uint16_t* feature = job.features + runs.entry_starts[group];
    for (int64_t r = runs.starts[group]; r < runs.starts[group + 1]; ++r) {
        const Run run = runs.runs[r];
        const int32_t* column = rows.columns() + run.start;
        if (matrix.block_rows * matrix.block_cols == 1) {
            for (int64_t k = 0; k < run.blocks; k += kLanes) {
                const int count = static_cast<int>(smaller(kLanes, run.blocks - k));
                store_features(feature + k, load_range(reinterpret_cast<const float*>(column + k), 0, count),
                               static_cast<int32_t>(first_feature));
                if (!rows.transposed) {
                    store_unaligned(value + k, load_range(matrix.values + run.start + k, 0, count));
                }
            }
            if (rows.transposed) {
                const int32_t* place = matrix.t_perm + run.start;
                for (int64_t k = 0; k < run.blocks; ++k) value[k] = matrix.values[place[k]];
            }
        } else {
            const int64_t within = (first_row + run.row) % rows.block();
            for (int64_t k = 0; k < run.blocks; ++k) {
                for (int64_t j = 0; j < width; ++j) {
                    feature[k * width + j] = static_cast<uint16_t>(column[k] * width + j - first_feature);
                    value[k * width + j] = rows.values_of(run.start + k, within)[j * rows.value_step()];
                }
            }
        }
        value += run.blocks * width;
        feature += run.blocks * width;
    }
}

// Adds to sums [rows][N] what these runs have, each of whose blocks is `width` entries.
template <int N>
void add_runs(const Run* run, const Run* end, int64_t width, const float* values, const uint16_t* features,
              const char* panel, float* sums) {
    for (; run < end; ++run) {
        float* out = sums + run->row * N * kLanes;
        const int64_t count = run->blocks * width;
        Vec sum[N];
#pragma GCC unroll 8
        for (int g = 0; g < N; ++g) sum[g] = load(out + g * kLanes);
        for (int64_t k = 0; k < count; ++k) {
            const Vec weight = broadcast(values[k]);
            const char* source = panel + features[k] * kFeatureBytes;
#pragma GCC unroll 8
            for (int g = 0; g < N; ++g) sum[g] += weight * load(reinterpret_cast<const float*>(source) + g * kLanes);
        }
#pragma GCC unroll 8
        for (int g = 0; g < N; ++g) store(out + g * kLanes, sum[g]);
        values += count;
        features += count;
    }
}

using AddRuns = void (*)(const Run*, const Run*, int64_t, const float*, const uint16_t*, const char*, float*);

template <int... N>
AddRuns add_runs_for(int64_t groups, std::integer_sequence<int, N...>) {
    static constexpr AddRuns kFor[] = {add_runs<N + 1>...};
    return kFor[groups - 1];
}

// Units of work: blocks of tokens, and parts of the rows where there are too few of those. Scratch memory of a thread:
// a panel, and the sums of a block of rows, or of all where features are packed in several times.
struct RunsPlan {
    int64_t blocks, parts;  // of tokens, of blocks of rows
    int64_t packed;         // chunks that are packed at a time
    int64_t panel, sums;    // bytes
};

inline RunsPlan runs_plan(const LinearRunsJob& job) {
    const RunGroups& runs = job.groups;
    const int64_t threads = job.linear.threads, groups = (job.linear.tokens + kLanes - 1) / kLanes;
    RunsPlan plan;
    plan.blocks = (groups + kRunGroups - 1) / kRunGroups;
    const bool even = plan.blocks % threads == 0 || plan.blocks >= 8 * threads;
    plan.parts = even ? 1 : smaller(threads, larger(runs.blocks, 1));
    plan.packed = smaller(larger(kPackedFeatures / runs.chunk_features, 1), runs.chunks);
    plan.panel = plan.packed * runs.chunk_features * kFeatureBytes;
    plan.sums = (plan.packed < runs.chunks ? runs.blocks * runs.block_rows : runs.block_rows) * kFeatureBytes;
    return plan;
}

inline int64_t linear_runs_scratch(const LinearRunsJob& job) {
    const RunsPlan plan = runs_plan(job);
    return plan.panel + plan.sums;
}

// Blocks [begin, end) of rows for the tokens of a block.
inline void linear_runs_unit(const LinearRunsJob& job, const RunsPlan& plan, char* scratch, int64_t block,
                             int64_t begin, int64_t end) {
    const LinearJob& linear = job.linear;
    const RunGroups& runs = job.groups;
    const Rows rows{linear.matrix, linear.transposed};
    const int64_t features = rows.features(), token = block * kRunGroups * kLanes;
    const int64_t groups = smaller((linear.tokens - token + kLanes - 1) / kLanes, kRunGroups);
    const TokenBlocks tokens{plan.blocks, groups, kRunGroups};
    const AddRuns add = add_runs_for(groups, std::make_integer_sequence<int, kRunGroups>{});
    float* panel = reinterpret_cast<float*>(scratch);
    float* all_sums = reinterpret_cast<float*>(scratch + plan.panel);
    const bool once = plan.packed == runs.chunks;
    for (int64_t chunks = 0; chunks < runs.chunks; chunks += plan.packed) {
        const int64_t last_chunk = smaller(chunks + plan.packed, runs.chunks);
        const int64_t base = chunks * runs.chunk_features;
        pack_tokens(linear.input, linear.bfloat16, linear.tokens, features, token, tokens, base,
                    smaller(last_chunk * runs.chunk_features, features), panel);
        for (int64_t part = begin; part < end; ++part) {
            const int64_t first = part * runs.block_rows, last = smaller(first + runs.block_rows, rows.count());
            float* sums = all_sums + (once ? 0 : part - begin) * runs.block_rows * groups * kLanes;
            for (int64_t row = first; chunks == 0 && row < last; ++row) {
                const Vec start = broadcast(linear.bias ? linear.bias[row] : 0.0f);
                for (int64_t g = 0; g < groups; ++g) store(sums + ((row - first) * groups + g) * kLanes, start);
            }
            for (int64_t chunk = chunks; chunk < last_chunk; ++chunk) {
                const int64_t group = part * runs.chunks + chunk;
                const Run* run = runs.runs;
                add(run + runs.starts[group], run + runs.starts[group + 1], rows.feature_block(),
                    job.values + runs.entry_starts[group], job.features + runs.entry_starts[group],
                    reinterpret_cast<const char*>(panel) + (chunk - chunks) * runs.chunk_features * kFeatureBytes,
                    sums);
            }
            if (last_chunk < runs.chunks) continue;
            unpack_tokens(linear, sums, last - first, tokens, token, first, rows.count());
        }
    }
    gelu_tokens(linear, token, token + groups * kLanes, begin * runs.block_rows,
                smaller(end * runs.block_rows, rows.count()), rows.count());
}

inline void linear_runs(const LinearRunsJob& job) {
    const RunsPlan plan = runs_plan(job);
    const int64_t groups = job.groups.blocks * job.groups.chunks;
#pragma omp parallel num_threads(job.linear.threads)
    {
        char* scratch = job.linear.scratch + thread_number() * (plan.panel + plan.sums);
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups; ++group) list_runs(job, group);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < plan.blocks * plan.parts; ++unit) {
            const int64_t part = unit % plan.parts;
            linear_runs_unit(job, plan, scratch, unit / plan.parts, job.groups.blocks * part / plan.parts,
                             job.groups.blocks * (part + 1) / plan.parts);
        }
        stream_fence();
    }
}

}  // namespace SPARSE_MOON_ISA
}  // namespace sparse_moon
