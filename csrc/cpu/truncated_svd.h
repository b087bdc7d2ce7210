#pragma once

#include <cstdint>
#include <functional>

namespace federa {

enum class SvdStatus : int { found = 0, not_converged = 1, ill_conditioned = 2 };

struct SvdTask {
    // In: A (N, K) float32, rows lda floats apart, with a Frobenius norm from 1e-12 to 1e12.
    const float* A;
    std::int64_t N, K, lda;
    std::int64_t rank, block;    // block: columns of the Krylov blocks, a multiple of 4
    std::int64_t columns;        // at most so many in the basis
    double goal;                 // of the bound on the loss
    bool gram;                   // iterate on A^T A, or A A^T where that is smaller, by gram_by_tiles
    // Out: U (N, rank), S (rank), Vh (rank, K), contiguous; of each column of U the entry largest in
    // magnitude, the first among equals, is positive. After `ill_conditioned` only Vh is filled, with an orthonormal
    // basis of what leads.
    float *U, *S, *Vh;
    double* left;                // (rank): ||A^T u - s v||, measured
    double right;                // ||A V - U S||, measured
    double following;            // the Ritz value of A^T A after the last that was taken
    std::int64_t matvecs;
    SvdStatus status;
};

// Block Lanczos on A^T A, each matrix on one thread, so that its bits do not depend on the others nor on `threads`.
// The stopping rule, the start and the search for missed multiple values are those of krylov.py. The products read A
// from memory once for A^T (A X) and use AVX-512 or AVX2 where the processor has them.
//
// `interrupted` is asked by the calling thread, between blocks, 20 times a second at most: if it says yes all threads
// stop, tasks are left as they are, and the result is false.
bool truncated_svd(SvdTask* tasks, long count, int threads, const std::function<bool()>& interrupted);

}  // namespace federa
