#include "cpu/symmetric_band.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

// A copy of the function for each instruction set, chosen when the module is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FEDERA_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FEDERA_CLONES
#endif

namespace federa {
namespace {

// H <- R H R^T for the rotation of p and p + 1 that makes H[p + 1, column] zero; entries in [low, high] are touched.
Rotation eliminate(double* H, long m, long p, long column, long low, long high) {
    double *upper = H + p * m, *lower = upper + m;
    const double r = std::sqrt(upper[column] * upper[column] + lower[column] * lower[column]);
    const double c = upper[column] / r, s = lower[column] / r;
    for (long k = low; k <= high; ++k) {
        const double u = upper[k], l = lower[k];
        upper[k] = c * u + s * l, lower[k] = c * l - s * u;
    }
    for (long k = low; k <= high; ++k) {
        double* row = H + k * m;
        const double u = row[p], l = row[p + 1];
        row[p] = c * u + s * l, row[p + 1] = c * l - s * u;
    }
    return {static_cast<int>(p), static_cast<int>(p + 1), c, -s};
}

void tridiagonalise(std::vector<double>& H, long m, long width, std::vector<Rotation>& rotations) {
    for (long k = 0; k + 2 < m; ++k)
        for (long row = std::min(k + width, m - 1); row >= k + 2; --row) {
            long column = k;
            for (long q = row; q < m; q += width) {  // the entry that each rotation pushes out of the band is chased
                if (H[q * m + column] == 0) break;
                const long high = std::min(q + width, m - 1);
                rotations.push_back(eliminate(H.data(), m, q - 1, column, column, high));
                column = q - 1;
            }
        }
}

// Implicit QL with Wilkinson's shift: d becomes the eigenvalues, e (e[i] couples i and i + 1) is destroyed.
void implicit_ql(std::vector<double>& d, std::vector<double>& e, std::vector<Rotation>& rotations) {
    const long m = static_cast<long>(d.size());
    const double eps = std::numeric_limits<double>::epsilon();
    for (long l = 0; l < m; ++l)
        for (int turn = 0; turn < 60; ++turn) {
            long end = l;
            while (end + 1 < m && std::fabs(e[end]) > eps * (std::fabs(d[end]) + std::fabs(d[end + 1]))) ++end;
            if (end == l) break;
            double g = (d[l + 1] - d[l]) / (2 * e[l]), r = std::sqrt(g * g + 1);
            g = d[end] - d[l] + e[l] / (g + std::copysign(r, g));
            double s = 1, c = 1, p = 0;
            long i = end - 1;
            for (; i >= l; --i) {
                const double f = s * e[i], b = c * e[i];
                r = std::sqrt(f * f + g * g);
                e[i + 1] = r;
                if (r == 0) {
                    d[i + 1] -= p;
                    e[end] = 0;
                    break;
                }
                s = f / r, c = g / r;
                g = d[i + 1] - p;
                r = (d[i] - g) * s + 2 * c * b;
                p = s * r;
                d[i + 1] = g + p;
                g = c * r - b;
                rotations.push_back({static_cast<int>(i), static_cast<int>(i + 1), c, s});
            }
            if (i >= l) continue;
            d[l] -= p, e[l] = g, e[end] = 0;
        }
}

// vectors (m, count) <- the rotations, last one first, times vectors
FEDERA_CLONES void apply_in_reverse(const Rotation* rotations, long turns, long count, double* vectors) {
    for (long turn = turns - 1; turn >= 0; --turn) {
        const double c = rotations[turn].c, s = rotations[turn].s;
        double* __restrict upper = vectors + rotations[turn].i * count;
        double* __restrict lower = vectors + rotations[turn].j * count;
        for (long i = 0; i < count; ++i) {
            const double u = upper[i], l = lower[i];
            upper[i] = c * u + s * l, lower[i] = c * l - s * u;
        }
    }
}

}  // namespace

void leading_eigenpairs(std::vector<double>& H, long m, long width, long count, double* values, double* vectors,
                        std::vector<Rotation>& rotations) {
    rotations.clear();
    tridiagonalise(H, m, width, rotations);
    std::vector<double> d(m), e(m, 0.0);
    for (long i = 0; i < m; ++i) d[i] = H[i * m + i];
    for (long i = 0; i + 1 < m; ++i) e[i] = H[(i + 1) * m + i];
    implicit_ql(d, e, rotations);

    std::vector<long> order(m);
    std::iota(order.begin(), order.end(), 0L);
    std::stable_sort(order.begin(), order.end(), [&](long a, long b) { return d[a] > d[b]; });
    std::fill(vectors, vectors + m * count, 0.0);
    for (long i = 0; i < m; ++i) values[i] = d[order[i]];
    for (long i = 0; i < count; ++i) vectors[order[i] * count + i] = 1;
    apply_in_reverse(rotations.data(), static_cast<long>(rotations.size()), count, vectors);
}

}  // namespace federa
