#pragma once

namespace federa {

// G (columns, columns; ldg) <- A^T A on the tile units, of it the blocks of 32 on the diagonal and below, for A (rows,
// columns) with entry (i, j) at A[i * row + j * column], one of the strides 1. ldg: a multiple of 16 that leaves room for
// whole 32s.
//
// A float32 is taken as the sum of two bfloat16s, 16 bits of it, and the smallest of the four products is left out: an
// error of 5e-6 of what the entries' sizes allow. To iterate with, not to certify.
void gram_by_tiles(const float* A, long rows, long columns, long row, long column, float* G, long ldg);

}  // namespace federa
