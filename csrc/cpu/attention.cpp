// Attention over examples of any length, in bfloat16 on the tile units (AMX), an example's head a task.
//
// Scores lie with keys for rows and queries for columns: largest scores and sums run down columns, and of
// probabilities P^T two rows of keys make the pairs that a right-hand factor wants.

#include "cpu/attention.h"

#include <cstring>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/tiles.h"

namespace federa {

#ifndef FEDERA_TILES

bool attention_available(std::int64_t) { return false; }
void attention_forward(const AttentionShape&, Heads, Heads, Heads, HeadsOut, float*, int) {}
void attention_backward(const AttentionShape&, Heads, Heads, Heads, Heads, const float*, Heads, HeadsOut, HeadsOut,
                        HeadsOut, int) {}

#else

namespace {

using namespace tiles;

constexpr Index STEP = 32;  // the depth of a product

FEDERA_TILES_BEGIN

// e^x for x <= 0: 2^n p(r) with |r| <= ln(2) / 2, an error of 3e-6 (what follows is rounded to 4e-3).
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.69314718f), x);
    __m512 p = _mm512_set1_ps(1.0f / 120);
    for (const float c : {1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

// `low` and `high` rounded: 32 in a row.
inline __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

inline void store_rounded(bf16* to, __m512 values, __mmask16 mask) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(values));
}

// Rows (length, D) -> (padded, D), zero below.
void copy_rows(const bf16* from, Index stride, Index length, Index padded, Index D, bf16* to) {
    for (Index row = 0; row < length; ++row) std::memcpy(to + row * D, from + row * stride, D * sizeof(bf16));
    std::memset(to + length * D, 0, (padded - length) * D * sizeof(bf16));
}

// X (padded, D) as the right-hand factor X^T: [16 rows][D / 32][16 pairs of columns][16 rows][2].
void pack_transposed(const bf16* X, Index padded, Index D, bf16* to) {
    for (Index row = 0; row < padded; row += 16)
        for (Index d = 0; d < D; d += STEP, to += TILE) {
            __m512i lines[16];
            for (Index i = 0; i < 16; ++i) lines[i] = _mm512_loadu_si512(X + (row + i) * D + d);
            transpose(lines);
            for (Index i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, lines[i]);
        }
}

// The same as the left-hand factor X^T: [D / 16][32 rows][16 columns][32 rows].
void turn_packed(const bf16* packed, Index padded, Index D, bf16* to) {
    alignas(64) std::uint16_t even[32], odd[32];
    for (int i = 0; i < 32; ++i) even[i] = static_cast<std::uint16_t>(2 * i), odd[i] = static_cast<std::uint16_t>(2 * i + 1);
    const __m512i evens = _mm512_load_si512(even), odds = _mm512_load_si512(odd);
    const Index steps = padded / STEP, across = D / STEP;
    for (Index step = 0; step < steps; ++step)
        for (Index pair = 0; pair < D / 2; ++pair) {
            const bf16* upper = packed + (2 * step * across + pair / 16) * TILE + pair % 16 * 32;
            const __m512i low = _mm512_load_si512(upper), high = _mm512_load_si512(upper + across * TILE);
            bf16* out = to + (pair / 8 * steps + step) * TILE + 2 * (pair % 8) * 32;
            _mm512_store_si512(out, _mm512_permutex2var_epi16(low, evens, high));
            _mm512_store_si512(out + 32, _mm512_permutex2var_epi16(low, odds, high));
        }
}

// X (padded, D) as the right-hand factor X: [32 rows][D / 16][16 pairs of rows][16 columns][2].
void pack_pairs(const bf16* X, Index padded, Index D, bf16* to) {
    for (Index row = 0; row < padded; row += STEP)
        for (Index d = 0; d < D; d += 16, to += TILE)
            for (Index pair = 0; pair < 16; ++pair) {
                const bf16* from = X + (row + 2 * pair) * D + d;
                const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
                const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + D));
                _mm512_store_si512(to + pair * 32, interleaved(_mm512_inserti64x4(_mm512_castsi256_si512(one), other, 1)));
            }
}

// sums [32][32] = 32 rows of X (D columns) times 32 rows of another, given by `pack_transposed`.
template <Index D>
inline void scores(const bf16* X, const bf16* Y, float* sums) {
    stores_are_done();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (Index d = 0; d < D / STEP; ++d) {
        _tile_loadd(4, X + d * STEP, D * 2);
        _tile_loadd(5, X + 16 * D + d * STEP, D * 2);
        _tile_loadd(6, Y + d * TILE, 64);
        _tile_loadd(7, Y + (D / STEP + d) * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 512, 128);
    _tile_stored(3, sums + 528, 128);
}

// sums [16 rows][32 columns] = left right, 16 rows of `left` (tiles) and two tiles of 16 columns, over `steps`.
inline void product(const bf16* left, const bf16* right, Index steps, float* sums) {
    stores_are_done();
    _tile_zero(0);
    _tile_zero(1);
    for (Index step = 0; step < steps; ++step) {
        _tile_loadd(4, left + step * TILE, 64);
        _tile_loadd(6, right + 2 * step * TILE, 64);
        _tile_loadd(7, right + (2 * step + 1) * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
}

// 16 entries from `d` on of 32 rows, given as columns [16][32], times `factors` (32) -> bfloat16 rows, `count` of them.
void store_columns(const float* sums, const float* factors, Index count, bf16* to, Index stride) {
    for (Index half = 0; half < 2; ++half) {
        __m512i lines[16];
        const __m512 factor = _mm512_loadu_ps(factors + half * 16);
        for (Index i = 0; i < 16; ++i)
            lines[i] = _mm512_castps_si512(_mm512_mul_ps(factor, _mm512_loadu_ps(sums + i * 32 + half * 16)));
        transpose(lines);
        for (Index i = 0; i < std::min<Index>(16, count - half * 16); ++i)
            store_rounded(to + (half * 16 + i) * stride, _mm512_castsi512_ps(lines[i]), 0xffff);
    }
}

// One head of one example of `length` tokens. Buffers are of `padded` = whole 32s.
template <Index D>
void forward(Index length, Index padded, float scale, const bf16* K, const bf16* Q_columns, const bf16* V_turned, float* S,
             bf16* P, bf16* out, Index stride, float* peaks, float* shares) {
    const __m512 scales = _mm512_set1_ps(scale);
    for (Index query = 0; query < padded; query += STEP) {
        __m512 peak[2], sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        peak[0] = peak[1] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        for (Index key = 0; key < padded; key += STEP) {
            scores<D>(K + key * D, Q_columns + query / 16 * (D / STEP) * TILE, S + key * STEP);
            for (Index k = key; k < std::min(key + STEP, length); ++k)
                for (int half = 0; half < 2; ++half)
                    peak[half] = _mm512_max_ps(peak[half], _mm512_loadu_ps(S + k * STEP + half * 16));
        }
        for (int half = 0; half < 2; ++half) peak[half] = _mm512_mul_ps(peak[half], scales);
        for (Index key = 0; key < padded; key += 2)
            for (int half = 0; half < 2; ++half) {
                __m512 p[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
                for (Index i = 0; i < std::min<Index>(2, length - key); ++i) {
                    const __m512 score = _mm512_loadu_ps(S + (key + i) * STEP + half * 16);
                    p[i] = exponential(_mm512_fmsub_ps(score, scales, peak[half]));
                    sum[half] = _mm512_add_ps(sum[half], p[i]);
                }
                _mm512_store_si512(P + (key / STEP * 2 + half) * TILE + key % STEP * 16, interleaved(rounded(p[0], p[1])));
            }
        const Index count = std::min(STEP, length - query);
        alignas(64) float share[32], sums[16 * STEP];
        for (int half = 0; half < 2; ++half) {
            const __m512 own = _mm512_div_ps(_mm512_set1_ps(1.0f), sum[half]);
            _mm512_store_ps(share + half * 16, own);
            _mm512_mask_storeu_ps(shares + query + half * 16, first(count - half * 16), own);
            _mm512_mask_storeu_ps(peaks + query + half * 16, first(count - half * 16), peak[half]);
        }
        for (Index d = 0; d < D; d += 16) {
            product(V_turned + d / 16 * (padded / STEP) * TILE, P, padded / STEP, sums);
            store_columns(sums, share, count, out + query * stride + d, stride);
        }
    }
}

// sum over d of a b, of rows (D).
inline float dot(const bf16* a, const bf16* b, Index D) {
    __m512 sum = _mm512_setzero_ps();
    for (Index d = 0; d < D; d += 16)
        sum = _mm512_fmadd_ps(widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + d))),
                              widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + d))), sum);
    return _mm512_reduce_add_ps(sum);
}

// totals [D / 16][16 rows][16] += left right: 16 rows of `left`, 32 deep, and D columns.
template <Index D>
inline void add_product(const bf16* left, const bf16* right, float* totals) {
    stores_are_done();
    _tile_loadd(6, left, 64);
#define FEDERA_ADD(T, RIGHT)                \
    _tile_loadd(T, totals + T * 256, 64);   \
    _tile_loadd(RIGHT, right + T * TILE, 64); \
    _tile_dpbf16ps(T, 6, RIGHT);            \
    _tile_stored(T, totals + T * 256, 64);
    FEDERA_ADD(0, 4)
    FEDERA_ADD(1, 5)
    if constexpr (D == 64) {
        FEDERA_ADD(2, 4)
        FEDERA_ADD(3, 5)
    }
#undef FEDERA_ADD
}

template <Index D>
void store_totals(const float* totals, Index length, bf16* to, Index stride) {
    for (Index row = 0; row < length; ++row)
        for (Index d = 0; d < D; d += 16)
            store_rounded(to + row * stride + d, _mm512_loadu_ps(totals + ((row / 16 * (D / 16)) + d / 16) * 256 + row % 16 * 16),
                          0xffff);
}

struct Operands {  // of the backward: rows, and forms of them
    const bf16 *K, *V, *K_turned, *Q_columns, *dO_columns, *Q_pairs, *dO_pairs;
};

template <Index D>
void backward(Index length, Index padded, float scale, const Operands& x, const float* peaks, const float* shares,
              const float* deltas, bf16* P_rows, bf16* dS_rows, bf16* dS_pairs, float* dK, float* dV, bf16* dq,
              Index dq_stride) {
    const __m512 scales = _mm512_set1_ps(scale);
    const Index block = D / 16 * 256;
    alignas(64) float S[STEP * STEP], dP[STEP * STEP], sums[16 * STEP], ones[32];
    for (float& one : ones) one = 1.0f;
    std::memset(dK, 0, padded * D * sizeof(float));
    std::memset(dV, 0, padded * D * sizeof(float));
    for (Index query = 0; query < padded; query += STEP) {
        const Index columns = query / 16 * (D / STEP) * TILE;
        for (Index key = 0; key < padded; key += STEP) {
            scores<D>(x.K + key * D, x.Q_columns + columns, S);
            scores<D>(x.V + key * D, x.dO_columns + columns, dP);
            for (Index k = 0; k < STEP; k += 2) {
                __m512 p[2][2] = {}, ds[2][2] = {};  // [key][half of the queries]
                for (Index i = 0; i < std::min<Index>(2, length - key - k); ++i)
                    for (int half = 0; half < 2; ++half) {
                        const Index at = (k + i) * STEP + half * 16, q = query + half * 16;
                        const __m512 e = exponential(_mm512_fmsub_ps(_mm512_load_ps(S + at), scales, _mm512_loadu_ps(peaks + q)));
                        p[i][half] = _mm512_mul_ps(e, _mm512_loadu_ps(shares + q));
                        const __m512 change = _mm512_sub_ps(_mm512_load_ps(dP + at), _mm512_loadu_ps(deltas + q));
                        ds[i][half] = _mm512_mul_ps(_mm512_mul_ps(p[i][half], scales), change);
                    }
                for (Index i = 0; i < 2; ++i) {
                    _mm512_store_si512(P_rows + (key + k + i) * STEP, rounded(p[i][0], p[i][1]));
                    _mm512_store_si512(dS_rows + (key + k + i) * STEP, rounded(ds[i][0], ds[i][1]));
                }
                for (int half = 0; half < 2; ++half)
                    _mm512_store_si512(dS_pairs + (key / STEP * 2 + half) * TILE + k * 16,
                                       interleaved(rounded(ds[0][half], ds[1][half])));
            }
        }
        for (Index key = 0; key < padded; key += 16) {
            add_product<D>(P_rows + key * STEP, x.dO_pairs + query / STEP * (D / 16) * TILE, dV + key / 16 * block);
            add_product<D>(dS_rows + key * STEP, x.Q_pairs + query / STEP * (D / 16) * TILE, dK + key / 16 * block);
        }
        for (Index d = 0; d < D; d += 16) {
            product(x.K_turned + d / 16 * (padded / STEP) * TILE, dS_pairs, padded / STEP, sums);
            store_columns(sums, ones, std::min(STEP, length - query), dq + query * dq_stride + d, dq_stride);
        }
    }
}

FEDERA_TILES_END

// Cuts a thread's memory into pieces on cache lines.
class Pieces {
  public:
    template <class T>
    T* take(Index count) {
        T* piece = reinterpret_cast<T*>(next_);
        next_ += blocks(count * sizeof(T), 64) * 64;
        return piece;
    }
    void begin(Index bytes) { next_ = scratch_.take<unsigned char>(bytes); }

  private:
    Scratch scratch_;
    unsigned char* next_ = nullptr;
};

thread_local Pieces pieces;

template <Index D>
void forward_task(const AttentionShape& shape, Index example, Index head, Heads q, Heads k, Heads v, HeadsOut out,
                  float* softmax) {
    const Index begin = shape.offsets[example], length = shape.offsets[example + 1] - begin;
    const Index padded = blocks(length, STEP) * STEP, size = padded * D;
    pieces.begin(5 * size * sizeof(bf16) + padded * STEP * (sizeof(float) + sizeof(bf16)));
    bf16 *rows = pieces.take<bf16>(size), *Q_columns = pieces.take<bf16>(size), *packed = pieces.take<bf16>(size);
    bf16 *V_turned = pieces.take<bf16>(size), *K = pieces.take<bf16>(size);
    float* S = pieces.take<float>(padded * STEP);
    bf16* P = pieces.take<bf16>(padded * STEP);
    copy_rows(q.at(begin, head), q.token, length, padded, D, rows);
    pack_transposed(rows, padded, D, Q_columns);
    copy_rows(v.at(begin, head), v.token, length, padded, D, rows);
    pack_transposed(rows, padded, D, packed);
    turn_packed(packed, padded, D, V_turned);
    copy_rows(k.at(begin, head), k.token, length, padded, D, K);
    float* peaks = softmax + head * shape.tokens() + begin;
    configure();
    forward<D>(length, padded, shape.scale, K, Q_columns, V_turned, S, P, out.at(begin, head), out.token, peaks,
               peaks + shape.heads * shape.tokens());
    release();
}

template <Index D>
void backward_task(const AttentionShape& shape, Index example, Index head, Heads q, Heads k, Heads v, Heads out,
                   const float* softmax, Heads d_out, HeadsOut dq, HeadsOut dk, HeadsOut dv) {
    const Index begin = shape.offsets[example], length = shape.offsets[example + 1] - begin;
    const Index padded = blocks(length, STEP) * STEP, size = padded * D;
    pieces.begin(9 * size * sizeof(bf16) + 3 * padded * STEP * sizeof(bf16) + (2 * size + 3 * padded) * sizeof(float));
    bf16 *rows = pieces.take<bf16>(size), *packed = pieces.take<bf16>(size), *K = pieces.take<bf16>(size);
    bf16 *V = pieces.take<bf16>(size), *K_turned = pieces.take<bf16>(size), *Q_columns = pieces.take<bf16>(size);
    bf16 *dO_columns = pieces.take<bf16>(size), *Q_pairs = pieces.take<bf16>(size), *dO_pairs = pieces.take<bf16>(size);
    bf16 *P_rows = pieces.take<bf16>(padded * STEP), *dS_rows = pieces.take<bf16>(padded * STEP);
    bf16* dS_pairs = pieces.take<bf16>(padded * STEP);
    float *dK = pieces.take<float>(size), *dV = pieces.take<float>(size);
    float *peaks = pieces.take<float>(padded), *shares = pieces.take<float>(padded), *deltas = pieces.take<float>(padded);
    copy_rows(k.at(begin, head), k.token, length, padded, D, K);
    pack_transposed(K, padded, D, packed);
    turn_packed(packed, padded, D, K_turned);
    copy_rows(v.at(begin, head), v.token, length, padded, D, V);
    copy_rows(q.at(begin, head), q.token, length, padded, D, rows);
    pack_transposed(rows, padded, D, Q_columns);
    pack_pairs(rows, padded, D, Q_pairs);
    copy_rows(d_out.at(begin, head), d_out.token, length, padded, D, rows);
    pack_transposed(rows, padded, D, dO_columns);
    pack_pairs(rows, padded, D, dO_pairs);
    const float *own = softmax + head * shape.tokens() + begin, *own_shares = own + shape.heads * shape.tokens();
    for (Index m = 0; m < padded; ++m) {  // beyond the example probabilities are 0
        peaks[m] = m < length ? own[m] : 0.0f;
        shares[m] = m < length ? own_shares[m] : 0.0f;
        deltas[m] = m < length ? dot(out.at(begin + m, head), rows + m * D, D) : 0.0f;
    }
    configure();
    backward<D>(length, padded, shape.scale, {K, V, K_turned, Q_columns, dO_columns, Q_pairs, dO_pairs}, peaks, shares,
                deltas, P_rows, dS_rows, dS_pairs, dK, dV, dq.at(begin, head), dq.token);
    release();
    store_totals<D>(dK, length, dk.at(begin, head), dk.token);
    store_totals<D>(dV, length, dv.at(begin, head), dv.token);
}

}  // namespace

bool attention_available(std::int64_t dim) { return (dim == 32 || dim == 64) && tiles_available(); }

void attention_forward(const AttentionShape& shape, Heads q, Heads k, Heads v, HeadsOut out, float* softmax,
                       int threads) {
    const auto task = shape.dim == 32 ? forward_task<32> : forward_task<64>;
    parallel_for(shape.examples * shape.heads, threads, [&](long number) {
        task(shape, number / shape.heads, number % shape.heads, q, k, v, out, softmax);
    });
}

void attention_backward(const AttentionShape& shape, Heads q, Heads k, Heads v, Heads out, const float* softmax,
                        Heads d_out, HeadsOut dq, HeadsOut dk, HeadsOut dv, int threads) {
    const auto task = shape.dim == 32 ? backward_task<32> : backward_task<64>;
    parallel_for(shape.examples * shape.heads, threads, [&](long number) {
        task(shape, number / shape.heads, number % shape.heads, q, k, v, out, softmax, d_out, dq, dk, dv);
    });
}

#endif

}  // namespace federa
