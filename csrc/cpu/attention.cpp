// Attention over examples of any length on the tile units (AMX), an example's head a task.
//
// Scores lie with keys for rows and queries for columns: largest scores and sums run down columns, and of
// probabilities P^T rows k and k + 16 make the pairs that a right-hand factor wants.
//
// Factors lie in tiles, 32 entries of what is summed over in pairs (i, i + 16), one plane for bfloat16 and three for
// float32. X (rows, D) is taken apart once; its other forms move halves of 32 bits:
//
//     rows     [16 rows][32 columns]    left X          columns = turned(rows)    right X^T
//     pairs  = zipped(rows)             right X         zipped(columns)           left X^T

#include "cpu/attention.h"

#include <cstring>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/tiles.h"

namespace federa {

#ifndef FEDERA_TILES

bool attention_available(std::int64_t) { return false; }
template <class T>
void attention_forward(const AttentionShape&, Heads<const T>, Heads<const T>, Heads<const T>, Heads<T>, float*, int) {}
template <class T>
void attention_backward(const AttentionShape&, Heads<const T>, Heads<const T>, Heads<const T>, Heads<const T>,
                        const float*, Heads<const T>, Heads<T>, Heads<T>, Heads<T>, int) {}

#else

namespace {

using namespace tiles;

constexpr Index STEP = 32;  // rows, columns and depth of a step

template <class T>
constexpr Index PLANES = sizeof(T) == 4 ? 3 : 1;

struct Span {  // of an example's keys or queries
    Index begin, length, padded;

    Span(const std::int64_t* offsets, Index example)
        : begin(offsets[example]), length(offsets[example + 1] - begin), padded(blocks(length, STEP) * STEP) {}
};

FEDERA_TILES_BEGIN

// 2^x for x <= 0: 2^n p(r) with |r| <= 1/2, p of the least largest error (found by Remez' exchange): 2e-9, or 3e-6
// where what follows is rounded to 4e-3. Below 2^-100 it stops: numbers too small to be normal take many cycles.
template <class T>
inline __m512 power_of_two(__m512 x) {
    constexpr float exact[] = {1.5345812e-4f, 1.3399931e-3f, 9.618489e-3f, 5.5503286e-2f, 0.24022646f, 0.6931472f, 1};
    constexpr float rough[] = {9.570102e-3f, 5.591786e-2f, 0.24024744f, 0.6931218f, 0.9999993f};
    x = _mm512_max_ps(x, _mm512_set1_ps(-100.0f));
    const __m512 n = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(sizeof(T) == 4 ? exact[0] : rough[0]);
    if constexpr (sizeof(T) == 4)
        for (int i = 1; i < 7; ++i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(exact[i]));
    else
        for (int i = 1; i < 5; ++i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(rough[i]));
    return _mm512_scalef_ps(p, n);
}

// Entries i of `low` and `high` side by side: a row in the tile of every plane.
template <class T>
inline void store_apart(__m512 low, __m512 high, bf16* to) {
    if constexpr (sizeof(T) == 4) {
        __m512i planes[3];
        cut(low, high, planes);
        for (Index plane = 0; plane < 3; ++plane) _mm512_store_si512(to + plane * TILE, planes[plane]);
    } else {
        _mm512_store_si512(to, interleaved((__m512i)_mm512_cvtne2ps_pbh(high, low)));
    }
}

inline void load_planes(const float* from, __m512i planes[]) {
    split(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16), planes);
}
inline void load_planes(const bf16* from, __m512i planes[]) { planes[0] = interleaved(_mm512_loadu_si512(from)); }

inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }
inline __m512 load(const bf16* from) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }

inline void store(float* to, __m512 values) { _mm512_storeu_ps(to, values); }
inline void store(bf16* to, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(values));
}

// X (length, D) -> [16 rows][D / 32][plane] tiles [16 rows][16 pairs of columns], zero below; fetches the next head.
template <Index D, class T>
void take_rows(Heads<const T> X, Span span, bf16* to) {
    constexpr Index planes = PLANES<T>, group = D / STEP * planes * TILE;
    __m512i parts[planes];
    for (Index row = 0; row < span.padded; ++row)
        for (Index d = 0; d < D / STEP; ++d) {
            if (row < span.length) {
                const T* from = X.data + row * X.token + d * STEP;
                load_planes(from, parts);
                for (Index i = 0; i < STEP; i += 64 / sizeof(T)) _mm_prefetch(from + X.head + i, _MM_HINT_T1);
            } else
                for (__m512i& part : parts) part = _mm512_setzero_si512();
            bf16* own = to + row / 16 * group + d * planes * TILE + row % 16 * 32;
            for (Index plane = 0; plane < planes; ++plane) _mm512_store_si512(own + plane * TILE, parts[plane]);
        }
}

// Every tile with its rows for columns: [16 rows][D / 32][plane] tiles [16 pairs of columns][16 rows].
void turned(const bf16* tiles, Index count, bf16* to) {
    for (const bf16* end = tiles + count * TILE; tiles < end; tiles += TILE, to += TILE) {
        __m512i lines[16];
        for (Index i = 0; i < 16; ++i) lines[i] = _mm512_load_si512(tiles + i * 32);
        transpose(lines);
        for (Index i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, lines[i]);
    }
}

// [32 rows][D / 16][plane] tiles, of rows [16 pairs of rows][16 columns], of columns [16 columns][16 pairs of rows].
template <Index D, Index P>
void zipped(const bf16* tiles, Index padded, bf16* to) {
    constexpr Index group = D / STEP * P * TILE;
    for (const bf16* end = tiles + padded / 16 * group; tiles < end; tiles += 2 * group)
        for (Index d = 0; d < D / STEP; ++d, to += 2 * P * TILE)
            for (Index i = 0; i < P * TILE; i += 32) {
                constexpr __mmask32 upper = 0xaaaaaaaa;
                const __m512i low = _mm512_load_si512(tiles + d * P * TILE + i);
                const __m512i high = _mm512_load_si512(tiles + d * P * TILE + i + group);
                const __m512i lows = _mm512_mask_blend_epi16(upper, low, _mm512_slli_epi32(high, 16));
                const __m512i highs = _mm512_mask_blend_epi16(upper, _mm512_srli_epi32(low, 16), high);
                _mm512_store_si512(to + i, lows);
                _mm512_store_si512(to + i + P * TILE, highs);
            }
}

struct Factor {  // 32 rows or columns in two halves, 32 of depth a step; halves and steps lie so far apart
    const bf16* tiles;
    Index half, step;
};

// sums (32, 32) = left right, or added to.
template <Index P, bool ADD = false>
inline void product(Factor left, Factor right, Index steps, float* sums) {
    stores_are_done();
    if constexpr (ADD) {
        _tile_loadd(0, sums, 128);
        _tile_loadd(1, sums + 16, 128);
        _tile_loadd(2, sums + 512, 128);
        _tile_loadd(3, sums + 528, 128);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
#define LEFT(PLANE)                                   \
    _tile_loadd(4, left.tiles + (PLANE) * TILE, 64); \
    _tile_loadd(5, left.tiles + left.half + (PLANE) * TILE, 64);
#define RIGHT(PLANE)                                  \
    _tile_loadd(6, right.tiles + (PLANE) * TILE, 64); \
    _tile_loadd(7, right.tiles + right.half + (PLANE) * TILE, 64);
#define PRODUCT              \
    _tile_dpbf16ps(0, 4, 6); \
    _tile_dpbf16ps(1, 4, 7); \
    _tile_dpbf16ps(2, 5, 6); \
    _tile_dpbf16ps(3, 5, 7);
    for (Index step = 0; step < steps; ++step, left.tiles += left.step, right.tiles += right.step) {
        if constexpr (P == 3) {  // the nine but three that lie below float32's rounding
            LEFT(0) RIGHT(2) PRODUCT
            RIGHT(1) PRODUCT
            RIGHT(0) PRODUCT
            LEFT(2) PRODUCT
            LEFT(1) PRODUCT
            RIGHT(1) PRODUCT
        } else {
            LEFT(0) RIGHT(0) PRODUCT
        }
    }
#undef LEFT
#undef RIGHT
#undef PRODUCT
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 512, 128);
    _tile_stored(3, sums + 528, 128);
}

// sums (32, 32) with columns for rows, each times its factor -> `count` rows of 32.
template <class T>
void store_columns(const float* sums, const float* factors, Index count, T* to, Index stride) {
    for (Index corner = 0; corner < 4; ++corner) {
        const Index row = corner / 2 * 16, column = corner % 2 * 16;
        const __m512 factor = _mm512_loadu_ps(factors + column);
        __m512i lines[16];
        for (Index i = 0; i < 16; ++i)
            lines[i] = _mm512_castps_si512(_mm512_mul_ps(factor, _mm512_loadu_ps(sums + (row + i) * STEP + column)));
        transpose(lines);
        for (Index i = 0; i < std::min<Index>(16, count - column); ++i)
            store(to + (column + i) * stride + row, _mm512_castsi512_ps(lines[i]));
    }
}

template <class T>
void store_rows(const float* sums, float factor, Index count, T* to, Index stride) {
    for (Index row = 0; row < std::min(count, STEP); ++row)
        for (Index column = 0; column < STEP; column += 16)
            store(to + row * stride + column,
                  _mm512_mul_ps(_mm512_set1_ps(factor), _mm512_loadu_ps(sums + row * STEP + column)));
}

// sum over d of a b, of rows (D).
template <class T>
inline float dot(const T* a, const T* b, Index D) {
    __m512 sum = _mm512_setzero_ps();
    for (Index d = 0; d < D; d += 16) sum = _mm512_fmadd_ps(load(a + d), load(b + d), sum);
    return _mm512_reduce_add_ps(sum);
}

// One head of one example, scores in units of log 2.
template <Index D, class T>
void forward(Span keys, Span queries, float scale, const bf16* K, const bf16* Q_columns, const bf16* V_turned,
             float* S, bf16* P, T* out, Index stride, float* peaks, float* shares) {
    constexpr Index planes = PLANES<T>, tile = planes * TILE, group = D / STEP * tile;
    const __m512 scales = _mm512_set1_ps(scale);
    for (Index query = 0; query < queries.padded; query += STEP) {
        const Factor Q{Q_columns + query / 16 * group, group, tile};
        __m512 peak[2], sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        peak[0] = peak[1] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        for (Index key = 0; key < keys.padded; key += STEP) {
            product<planes>({K + key / 16 * group, group, tile}, Q, D / STEP, S + key * STEP);
            for (Index k = key; k < std::min(key + STEP, keys.length); ++k)
                for (int half = 0; half < 2; ++half)
                    peak[half] = _mm512_max_ps(peak[half], _mm512_loadu_ps(S + k * STEP + half * 16));
        }
        for (int half = 0; half < 2; ++half) peak[half] = _mm512_mul_ps(peak[half], scales);
        for (Index key = 0; key < keys.padded; key += STEP) {
            __m512 own[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};  // summed apart, for short chains of sums
            for (Index pair = 0; pair < 16; ++pair)
                for (int half = 0; half < 2; ++half) {
                    __m512 p[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
                    for (int i = 0; i < 2; ++i) {
                        const Index k = key + pair + 16 * i;
                        if (k >= keys.length) break;
                        const __m512 score = _mm512_loadu_ps(S + k * STEP + half * 16);
                        p[i] = power_of_two<T>(_mm512_fmsub_ps(score, scales, peak[half]));
                        own[half] = _mm512_add_ps(own[half], p[i]);
                    }
                    store_apart<T>(p[0], p[1], P + key / 16 * tile + half * tile + pair * 32);
                }
            for (int half = 0; half < 2; ++half) sum[half] = _mm512_add_ps(sum[half], own[half]);
        }
        const Index count = std::min(STEP, queries.length - query);
        alignas(64) float share[32], sums[STEP * STEP];
        for (int half = 0; half < 2; ++half) {
            const __m512 own = _mm512_div_ps(_mm512_set1_ps(1.0f), sum[half]);
            _mm512_store_ps(share + half * 16, own);
            _mm512_mask_storeu_ps(shares + query + half * 16, first(count - half * 16), own);
            _mm512_mask_storeu_ps(peaks + query + half * 16, first(count - half * 16), peak[half]);
        }
        for (Index d = 0; d < D; d += STEP) {
            const Factor V{V_turned + d / 16 * tile, tile, 2 * group};
            product<planes>(V, {P, tile, 2 * tile}, keys.padded / STEP, sums);
            store_columns(sums, share, count, out + query * stride + d, stride);
        }
    }
}

struct Operands {  // of the backward
    const bf16 *K, *V, *K_turned, *Q_columns, *dO_columns, *Q_pairs, *dO_pairs;
};

// dq_sums: [32 queries][D / 32] (32, 32) of dq^T.
template <Index D, class T>
void backward(Span keys, Span queries, float scale, const Operands& x, const float* peaks, const float* shares,
              const float* deltas, bf16* P_rows, bf16* dS_rows, float* dq_sums, Heads<T> dk, Heads<T> dv) {
    constexpr Index planes = PLANES<T>, tile = planes * TILE, group = D / STEP * tile;
    const __m512 scales = _mm512_set1_ps(1.44269504f * scale);
    alignas(64) float S[STEP * STEP], dP[STEP * STEP];
    alignas(64) bf16 dS_pairs[2 * tile];
    std::memset(dq_sums, 0, queries.padded * D * sizeof(float));
    for (Index key = 0; key < keys.padded; key += STEP) {
        for (Index query = 0; query < queries.padded; query += STEP) {
            const Factor Q{x.Q_columns + query / 16 * group, group, tile};
            const Factor dO{x.dO_columns + query / 16 * group, group, tile};
            product<planes>({x.K + key / 16 * group, group, tile}, Q, D / STEP, S);
            product<planes>({x.V + key / 16 * group, group, tile}, dO, D / STEP, dP);
            for (Index pair = 0; pair < 16; ++pair) {
                __m512 p[2][2] = {}, ds[2][2] = {};  // [key][half of the queries]
                for (int i = 0; i < 2; ++i) {
                    if (key + pair + 16 * i >= keys.length) break;
                    for (int half = 0; half < 2; ++half) {
                        const Index at = (pair + 16 * i) * STEP + half * 16, q = query + half * 16;
                        const __m512 score = _mm512_load_ps(S + at), change = _mm512_load_ps(dP + at);
                        const __m512 e = power_of_two<T>(_mm512_fmsub_ps(score, scales, _mm512_loadu_ps(peaks + q)));
                        p[i][half] = _mm512_mul_ps(e, _mm512_loadu_ps(shares + q));
                        ds[i][half] = _mm512_mul_ps(p[i][half], _mm512_sub_ps(change, _mm512_loadu_ps(deltas + q)));
                    }
                }
                const Index row = query / 16 * tile + pair * 32;
                for (int i = 0; i < 2; ++i) {
                    store_apart<T>(p[i][0], p[i][1], P_rows + row + i * tile);
                    store_apart<T>(ds[i][0], ds[i][1], dS_rows + row + i * tile);
                }
                for (int half = 0; half < 2; ++half)
                    store_apart<T>(ds[0][half], ds[1][half], dS_pairs + half * tile + pair * 32);
            }
            for (Index d = 0; d < D; d += STEP) {
                const Factor K{x.K_turned + key / 16 * group + d / 16 * tile, tile, 0};
                product<planes, true>(K, {dS_pairs, tile, 0}, 1, dq_sums + query * D + d * STEP);
            }
        }
        for (Index d = 0; d < D; d += STEP) {
            const Factor dO{x.dO_pairs + d / 16 * tile, tile, 2 * group};
            const Factor Q{x.Q_pairs + d / 16 * tile, tile, 2 * group};
            product<planes>({P_rows, tile, 2 * tile}, dO, queries.padded / STEP, S);
            store_rows(S, 1.0f, keys.length - key, dv.data + key * dv.token + d, dv.token);
            product<planes>({dS_rows, tile, 2 * tile}, Q, queries.padded / STEP, S);
            store_rows(S, scale, keys.length - key, dk.data + key * dk.token + d, dk.token);
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

template <Index D, class T>
void forward_task(const AttentionShape& shape, Index example, Index head, Heads<const T> q, Heads<const T> k,
                  Heads<const T> v, Heads<T> out, float* softmax) {
    const Span keys(shape.keys, example), queries(shape.queries, example);
    const Index size = keys.padded * D * PLANES<T>, query_size = queries.padded * D * PLANES<T>;
    const Index wide = keys.padded * STEP;
    pieces.begin((3 * size + query_size + std::max(size, query_size) + wide * PLANES<T>) * sizeof(bf16) +
                 wide * sizeof(float));
    bf16 *rows = pieces.take<bf16>(std::max(size, query_size)), *columns = pieces.take<bf16>(size);
    bf16 *K = pieces.take<bf16>(size), *V_turned = pieces.take<bf16>(size), *Q_columns = pieces.take<bf16>(query_size);
    bf16* P = pieces.take<bf16>(wide * PLANES<T>);
    float* S = pieces.take<float>(wide);
    take_rows<D>(q.from(queries.begin, head), queries, rows);
    turned(rows, query_size / TILE, Q_columns);
    take_rows<D>(v.from(keys.begin, head), keys, rows);
    turned(rows, size / TILE, columns);
    zipped<D, PLANES<T>>(columns, keys.padded, V_turned);
    take_rows<D>(k.from(keys.begin, head), keys, K);
    const Index all = shape.queries[shape.examples];
    float* peaks = softmax + head * all + queries.begin;
    configure();
    forward<D>(keys, queries, 1.44269504f * shape.scale, K, Q_columns, V_turned, S, P, out.at(queries.begin, head),
               out.token, peaks, peaks + shape.heads * all);
    release();
}

template <Index D, class T>
void backward_task(const AttentionShape& shape, Index example, Index head, Heads<const T> q, Heads<const T> k,
                   Heads<const T> v, Heads<const T> out, const float* softmax, Heads<const T> d_out, Heads<T> dq,
                   Heads<T> dk, Heads<T> dv) {
    const Span keys(shape.keys, example), queries(shape.queries, example);
    const Index size = keys.padded * D * PLANES<T>, query_size = queries.padded * D * PLANES<T>;
    const Index wide = queries.padded * STEP * PLANES<T>, padded = queries.padded;
    pieces.begin((4 * size + 5 * query_size + 2 * wide) * sizeof(bf16) + (padded * D + 3 * padded) * sizeof(float));
    bf16 *K = pieces.take<bf16>(size), *V = pieces.take<bf16>(size), *columns = pieces.take<bf16>(size);
    bf16 *K_turned = pieces.take<bf16>(size), *rows = pieces.take<bf16>(query_size);
    bf16 *Q_columns = pieces.take<bf16>(query_size), *Q_pairs = pieces.take<bf16>(query_size);
    bf16 *dO_columns = pieces.take<bf16>(query_size), *dO_pairs = pieces.take<bf16>(query_size);
    bf16 *P_rows = pieces.take<bf16>(wide), *dS_rows = pieces.take<bf16>(wide);
    float* dq_sums = pieces.take<float>(padded * D);
    float *peaks = pieces.take<float>(padded), *shares = pieces.take<float>(padded);
    float* deltas = pieces.take<float>(padded);
    take_rows<D>(k.from(keys.begin, head), keys, K);
    turned(K, size / TILE, columns);
    zipped<D, PLANES<T>>(columns, keys.padded, K_turned);
    take_rows<D>(v.from(keys.begin, head), keys, V);
    take_rows<D>(q.from(queries.begin, head), queries, rows);
    turned(rows, query_size / TILE, Q_columns);
    zipped<D, PLANES<T>>(rows, padded, Q_pairs);
    take_rows<D>(d_out.from(queries.begin, head), queries, rows);
    turned(rows, query_size / TILE, dO_columns);
    zipped<D, PLANES<T>>(rows, padded, dO_pairs);
    const Index all = shape.queries[shape.examples];
    const float *own = softmax + head * all + queries.begin, *own_shares = own + shape.heads * all;
    for (Index m = 0; m < padded; ++m) {  // beyond the example probabilities are 0
        const bool there = m < queries.length;
        peaks[m] = there ? own[m] : 0.0f;
        shares[m] = there ? own_shares[m] : 0.0f;
        deltas[m] = there ? dot(out.at(queries.begin + m, head), d_out.at(queries.begin + m, head), D) : 0.0f;
    }
    configure();
    backward<D>(keys, queries, shape.scale, {K, V, K_turned, Q_columns, dO_columns, Q_pairs, dO_pairs}, peaks, shares,
                deltas, P_rows, dS_rows, dq_sums, dk.from(keys.begin, head), dv.from(keys.begin, head));
    release();
    alignas(64) float scales[STEP];
    for (float& one : scales) one = shape.scale;
    for (Index query = 0; query < queries.length; query += STEP)
        for (Index d = 0; d < D; d += STEP)
            store_columns(dq_sums + query * D + d * STEP, scales, std::min(STEP, queries.length - query),
                          dq.at(queries.begin + query, head) + d, dq.token);
}

}  // namespace

bool attention_available(std::int64_t dim) { return (dim == 32 || dim == 64) && tiles_available(); }

template <class T>
void attention_forward(const AttentionShape& shape, Heads<const T> q, Heads<const T> k, Heads<const T> v, Heads<T> out,
                       float* softmax, int threads) {
    const auto task = shape.dim == 32 ? forward_task<32, T> : forward_task<64, T>;
    parallel_for(shape.examples * shape.heads, threads, [&](long number) {
        task(shape, number / shape.heads, number % shape.heads, q, k, v, out, softmax);
    });
}

template <class T>
void attention_backward(const AttentionShape& shape, Heads<const T> q, Heads<const T> k, Heads<const T> v,
                        Heads<const T> out, const float* softmax, Heads<const T> d_out, Heads<T> dq, Heads<T> dk,
                        Heads<T> dv, int threads) {
    const auto task = shape.dim == 32 ? backward_task<32, T> : backward_task<64, T>;
    parallel_for(shape.examples * shape.heads, threads, [&](long number) {
        task(shape, number / shape.heads, number % shape.heads, q, k, v, out, softmax, d_out, dq, dk, dv);
    });
}

#endif

#define FEDERA_ATTENTION(T)                                                                                          \
    template void attention_forward(const AttentionShape&, Heads<const T>, Heads<const T>, Heads<const T>, Heads<T>, \
                                    float*, int);                                                                    \
    template void attention_backward(const AttentionShape&, Heads<const T>, Heads<const T>, Heads<const T>,          \
                                     Heads<const T>, const float*, Heads<const T>, Heads<T>, Heads<T>, Heads<T>, int);
FEDERA_ATTENTION(float)
FEDERA_ATTENTION(std::uint16_t)
#undef FEDERA_ATTENTION

}  // namespace federa
