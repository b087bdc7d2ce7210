// The products of truncated_svd.cpp, included once for each instruction set: LANES floats in a vector, PANEL rows of
// A at a time, and sum4(a, b, c, d, out), the sums over the lanes of four vectors, defined by the includer.

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }

static inline vec load_some(const float* p, long count) {
    vec v = {};
    std::memcpy(&v, p, count * sizeof(float));
    return v;
}

// dots[4 i + j] += sum over k in [first, last) of A[i, k] X[j, k]
template <int ROWS>
static inline void dot_rows(const float* A, long lda, const float* X, long ldx, long first, long last, float* dots) {
    vec sums[ROWS][4] = {};
    long k = first;
    for (; k + LANES <= last; k += LANES) {
        const vec x0 = load(X + k), x1 = load(X + ldx + k), x2 = load(X + 2 * ldx + k), x3 = load(X + 3 * ldx + k);
        for (int i = 0; i < ROWS; ++i) {
            const vec a = load(A + i * lda + k);
            sums[i][0] += a * x0, sums[i][1] += a * x1, sums[i][2] += a * x2, sums[i][3] += a * x3;
        }
    }
    if (k < last)
        for (int i = 0; i < ROWS; ++i) {
            const vec a = load_some(A + i * lda + k, last - k);
            for (int j = 0; j < 4; ++j) sums[i][j] += a * load(X + j * ldx + k);
        }
    for (int i = 0; i < ROWS; ++i) sum4(sums[i][0], sums[i][1], sums[i][2], sums[i][3], dots + 4 * i);
}

// Y[j, k] += sum over i of times[4 i + j] A[i, k], k in [first, last)
template <int ROWS>
static inline void spread_rows(const float* A, long lda, const float* times, float* Y, long ldy, long first, long last) {
    vec t[ROWS][4];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < 4; ++j) t[i][j] = vec{} + times[4 * i + j];
    for (long k = first; k < last; k += LANES) {
        vec a[ROWS];
        for (int i = 0; i < ROWS; ++i)
            a[i] = k + LANES <= last ? load(A + i * lda + k) : load_some(A + i * lda + k, last - k);
        for (int j = 0; j < 4; ++j) {
            float* y = Y + j * ldy + k;
            vec sum = load(y);
            for (int i = 0; i < ROWS; ++i) sum += t[i][j] * a[i];
            *reinterpret_cast<loose*>(y) = sum;
        }
    }
}

static void dot_panel(const float* A, long lda, long rows, const float* X, long ldx, long first, long last, float* dots) {
    for (; rows >= PANEL; rows -= PANEL, A += PANEL * lda, dots += 4 * PANEL)
        dot_rows<PANEL>(A, lda, X, ldx, first, last, dots);
    for (; rows >= 2; rows -= 2, A += 2 * lda, dots += 8) dot_rows<2>(A, lda, X, ldx, first, last, dots);
    if (rows) dot_rows<1>(A, lda, X, ldx, first, last, dots);
}

static void spread_panel(const float* A, long lda, long rows, const float* times, float* Y, long ldy, long first,
                         long last) {
    for (; rows >= PANEL; rows -= PANEL, A += PANEL * lda, times += 4 * PANEL)
        spread_rows<PANEL>(A, lda, times, Y, ldy, first, last);
    for (; rows >= 2; rows -= 2, A += 2 * lda, times += 8) spread_rows<2>(A, lda, times, Y, ldy, first, last);
    if (rows) spread_rows<1>(A, lda, times, Y, ldy, first, last);
}

// For groups of four rows of X (columns, ldx): products = A X^T (rows, columns), where asked for, and
// Y (columns, ldy) += sign A^T A X^T, reading A from memory once. Rows of X and Y are padded to whole vectors.
//
// Multiplying one block while the next one is multiplied by X, or asking for it ahead, gained nothing (3072x768: 0.44
// to 0.47 ms either way, of which reading alone is 0.33).
static void fused(const float* A, long rows, long K, long lda, const float* X, long ldx, float* Y, long ldy, long columns,
                  float sign, float* products) {
    const long chunk = 1024;                                                   // 16 KB of X or Y: stays in L1
    const long block = std::max<long>(PANEL, (96 * 1024 / K) / PANEL * PANEL);  // 384 KB of A: stays in L2
    std::vector<float> dots(4 * std::min(block, rows));
    for (long row = 0; row < rows; row += block) {
        const long height = std::min(block, rows - row);
        const float* panel = A + row * lda;
        for (long group = 0; group < columns; group += 4) {
            std::fill(dots.begin(), dots.end(), 0.0f);
            for (long k = 0; k < K; k += chunk)
                dot_panel(panel, lda, height, X + group * ldx, ldx, k, std::min(K, k + chunk), dots.data());
            if (products)
                for (long i = 0; i < height; ++i)
                    std::memcpy(products + (row + i) * columns + group, &dots[4 * i], 4 * sizeof(float));
            if (sign != 1)
                for (float& dot : dots) dot *= sign;
            for (long k = 0; k < K; k += chunk)
                spread_panel(panel, lda, height, dots.data(), Y + group * ldy, ldy, k, std::min(K, k + chunk));
        }
    }
}

// Y (columns, ldy) += X G for symmetric G (n, n; ldg) and X (columns, ldx), columns a multiple of 4. Of G only blocks of 32
// on the diagonal and below are read, once; n rows of it, and of X and G whole 32s.
static void symmetric(const float* G, long n, long ldg, const float* X, long ldx, float* Y, long ldy, long columns) {
    float dots[4 * 32], times[4 * 32];
    for (long group = 0; group < columns; group += 4)
        for (long row = 0; row < n; row += 32) {
            const long height = std::min(32L, n - row);
            const float *x = X + group * ldx, *block = G + row * ldg;
            float* y = Y + group * ldy;
            std::fill(dots, dots + 4 * 32, 0.0f);
            for (long i = 0; i < height; ++i)
                for (long j = 0; j < 4; ++j) times[4 * i + j] = x[j * ldx + row + i];
            for (long i = 0; i < height; i += 4) {  // read twice, from L1 the second time
                if (height - i >= 4) {
                    dot_rows<4>(block + i * ldg, ldg, x, ldx, 0, row + 32, dots + 4 * i);
                    spread_rows<4>(block + i * ldg, ldg, times + 4 * i, y, ldy, 0, row);
                } else {
                    dot_panel(block + i * ldg, ldg, height - i, x, ldx, 0, row + 32, dots + 4 * i);
                    spread_panel(block + i * ldg, ldg, height - i, times + 4 * i, y, ldy, 0, row);
                }
            }
            for (long i = 0; i < height; ++i)
                for (long j = 0; j < 4; ++j) y[j * ldy + row + i] += dots[4 * i + j];
        }
}

// Y (columns, ldy) += times^T A for times (rows, columns), columns a multiple of 4, reading A from memory once.
static void combine(const float* A, long rows, long K, long lda, const float* times, long columns, float* Y, long ldy) {
    const long block = std::min(rows, std::max<long>(PANEL, (96 * 1024 / K) / PANEL * PANEL));
    std::vector<float> some(4 * block);
    for (long row = 0; row < rows; row += block)
        for (long group = 0; group < columns; group += 4) {
            const long height = std::min(block, rows - row);
            for (long i = 0; i < height; ++i)
                std::memcpy(&some[4 * i], times + (row + i) * columns + group, 4 * sizeof(float));
            for (long k = 0; k < K; k += 1024)
                spread_panel(A + row * lda, lda, height, some.data(), Y + group * ldy, ldy, k, std::min(K, k + 1024));
        }
}

// In float64.
static double dot(const float* a, const float* b, long length) {
    double sums[16] = {};
    long k = 0;
    for (; k + 16 <= length; k += 16)
        for (int lane = 0; lane < 16; ++lane) sums[lane] += static_cast<double>(a[k + lane]) * b[k + lane];
    for (; k < length; ++k) sums[0] += static_cast<double>(a[k]) * b[k];
    for (int half = 8; half; half /= 2)
        for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    return sums[0];
}

// gram (count, count) += W^T W in float64, W (rows, stride)
static void outer(const float* W, long rows, long count, long stride, double* gram) {
    std::vector<double> row(count);
    for (long n = 0; n < rows; ++n) {
        for (long i = 0; i < count; ++i) row[i] = W[n * stride + i];
        for (long i = 0; i < count; ++i) {
            const double factor = row[i];
            double* __restrict sums = gram + i * count;
            const double* __restrict other = row.data();
            for (long j = 0; j < count; ++j) sums[j] += factor * other[j];
        }
    }
}

// out (stride) = one row of W (count) times the matrix (count, stride)
static void row(const float* W, long count, long stride, const float* matrix, float* __restrict out) {
    for (long r = 0; r < stride; ++r) out[r] = 0;
    for (long i = 0; i < count; ++i) {
        const float factor = W[i];
        const float* __restrict entries = matrix + i * stride;
        for (long r = 0; r < stride; ++r) out[r] += factor * entries[r];
    }
}

// U (rows, count) = W scaled; returns ||W turned - U diag(S)||. W (rows, stride), scaled and turned (count, stride).
static double turn(const float* W, long rows, long count, long stride, const float* scaled, const float* turned,
                   const float* S, float* U) {
    double sum = 0;
    std::vector<float> u(stride), av(stride);
    for (long n = 0; n < rows; ++n) {
        row(W + n * stride, count, stride, scaled, u.data());
        row(W + n * stride, count, stride, turned, av.data());
        for (long r = 0; r < count; ++r) {
            U[n * count + r] = u[r];
            const double rest = static_cast<double>(av[r]) - static_cast<double>(u[r]) * S[r];
            sum += rest * rest;
        }
    }
    return std::sqrt(sum);
}
