// Runs the CUDA kernels of sparse_linear on the host (cuda_on_host.h) and compares them with sums in double; checks the
// host's plans. Built and started by test_cuda_sparse_linear.py.
#include "cuda_on_host.h"

#include <cmath>
#include <random>
#include <string>

#include "cuda/sparse_linear.cu"

using namespace sparse_moon::cuda;

namespace {

void check(bool condition, const std::string& what) {
    if (condition) return;
    std::printf("failed: %s\n", what.c_str());
    std::exit(1);
}

std::mt19937 generator(1);

struct Matrix {
    int64_t rows, cols;
    std::vector<int32_t> row_ptr, col, row, t_ptr, t_row, t_perm;
    int64_t n() const { return static_cast<int64_t>(col.size()); }
};

// Row r keeps density(r) of its columns.
template <class Density>
Matrix random_matrix(int64_t rows, int64_t cols, Density density) {
    std::uniform_real_distribution<double> uniform;
    Matrix m{rows, cols, {0}, {}, {}, {}, {}, {}};
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) {
            if (uniform(generator) < density(r)) {
                m.col.push_back(static_cast<int32_t>(c));
                m.row.push_back(static_cast<int32_t>(r));
            }
        }
        m.row_ptr.push_back(static_cast<int32_t>(m.col.size()));
    }
    m.t_ptr.push_back(0);
    for (int64_t c = 0; c < cols; ++c) {
        for (size_t e = 0; e < m.col.size(); ++e) {
            if (m.col[e] == c) {
                m.t_row.push_back(m.row[e]);
                m.t_perm.push_back(static_cast<int32_t>(e));
            }
        }
        m.t_ptr.push_back(static_cast<int32_t>(m.t_perm.size()));
    }
    return m;
}

// n elements on the heap, so that one element too far is seen.
template <class T>
std::unique_ptr<T[]> exactly(const std::vector<T>& values) {
    std::unique_ptr<T[]> copy(new T[values.size()]);
    std::copy(values.begin(), values.end(), copy.get());
    return copy;
}

template <class T>
std::vector<T> random_values(int64_t n) {
    std::normal_distribution<float> normal;
    std::vector<T> values(n);
    for (T& x : values) x = from_float<T>(normal(generator));
    return values;
}

std::unique_ptr<uint4[]> workspace(int64_t bytes) {
    std::unique_ptr<uint4[]> memory(new uint4[ceil_div(bytes, 16)]);
    std::memset(memory.get(), 0xff, ceil_div(bytes, 16) * 16);
    return memory;
}

template <class T>
constexpr DType kDType = std::is_same_v<T, float>    ? DType::float32
                         : std::is_same_v<T, __half> ? DType::float16
                                                     : DType::bfloat16;

// Relative rounding of the output type, and of fp32 sums.
template <class T>
constexpr double kRounding = std::is_same_v<T, float> ? 0.0 : std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;

template <class T>
void compare(const T* got, const std::vector<double>& expected, const std::vector<double>& scale,
             const std::string& what) {
    for (size_t i = 0; i < expected.size(); ++i) {
        const double error = std::abs(static_cast<double>(to_float(got[i])) - expected[i]);
        const double allowed = 4e-6 * scale[i] + kRounding<T> * std::abs(expected[i]) + 1e-7;
        check(error <= allowed, what + " at " + std::to_string(i));
    }
}

template <class T>
void check_products(const Matrix& m, int64_t tokens, bool with_bias, const std::string& name) {
    constexpr DType kType = kDType<T>;
    const auto values = random_values<T>(m.n()), bias = random_values<T>(m.rows);
    const auto x = random_values<T>(tokens * m.cols), dy = random_values<T>(tokens * m.rows);
    std::vector<double> y(tokens * m.rows), dx(tokens * m.cols), dv(m.n());
    std::vector<double> y_scale(y.size()), dx_scale(dx.size()), dv_scale(dv.size());
    const auto add = [](double& sum, double& scale, double product) {
        sum += product;
        scale += std::abs(product);
    };
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t r = 0; with_bias && r < m.rows; ++r) {
            add(y[t * m.rows + r], y_scale[t * m.rows + r], to_float(bias[r]));
        }
        for (int64_t e = 0; e < m.n(); ++e) {
            const int64_t out = t * m.rows + m.row[e], in = t * m.cols + m.col[e];
            const double v = to_float(values[e]), xe = to_float(x[in]), dye = to_float(dy[out]);
            add(y[out], y_scale[out], v * xe);
            add(dx[in], dx_scale[in], v * dye);
            add(dv[e], dv_scale[e], xe * dye);
        }
    }

    const auto d_values = exactly(values), d_bias = exactly(bias), d_x = exactly(x), d_dy = exactly(dy);
    const auto row_ptr = exactly(m.row_ptr), col = exactly(m.col);
    const auto t_ptr = exactly(m.t_ptr), t_row = exactly(m.t_row), t_perm = exactly(m.t_perm);
    const auto got_y = exactly(random_values<T>(y.size())), got_dx = exactly(random_values<T>(dx.size()));
    const auto got_dv = exactly(random_values<T>(m.n())), again = exactly(random_values<T>(m.n()));

    auto memory = workspace(sparse_product_workspace(kType, tokens, m.rows, m.cols, m.n()));
    sparse_product(kType, tokens, {m.rows, m.cols, m.n(), row_ptr.get(), col.get(), nullptr}, d_values.get(),
                   with_bias ? d_bias.get() : nullptr, d_x.get(), got_y.get(), memory.get(), nullptr);
    compare(got_y.get(), y, y_scale, name + " output");

    memory = workspace(sparse_product_workspace(kType, tokens, m.cols, m.rows, m.n()));
    sparse_product(kType, tokens, {m.cols, m.rows, m.n(), t_ptr.get(), t_row.get(), t_perm.get()}, d_values.get(),
                   nullptr, d_dy.get(), got_dx.get(), memory.get(), nullptr);
    compare(got_dx.get(), dx, dx_scale, name + " input gradient");

    for (T* got : {got_dv.get(), again.get()}) {
        memory = workspace(sparse_values_grad_workspace(kType, tokens, m.rows, m.cols, m.n()));
        sparse_values_grad(kType, tokens, {m.rows, m.cols, m.n(), row_ptr.get(), col.get(), nullptr}, d_dy.get(),
                           d_x.get(), got, memory.get(), nullptr);
        compare(got, dv, dv_scale, name + " values' gradient");
    }
    check(std::memcmp(got_dv.get(), again.get(), m.n() * sizeof(T)) == 0, name + " equal bits");
}

// A missing weight is not a zero: an infinite input that no weight reads leaves no trace, padding included.
void check_not_finite() {
    const int32_t ptr[] = {0, 1, 1}, col[] = {1};
    const float values[] = {10.0f}, x[] = {INFINITY, 2.0f, NAN, 3.0f};
    float y[] = {NAN, NAN, NAN, NAN};
    const auto memory = workspace(sparse_product_workspace(DType::float32, 2, 2, 2, 1));
    sparse_product(DType::float32, 2, {2, 2, 1, ptr, col, nullptr}, values, nullptr, x, y, memory.get(), nullptr);
    check(y[0] == 20.0f && y[1] == 0.0f && y[2] == 30.0f && y[3] == 0.0f, "inputs that are not finite");
}

void check_chunks() {
    for (int64_t columns : {0, 1, 703, 704, 705, 1408, 1409, 4096, 500000, 10000000}) {
        const Chunks c = chunks_of(columns, 704);
        check(c.count >= 1 && c.columns <= 704 && c.count * c.columns >= columns, "chunks cover the columns");
        check(columns == 0 || (c.count - 1) * c.columns < columns, "no chunk is empty");
    }
}

// The bound behind first_group, for slices with every split of up to 9 entries over 4 rows and 3 chunks, after any
// number of entries.
void check_first_group() {
    constexpr int kChunks = 3;
    for (int before = 0; before < 3; ++before) {
        for (int code = 0; code < 4096; ++code) {
            int entries = 0, groups = 0;
            for (int chunk = 0; chunk < kChunks; ++chunk) {
                const int shape = code >> (4 * chunk) & 15;  // longest row, and whether the others have one each
                const int longest = shape / 2, others = shape % 2 && longest ? 3 : 0;
                entries += longest + others;
                groups += std::max(1, (longest + kGroupSteps - 1) / kGroupSteps);
            }
            check(first_group(5, before, kChunks) + groups <= first_group(6, before + entries, kChunks),
                  "a slice's groups end before the next slice's begin");
        }
    }
}

void check_plans() {
    constexpr int64_t kHopper = 132, kHopperShared = 227 * 1024, kMultiprocessorShared = 228 * 1024;
    constexpr int64_t kAda = 142, kAdaShared = 99 * 1024;
    for (DType type : {DType::float32, DType::float16, DType::bfloat16}) {
        for (int64_t tokens : {1, 31, 64, 4096, 100000}) {
            for (int64_t rows : {1, 63, 512, 4096, 20000}) {
                for (int64_t cols : {1, 257, 1024, 4096, 20000}) {
                    for (double density : {0.0, 0.01, 0.1, 1.0}) {
                        const auto n = static_cast<int64_t>(density * static_cast<double>(rows * cols));
                        const ProductPlan p = product_plan(type, tokens, rows, cols, n, kHopper, kHopperShared);
                        check(p.rows_per_block * p.row_groups >= rows, "blocks cover the rows");
                        check(p.rows_per_block * (p.row_groups - 1) < rows, "no block without rows");
                        check(2 * (p.shared_bytes + 1024) <= kMultiprocessorShared, "two blocks fit");
                        check(p.pairs >= p.pointers + p.slices * (p.chunks.count + 1) * 4, "parts do not overlap");
                        const ValuesGradPlan g = values_grad_plan(type, tokens, rows, cols, n, kHopper, kHopperShared);
                        check(g.rows_per_block * g.row_blocks >= rows && g.rows_per_block <= kGradRows, "rows");
                        check(g.tiles_per_split * g.splits >= g.tiles, "ranges cover the tiles");
                        check(g.tiles_per_split * (g.splits - 1) < g.tiles, "no range without tiles");
                        check(g.shared_bytes <= kHopperShared && 2 * (g.shared_bytes + 1024) <= kMultiprocessorShared,
                              "two blocks fit");
                        check(g.workspace_bytes - g.partials == (g.splits > 1 ? g.splits * n * 4 : 0), "partial sums");
                        const ProductPlan q = product_plan(type, tokens, rows, cols, n, kAda, kAdaShared);
                        const ValuesGradPlan h = values_grad_plan(type, tokens, rows, cols, n, kAda, kAdaShared);
                        check(std::max(q.shared_bytes, h.shared_bytes) <= kAdaShared, "a block fits");
                    }
                }
            }
        }
    }
    // 90 % of 4096 x 4096 in fp32, 4096 tokens
    const ProductPlan p = product_plan(DType::float32, 4096, 4096, 4096, 1677722, kHopper, kHopperShared);
    check(p.large && p.tiles == 128 && p.rows_per_block == 512 && p.chunks.count == 5, "large product");
    check(!product_plan(DType::float32, 128, 1024, 1024, 100000, kHopper, kHopperShared).large, "few tokens");
    const ValuesGradPlan g = values_grad_plan(DType::float32, 4096, 4096, 4096, 167772, kHopper, kHopperShared);
    check(g.splits > 1, "few entries are split");
    check(product_plan(DType::float32, 64, 8, 4096, 9, kAda, kAdaShared).chunks.columns == 683, "six chunks");
    check(values_grad_plan(DType::float32, 64, 8, 4096, 9, kAda, kAdaShared).chunks.columns == 586, "seven chunks");
}

template <class T>
void check_type(const std::string& type) {
    const auto share = [](double density) { return [density](int64_t) { return density; }; };
    // one full row between empty ones; and rows from empty to full, so that the rows of a slice differ
    const auto one_row = [](int64_t r) { return r == 3 ? 1.0 : 0.0; };
    const auto ramp = [](int64_t r) { return r % 8 / 7.0; };
    check_products<T>(random_matrix(5, 7, share(0.5)), 3, true, type + " small");
    check_products<T>(random_matrix(70, 45, ramp), 33, true, type + " ramp");
    check_products<T>(random_matrix(9, 1801, share(0.3)), 67, true, type + " chunks of columns");
    if (!std::is_same_v<T, float>) return;
    check_products<T>(random_matrix(1, 1, share(1.0)), 1, true, type + " single");
    check_products<T>(random_matrix(6, 4, share(0.0)), 5, true, type + " empty");
    check_products<T>(random_matrix(7, 33, one_row), 65, false, type + " one row");
    check_products<T>(random_matrix(130, 257, share(0.1)), 130, true, type + " odd");
    check_products<T>(random_matrix(1801, 9, share(0.3)), 31, false, type + " chunks of rows");
    check_products<T>(random_matrix(5, 4, share(0.5)), 0, true, type + " no tokens");
    // many entries in few rows: more items than a round has, after a plan for the average
    check_products<T>(random_matrix(700, 300, [](int64_t r) { return r < 60 ? 1.0 : 0.002; }), 33, false,
                      type + " rounds");
    // blocks of many rows
    cuda_on_host::multiprocessor_count = 1;
    check_products<T>(random_matrix(601, 95, share(0.05)), 67, true, type + " large blocks");
    cuda_on_host::multiprocessor_count = 4;
    // little shared memory
    cuda_on_host::block_bytes = 99 * 1024;
    check_products<T>(random_matrix(9, 1500, share(0.05)), 67, true, type + " small chunks");
    cuda_on_host::block_bytes = 227 * 1024;
}

}  // namespace

int main() {
    check_chunks();
    check_first_group();
    check_plans();
    check_not_finite();
    check_type<float>("fp32");
    check_type<__half>("fp16");
    check_type<__nv_bfloat16>("bf16");
    std::puts("all good");
    return 0;
}
