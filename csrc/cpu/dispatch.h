// Which instruction set the kernels use, and the scratch memory that they share.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

#include "jobs.h"

namespace sparse_moon {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Names of what this processor can run, best first: of "avx512", "avx2" and "generic".
std::vector<std::string> supported_isas();

// Who made this processor: "intel", "amd" or "other".
const char* vendor();

// The kernels in use: the best that the processor supports, unless set_isa() chose others.
const Kernels& kernels();

// Use the kernels of this name in all threads, from the next call on; for tests and measurements.
// Throws std::invalid_argument for a name that is not among supported_isas().
void set_isa(const std::string& name);

// Results from this size on are written past the caches. Written through them, the lanes' lines, which lie a power of
// two apart, evict each other half written: 128 x 128 x 16 x 16 at 99 % sparsity takes 5.5 ms instead of 3.9.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// Asks for large pages under a result that is about to be written. Memory fresh from the system costs a page fault
// every 4 KB otherwise: 12 ms for 32 MB, against 3 ms.
void expect_writes(void* data, std::size_t bytes);

// At least `bytes` of uninitialised memory, aligned to a cache line, for the calling thread; valid until its next call
// with the same slot. Up to 64 MB a slot are kept for all next times, because fresh pages cost more than small kernels;
// larger ones are given back at the next call.
// Slots: what one operation holds at the same time.
enum class Slot { kKernel, kLists, kSums, kColumns, kCount };
char* scratch(Slot slot, std::size_t bytes);

}  // namespace sparse_moon
