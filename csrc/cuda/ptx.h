// The instructions of sm_80 that C++ has no words for, each as PTX and, for tests on the CPU, as its definition.
// Layouts follow the PTX ISA, "Matrix Fragments for mma.m16n8k16"; for lane l, g = l / 4 and t = l % 4.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace federa {

#ifdef __CUDACC__

inline __device__ std::uint32_t shared_address(const void* pointer) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8x8 matrices of 16-bit entries. Lane l brings the address of row l % 8 of matrix l / 8: 16 bytes in shared
// memory, aligned to 16. r[i] becomes entries (g, 2t) and (g, 2t + 1) of matrix i, the first in the low half.
inline __device__ void ldmatrix(std::uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same of the matrices transposed: r[i] becomes entries (2t, g) and (2t + 1, g) of matrix i as it lies.
inline __device__ void ldmatrix_transposed(std::uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c (16,8) += a (16,16) b (16,8), float32 sums. Of each pair of entries the first is in the low half:
//   a[0] (g, 2t..)  a[1] (g + 8, 2t..)  a[2] (g, 2t + 8..)  a[3] (g + 8, 2t + 8..)
//   b[0] (2t.., g)  b[1] (2t + 8.., g)
//   c[0] (g, 2t)    c[1] (g, 2t + 1)    c[2] (g + 8, 2t)    c[3] (g + 8, 2t + 1)
template <class T>
inline __device__ void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);

template <>
inline __device__ void mma<__nv_bfloat16>(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                          std::uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
inline __device__ void mma<__half>(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Starts a copy of 16 bytes, both aligned to 16, to shared memory: `bytes` of them from global memory, the rest zeros.
inline __device__ void copy_async(void* to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}

// Ends a group of this thread's copies; a group may be empty.
inline __device__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the latest `pending` groups of this thread's copies are there.
template <int pending>
inline __device__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#else  // on the CPU

struct LoadMatrix {
    const void* row;
    bool transposed;
    std::uint32_t (&r)[4];

    static void run(LoadMatrix* const* lanes, unsigned) {
        for (int l = 0; l < 32; ++l) emulator::need_aligned(lanes[l]->row, "ldmatrix");
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 4; ++i) {
                std::uint16_t pair[2];
                for (int e = 0; e < 2; ++e) {
                    const int row = l / 4, column = l % 4 * 2 + e;
                    const LoadMatrix& from = *lanes[8 * i + (lanes[l]->transposed ? column : row)];
                    pair[e] = static_cast<const std::uint16_t*>(from.row)[lanes[l]->transposed ? row : column];
                }
                std::memcpy(&lanes[l]->r[i], pair, 4);
            }
    }
};

inline void ldmatrix(std::uint32_t (&r)[4], const void* row) {
    LoadMatrix mine{row, false, r};
    emulator::together(~0u, mine);
}

inline void ldmatrix_transposed(std::uint32_t (&r)[4], const void* row) {
    LoadMatrix mine{row, true, r};
    emulator::together(~0u, mine);
}

template <class T>
struct MultiplyAdd {
    float (&c)[4];
    std::uint32_t a[4], b[2];

    static float entry(std::uint32_t pair, int which) {
        const std::uint16_t bits = static_cast<std::uint16_t>(pair >> (16 * which));
        T value;
        std::memcpy(&value, &bits, 2);
        return emulator::to_float(value);
    }

    static void run(MultiplyAdd* const* lanes, unsigned) {
        float a[16][16], b[16][8];
        for (int l = 0; l < 32; ++l)
            for (int e = 0; e < 2; ++e) {
                const int g = l / 4, k = l % 4 * 2 + e;
                for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][k + i / 2 * 8] = entry(lanes[l]->a[i], e);
                for (int i = 0; i < 2; ++i) b[k + 8 * i][g] = entry(lanes[l]->b[i], e);
            }
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 4; ++i)
                for (int k = 0; k < 16; ++k) lanes[l]->c[i] += a[l / 4 + i / 2 * 8][k] * b[k][l % 4 * 2 + i % 2];
    }
};

template <class T>
void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    MultiplyAdd<T> mine{c, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    emulator::together(~0u, mine);
}

inline void copy_async(void* to, const void* from, int bytes) { emulator::copy_async(to, from, bytes); }
inline void copy_commit() { emulator::copy_commit(); }

template <int pending>
void copy_wait() {
    emulator::copy_wait(pending);
}

#endif

}  // namespace federa
