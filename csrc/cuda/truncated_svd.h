// What the batched truncated SVD needs on a GPU beside products: orthonormal panels and small eigenproblems. A batch
// takes a fixed number of launches and nothing is read back, so both can be captured in a CUDA graph. Each matrix's bits
// depend on its entries and sizes alone, not on the batch or the device.
#pragma once

namespace federa {

constexpr long widest_panel = 136;  // columns, as many squared in shared memory: on sm_80; on sm_86 and 89 104

struct Panels {  // G panels, rows of consecutive entries
    void* data;
    long batch_stride, row_stride;
};

// Cholesky-QR of G panels of K rows and b columns, float or (if `wide`) double, with Gram matrices in double:
//   Y = Q R, Q may be Y; columns that the others leave nothing of get those of `noise` (K, b) instead.
// R: G of (b, b), R_batch entries apart, upper triangular, with rows of zeros where Y had nothing; work: as many doubles
// as cholesky_qr_work says.
void cholesky_qr(bool wide, long G, long K, long b, Panels Y, Panels Q, const void* noise, double* R, long R_batch,
                 double* work, void* stream);
long cholesky_qr_work(long G, long K, long b);

// H (G, n, n) symmetric -> values (G, n), descending, vectors (G, n, n), as columns: cyclic Jacobi (Sameh's ordering).
void symmetric_eigenpairs(long G, long n, const double* H, double* values, double* vectors, void* stream);

}  // namespace federa
