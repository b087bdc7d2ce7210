// Tiles of matrices in shared memory and their product on the tensor cores (mma.sync), for kernels of sm_80 and later.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/lora_linear_mma.h"
#include "cuda/ptx.h"

namespace federa::mma_kernels {

constexpr int pad = 8;                   // entries after each row of a tile: 8 rows of 16 bytes meet no bank twice
constexpr int shared_limit = 99 * 1024;  // bytes that a block may have on every GPU from sm_80 on

constexpr int most(int a, int b) { return a > b ? a : b; }

template <class Size>
__host__ __device__ constexpr Size blocks(Size size, Size block) {
    return (size + block - 1) / block;
}

template <class T>
__device__ T rounded(float value) {
    if constexpr (std::is_same_v<T, __half>)
        return __float2half_rn(value);
    else
        return __float2bfloat16_rn(value);
}

__device__ inline float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float as_float(__half value) { return __half2float(value); }
__device__ inline float as_float(float value) { return value; }
__device__ inline float as_float(double value) { return static_cast<float>(value); }

constexpr int batch = 8;  // loads that wait together

// values[i] = data[at(i)], or 0 where at(i) is negative.
template <class At>
__device__ void gather(float (&values)[batch], const void* data, Index kind, At at) {
    const auto of = [&](const auto* typed) {
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            const Index place = at(i);
            values[i] = place >= 0 ? as_float(typed[place]) : 0.0f;
        }
    };
    if (kind == float32)
        of(static_cast<const float*>(data));
    else if (kind == bfloat16)
        of(static_cast<const __nv_bfloat16*>(data));
    else if (kind == float16)
        of(static_cast<const __half*>(data));
    else
        of(static_cast<const double*>(data));
}

template <class T>
constexpr Kind kind_of = std::is_same_v<T, __half> ? float16 : bfloat16;

template <class T>
struct Type {
    using type = T;
};

// call(Type<T>()) for the kind of the rows; need(false, why) throws where it is another.
template <class Need, class Call>
void with_type(Index kind, Need need, Call call) {
    need(kind == bfloat16 || kind == float16, "rows must be bfloat16 or float16");
    if (kind == bfloat16)
        call(Type<__nv_bfloat16>());
    else
        call(Type<__half>());
}

__device__ inline int entry_bytes(Index kind) { return kind == float64 ? 8 : kind == float32 ? 4 : 2; }

struct Matrix {
    const void* data;
    Index kind, stride_row, stride_column;

    // From this entry on.
    __device__ Matrix at(int row, int column) const {
        const Index entries = row * stride_row + column * stride_column;
        return {static_cast<const char*>(data) + entries * entry_bytes(kind), kind, stride_row, stride_column};
    }
};

// A right operand with entries (depth, column) as its tiles lie; ALIGNED: what is known then.
template <class P>
__device__ Matrix right_operand(const void* data, Index kind, Index stride_depth, Index stride_column) {
    const Index row = P::deep ? stride_depth : stride_column, column = P::deep ? stride_column : stride_depth;
    return P::aligned ? Matrix{data, kind_of<typename P::T>, row, 1} : Matrix{data, kind, row, column};
}

// Whether every row of T starts on 16 bytes.
template <class T>
__host__ __device__ bool is_aligned(const Matrix& m) {
    return m.kind == kind_of<T> && m.stride_column == 1 && m.stride_row % 8 == 0 &&
           reinterpret_cast<std::uintptr_t>(m.data) % 16 == 0;
}

// tile (ROWS, COLUMNS), its rows COLUMNS + pad apart = the first entries of the matrix, zero in rows outside
// [first, last) and in columns from `width` on. Aligned ones come asynchronously, 16 bytes at a time, others entry by
// entry: wait for the copies, then a barrier. ALIGNED: it is known to be so.
template <class T, bool ALIGNED, int ROWS, int COLUMNS, int THREADS>
__device__ void load_tile(T* tile, const Matrix& from, int first, int last, int width) {
    constexpr int vectors = COLUMNS / 8, step = THREADS / vectors;
    static_assert(THREADS % vectors == 0 && ROWS % step == 0);
    const int r = threadIdx.x / vectors, c = threadIdx.x % vectors * 8, there = max(min(width - c, 8), 0);
    T* const to = tile + r * (COLUMNS + pad) + c;
    if (ALIGNED || is_aligned<T>(from)) {
        const T* const data = static_cast<const T*>(from.data);
#pragma unroll 8
        for (int i = 0; i < ROWS; i += step) {
            const int here = first <= r + i && r + i < last ? there : 0;
            copy_async(to + i * (COLUMNS + pad), here ? data + (r + i) * from.stride_row + c : data, 2 * here);
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < ROWS; i += step) {
            const int here = first <= r + i && r + i < last ? there : 0;
            float values[batch];
            alignas(16) T entries[batch];
            const Index start = (r + i) * from.stride_row + c * from.stride_column;
            gather(values, from.data, from.kind, [&](int e) { return e < here ? start + e * from.stride_column : -1; });
#pragma unroll
            for (int e = 0; e < batch; ++e) entries[e] = rounded<T>(values[e]);
            *reinterpret_cast<uint4*>(to + i * (COLUMNS + pad)) = *reinterpret_cast<const uint4*>(entries);
        }
    }
}

// Fragments of a 16 x 16 block at (row, column) of a tile whose rows are `stride` apart: a left operand, or two right
// ones side by side, r[0..1] and r[2..3]. The tile has the operand's rows as its own (left, right: depth along the rows
// of the product's columns), or the depth as its rows.
template <class T>
__device__ void load_left_of_rows(std::uint32_t (&r)[4], const T* tile, int stride, int row, int column) {
    const int lane = threadIdx.x % 32;
    ldmatrix(r, tile + (row + lane % 16) * stride + column + lane / 16 * 8);
}

template <class T>
__device__ void load_right_of_rows(std::uint32_t (&r)[4], const T* tile, int stride, int row, int column) {
    const int lane = threadIdx.x % 32;  // block (column of the product, depth)
    ldmatrix(r, tile + (row + lane / 16 * 8 + lane % 8) * stride + column + lane / 8 % 2 * 8);
}

template <class T>
__device__ void load_left_of_columns(std::uint32_t (&r)[4], const T* tile, int stride, int row, int column) {
    const int lane = threadIdx.x % 32;  // block (depth, row of the product)
    ldmatrix_transposed(r, tile + (row + lane / 16 * 8 + lane % 8) * stride + column + lane / 8 % 2 * 8);
}

template <class T>
__device__ void load_right_of_columns(std::uint32_t (&r)[4], const T* tile, int stride, int row, int column) {
    const int lane = threadIdx.x % 32;  // block (depth, column of the product)
    ldmatrix_transposed(r, tile + (row + lane % 16) * stride + column + lane / 16 * 8);
}

// Where entry e of a 16 x 8 fragment of sums lies.
__device__ inline int row_of(int e) { return threadIdx.x % 32 / 4 + e / 2 * 8; }
__device__ inline int column_of(int e) { return threadIdx.x % 4 * 2 + e % 2; }

// DEEP: the right operand's tiles lie (BK, BN), along N in memory; else (BN, BK), along the depth.
template <class Type, int BM_, int BN_, int BK_, int WARPS_M, int WARPS_N, int STAGES, bool DEEP, bool ALIGNED>
struct Product {
    using T = Type;
    static constexpr int BM = BM_, BN = BN_, BK = BK_, threads = 32 * WARPS_M * WARPS_N;
    static constexpr bool deep = DEEP, aligned = ALIGNED;
    static constexpr int last_stage = STAGES - 1;
    static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N;
    static constexpr int left_entries = BM * (BK + pad), right_stride = DEEP ? BN + pad : BK + pad;
    static constexpr int right_entries = (DEEP ? BK : BN) * right_stride;
    static constexpr int bytes = most(STAGES * (left_entries + right_entries), BM * (BN + pad)) * 2;
    static_assert(bytes <= shared_limit && WM % 16 == 0 && WN % 16 == 0 && BK % 16 == 0);

    float acc[WM / 16][WN / 8][4] = {};

    static __device__ T* left(int stage) { return reinterpret_cast<T*>(shared_memory()) + stage * left_entries; }
    static __device__ T* right(int stage) { return left(STAGES) + stage * right_entries; }
    static __device__ int warp_row() { return threadIdx.x / 32 / WARPS_N * WM; }
    static __device__ int warp_column() { return threadIdx.x / 32 % WARPS_N * WN; }

    template <int DEPTH>
    __device__ void multiply(const T* a, const T* b) {
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            std::uint32_t columns[WN / 16][4];
#pragma unroll
            for (int j = 0; j < WN / 16; ++j) {
                if constexpr (DEEP)
                    load_right_of_columns(columns[j], b, right_stride, k, warp_column() + 16 * j);
                else
                    load_right_of_rows(columns[j], b, right_stride, warp_column() + 16 * j, k);
            }
#pragma unroll
            for (int i = 0; i < WM / 16; ++i) {
                std::uint32_t rows[4];
                load_left_of_rows(rows, a, BK + pad, warp_row() + 16 * i, k);
#pragma unroll
                for (int j = 0; j < WN / 8; ++j)
                    mma<T>(acc[i][j], rows, columns[j / 2][j % 2 * 2], columns[j / 2][j % 2 * 2 + 1]);
            }
        }
    }

    // Adds rows (.., depth) weight, which begin at this tile: the rows [first, last) of it and `width` columns. The
    // weight lies as its tiles do. `between` runs once the first copies are under way and has the last stage alone.
    template <class Between>
    __device__ void add(const Matrix& rows, int first, int last, const Matrix& weight, int width, int depth,
                        Between between) {
        const int steps = (depth + BK - 1) / BK;
        const auto load = [&](int step) {
            const int from = step * BK, stage = step % STAGES;
            load_tile<T, ALIGNED, BM, BK, threads>(left(stage), rows.at(0, from), first, last, depth - from);
            if constexpr (DEEP)
                load_tile<T, ALIGNED, BK, BN, threads>(right(stage), weight.at(from, 0), 0, depth - from, width);
            else
                load_tile<T, ALIGNED, BN, BK, threads>(right(stage), weight.at(0, from), 0, width, depth - from);
        };
#pragma unroll 1
        for (int step = 0; step < last_stage; ++step) {
            if (step < steps) load(step);
            copy_commit();
        }
        between();
#pragma unroll 1  // more of it at once would hold more registers than there are
        for (int step = 0; step < steps; ++step) {
            copy_wait<last_stage - 1>();
            __syncthreads();  // this step is there for all, and all have left the one before, whose stage is next
            if (step + last_stage < steps) load(step + last_stage);
            copy_commit();
            multiply<BK>(left(step % STAGES), right(step % STAGES));
        }
        copy_wait<0>();
        __syncthreads();
    }

    // This thread has sums in batch columns of every 32.
    static __device__ int column_of_batch(int i) { return i / 2 * 8 + column_of(i % 2); }

    // Adds a value to each column, in the rows that `rows` has: load(values, c) says those of a batch from column c on.
    template <class Load, class Rows>
    __device__ void add_to_columns(Load load, const Rows& rows) {
#pragma unroll
        for (int j = 0; j < WN / 8; j += batch / 2) {
            float values[batch];
            load(values, warp_column() + 8 * j);
#pragma unroll
            for (int i = 0; i < WM / 16; ++i)
#pragma unroll
                for (int b = 0; b < batch; ++b)
#pragma unroll
                    for (int e = b % 2; e < 4; e += 2)
                        if (rows.has(warp_row() + 16 * i + row_of(e))) acc[i][j + b / 2][e] += values[b];
        }
    }

    // visit(row, column, sum) for each of this thread's sums.
    template <class Visit>
    __device__ void each(Visit visit) {
#pragma unroll
        for (int i = 0; i < WM / 16; ++i)
#pragma unroll
            for (int j = 0; j < WN / 8; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    visit(warp_row() + 16 * i + row_of(e), warp_column() + 8 * j + column_of(e), acc[i][j][e]);
    }
};

}  // namespace federa::mma_kernels
