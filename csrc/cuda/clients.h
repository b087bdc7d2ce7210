// Which rows are whose, where those of many clients lie one after another. On the host too, for tests.
#pragma once

#include "cuda/launch.h"
#include "cuda/lora_linear_mma.h"

namespace federa::mma_kernels {

// The client who has this row: the first one whose rows end after it.
__host__ __device__ inline int client_of(int row, const Segments& of) {
    int low = 0, high = static_cast<int>(of.C) - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (of.offsets[middle + 1] > row)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

// First and last client with rows in [start, stop).
struct ClientRange {
    int first = 0, last = 0;

    __host__ __device__ ClientRange(const Segments& of, int start, int stop) {
        if (of.offsets) first = client_of(start, of), last = client_of(stop - 1, of);
    }
    __host__ __device__ bool several() const { return first != last; }
    __host__ __device__ int count() const { return last - first + 1; }
};

// One client's rows within [start, stop), counted from start, and what is its own.
struct Client {
    int begin, end, rank;
    float scale;

    __host__ __device__ Client(const Segments& of, int c, int start, int stop, int R, double scale_of_all) {
        begin = of.offsets ? max(of.offsets[c], start) - start : 0;
        end = (of.offsets ? min(of.offsets[c + 1], stop) : stop) - start;
        rank = of.ranks ? min(of.ranks[c], R) : R;
        scale = of.scalings ? of.scalings[c] : static_cast<float>(scale_of_all);
    }
    __host__ __device__ bool has(int row) const { return begin <= row && row < end; }
};

}  // namespace federa::mma_kernels
