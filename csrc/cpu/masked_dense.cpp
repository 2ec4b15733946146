#include "masked_dense.h"

#include <cstring>
#include <stdexcept>
#include <vector>

namespace sparse_moon {
namespace {

// First place in a dense row by block column; empty where it is the block column itself. A table, because a division
// for every entry takes most of the time (512 x 512 x 3 x 3 in channels_last, half of it there, one thread: 11 ms in
// place of 3).
std::vector<int32_t> column_places(const MaskedDense& layout) {
    const int64_t bw = layout.block_cols;
    std::vector<int32_t> places;
    if (bw == 1 && layout.stride_tap == 1 && layout.stride_channel == layout.taps) return places;
    places.reserve(layout.cols / bw);
    for (int64_t channel = 0; channel < layout.cols / layout.taps; channel += bw) {
        for (int64_t tap = 0; tap < layout.taps; ++tap) {
            places.push_back(static_cast<int32_t>(channel * layout.stride_channel + tap * layout.stride_tap));
        }
    }
    return places;
}

// Calls visit(place in `values`, place in the dense row r of block row `row`) for the entries of that row.
template <class Visit>
void for_each_place(const MaskedDense& layout, const std::vector<int32_t>& places, int64_t row, int64_t r,
                    Visit visit) {
    const int64_t bh = layout.block_rows, bw = layout.block_cols, end = layout.row_ptr[row + 1];
    if (places.empty()) {
        for (int64_t k = layout.row_ptr[row]; k < end; ++k) visit(k * bh + r, layout.col[k]);
        return;
    }
    for (int64_t k = layout.row_ptr[row]; k < end; ++k) {
        const int64_t value = (k * bh + r) * bw, place = places[layout.col[k]];
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
        const std::vector<int32_t> places = column_places(layout);
        for_each_row(layout, [&](int64_t block_row, int64_t r, int64_t begin) {
            T* to = static_cast<T*>(dense) + begin;
            std::memset(to, 0, layout.cols * sizeof(T));
            for_each_place(layout, places, block_row, r,
                           [&](int64_t value, int64_t place) { to[place] = from[value]; });
        });
    });
}

void gather_values(const MaskedDense& layout, int64_t bytes, const void* dense, void* values) {
    with_element(bytes, [&](auto element) {
        using T = decltype(element);
        T* to = static_cast<T*>(values);
        const std::vector<int32_t> places = column_places(layout);
        for_each_row(layout, [&](int64_t block_row, int64_t r, int64_t begin) {
            const T* from = static_cast<const T*>(dense) + begin;
            for_each_place(layout, places, block_row, r,
                           [&](int64_t value, int64_t place) { to[value] = from[place]; });
        });
    });
}

}  // namespace sparse_moon
