// What the instruction-set-specific kernels are asked to do: plain structs of raw pointers and geometry, prepared by
// each op's .cpp, so that nothing but inner loops is compiled once for each instruction set.
//
// A *panel* holds a part of an activation with kLanes images (or tokens) interleaved: position i of channel c is the
// vector at panel + c channel_stride + i, and zero padding is stored in it, so that inner loops test no boundary.
// Strides are odd numbers of vectors: with powers of two, neighbouring channels would fall into the same cache sets.
#pragma once
#include <cstdint>

#include "bfloat16.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace sparse_moon {

// Place of the calling thread in its team, and the team's size, which may be smaller than what was asked for.
#ifdef _OPENMP
static inline int thread_number() { return omp_get_thread_num(); }
static inline int team_size() { return omp_get_num_threads(); }
#else
static inline int thread_number() { return 0; }
static inline int team_size() { return 1; }
#endif

class KeptRuns;  // see sparse_linear_runs.h

// A non-zero weight as an inner loop meets it.
struct Entry {
    int32_t offset;  // bytes from a position to the panel vector that the weight multiplies
    float weight;
};
static_assert(sizeof(Entry) == 8, "entries are streamed: one 8-byte word each");

// One dimension of a correlation. Grid position g of phase p writes target g * phases + p and reads the sources
// g * step + shift, with a shift for every kernel tap. A forward pass has one phase and its stride as the step; the
// input gradient of a strided convolution has a phase for each remainder, and a step of 1.
struct Axis {
    int64_t source;       // extent of the plane that is read
    int64_t target;       // extent of the plane that is written
    int64_t grid;         // ceil(target / phases)
    int64_t step;         // source positions a grid step
    int64_t phases;       // target positions a grid step
    int64_t first, last;  // smallest and largest shift over all taps
};

// A batch of planes in memory, (batch, channels, height, width) in logical order, of float32 or of bfloat16.
struct Planes {
    void* data;
    int64_t channels, height, width;
    bool channels_last;
    bool bfloat16 = false;

    int64_t bytes(int64_t batch) const { return batch * channels * height * width * number_bytes(bfloat16); }
    template <class T>
    T* numbers() const {
        return static_cast<T*>(data);
    }
};

// How a batch is spread over lanes and units of work. Full groups take one image a lane; the rest of the batch spreads
// `bands` horizontal bands of each image over the lanes, so that a small batch fills them too.
struct Groups {
    int64_t grid_rows;
    int64_t full;        // number of groups with an image a lane
    int64_t rest;        // images in the last group
    int64_t bands;       // lanes for an image of the last group
    int64_t band_rows;   // grid rows of such a band
    int64_t full_blocks, rest_blocks;  // units a group: blocks of grid rows
    int64_t units() const { return full * full_blocks + (rest > 0 ? rest_blocks : 0); }
};

// Where a plane's positions lie in a panel: source row i, column x of a unit at i * pitch + margin + x.
struct PanelShape {
    int64_t channels;
    int64_t rows;            // source rows of a unit with block_rows grid rows
    int64_t block_rows;
    int64_t row_step;        // plane rows between panel rows (more than 1 where one tap skips rows)
    int64_t grid_step;       // panel rows a grid row
    int64_t margin;          // zero columns before each row; those of the next row pad this one on the right
    int64_t pitch;           // positions between rows
    int64_t channel_stride;  // positions between channels, odd
    int64_t vectors() const { return channels * channel_stride + margin; }
};

// target[o] (+ bias[o]) = sum over entries of o, for every image and position. Forward pass and input gradient.
struct CorrelateJob {
    Axis height, width;
    Groups groups;
    PanelShape panel;
    Planes source, target;
    const Entry* entries;
    const int64_t* starts;  // [target.channels * height.phases * width.phases + 1] ranges of `entries`
    int64_t chunks;         // of source channels, at least 1
    const int64_t* cuts;    // [target.channels * height.phases * width.phases][chunks - 1] between an output's chunks
    const float* bias;      // [target.channels] or null
    bool streaming;         // the target is so large that it will not be found in a cache anyway
    int64_t splits;         // parts into which the target channels of a unit are split, for want of units
    char* scratch;          // [threads][correlate_scratch(job)] bytes, 64-byte aligned
    int64_t thread_scratch;
    int threads;
};

// sums[k] = sum over images and positions of grad[o] * source shifted by entry k of o. Gradient of the values.
struct CorrelateDotsJob {
    Axis height, width;
    Groups groups;
    PanelShape panel, grad_panel;
    Axis grad_height;  // that `grad` is packed by; grid row r is panel row r - grad_height.first
    Planes source, grad;
    const CorrelateJob* input_grad;  // null, or what is computed from the same panels of `grad`, of the same groups
    const int32_t* offsets;  // [starts[grad.channels]] as Entry::offset
    const int64_t* starts;   // [grad.channels + 1]
    int64_t chunks;          // of source channels, at least 1
    const int64_t* cuts;     // [grad.channels][chunks - 1] between an output's chunks
    int64_t splits;
    float* sums;  // [threads][starts[grad.channels]] out: one partial sum a thread
    char* scratch;
    int64_t thread_scratch;
    int threads;
};

// How contiguous planes lie in a *flat panel*, which holds a few whole images, or a block of rows of one, and is as its
// plane where a panel has images side by side: each channel is one line of numbers, its rows `pitch` apart and its
// images `image_stride`, with zeros in between and in front. Row y, column x of image i is number lead + i *
// image_stride + y * pitch + x, so that every shift of a stride of 1 is a distance in the line. What sums find between
// rows is thrown away.
struct FlatPanel {
    int64_t images;        // of a unit of work
    int64_t block_rows;    // target rows of a unit; 0 where units are whole images
    int64_t above, below;  // source rows that a unit reads above its first row and below its last
    int64_t pitch, image_stride;
    int64_t lead;            // whole cache lines, as is
    int64_t channel_stride;  // between channels
    int64_t slack;           // numbers behind the last channel that may be read
};

// As CorrelateJob, of stride 1 and from a flat panel; entries' offsets are from the line's start.
struct FlatCorrelateJob {
    int64_t batch;
    FlatPanel panel;
    Planes source, target;  // contiguous
    const Entry* entries;
    const int64_t* starts;  // [target.channels + 1]
    const float* bias;      // [target.channels] or null
    char* scratch;          // [threads][flat_correlate_scratch(job)] bytes
    int64_t thread_scratch;
    int threads;
};

// As CorrelateDotsJob, from flat panels of the same units and pitch.
struct FlatDotsJob {
    int64_t batch;
    FlatPanel panel, grad_panel;
    Planes source, grad;
    const FlatCorrelateJob* input_grad;
    const int32_t* offsets;
    const int64_t* starts;
    float* sums;
    char* scratch;
    int64_t thread_scratch;
    int threads;
};

// How the batch of a dense 3 x 3 convolution is cut into tiles of 2 x 2 positions of `target`, which come in bands of
// rows of an image. Source position y - padding of an image is the first that target position y sees.
struct WinogradTiles {
    int64_t batch;
    Planes source, target;
    int64_t padding[2];
    int64_t down, across;  // tiles of an image
    int64_t band_rows;     // rows of tiles of a band
    int64_t chunk_bands;   // bands that are multiplied as one
    PanelShape source_panel, target_panel;  // of kLanes channels of a band, a channel a lane
    char* scratch;  // [threads][what the job needs] bytes, 64-byte aligned
    int64_t thread_scratch;
    int threads;
};

// Transforms a weight of 3 x 3 taps, those of an output and an input at taps + output * output_stride + input *
// input_stride, rotated by half a turn where `mirrored`.
struct WinogradWeight {
    const float* taps;
    int64_t outputs, inputs;
    int64_t output_stride, input_stride;
    bool mirrored;
    float* products;  // [16][outputs in whole vectors][inputs] out
    int threads;
};

struct WinogradConv2d : WinogradTiles {
    const float* weight;  // WinogradWeight::products
    const float* bias;    // [target.channels] or null
    bool streaming;       // as in CorrelateJob
};

// `target` is the gradient of the output, of which this takes channels [first, first + outputs).
struct WinogradWeightGrad : WinogradTiles {
    float* weight_grad;  // [target.channels][source.channels][3][3]
    int64_t first, outputs;
};

// A block-compressed matrix; see sparse_moon/topology.py for the meaning of each array.
struct SparseMatrix {
    int64_t rows, cols;                // in elements
    int64_t block_rows, block_cols;    // shape of a block
    const int32_t *row_ptr, *col;      // row-ordered
    const int32_t *t_ptr, *t_row, *t_perm;  // column-ordered
    const float* values;               // [blocks][block_rows][block_cols]; null where only places matter
    KeptRuns* runs = nullptr;          // those of this topology, where they are kept from call to call
};

// y (tokens, rows) = x (tokens, cols) W^T + bias, or with the transpose y (tokens, cols) = x (tokens, rows) W. With the
// transpose of a matrix of 1 x 1 blocks, the values are in column order.
struct LinearJob {
    SparseMatrix matrix;
    bool transposed;
    int64_t tokens;
    bool bfloat16;  // input and output, which are float32 otherwise
    const void* input;
    const float* bias;  // or null
    void* output;
    bool streaming;  // as in CorrelateJob
    char* scratch;
    int threads;
    void* gelu = nullptr;  // like output: where its GELU by tanh goes; transposed, what the input was that of, whose
                           // gradient is then the output
};

// What a row of a matrix, or of its transpose, has in a chunk of features.
struct Run {
    uint32_t start;   // first block of the matrix, by its place in row (or column) order
    uint16_t row;     // in its block of rows
    uint16_t blocks;  // of the matrix, at least 1
};

// All runs, in groups: of a block of rows in a chunk of features. See sparse_linear_runs.h.
struct RunGroups {
    int64_t block_rows, chunk_features;  // at most, of a group
    int64_t blocks, chunks;
    const Run* runs;              // by block of rows, then by chunk
    const int64_t* starts;        // [blocks chunks + 1] of each group in `runs`
    const int64_t* entry_starts;  // [blocks chunks + 1] of each group in lists of all entries, with gaps
};

// As LinearJob, from panels in the L1 cache; the values are in row order, with the transpose, too.
struct LinearRunsJob {
    LinearJob linear;
    RunGroups groups;
    float* values;       // [entry_starts[blocks chunks]], of all entries as they are met
    uint16_t* features;  // the same, of their places in a chunk
};

// sums[k] = sum over tokens of grad[token][row of k] * input[token][col of k], in the layout of the values;
// bias_grad[row] = sum over tokens of grad[token][row].
struct LinearDotsJob {
    SparseMatrix matrix;
    int64_t tokens;
    bool bfloat16;  // grad and input, which are float32 otherwise
    const void *grad, *input;
    float* sums;
    float* bias_grad;  // [rows] or null
    char* scratch;
    int threads;
};

// See batch_norm_relu.h.
struct BatchNormReLU;
struct BatchNormReLUForward;
struct BatchNormReLUBackward;

// The kernels of one instruction set.
struct Kernels {
    const char* name;
    int64_t lanes;
    int64_t (*correlate_chunks)(const CorrelateJob&);   // what `chunks` should be, by everything else
    int64_t (*correlate_scratch)(const CorrelateJob&);  // bytes a thread, whole vectors
    void (*correlate)(const CorrelateJob&);
    int64_t (*correlate_dots_chunks)(const CorrelateDotsJob&);
    int64_t (*correlate_dots_scratch)(const CorrelateDotsJob&);  // bytes a thread, whole vectors
    void (*correlate_dots)(const CorrelateDotsJob&);
    int64_t (*flat_correlate_scratch)(const FlatCorrelateJob&);  // bytes a thread, whole cache lines
    void (*flat_correlate)(const FlatCorrelateJob&);
    int64_t (*flat_dots_scratch)(const FlatDotsJob&);  // bytes a thread, whole cache lines
    void (*flat_dots)(const FlatDotsJob&);
    void (*winograd_weight)(const WinogradWeight&);
    int64_t (*winograd_conv2d_scratch)(const WinogradConv2d&);  // bytes a thread, whole vectors
    void (*winograd_conv2d)(const WinogradConv2d&);
    int64_t (*winograd_weight_grad_scratch)(const WinogradWeightGrad&);  // bytes a thread, whole vectors
    void (*winograd_weight_grad)(const WinogradWeightGrad&);
    int64_t (*linear_scratch)(const LinearJob&);  // bytes in all
    void (*linear)(const LinearJob&);
    int64_t (*linear_runs_scratch)(const LinearRunsJob&);  // bytes a thread, whole vectors
    void (*linear_runs)(const LinearRunsJob&);
    int64_t (*linear_dots_scratch)(const LinearDotsJob&);  // bytes in all
    void (*linear_dots)(const LinearDotsJob&);
    int64_t (*batch_norm_relu_scratch)(const BatchNormReLU&);  // bytes in all
    void (*batch_norm_relu)(const BatchNormReLUForward&);
    void (*batch_norm_relu_backward)(const BatchNormReLUBackward&);
};

}  // namespace sparse_moon
