#include "masked_dense.h"

#include <cstring>
#include <stdexcept>

namespace sparse_moon {
namespace {

// Calls visit(place in `values`, place in the dense row r of block row `row`) for the entries of that row.
template <class Visit>
void for_each_place(const MaskedDense& layout, int64_t row, int64_t r, Visit visit) {
    const int64_t bh = layout.block_rows, bw = layout.block_cols;
    const bool plain = bw == 1 && layout.stride_tap == 1 && layout.stride_channel == layout.taps;
    for (int64_t k = layout.row_ptr[row]; k < layout.row_ptr[row + 1]; ++k) {
        const int64_t col = layout.col[k], value = (k * bh + r) * bw;
        if (plain) {  // no division
            visit(value, col);
            continue;
        }
        const int64_t place = col / layout.taps * bw * layout.stride_channel + col % layout.taps * layout.stride_tap;
        for (int64_t c = 0; c < bw; ++c) visit(value + c, place + c * layout.stride_channel);
    }
}

// Calls body(block row, row in it, first element of the dense row) for all rows of the matrix, shared by the threads.
template <class Body>
void for_each_row(const MaskedDense& layout, Body body) {
    const int64_t rows = layout.grid_rows * layout.block_rows;
#pragma omp parallel for schedule(static) num_threads(layout.threads)
    for (int64_t row = 0; row < rows; ++row) {
        body(row / layout.block_rows, row % layout.block_rows, row * layout.cols);
    }
}

// Bits are moved, so that only the size of an element matters.
template <class Move>
void with_element(int64_t bytes, Move move) {
    switch (bytes) {
        case 2: return move(uint16_t{});
        case 4: return move(uint32_t{});
        case 8: return move(uint64_t{});
        default: throw std::invalid_argument("elements must have 2, 4 or 8 bytes");
    }
}

}  // namespace

void scatter_values(const MaskedDense& layout, int64_t bytes, const void* values, void* dense) {
    with_element(bytes, [&](auto element) {
        using T = decltype(element);
        const T* from = static_cast<const T*>(values);
        for_each_row(layout, [&](int64_t block_row, int64_t r, int64_t begin) {
            T* to = static_cast<T*>(dense) + begin;
            std::memset(to, 0, layout.cols * sizeof(T));
            for_each_place(layout, block_row, r, [&](int64_t value, int64_t place) { to[place] = from[value]; });
        });
    });
}

void gather_values(const MaskedDense& layout, int64_t bytes, const void* dense, void* values) {
    with_element(bytes, [&](auto element) {
        using T = decltype(element);
        T* to = static_cast<T*>(values);
        for_each_row(layout, [&](int64_t block_row, int64_t r, int64_t begin) {
            const T* from = static_cast<const T*>(dense) + begin;
            for_each_place(layout, block_row, r, [&](int64_t value, int64_t place) { to[value] = from[place]; });
        });
    });
}

}  // namespace sparse_moon
