// The instructions of sm_90a that C++ has no words for, each as PTX and, for tests on the CPU, as the emulator's
// definition (tests/emulator/hopper_emulator.h). What the copy engine moves are blocks of 64 x 64 entries of 2 bytes:
// 64 rows of 128 bytes, in the 128-byte swizzle, beginning on 1024 bytes of shared memory.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/ptx.h"

#ifdef __CUDACC__
#include <cuda.h>
#else
#include "hopper_emulator.h"
#endif

namespace federa {

constexpr int side = 64, block_bytes = 2 * side * side;

#ifdef __CUDACC__

using TensorMap = CUtensorMap;

// A matrix for the copy engine; what a block has beyond it is zeros. `stride` counts entries; rows must begin on 16
// bytes. The driver's function is asked of the runtime, so that nothing links to libcuda.
template <class T>
TensorMap tensor_map(const void* data, std::int64_t rows, std::int64_t columns, std::int64_t stride) {
    static const auto encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
        const char* const name = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
        const auto status = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
        const auto status = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
        check(status, "cuTensorMapEncodeTiled of the driver");
        if (!found) throw std::runtime_error("cuTensorMapEncodeTiled: the driver must be of CUDA 12 or later");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
    }();
    TensorMap map;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * stride)};
    const cuuint32_t box[] = {side, side}, steps[] = {1, 1};
    const auto type =
        std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const CUresult status = encode(&map, type, 2, const_cast<void*>(data), sizes, strides, box, steps,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) throw std::runtime_error("tensor map: CUDA error " + std::to_string(status));
    return map;
}

// --- clusters ---

inline __device__ unsigned cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

inline __device__ unsigned cluster_size() {
    unsigned size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// All threads of all blocks meet; what they wrote before is seen after.
inline __device__ void cluster_barrier() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same place in the shared memory of another block of the cluster, or of this one, to be read.
template <class T>
inline __device__ const T* in_block(unsigned rank, const T* place) {
    const T* there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(place), "r"(rank));
    return there;
}

// `count` threads of this block meet at barrier `name`, 1 to 15; 0 is __syncthreads().
inline __device__ void named_barrier(int name, int count) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(count) : "memory");
}

// --- registers: all warps of a warpgroup take part ---

template <int registers>
inline __device__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
inline __device__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// --- mbarriers: a phase ends when its arrivals have come and all bytes that they announced are there ---

using Barrier = std::uint64_t;

inline __device__ void barrier_init(Barrier* barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// After the last barrier_init and before cluster_barrier: the copy engine and other blocks see them too.
inline __device__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival, which announces bytes.
inline __device__ void barrier_expect(Barrier* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// One arrival at the barrier in the same place of another block of the cluster, or of this one.
inline __device__ void barrier_arrive(Barrier* barrier, unsigned rank) {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

// Until the phase of this parity has ended; phases begin with parity 0, before which that of parity 1 has ended.
inline __device__ void barrier_wait(Barrier* barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// --- copies of blocks: (row, column) is where the block begins in the matrix ---

// To the same place in each block of the cluster that `mask` has, whose barrier in that same place gets the bytes.
inline __device__ void load_block(void* to, const TensorMap& map, Barrier* barrier, int row, int column,
                                  unsigned mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(static_cast<std::uint16_t>(mask))
        : "memory");
}

// To this block alone.
inline __device__ void load_block(void* to, const TensorMap& map, Barrier* barrier, int row, int column) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
}

// What this thread has written to shared memory, the copy engine sees from here on.
inline __device__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

inline __device__ void store_block(const TensorMap& map, const void* from, int row, int column) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
                 "r"(column), "r"(row), "r"(shared_address(from))
                 : "memory");
}

// Ends a group of this thread's stores.
inline __device__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but the latest `pending` groups of this thread's stores have read what they store.
template <int pending>
inline __device__ void store_wait() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// --- wgmma: a warpgroup's product of blocks in shared memory; N = 2 ENTRIES columns ---
// For lane l of warp w, g = l / 4 and t = l % 4, c[4j + 2i + e] is entry (16w + g + 8i, 8j + 2t + e).

// Before the first product that has these sums, and after others have touched them.
inline __device__ void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of products.
inline __device__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the latest `pending` groups have been multiplied.
template <int pending>
inline __device__ void multiply_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

#define FEDERA_8(i)                                                                                                  \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]),     \
        "+f"(c[i + 7])
#define FEDERA_64(i)                                                                                        \
    FEDERA_8(i), FEDERA_8(i + 8), FEDERA_8(i + 16), FEDERA_8(i + 24), FEDERA_8(i + 32), FEDERA_8(i + 40), \
        FEDERA_8(i + 48), FEDERA_8(i + 56)
#define FEDERA_TO_63                                                                                             \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "  \
    "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FEDERA_TO_127                                                                                           \
    FEDERA_TO_63 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, "      \
    "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, "     \
    "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, " \
    "%118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FEDERA_WGMMA(shape, type, sums, a, b, transposed)                                                        \
    "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" \
    sums "}, " a ", " b ", add, 1, 1, 0, " transposed ";\n}"

// c (64, N) += a (64, 16) b (16, N). a lies along the depth; b too, or, TRANSPOSED, along its columns.
template <class T, bool TRANSPOSED>
inline __device__ void multiply_add(float (&c)[128], std::uint64_t a, std::uint64_t b) {
    if constexpr (std::is_same_v<T, __half>)
        asm volatile(FEDERA_WGMMA("m64n256k16", "f16", FEDERA_TO_127, "%128", "%129", "%130")
                     : FEDERA_64(0), FEDERA_64(64)
                     : "l"(a), "l"(b), "n"(TRANSPOSED));
    else
        asm volatile(FEDERA_WGMMA("m64n256k16", "bf16", FEDERA_TO_127, "%128", "%129", "%130")
                     : FEDERA_64(0), FEDERA_64(64)
                     : "l"(a), "l"(b), "n"(TRANSPOSED));
}

template <class T, bool TRANSPOSED>
inline __device__ void multiply_add(float (&c)[64], std::uint64_t a, std::uint64_t b) {
    if constexpr (std::is_same_v<T, __half>)
        asm volatile(FEDERA_WGMMA("m64n128k16", "f16", FEDERA_TO_63, "%64", "%65", "%66")
                     : FEDERA_64(0)
                     : "l"(a), "l"(b), "n"(TRANSPOSED));
    else
        asm volatile(FEDERA_WGMMA("m64n128k16", "bf16", FEDERA_TO_63, "%64", "%65", "%66")
                     : FEDERA_64(0)
                     : "l"(a), "l"(b), "n"(TRANSPOSED));
}

#undef FEDERA_8
#undef FEDERA_64
#undef FEDERA_TO_63
#undef FEDERA_TO_127
#undef FEDERA_WGMMA

#else  // on the CPU

using TensorMap = emulator::TensorMap;
using Barrier = std::uint64_t;

template <class T>
TensorMap tensor_map(const void* data, std::int64_t rows, std::int64_t columns, std::int64_t stride) {
    return {data, rows, columns, 2 * stride};
}

inline std::uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }

using emulator::cluster_barrier, emulator::cluster_rank, emulator::cluster_size, emulator::named_barrier;

template <class T>
const T* in_block(unsigned rank, const T* place) {
    if (rank != cluster_rank()) emulator::wait_long_together();
    return emulator::in_block(rank, place);
}

template <int registers>
void give_registers() {}
template <int registers>
void take_registers() {}

inline void barrier_init(Barrier* barrier, unsigned arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void barriers_ready() {}
inline void barrier_expect(Barrier* barrier, unsigned bytes) { emulator::barrier_arrive(barrier, bytes); }
inline void barrier_arrive(Barrier* barrier, unsigned rank) {
    emulator::barrier_arrive(emulator::in_block(rank, barrier));
}
inline void barrier_wait(Barrier* barrier, int parity) { emulator::barrier_wait(barrier, parity); }

inline void load_block(void* to, const TensorMap& map, Barrier* barrier, int row, int column, unsigned mask) {
    emulator::copy_in(to, map, barrier, column, row, mask);
}
inline void load_block(void* to, const TensorMap& map, Barrier* barrier, int row, int column) {
    emulator::copy_in(to, map, barrier, column, row, 1u << cluster_rank());
}
inline void fence_async() { emulator::fence_async(); }
inline void store_block(const TensorMap& map, const void* from, int row, int column) {
    emulator::copy_out(map, from, column, row);
}
inline void store_commit() { emulator::store_commit(); }
template <int pending>
void store_wait() {
    emulator::store_wait(pending);
}

inline void multiply_fence() { emulator::current->async.fenced = true; }
inline void multiply_commit() { emulator::multiply_commit(); }
template <int pending>
void multiply_wait() {
    emulator::multiply_wait(pending);
}

template <class T, bool TRANSPOSED, std::size_t ENTRIES>
void multiply_add(float (&c)[ENTRIES], std::uint64_t a, std::uint64_t b) {
    emulator::multiply_add(a, b, TRANSPOSED, 2 * static_cast<int>(ENTRIES), c, [](std::uint16_t bits) {
        T value;
        std::memcpy(&value, &bits, 2);
        return emulator::to_float(value);
    });
}

#endif

// Where the entry at `offset` bytes of a block lies.
inline __host__ __device__ int swizzled(int offset) { return offset ^ (offset >> 7 & 7) << 4; }

// A matrix descriptor of blocks from an address on, in the 128-byte swizzle. Along the depth, `stride` lies between 8
// rows and the next 8. Along the columns, `leading` lies between 64 of them and the next, `stride` between 8 of the
// depth and the next 8.
inline __device__ std::uint64_t descriptor(std::uint32_t address, int leading, int stride) {
    const auto encoded = [](std::uint64_t bytes) { return (bytes & 0x3ffff) >> 4; };
    return encoded(address) | encoded(leading) << 16 | encoded(stride) << 32 | std::uint64_t{1} << 62;
}

}  // namespace federa
