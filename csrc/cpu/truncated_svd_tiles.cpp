#include "cpu/truncated_svd_tiles.h"

#include <cstring>

#include "cpu/scratch.h"
#include "cpu/tiles.h"

namespace federa {

#ifndef FEDERA_TILES

void gram_by_tiles(const float*, long, long, long, long, float*, long) {}

#else

namespace {

using namespace tiles;

constexpr long SIDE = 32;     // of a block of G, and the depth of a step
constexpr long DEPTH = 256;   // rows of A at a time: 32 columns of them, in two planes, stay in the first-level cache

FEDERA_TILES_BEGIN

// Two vectors as two planes of pairs.
inline void split(__m512 one, __m512 other, __m512i planes[2]) {
    for (int plane = 0; plane < 2; ++plane) {
        const __m512 low = round_to_bf16(one), high = round_to_bf16(other);
        planes[plane] = paired(low, high);
        one = _mm512_sub_ps(one, low), other = _mm512_sub_ps(other, high);
    }
}

// 16 columns of A by 32 rows, `deep` of them, as tiles of both factors of a product: right [plane][16 pairs (n, n + 16)
// of rows][16 columns], left the same with columns for rows.
void pack_tile(const float* A, long deep, long width, long row, long column, bf16* left, bf16* right) {
    __m512i pairs[2][16];
    for (long i = 0; i < 16; ++i) {
        __m512 one, other;
        __m512i planes[2];
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
        for (long i = 0; i < 16; ++i) _mm512_store_si512(as_it_is + i * 32, pairs[plane][i]);
        transpose(pairs[plane]);
        for (long i = 0; i < 16; ++i) _mm512_store_si512(turned + i * 32, pairs[plane][i]);
    }
}

// [32 columns][step of 32 rows][16 columns][plane] tiles of up to DEPTH rows, zero beyond A; read along its lines: across
// them every one would lie on another page.
void pack(const float* A, long rows, long columns, long row, long column, bf16* left, bf16* right) {
    const long steps = blocks(rows, SIDE), halves = 2 * blocks(columns, SIDE);
    for (long tile = 0; tile < steps * halves; ++tile) {
        const long step = column == 1 ? tile / halves : tile % steps, half = column == 1 ? tile % halves : tile / steps;
        const long to = ((half / 2 * steps + step) * 2 + half % 2) * 2 * TILE, n = step * SIDE, j = half * 16;
        pack_tile(A + n * row + j * column, rows - n, columns - j, row, column, left + to, right + to);
    }
}

// G (32, 32) += left right
void block_product(const bf16* left, const bf16* right, long steps, float* G, long ldg) {
    stores_are_done();
    _tile_loadd(0, G, ldg * 4);
    _tile_loadd(1, G + 16, ldg * 4);
    _tile_loadd(2, G + 16 * ldg, ldg * 4);
    _tile_loadd(3, G + 16 * ldg + 16, ldg * 4);
#define FEDERA_LOAD(tile, next, factor, plane)          \
    _tile_loadd(tile, factor + plane * TILE, 64);      \
    _tile_loadd(next, factor + (2 + plane) * TILE, 64);
#define FEDERA_PRODUCT       \
    _tile_dpbf16ps(0, 4, 6); \
    _tile_dpbf16ps(1, 4, 7); \
    _tile_dpbf16ps(2, 5, 6); \
    _tile_dpbf16ps(3, 5, 7);
    for (long step = 0; step < steps; ++step, left += 4 * TILE, right += 4 * TILE) {
        FEDERA_LOAD(4, 5, left, 1)
        FEDERA_LOAD(6, 7, right, 0)
        FEDERA_PRODUCT
        FEDERA_LOAD(4, 5, left, 0)
        FEDERA_PRODUCT
        FEDERA_LOAD(6, 7, right, 1)
        FEDERA_PRODUCT
    }
#undef FEDERA_LOAD
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
    release();
}

FEDERA_TILES_END

}  // namespace

void gram_by_tiles(const float* A, long rows, long columns, long row, long column, float* G, long ldg) {
    static thread_local Scratch scratch;
    const long size = blocks(columns, SIDE) * blocks(rows < DEPTH ? rows : DEPTH, SIDE) * 4 * TILE;
    bf16* left = scratch.take<bf16>(2 * size);
    std::memset(G, 0, blocks(columns, SIDE) * SIDE * ldg * sizeof(float));
    multiply(A, rows, columns, row, column, left, left + size, G, ldg);
}

#endif

}  // namespace federa
