// Every kernel of csrc/cuda/lora_linear_mma.cu over buffers that end where their tensors do: a program to build with the
// address sanitizer, which stops it at the first byte beyond one, or beyond the shared memory that a launch asked for.

#include <cstdint>
#include <cstdio>
#include <vector>

#include "buffer.h"
#include "cuda/lora_linear_mma.h"

namespace {

using namespace federa::mma_kernels;

void step(Index M, Index N, Index K, Index R, Index BM, std::vector<std::int32_t> offsets) {
    const Index C = static_cast<Index>(offsets.size()) - 1, BN = R > 32 ? 128 : 256, slabs = (N + BN - 1) / BN;
    const Index chunk = 64, pieces = (M + chunk - 1) / chunk + C - 1;
    const Buffer<std::uint16_t> x(M * K, one), W(N * K, one), A(C * R * K, one), dy(M * N, one);
    const Buffer<float> B(C * N * R, 1.0f), bias(N, 1.0f), scalings(C, 1.0f);
    const Buffer<std::int32_t> ranks(C, static_cast<std::int32_t>(R)), ends(C + 1, 0);
    for (Index c = 0; c <= C; ++c) ends[c] = offsets[static_cast<std::size_t>(c)];
    const Buffer<std::uint16_t> y(M * N, 0), h(M * R, 0), dx(M * K, 0), dh(M * R, 0);
    const Buffer<float> parts(2 * M * R, 0.0f), dh_parts(slabs * M * R, 0.0f);
    const Index size_A = R * K, size_B = N * R, size = size_A + size_B + N;
    const Buffer<float> found(pieces * size, 0.0f), sums(C * size, 0.0f);
    const Segments of{ends, scalings, ranks, C}, unscaled{ends, nullptr, ranks, C};

    const Index columns = (K + 127) / 128 * 64, splits = (K + columns - 1) / columns;
    Down down{bfloat16, M, K, R, splits, columns, x, K, A, bfloat16, R * K, K, 1, parts, 1.0, unscaled};
    run("down", &down, sizeof down, nullptr);

    Gemm gemm{bfloat16, M, N, BM, BM, 1, y, h, R, bias, float32, 0, of, {}};
    gemm.terms[0] = {x, K, K, W, bfloat16, 1, K, parts, splits, R, R, B, float32, N * R, 1, R, 1.0};
    run("gemm", &gemm, sizeof gemm, nullptr);

    Columns over_dy{bfloat16, M, N, R, chunk, BN, dy, N, h, R, B, float32, N * R, R, 1, dh_parts,
                    found + size_A, R, 1, found + size_A + size_B, size, 1.0, of};
    if (R > 32) over_dy.dh_parts = nullptr;
    run("columns", &over_dy, sizeof over_dy, nullptr);

    gemm = {bfloat16, M, K, BM, BM, 1, dx, dh, R, nullptr, 0, 0, unscaled, {}};
    gemm.terms[0] = {dy, N, N, W, bfloat16, K, 1, dh_parts, slabs, R, R, A, bfloat16, R * K, K, 1, 1.0};
    run("gemm", &gemm, sizeof gemm, nullptr);

    Columns over_x{bfloat16, M, K, R, chunk, BN, x, K, dh, R, nullptr, 0, 0, 0, 0, nullptr,
                   found, 1, K, nullptr, size, 1.0, {ends, nullptr, nullptr, C}};
    run("columns", &over_x, sizeof over_x, nullptr);

    Sum sum{found, sums, ends, M, C, chunk, size_A, size_B, N};
    run("sum", &sum, sizeof sum, nullptr);
}

}  // namespace

int main() {
    step(70, 136, 104, 16, 64, {0, 70});
    step(70, 136, 104, 24, 128, {0, 1, 1, 65, 70});
    step(67, 129, 37, 5, 64, {0, 30, 67});
    step(66, 72, 40, 100, 64, {0, 66});
    std::puts("nothing beyond its end");
}
