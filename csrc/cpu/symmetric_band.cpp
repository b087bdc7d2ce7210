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

// x (rows, count) <- rows i and i + 1 turned by (c, s; -s, c)
inline void turn(double* __restrict upper, double* __restrict lower, double c, double s, long count) {
    for (long k = 0; k < count; ++k) {
        const double u = upper[k], l = lower[k];
        upper[k] = c * u + s * l, lower[k] = c * l - s * u;
    }
}

}  // namespace

void SymmetricBand::reset(long m, long width) {
    m_ = m, width_ = width, stride_ = width + 2;  // a diagonal more, for what rotations push out of the band
    band_.assign(m * stride_, 0.0);
}

// H <- R H R^T for the rotation of p and p + 1 that makes H[p + 1, column] zero; rows up to `high` are touched.
void SymmetricBand::eliminate(long p, long column, long high) {
    const double upper = below(p, column), lower = below(p + 1, column), r = std::sqrt(upper * upper + lower * lower);
    const double c = upper / r, s = lower / r;
    for (long k = column; k < p; ++k) {
        double* own = &below(p, k);
        const double u = own[0], l = own[1];
        own[0] = c * u + s * l, own[1] = c * l - s * u;
    }
    double &a = below(p, p), &b = below(p + 1, p), &d = below(p + 1, p + 1);
    const double left = c * a + s * b, right = c * b + s * d, low_left = c * b - s * a, low_right = c * d - s * b;
    a = c * left + s * right, b = c * low_left + s * low_right, d = c * low_right - s * low_left;
    if (high > p + 1) turn(&below(p + 2, p), &below(p + 2, p + 1), c, s, high - p - 1);
    rotations_.push_back({static_cast<int>(p), c, -s});
}

void SymmetricBand::tridiagonalise() {
    for (long k = 0; k + 2 < m_; ++k)
        for (long row = std::min(k + width_, m_ - 1); row >= k + 2; --row) {
            long column = k;
            for (long q = row; q < m_; q += width_) {  // the entry that each rotation pushes out of the band is chased
                if (below(q, column) == 0) break;
                eliminate(q - 1, column, std::min(q + width_, m_ - 1));
                column = q - 1;
            }
        }
}

// With Wilkinson's shift: d becomes the eigenvalues, e (e[i] couples i and i + 1) is destroyed.
void SymmetricBand::implicit_ql() {
    std::vector<double>&d = d_, &e = e_;
    const long m = m_;
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
                rotations_.push_back({static_cast<int>(i), c, s});
            }
            if (i >= l) continue;
            d[l] -= p, e[l] = g, e[end] = 0;
        }
}

const std::vector<double>& SymmetricBand::eigenvalues() {
    rotations_.clear();
    tridiagonalise();
    d_.resize(m_), e_.assign(m_, 0.0), values_.resize(m_), order_.resize(m_);
    for (long i = 0; i < m_; ++i) d_[i] = below(i, i);
    for (long i = 0; i + 1 < m_; ++i) e_[i] = below(i + 1, i);
    implicit_ql();
    std::iota(order_.begin(), order_.end(), 0L);
    std::stable_sort(order_.begin(), order_.end(), [&](long a, long b) { return d_[a] > d_[b]; });
    for (long i = 0; i < m_; ++i) values_[i] = d_[order_[i]];
    return values_;
}

FEDERA_CLONES void SymmetricBand::ends_of_eigenvectors(long count, long rows, double* ends) const {
    std::vector<double> all(m_ * rows, 0.0);  // of all eigenvectors: the rotations, first one first, times unit vectors
    for (long i = 0; i < rows; ++i) all[(m_ - rows + i) * rows + i] = 1;
    for (const Rotation& rotation : rotations_) {
        double* own = all.data() + rotation.i * rows;
        turn(own, own + rows, rotation.c, -rotation.s, rows);
    }
    for (long i = 0; i < count; ++i) std::copy_n(all.data() + order_[i] * rows, rows, ends + i * rows);
}

FEDERA_CLONES void SymmetricBand::eigenvectors(long count, double* vectors) const {
    std::fill(vectors, vectors + m_ * count, 0.0);
    for (long i = 0; i < count; ++i) vectors[order_[i] * count + i] = 1;
    for (auto rotation = rotations_.rbegin(); rotation != rotations_.rend(); ++rotation) {
        double* own = vectors + rotation->i * count;
        turn(own, own + count, rotation->c, rotation->s, count);
    }
}

}  // namespace federa
