// lora_linear.h on the tile units (AMX).

#include <algorithm>
#include <cstring>

#include "cpu/engines.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/tiles.h"

#ifdef FEDERA_TILES
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/features.h"
#endif

namespace federa {

#ifndef FEDERA_TILES

const Engine amx{"amx", tiles_available, true, nullptr, nullptr, nullptr, nullptr};

#else

namespace {

using namespace tiles;

constexpr Index SIDE = 32;  // rows, columns and depth of one step: 2 x 2 tiles of sums, 32 deep

int planes_of(Kind kind) { return kind == Kind::float32 ? 3 : 1; }

struct Source {  // of a tile of sums: rows `stride` bytes apart, or zero
    const float* data;
    long stride;
};

struct Extra {  // a low-rank product on top of a block: tiles of h and of up
    const bf16 *h, *up;
};

FEDERA_TILES_BEGIN

// A floating-point unit left alone for about 2,000 cycles falls asleep, and the tile store that ends a longer run of
// products then waits 600 more. One addition a step keeps it awake; neither integer operations nor stores do.
inline void stay_awake() {
    float zero = 0.0f;
    __asm__ volatile("vaddss %0, %0, %0" : "+x"(zero));
}

// As round_to_bf16, for one plane alone: halves to even, and a NaN stays one whatever its bits.
inline __m512 nearest_bf16(__m512 value) { return widened((__m256i)_mm512_cvtneps_pbh(value)); }

inline __m256i upper_halves(__m512 values) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(values), 16));
}

inline __m512 load_floats(const void* source, Kind kind, Index offset, __mmask16 mask) {
    if (kind == Kind::float32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(source) + offset);
    return widened(_mm256_maskz_loadu_epi16(mask, static_cast<const bf16*>(source) + offset));
}

// 16 x 16 values from rows `stride` apart, as columns; zero beyond `rows` and `columns`.
inline void load_columns(const void* source, Kind kind, Index stride, Index rows, Index columns, __m512 out[16]) {
    __m512i lines[16];
    for (Index i = 0; i < 16; ++i)
        lines[i] = _mm512_castps_si512(load_floats(source, kind, i * stride, i < rows ? first(columns) : 0));
    transpose(lines);
    for (int i = 0; i < 16; ++i) out[i] = _mm512_castsi512_ps(lines[i]);
}

// 16 values `stride` apart.
inline __m512 gather_floats(const void* source, Kind kind, Index offset, Index stride, Index count) {
    if (stride == 1) return load_floats(source, kind, offset, first(count));
    alignas(64) float values[16] = {};
    for (Index i = 0; i < std::min<Index>(count, 16); ++i) {
        if (kind == Kind::float32) {
            values[i] = static_cast<const float*>(source)[offset + i * stride];
        } else {
            const std::uint32_t bits = std::uint32_t{static_cast<const bf16*>(source)[offset + i * stride]} << 16;
            std::memcpy(values + i, &bits, 4);
        }
    }
    return _mm512_load_ps(values);
}

// 32 rows of x: [plane][half][16 rows][16 pairs (k, k + 16) of depth] tiles a step, rows beyond `rows` zero. Four steps at
// a time stay in the first-level cache while they are written.
void split_rows(const void* x, Kind kind, Index x_stride, Index rows, Index depth, bf16* out) {
    const int planes = planes_of(kind);
    const Index steps = blocks(depth, SIDE);
    for (Index begin = 0; begin < steps; begin += 4)
        for (Index row = 0; row < SIDE; ++row) {
            bf16* to = out + begin * 2 * planes * TILE + row / 16 * TILE + row % 16 * 32;
            for (Index step = begin; step < std::min(begin + 4, steps); ++step, to += 2 * planes * TILE) {
                const Index at = row * x_stride + step * SIDE, left = row < rows ? depth - step * SIDE : 0;
                if (kind == Kind::bfloat16) {
                    const __mmask32 mask = left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1;
                    _mm512_storeu_si512(to, interleaved(_mm512_maskz_loadu_epi16(mask, static_cast<const bf16*>(x) + at)));
                    continue;
                }
                const auto* ahead = static_cast<const float*>(x) + at + 6 * x_stride;  // rows apart escape the hardware
                _mm_prefetch(ahead, _MM_HINT_T0);
                _mm_prefetch(ahead + 16, _MM_HINT_T0);
                __m512i parts[3];
                cut(load_floats(x, kind, at, first(left)), load_floats(x, kind, at + 16, first(left - 16)), parts);
                for (int plane = 0; plane < 3; ++plane) _mm512_storeu_si512(to + plane * 2 * TILE, parts[plane]);
            }
        }
}

// One step of a panel, 32 deep: [plane][half][16 pairs (d, d + 16) of depth][16 columns][2], in `halves` of 16 columns.
void pack_step(const void* source, Kind kind, Index columns, Index column_stride, Index depth, Index depth_stride,
               int planes, Index halves, bf16* out) {
    const Index width = kind == Kind::float32 ? 4 : 2;
    for (Index half = 0; half < halves; ++half) {
        const auto* own = static_cast<const unsigned char*>(source) + half * 16 * column_stride * width;
        const Index left = columns - half * 16;
        __m512 rows[SIDE];  // of depth
        if (depth_stride == 1 && column_stride != 1) {
            load_columns(own, kind, column_stride, left, depth, rows);
            load_columns(own + 16 * width, kind, column_stride, left, depth - 16, rows + 16);
        } else {
            for (Index d = 0; d < SIDE; ++d)
                rows[d] = gather_floats(own, kind, d * depth_stride, column_stride, d < depth ? left : 0);
        }
        for (Index pair = 0; pair < 16; ++pair) {
            __m512i parts[3] = {paired(nearest_bf16(rows[pair]), nearest_bf16(rows[pair + 16]))};
            if (planes == 3) split(rows[pair], rows[pair + 16], parts);
            for (int plane = 0; plane < planes; ++plane)
                _mm512_storeu_si512(out + (plane * 2 + half) * TILE + pair * 32, parts[plane]);
        }
    }
}

// Low-rank products are a step of depth or less: blocks of 16 components in three planes for float32, whose six products
// take three tiles, two planes of 16 deep in each:
//
//     [h1 h1] [u2; u1]    [h2 h2] [u2; u1]    [h3 h1] [u1; u3]        up lies as u2, u1, u3
//
// and of 32 components in one plane for bfloat16.
constexpr Index H_BLOCK = 6 * TILE, UP_BLOCK = 3 * TILE, NARROW_BLOCK = 2 * TILE;

Index rank_block(Kind kind) { return kind == Kind::float32 ? 16 : 32; }

// The scaled up-projection of 32 columns: [block][half][plane][pairs of components][16 columns][2].
void pack_up(const float* up, Kind kind, Index columns, Index column_stride, Index rank, Index rank_stride,
             Index blocks, float scaling, bf16* out) {
    const __m512 s = _mm512_set1_ps(scaling);
    for (Index half = 0; half < 2; ++half) {
        const float* own = up + half * 16 * column_stride;
        const Index left = columns - half * 16;
        for (Index from = 0; from < blocks * rank_block(kind); from += 16) {
            __m512 components[16];
            if (rank_stride == 1)
                load_columns(own + from, Kind::float32, column_stride, left, rank - from, components);
            else
                for (Index r = 0; r < 16; ++r)
                    components[r] = gather_floats(own, Kind::float32, (from + r) * rank_stride, column_stride,
                                                  from + r < rank ? left : 0);
            for (Index pair = 0; pair < 8; ++pair) {
                const __m512 even = _mm512_mul_ps(s, components[2 * pair]);
                const __m512 odd = _mm512_mul_ps(s, components[2 * pair + 1]);
                if (kind == Kind::float32) {
                    __m512i parts[3];
                    split(even, odd, parts);
                    bf16* to = out + from / 16 * UP_BLOCK + half * UP_BLOCK / 2 + pair * 32;
                    _mm512_storeu_si512(to, parts[1]);
                    _mm512_storeu_si512(to + TILE / 2, parts[0]);
                    _mm512_storeu_si512(to + TILE, parts[2]);
                } else {
                    _mm512_storeu_si512(out + from / 32 * NARROW_BLOCK + half * TILE + from % 32 / 16 * TILE / 2 + pair * 32,
                                        paired(nearest_bf16(even), nearest_bf16(odd)));
                }
            }
        }
    }
}

// Finished sums [block of 16][half][16 rows][16] -> h in memory for rows from..to, and tiles for all 32, zero elsewhere.
void finish_h(const float* sums, Index from, Index to, Index rank, Index blocks, Kind kind, void* h, Index h_stride,
              bf16* tiles) {
    const Index size = blocks * (kind == Kind::float32 ? H_BLOCK : NARROW_BLOCK);
    if (from > 0 || to < SIDE || kind == Kind::bfloat16)
        for (Index i = 0; i < size; i += 32) _mm512_storeu_si512(tiles + i, _mm512_setzero_si512());
    for (Index row = from; row < to; ++row) {
        bf16* tile = tiles + row / 16 * TILE + row % 16 * 32;
        for (Index r = 0; r < rank; r += 16) {
            const __mmask16 mask = first(rank - r);
            const __m512 value = _mm512_maskz_loadu_ps(mask, sums + (r * 2 + row) * 16);
            if (kind == Kind::float32) {
                const __m512 one = round_to_bf16(value), left = _mm512_sub_ps(value, one), two = round_to_bf16(left);
                const __m256i h1 = upper_halves(one), h2 = upper_halves(two), h3 = upper_halves(_mm512_sub_ps(left, two));
                bf16* block = tile + r / 16 * H_BLOCK;
                _mm512_storeu_si512(block, _mm512_inserti64x4(_mm512_castsi256_si512(h1), h1, 1));
                _mm512_storeu_si512(block + 2 * TILE, _mm512_inserti64x4(_mm512_castsi256_si512(h2), h2, 1));
                _mm512_storeu_si512(block + 4 * TILE, _mm512_inserti64x4(_mm512_castsi256_si512(h3), h1, 1));
                if (h) _mm512_mask_storeu_ps(static_cast<float*>(h) + row * h_stride + r, mask, value);
            } else {
                const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(value);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile + r / 32 * NARROW_BLOCK + r % 32), rounded);
                if (h) _mm256_mask_storeu_epi16(static_cast<bf16*>(h) + row * h_stride + r, mask, rounded);
            }
        }
    }
}

// The tile intrinsics may be statements, so that these are, too.
#define LOAD_X(PLANE) \
    _tile_loadd(4, x + (PLANE) * 2 * TILE, 64); \
    _tile_loadd(5, x + ((PLANE) * 2 + 1) * TILE, 64);
#define LOAD_P(PLANE) \
    _tile_loadd(6, p + (PLANE) * 2 * TILE, 64); \
    _tile_loadd(7, p + ((PLANE) * 2 + 1) * TILE, 64);
#define PRODUCT \
    _tile_dpbf16ps(0, 4, 6); \
    _tile_dpbf16ps(1, 4, 7); \
    _tile_dpbf16ps(2, 5, 6); \
    _tile_dpbf16ps(3, 5, 7);
// The same for 16 columns: one chain for the sums of x's first plane with P's, one for the rest.
#define NARROW(UPPER, LOWER, P_TILE) \
    _tile_dpbf16ps(UPPER, 4, P_TILE); \
    _tile_dpbf16ps(LOWER, 5, P_TILE);

// Adds a 32 x 32 block of x P to the sums in tiles 0 to 3.
template <int X_PLANES, int P_PLANES>
inline void multiply(const bf16* x, const bf16* p, Index steps) {
    for (Index step = 0; step < steps; ++step, x += X_PLANES * 2 * TILE, p += P_PLANES * 2 * TILE) {
        stay_awake();
        if constexpr (X_PLANES == 3 && P_PLANES == 3) {
            LOAD_X(0) LOAD_P(2) PRODUCT
            LOAD_P(1) PRODUCT
            LOAD_P(0) PRODUCT
            LOAD_X(2) PRODUCT
            LOAD_X(1) PRODUCT
            LOAD_P(1) PRODUCT
        } else if constexpr (X_PLANES == 3) {
            LOAD_P(0) LOAD_X(2) PRODUCT
            LOAD_X(1) PRODUCT
            LOAD_X(0) PRODUCT
        } else {
            LOAD_X(0) LOAD_P(0) PRODUCT
        }
    }
}

// Adds the low-rank product of one share to the sums.
inline void multiply_low_rank(Kind kind, const bf16* x, const bf16* up, Index blocks) {
    if (kind == Kind::bfloat16) return multiply<1, 1>(x, up, blocks);
    for (Index block = 0; block < blocks; ++block, x += H_BLOCK, up += UP_BLOCK) {
        _tile_loadd(6, up, 64);
        _tile_loadd(7, up + UP_BLOCK / 2, 64);
        LOAD_X(0) PRODUCT
        LOAD_X(1) PRODUCT
        _tile_loadd(6, up + TILE / 2, 64);
        _tile_loadd(7, up + UP_BLOCK / 2 + TILE / 2, 64);
        LOAD_X(2) PRODUCT
    }
}

// 32 x 32 sums: start, the main product, the low-rank ones, and back into four buffers or straight into `direct`.
void block_product(Kind kind, int p_planes, const bf16* x, const bf16* p, Index steps, const Extra* extras,
                   Index extra_count, Index rank_blocks, const Source start[4], float* const stop[4], long stop_stride) {
    stores_are_done();
#define START(T) \
    if (start[T].data) _tile_loadd(T, start[T].data, start[T].stride); \
    else _tile_zero(T);
    START(0) START(1) START(2) START(3)
#undef START
    if (kind == Kind::bfloat16) p_planes == 1 ? multiply<1, 1>(x, p, steps) : multiply<1, 3>(x, p, steps);
    else p_planes == 1 ? multiply<3, 1>(x, p, steps) : multiply<3, 3>(x, p, steps);
    for (Index i = 0; i < extra_count; ++i) multiply_low_rank(kind, extras[i].h, extras[i].up, rank_blocks);
#define STOP(T) _tile_stored(T, stop[T], stop_stride);
    STOP(0) STOP(1) STOP(2) STOP(3)
#undef STOP
}

// Adds 32 x 16 of x down^T to sums [half][16][16]; four chains, since two would wait for each other.
void narrow_product(int planes, const bf16* x, const bf16* p, Index steps, float* sums) {
    stores_are_done();
    _tile_loadd(0, sums, 64);
    _tile_loadd(2, sums + 256, 64);
    if (planes == 1) {
        for (Index step = 0; step < steps; ++step, x += 2 * TILE, p += 2 * TILE) {
            _tile_loadd(6, p, 64);
            LOAD_X(0) NARROW(0, 2, 6)
        }
        _tile_stored(0, sums, 64);
        _tile_stored(2, sums + 256, 64);
        return;
    }
    _tile_zero(1);
    _tile_zero(3);
    for (Index step = 0; step < steps; ++step, x += 6 * TILE, p += 6 * TILE) {
        stay_awake();
        _tile_loadd(6, p, 64);
        _tile_loadd(7, p + 2 * TILE, 64);
        LOAD_X(2) NARROW(1, 3, 6)
        LOAD_X(1) NARROW(0, 2, 6) NARROW(1, 3, 7)
        LOAD_X(0) NARROW(0, 2, 6) NARROW(1, 3, 7)
        _tile_loadd(7, p + 4 * TILE, 64);
        NARROW(1, 3, 7)
    }
    alignas(64) float small[512];
    _tile_stored(0, sums, 64);
    _tile_stored(2, sums + 256, 64);
    _tile_stored(1, small, 64);
    _tile_stored(3, small + 256, 64);
    for (Index i = 0; i < 512; i += 16)
        _mm512_storeu_ps(sums + i, _mm512_add_ps(_mm512_loadu_ps(sums + i), _mm512_load_ps(small + i)));
}

// 32 x 32 sums in four tiles.
void add_all(float (*sums)[256], const float (*other)[256]) {
    for (Index t = 0; t < 4; ++t)
        for (Index i = 0; i < 256; i += 16)
            _mm512_store_ps(sums[t] + i, _mm512_add_ps(_mm512_load_ps(sums[t] + i), _mm512_load_ps(other[t] + i)));
}

// Their rows from..to.
void copy_rows(float (*sums)[256], const float (*other)[256], Index from, Index to) {
    for (Index row = from; row < to; ++row)
        for (Index t = row / 16 * 2; t < row / 16 * 2 + 2; ++t)
            std::memcpy(sums[t] + row % 16 * 16, other[t] + row % 16 * 16, 64);
}

// rows x columns at the corner of a tile in `buffer`, to or from memory.
void write_corner(const float* buffer, Index rows, Index columns, Kind kind, void* out, Index stride) {
    const __mmask16 mask = first(columns);
    for (Index row = 0; row < rows; ++row) {
        const __m512 value = _mm512_load_ps(buffer + row * 16);
        if (kind == Kind::float32)
            _mm512_mask_storeu_ps(static_cast<float*>(out) + row * stride, mask, value);
        else
            _mm256_mask_storeu_epi16(static_cast<bf16*>(out) + row * stride, mask, (__m256i)_mm512_cvtneps_pbh(value));
    }
}

void read_corner(float* buffer, Index rows, Index columns, Kind kind, const void* out, Index stride) {
    for (Index row = 0; row < 16; ++row)
        _mm512_store_ps(buffer + row * 16, load_floats(out, kind, row * stride, row < rows ? first(columns) : 0));
}

// 16 components of 32 rows of h, as tiles of their transpose: [plane][16 components][16 pairs (m, m + 16) of rows].
void transpose_h(const void* h, Kind kind, Index h_stride, Index rows, Index components, bf16* out) {
    const int planes = planes_of(kind);
    __m512 upper[16], lower[16];
    load_columns(h, kind, h_stride, rows, components, upper);
    load_columns(static_cast<const unsigned char*>(h) + 16 * h_stride * (kind == Kind::float32 ? 4 : 2), kind, h_stride,
                 rows - 16, components, lower);
    for (Index r = 0; r < 16; ++r) {
        __m512i parts[3] = {paired(upper[r], lower[r])};
        if (planes == 3) split(upper[r], lower[r], parts);
        for (int plane = 0; plane < planes; ++plane) _mm512_storeu_si512(out + plane * TILE + r * 32, parts[plane]);
    }
}

void move_sums(float* sums, float* totals, Index size) {
    for (Index i = 0; i < size; i += 16) {
        _mm512_storeu_ps(totals + i, _mm512_add_ps(_mm512_loadu_ps(totals + i), _mm512_loadu_ps(sums + i)));
        _mm512_storeu_ps(sums + i, _mm512_setzero_ps());
    }
}

// A tile of sums [16 components][16 columns] -> memory, scaled.
void store_gradient(const float* sums, float scaling, Index components, Index columns, float* out, Index rank_stride,
                    Index column_stride) {
    __m512i rows[16];
    for (Index r = 0; r < 16; ++r)
        rows[r] = _mm512_castps_si512(_mm512_mul_ps(_mm512_set1_ps(scaling), _mm512_loadu_ps(sums + r * 16)));
    if (column_stride == 1) {
        for (Index r = 0; r < std::min<Index>(16, components); ++r)
            _mm512_mask_storeu_ps(out + r * rank_stride, first(columns), _mm512_castsi512_ps(rows[r]));
    } else if (rank_stride == 1) {
        transpose(rows);
        for (Index k = 0; k < std::min<Index>(16, columns); ++k)
            _mm512_mask_storeu_ps(out + k * column_stride, first(components), _mm512_castsi512_ps(rows[k]));
    } else {
        alignas(64) float values[256];
        for (Index r = 0; r < 16; ++r) _mm512_store_si512(values + r * 16, rows[r]);
        for (Index r = 0; r < std::min<Index>(16, components); ++r)
            for (Index k = 0; k < std::min<Index>(16, columns); ++k)
                out[r * rank_stride + k * column_stride] = values[r * 16 + k];
    }
}

// 32 rows and 64 columns of x, where they are, and where to put them as tiles of pairs along the rows:
// [32 columns][plane][half][16 pairs (m, m + 16) of rows][16 columns][2].
struct Columns {
    const unsigned char* x;
    Index stride, rows, columns;
    bf16* out;

    bool whole() const { return rows >= SIDE && columns >= 64; }
};

// Vectors from..to of its 64.
template <bool WHOLE, int PLANES>
inline void split_columns(const Columns& c, Index from, Index to) {
    constexpr Kind kind = PLANES == 3 ? Kind::float32 : Kind::bfloat16;
    constexpr Index width = PLANES == 3 ? 4 : 2;
    for (Index i = from; i < to; ++i) {
        const Index column = i / 16 * 16, pair = i % 16;
        const __mmask16 mask = WHOLE ? 0xffff : first(c.columns - column);
        const unsigned char* upper_row = c.x + (pair * c.stride + column) * width;
        const unsigned char* lower_row = upper_row + 16 * c.stride * width;
        const __m512 upper = load_floats(upper_row, kind, 0, WHOLE || pair < c.rows ? mask : 0);
        const __m512 lower = load_floats(lower_row, kind, 0, WHOLE || pair + 16 < c.rows ? mask : 0);
        _mm_prefetch(upper_row + SIDE * c.stride * width, _MM_HINT_T1);  // of the next 32 rows
        _mm_prefetch(lower_row + SIDE * c.stride * width, _MM_HINT_T1);
        __m512i parts[3] = {paired(upper, lower)};
        if constexpr (PLANES == 3) cut(upper, lower, parts);
        bf16* out = c.out + (column / 32 * PLANES * 2 + column / 16 % 2) * TILE + pair * 32;
        for (int plane = 0; plane < PLANES; ++plane) _mm512_store_si512(out + plane * 2 * TILE, parts[plane]);
    }
}

// 16 columns of one plane of x times the planes of h that matter with it, products DONE and following of the block.
#define TIMES_H(SUM, H_TILE, DONE) \
    _tile_dpbf16ps(SUM, H_TILE, 7); \
    if constexpr (SPLITS) split_columns<true, PLANES>(next, (DONE) * 64 / PRODUCTS, ((DONE) + 1) * 64 / PRODUCTS);
#define GRADIENT(SUM, PLANE, COUNT, DONE) \
    _tile_loadd(7, x + (SUM) / 2 * PLANES * 2 * TILE + ((PLANE) * 2 + (SUM) % 2) * TILE, 64); \
    TIMES_H(SUM, 4, (DONE) + (SUM) * (COUNT)) \
    if constexpr (COUNT > 1) { TIMES_H(SUM, 5, (DONE) + (SUM) * (COUNT) + 1) } \
    if constexpr (COUNT > 2) { TIMES_H(SUM, 6, (DONE) + (SUM) * (COUNT) + 2) }
#define GRADIENTS(PLANE, COUNT, DONE) \
    GRADIENT(0, PLANE, COUNT, DONE) GRADIENT(1, PLANE, COUNT, DONE) \
    GRADIENT(2, PLANE, COUNT, DONE) GRADIENT(3, PLANE, COUNT, DONE)

// sums [16 columns, four times][16 components][16] += h^T x for 32 rows and 64 columns: four chains, since two would
// wait for each other. SPLITS: in between, the vector units split the columns that come next.
template <int PLANES, bool SPLITS>
void gradient_block(const bf16* h_tiles, const bf16* x, float* sums, [[maybe_unused]] const Columns& next) {
    constexpr Index PRODUCTS = PLANES == 3 ? 24 : 4;
    stores_are_done();
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
    _tile_loadd(4, h_tiles, 64);
    if constexpr (PLANES == 3) {
        _tile_loadd(5, h_tiles + TILE, 64);
        _tile_loadd(6, h_tiles + 2 * TILE, 64);
        GRADIENTS(2, 1, 0) GRADIENTS(1, 2, 4) GRADIENTS(0, 3, 12)
    } else {
        GRADIENTS(0, 1, 0)
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

// sums [64 columns][block of 16 components][as above] += h^T x for 32 rows.
template <int PLANES>
void gradient_rows(const bf16* h_tiles, Index rank_blocks, const void* x, Index x_stride, Index rows, Index columns,
                   float* sums) {
    alignas(64) bf16 tiles[2][4 * PLANES * TILE];
    const auto columns_at = [&](Index k) {
        const auto* own = static_cast<const unsigned char*>(x) + k * (PLANES == 3 ? 4 : 2);
        return Columns{own, x_stride, rows, columns - k, tiles[k / 64 % 2]};
    };
    for (Index k = -64; k < columns; k += 64) {
        const Columns next = columns_at(k + 64);
        const bool splits = next.whole() && k >= 0;
        if (!splits && next.columns > 0)
            next.whole() ? split_columns<true, PLANES>(next, 0, 64) : split_columns<false, PLANES>(next, 0, 64);
        for (Index block = 0; block < rank_blocks && k >= 0; ++block, sums += 1024) {
            const auto add = splits && block == 0 ? gradient_block<PLANES, true> : gradient_block<PLANES, false>;
            add(h_tiles + block * PLANES * TILE, tiles[k / 64 % 2], sums, next);
        }
    }
}

FEDERA_TILES_END

const void* at(const void* base, Kind kind, Index offset) {
    return static_cast<const unsigned char*>(base) + offset * (kind == Kind::float32 ? 4 : 2);
}

void* at(void* base, Kind kind, Index offset) {
    return static_cast<unsigned char*>(base) + offset * (kind == Kind::float32 ? 4 : 2);
}

// One call of low_rank_linear: what all tasks share.
struct Job {
    const void* x;
    Kind kind;
    Index rows, depth, x_stride;
    const std::vector<Projection>& projections;
    const Clients& clients;
    bool accumulate;
    std::vector<const bf16*> downs, ups;  // by projection, of its first client
    Index column_groups;

    Index steps() const { return blocks(depth, SIDE); }
    Index rank_blocks(const Projection& p) const { return blocks(p.rank, rank_block(kind)); }
    Index up_panel(const Projection& p) const {
        return rank_blocks(p) * (kind == Kind::float32 ? UP_BLOCK : NARROW_BLOCK);
    }
    Index h_tiles(const Projection& p) const {
        return rank_blocks(p) * (kind == Kind::float32 ? H_BLOCK : NARROW_BLOCK);
    }
    Index down_size(const Projection& p) const { return blocks(p.rank, SIDE) * steps() * planes_of(kind) * 2 * TILE; }
    Index up_size(const Projection& p) const {
        return p.packed ? blocks(p.columns, SIDE) * up_panel(p) : 0;
    }
};

// 32 rows of a block and one client among them.
struct Share {
    Index client, from, to;
};

void pack_adapter(const Job& job, const Projection& p, Index client, bool is_up, bf16* out) {
    const Index rank = std::min<Index>(p.rank, job.clients.ranks[client]);
    if (!is_up) {
        // A bfloat16 x meets a down-projection rounded to bfloat16. Halves that no component reaches are never read.
        const float* down = p.down + client * p.down_client;
        const int planes = planes_of(job.kind);
        for (Index r = 0; r < p.rank; r += SIDE)
            for (Index k = 0; k < job.depth; k += SIDE, out += planes * 2 * TILE)
                pack_step(down + r * p.down_rank + k * p.down_depth, Kind::float32, rank - r, p.down_rank,
                          job.depth - k, p.down_depth, planes, blocks(std::min(SIDE, p.rank - r), 16), out);
    } else {
        const float* up = p.up + client * p.up_client;
        for (Index n = 0; n < p.columns; n += SIDE, out += job.up_panel(p))
            pack_up(up + n * p.up_column, job.kind, p.columns - n, p.up_column, rank, p.up_rank, job.rank_blocks(p),
                    p.scaling * job.clients.scalings[client], out);
    }
}

class Task {
  public:
    Task(const Job& job, Index begin, Index end, Index group)
        : job_(job), begin_(begin), end_(end), group_(group), strips_(blocks(end - begin, SIDE)) {
        Index client = std::upper_bound(job.clients.offsets, job.clients.offsets + job.clients.count + 1, begin) -
                       job.clients.offsets - 1;
        for (Index strip = 0; strip < strips_; ++strip) {
            first_share_.push_back(shares_.size());
            const Index from = begin + strip * SIDE, to = std::min(from + SIDE, end);
            while (job.clients.offsets[client + 1] <= from) ++client;
            for (Index c = client; c < job.clients.count && job.clients.offsets[c] < to; ++c) {
                const Index start = std::max<Index>(job.clients.offsets[c], from);
                const Index stop = std::min<Index>(job.clients.offsets[c + 1], to);
                if (start < stop) shares_.push_back({c, start - from, stop - from});
            }
        }
        first_share_.push_back(shares_.size());
    }

    void run() {
        const int planes = planes_of(job_.kind);
        // A float32 result waits in memory between stretches of depth; a bfloat16 one would be rounded there.
        const Index parts = job_.kind == Kind::float32 ? blocks(job_.depth, 768) : 1;
        const Index stretch = blocks(blocks(job_.depth, parts), SIDE) * SIDE;
        Index sums = 0, tiles = 0;
        for (const Projection& p : job_.projections) {
            sums = std::max(sums, blocks(p.rank, 16) * 512);
            tiles = std::max(tiles, job_.h_tiles(p));
        }
        const Index shares = shares_.size(), count = job_.projections.size();
        const Index strip = stretch / SIDE * planes * 2 * TILE;
        thread_local Scratch planes_scratch, sums_scratch, tiles_scratch;
        bf16* x = planes_scratch.take<bf16>(strips_ * strip);
        float* h = sums_scratch.take<float>(count * shares * sums);
        bf16* h_tiles = tiles_scratch.take<bf16>(shares * tiles);
        for (Index k = 0; k < job_.depth; k += stretch) {
            const Index depth = std::min(stretch, job_.depth - k), steps = blocks(depth, SIDE);
            for (Index s = 0; s < strips_; ++s) {
                const Index row = begin_ + s * SIDE;
                split_rows(at(job_.x, job_.kind, row * job_.x_stride + k), job_.kind, job_.x_stride, end_ - row, depth,
                           x + s * strip);
            }
            for (Index i = 0; i < count; ++i) {
                const Projection& p = job_.projections[i];
                if (p.rank) project_down(p, job_.downs[i], x, strip, k / SIDE, steps, k == 0, h + i * shares * sums, sums);
                const bool last = k + stretch >= job_.depth;
                if (p.rank && last) finish(p, h + i * shares * sums, sums, h_tiles, tiles);
                if (p.packed) product(p, x, strip, k / SIDE, steps, k == 0, last ? h_tiles : nullptr, tiles, job_.ups[i]);
            }
        }
    }

  private:
    void project_down(const Projection& p, const bf16* down, const bf16* x, Index strip, Index step, Index steps,
                      bool begin, float* h, Index sums) {
        const int planes = planes_of(job_.kind);
        for (Index s = 0; s < strips_; ++s)
            for (Index i = first_share_[s]; i < first_share_[s + 1]; ++i)
                for (Index r = 0; r < p.rank; r += 16) {
                    const bf16* panel = down + shares_[i].client * job_.down_size(p) +
                                        (r / SIDE * job_.steps() + step) * planes * 2 * TILE + r % SIDE / 16 * TILE;
                    if (begin) std::memset(h + i * sums + r * 32, 0, 512 * sizeof(float));
                    narrow_product(planes, x + s * strip, panel, steps, h + i * sums + r * 32);
                }
    }

    void finish(const Projection& p, const float* h, Index sums, bf16* h_tiles, Index tiles) {
        for (Index s = 0; s < strips_; ++s)
            for (Index i = first_share_[s]; i < first_share_[s + 1]; ++i) {
                void* out = p.h && group_ == 0 ? at(p.h, job_.kind, (begin_ + s * SIDE) * p.h_stride) : nullptr;
                finish_h(h + i * sums, shares_[i].from, shares_[i].to, p.rank, job_.rank_blocks(p), job_.kind, out,
                         p.h_stride, h_tiles + i * tiles);
            }
    }

    void product(const Projection& p, const bf16* x, Index strip, Index step, Index steps, bool begin,
                 const bf16* h_tiles, Index tiles, const bf16* up) {
        const Index p_planes = planes_of(p.kind), panels = blocks(p.columns, SIDE);
        const Index up_panel = job_.up_panel(p);
        alignas(64) float starts[4][256], stops[4][256], tops[4][256];
        constexpr Source zero[4] = {};
        float* const all_stops[4] = {stops[0], stops[1], stops[2], stops[3]};
        float* const all_tops[4] = {tops[0], tops[1], tops[2], tops[3]};
        for (Index n = group_ * panels / job_.column_groups; n < (group_ + 1) * panels / job_.column_groups; ++n) {
            const bf16* panel = static_cast<const bf16*>(p.packed) + (n * job_.steps() + step) * p_planes * 2 * TILE;
            const auto extra_of = [&](Index i) {
                return Extra{h_tiles + i * tiles, up + shares_[i].client * job_.up_size(p) + n * up_panel};
            };
            for (Index s = 0; s < strips_; ++s) {
                const Index row = begin_ + s * SIDE, column = n * SIDE;
                const Index first = first_share_[s], shares = h_tiles && p.rank ? first_share_[s + 1] - first : 0;
                // One client's product goes on top. Of several each goes on top of a copy, of which its own rows are
                // kept: the bits are those of a client alone, and what another made infinite stays in the other's rows.
                const Extra extra = shares == 1 ? extra_of(first) : Extra{};
                // Stretches of a deep product are summed apart, or its rounding would grow with the depth.
                const bool apart = !begin && job_.depth > 4096;
                const bool direct = job_.kind == Kind::float32 && row + SIDE <= end_ && column + SIDE <= p.columns &&
                                    shares < 2 && !apart;
                Source start[4];
                float* stop[4];
                for (int t = 0; t < 4; ++t) {
                    const Index r = row + t / 2 * 16, c = column + t % 2 * 16;
                    start[t] = begin_of(p, s, r, c, begin, direct, starts[t]);
                    stop[t] = direct ? static_cast<float*>(p.out) + r * p.columns + c : all_stops[t];
                }
                if (direct) {
                    const bool more = s + 1 < strips_;
                    expect(p, more ? row + SIDE : begin_, more ? column : column + SIDE);
                }
                block_product(job_.kind, static_cast<int>(p_planes), x + s * strip, panel, steps, &extra, shares == 1,
                              job_.rank_blocks(p), apart ? zero : start, stop, direct ? p.columns * 4 : 64);
                if (direct) continue;
                for (Index i = first; shares > 1 && i < first + shares; ++i) {
                    const Extra own = extra_of(i);
                    const Source sums[4] = {{stops[0], 64}, {stops[1], 64}, {stops[2], 64}, {stops[3], 64}};
                    block_product(job_.kind, static_cast<int>(p_planes), nullptr, nullptr, 0, &own, 1,
                                  job_.rank_blocks(p), sums, all_tops, 64);
                    copy_rows(stops, tops, shares_[i].from, shares_[i].to);
                }
                if (apart) add_all(stops, starts);
                for (int t = 0; t < 4; ++t) {
                    const Index r = row + t / 2 * 16, c = column + t % 2 * 16;
                    if (r < end_ && c < p.columns)
                        write_corner(stops[t], std::min<Index>(16, end_ - r), p.columns - c, job_.kind,
                                     at(p.out, job_.kind, r * p.columns + c), p.columns);
                }
            }
        }
    }

    // Asks for the memory of the block that is next: to own lines that are not in a cache takes as long as a block does.
    void expect(const Projection& p, Index row, Index column) const {
        if (row + SIDE > end_ || column + SIDE > p.columns) return;
        const float* block = static_cast<const float*>(p.out) + row * p.columns + column;
        for (Index r = 0; r < SIDE; ++r) __builtin_prefetch(block + r * p.columns, 1);
    }

    Source begin_of(const Projection& p, Index s, Index row, Index column, bool begin, bool direct, float* buffer) {
        const Index columns = p.columns - column;
        if (row >= end_ || columns <= 0) return {nullptr, 0};
        if (!begin || job_.accumulate) {
            const void* out = at(p.out, job_.kind, row * p.columns + column);
            if (direct) return {static_cast<const float*>(out), static_cast<long>(p.columns * 4)};
            read_corner(buffer, std::min<Index>(16, end_ - row), columns, job_.kind, out, p.columns);
            return {buffer, 64};
        }
        if (!p.bias) return {nullptr, 0};
        const std::size_t width = std::min<Index>(16, columns) * 4;
        if (!p.bias_client) {
            if (columns >= 16) return {p.bias + column, 0};
            std::memcpy(buffer, p.bias + column, width);
            std::memset(buffer + columns, 0, 64 - width);
            return {buffer, 0};
        }
        for (Index i = first_share_[s]; i < first_share_[s + 1]; ++i)
            for (Index r = shares_[i].from; r < shares_[i].to; ++r) {
                const Index line = begin_ + s * SIDE + r - row;
                if (line < 0 || line >= 16) continue;
                std::memcpy(buffer + line * 16, p.bias + shares_[i].client * p.bias_client + column, width);
            }
        return {buffer, 64};
    }

    const Job& job_;
    Index begin_, end_, group_, strips_;
    std::vector<Share> shares_;
    std::vector<Index> first_share_;
};

}  // namespace

bool tiles_available() {
    static const bool available = [] {
        for (const auto& [name, there] : cpu_features())
            for (const char* needed : {"amx_tile", "amx_bf16", "avx512_bf16", "avx512f", "avx512bw", "avx512vl"})
                if (!std::strcmp(name, needed) && !there) return false;
        constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, request, tile_data) == 0;
    }();
    return available;
}

namespace {

std::size_t size_of(Kind kind, Index columns, Index depth) {
    return sizeof(bf16) * blocks(columns, SIDE) * blocks(depth, SIDE) * planes_of(kind) * 2 * TILE;
}

void pack_weight(const void* source, Kind kind, Index columns, Index column_stride, Index depth, Index depth_stride,
                 void* packed, int threads) {
    const Index steps = blocks(depth, SIDE), step_size = planes_of(kind) * 2 * TILE;
    parallel_for(blocks(columns, SIDE), threads, [&](long panel) {
        const Index n = panel * SIDE;
        for (Index step = 0; step < steps; ++step)
            pack_step(at(source, kind, n * column_stride + step * SIDE * depth_stride), kind, columns - n,
                      column_stride, depth - step * SIDE, depth_stride, planes_of(kind), 2,
                      static_cast<bf16*>(packed) + (panel * steps + step) * step_size);
    });
}

void linear(const void* x, Kind kind, Index rows, Index depth, Index x_stride,
            const std::vector<Projection>& projections, const Clients& clients, bool accumulate, int threads) {
    Job job{x, kind, rows, depth, x_stride, projections, clients, accumulate, {}, {}, 0};
    std::size_t size = 0;
    for (const Projection& p : projections) size += clients.count * (job.down_size(p) + job.up_size(p));
    thread_local Scratch adapters;
    bf16* next = adapters.take<bf16>(size);
    for (const Projection& p : projections) {
        job.downs.push_back(next), next += clients.count * job.down_size(p);
        job.ups.push_back(next), next += clients.count * job.up_size(p);
    }
    parallel_for(2 * clients.count * projections.size(), threads, [&](long task) {
        const Index i = task / 2 / clients.count, client = task / 2 % clients.count, is_up = task % 2;
        const Projection& p = projections[i];
        if (!p.rank || (is_up && !p.packed) || clients.offsets[client] == clients.offsets[client + 1]) return;
        const bf16* base = is_up ? job.ups[i] : job.downs[i];
        pack_adapter(job, p, client, is_up, const_cast<bf16*>(base) + client * (is_up ? job.up_size(p) : job.down_size(p)));
    });
    // Rows a task splits at once fill about half of a 2 MiB second-level cache.
    const Index deep = kind == Kind::float32 ? std::min<Index>(depth, 768) : depth;
    const Index budget = std::max<Index>(SIDE, (1 << 20) / (2 * planes_of(kind) * std::max<Index>(deep, 1)) / SIDE * SIDE);
    const Index count = blocks(blocks(rows, std::min<Index>(budget, 512)), threads) * threads;
    const Index strips = blocks(rows, SIDE), row_blocks = std::min(count, strips);
    job.column_groups = row_blocks >= threads ? 1 : blocks(threads, row_blocks);
    parallel_for(row_blocks * job.column_groups, threads, [&](long task) {
        const Index block = task / job.column_groups;
        const Index begin = block * strips / row_blocks * SIDE, end = (block + 1) * strips / row_blocks * SIDE;
        configure();
        Task(job, begin, std::min(end, rows), task % job.column_groups).run();
        release();
    });
}

void gradient_of(const void* h, Index h_stride, Index rank, const void* x, Kind kind, Index columns, Index x_stride,
                 const Clients& clients, float scaling, float* gradient, Index client_stride, Index rank_stride,
                 Index column_stride, int threads) {
    const Index parts = clients.count >= 4 * threads ? 1 : blocks(threads, clients.count);
    const Index slab = blocks(blocks(columns, parts), 64) * 64;
    parallel_for(clients.count * parts, threads, [&](long task) {
        const Index client = task / parts, from = task % parts * slab, width = std::min(slab, columns - from);
        if (width <= 0) return;
        const Index own_rank = std::min<Index>(rank, clients.ranks[client]), rank_blocks = blocks(own_rank, 16);
        thread_local Scratch sums_scratch, tiles_scratch;
        const Index size = blocks(width, 64) * rank_blocks * 1024;
        float* sums = sums_scratch.take<float>(2 * size);
        float* totals = sums + size;
        bf16* tiles = tiles_scratch.take<bf16>(rank_blocks * planes_of(kind) * TILE);
        std::memset(sums, 0, 2 * size * sizeof(float));
        configure();
        const Index end = clients.offsets[client + 1];
        for (Index row = clients.offsets[client]; row < end; row += SIDE) {
            for (Index block = 0; block < rank_blocks; ++block)
                transpose_h(at(h, kind, row * h_stride + block * 16), kind, h_stride, end - row,
                            own_rank - block * 16, tiles + block * planes_of(kind) * TILE);
            const auto add = kind == Kind::float32 ? gradient_rows<3> : gradient_rows<1>;
            add(tiles, rank_blocks, at(x, kind, row * x_stride + from), x_stride, end - row, width, sums);
            // Long sums are summed in parts, or their rounding would grow with the rows.
            if ((row - clients.offsets[client]) % 512 == 512 - SIDE || row + SIDE >= end) move_sums(sums, totals, size);
        }
        release();
        float* own = gradient + client * client_stride + from * column_stride;
        const float s = scaling * clients.scalings[client];
        for (Index k = 0; k < width; k += 16) {
            float* to = own + k * column_stride;
            for (Index r = 0; r < own_rank; r += 16)
                store_gradient(totals + ((k / 64 * rank_blocks + r / 16) * 4 + k % 64 / 16) * 256, s, own_rank - r,
                               width - k, to + r * rank_stride, rank_stride, column_stride);
            for (Index r = own_rank; r < rank; ++r)
                for (Index j = 0; j < std::min<Index>(16, width - k); ++j) to[r * rank_stride + j * column_stride] = 0;
        }
    });
}

}  // namespace

const Engine amx{"amx", tiles_available, true, size_of, pack_weight, linear, gradient_of};

#endif  // FEDERA_TILES

}  // namespace federa
