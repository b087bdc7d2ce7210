#include "cpu/truncated_svd_tiles.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 14 : __GNUC__ >= 11)
#define FEDERA_TILES 1
#include <immintrin.h>
#endif

#include "cpu/engines.h"
#include "cpu/scratch.h"

namespace federa {

#ifndef FEDERA_TILES

bool has_tiles() { return false; }
void gram_by_tiles(const float*, long, long, long, long, float*, long) {}

#else

namespace {

using bf16 = std::uint16_t;

constexpr long TILE = 512;    // bfloat16s: 16 rows of 16 pairs
constexpr long SIDE = 32;     // of a block of G, and the depth of a step
constexpr long DEPTH = 256;   // rows of A at a time: 32 columns of them, in two planes, stay in the first-level cache

long blocks(long size, long block) { return (size + block - 1) / block; }

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16")
#endif

inline __mmask16 first(long count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

inline __m512 rounded(__m512 value) {  // to bfloat16, halves away from zero
    const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(value), _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)));
}

// Two vectors as two planes of pairs.
inline void split(__m512 one, __m512 other, __m512 planes[2]) {
    for (int plane = 0; plane < 2; ++plane) {
        const __m512 low = rounded(one), high = rounded(other);
        const __m512i below = _mm512_srli_epi32(_mm512_castps_si512(low), 16);
        planes[plane] = _mm512_castsi512_ps(_mm512_or_si512(below, _mm512_castps_si512(high)));
        one = _mm512_sub_ps(one, low), other = _mm512_sub_ps(other, high);
    }
}

template <int STRIDE>
inline void exchange(__m512 rows[16]) {
    alignas(64) int low[16], high[16];
    for (int lane = 0; lane < 16; ++lane) {
        low[lane] = lane & STRIDE ? 16 + lane - STRIDE : lane;
        high[lane] = lane & STRIDE ? 16 + lane : lane + STRIDE;
    }
    const __m512i take_low = _mm512_load_si512(low), take_high = _mm512_load_si512(high);
    for (int i = 0; i < 16; ++i)
        if (!(i & STRIDE)) {
            const __m512 upper = rows[i], lower = rows[i + STRIDE];
            rows[i] = _mm512_permutex2var_ps(upper, take_low, lower);
            rows[i + STRIDE] = _mm512_permutex2var_ps(upper, take_high, lower);
        }
}

inline void transpose(__m512 rows[16]) { exchange<1>(rows), exchange<2>(rows), exchange<4>(rows), exchange<8>(rows); }

// 16 columns of A by 32 rows, `deep` of them, as tiles of both factors of a product: right [plane][16 pairs (n, n + 16)
// of rows][16 columns], left the same with columns for rows.
void pack_tile(const float* A, long deep, long width, long row, long column, bf16* left, bf16* right) {
    __m512 pairs[2][16];
    for (long i = 0; i < 16; ++i) {
        __m512 one, other, planes[2];
        if (column == 1) {
            one = _mm512_maskz_loadu_ps(i < deep ? first(width) : 0, A + i * row);
            other = _mm512_maskz_loadu_ps(i + 16 < deep ? first(width) : 0, A + (i + 16) * row);
        } else {
            one = _mm512_maskz_loadu_ps(i < width ? first(deep) : 0, A + i * column);
            other = _mm512_maskz_loadu_ps(i < width ? first(deep - 16) : 0, A + i * column + 16);
        }
        split(one, other, planes);
        pairs[0][i] = planes[0], pairs[1][i] = planes[1];
    }
    for (int plane = 0; plane < 2; ++plane) {
        bf16 *as_it_is = (column == 1 ? right : left) + plane * TILE, *turned = (column == 1 ? left : right) + plane * TILE;
        for (long i = 0; i < 16; ++i) _mm512_store_ps(as_it_is + i * 32, pairs[plane][i]);
        transpose(pairs[plane]);
        for (long i = 0; i < 16; ++i) _mm512_store_ps(turned + i * 32, pairs[plane][i]);
    }
}

// [32 columns][step of 32 rows][16 columns][plane] tiles of up to DEPTH rows, zero beyond A; read along its lines: across
// them every one would lie on another page.
void pack(const float* A, long rows, long columns, long row, long column, bf16* left, bf16* right) {
    const long steps = blocks(rows, SIDE), halves = 2 * blocks(columns, SIDE), tiles = steps * halves;
    for (long tile = 0; tile < tiles; ++tile) {
        const long step = column == 1 ? tile / halves : tile % steps, half = column == 1 ? tile % halves : tile / steps;
        const long to = ((half / 2 * steps + step) * 2 + half % 2) * 2 * TILE, n = step * SIDE, j = half * 16;
        pack_tile(A + n * row + j * column, rows - n, columns - j, row, column, left + to, right + to);
    }
}

void configure() {
    alignas(64) unsigned char config[64] = {1};  // palette 1
    for (int tile = 0; tile < 8; ++tile) {
        config[16 + 2 * tile] = 64;  // bytes a row
        config[48 + tile] = 16;      // rows
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

// G (32, 32) += left right
void block_product(const bf16* left, const bf16* right, long steps, float* G, long ldg) {
    __asm__ volatile("" ::: "memory");  // GCC's tile intrinsics do not tell that they read memory
    _tile_loadd(0, G, ldg * 4);
    _tile_loadd(1, G + 16, ldg * 4);
    _tile_loadd(2, G + 16 * ldg, ldg * 4);
    _tile_loadd(3, G + 16 * ldg + 16, ldg * 4);
#define FEDERA_PRODUCT(x, y)                   \
    _tile_loadd(4, left + x * TILE, 64);       \
    _tile_loadd(5, left + (2 + x) * TILE, 64); \
    _tile_loadd(6, right + y * TILE, 64);      \
    _tile_loadd(7, right + (2 + y) * TILE, 64);\
    _tile_dpbf16ps(0, 4, 6);                   \
    _tile_dpbf16ps(1, 4, 7);                   \
    _tile_dpbf16ps(2, 5, 6);                   \
    _tile_dpbf16ps(3, 5, 7);
    for (long step = 0; step < steps; ++step, left += 4 * TILE, right += 4 * TILE) {
        FEDERA_PRODUCT(1, 0)
        FEDERA_PRODUCT(0, 0)
        FEDERA_PRODUCT(0, 1)
    }
#undef FEDERA_PRODUCT
    _tile_stored(0, G, ldg * 4);
    _tile_stored(1, G + 16, ldg * 4);
    _tile_stored(2, G + 16 * ldg, ldg * 4);
    _tile_stored(3, G + 16 * ldg + 16, ldg * 4);
}

void multiply(const float* A, long rows, long columns, long row, long column, bf16* left, bf16* right, float* G,
              long ldg) {
    const long across = blocks(columns, SIDE);
    configure();
    for (long top = 0; top < rows; top += DEPTH) {
        const long deep = rows - top < DEPTH ? rows - top : DEPTH, steps = blocks(deep, SIDE), size = steps * 4 * TILE;
        pack(A + top * row, deep, columns, row, column, left, right);
        for (long i = 0; i < across; ++i)
            for (long j = 0; j <= i; ++j)
                block_product(left + i * size, right + j * size, steps, G + i * SIDE * ldg + j * SIDE, ldg);
    }
    _tile_release();
}

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

}  // namespace

bool has_tiles() { return amx.available(); }

void gram_by_tiles(const float* A, long rows, long columns, long row, long column, float* G, long ldg) {
    static thread_local Scratch scratch;
    const long size = blocks(columns, SIDE) * blocks(rows < DEPTH ? rows : DEPTH, SIDE) * 4 * TILE;
    bf16* left = scratch.take<bf16>(2 * size);
    std::memset(G, 0, blocks(columns, SIDE) * SIDE * ldg * sizeof(float));
    multiply(A, rows, columns, row, column, left, left + size, G, ldg);
}

#endif

}  // namespace federa
