#include "cpu/truncated_svd.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cpu/features.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/symmetric_band.h"
#include "cpu/truncated_svd_tiles.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace federa {
namespace {

#if defined(__GNUC__)

#define LANES 4
#define PANEL 2
namespace plain {
static inline void sum4(const float __attribute__((vector_size(16))) a, const float __attribute__((vector_size(16))) b,
                        const float __attribute__((vector_size(16))) c, const float __attribute__((vector_size(16))) d,
                        float* out) {
    for (int lane = 0; lane < 4; ++lane) out[0] += a[lane], out[1] += b[lane], out[2] += c[lane], out[3] += d[lane];
}
#include "cpu/truncated_svd_products.h"
}  // namespace plain
#undef LANES
#undef PANEL

#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LANES 8
#define PANEL 2
namespace avx2 {
static inline void sum4(__m256 a, __m256 b, __m256 c, __m256 d, float* out) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
}
#include "cpu/truncated_svd_products.h"
}  // namespace avx2
#undef LANES
#undef PANEL
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,fma")
#endif
#define LANES 16
#define PANEL 6
namespace avx512 {
static inline void sum4(__m512 a, __m512 b, __m512 c, __m512 d, float* out) {
    // The zero-masked forms: GCC 12 warns of its own undefined vectors in the plain ones.
    const __m512 ab = _mm512_add_ps(_mm512_maskz_unpacklo_ps(0xffff, a, b), _mm512_maskz_unpackhi_ps(0xffff, a, b));
    const __m512 cd = _mm512_add_ps(_mm512_maskz_unpacklo_ps(0xffff, c, d), _mm512_maskz_unpackhi_ps(0xffff, c, d));
    const __m512 all = _mm512_add_ps(_mm512_maskz_shuffle_ps(0xffff, ab, cd, 0x44),
                                     _mm512_maskz_shuffle_ps(0xffff, ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, all, 0),
                                      _mm512_maskz_extractf32x8_ps(0xff, all, 1));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
}
#include "cpu/truncated_svd_products.h"
}  // namespace avx512
#undef LANES
#undef PANEL
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

struct Products {
    decltype(&plain::fused) fused;
    decltype(&plain::symmetric) symmetric;
    decltype(&plain::combine) combine;
    decltype(&plain::dot) dot;
    decltype(&plain::outer) outer;
    decltype(&plain::row) row;
    decltype(&plain::turn) turn;
};

#define FEDERA_PRODUCTS(set) \
    Products{&set::fused, &set::symmetric, &set::combine, &set::dot, &set::outer, &set::row, &set::turn}

bool has(const char* feature) {
    for (const auto& [name, there] : cpu_features())
        if (std::string(name) == feature) return there;
    return false;
}

const Products& products() {
    static const Products chosen = [] {
#if defined(__x86_64__)
        if (has("avx512f") && has("avx512bw")) return FEDERA_PRODUCTS(avx512);
        if (has("avx2") && has("fma")) return FEDERA_PRODUCTS(avx2);
#endif
        return FEDERA_PRODUCTS(plain);
    }();
    return chosen;
}

constexpr long PAD = 16;
long padded(long size, long to = PAD) { return (size + to - 1) / to * to; }

struct Rows {  // float32 rows on cache lines, zero beyond their length
    long stride = 0;
    float* data = nullptr;
    std::unique_ptr<float[]> memory;

    // One line more than needed: rows 16 KB apart would all want the same places in L1.
    Rows(long count, long length) : stride(padded(length) + PAD), memory(new float[count * (padded(length) + PAD) + PAD]) {
        data = memory.get() + (-(reinterpret_cast<std::uintptr_t>(memory.get()) / sizeof(float)) & (PAD - 1));
    }
    float* operator[](long row) { return data + row * stride; }
    void zero(long first, long count) { std::memset((*this)[first], 0, count * stride * sizeof(float)); }
};

// Entry `index` of the stream `seed`, in (-1, 1): SplitMix64, as in krylov.py.
float uniform(std::uint64_t seed, std::uint64_t index) {
    std::uint64_t x = (index + 1 + (seed << 40)) * 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    x ^= x >> 31;
    return static_cast<float>((static_cast<double>(x >> 40) + 0.5) * 0x1p-23 - 1);
}

// Cholesky-QR of b rows of length K: rows <- L^-1 rows, R = L^T (b, b) row-major. A row of nothing gets R_jj = 0.
void orthonormalise(float* rows, long stride, long b, std::vector<double>& R) {
    std::vector<double> L(b * b, 0.0), inverse(b * b, 0.0);
    double longest = 0;
    for (long i = 0; i < b; ++i)
        for (long j = 0; j <= i; ++j) L[i * b + j] = products().dot(rows + i * stride, rows + j * stride, stride);
    for (long i = 0; i < b; ++i) longest = std::max(longest, L[i * b + i]);
    const double floor = 1e-14 * longest + 1e-150;
    for (long j = 0; j < b; ++j) {
        for (long i = j; i < b; ++i) {
            double sum = L[i * b + j] + (i == j ? floor : 0);
            for (long k = 0; k < j; ++k) sum -= L[i * b + k] * L[j * b + k];
            L[i * b + j] = i == j ? std::sqrt(std::max(sum, floor)) : sum / L[j * b + j];
        }
    }
    for (long j = 0; j < b; ++j)
        for (long i = j; i < b; ++i) {
            double sum = i == j;
            for (long k = j; k < i; ++k) sum -= L[i * b + k] * inverse[k * b + j];
            inverse[i * b + j] = sum / L[i * b + i];
        }
    for (long i = b - 1; i >= 0; --i) {  // from the last: row i needs those before it unchanged
        float* row = rows + i * stride;
        const float own = static_cast<float>(inverse[i * b + i]);
        for (long k = 0; k < stride; ++k) row[k] *= own;
        for (long j = 0; j < i; ++j) {
            const float* other = rows + j * stride;
            const float factor = static_cast<float>(inverse[i * b + j]);
            for (long k = 0; k < stride; ++k) row[k] += factor * other[k];
        }
    }
    R.assign(b * b, 0.0);
    for (long i = 0; i < b; ++i)
        if (L[i * b + i] > 4 * std::sqrt(floor))
            for (long j = i; j < b; ++j) R[i * b + j] = L[j * b + i];
}

double energy_bound(const double* theta, const double* coupling, double following, long rank) {
    double lost = 0, captured = 0;
    for (long i = 0; i < rank; ++i) {
        const double gap = std::max(theta[i] - following, std::numeric_limits<double>::min());
        lost += std::min(coupling[i], coupling[i] * coupling[i] / gap);
        captured += theta[i];
    }
    return captured > 0 ? lost / captured : 0;
}

// Set by the calling thread, which alone may ask, and seen by all.
class Interruption {
public:
    explicit Interruption(const std::function<bool()>& ask) : ask(ask) {}

    bool now() {
        if (std::this_thread::get_id() == caller && !stopped) {
            const auto time = Clock::now();
            if (time - asked > std::chrono::milliseconds(50)) asked = time, stopped = ask();
        }
        return stopped;
    }

private:
    using Clock = std::chrono::steady_clock;
    const std::function<bool()>& ask;
    const std::thread::id caller = std::this_thread::get_id();
    Clock::time_point asked = Clock::now();
    std::atomic<bool> stopped{false};
};

class Lanczos {
public:
    // memory: for the Gram matrix, kept from one matrix to the next
    Lanczos(SvdTask& task, Interruption& interruption, Scratch& memory)
        : task(task), interruption(interruption), b(task.block), rank(task.rank), wide(padded(rank, 4)),
          length(task.gram ? std::min(task.N, task.K) : task.K), basis(rank + task.columns + b, length),
          image(std::max(b, wide), task.K), V(wide, task.K), theta(rank), coupling(rank) {
        if (!task.gram) return;
        const bool turned = task.N < task.K;
        G_stride = padded(length, 32) + PAD;
        G = memory.take<float>(padded(length, 32) * G_stride);
        gram_by_tiles(task.A, std::max(task.N, task.K), length, turned ? 1 : task.lda, turned ? task.lda : 1, G, G_stride);
    }

    void solve() {
        task.matvecs = 0;
        task.status = SvdStatus::not_converged;
        if (!run(0, 0, rank)) return;
        if (crowded()) {
            const std::vector<double> before = theta;
            const double after = following;
            // What was found stays in front of the basis, and the next run is orthogonal to it.
            for (long i = 0; i < rank; ++i) std::memcpy(basis[i], V[i], length * sizeof(float));
            if (!run(rank, 1, 1)) return;
            if (theta[0] > before.back() * (1 + 1e-9)) return;  // rare: the slower paths sort it out
            theta = before;
            following = std::max(after, std::min(theta.back(), theta_found));
            for (long i = 0; i < rank; ++i) std::memcpy(V[i], basis[i], length * sizeof(float));
        }
        if (task.gram && task.N < task.K) other_side();
        finish();
    }

private:
    SvdTask& task;
    Interruption& interruption;
    const long b, rank, wide, length;  // of the vectors that are iterated on
    Rows basis, image, V;
    float* G = nullptr;  // A^T A, or A A^T on the shorter side: blocks of 32 on the diagonal and below
    long G_stride = 0;
    std::vector<double> theta, coupling, again, H, values;
    SymmetricBand projected;
    std::vector<float> dots;
    double following = 0, theta_found = 0;

    // rows (b) -= basis^T basis rows over the rows of the basis in [first, known); their products are left in `dots`
    void remove(float* rows, long first, long known) {
        if (first == known) return;
        std::memcpy(image.data, rows, b * basis.stride * sizeof(float));
        products().fused(basis[first], known - first, length, basis.stride, image.data, basis.stride, rows,
                         basis.stride, b, -1, dots.data());
    }

    // The block after `known` rows: orthonormal, orthogonal to them; B (b, b) couples it to the block before.
    void next_block(long known, std::uint64_t seed, std::vector<double>& B) {
        float* rows = basis[known];
        orthonormalise(rows, basis.stride, b, B);
        for (int turn = 0; turn < 4; ++turn) {
            for (long i = 0; i < b; ++i)
                if (B[i * b + i] == 0) {
                    std::memset(rows + i * basis.stride, 0, basis.stride * sizeof(float));
                    for (long k = 0; k < length; ++k) rows[i * basis.stride + k] = uniform(seed, k * b + i);
                }
            remove(rows, 0, known);
            orthonormalise(rows, basis.stride, b, again);
            std::vector<double> product(b * b, 0.0);
            bool sound = true;
            for (long i = 0; i < b; ++i) {
                sound = sound && again[i * b + i] > 0.5;
                for (long k = i; k < b; ++k)
                    for (long j = k; j < b; ++j) product[i * b + j] += again[i * b + k] * B[k * b + j];
            }
            B = product;
            if (sound) break;
        }
    }

    // One run orthogonal to the first `locked` rows of the basis, until the first `wanted` values have converged, each
    // as far as its share of the goal asks; whether they have.
    bool run(long locked, std::uint64_t seed, long wanted) {
        const long room = std::min<long>(task.columns, length - locked - b) / b * b;
        if (room < rank + 4 * b) return false;
        std::vector<double> B;
        basis.zero(locked, b);
        for (long i = 0; i < b; ++i)
            for (long k = 0; k < length; ++k) basis[locked + i][k] = uniform(seed, k * b + i);
        next_block(locked, seed, B);
        H.assign(room * 2 * b, 0.0);
        dots.resize((locked + room + b) * b);
        long have = 0, checked = 0, check = std::min(room, padded(5 * wanted / 2 + 6 * b + 8, b));
        const double goal = task.goal * rank / wanted;
        double before = 1;
        while (!interruption.now()) {
            float* Q = basis[locked + have];
            have += b;
            const long known = locked + have;
            basis.zero(known, b);
            apply(Q, basis[known]);
            task.matvecs += 2 * b;
            // Of what is known only the last two blocks have a part in this one; next_block removes the rounding.
            const long first = std::max(locked, known - 2 * b);
            remove(basis[known], first, known);
            for (long i = 0; i < b; ++i)  // the diagonal block of the projected matrix
                for (long j = 0; j <= i; ++j) {
                    const double value = 0.5 * (static_cast<double>(dots[(known - b - first + i) * b + j]) +
                                                dots[(known - b - first + j) * b + i]);
                    below(have - b + i, have - b + j) = value;
                }
            next_block(known, seed + have, B);
            if (have < room)
                for (long i = 0; i < b; ++i)
                    for (long j = i; j < b; ++j) below(have + i, have - b + j) = B[i * b + j];
            if (have < check) continue;
            const double bound = ritz(have, B, wanted);
            if (bound <= goal || have == room) {
                take(locked, have);
                return bound <= goal;
            }
            // With blocks of 4 the bound falls 3 to 8 times a block. A test costs as much as 3 blocks of 768x768: small
            // matrices rather take a block too many.
            const double slope = checked ? std::max(std::log(before / bound) * b / (have - checked), 1.1) : 1.4;
            const double steps = std::log(bound / goal) / slope + (task.N * task.K > 1000000 ? 0.3 : 0.8);
            check = std::min(room, have + b * std::max(1L, static_cast<long>(std::min(steps, 8.0))));
            checked = have, before = bound;
        }
        return false;
    }

    // Y (b rows) += A^T A X
    void apply(const float* X, float* Y) const {
        if (G)
            products().symmetric(G, length, G_stride, X, basis.stride, Y, basis.stride, b);
        else
            products().fused(task.A, task.N, task.K, task.lda, X, basis.stride, Y, basis.stride, b, 1, nullptr);
    }

    // H[row, column] of the projected matrix, a band of width b, column <= row < column + 2 b
    double& below(long row, long column) { return H[column * 2 * b + row - column]; }

    double ritz(long have, const std::vector<double>& B, long wanted) {
        projected.reset(have, b);
        for (long j = 0; j < have; ++j)
            for (long i = j; i < std::min(have, j + b + 1); ++i) projected.below(i, j) = below(i, j);
        values = projected.eigenvalues();
        following = have > rank ? std::max(values[rank], 0.0) : 0;
        theta_found = std::max(values[0], 0.0);
        std::vector<double> ends(rank * b);
        projected.ends_of_eigenvectors(rank, b, ends.data());
        for (long r = 0; r < rank; ++r) {
            theta[r] = std::max(values[r], 0.0);
            double sum = 0;
            for (long i = 0; i < b; ++i) {
                double part = 0;
                for (long j = i; j < b; ++j) part += B[i * b + j] * ends[r * b + j];
                sum += part * part;
            }
            coupling[r] = std::sqrt(sum);
        }
        return energy_bound(theta.data(), coupling.data(), wanted < have ? std::max(values[wanted], 0.0) : 0, wanted);
    }

    // V <- the Ritz vectors
    void take(long locked, long have) {
        std::vector<double> vectors(have * rank);
        projected.eigenvectors(rank, vectors.data());
        std::vector<float> times(have * wide, 0.0f);
        for (long i = 0; i < have; ++i)
            for (long r = 0; r < rank; ++r) times[i * wide + r] = static_cast<float>(vectors[i * rank + r]);
        V.zero(0, wide);
        products().combine(basis[locked], have, length, basis.stride, times.data(), wide, V.data, V.stride);
    }

    // Whether b Ritz values in a row nearly agree: there may be more of them than a block can see. Of values that differ
    // by w one more may hide while the bound is w^2 / rank.
    bool crowded() const {
        const double width = std::min(0.02, 6 * std::sqrt(task.goal * rank));
        for (long i = 0; i + b <= std::max(rank, b); ++i)
            if (values[i] > 0 && values[i + b - 1] >= (1 - width) * values[i]) return true;
        return false;
    }

    // Flips columns of both so that the largest entry of each column of W scaled is positive.
    void choose_signs(const std::vector<float>& W, std::vector<float>& turned, std::vector<float>& scaled) const {
        std::vector<float> largest(wide, 0.0f), u(wide);
        for (long n = 0; n < task.N; ++n) {
            products().row(&W[n * wide], rank, wide, scaled.data(), u.data());
            for (long r = 0; r < rank; ++r)
                if (std::fabs(u[r]) > std::fabs(largest[r])) largest[r] = u[r];
        }
        for (long r = 0; r < rank; ++r)
            if (largest[r] < 0)
                for (long i = 0; i < rank; ++i) turned[i * wide + r] *= -1, scaled[i * wide + r] *= -1;
    }

    // V <- A^T V, of left singular vectors the right ones
    void other_side() {
        std::vector<float> times(task.N * wide, 0.0f);
        for (long n = 0; n < task.N; ++n)
            for (long r = 0; r < rank; ++r) times[n * wide + r] = V[r][n];
        V.zero(0, wide);
        products().combine(task.A, task.N, task.K, task.lda, times.data(), wide, V.data, V.stride);
        task.matvecs += rank;
    }

    // U, S, V of A on the span of V, and the residuals: one more reading of A, for A V and A^T A V.
    void finish() {
        const long N = task.N, K = task.K;
        orthonormalise(V.data, V.stride, rank, again);
        std::vector<float> W(N * wide);
        Rows sides(2 * wide, K);
        image.zero(0, wide);
        products().fused(task.A, N, K, task.lda, V.data, V.stride, image.data, image.stride, wide, 1, W.data());
        task.matvecs += 2 * rank;
        task.following = following;
        std::vector<double> gram(rank * rank, 0.0), Z(rank * rank);
        products().outer(W.data(), N, rank, wide, gram.data());
        projected.reset(rank, rank - 1);
        for (long j = 0; j < rank; ++j)
            for (long i = j; i < rank; ++i) projected.below(i, j) = gram[i * rank + j];
        const std::vector<double>& S2 = projected.eigenvalues();
        projected.eigenvectors(rank, Z.data());
        if (!(S2[rank - 1] > 1e-6 * S2[0])) {  // A V is too far from orthogonal columns for this
            for (long r = 0; r < rank; ++r) std::memcpy(task.Vh + r * K, V[r], K * sizeof(float));
            task.status = SvdStatus::ill_conditioned;
            return;
        }
        std::vector<float> turn(rank * wide, 0.0f), scaled(rank * wide, 0.0f);
        for (long r = 0; r < rank; ++r) {
            const double s = std::sqrt(S2[r]);
            task.S[r] = static_cast<float>(s);
            for (long i = 0; i < rank; ++i) {
                turn[i * wide + r] = static_cast<float>(Z[i * rank + r]);
                scaled[i * wide + r] = static_cast<float>(Z[i * rank + r] / s);
            }
        }
        choose_signs(W, turn, scaled);
        task.right = products().turn(W.data(), N, rank, wide, scaled.data(), turn.data(), task.S, task.U);
        // V Z and A^T A V Z / s = A^T U
        sides.zero(0, 2 * wide);
        products().combine(V.data, rank, K, V.stride, turn.data(), wide, sides.data, sides.stride);
        products().combine(image.data, rank, K, image.stride, scaled.data(), wide, sides[wide], sides.stride);
        for (long r = 0; r < rank; ++r) {
            const float *v = sides[r], *atu = sides[wide + r];
            double sum = 0;
            for (long k = 0; k < K; ++k) {
                const double rest = static_cast<double>(atu[k]) - static_cast<double>(task.S[r]) * v[k];
                sum += rest * rest;
            }
            task.left[r] = std::sqrt(sum);
            std::memcpy(task.Vh + r * K, v, K * sizeof(float));
        }
        task.status = SvdStatus::found;
    }
};

#endif

}  // namespace

bool truncated_svd(SvdTask* tasks, long count, int threads, const std::function<bool()>& interrupted) {
#if defined(__GNUC__)
    Interruption interruption(interrupted);
    std::atomic<long> next{0};
    parallel_for(std::min<long>(threads, count), threads, [&](long) {
        Scratch memory;
        for (long task = next++; task < count && !interruption.now(); task = next++)
            Lanczos(tasks[task], interruption, memory).solve();
    });
    return !interruption.now();
#else
    for (long index = 0; index < count; ++index) tasks[index].status = SvdStatus::not_converged;
    (void)threads, (void)interrupted;
    return true;
#endif
}

}  // namespace federa
