// Every kernel of csrc/cuda/lora_linear_sm90.cu over buffers that end where their tensors do: a program to build with the
// address sanitizer, which stops it at the first byte beyond one, or beyond the shared memory that a launch asked for.

#include <cstdint>
#include <cstdio>

#include "buffer.h"
#include "cuda/lora_linear_sm90.h"

namespace {

using namespace federa;
using federa::mma_kernels::Index, federa::mma_kernels::bfloat16, federa::mma_kernels::float32;

void product(Index M, Index N, Index K, Index R, Index BN, Index cluster, bool along_n) {
    const Index padded = (R + 7) / 8 * 8, width = along_n ? N : padded;
    const Buffer<std::uint16_t> x(M * K, one), W(N * K, one), out(M * N, 0), h(M * R, 0), low(M * padded, 0);
    const Buffer<std::uint16_t> scaled((along_n ? R : N) * width, 0);
    const Buffer<float> down(2 * M * R, 1.0f), B(N * R, 1.0f), bias(N, 1.0f);
    sm90_kernels::Low of{bfloat16, M, N, R, 2, down, R, low, padded, h, R, B, float32, 1, R, scaled, width, along_n, 0.5};
    sm90_kernels::run("low", &of, sizeof of, nullptr);
    sm90_kernels::Gemm gemm{bfloat16, M, N, BN, cluster, along_n, 2, out, bias, float32, {}};
    gemm.pairs[0] = {x, K, K, W, along_n ? N : K};
    gemm.pairs[1] = {low, R, padded, scaled, width};
    sm90_kernels::run("gemm", &gemm, sizeof gemm, nullptr);
}

}  // namespace

int main() {
    product(70, 136, 104, 16, 128, 1, false);
    product(130, 264, 392, 20, 256, 2, true);
    product(300, 8, 72, 5, 256, 2, false);
    product(1, 520, 8, 100, 128, 2, true);
    std::puts("nothing beyond its end");
}
