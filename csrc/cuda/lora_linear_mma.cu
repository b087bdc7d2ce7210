#include "cuda/lora_linear_mma.h"

#include <initializer_list>

#include "cuda/clients.h"
#include "cuda/launch.h"
#include "cuda/mma_product.h"

namespace federa::mma_kernels {
namespace {

// A kernel with dynamic shared memory carries its BYTES in its name, where benchmarks/compile_check.py reads them.

// A kernel may run beside the one launched ahead of it (Steps), so before it waits it reads only what no kernel here
// writes, and writes nothing: an earlier one may still read what lies there.

constexpr int band = 8;  // row tiles that go over the columns together, so that they meet in L2

template <class P, int BYTES>
__global__ void __launch_bounds__(P::threads, P::BN > 64 ? 2 : 3) down_kernel(const __grid_constant__ Down d) {
    using T = typename P::T;
    let_next_begin();
    const int M = d.M, K = d.K, R = d.R, columns = d.columns;
    const int start = blockIdx.x * P::BM, stop = min(start + P::BM, M), from = blockIdx.y * columns;
    const Matrix x{d.x, kind_of<T>, d.stride_x, 1};
    const ClientRange range(d.segments, start, stop);
    for (int c = range.first; c <= range.last; ++c) {
        const Client own(d.segments, c, start, stop, R, d.scale);
        const Matrix of_first{d.lora_A, d.A_kind, d.stride_c, 0};
        const Matrix A = right_operand<P>(of_first.at(c, 0).data, d.A_kind, d.stride_k, d.stride_r);
        P product;
        product.add(x.at(start, from), own.begin, own.end, P::deep ? A.at(from, 0) : A.at(0, from), own.rank,
                    min(columns, K - from), [] { wait_for_earlier(); });
        product.each([&](int row, int r, float h) {
            if (own.has(row) && r < R) d.parts[(blockIdx.y * d.M + start + row) * d.R + r] = own.scale * h;
        });
    }
}

// The low-rank product of one term, in the last stage of P: client by client, DEPTH components at a time.
template <int DEPTH, class P>
__device__ void add_low(P& product, const Gemm& g, const Term& term, typename P::T* low, const ClientRange& range,
                        int start, int stop, int left) {
    using T = typename P::T;
    constexpr int factor_width = P::deep ? P::BN : DEPTH, factor_rows = P::deep ? DEPTH : P::BN;
    constexpr int factor_step = P::threads / factor_width, low_step = P::threads / DEPTH;
    static_assert(factor_rows % (batch * factor_step) == 0 && P::BM % (batch * low_step) == 0);
    const int R = term.R, S = term.S, width = min(static_cast<int>(g.N) - left, P::BN);
    T *const a = P::left(P::last_stage), *const b = P::right(P::last_stage);
    for (int c = range.first; c <= range.last; ++c) {
        const Client own(g.segments, c, start, stop, R, term.scale);
        for (int at = 0; at < R; at += DEPTH) {
            __syncthreads();  // all have left this stage
            bool finite = true;
            const int column = threadIdx.x % factor_width;
#pragma unroll 1
            for (int first = threadIdx.x / factor_width; first < factor_rows; first += batch * factor_step) {
                float values[batch];
                gather(values, term.factor, term.factor_kind, [&](int i) {
                    const int row = first + i * factor_step, n = P::deep ? column : row;
                    const int r = at + (P::deep ? row : column);
                    const Index place = c * term.stride_fc + r * term.stride_fr + (left + n) * term.stride_fn;
                    return r < own.rank && n < width ? place : -1;
                });
#pragma unroll
                for (int i = 0; i < batch; ++i) {
                    T kept = rounded<T>(own.scale * values[i]);
                    if (range.several() && !isfinite(as_float(kept))) finite = false, kept = rounded<T>(0.0f);
                    b[(first + i * factor_step) * P::right_stride + column] = kept;
                }
            }
            // NaN or inf in one client's factor must reach its rows only, and 0 * NaN is NaN: so such entries became 0,
            // and the client's own rows become NaN.
            const bool lost = range.several() && __syncthreads_or(!finite);
            const int r = threadIdx.x % DEPTH;
#pragma unroll 1
            for (int first = threadIdx.x / DEPTH; first < P::BM; first += batch * low_step) {
                float sums[batch] = {}, part[batch];
#pragma unroll 1
                for (int s = 0; s < S; ++s) {
                    gather(part, term.down, float32, [&](int i) {
                        const int row = first + i * low_step;
                        const Index place = (s * g.M + start + row) * term.stride_down + at + r;
                        return own.has(row) && at + r < own.rank ? place : -1;
                    });
#pragma unroll
                    for (int i = 0; i < batch; ++i) sums[i] += part[i];
                }
#pragma unroll
                for (int i = 0; i < batch; ++i) {
                    const int row = first + i * low_step;
                    const T kept = rounded<T>(sums[i]);
                    if (low && own.has(row) && at + r < R) low[(start + row) * g.stride_low + at + r] = kept;
                    a[row * (P::BK + pad) + r] = lost && own.has(row) ? rounded<T>(NAN) : kept;
                }
            }
            __syncthreads();
            product.template multiply<DEPTH>(a, b);
        }
    }
}

template <class P, int BYTES>
__global__ void __launch_bounds__(P::threads, P::BM > 64 ? 2 : 3) gemm_kernel(const __grid_constant__ Gemm g) {
    using T = typename P::T;
    let_next_begin();
    const int M = g.M, N = g.N, block = blockIdx.x, tiles_n = blocks(N, P::BN), in_band = band * tiles_n;
    const int top = block / in_band * band, height = min(blocks(M, P::BM) - top, band), within = block % in_band;
    const int start = (top + within % height) * P::BM, left = within / height * P::BN, stop = min(start + P::BM, M);
    const ClientRange range(g.segments, start, stop);
    T* low = left == 0 ? static_cast<T*>(g.low) : nullptr;  // the first column of blocks leaves it for later

    P product;
    for (int p = 0; p < g.P; ++p) {
        const Term& term = g.terms[p];
        const Matrix rows{term.rows, kind_of<T>, term.stride_rows, 1};
        const Matrix weight = right_operand<P>(term.weight, term.weight_kind, term.stride_wd, term.stride_wn);
        const Matrix own = P::deep ? weight.at(0, left) : weight.at(left, 0);
        product.add(rows.at(start, 0), 0, stop - start, own, min(N - left, P::BN), term.D, [&] {
            wait_for_earlier();  // for the term's `down`
            if (term.R <= 16)
                add_low<16>(product, g, term, low, range, start, stop, left);
            else
                add_low<P::BK>(product, g, term, low, range, start, stop, left);
        });
        if (low) low += term.R;
    }

    if (g.bias) {
        const bool own_bias = g.stride_bias != 0;
        for (int c = own_bias ? range.first : 0; c <= (own_bias ? range.last : 0); ++c) {
            const Client own(own_bias ? g.segments : Segments{}, c, start, stop, 0, 0.0);
            product.add_to_columns(
                [&](float(&values)[batch], int first) {
                    gather(values, g.bias, g.bias_kind, [&](int i) {
                        const int column = left + first + P::column_of_batch(i);
                        return column < N ? c * g.stride_bias + column : -1;
                    });
                },
                own);
        }
    }

    // Through shared memory, so that whole rows are written, 16 bytes at a time where they allow it.
    constexpr int stride = P::BN + pad, vectors = P::BN / 8;
    T* const tile = P::left(0);
    product.each([&](int row, int column, float sum) { tile[row * stride + column] = rounded<T>(sum); });
    __syncthreads();
    T* const out = static_cast<T*>(g.out);
    const bool aligned = N % 8 == 0 && reinterpret_cast<std::uintptr_t>(out) % 16 == 0;
    for (int i = threadIdx.x; i < P::BM * vectors; i += P::threads) {
        const int row = i / vectors, column = i % vectors * 8;
        if (start + row >= stop || left + column >= N) continue;
        const T* const from = tile + row * stride + column;
        T* const to = out + (start + row) * g.N + left + column;
        if (aligned)
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        else
            for (int e = 0; e < 8 && left + column + e < N; ++e) to[e] = from[e];
    }
}

template <class Type, int RP_, int BN_>
struct Pass {
    using T = Type;
    static constexpr int RP = RP_, BM = 64, BN = BN_, warps = 4, threads = 32 * warps, WN = BN / warps;
    static constexpr bool wide = RP > 32;  // then dh would need too many registers beside dB
    static constexpr int rows_entries = BM * (BN + pad), low_entries = BM * (RP + pad);
    static constexpr int bytes = 4 * (rows_entries + low_entries), bytes_with_factor = bytes + 2 * BN * (RP + pad);
    static_assert(bytes <= shared_limit && (wide || bytes_with_factor <= shared_limit));
};

template <class P, int BYTES>
__global__ void __launch_bounds__(P::threads, 2) columns_kernel(const __grid_constant__ Columns g) {
    using T = typename P::T;
    constexpr int RP = P::RP, BM = P::BM, BN = P::BN, WN = P::WN;
    let_next_begin();
    T* const rows_tiles = reinterpret_cast<T*>(shared_memory());
    T* const low_tiles = rows_tiles + 2 * P::rows_entries;
    T* const factor_tile = low_tiles + 2 * P::low_entries;
    const int M = g.M, N = g.N, R = g.R, chunk = g.chunk;
    const int start = blockIdx.y * chunk, stop = start + min(chunk, M - start), left = blockIdx.x * BN;
    const int warp = threadIdx.x / 32, width = min(N - left, BN);
    const Matrix rows{g.rows, kind_of<T>, g.stride_rows, 1}, low{g.low, kind_of<T>, g.stride_low, 1};
    const ClientRange range(g.segments, start, stop);
    for (int c = range.first; c <= range.last; ++c) {
        const Client own(g.segments, c, start, stop, R, g.scale);
        const int steps = blocks(own.end - own.begin, BM);
        const auto load_rows = [&](int step) {
            const int at = start + own.begin + step * BM, here = own.end - own.begin - step * BM;
            T* const to = rows_tiles + step % 2 * P::rows_entries;
            load_tile<T, false, BM, BN, P::threads>(to, rows.at(at, left), 0, here, width);
        };
        const auto load_low = [&](int step) {
            const int at = start + own.begin + step * BM, here = own.end - own.begin - step * BM;
            T* const to = low_tiles + step % 2 * P::low_entries;
            if (g.pieces) load_tile<T, false, BM, RP, P::threads>(to, low.at(at, 0), 0, here, own.rank);
        };
        __syncthreads();  // all have left the client before
        if (g.dh_parts) {
            const Matrix of_first{g.factor, g.factor_kind, g.stride_c, 0};
            const Matrix factor{of_first.at(c, 0).data, g.factor_kind, g.stride_n, g.stride_r};
            load_tile<T, false, BN, RP, P::threads>(factor_tile, factor.at(left, 0), 0, width, own.rank);
        }
        if (steps > 0) load_rows(0);
        wait_for_earlier();  // for `low`
        if (steps > 0) load_low(0);
        copy_commit();
        float grads[WN / 16][RP / 8][4] = {};
        float sums[BN / P::threads] = {};
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            copy_wait<0>();
            __syncthreads();  // this step is there for all, and all have left the one before
            if (step + 1 < steps) load_rows(step + 1), load_low(step + 1);
            copy_commit();
            const T* const tile = rows_tiles + step % 2 * P::rows_entries;
            const T* const low_tile = low_tiles + step % 2 * P::low_entries;
            if (g.pieces) {
#pragma unroll
                for (int m = 0; m < BM; m += 16) {
                    std::uint32_t right[RP / 16][4];
#pragma unroll
                    for (int j = 0; j < RP / 16; ++j) load_right_of_columns(right[j], low_tile, RP + pad, m, 16 * j);
#pragma unroll
                    for (int i = 0; i < WN / 16; ++i) {
                        std::uint32_t columns[4];
                        load_left_of_columns(columns, tile, BN + pad, m, warp * WN + 16 * i);
#pragma unroll
                        for (int j = 0; j < RP / 8; ++j)
                            mma<T>(grads[i][j], columns, right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
                    }
                }
            }
            if (g.sums) {
#pragma unroll
                for (int i = 0; i < BN / P::threads; ++i) {
                    const T* const column = tile + threadIdx.x + i * P::threads;
                    for (int m = 0; m < BM; ++m) sums[i] += as_float(column[m * (BN + pad)]);
                }
            }
            if constexpr (!P::wide) {
                if (g.dh_parts) {
                    float dh[RP / 8][4] = {};
#pragma unroll 8
                    for (int n = 0; n < BN; n += 16) {
                        std::uint32_t of_rows[4];
                        load_left_of_rows(of_rows, tile, BN + pad, warp * 16, n);
#pragma unroll
                        for (int j = 0; j < RP / 16; ++j) {
                            std::uint32_t right[4];
                            load_right_of_columns(right, factor_tile, RP + pad, n, 16 * j);
                            mma<T>(dh[2 * j], of_rows, right[0], right[1]);
                            mma<T>(dh[2 * j + 1], of_rows, right[2], right[3]);
                        }
                    }
#pragma unroll
                    for (int j = 0; j < RP / 8; ++j)
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const int row = own.begin + step * BM + warp * 16 + row_of(e), r = 8 * j + column_of(e);
                            if (row < own.end && r < R)
                                g.dh_parts[(blockIdx.x * g.M + start + row) * g.R + r] = own.scale * dh[j][e];
                        }
                }
            }
        }
        copy_wait<0>();
        const Index piece = (blockIdx.y + static_cast<Index>(c)) * g.stride_piece;
        if (g.pieces) {
#pragma unroll
            for (int i = 0; i < WN / 16; ++i)
#pragma unroll
                for (int j = 0; j < RP / 8; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int n = left + warp * WN + 16 * i + row_of(e), r = 8 * j + column_of(e);
                        if (n < N && r < R)
                            g.pieces[piece + n * g.piece_column + r * g.piece_rank] = own.scale * grads[i][j][e];
                    }
        }
        if (g.sums) {
#pragma unroll
            for (int i = 0; i < BN / P::threads; ++i) {
                const int n = left + threadIdx.x + i * P::threads;
                if (n < N) g.sums[piece + n] = sums[i];
            }
        }
    }
    wait_for_earlier();  // without rows, too
}

constexpr int sum_threads = 256;

__global__ void __launch_bounds__(sum_threads) sum_kernel(const __grid_constant__ Sum g) {
    let_next_begin();
    wait_for_earlier();
    const Index size = g.size_A + g.size_B + g.size_b, c = blockIdx.x;
    const Index begin = g.offsets ? g.offsets[c] : 0, end = g.offsets ? g.offsets[c + 1] : g.M;
    for (Index at = blockIdx.y * sum_threads + threadIdx.x; at < size; at += gridDim.y * sum_threads) {
        float total = 0.0f;
        if (begin < end)
            for (Index t = begin / g.chunk; t < blocks(end, g.chunk); ++t) total += g.pieces[(t + c) * size + at];
        Index to = c * g.size_A + at;
        if (at >= g.size_A) to = g.C * g.size_A + c * g.size_B + at - g.size_A;
        if (at >= g.size_A + g.size_B) to = g.C * (g.size_A + g.size_B) + c * g.size_b + at - g.size_A - g.size_B;
        g.sums[to] = total;
    }
}

void need(bool sound, const char* what) {
    if (!sound) throw std::invalid_argument(std::string("lora_linear (CUDA C++): ") + what);
}

template <class Call>
void with_flag(bool flag, Call call) {
    if (flag)
        call(std::true_type());
    else
        call(std::false_type());
}

// R rounded up to 16, 32, 64 or 128.
template <class Call>
void with_rank(Index R, Call call) {
    need(1 <= R && R <= 128, "ranks must be 1 to 128");
    if (R <= 16)
        call(std::integral_constant<int, 16>());
    else if (R <= 32)
        call(std::integral_constant<int, 32>());
    else if (R <= 64)
        call(std::integral_constant<int, 64>());
    else
        call(std::integral_constant<int, 128>());
}

template <class Arguments>
const Arguments& of(const void* arguments, std::size_t bytes) {
    need(bytes == sizeof(Arguments), "the arguments have another size than here; build the extension again");
    return *static_cast<const Arguments*>(arguments);
}

void need_int(std::initializer_list<Index> sizes) {
    for (Index size : sizes) need(0 <= size && size <= 0x7fffff00, "sizes must be 0 to 2^31 - 256");
}

dim3 grid_of(Index x, Index y) {
    need(x <= 0x7fffffff && y <= 65535, "the grid must have at most 2^31 - 1 by 65535 blocks");
    return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

bool down(const Down& d, Stream stream) {
    if (d.M == 0 || d.splits == 0) return false;
    need_int({d.M, d.K, d.columns});
    const bool along_r = d.stride_r == 1 && d.stride_k != 1;
    with_type(d.kind, need, [&](auto type) {
        using T = typename decltype(type)::type;
        const Index rows_of_A = along_r ? d.stride_k : d.stride_r, in_row = along_r ? d.stride_r : d.stride_k;
        const bool all_aligned = is_aligned<T>({d.x, d.kind, d.stride_x, 1}) && d.stride_c % 8 == 0 &&
                                 is_aligned<T>({d.lora_A, d.A_kind, rows_of_A, in_row}) && d.columns % 8 == 0;
        with_rank(d.R, [&](auto rank) {
            with_flag(along_r && all_aligned, [&](auto deep) {
                with_flag(all_aligned, [&](auto aligned) {
                    constexpr int RP = rank(), stages = RP > 64 ? 3 : 4;
                    using P = Product<T, 64, RP, 64, 4, 1, stages, deep() && aligned(), aligned()>;
                    launch(down_kernel<P, P::bytes>, grid_of(blocks<Index>(d.M, P::BM), d.splits), P::threads, P::bytes,
                           stream, d);
                });
            });
        });
    });
    return true;
}

bool gemm(const Gemm& g, Stream stream) {
    if (g.M == 0 || g.N == 0) return false;
    need_int({g.M, g.N});
    need(1 <= g.P && g.P <= max_terms, "one product takes 1 to 4 terms");
    const bool large = g.BM == 128 && g.BN == 128;
    need(large || (g.BM == 64 && g.BN == 64), "tiles must be 128 x 128 or 64 x 64");
    const bool along_n = g.terms[0].stride_wn == 1 && g.terms[0].stride_wd != 1;
    with_type(g.kind, need, [&](auto type) {
        using T = typename decltype(type)::type;
        bool all_aligned = true;
        for (int p = 0; p < g.P; ++p) {
            const Term& t = g.terms[p];
            need_int({t.D, t.R, t.S});
            const Index row = along_n ? t.stride_wd : t.stride_wn, in_row = along_n ? t.stride_wn : t.stride_wd;
            all_aligned = all_aligned && is_aligned<T>({t.rows, g.kind, t.stride_rows, 1}) &&
                          is_aligned<T>({t.weight, t.weight_kind, row, in_row});
        }
        with_flag(along_n && all_aligned, [&](auto deep) {
            const auto start = [&](auto product) {
                using P = typename decltype(product)::type;
                const Index tiles = blocks<Index>(g.M, P::BM) * blocks<Index>(g.N, P::BN);
                launch(gemm_kernel<P, P::bytes>, grid_of(tiles, 1), P::threads, P::bytes, stream, g);
            };
            if (large && all_aligned)
                start(Type<Product<T, 128, 128, 32, 2, 2, 4, deep(), true>>());
            else if (all_aligned)
                start(Type<Product<T, 64, 64, 32, 2, 2, 4, deep(), true>>());
            else  // entry by entry: no large tile makes that fast
                start(Type<Product<T, 64, 64, 32, 2, 2, 4, false, false>>());
        });
    });
    return true;
}

bool columns(const Columns& g, Stream stream) {
    if (g.N == 0) return false;  // without rows gradients are zero
    need_int({g.M, g.N, g.chunk});
    with_type(g.kind, need, [&](auto type) {
        with_rank(g.R, [&](auto rank) {
            using P = Pass<typename decltype(type)::type, rank(), rank() <= 32 ? 256 : 128>;
            need(!(P::wide && g.dh_parts), "dh and dB from one pass go up to rank 32");
            need(g.BN == P::BN, "BN must be 256 up to rank 32, else 128");
            constexpr int most_bytes = P::wide ? P::bytes : P::bytes_with_factor;
            launch(columns_kernel<P, most_bytes>, grid_of(blocks<Index>(g.N, P::BN), g.M ? blocks(g.M, g.chunk) : 1),
                   P::threads, g.dh_parts ? most_bytes : P::bytes, stream, g);
        });
    });
    return true;
}

bool sum(const Sum& g, Stream stream) {
    const Index size = g.size_A + g.size_B + g.size_b;
    if (size == 0) return false;
    const Index parts = blocks<Index>(size, sum_threads);
    const dim3 grid = grid_of(g.C, parts < 65535 ? parts : 65535);
    launch(sum_kernel, grid, sum_threads, 0, stream, g);
    return true;
}

// Whether it launched: what has nothing to do does not.
bool launched(const std::string& kernel, const void* arguments, std::size_t bytes, Stream stream) {
    if (kernel == "down") return down(of<Down>(arguments, bytes), stream);
    if (kernel == "gemm") return gemm(of<Gemm>(arguments, bytes), stream);
    if (kernel == "columns") return columns(of<Columns>(arguments, bytes), stream);
    if (kernel == "sum") return sum(of<Sum>(arguments, bytes), stream);
    need(false, "kernel must be down, gemm, columns, sum or steps");
    return false;
}

}  // namespace

void run(const char* kernel, const void* arguments, std::size_t bytes, void* stream) {
    const auto handle = static_cast<cudaStream_t>(stream);
    if (std::string(kernel) != "steps") {
        launched(kernel, arguments, bytes, handle);
        return;
    }
    const Steps& all = of<Steps>(arguments, bytes);
    bool follows = false;  // none follows a kernel of others: that would not let it begin, and may have written its rows
    for (Index i = 0; i < all.count; ++i) {
        const Step& step = all.steps[i];
        if (launched(step.kernel, step.arguments, static_cast<std::size_t>(step.bytes), {handle, follows})) follows = true;
    }
}

}  // namespace federa::mma_kernels
