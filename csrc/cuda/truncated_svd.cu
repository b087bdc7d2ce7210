#include "cuda/truncated_svd.h"

#include <cmath>
#include <stdexcept>

#include "cuda/launch.h"

namespace federa {
namespace {

constexpr int threads = 256, tile = 4, tile_entries = tile * tile;
constexpr int rows_held = 32, rows_of_block = 256;  // of a panel: in shared memory, in one block's sum
constexpr int most = static_cast<int>(widest_panel);
constexpr double negligible = 1e-14, nothing = 1e-150;  // beside the longest column's square

__host__ __device__ inline int tiles_across(int b) { return (b + tile - 1) / tile; }
__host__ __device__ inline int tiles_below(int b) { return tiles_across(b) * (tiles_across(b) + 1) / 2; }
__host__ __device__ inline int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int odd(int n) { return n | 1; }  // a stride whose columns lie in different banks

template <class T>
struct Panel {
    T* data;
    long batch_stride, row_stride;

    __device__ T* row(long g, long k) const { return data + g * batch_stride + k * row_stride; }
};

// The row and column of tile t of a lower triangle.
__device__ inline void place_of(int t, int& row, int& column) {
    row = 0;
    while (t > row) t -= ++row;
    column = t;
}

// partial (G, blocks, tiles, 16): the part of Y^T Y that this block's rows make, in tiles of its lower triangle. A
// thread sums one tile over every `lanes`-th row, or `per_thread` tiles over all of them.
template <int per_thread, class T>
__global__ void __launch_bounds__(threads) gram_kernel(Panel<const T> Y, int K, int b, double* partial) {
    __shared__ double held[rows_held * most];
    const int g = blockIdx.x, at = threadIdx.x, width = tile * tiles_across(b), tiles = tiles_below(b);
    const int lanes = per_thread == 1 ? threads / tiles : 1;
    const int lane = per_thread == 1 ? at / tiles : 0, first = per_thread == 1 ? at % tiles : at;
    double sums[per_thread][tile_entries] = {};
    int rows[per_thread], columns[per_thread];
#pragma unroll
    for (int n = 0; n < per_thread; ++n) place_of(first + n * threads, rows[n], columns[n]);
    const int begin = blockIdx.y * rows_of_block, end = smaller(K, begin + rows_of_block);
    for (int start = begin; start < end; start += rows_held) {
        __syncthreads();
        for (int i = at; i < rows_held * width; i += threads) {
            const int row = start + i / width, column = i % width;
            held[i] = row < end && column < b ? static_cast<double>(Y.row(g, row)[column]) : 0.0;
        }
        __syncthreads();
        if (lane < lanes)
#pragma unroll
            for (int n = 0; n < per_thread; ++n) {
                if (first + n * threads >= tiles) break;
                for (int row = lane; row < rows_held; row += lanes) {
                    const double* const left = held + row * width + tile * rows[n];
                    const double* const right = held + row * width + tile * columns[n];
#pragma unroll
                    for (int e = 0; e < tile_entries; ++e) sums[n][e] += left[e / tile] * right[e % tile];
                }
            }
    }
    partial += (static_cast<long>(g) * gridDim.y + blockIdx.y) * tiles * tile_entries;
    if (lanes == 1) {
#pragma unroll
        for (int n = 0; n < per_thread; ++n)
            if (lane < lanes && first + n * threads < tiles)
                for (int e = 0; e < tile_entries; ++e) partial[(first + n * threads) * tile_entries + e] = sums[n][e];
        return;
    }
    __syncthreads();
    if (lane < lanes)
#pragma unroll
        for (int e = 0; e < tile_entries; ++e) held[(lane * tiles + first) * tile_entries + e] = sums[0][e];
    __syncthreads();
    for (int i = at; i < tiles * tile_entries; i += threads) {
        double sum = 0;
        for (int l = 0; l < lanes; ++l) sum += held[l * tiles * tile_entries + i];
        partial[i] = sum;
    }
}

// The Gram matrix of one panel, its Cholesky factor R^T (written transposed) and the inverse of R, by the elimination
// that makes G = L D L^T, applied to the identity as well: one barrier a column. The lower triangle of M holds what is
// left of G, the upper one the transposed inverse of the unit L. Where R's diagonal is negligible its row and the
// inverse's column become zero.
template <class T, int most_bytes>
__global__ void __launch_bounds__(threads)
    factor_kernel(const double* partial, int blocks, int b, double* R, long R_batch, T* inverse) {
    double* const M = reinterpret_cast<double*>(shared_memory());
    double* const roots = M + b * odd(b);
    __shared__ double longest;
    const int g = blockIdx.x, at = threadIdx.x, stride = odd(b), tiles = tiles_below(b);
    const int warp = at / 32, lane = at % 32;
    partial += static_cast<long>(g) * blocks * tiles * tile_entries;
    for (int n = at; n < tiles * tile_entries; n += threads) {
        double sum = 0;
        for (int block = 0; block < blocks; ++block) sum += partial[block * tiles * tile_entries + n];
        int i, j;
        place_of(n / tile_entries, i, j);
        i = tile * i + n % tile_entries / tile, j = tile * j + n % tile;
        if (i < b && j <= i) M[i * stride + j] = sum;
    }
    __syncthreads();
    if (at == 0) {
        longest = 0;
        for (int i = 0; i < b; ++i) longest = fmax(longest, M[i * stride + i]);
    }
    __syncthreads();
    const double floor = negligible * longest + nothing;
    for (int i = at; i < b; i += threads) M[i * stride + i] += floor;
    for (int j = 0; j < b; ++j) {
        __syncthreads();
        const double over = 1 / fmax(M[j * stride + j], floor);
        for (int i = j + 1 + warp; i < b; i += threads / 32) {
            const double times = M[i * stride + j] * over;
            for (int k = lane; k <= i; k += 32)
                if (k > j)
                    M[i * stride + k] -= times * M[k * stride + j];
                else
                    M[k * stride + i] = (k == j ? 0 : M[k * stride + i]) - times * (k == j ? 1 : M[k * stride + j]);
        }
    }
    __syncthreads();
    for (int i = at; i < b; i += threads) {
        const double root = sqrt(fmax(M[i * stride + i], floor));
        roots[i] = root > 4 * sqrt(floor) ? root : 0;
    }
    __syncthreads();
    R += g * R_batch;
    inverse += static_cast<long>(g) * b * b;
    for (int n = at; n < b * b; n += threads) {
        const int i = n / b, j = n % b;
        double entry = 0, inverted = 0;
        if (i == j && roots[i] > 0) entry = roots[i], inverted = 1 / roots[i];
        if (i < j && roots[i] > 0) entry = M[j * stride + i] / roots[i];
        if (i < j && roots[j] > 0) inverted = M[i * stride + j] / roots[j];
        R[n] = entry;
        inverse[n] = static_cast<T>(inverted);
    }
}

// Q = Y R^-1, or noise in the columns whose inverse is zero. A block does rows_held rows, so Q may be Y.
template <class T>
__global__ void __launch_bounds__(threads)
    apply_kernel(Panel<const T> Y, const T* inverse, const T* noise, Panel<T> Q, int K, int b) {
    __shared__ T held[rows_held * most];
    constexpr int together = 4;  // rows of a thread, which share what it reads of the inverse
    const int g = blockIdx.x, at = threadIdx.x, start = blockIdx.y * rows_held, rows = smaller(rows_held, K - start);
    inverse += static_cast<long>(g) * b * b;
    for (int i = at; i < rows_held * b; i += threads) held[i] = i / b < rows ? Y.row(g, start + i / b)[i % b] : T(0);
    __syncthreads();
    for (int n = at; n < rows_held / together * b; n += threads) {
        const int row = n / b, column = n % b;
        T sums[together] = {};
        for (int k = 0; k <= column; ++k) {
            const T factor = inverse[k * b + column];
#pragma unroll
            for (int i = 0; i < together; ++i) sums[i] += held[(row + i * rows_held / together) * b + k] * factor;
        }
        const bool dead = inverse[column * b + column] == T(0);
#pragma unroll
        for (int i = 0; i < together; ++i) {
            const int k = row + i * rows_held / together;
            if (k >= rows) break;
            Q.row(g, start + k)[column] = dead ? noise[static_cast<long>(start + k) * b + column] : sums[i];
        }
    }
}

struct Rotation {  // of rows and columns p < q
    double cosine, sine, tangent;
    int p, q;
};

// What zeroes M(p, q) for the pair in place i of a round, of n players, n even: one stays, the others go round.
__device__ inline Rotation rotation_of(const double* M, int stride, int i, int round, int n, double negligible_entry) {
    const int other = i == 0 ? n - 1 : round + i < n - 1 ? round + i : round + i - (n - 1);
    const int one = round >= i ? round - i : round - i + n - 1;
    const int p = smaller(one, other), q = one + other - p;
    const double pq = M[p * stride + q];
    if (!(fabs(pq) > negligible_entry)) return {1, 0, 0, p, q};
    const double ratio = (M[q * stride + q] - M[p * stride + p]) / (2 * pq);
    const double tangent = copysign(1 / (fabs(ratio) + sqrt(1 + ratio * ratio)), ratio);
    const double cosine = 1 / sqrt(1 + tangent * tangent);
    return {cosine, tangent * cosine, tangent, p, q};
}

constexpr int most_sweeps = 30;  // 6 to 10 are the rule
constexpr int vectors_held = 72;  // so many may lie beside the matrix, also on sm_86, all others in global memory

// A block has one matrix, n padded to even by a zero row. A round rotates n / 2 disjoint pairs of rows and columns at
// once: a thread takes the four entries where two pairs cross and their mirror images, so nobody waits between rows and
// columns. Rows of V are the eigenvectors. Ends with the sweep that finds every entry off the diagonal below rounding.
template <int most_bytes>
__global__ void __launch_bounds__(2 * threads, 1)
    jacobi_kernel(const double* H, int n, double* values, double* vectors) {
    double* const M = reinterpret_cast<double*>(shared_memory());
    __shared__ double largest[2 * threads];
    __shared__ Rotation rotations[most / 2];
    __shared__ int rotated;
    const int g = blockIdx.x, at = threadIdx.x, count = blockDim.x, warp = at / 32, lane = at % 32, warps = count / 32;
    const int even = n + n % 2, pairs = even / 2, stride = odd(even);
    H += static_cast<long>(g) * n * n;
    vectors += static_cast<long>(g) * n * n;
    const bool held = n <= vectors_held;
    double* const V = held ? M + even * stride : vectors;
    const int v_stride = held ? stride : n;
    double mine = 0;
    for (int e = at; e < even * even; e += count) {
        const int i = e / even, j = e % even;
        const bool real = i < n && j < n;
        const double entry = real ? 0.5 * H[i * n + j] + 0.5 * H[j * n + i] : 0;
        M[i * stride + j] = entry;
        if (real) V[i * v_stride + j] = i == j;
        mine = fmax(mine, fabs(entry));
    }
    largest[at] = mine;
    for (int half = count / 2; half > 0; half /= 2) {
        __syncthreads();
        if (at < half) largest[at] = fmax(largest[at], largest[at + half]);
    }
    __syncthreads();
    const double negligible_entry = 0x1p-53 * largest[0];
    for (int sweep = 0; sweep < most_sweeps; ++sweep) {
        __syncthreads();
        if (at == 0) rotated = 0;
        for (int round = 0; round < even - 1; ++round) {
            __syncthreads();
            for (int i = at; i < pairs; i += count) {
                rotations[i] = rotation_of(M, stride, i, round, even, negligible_entry);
                if (rotations[i].tangent != 0) rotated = 1;
            }
            __syncthreads();
            for (int i = warp; i < pairs; i += warps) {
                const Rotation a = rotations[i];
                const int p = a.p, q = a.q;
                for (int j = i + lane; j < pairs; j += 32) {
                    const Rotation c = rotations[j];
                    const int r = c.p, s = c.q;
                    if (i == j) {
                        const double pq = M[p * stride + q];
                        M[p * stride + p] -= a.tangent * pq;
                        M[q * stride + q] += a.tangent * pq;
                        if (a.tangent != 0) M[p * stride + q] = M[q * stride + p] = 0;
                        continue;
                    }
                    const double pr = M[p * stride + r], ps = M[p * stride + s];
                    const double qr = M[q * stride + r], qs = M[q * stride + s];
                    const double u = a.cosine * pr - a.sine * qr, v = a.cosine * ps - a.sine * qs;
                    const double x = a.sine * pr + a.cosine * qr, y = a.sine * ps + a.cosine * qs;
                    M[p * stride + r] = M[r * stride + p] = c.cosine * u - c.sine * v;
                    M[p * stride + s] = M[s * stride + p] = c.sine * u + c.cosine * v;
                    M[q * stride + r] = M[r * stride + q] = c.cosine * x - c.sine * y;
                    M[q * stride + s] = M[s * stride + q] = c.sine * x + c.cosine * y;
                }
                if (a.tangent != 0 && q < n)
                    for (int k = lane; k < n; k += 32) {
                        const double vp = V[p * v_stride + k], vq = V[q * v_stride + k];
                        V[p * v_stride + k] = a.cosine * vp - a.sine * vq;
                        V[q * v_stride + k] = a.sine * vp + a.cosine * vq;
                    }
            }
        }
        __syncthreads();
        if (!rotated) break;
    }
    for (int i = at; i < n; i += count) largest[i] = M[i * stride + i];
    __syncthreads();
    if (!held)  // the sorted vectors overwrite the others
        for (int e = at; e < n * n; e += count) M[e] = V[e];
    __syncthreads();
    const double* const sources = held ? V : M;
    for (int i = warp; i < n; i += warps) {
        int place = 0;
        for (int j = 0; j < n; ++j) place += largest[j] > largest[i] || (largest[j] == largest[i] && j < i);
        if (lane == 0) values[static_cast<long>(g) * n + place] = largest[i];
        for (int k = lane; k < n; k += 32) vectors[k * n + place] = sources[i * v_stride + k];
    }
}

// Shared memory of a launch. The most that there may be is in the kernels' names, for `benchmarks compile_check`.
constexpr long factor_bytes(long b) { return (b * odd(static_cast<int>(b)) + b) * 8; }

constexpr long jacobi_bytes(long n) {
    const long even = n + n % 2;
    return (n <= vectors_held ? 2 : 1) * even * odd(static_cast<int>(even)) * 8;
}

long blocks_of(long K) { return (K + rows_of_block - 1) / rows_of_block; }

template <class T>
void run_cholesky_qr(long G, long K, long b, const Panels& Y, const Panels& Q, const void* noise, double* R,
                     long R_batch, double* work, cudaStream_t stream) {
    const Panel<const T> from{static_cast<const T*>(Y.data), Y.batch_stride, Y.row_stride};
    const Panel<T> to{static_cast<T*>(Q.data), Q.batch_stride, Q.row_stride};
    const long blocks = blocks_of(K);
    T* const inverse = reinterpret_cast<T*>(work);
    double* const partial = work + G * b * b;
    const int rows = static_cast<int>(K), columns = static_cast<int>(b);
    const auto sums = tiles_below(columns) <= threads ? gram_kernel<1, T> : gram_kernel<3, T>;
    launch(sums, dim3(G, blocks), threads, 0, stream, from, rows, columns, partial);
    launch(factor_kernel<T, factor_bytes(most)>, G, threads, factor_bytes(b), stream, partial, static_cast<int>(blocks),
           columns, R, R_batch, inverse);
    launch(apply_kernel<T>, dim3(G, (K + rows_held - 1) / rows_held), threads, 0, stream, from, inverse,
           static_cast<const T*>(noise), to, rows, columns);
}

void need(bool fits, const char* what) {
    if (!fits) throw std::invalid_argument(what);
}

}  // namespace

long cholesky_qr_work(long G, long K, long b) {
    return G * (b * b + blocks_of(K) * tiles_below(static_cast<int>(b)) * tile_entries);
}

void cholesky_qr(bool wide, long G, long K, long b, Panels Y, Panels Q, const void* noise, double* R, long R_batch,
                 double* work, void* stream) {
    need(G > 0 && K > 0 && b > 0 && b <= widest_panel && K <= 65535L * rows_held, "cholesky_qr: sizes out of range");
    (wide ? run_cholesky_qr<double> : run_cholesky_qr<float>)(G, K, b, Y, Q, noise, R, R_batch, work,
                                                            static_cast<cudaStream_t>(stream));
}

void symmetric_eigenpairs(long G, long n, const double* H, double* values, double* vectors, void* stream) {
    need(G > 0 && n > 0 && n <= widest_panel, "symmetric_eigenpairs: sizes out of range");
    launch(jacobi_kernel<jacobi_bytes(most)>, G, n <= 48 ? threads : 2 * threads, jacobi_bytes(n),
           static_cast<cudaStream_t>(stream), H, static_cast<int>(n), values, vectors);
}

}  // namespace federa
