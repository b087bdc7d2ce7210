// The kernels of csrc/cuda/truncated_svd.cu over buffers that end where their panels do: a program to build with the
// address sanitizer, which stops it at the first byte beyond one, or beyond the shared memory that a launch asked for.

#include <cstdio>
#include <initializer_list>
#include <memory>

#include "cuda/truncated_svd.h"

namespace {

template <class T>
std::unique_ptr<T[]> numbers(long count) {  // columns differ, the last of a panel may be nothing
    std::unique_ptr<T[]> data(new T[static_cast<std::size_t>(count)]);
    for (long i = 0; i < count; ++i) data[static_cast<std::size_t>(i)] = static_cast<T>(i * 7919 % 101 - 50) / 50;
    return data;
}

template <class T>
void orthonormalise(long G, long K, long b) {
    const auto Y = numbers<T>(G * K * b), Q = numbers<T>(G * K * b), noise = numbers<T>(K * b);
    const auto R = numbers<double>(G * b * b), work = numbers<double>(federa::cholesky_qr_work(G, K, b));
    for (long g = 0; g < G; ++g)
        for (long k = 0; k < K; ++k) Y[static_cast<std::size_t>((g * K + k) * b + b - 1)] = 0;
    federa::cholesky_qr(sizeof(T) == 8, G, K, b, {Y.get(), K * b, b}, {Q.get(), K * b, b}, noise.get(), R.get(), b * b,
                        work.get(), nullptr);
}

void diagonalise(long G, long n) {
    const auto H = numbers<double>(G * n * n), values = numbers<double>(G * n), vectors = numbers<double>(G * n * n);
    federa::symmetric_eigenpairs(G, n, H.get(), values.get(), vectors.get(), nullptr);
}

}  // namespace

int main() {
    for (const long b : {1L, 5L, 24L, 33L, 89L, federa::widest_panel}) {
        orthonormalise<float>(2, 300, b);
        orthonormalise<double>(1, b, b);
        orthonormalise<double>(1, 257, b);
        diagonalise(b < 50 ? 2 : 1, b);
    }
    diagonalise(1, 97);
    std::puts("nothing beyond its end");
}
