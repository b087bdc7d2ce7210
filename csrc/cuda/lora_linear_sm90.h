// The product of lora_linear for Hopper (sm_90a): y = x W^T + s h B^T + bias, and dx = dy W + dh A, as one whose depth
// goes on from (x, W) into (h, s B). What else a step needs is in lora_linear_mma.h.
//
// Arguments come as one struct for each kernel, every field 8 bytes, which federa_kernels/lora_linear/sm90.py mirrors.
// Strides count entries; a null pointer is None. Rows, weights and out are of one kind, bfloat16 or float16.
#pragma once

#include <cstddef>

#include "cuda/lora_linear_mma.h"

namespace federa::sm90_kernels {

using mma_kernels::Index, mma_kernels::Segments;

// low (M,R) = the sum of `down` (S,M,R), rounded, and the same to `copy`; scaled = scale factor (R,N), rounded, in
// memory (R,N) if along_n, else (N,R). What a product takes as a further pair of its depth.
//
// Of clients: low (M + gap (C-1), R), with `gap` rows of zeros between one's rows and the next one's, so that a block
// of rows, read where one client's lie, has no other's; scaled, one's after another's, with 0 for what is not finite;
// add (C,N), the bias and NaN in place of what is not finite, as 0 * NaN in others' rows would be NaN.
struct Low {
    Index kind, M, N, R, S;
    const float* down;
    Index stride_down;
    void* low;
    Index stride_low;
    void* copy;
    Index stride_copy;
    const void* factor;
    Index factor_kind, stride_fc, stride_fr, stride_fn;
    void* scaled;
    Index stride_scaled, along_n;
    double scale;
    const void* bias;
    Index bias_kind, stride_bias;
    float* add;  // null: one client
    Segments segments;
};

constexpr int max_products = 4, max_pairs = 8;

struct Lows {
    Index count;
    Low lows[max_products];
};

constexpr int gap = 256;  // the most rows that are multiplied by the same weights: two tiles' of 128

// Where a client's row lies in `low`.
#ifdef __CUDACC__
__host__ __device__
#endif
constexpr Index spread(Index row, Index client) {
    return row + gap * client;
}

// rows (M, depth) and weight, in memory (depth, N) if along_n, else (N, depth); own: clients', as Low leaves them
struct Pair {
    const void* rows;
    Index depth, stride_rows;
    const void* weight;
    Index stride_weight, own;
};

// out (M,N) = sum over P pairs of rows weight, + bias (of clients (C,N), float32)
struct Product {
    void* out;
    const void* bias;
    Index bias_kind, N, P;
};

// Products of the same M in tiles of BM x BN: 128 x 256, 128 x 128 or 64 x 128; the first has the first P pairs, the
// second the next. `cluster` (1 or 2) tiles share their weights; `splits` (1 to 8) blocks share the depth of each, and
// their sums are added in order. Pointers must be multiples of 16 bytes, strides and N of 8 entries.
struct Gemm {
    Index kind, M, BM, BN, cluster, splits, along_n, count;
    Segments segments;
    Product products[max_products];
    Pair pairs[max_pairs];
};

// Which tile of rows x columns of them comes at this place: `band` rows go over the columns together, so that what they
// read meets in L2.
struct Place {
    int row, column;
};

#ifdef __CUDACC__
__host__ __device__
#endif
constexpr Place place_of(int at, int rows, int columns) {
    constexpr int band = 8;
    const int top = at / (band * columns) * band, within = at % (band * columns);
    const int height = rows - top < band ? rows - top : band;
    return {top + within % height, within / height};
}

// Which product a column of tiles belongs to, and which of its own it is; `columns` of each.
struct Column {
    int product, column;
};

#ifdef __CUDACC__
__host__ __device__
#endif
constexpr Column column_of(int at, const int* columns) {
    int product = 0;
    while (at >= columns[product]) at -= columns[product++];
    return {product, at};
}

// Where the share of block `split` begins, when `splits` of them share `steps`.
#ifdef __CUDACC__
__host__ __device__
#endif
constexpr int share_of(int steps, int split, int splits) {
    return static_cast<int>(static_cast<Index>(steps) * split / splits);
}

// Launches "low" (Lows) or "gemm", whose struct is at `arguments`, on the current device and a stream of it. Throws
// std::invalid_argument for what the kernels do not take, a GPU that is not of compute capability 9.0 among it, and
// std::runtime_error for CUDA's own errors.
void run(const char* kernel, const void* arguments, std::size_t bytes, void* stream);

}  // namespace federa::sm90_kernels
