// csrc/cuda/truncated_svd.h for ctypes.

#include "cuda/truncated_svd.h"

#include "cuda/launch.h"

using namespace federa;

EXPORTED long cholesky_qr_work_size(long G, long K, long b) { return cholesky_qr_work(G, K, b); }

EXPORTED const char* run_cholesky_qr(bool wide, long G, long K, long b, void* Y, long Y_batch, long Y_row, void* Q,
                                     long Q_batch, long Q_row, const void* noise, double* R, long R_batch,
                                     double* work) {
    return emulator::guarded(
        [&] { cholesky_qr(wide, G, K, b, {Y, Y_batch, Y_row}, {Q, Q_batch, Q_row}, noise, R, R_batch, work, nullptr); });
}

EXPORTED const char* run_symmetric_eigenpairs(long G, long n, const double* H, double* values, double* vectors) {
    return emulator::guarded([&] { symmetric_eigenpairs(G, n, H, values, vectors, nullptr); });
}
