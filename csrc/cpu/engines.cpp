#include "cpu/engines.h"

#include <atomic>
#include <cstring>
#include <stdexcept>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace federa {
namespace {

const Engine* const all[] = {&amx, &avx512, &avx2};  // best first

std::atomic<const Engine*>& chosen() {
    static std::atomic<const Engine*> engine = [] {
        for (const Engine* each : all)
            if (each->available()) return each;
        return static_cast<const Engine*>(nullptr);
    }();
    return engine;
}

const Engine& current() {
    if (const Engine* engine = chosen()) return *engine;
    throw std::runtime_error("no engine runs on this processor; engine() says so");
}

const Engine& current_for(Kind x) {
    const Engine& engine = current();
    if (x == Kind::bfloat16 && !engine.bfloat16_rows) throw std::runtime_error("this engine takes float32 rows alone");
    return engine;
}

// A large result is fresh memory more often than not; in huge pages its first write takes half the time (2 x 6 MiB:
// 1.4 instead of 2.9 ms, 2026-11-22). Advice only: where the system knows better, nothing happens.
void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t size) {
#ifdef __linux__
    constexpr std::uintptr_t page = 4096;
    if (size < std::size_t{4} << 20) return;
    const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
    const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + size) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

std::vector<const char*> engines() {
    std::vector<const char*> names;
    for (const Engine* each : all)
        if (each->available()) names.push_back(each->name);
    return names;
}

const char* engine() {
    const Engine* engine = chosen();
    return engine ? engine->name : "none";
}

bool set_engine(const char* name) {
    const Engine* found = nullptr;
    for (const Engine* each : all)
        if (!std::strcmp(each->name, name) && each->available()) found = each;
    if (found || !std::strcmp(name, "none")) chosen() = found;
    return found || !std::strcmp(name, "none");
}

std::size_t packed_bytes(Kind kind, std::int64_t columns, std::int64_t depth) {
    return current().packed_bytes(kind, columns, depth);
}

void pack(const void* source, Kind kind, std::int64_t columns, std::int64_t column_stride, std::int64_t depth,
          std::int64_t depth_stride, void* packed, int threads) {
    current().pack(source, kind, columns, column_stride, depth, depth_stride, packed, threads);
}

void low_rank_linear(const void* x, Kind kind, std::int64_t rows, std::int64_t depth, std::int64_t x_stride,
                     const std::vector<Projection>& projections, const Clients& clients, bool accumulate,
                     int threads) {
    for (const Projection& p : projections)
        if (p.packed && !accumulate) advise_huge_pages(p.out, rows * p.columns * (kind == Kind::float32 ? 4 : 2));
    current_for(kind).low_rank_linear(x, kind, rows, depth, x_stride, projections, clients, accumulate, threads);
}

void low_rank_gradient(const void* h, std::int64_t h_stride, std::int64_t rank, const void* x, Kind kind,
                       std::int64_t columns, std::int64_t x_stride, const Clients& clients, float scaling,
                       float* gradient, std::int64_t client_stride, std::int64_t rank_stride,
                       std::int64_t column_stride, int threads) {
    current_for(kind).low_rank_gradient(h, h_stride, rank, x, kind, columns, x_stride, clients, scaling, gradient,
                                        client_stride, rank_stride, column_stride, threads);
}

}  // namespace federa
