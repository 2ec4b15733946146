#include "dispatch.h"

#include <atomic>
#include <cstdint>
#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparse_moon {

namespace generic {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
#endif

namespace {

std::vector<const Kernels*> supported() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512) found.push_back(&avx512::kKernels);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kKernels);
#endif
    found.push_back(&generic::kKernels);
    return found;
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> kernels{supported().front()};
    return kernels;
}

// Bytes that a slot keeps for its next call. With none, each call has memory of its own, of just the size that it asked
// for: then a sanitizer sees what is read or written past the end, or after its time (tests/fuzz_ops.py).
#ifdef SPARSE_MOON_EXACT_SCRATCH
constexpr std::size_t kKept = 0;
#else
constexpr std::size_t kKept = std::size_t{64} << 20;
#endif

class Buffer {
public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { release(); }

    char* reserve(std::size_t bytes) {
        if (bytes > size_ || size_ > kKept) {
            release();
            data_ = static_cast<char*>(::operator new(bytes, kLine));
            size_ = bytes;
            expect_writes(data_, bytes);
        }
        return data_;
    }

private:
    static constexpr std::align_val_t kLine{64};

    void release() {
        ::operator delete(data_, kLine);
        data_ = nullptr;
        size_ = 0;
    }

    char* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Kernels* kernels : supported()) names.push_back(kernels->name);
    return names;
}

const char* vendor() {
#if defined(__x86_64__)
    if (__builtin_cpu_is("intel")) return "intel";
    if (__builtin_cpu_is("amd")) return "amd";
#endif
    return "other";
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) {
    for (const Kernels* kernels : supported()) {
        if (name == kernels->name) {
            chosen().store(kernels, std::memory_order_relaxed);
            return;
        }
    }
    throw std::invalid_argument("this processor has no " + name + " kernels");
}

void expect_writes(void* data, std::size_t bytes) {
#if defined(__linux__)
    constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
    const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(data), end = begin + bytes;
    const std::uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

char* scratch(Slot slot, std::size_t bytes) {
    thread_local Buffer buffers[static_cast<int>(Slot::kCount)];
    return buffers[static_cast<int>(slot)].reserve(bytes);
}

}  // namespace sparse_moon
