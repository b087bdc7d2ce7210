// Every kernel of csrc/cuda/lora_linear_sm90.cu over buffers that end where their tensors do: a program to build with the
// address sanitizer, which stops it at the first byte beyond one, or beyond the shared memory that a launch asked for.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "buffer.h"
#include "cuda/lora_linear_sm90.h"

namespace {

using namespace federa;
using federa::mma_kernels::Index, federa::mma_kernels::bfloat16, federa::mma_kernels::float32;

struct Tile {
    Index BM, BN, cluster, splits;
};

void product(Index M, Index N, Index K, Index R, Tile tile, bool along_n, std::vector<std::int32_t> offsets = {}) {
    const bool clients = !offsets.empty();
    const Index C = clients ? static_cast<Index>(offsets.size()) - 1 : 1, spread = sm90_kernels::spread(M, C - 1);
    const Index padded = (R + 7) / 8 * 8, width = along_n ? N : padded;
    const Buffer<std::uint16_t> x(M * K, one), W(N * K, one), out(M * N, 0), h(M * R, 0), low(spread * padded, 0);
    const Buffer<std::uint16_t> other(M * N, 0);
    const Buffer<std::uint16_t> scaled(C * (along_n ? R : N) * width, 0);
    const Buffer<float> down(2 * M * R, 1.0f), B(C * N * R, 1.0f), bias(N, 1.0f), add(C * N, 0.0f), scalings(C, 1.0f);
    const Buffer<std::int32_t> ranks(C, static_cast<std::int32_t>(R)), ends(C + 1, 0);
    std::copy(offsets.begin(), offsets.end(), static_cast<std::int32_t*>(ends));
    federa::mma_kernels::Segments segments{nullptr, nullptr, nullptr, 1};
    if (clients) segments = {ends, scalings, ranks, C};
    sm90_kernels::Low of{bfloat16, M, N, R, 2, down, R, low, padded, h, R, B, float32, N * R, 1, R, scaled, width,
                         along_n, 0.5, bias, float32, 0, clients ? static_cast<float*>(add) : nullptr, segments};
    const sm90_kernels::Lows lows{1, {of}};
    sm90_kernels::run("low", &lows, sizeof lows, nullptr);
    sm90_kernels::Gemm gemm{bfloat16, M, tile.BM, tile.BN, tile.cluster, tile.splits, along_n, 2, segments, {}, {}};
    gemm.products[0] = {out, clients ? add : bias, float32, N, 2};
    gemm.products[1] = {other, clients ? add : bias, float32, N, 1};
    gemm.pairs[0] = gemm.pairs[2] = {x, K, K, W, along_n ? N : K, false};
    gemm.pairs[1] = {low, R, padded, scaled, width, clients};
    sm90_kernels::run("gemm", &gemm, sizeof gemm, nullptr);
}

}  // namespace

int main() {
    product(70, 136, 104, 16, {128, 128, 1, 1}, false);
    product(130, 264, 392, 20, {128, 256, 2, 1}, true);
    product(300, 8, 72, 5, {128, 256, 2, 1}, false);
    product(1, 520, 8, 100, {128, 128, 2, 1}, true);
    product(200, 136, 200, 16, {64, 128, 2, 1}, false);
    product(200, 136, 200, 16, {64, 128, 2, 3}, true);
    product(130, 264, 72, 5, {128, 256, 1, 4}, false);
    product(300, 136, 72, 20, {128, 128, 2, 1}, false, {0, 100, 100, 299, 300});
    product(130, 264, 24, 5, {128, 256, 1, 1}, true, {0, 129, 130});
    product(130, 264, 24, 5, {64, 128, 1, 8}, true, {0, 129, 130});
    std::puts("nothing beyond its end");
}
