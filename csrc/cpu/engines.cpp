#include "cpu/engines.h"

#include <atomic>
#include <cstring>
#include <memory>
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

void low_rank_backward(const Layer& l, Kind kind, std::int64_t rows, Rows dy, Rows x, Rows h, const Clients& clients,
                       bool accumulate, void* dx, float* dA, float* dB, int threads) {
    const std::unique_ptr<float[]> dh(new float[dx || dA ? rows * l.rank : 0]);  // room for either kind
    if (dx || dA) {
        Projection p{};
        p.packed = dx ? l.packed : nullptr, p.kind = l.kind, p.columns = l.depth, p.rank = l.rank, p.scaling = l.scaling;
        p.down = l.B, p.down_client = l.B_client, p.down_rank = l.B_rank, p.down_depth = l.B_column;
        p.up = l.A, p.up_client = l.A_client, p.up_column = l.A_depth, p.up_rank = l.A_rank;
        p.out = dx, p.h = dh.get(), p.h_stride = l.rank;
        low_rank_linear(dy.data, kind, rows, l.columns, dy.stride, {p}, clients, accumulate, threads);
    }
    if (dA)
        low_rank_gradient(dh.get(), l.rank, l.rank, x.data, kind, l.depth, x.stride, clients, l.scaling, dA,
                          l.rank * l.depth, l.depth, 1, threads);
    if (dB)
        low_rank_gradient(h.data, h.stride, l.rank, dy.data, kind, l.columns, dy.stride, clients, l.scaling, dB,
                          l.columns * l.rank, 1, l.rank, threads);
}

}  // namespace federa
