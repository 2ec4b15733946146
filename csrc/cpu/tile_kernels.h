// The two inner loops of every sparse product. Data lies in panels: one vector (kLanes images or tokens) a position,
// neighbouring positions one vector apart, so that a shifted or strided neighbour is an address, never a shuffle.
//
//   product_tile  out[r][t] += sum over entries  weight * panel[offset + r row_step + t S]
//   dot_tile      sums[j]   += sum over (r, t)   grad[r][t] * panel[offset_j + r row_step + t S]
//
// Both keep all results in registers and use every panel vector as the memory operand of one FMA; what bounds them is
// the bandwidth of the cache that the panel lies in. Zen 4, of 117 GFLOP/s a core: 105 from L1, 57 to 62 from L2, 38
// from L3.
#pragma once
#include "jobs.h"
#include "simd.h"

namespace sparse_moon {
namespace SPARSE_MOON_ISA {

constexpr int kMaxRows = 4;                              // output rows of a tile
constexpr int kTile = kRegisters == 32 ? 16 : 14;        // output positions of a tile, an accumulator each
constexpr int kMaxCols = kTile;                          // output columns of a tile
constexpr int kDots = kRegisters == 32 ? 16 : 8;         // entries of a dot_tile
constexpr int kDotPositions = kRegisters == 32 ? 8 : 4;  // gradient vectors that a dot_tile holds at once
static_assert(kTile < kRegisters && kDots + kDotPositions < kRegisters, "accumulators must fit the registers");

// Not aligned in flat panels; where it is, that costs nothing.
SPARSE_MOON_INLINE Vec vector_at(const char* p) { return load_unaligned(reinterpret_cast<const float*>(p)); }

// What a tile's sums are added to. Sums over many entries are stored in parts, each of which starts from zero: that
// keeps rounding errors, which grow with the length of a sum, as small as those of blocked dense products.
enum class Start { kConstant, kStored };

// Entries of one output, prepared as offsets and weights.
struct EntryList {
    const Entry* entries;
    int64_t count;
    SPARSE_MOON_INLINE int64_t offset(int64_t k) const { return entries[k].offset; }
    SPARSE_MOON_INLINE float weight(int64_t k) const { return entries[k].weight; }
};

// Entries of one row of a block-compressed matrix with 1 x 1 blocks, where they are.
struct MatrixRow {
    const int32_t* columns;
    const float* values;
    int64_t count;
    int64_t feature_bytes;  // between features in the panel
    SPARSE_MOON_INLINE int64_t offset(int64_t k) const { return columns[k] * feature_bytes; }
    SPARSE_MOON_INLINE float weight(int64_t k) const { return values[k]; }
};

template <class Entries>
struct ProductTile {
    const char* panel;   // first position of the tile at offset 0
    int64_t row_bytes;   // between tile rows in the panel
    Entries entries;     // those of one output channel
    float initial;     // Start::kConstant: the value (a bias) that the sums start from
    float* out;        // [R][T] vectors; Start::kStored adds to them
    int64_t out_step;  // vectors between neighbouring positions of `out`
    int64_t out_row;   // vectors between rows of `out`
};

// One entry of every position's sum.
template <int R, int T, int S, class Entries>
SPARSE_MOON_INLINE void product_entry_at(const Entries& entries, int64_t k, const char* const (&rows)[R],
                                         Vec (&sums)[R][T]) {
    const int64_t offset = entries.offset(k);
    const Vec weight = broadcast(entries.weight(k));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) sums[r][t] += weight * vector_at(rows[r] + offset + t * S * kVecBytes);
    }
}

template <int R, int T, int S, Start start, class Entries>
void product_tile(const ProductTile<Entries>& tile) {
    static_assert(R * T <= kTile, "a tile's accumulators must fit the registers");
    // Few positions alone cannot hide the latency of the FMA: their entries get several chains. One position, 784 to
    // 512 features at half the density: 138 us with one chain.
    constexpr int C = R * T <= 2 ? 4 : R * T <= 4 ? 2 : 1;
    Vec sums[C][R][T] = {};
    const char* rows[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        rows[r] = tile.panel + r * tile.row_bytes;
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
            sums[0][r][t] = broadcast(start == Start::kConstant ? tile.initial : 0.0f);
        }
    }
    const Entries entries = tile.entries;
    int64_t k = 0;
    for (; k + C <= entries.count; k += C) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) product_entry_at<R, T, S>(entries, k + c, rows, sums[c]);
    }
    for (; C > 1 && k < entries.count; ++k) product_entry_at<R, T, S>(entries, k, rows, sums[0]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
            for (int c = 1; c < C; ++c) sums[0][r][t] += sums[c][r][t];
            float* out = tile.out + (r * tile.out_row + t * tile.out_step) * kLanes;
            store(out, start == Start::kConstant ? sums[0][r][t] : load(out) + sums[0][r][t]);
        }
    }
}

template <class Entries>
using ProductKernel = void (*)(const ProductTile<Entries>&);

template <int R, int T, int S, Start start, class Entries>
constexpr ProductKernel<Entries> product_entry() {
    if constexpr (R * T <= kTile) {
        return product_tile<R, T, S, start, Entries>;
    } else {
        return nullptr;
    }
}

template <int R, int S, Start start, class Entries, int... T>
SPARSE_MOON_INLINE ProductKernel<Entries> product_of_cols(int64_t cols, std::integer_sequence<int, T...>) {
    static constexpr ProductKernel<Entries> kernels[] = {product_entry<R, T + 1, S, start, Entries>()...};
    return kernels[cols - 1];
}

template <int S, Start start>
SPARSE_MOON_INLINE ProductKernel<EntryList> product_of_rows(int64_t rows, int64_t cols) {
    constexpr auto widths = std::make_integer_sequence<int, kMaxCols>{};
    switch (rows) {
        case 1: return product_of_cols<1, S, start, EntryList>(cols, widths);
        case 2: return product_of_cols<2, S, start, EntryList>(cols, widths);
        case 3: return product_of_cols<3, S, start, EntryList>(cols, widths);
        default: return product_of_cols<4, S, start, EntryList>(cols, widths);
    }
}

// Kernel for tiles of rows x cols positions, `step` panel vectors between columns: 1 or 2, anything where cols = 1.
template <Start start>
ProductKernel<EntryList> product_kernel(int64_t rows, int64_t cols, int64_t step) {
    return step == 2 && cols > 1 ? product_of_rows<2, start>(rows, cols) : product_of_rows<1, start>(rows, cols);
}

// Kernel for one row of neighbouring positions.
template <Start start, class Entries>
ProductKernel<Entries> product_row_kernel(int64_t cols) {
    return product_of_cols<1, 1, start, Entries>(cols, std::make_integer_sequence<int, kMaxCols>{});
}

struct DotTile {
    const char* panel;       // first position of the tile at offset 0
    const char* grad;        // the gradient of the same positions, one output channel
    int64_t panel_row;       // bytes between tile rows in the panel
    int64_t grad_row;        // bytes between tile rows in the gradient
    int64_t panel_step;      // bytes between columns in the panel (used where S = 0)
    int64_t rows, cols;      // positions of the tile
    const int32_t* offsets;  // [J] bytes
    float* sums;             // [J] in and out
};

// P neighbouring positions of one row; chain c of entry j takes the positions that are c modulo A.
template <int J, int A, int S, int P>
SPARSE_MOON_INLINE void dot_positions(const char* panel, const char* grad, const int32_t* offsets, Vec (&sums)[J][A]) {
    Vec held[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) held[p] = *reinterpret_cast<const Vec*>(grad + p * kVecBytes);
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) {
        const char* row = panel + offsets[j];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) sums[j][p % A] += held[p] * vector_at(row + p * S * kVecBytes);
    }
}

template <int J, int S>
void dot_tile(const DotTile& tile) {
    // Few entries alone cannot hide the latency of the FMA (4 cycles, one or two a cycle): they get several chains.
    constexpr int A = 4 * J <= kDots ? 4 : 2 * J <= kDots ? 2 : 1;
    constexpr int P = kDotPositions;
    static_assert(J * A <= kDots, "chains must fit the registers");
    Vec sums[J][A] = {};
    for (int64_t r = 0; r < tile.rows; ++r) {
        const char* panel = tile.panel + r * tile.panel_row;
        const char* grad = tile.grad + r * tile.grad_row;
        int64_t left = tile.cols;
        if constexpr (S > 0) {
            for (; left >= P; left -= P, panel += P * S * kVecBytes, grad += P * kVecBytes) {
                dot_positions<J, A, S, P>(panel, grad, tile.offsets, sums);
            }
            if (P > 4 && left >= 4) {
                dot_positions<J, A, S, 4>(panel, grad, tile.offsets, sums);
                left -= 4, panel += 4 * S * kVecBytes, grad += 4 * kVecBytes;
            }
            if (left >= 2) {
                dot_positions<J, A, S, 2>(panel, grad, tile.offsets, sums);
                left -= 2, panel += 2 * S * kVecBytes, grad += 2 * kVecBytes;
            }
        }
        for (; left > 0; --left, panel += tile.panel_step, grad += kVecBytes) {
            dot_positions<J, A, 1, 1>(panel, grad, tile.offsets, sums);
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) {
#pragma GCC unroll 4
        for (int a = 1; a < A; ++a) sums[j][0] += sums[j][a];
    }
#pragma GCC unroll 4
    for (int j0 = 0; j0 < J; j0 += kLanes) {
        Vec group[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) group[i] = j0 + i < J ? sums[j0 + i < J ? j0 + i : 0][0] : Vec{};
        const int count = J - j0 < kLanes ? J - j0 : kLanes;
        float* out = tile.sums + j0;
        store_first(out, load_range(out, 0, count) + sum_lanes(group), count);
    }
}

using DotKernel = void (*)(const DotTile&);

template <int S, int... J>
SPARSE_MOON_INLINE DotKernel dot_of_entries(int64_t entries, std::integer_sequence<int, J...>) {
    static constexpr DotKernel kernels[] = {dot_tile<J + 1, S>...};
    return kernels[entries - 1];
}

// Kernel for 1 to kDots entries, `step` panel vectors between columns.
inline DotKernel dot_kernel(int64_t entries, int64_t step) {
    constexpr auto counts = std::make_integer_sequence<int, kDots>{};
    if (step == 1) return dot_of_entries<1>(entries, counts);
    return step == 2 ? dot_of_entries<2>(entries, counts) : dot_of_entries<0>(entries, counts);
}

// All entries of one output channel in nearly equal parts of at most kDots: sums[k] += ...
SPARSE_MOON_INLINE void dot_all(DotTile tile, int64_t step, const int32_t* offsets, float* sums, int64_t count) {
    const int64_t parts = (count + kDots - 1) / kDots;
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
        tile.offsets = offsets + begin;
        tile.sums = sums + begin;
        dot_kernel(end - begin, step)(tile);
    }
}

}  // namespace SPARSE_MOON_ISA
}  // namespace sparse_moon
