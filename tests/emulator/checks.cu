// Kernels that prove the emulator: what it must compute, and what it must catch.

#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace {

using namespace federa;

// 32 rows of 8 entries, as four matrices; out (32, 4, 2): what each lane gets.
__global__ void load_matrices(const std::uint16_t* in, std::uint16_t* out, bool transposed) {
    auto* tile = reinterpret_cast<std::uint16_t*>(shared_memory());
    for (int i = 0; i < 8; ++i) tile[8 * threadIdx.x + i] = in[8 * threadIdx.x + i];
    __syncwarp();
    std::uint32_t r[4];
    if (transposed)
        ldmatrix_transposed(r, tile + 8 * threadIdx.x);
    else
        ldmatrix(r, tile + 8 * threadIdx.x);
    for (int i = 0; i < 4; ++i) reinterpret_cast<std::uint32_t*>(out)[4 * threadIdx.x + i] = r[i];
}

// a (32, 4) and b (32, 2) pairs, c (32, 4).
template <class T>
__global__ void multiply_add(const std::uint32_t* a, const std::uint32_t* b, float* c) {
    const unsigned l = threadIdx.x;
    const std::uint32_t fragment[4] = {a[4 * l], a[4 * l + 1], a[4 * l + 2], a[4 * l + 3]};
    float sums[4] = {c[4 * l], c[4 * l + 1], c[4 * l + 2], c[4 * l + 3]};
    mma<T>(sums, fragment, b[2 * l], b[2 * l + 1]);
    for (int i = 0; i < 4; ++i) c[4 * l + i] = sums[i];
}

// out (7, threads): one row for each kind of shuffle and vote.
__global__ void shuffles(const int* in, int* out) {
    const int at = threadIdx.x + blockDim.x * threadIdx.y, count = blockDim.x * blockDim.y;
    out[at] = __shfl_xor_sync(~0u, in[at], 5);
    out[count + at] = __shfl_down_sync(~0u, in[at], 3);
    out[2 * count + at] = __shfl_sync(~0u, in[at], 7);
    out[3 * count + at] = __shfl_up_sync(~0u, in[at], 2, 8);
    out[4 * count + at] = static_cast<int>(__ballot_sync(~0u, in[at] % 3 == 0));
    out[5 * count + at] = __syncthreads_or(in[at] == 60);
    out[6 * count + at] = __syncthreads_or(in[at] == 61);
}

// out (blocks, threads): the block's numbers in reverse, through static shared memory.
__global__ void reverse(const float* in, float* out, bool barrier) {
    __shared__ float tile[96];
    const unsigned at = threadIdx.x;
    tile[at] = in[blockIdx.x * blockDim.x + at];
    if (barrier) __syncthreads();
    out[blockIdx.x * blockDim.x + at] = tile[blockDim.x - 1 - at];
}

// out (threads, 4): 16 bytes of each thread, the last `short_by` left out.
__global__ void copy(const float* in, float* out, int groups, int short_by, bool wait) {
    auto* tile = reinterpret_cast<float*>(shared_memory()) + 4 * threadIdx.x;
    copy_async(tile, in + 4 * threadIdx.x, 16 - short_by);
    copy_commit();
    for (int i = 1; i < groups; ++i) copy_commit();
    if (wait) copy_wait<1>();
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = tile[i];
}

__global__ void half_a_barrier() {
    if (threadIdx.x < 40) __syncthreads();
}

__global__ void lane_that_ended(int* out) {
    if (threadIdx.x == 3) return;
    out[threadIdx.x] = __shfl_sync(~0u, out[threadIdx.x], 0);
}

__global__ void two_operations(int* out) {
    if (threadIdx.x % 2)
        out[threadIdx.x] = __shfl_sync(~0u, out[threadIdx.x], 0);
    else
        __syncwarp();
}

__global__ void unaligned_row() {
    std::uint32_t r[4];
    ldmatrix(r, shared_memory() + 2);
}

enum class Mistake { none, reads_early, writes_early, waits_never };

// out = in + 1, in blocks of 64.
__global__ void add_one(float* in, float* out, Mistake mistake) {
    let_next_begin();
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    const float early = mistake == Mistake::reads_early ? in[at] : 0.0f;
    if (mistake == Mistake::writes_early) in[at] = -1.0f;
    if (mistake != Mistake::waits_never) wait_for_earlier();
    out[at] = 1.0f + (mistake == Mistake::reads_early ? early : in[at]);
}

}  // namespace

// numbers (4,192): three kernels that follow each other, each from one row to the next; the last makes the mistake.
EXPORTED const char* check_following(float* numbers, int mistake) {
    return emulator::guarded([&] {
        for (int i = 0; i < 3; ++i)
            launch(add_one, 3, 64, 0, Stream(nullptr, i > 0), numbers + 192 * i, numbers + 192 * (i + 1),
                   i == 2 ? static_cast<Mistake>(mistake) : Mistake::none);
    });
}

EXPORTED const char* check_load_matrices(const std::uint16_t* in, std::uint16_t* out, bool transposed) {
    return emulator::guarded([&] { launch(load_matrices, 1, 32, 512, nullptr, in, out, transposed); });
}

EXPORTED const char* check_multiply_add(bool half, const std::uint32_t* a, const std::uint32_t* b, float* c) {
    const auto kernel = half ? multiply_add<__half> : multiply_add<__nv_bfloat16>;
    return emulator::guarded([&] { launch(kernel, 1, 32, 0, nullptr, a, b, c); });
}

EXPORTED const char* check_shuffles(const int* in, int* out) {
    return emulator::guarded([&] { launch(shuffles, 1, dim3(16, 4), 0, nullptr, in, out); });
}

EXPORTED const char* check_reverse(const float* in, float* out, bool barrier) {
    return emulator::guarded([&] { launch(reverse, 3, 96, 0, nullptr, in, out, barrier); });
}

EXPORTED const char* check_copy(const float* in, float* out, int groups, int short_by, bool wait) {
    return emulator::guarded([&] { launch(copy, 1, 32, 512, nullptr, in, out, groups, short_by, wait); });
}

EXPORTED const char* check_failure(int which, int* out) {
    return emulator::guarded([&] {
        if (which == 0) launch(half_a_barrier, 2, 64, 0, nullptr);
        if (which == 1) launch(lane_that_ended, 1, 32, 0, nullptr, out);
        if (which == 2) launch(two_operations, 1, 32, 0, nullptr, out);
        if (which == 3) launch(unaligned_row, 1, 32, 1024, nullptr);
        if (which == 4) launch(half_a_barrier, dim3(1, 65536), 32, 0, nullptr);
        if (which == 5) launch(half_a_barrier, 1, 32, 200'000, nullptr);
        if (which == 6) launch(lane_that_ended, 1, 24, 0, nullptr, out);
    });
}

// Rounds to bfloat16 and back.
EXPORTED void round_bfloat16(const float* in, float* out, long count) {
    for (long i = 0; i < count; ++i) out[i] = __bfloat162float(__float2bfloat16_rn(in[i]));
}
