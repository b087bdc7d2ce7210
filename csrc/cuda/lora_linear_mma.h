// The kernels of federa_kernels/lora_linear/triton_kernels.py in CUDA C++ for sm_80 and later: mma.sync and cp.async.
// Names, sizes and the meaning of every argument are those of that file; rows are bfloat16 or float16.
//
// Arguments come as one struct for each kernel, every field 8 bytes, which federa_kernels/lora_linear/mma.py mirrors.
// Strides count entries. A null pointer is None.
#pragma once

#include <cstddef>
#include <cstdint>

namespace federa::mma_kernels {

using Index = std::int64_t;

enum Kind : Index { float32, bfloat16, float16, float64 };  // of a tensor's entries

struct Segments {
    const std::int32_t* offsets;  // null: one client who has all rows
    const float* scalings;        // null: `scale` for all
    const std::int32_t* ranks;    // null: R for all
    Index C;
};

// parts (splits, M, R) = scale x A^T, split i over the columns from i * columns
struct Down {
    Index kind, M, K, R, splits, columns;
    const void* x;
    Index stride_x;
    const void* lora_A;
    Index A_kind, stride_c, stride_r, stride_k;
    float* parts;
    double scale;
    Segments segments;
};

struct Term {
    const void* rows;
    Index D, stride_rows;
    const void* weight;
    Index weight_kind, stride_wd, stride_wn;
    const float* down;
    Index S, R, stride_down;
    const void* factor;
    Index factor_kind, stride_fc, stride_fr, stride_fn;
    double scale;
};

constexpr int max_terms = 4;

// out (M,N) = sum over terms of rows weight + scale low factor, + bias, in tiles of BM x BN: 128 x 128 or 64 x 64
struct Gemm {
    Index kind, M, N, BM, BN, P;
    void* out;
    void* low;
    Index stride_low;
    const void* bias;
    Index bias_kind, stride_bias;
    Segments segments;
    Term terms[max_terms];
};

// Over BN columns (they must be 256 up to rank 32, else 128) and `chunk` rows of `rows` (M,N), in parts: rows^T low,
// which is dB of dy and h, or dA of x and dh; the sum of the rows; and up to rank 32 dh = rows factor.
struct Columns {
    Index kind, M, N, R, chunk, BN;
    const void* rows;
    Index stride_rows;
    const void* low;
    Index stride_low;
    const void* factor;
    Index factor_kind, stride_c, stride_n, stride_r;
    float* dh_parts;
    float* pieces;
    Index piece_column, piece_rank;  // strides in a piece
    float* sums;
    Index stride_piece;
    double scale;
    Segments segments;
};

struct Sum {
    const float* pieces;
    float* sums;
    const std::int32_t* offsets;
    Index M, C, chunk, size_A, size_B, size_b;
};

struct Step {
    const char* kernel;
    const void* arguments;
    Index bytes;
};

// Kernels that follow each other: each may begin before the one ahead of it has ended. What a step may read of another
// one's results is `down` of a term, `low` of columns and the pieces of a sum; its other inputs it reads at once.
struct Steps {
    const Step* steps;
    Index count;
};

// Launches "down", "gemm", "columns", "sum" or "steps", whose struct is at `arguments`, on the current device and a
// stream of it. Throws std::invalid_argument for what the kernels do not take and std::runtime_error for CUDA's own errors.
void run(const char* kernel, const void* arguments, std::size_t bytes, void* stream);

}  // namespace federa::mma_kernels
