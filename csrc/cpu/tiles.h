// What the kernels on the tile units (AMX) share. FEDERA_TILES tells whether the compiler knows these units; code for
// them stands between FEDERA_TILES_BEGIN and FEDERA_TILES_END and calls nothing but itself.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 14 : __GNUC__ >= 11)
#define FEDERA_TILES 1

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#ifdef __clang__
#define FEDERA_TILES_BEGIN                                                                                            \
    _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile," \
            "amx-bf16\"))), apply_to = function)")
#define FEDERA_TILES_END _Pragma("clang attribute pop")
#else
#define FEDERA_TILES_BEGIN    \
    _Pragma("GCC push_options") \
    _Pragma("GCC target(\"avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16\")")
#define FEDERA_TILES_END _Pragma("GCC pop_options")
#endif

namespace federa {

// Whether this processor and operating system have all of it; asked for the first time, the system for permission.
bool tiles_available();

namespace tiles {

using bf16 = std::uint16_t;
using Index = std::int64_t;

constexpr Index TILE = 512;  // bfloat16s in a tile: 16 rows of 32, or 16 pairs of rows of 16

inline Index blocks(Index size, Index block) { return (size + block - 1) / block; }

FEDERA_TILES_BEGIN

// GCC's tile intrinsics do not tell that they read memory, so that a store before them must be made to happen.
inline void stores_are_done() { __asm__ volatile("" ::: "memory"); }

inline void configure() {
    alignas(64) unsigned char config[64] = {1};  // palette 1
    for (int tile = 0; tile < 8; ++tile) {
        config[16 + 2 * tile] = 64;  // bytes a row
        config[48 + tile] = 16;      // rows
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

inline void release() { _tile_release(); }

inline __mmask16 first(Index count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

inline __m512 widened(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }

// A float rounded to bfloat16, in its place; halves go away from zero, and what is left over is exact.
inline __m512 round_to_bf16(__m512 value) {
    const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(value), _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)));
}

// The upper halves of two vectors by turns: (first[0], second[0]), (first[1], second[1]), ...
inline __m512i paired(__m512 first, __m512 second) {
    const __m512i below = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
    return _mm512_ternarylogic_epi32(below, _mm512_castps_si512(second), _mm512_set1_epi32(0xffff0000), 0xf8);
}

// Pairs of floats as three bfloat16s each, whose sum they are. An infinity leaves NaN.
inline void split(__m512 first, __m512 second, __m512i planes[3]) {
    for (int plane = 0; plane < 2; ++plane) {
        const __m512 one = round_to_bf16(first), other = round_to_bf16(second);
        planes[plane] = paired(one, other);
        first = _mm512_sub_ps(first, one), second = _mm512_sub_ps(second, other);
    }
    planes[2] = paired(first, second);  // of 24 bits 8 are left, or one plane would not do
}

// The same by cutting bits off, in three quarters of the time. Such parts all lie on one side, which makes the products
// that are left out larger (2^-25 of a sum, where the other factor is rounded): for rows, split at every use.
inline void cut(__m512 first, __m512 second, __m512i planes[3]) {
    const __m512 upper = _mm512_castsi512_ps(_mm512_set1_epi32(0xffff0000));
    for (int plane = 0; plane < 2; ++plane) {
        planes[plane] = paired(first, second);
        first = _mm512_sub_ps(first, _mm512_and_ps(first, upper));
        second = _mm512_sub_ps(second, _mm512_and_ps(second, upper));
    }
    planes[2] = paired(first, second);
}

inline __m512i interleaved(__m512i rows) {  // 32 in a row -> pairs (0, 16), (1, 17), ...
    alignas(64) static constexpr std::uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                            21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), rows);
}

// Rows to columns, in place.
inline void transpose(__m512i rows[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

FEDERA_TILES_END

}  // namespace tiles
}  // namespace federa

#else

namespace federa {
inline bool tiles_available() { return false; }
}  // namespace federa

#endif
