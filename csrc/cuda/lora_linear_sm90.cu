#include "cuda/lora_linear_sm90.h"

#include <cstring>
#include <initializer_list>

#include "cuda/clients.h"
#include "cuda/launch.h"
#include "cuda/mma_product.h"
#include "cuda/ptx_sm90.h"

namespace federa::sm90_kernels {
namespace {

using namespace mma_kernels;
using sm90_kernels::Gemm;  // of two

constexpr int copies_of_out = 2;   // blocks of each consumer on their way out
constexpr int slack = 1024 - 128;  // blocks begin on 1024 bytes, shared memory on 128

// One tile of the product: BM rows, 64 for each warpgroup that multiplies, and BN columns; `side` of the depth a step,
// STAGES steps under way. ALONG_N: the weight lies along its columns, not along the depth.
template <class Type, int BM_, int BN_, int STAGES, bool ALONG_N>
struct Tile {
    using T = Type;
    static constexpr int BM = BM_, BN = BN_, stages = STAGES, columns = BN / side;
    static constexpr int consumers = BM / side, threads = 128 * (1 + consumers);
    static constexpr bool along_n = ALONG_N;
    static constexpr int stage_bytes = (consumers + columns) * block_bytes;
    static constexpr int out_bytes = consumers * copies_of_out * block_bytes;
    static constexpr int bias_bytes = 4 * consumers * BN;
    static constexpr int bytes = slack + stages * stage_bytes + out_bytes + bias_bytes + 16 * stages;
    static_assert(bytes <= 227 * 1024 && gap >= 2 * BM);
};

struct Source {
    int depth, to_next;  // rows of the weight from a client's to the next one's; 0: all have the same
};

struct Out {
    void* data;
    const void* bias;
    Index bias_kind;
    int N, first, last;  // the first of its sources, and the one after its last
};

struct Parameters {
    TensorMap rows[max_pairs], weights[max_pairs], results[max_products];
    Source sources[max_pairs];
    Out outs[max_products];
    int columns[max_products];  // of tiles
    int M, all_columns, splits;
    Segments segments;
};
static_assert(sizeof(Parameters) <= 4096);

// The block's shared memory: stages, each the blocks of rows, then those of the weight; blocks of out; bias; barriers.
template <class P>
struct Shared {
    unsigned char* const start;

    __device__ Shared() : start(shared_memory() + (-shared_address(shared_memory()) & slack)) {}
    __device__ unsigned char* rows(int stage, int consumer) const {
        return start + stage * P::stage_bytes + consumer * block_bytes;
    }
    __device__ unsigned char* weight(int stage, int column) const { return rows(stage, P::consumers + column); }
    __device__ unsigned char* out(int consumer, int copy) const {
        return rows(P::stages, consumer * copies_of_out + copy);
    }
    __device__ float* bias(int consumer) const {
        return reinterpret_cast<float*>(out(P::consumers, 0)) + consumer * P::BN;
    }
    __device__ Barrier* full(int stage) const { return reinterpret_cast<Barrier*>(bias(P::consumers)) + stage; }
    __device__ Barrier* empty(int stage) const { return full(P::stages + stage); }
};

// The steps of producer and consumers, in the stages in turn.
template <class P>
struct Ring {
    int stage = 0, parity = 0;

    __device__ void next() {
        if (++stage == P::stages) stage = 0, parity ^= 1;
    }
};

// This block in its cluster: the `row`-th of those `above` each other, which multiply the same weights, in the
// `split`-th of `splits` parts of the depth.
struct Part {
    int above, row, split, splits;

    __device__ explicit Part(const Parameters& p) : splits(p.splits) {
        const int rank = cluster_rank();
        above = static_cast<int>(cluster_size()) / splits, row = rank % above, split = rank / above;
    }
    __device__ int rank_of(int row, int split) const { return split * above + row; }
};

// each(product, start, left, clients) for the tiles of this block, which the clusters take in turn. `clients` have rows
// in its tile or in those of the same weights.
template <class P, class Each>
__device__ void each_tile(const Parameters& p, const Part& part, Each each) {
    const int size = cluster_size(), height = part.above * P::BM;
    const int rows = blocks(p.M, height);
    for (int at = blockIdx.x / size; at < rows * p.all_columns; at += gridDim.x / size) {
        const Place place = place_of(at, rows, p.all_columns);
        const Column column = column_of(place.column, p.columns);
        const int top = place.row * height;
        const ClientRange clients(p.segments, top, min(top + height, p.M));
        each(column.product, top + part.row * P::BM, column.column * P::BN, clients);
    }
}

// each(i, client, k) for this part of a tile's steps: from k on in the depth of source i, of one client where each has
// its own weight.
template <class Each>
__device__ void each_step(const Parameters& p, const Out& out, const Part& part, const ClientRange& clients,
                          Each each) {
    int steps = 0, step = 0;
    for (int i = out.first; i < out.last; ++i)
        steps += blocks(p.sources[i].depth, side) * (p.sources[i].to_next ? clients.count() : 1);
    const int begin = share_of(steps, part.split, part.splits), end = share_of(steps, part.split + 1, part.splits);
    for (int i = out.first; i < out.last; ++i) {
        const Source& source = p.sources[i];
        const bool shared = source.to_next == 0;
        for (int c = shared ? 0 : clients.first; c <= (shared ? 0 : clients.last); ++c)
            for (int k = 0; k < source.depth; k += side, ++step)
                if (begin <= step && step < end) each(i, c, k);
    }
}

// A warpgroup, of which one thread fills the stages. Blocks with the same weights load each a share of them for all.
template <class P>
__device__ void produce(const Parameters& p, const Shared<P>& shared) {
    const Part part(p);
    const unsigned all = ((1u << part.above) - 1) << part.rank_of(0, part.split);
    Ring<P> ring;
    each_tile<P>(p, part, [&](int product, int start, int left, const ClientRange& clients) {
        const auto fill = [&](int source, int client, int k) {
            Barrier* const full = shared.full(ring.stage);
            barrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
            barrier_expect(full, P::stage_bytes);
            for (int i = 0; i < P::consumers; ++i)
                load_block(shared.rows(ring.stage, i), p.rows[source], full, spread(start + i * side, client), k);
            const int weight = client * p.sources[source].to_next;
            for (int j = part.row; j < P::columns; j += part.above) {
                const int column = left + j * side;
                load_block(shared.weight(ring.stage, j), p.weights[source], full, weight + (P::along_n ? k : column),
                           P::along_n ? column : k, all);
            }
            ring.next();
        };
        if (threadIdx.x == 0) each_step(p, p.outs[product], part, clients, fill);
        if (part.splits > 1) cluster_barrier(), cluster_barrier();  // as those who multiply do
    });
}

// The product of one step: rows (64, depth) weight (depth, BN), STEPS of 16 deep.
template <class P, int STEPS>
__device__ void multiply_step(float (&sums)[P::BN / 2], const Shared<P>& shared, int stage, int consumer) {
    constexpr int eight_rows = 8 * 2 * side;  // bytes
    const std::uint64_t a = descriptor(shared_address(shared.rows(stage, consumer)), 0, eight_rows);
    constexpr int leading = P::along_n ? block_bytes : 0;
    const std::uint64_t b = descriptor(shared_address(shared.weight(stage, 0)), leading, eight_rows);
    constexpr int next_a = 16 * 2 / 16, next_b = P::along_n ? 2 * eight_rows / 16 : next_a;  // in 16 bytes
    multiply_fence();
#pragma unroll
    for (int i = 0; i < STEPS; ++i) multiply_add<typename P::T, P::along_n>(sums, a + i * next_a, b + i * next_b);
    multiply_commit();
}

// Of clients, who have float32.
__device__ inline const float* bias_of(const Out& out, int client) {
    return static_cast<const float*>(out.bias) + static_cast<Index>(client) * out.N;
}

// A warpgroup's 64 rows, from `start` on, in blocks of 64 columns, by the copy engine, which leaves out what is beyond
// the matrix. bias: entry i of column 128 i + thread, of the first client.
template <class P>
__device__ void store(const Parameters& p, int product, const Shared<P>& shared, int consumer, int start, int left,
                      const ClientRange& clients, const float (&sums)[P::BN / 2], const float (&bias)[batch]) {
    using T = typename P::T;
    const Out& to = p.outs[product];
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const bool writes = thread == 0;
    if (to.bias)
        for (int i = 0; i < P::BN / 128; ++i) shared.bias(consumer)[i * 128 + thread] = bias[i];
    const int row = thread / 32 * 16 + lane / 4;  // of two that this thread has, the other 8 below it
    int owner[] = {clients.first, clients.first};
    if (clients.several())
        for (int half = 0; half < 2; ++half) owner[half] = client_of(start + row + half * 8, p.segments);
#pragma unroll
    for (int j = 0; j < P::columns; ++j) {
        unsigned char* const out = shared.out(consumer, j % copies_of_out);
        if (writes) store_wait<copies_of_out - 1>();
        named_barrier(1 + consumer, 128);  // the bias is there, and the block is free
#pragma unroll
        for (int i = 0; i < side / 8; ++i) {
            const int column = i * 8 + lane % 4 * 2, within = j * side + column, at = j * 32 + i * 4;
            float2 of_first{};
            if (to.bias) of_first = *reinterpret_cast<const float2*>(shared.bias(consumer) + within);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float2 add = of_first;
                if (owner[half] != clients.first && left + within < to.N)
                    add = *reinterpret_cast<const float2*>(bias_of(to, owner[half]) + left + within);
                alignas(4) const T pair[] = {rounded<T>(sums[at + 2 * half] + add.x),
                                             rounded<T>(sums[at + 2 * half + 1] + add.y)};
                std::memcpy(out + swizzled(2 * ((row + half * 8) * side + column)), pair, 4);
            }
        }
        fence_async();
        named_barrier(1 + consumer, 128);
        if (writes) {
            if (start < p.M && left + j * side < to.N) store_block(p.results[product], out, start, left + j * side);
            store_commit();
        }
    }
}

// A tile's rows, from `start` on, whose depth the blocks have in parts: each leaves its sums where its stages were,
// and stores a share of what they sum to, in the order of the parts.
template <class P>
__device__ void store_parts(const Parameters& p, const Out& to, const Part& part, const Shared<P>& shared, int consumer,
                            int start, int left, const ClientRange& clients, const float (&sums)[P::BN / 2]) {
    using T = typename P::T;
    constexpr int stride = P::BN + 8, vectors = P::BN / batch;  // 8 more meet no bank twice
    static_assert(4 * P::BM * stride <= P::stages * P::stage_bytes);
    const int thread = threadIdx.x % 128, lane = thread % 32;
    float* const tile = reinterpret_cast<float*>(shared.rows(0, 0));
    named_barrier(1 + P::consumers, 128 * P::consumers);  // nobody multiplies what is in the stages
    float* const own = tile + (consumer * side + thread / 32 * 16 + lane / 4) * stride + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < P::BN / 2; i += 2)
        *reinterpret_cast<float2*>(own + i / 2 % 2 * 8 * stride + i / 4 * 8) = {sums[i], sums[i + 1]};
    fence_async();  // the copy engine is the next to write there
    cluster_barrier();
    const int end = share_of(P::BM * vectors, part.split + 1, part.splits);
    int at = share_of(P::BM * vectors, part.split, part.splits) + consumer * 128 + thread;
    for (; at < end; at += P::consumers * 128) {
        const int row = at / vectors, column = at % vectors * batch;
        float total[batch] = {}, add[batch] = {};
        for (int split = 0; split < part.splits; ++split) {
            alignas(16) float sum[batch];
            const auto* const there = in_block(part.rank_of(part.row, split), tile + row * stride + column);
            for (int e = 0; e < batch; e += 4)
                *reinterpret_cast<float4*>(sum + e) = *reinterpret_cast<const float4*>(there + e);
#pragma unroll
            for (int e = 0; e < batch; ++e) total[e] += sum[e];
        }
        if (start + row >= p.M || left + column >= to.N) continue;
        if (to.bias) {
            const Index client = clients.several() ? client_of(start + row, p.segments) : clients.first;
            gather(add, to.bias, to.bias_kind, [&](int e) { return client * to.N + left + column + e; });
        }
        alignas(16) T entries[batch];
#pragma unroll
        for (int e = 0; e < batch; ++e) entries[e] = rounded<T>(total[e] + add[e]);
        T* const place = static_cast<T*>(to.data) + static_cast<Index>(start + row) * to.N + left + column;
        *reinterpret_cast<uint4*>(place) = *reinterpret_cast<const uint4*>(entries);
    }
    cluster_barrier();  // all have read what this block left, and it may fill its stages
}

// A warpgroup: multiplies its 64 rows of every tile and stores them.
template <class P>
__device__ void consume(const Parameters& p, const Shared<P>& shared, int consumer) {
    const Part part(p);
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const auto release = [&](int stage) {  // to all who fill it
        if (lane < part.above) barrier_arrive(shared.empty(stage), part.rank_of(lane, part.split));
    };
    Ring<P> ring;
    each_tile<P>(p, part, [&](int product, int start, int left, const ClientRange& clients) {
        const Out& out = p.outs[product];
        float bias[batch], sums[P::BN / 2] = {};
        if (out.bias && part.splits == 1)  // of the first client, which is there when the product is
            gather(bias, out.bias, out.bias_kind, [&](int i) -> Index {
                const int column = left + i * 128 + thread;
                return i < P::BN / 128 && column < out.N ? static_cast<Index>(clients.first) * out.N + column : -1;
            });
        int before = -1;  // the stage that is being multiplied beside this step's
        each_step(p, out, part, clients, [&](int source, int, int k) {
            barrier_wait(shared.full(ring.stage), ring.parity);
            const int depth = p.sources[source].depth - k;  // what is beyond it is zeros, in the rows at least
            if (depth > 48)
                multiply_step<P, 4>(sums, shared, ring.stage, consumer);
            else if (depth > 32)
                multiply_step<P, 3>(sums, shared, ring.stage, consumer);
            else if (depth > 16)
                multiply_step<P, 2>(sums, shared, ring.stage, consumer);
            else
                multiply_step<P, 1>(sums, shared, ring.stage, consumer);
            multiply_wait<1>();
            if (before >= 0) release(before);
            before = ring.stage;
            ring.next();
        });
        multiply_wait<0>();
        if (before >= 0) release(before);
        if (part.splits > 1)
            store_parts<P>(p, out, part, shared, consumer, start, left, clients, sums);
        else
            store<P>(p, product, shared, consumer, start + consumer * side, left, clients, sums, bias);
    });
    if (thread == 0) store_wait<0>();
}

// A kernel with dynamic shared memory carries its BYTES in its name, where benchmarks/compile_check.py reads them.
template <class P, int BYTES>
__global__ void __launch_bounds__(P::threads, 1) gemm_sm90_kernel(const __grid_constant__ Parameters p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const Shared<P> shared;
    if (threadIdx.x == 0) {
        for (int i = 0; i < P::stages; ++i) {
            barrier_init(shared.full(i), 1);
            barrier_init(shared.empty(i), P::consumers * 4 * cluster_size() / p.splits);  // the warps that multiply it
        }
        barriers_ready();
    }
    cluster_barrier();
    const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);  // which all lanes know to be one
    if (warpgroup == 0) {
        if constexpr (P::consumers > 1) give_registers<40>();  // one gets enough of them at launch
        produce<P>(p, shared);
    } else {
        if constexpr (P::consumers > 1) take_registers<232>();
        consume<P>(p, shared, warpgroup - 1);
    }
    cluster_barrier();  // the others' copies and arrivals have come before this block ends
#else
    __trap();  // the host lets no other GPU come here
#endif
}

// What Low is: entry `at` of each of its four parts, which one kernel writes.

template <class T>
__device__ void write_low(const Low& g, Index at) {
    const Index m = at / g.R, r = at % g.R, c = g.segments.offsets ? client_of(m, g.segments) : 0;
    const Client own(g.segments, c, 0, g.M, g.R, g.scale);
    float sum = 0.0f;
    if (r < own.rank)
        for (Index s = 0; s < g.S; ++s) sum += g.down[(s * g.M + m) * g.stride_down + r];
    static_cast<T*>(g.low)[spread(m, c) * g.stride_low + r] = rounded<T>(sum);
    if (g.copy) static_cast<T*>(g.copy)[m * g.stride_copy + r] = rounded<T>(sum);
}

template <class T>
__device__ void write_gap(const Low& g, Index at) {
    const Index row = at / g.R, r = at % g.R, c = row / gap;
    const Index place = spread(g.segments.offsets[c + 1], c) + row % gap;
    static_cast<T*>(g.low)[place * g.stride_low + r] = rounded<T>(0.0f);
}

template <class T>
__device__ T scaled_entry(const Low& g, Index c, Index r, Index n) {
    const Client own(g.segments, c, 0, g.M, g.R, g.scale);
    float value[batch];
    gather(value, g.factor, g.factor_kind, [&](int i) -> Index {
        return i == 0 && r < own.rank ? c * g.stride_fc + r * g.stride_fr + n * g.stride_fn : -1;
    });
    return rounded<T>(own.scale * value[0]);
}

// NaN or inf in one client's factor must reach its rows only, and 0 * NaN is NaN: so such entries become 0, and what is
// added to the client's rows is NaN.
template <class T>
__device__ void write_scaled(const Low& g, Index at) {
    const Index width = g.along_n ? g.N : g.R, height = g.along_n ? g.R : g.N;
    const Index row = at / width, column = at % width, c = row / height, within = row % height;
    T value = scaled_entry<T>(g, c, g.along_n ? within : column, g.along_n ? column : within);
    if (g.add && !isfinite(as_float(value))) value = rounded<T>(0.0f);
    static_cast<T*>(g.scaled)[row * g.stride_scaled + column] = value;
}

template <class T>
__device__ void write_add(const Low& g, Index at) {
    const Index c = at / g.N, n = at % g.N;
    float add[batch];
    gather(add, g.bias, g.bias_kind, [&](int i) -> Index { return i == 0 && g.bias ? c * g.stride_bias + n : -1; });
    for (Index r = 0; r < g.R; ++r)
        if (!isfinite(as_float(scaled_entry<T>(g, c, r, n)))) add[0] = NAN;
    g.add[at] = add[0];
}

constexpr int low_threads = 256;

template <class T>
__global__ void __launch_bounds__(low_threads) low_kernel(const __grid_constant__ Lows of) {
    const Low& g = of.lows[blockIdx.y];
    const Index C = g.segments.C, rows = g.M * g.R, gaps = (C - 1) * gap * g.R, factors = C * g.N * g.R;
    const Index all = rows + gaps + factors + (g.add ? C * g.N : 0), step = static_cast<Index>(gridDim.x) * low_threads;
    for (Index i = static_cast<Index>(blockIdx.x) * low_threads + threadIdx.x; i < all; i += step) {
        if (Index at = i; at < rows)
            write_low<T>(g, at);
        else if (at -= rows; at < gaps)
            write_gap<T>(g, at);
        else if (at -= gaps; at < factors)
            write_scaled<T>(g, at);
        else
            write_add<T>(g, at - factors);
    }
}

void need(bool sound, const char* what) {
    if (!sound) throw std::invalid_argument(std::string("lora_linear (CUDA C++, sm_90a): ") + what);
}

void need_hopper() {
#ifdef __CUDACC__
    int device = 0, major = 0, minor = 0;
    check(cudaGetDevice(&device), "lora_linear (CUDA C++, sm_90a)");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
    need(major == 9 && minor == 0, "the GPU must be of compute capability 9.0");
#endif
}

template <class Arguments>
const Arguments& of(const void* arguments, std::size_t bytes) {
    need(bytes == sizeof(Arguments), "the arguments have another size than here; build the extension again");
    return *static_cast<const Arguments*>(arguments);
}

// `rows` of each client's factor
void need_clients(const Segments& of, Index M, Index rows) {
    need(of.C >= 1, "there must be one client or more");
    if (of.offsets)
        need(spread(M, of.C) <= 0x7fffff00 && of.C * rows <= 0x7fffff00, "rows of clients must be fewer than 2^31");
}

void low(const Lows& of, void* stream) {
    need(1 <= of.count && of.count <= max_products, "one launch takes 1 to 4");
    Index most_parts = 0;
    for (int i = 0; i < of.count; ++i) {
        const Low& g = of.lows[i];
        need(g.M >= 0 && g.N >= 0 && g.R >= 0 && g.S >= 0, "sizes must not be negative");
        need(g.kind == of.lows[0].kind, "rows must be of one kind");
        need_clients(g.segments, g.M, g.N > g.R ? g.N : g.R);
        const Index parts = blocks<Index>((g.M + g.segments.C * g.N) * g.R, low_threads);
        if (parts > most_parts) most_parts = parts;
    }
    if (most_parts == 0) return;
    const dim3 grid(static_cast<unsigned>(most_parts < 65536 ? most_parts : 65536), static_cast<unsigned>(of.count));
    with_type(of.lows[0].kind, need, [&](auto type) {
        launch(low_kernel<typename decltype(type)::type>, grid, low_threads, 0, static_cast<cudaStream_t>(stream), of);
    });
}

template <class P>
void gemm_in(const Gemm& g, cudaStream_t stream) {
    using T = typename P::T;
    Parameters p{};
    for (int o = 0, i = 0; o < g.count; ++o) {
        const Product& product = g.products[o];
        Out& out = p.outs[o];
        p.results[o] = tensor_map<T>(product.out, g.M, product.N, product.N);
        out.data = product.out, out.bias = product.bias, out.bias_kind = product.bias_kind;
        out.N = static_cast<int>(product.N), out.first = i, out.last = i + static_cast<int>(product.P);
        for (; i < out.last; ++i) {
            const Pair& pair = g.pairs[i];
            const Index C = pair.own ? g.segments.C : 1, height = P::along_n ? pair.depth : product.N;
            const Index width = P::along_n ? product.N : pair.depth;
            p.rows[i] = tensor_map<T>(pair.rows, spread(g.M, C - 1), pair.depth, pair.stride_rows);
            p.weights[i] = tensor_map<T>(pair.weight, C * height, width, pair.stride_weight);
            p.sources[i] = {static_cast<int>(pair.depth), pair.own ? static_cast<int>(height) : 0};
        }
        p.columns[o] = blocks(out.N, P::BN), p.all_columns += p.columns[o];
    }
    p.M = static_cast<int>(g.M), p.splits = static_cast<int>(g.splits), p.segments = g.segments;
    const Index tiles = blocks<Index>(g.M, g.cluster * P::BM) * p.all_columns;
    need(tiles <= 0x3fffffff, "there must be at most 2^30 tiles");
    launch_clusters(gemm_sm90_kernel<P, P::bytes>, static_cast<unsigned>(tiles),
                    static_cast<unsigned>(g.cluster * g.splits), P::threads, P::bytes, stream, p);
}

void gemm(const Gemm& g, void* stream) {
    const auto is_size = [](Index size) { return 0 < size && size <= 0x7fffff00; };
    const auto aligned = [](const void* data, Index stride) {
        return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
    };
    need(is_size(g.M), "M must be 1 to 2^31 - 256");
    need(1 <= g.count && g.count <= max_products, "one launch takes 1 to 4 products");
    need(g.cluster == 1 || g.cluster == 2, "clusters must be of 1 or 2 tiles");
    need(1 <= g.splits && g.cluster * g.splits <= 8, "splits must be 1 to 8, in clusters of at most 8 blocks");
    const bool large = g.BM == 128 && g.BN == 256, narrow = g.BM == 128 && g.BN == 128;
    need(large || narrow || (g.BM == 64 && g.BN == 128), "tiles must be 128 x 256, 128 x 128 or 64 x 128");
    bool sound = true;
    Index pairs = 0;
    for (int o = 0; o < g.count; ++o) {
        const Product& product = g.products[o];
        need(is_size(product.N), "N must be 1 to 2^31 - 256");
        need_clients(g.segments, g.M, product.N);
        need(!g.segments.offsets || (product.bias && product.bias_kind == float32), "clients must have a float32 bias");
        need(1 <= product.P && product.P <= max_pairs - pairs, "products take 1 to 8 pairs");
        sound = sound && aligned(product.out, product.N);
        pairs += product.P;
    }
    for (int i = 0; i < pairs; ++i) {
        const Pair& pair = g.pairs[i];
        need(is_size(pair.depth), "depths must be 1 to 2^31 - 256");
        if (pair.own) need_clients(g.segments, g.M, pair.depth);
        sound = sound && aligned(pair.rows, pair.stride_rows) && aligned(pair.weight, pair.stride_weight);
    }
    need(sound, "rows of every matrix must begin on 16 bytes");
    with_type(g.kind, need, [&](auto type) {
        using T = typename decltype(type)::type;
        const auto cuda_stream = static_cast<cudaStream_t>(stream);
        const auto in = [&](auto along_n) {
            if (large)
                gemm_in<Tile<T, 128, 256, 4, along_n()>>(g, cuda_stream);
            else if (narrow)
                gemm_in<Tile<T, 128, 128, 6, along_n()>>(g, cuda_stream);
            else
                gemm_in<Tile<T, 64, 128, 8, along_n()>>(g, cuda_stream);
        };
        if (g.along_n)
            in(std::true_type());
        else
            in(std::false_type());
    });
}

}  // namespace

void run(const char* kernel, const void* arguments, std::size_t bytes, void* stream) {
    const std::string name = kernel;
    need(name == "low" || name == "gemm", "kernel must be low or gemm");
    need_hopper();
    if (name == "low")
        low(of<Lows>(arguments, bytes), stream);
    else
        gemm(of<Gemm>(arguments, bytes), stream);
}

}  // namespace federa::sm90_kernels
