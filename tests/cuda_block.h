// A block of CUDA threads on the host, for kernels whose threads have one dimension and whose blocks are whole warps.
// Threads are fibers, which pass control on at barriers and warp-wide operations; every lane takes part in those. Lanes,
// warps and blocks run in ascending, descending or random order, and a warp as far as it can before the next, so that a
// missing barrier shows as a wrong result and one that some threads miss as a deadlock. Blocks do not overlap in time.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace cuda_on_host {

struct Index {
    uint32_t x, y, z;
};

inline Index thread_index, block_index;
inline std::mt19937 generator(1);

inline void expect(bool condition, const char* what) {
    if (condition) return;
    std::printf("failed: %s\n", what);
    std::exit(1);
}

// 0, ..., size - 1 in ascending, descending or random order.
inline std::vector<uint32_t> some_order(uint32_t size) {
    std::vector<uint32_t> order(size);
    std::iota(order.begin(), order.end(), 0u);
    const uint32_t kind = generator() % 3;
    if (kind == 1) std::reverse(order.begin(), order.end());
    if (kind == 2) std::shuffle(order.begin(), order.end(), generator);
    return order;
}

// A place to go back to, on whichever stack. (swapcontext would do, but makes two system calls each time.)
struct Place {
    void* registers[5];
};

// Callers must not rely on any register, and the address sanitizer must not take a jump for the end of frames.
#define JUMPS __attribute__((noinline, noipa, no_sanitize("address", "undefined")))

JUMPS inline void go_to(Place& place) { __builtin_longjmp(place.registers, 1); }

JUMPS inline void go_to(Place& place, Place& back) {
    if (__builtin_setjmp(back.registers) == 0) go_to(place);
}

// The block that is running.
class Block {
public:
    enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

    void run(uint32_t threads, const std::function<void()>& kernel) {
        expect(threads > 0 && threads % 32 == 0, "whole warps");
        kernel_ = &kernel;
        while (fibers_.size() < threads) start();
        states_.assign(threads, State::kReady);
        const std::vector<uint32_t> warps = some_order(threads / 32), lanes = some_order(32);
        while (std::count(states_.begin(), states_.end(), State::kDone) < threads) {
            bool progress = false;
            for (const uint32_t w : warps) {
                do {
                    for (const uint32_t lane : lanes) {
                        thread_index.x = 32 * w + lane;
                        if (states_[thread_index.x] != State::kReady) continue;
                        progress = true;
                        go_to(fibers_[thread_index.x].place, scheduler_);
                    }
                } while (release(State::kAtWarpBarrier, 32 * w, 32 * w + 32));
            }
            progress |= release(State::kAtBlockBarrier, 0, threads);
            expect(progress, "a barrier that not all threads reach");
        }
    }

    void wait(State at) {
        const uint32_t t = thread_index.x;
        states_[t] = at;
        go_to(scheduler_, fibers_[t].place);
    }

    // The values of 4 bytes that the lanes of this warp have brought.
    template <class T>
    std::array<T, 32> exchange(T value) {
        static_assert(sizeof(T) == 4, "");
        const uint32_t t = thread_index.x;
        std::memcpy(&fibers_[t].value, &value, 4);
        wait(State::kAtWarpBarrier);
        std::array<T, 32> values;
        for (uint32_t lane = 0; lane < 32; ++lane) std::memcpy(&values[lane], &fibers_[t / 32 * 32 + lane].value, 4);
        wait(State::kAtWarpBarrier);
        return values;
    }

private:
    struct Fiber {
        Place place;
        uint32_t value;
        std::unique_ptr<char[]> stack;
    };

    // Runs one kernel after the other, each up to its end.
    static void live();

    // A new fiber that waits for its first kernel.
    JUMPS void start() {
        constexpr size_t kStack = 1 << 17;
        thread_index.x = static_cast<uint32_t>(fibers_.size());
        fibers_.push_back({{}, 0, std::unique_ptr<char[]>(new char[kStack])});
        states_.resize(fibers_.size());
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = fibers_.back().stack.get();
        context.uc_stack.ss_size = kStack;
        makecontext(&context, &Block::live, 0);
        if (__builtin_setjmp(scheduler_.registers) == 0) setcontext(&context);
    }

    bool release(State at, uint32_t first, uint32_t last) {
        for (uint32_t t = first; t < last; ++t) {
            if (states_[t] != at) return false;
        }
        std::fill(states_.begin() + first, states_.begin() + last, State::kReady);
        return true;
    }

    const std::function<void()>* kernel_;
    Place scheduler_;
    std::deque<Fiber> fibers_;
    std::vector<State> states_;
};

inline Block block;

inline void Block::live() {
    for (;;) {
        block.wait(State::kDone);
        (*block.kernel_)();
    }
}

}  // namespace cuda_on_host

#define threadIdx cuda_on_host::thread_index
#define blockIdx cuda_on_host::block_index

inline void __syncthreads() { cuda_on_host::block.wait(cuda_on_host::Block::State::kAtBlockBarrier); }
inline void __syncwarp() { cuda_on_host::block.wait(cuda_on_host::Block::State::kAtWarpBarrier); }

template <class T>
T __shfl_sync(unsigned, T value, uint32_t lane) {
    return cuda_on_host::block.exchange(value)[lane % 32];
}

template <class T>
T __shfl_up_sync(unsigned, T value, uint32_t distance) {
    const auto values = cuda_on_host::block.exchange(value);
    const uint32_t lane = threadIdx.x % 32;
    return lane < distance ? value : values[lane - distance];
}

template <class T>
T __shfl_xor_sync(unsigned, T value, uint32_t lanes) {
    return cuda_on_host::block.exchange(value)[threadIdx.x % 32 ^ lanes];
}

inline uint32_t __ballot_sync(unsigned, bool value) {
    const auto values = cuda_on_host::block.exchange(static_cast<uint32_t>(value));
    uint32_t word = 0;
    for (uint32_t lane = 0; lane < 32; ++lane) word |= values[lane] << lane;
    return word;
}

template <class T>
T __ldg(const T* address) {
    return *address;
}
