#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace federa {

// A linear layer over a packed frozen weight and its low-rank adapters:
//
//     h = x down^T        out = x P + s h up^T + bias
//
// forward:  x, P = W^T, down = A, up = B          backward:  x := dy, P = W, down = B^T, up = A^T, out = dx, h = dy B
//
// Three engines, of which the first that runs here does it all:
//
// amx     A float32 is the sum of three bfloat16s up to a last bit, and the tile units multiply bfloat16 16 times as
//         fast as AVX-512 multiplies float32: six of the nine products (the other three lie below float32's rounding),
//         accumulated in float32 in chains of 16, are as exact as float32 and take 6/16 of the time. A bfloat16 weight
//         takes three products with a float32 x, one with a bfloat16 x.
// avx512  float32 multiply-adds; a bfloat16 weight is widened on the way, x must be float32.
// avx2    The same with half the registers, and the same bits.

// The engines that run on this processor and operating system, best first.
std::vector<const char*> engines();

// The one in use, or "none". What is packed is for the engine that packed it.
const char* engine();

// For tests and measurements; false, and nothing changed, for a name that is neither "none" nor among engines().
bool set_engine(const char* name);

enum class Kind { float32 = 0, bfloat16 = 1 };

// Panels of a matrix P with `depth` rows and `columns` columns, P[d][c] = source[d * depth_stride + c * column_stride],
// zero where P ends. amx: for each 32 columns, for each 32 rows of depth, one plane of bfloat16 (Kind::bfloat16) or
// three (float32) of two tiles of 16 columns. Others: for each stretch of depth, equal ones of at most 384, for each 16
// (avx2: 8) columns the rows of the stretch, in their kind. federa_kernels/lora_linear/cpu.py unpacks both.
std::size_t packed_bytes(Kind kind, std::int64_t columns, std::int64_t depth);
void pack(const void* source, Kind kind, std::int64_t columns, std::int64_t column_stride, std::int64_t depth,
          std::int64_t depth_stride, void* packed, int threads);

// Rows offsets[c] to offsets[c + 1] belong to client c, who has scalings[c] and the first ranks[c] components.
struct Clients {
    std::int64_t count;
    const std::int32_t* offsets;
    const float* scalings;
    const std::int32_t* ranks;
};

struct Projection {
    const void* packed;  // of P; null: only h is wanted
    Kind kind;
    std::int64_t columns;
    std::int64_t rank;  // 0: no adapter
    float scaling;      // times that of the client
    const float *down, *up;  // down[c][r][k], up[c][n][r]
    std::int64_t down_client, down_rank, down_depth;  // strides
    std::int64_t up_client, up_column, up_rank;
    const float* bias;  // or null
    std::int64_t bias_client;  // stride, 0 where all share one
    void* out;  // rows of `columns`, kind of x
    void* h;  // or null; rows of `h_stride`, kind of x
    std::int64_t h_stride;
};

// x (rows, depth) with row stride `x_stride`; `accumulate` adds to out instead of starting at the bias. A row's results
// do not depend on the number of threads, nor on the other rows, but for a last bit where clients share 32 rows (amx).
void low_rank_linear(const void* x, Kind kind, std::int64_t rows, std::int64_t depth, std::int64_t x_stride,
                     const std::vector<Projection>& projections, const Clients& clients, bool accumulate, int threads);

// gradient[c][r][k] = s s_c sum over the rows m of client c of h[m][r] x[m][k], zero from ranks[c] on; float32, with
// strides for client, r and k. The order of summation depends on nothing but the rows.
void low_rank_gradient(const void* h, std::int64_t h_stride, std::int64_t rank, const void* x, Kind kind,
                       std::int64_t columns, std::int64_t x_stride, const Clients& clients, float scaling,
                       float* gradient, std::int64_t client_stride, std::int64_t rank_stride, std::int64_t column_stride, int threads);

// One frozen weight W and its adapters, to be differentiated: A[c][r][k] and B[c][n][r].
struct Layer {
    const void* packed;  // W, for dy W; null where dx is not wanted
    Kind kind;
    std::int64_t columns, depth, rank;  // N, K, R
    float scaling;                      // times that of the client
    const float *A, *B;
    std::int64_t A_client, A_rank, A_depth, B_client, B_column, B_rank;  // strides
};

// A matrix of rows; null where nobody asks for it.
struct Rows {
    const void* data;
    std::int64_t stride;
};

// dh = dy B    dx = dy W + s dh A    dA[c] = s dh^T x    dB[c] = s dy^T h    each null where it is not wanted; dx, of the
// kind of dy, and the float32 dA (C,R,K) and dB (C,N,R) are contiguous. `accumulate` adds to dx.
void low_rank_backward(const Layer& layer, Kind kind, std::int64_t rows, Rows dy, Rows x, Rows h, const Clients& clients,
                       bool accumulate, void* dx, float* dA, float* dB, int threads);

}  // namespace federa
