// Kernels that prove the emulator's Hopper: what it must compute, and what it must catch.

#include "cuda/launch.h"
#include "cuda/ptx_sm90.h"

namespace {

using namespace federa;

constexpr int room = 64 * 1024;

// Shared memory from a multiple of 1024 on; its last kilobyte is for barriers.
__device__ unsigned char* aligned() { return shared_memory() + (-shared_address(shared_memory()) & 896); }
__device__ Barrier* barrier(int i) { return reinterpret_cast<Barrier*>(aligned() + room) + i; }

__device__ void begin(unsigned arrivals) {
    if (threadIdx.x == 0) {
        barrier_init(barrier(0), arrivals);
        barrier_init(barrier(1), arrivals);
        barriers_ready();
    }
    cluster_barrier();
}

// The first block of the cluster loads for all; out (blocks, 64, 64): what then lies in each one's shared memory.
__global__ void load(const TensorMap map, int row, int column, std::uint16_t* out, bool wait) {
    begin(1);
    if (threadIdx.x == 0) {
        barrier_expect(barrier(0), block_bytes);
        if (cluster_rank() == 0) load_block(aligned(), map, barrier(0), row, column, (1u << cluster_size()) - 1);
    }
    if (wait) barrier_wait(barrier(0), 0);
    for (int i = threadIdx.x; i < side * side; i += blockDim.x)
        out[blockIdx.x * side * side + i] = reinterpret_cast<const std::uint16_t*>(aligned())[i];
    cluster_barrier();
    barrier_wait(barrier(0), 0);
}

// 64 x 64 entries as they lie in shared memory -> the matrix, at (row, column).
__global__ void store(const TensorMap map, int row, int column, const std::uint16_t* in, bool fence, bool wait) {
    for (int i = threadIdx.x; i < side * side; i += blockDim.x)
        reinterpret_cast<std::uint16_t*>(aligned())[i] = in[i];
    if (fence || threadIdx.x != 5) fence_async();
    named_barrier(1, 128);
    if (threadIdx.x == 0) {
        store_block(map, aligned(), row, column);
        store_commit();
        if (wait) store_wait<0>();
    }
}

enum Mistake { none, no_fence, no_wait, no_commit, overwritten };

// in: shared memory as it lies, a from 0 and b from b_at on; out (128, ENTRIES): each thread's sums, which begin as 1.
template <class T, bool TRANSPOSED, int ENTRIES>
__global__ void multiply(const unsigned char* in, int b_at, int leading, int stride, float* out, int mistake) {
    for (int i = threadIdx.x; i < room; i += 128) aligned()[i] = in[i];
    fence_async();
    __syncthreads();
    float sums[ENTRIES];
    for (float& sum : sums) sum = 1.0f;
    const std::uint32_t start = shared_address(aligned());
    if (mistake != no_fence) multiply_fence();
    multiply_add<T, TRANSPOSED>(sums, descriptor(start, 0, 1024), descriptor(start + b_at, leading, stride));
    if (mistake != no_commit) multiply_commit();
    if (mistake == overwritten) aligned()[b_at + 1] = 0x7f;
    if (mistake != no_wait) multiply_wait<0>();
    for (int i = 0; i < ENTRIES; ++i) out[threadIdx.x * ENTRIES + i] = sums[i];
    if (mistake == no_wait) multiply_wait<0>();
}

__global__ void one_arrival_too_many() {
    begin(1);
    if (threadIdx.x == 0) barrier_expect(barrier(0), block_bytes);  // so its phase has not ended
    if (threadIdx.x == 0) barrier_arrive(barrier(0), 0);
}

__global__ void one_arrival_too_few() {
    begin(2);
    if (threadIdx.x == 0) barrier_arrive(barrier(0), cluster_rank());
    barrier_wait(barrier(0), 0);
}

__global__ void a_block_that_ended() {
    begin(2);
    if (cluster_rank() == 0) return;
    emulator::wait_long();
    barrier_arrive(barrier(0), 0);
}

__global__ void never_initialised() {
    barrier_wait(barrier(0), 0);
}

__global__ void not_a_swizzle(const TensorMap map) {
    begin(1);
    if (threadIdx.x == 0) load_block(aligned() + 128, map, barrier(0), 0, 0);
}

// What threads wrote to a block, the next copy into it may lose or be lost under.
__global__ void written_between_copies(const TensorMap map, bool fence) {
    begin(1);
    for (int parity = 0; parity < 2; ++parity) {
        if (threadIdx.x == 0) {
            barrier_expect(barrier(0), block_bytes);
            load_block(aligned(), map, barrier(0), 0, 0);
        }
        barrier_wait(barrier(0), parity);
        if (threadIdx.x == 5) aligned()[5] ^= 1;
        if (fence) fence_async();
        __syncthreads();
    }
}

template <class... Arguments>
void in_clusters(void (*kernel)(Arguments...), unsigned size, unsigned threads, Arguments... arguments) {
    launch_clusters(kernel, 1, size, threads, room + 2048, nullptr, arguments...);
}

}  // namespace

EXPORTED const char* check_load(const std::uint16_t* in, int rows, int columns, int stride, int row, int column,
                                std::uint16_t* out, unsigned blocks, bool wait) {
    return emulator::guarded([&] {
        in_clusters(load, blocks, 64u, tensor_map<__half>(in, rows, columns, stride), row, column, out, wait);
    });
}

EXPORTED const char* check_store(std::uint16_t* to, int rows, int columns, int stride, int row, int column,
                                 const std::uint16_t* in, bool fence, bool wait) {
    return emulator::guarded([&] {
        in_clusters(store, 1, 128u, tensor_map<__half>(to, rows, columns, stride), row, column, in, fence, wait);
    });
}

EXPORTED const char* check_multiply(bool half, bool transposed, int columns, const unsigned char* in, int b_at,
                                    int leading, int stride, float* out, int mistake) {
    return emulator::guarded([&] {
        const auto of = [&](auto type, auto flag) {
            using T = decltype(type);
            const auto kernel = columns == 256 ? multiply<T, flag(), 128> : multiply<T, flag(), 64>;
            in_clusters(kernel, 1, 128u, in, b_at, leading, stride, out, mistake);
        };
        if (half)
            transposed ? of(__half{}, std::true_type()) : of(__half{}, std::false_type());
        else
            transposed ? of(__nv_bfloat16{}, std::true_type()) : of(__nv_bfloat16{}, std::false_type());
    });
}

EXPORTED const char* check_mistake(int which, const std::uint16_t* in) {
    return emulator::guarded([&] {
        if (which == 0) in_clusters(one_arrival_too_many, 1, 32u);
        if (which == 1) in_clusters(one_arrival_too_few, 2, 32u);
        if (which == 2) in_clusters(a_block_that_ended, 2, 32u);
        if (which == 3) in_clusters(never_initialised, 1, 32u);
        if (which == 4) in_clusters(not_a_swizzle, 1, 32u, tensor_map<__half>(in, 8, 8, 8));
        if (which == 5) tensor_map<__half>(in, 8, 8, 12);
        if (which == 6) tensor_map<__half>(in + 1, 8, 8, 8);
        if (which == 7) tensor_map<__half>(in, 0, 8, 8);
        if (which >= 8) in_clusters(written_between_copies, 1, 32u, tensor_map<__half>(in, 8, 8, 8), which == 9);
    });
}
