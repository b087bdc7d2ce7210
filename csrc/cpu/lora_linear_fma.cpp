// lora_linear.h in float32 multiply-adds, for processors without tile units. AVX-512 and AVX2 give the same bits.

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cpu/engines.h"
#include "cpu/features.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FEDERA_FMA 1
#include <immintrin.h>
#endif

namespace federa {

#ifndef FEDERA_FMA

namespace {
bool never() { return false; }
}  // namespace

const Engine avx512{"avx512", never, false, nullptr, nullptr, nullptr, nullptr};
const Engine avx2{"avx2", never, false, nullptr, nullptr, nullptr, nullptr};

#else

namespace {

using bf16 = std::uint16_t;
using Index = std::int64_t;

// The depth is cut into equal stretches of at most DEPTH; each is summed from zero, in order, and then added to the
// result, so that a sum of thousands loses no more than one of hundreds.
constexpr Index DEPTH = 384, MAX_RANK = 128;
// In floats. Odd numbers of cache lines, or the rows of a block would share few places in the first-level cache.
constexpr Index X_STRIDE = DEPTH + 16, H_STRIDE = MAX_RANK + 16;
constexpr Index VECTORS = 3;         // side by side in a block of sums
constexpr Index BLOCK = 9 * 3 * 16;  // sums at most

// What to bring into the second-level cache while multiplying. Where it lies further away: 163 instead of 142 GFLOP/s
// at 512x1536x384.
struct Next {
    const float *p, *x;
    Index p_step, x_step;
};

// out = start + x p + h up + base, for some rows of `x` and some panels side by side.
struct Block {
    const float* start;  // or null; rows of all vectors
    const float *x, *p;
    Index p_panel, depth;
    const float *h, *up;
    Index up_panel, rank;
    const float* base;  // or null
    Index base_stride;
    float* out;
    Index out_stride;
    Next next;
};

struct Loops {
    Index lanes, height;  // of a vector; rows of a block at most
    void (*block_product)(const Block&, Index rows, Index vectors);
    void (*outer_products)(const float* h, Index h_stride, const float* x, Index x_stride, Index rows, float* sums,
                           Index sums_stride, const Next& next, Index components, Index vectors);
    void (*widen)(const bf16* from, Index vectors, float* to);
};

// What the two regions hold calls nothing from outside.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f")
#endif

namespace avx512_loops {
using Vector = __m512;
constexpr Index LANES = 16;
constexpr int HEIGHT = 9;  // 27 sums, 3 columns, 1 factor: 31 of 32 registers
constexpr int FETCH_AFTER = 2;  // steps; 162 GFLOP/s, 157 with 1, 154 with 4, 138 without (512x1536x384)
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
inline Vector broadcast(const float* from) { return _mm512_set1_ps(*from); }
inline Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
inline Vector widened(const bf16* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
#include "cpu/lora_linear_fma_loops.h"
}  // namespace avx512_loops

#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace avx2_loops {
using Vector = __m256;
constexpr Index LANES = 8;
constexpr int HEIGHT = 4;  // 12 sums, 3 columns, 1 factor; 6 rows of 2 vectors: 102 GFLOP/s, not 110
constexpr int FETCH_AFTER = 4;  // 99 GFLOP/s, 93 with 2, 90 with 1
inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vector value) { _mm256_storeu_ps(to, value); }
inline Vector broadcast(const float* from) { return _mm256_broadcast_ss(from); }
inline Vector multiply_add(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
inline Vector widened(const bf16* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
#include "cpu/lora_linear_fma_loops.h"
}  // namespace avx2_loops

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

Index blocks(Index size, Index block) { return (size + block - 1) / block; }

Index stretch_of(Index depth) { return blocks(depth, blocks(depth, DEPTH)); }

// One panel of `lanes` columns: out[depth][lane], zero where the columns end.
template <class T>
void pack_panel(const T* source, Index columns, Index column_stride, Index depth, Index depth_stride, Index lanes,
                T* out) {
    columns = std::clamp<Index>(columns, 0, lanes);
    if (columns < lanes) std::fill(out, out + depth * lanes, T{0});
    if (column_stride == 1)
        for (Index d = 0; d < depth; ++d) std::memcpy(out + d * lanes, source + d * depth_stride, columns * sizeof(T));
    else
        for (Index lane = 0; lane < columns; ++lane)
            for (Index d = 0; d < depth; ++d) out[d * lanes + lane] = source[lane * column_stride + d * depth_stride];
}

// One call of low_rank_linear: what all tasks share.
struct Job {
    const Loops& loops;
    const float* x;
    Index rows, depth, x_stride;
    const std::vector<Projection>& projections;
    const Clients& clients;
    bool accumulate;
    int threads;
    std::vector<float*> downs, ups;  // by projection, of its first client
    Index row_block, column_groups;

    Index own_rank(const Projection& p, Index client) const { return std::min<Index>(p.rank, clients.ranks[client]); }
    Index down_size(const Projection& p) const { return blocks(p.rank, loops.lanes) * loops.lanes * depth; }
    Index up_size(const Projection& p) const {
        return p.packed ? blocks(p.columns, loops.lanes) * loops.lanes * p.rank : 0;
    }
};

void pack_adapter(const Job& job, const Projection& p, Index client, bool is_up, float* out) {
    const Index rank = job.own_rank(p, client), lanes = job.loops.lanes;
    if (!is_up) {
        const float* down = p.down + client * p.down_client;
        for (Index r = 0; r < p.rank; r += lanes, out += job.depth * lanes)
            pack_panel(down + r * p.down_rank, rank - r, p.down_rank, job.depth, p.down_depth, lanes, out);
    } else {
        const float *up = p.up + client * p.up_client, s = p.scaling * job.clients.scalings[client];
        for (Index n = 0; n < p.columns; n += lanes, out += p.rank * lanes) {
            pack_panel(up + n * p.up_column, p.columns - n, p.up_column, rank, p.up_rank, lanes, out);
            for (Index i = 0; i < rank * lanes; ++i) out[i] *= s;
        }
    }
}

// Rows of a block that belong to one client, counted from the task's first.
struct Share {
    Index client, from, rows;
};

class Task {
  public:
    Task(const Job& job, Index begin, Index end, Index group)
        : job_(job), begin_(begin), rows_(end - begin), group_(group), lanes_(job.loops.lanes) {
        const std::int32_t* offsets = job.clients.offsets;
        Index client = std::upper_bound(offsets, offsets + job.clients.count + 1, begin) - offsets - 1;
        const Index count = blocks(rows_, job.loops.height);
        for (Index block = 0; block < count; ++block) {
            first_share_.push_back(shares_.size());
            for (Index row = block * rows_ / count, stop = (block + 1) * rows_ / count; row < stop;) {
                while (offsets[client + 1] <= begin + row) ++client;
                const Index until = std::min<Index>(stop, offsets[client + 1] - begin);
                shares_.push_back({client, row, until - row});
                row = until;
            }
        }
        first_share_.push_back(shares_.size());
    }

    void run() {
        const Index count = job_.projections.size();
        const Index stretch = stretch_of(job_.depth);
        thread_local Scratch x_scratch, h_scratch, wide_scratch;
        x_ = x_scratch.take<float>(rows_ * X_STRIDE);
        float* h = h_scratch.take<float>(count * rows_ * H_STRIDE);
        wide_ = wide_scratch.take<float>(VECTORS * DEPTH * lanes_);
        for (k_ = 0; k_ < job_.depth; k_ += stretch) {
            depth_ = std::min(stretch, job_.depth - k_);
            last_ = k_ + stretch >= job_.depth;
            for (Index row = 0; row < rows_; ++row)
                std::memcpy(x_ + row * X_STRIDE, job_.x + (begin_ + row) * job_.x_stride + k_, depth_ * sizeof(float));
            for (Index i = 0; i < count; ++i) {
                const Projection& p = job_.projections[i];
                h_ = h + i * rows_ * H_STRIDE;
                if (p.rank) project_down(p, job_.downs[i]);
                if (p.packed) product(p, job_.ups[i], i == 0);
            }
        }
    }

  private:
    void project_down(const Projection& p, const float* down) {
        const Index panels = blocks(p.rank, lanes_), panel = job_.depth * lanes_;
        for (const Share& share : shares_) {
            float* h = h_ + share.from * H_STRIDE;
            const float* own = down + share.client * job_.down_size(p) + k_ * lanes_;
            for (Index n = 0; n < panels; n += VECTORS) {
                Block b{};
                b.x = x_ + share.from * X_STRIDE;
                b.p = own + n * panel, b.p_panel = panel, b.depth = depth_;
                b.out = h + n * lanes_, b.out_stride = H_STRIDE;
                if (k_) b.base = b.out, b.base_stride = H_STRIDE;
                job_.loops.block_product(b, share.rows, std::min(VECTORS, panels - n));
            }
        }
        for (Index row = 0; row < rows_ && last_ && p.h && group_ == 0; ++row)
            std::memcpy(static_cast<float*>(p.h) + (begin_ + row) * p.h_stride, h_ + row * H_STRIDE,
                        p.rank * sizeof(float));
    }

    void product(const Projection& p, const float* up, bool fetch_x) {
        const Index panels = blocks(p.columns, lanes_), end = (group_ + 1) * panels / job_.column_groups;
        const Index size = depth_ * lanes_, count = first_share_.size() - 1;
        Index n = group_ * panels / job_.column_groups, calls = blocks(end - n, VECTORS) * count;
        // The rows that are copied next: the same ones further on, or those of this thread's next task.
        const Index ahead = last_ ? begin_ + job_.threads * job_.row_block : begin_;
        const Index next_rows = fetch_x ? std::clamp<Index>(job_.rows - ahead, 0, rows_) : 0;
        const float* next_x = job_.x + ahead * job_.x_stride + (last_ ? 0 : k_ + depth_);
        for (Index call = 0; n < end; n += VECTORS) {
            const Index vectors = std::min(VECTORS, end - n), offset = k_ * panels * lanes_ + n * size;
            Block b{};
            b.depth = depth_, b.p_panel = size;
            if (p.kind == Kind::float32) {
                b.p = static_cast<const float*>(p.packed) + offset;
            } else {
                job_.loops.widen(static_cast<const bf16*>(p.packed) + offset, vectors * depth_, wide_);
                b.p = wide_;
            }
            for (Index block = 0; block < count; ++block, ++call) {
                const Share *share = &shares_[first_share_[block]], *stop = shares_.data() + first_share_[block + 1];
                b.x = x_ + share->from * X_STRIDE;
                b.next = next_of(p, offset + vectors * size, vectors, block, count);
                b.next.x = next_rows ? next_x + call * next_rows / calls * job_.x_stride : b.x;
                if (stop - share == 1) {
                    finish(p, up, n, vectors, b, *share);
                    continue;
                }
                // One product for all clients of the block, then each client's rows with what is theirs.
                alignas(64) float sums[BLOCK];
                Block all = b, own{};
                all.out = sums, all.out_stride = vectors * lanes_;
                job_.loops.block_product(all, stop[-1].from + stop[-1].rows - share->from, vectors);
                for (own.start = sums; share < stop; own.start += share->rows * vectors * lanes_, ++share)
                    finish(p, up, n, vectors, own, *share);
            }
        }
    }

    // The panels from `offset` on, for each of `count` blocks of rows its part.
    Next next_of(const Projection& p, Index offset, Index vectors, Index block, Index count) const {
        const Index per_float = p.kind == Kind::float32 ? 1 : 2;
        const Index step = std::min<Index>(16, blocks(blocks(vectors * lanes_, per_float), count));
        return {static_cast<const float*>(p.packed) + offset / per_float + block * depth_ * step, nullptr, step, 1};
    }

    // Adds the low-rank product and what the result starts from; writes it.
    void finish(const Projection& p, const float* up, Index n, Index vectors, Block b, const Share& share) {
        const Index column = n * lanes_, width = std::min(vectors * lanes_, p.columns - column);
        float* out = static_cast<float*>(p.out) + (begin_ + share.from) * p.columns + column;
        if (last_ && p.rank) {
            b.h = h_ + share.from * H_STRIDE, b.rank = job_.own_rank(p, share.client);
            b.up_panel = p.rank * lanes_, b.up = up + share.client * job_.up_size(p) + n * b.up_panel;
        }
        if (k_ || job_.accumulate) b.base = out, b.base_stride = p.columns;
        else if (p.bias) b.base = p.bias + share.client * p.bias_client + column;
        b.out = out, b.out_stride = p.columns;
        alignas(64) float base[BLOCK], result[BLOCK];
        const bool whole = width == vectors * lanes_;
        if (!whole) {
            for (Index row = 0; row < share.rows && b.base; ++row)
                std::memcpy(base + row * vectors * lanes_, b.base + row * b.base_stride, width * sizeof(float));
            if (b.base) b.base = base, b.base_stride = vectors * lanes_;
            b.out = result, b.out_stride = vectors * lanes_;
        }
        job_.loops.block_product(b, share.rows, vectors);
        for (Index row = 0; row < share.rows && !whole; ++row)
            std::memcpy(out + row * p.columns, result + row * vectors * lanes_, width * sizeof(float));
    }

    const Job& job_;
    Index begin_, rows_, group_, lanes_;
    std::vector<Share> shares_;
    std::vector<Index> first_share_;  // by block of rows
    // The stretch of depth at hand: x's rows, where it starts, and whether it is the last; h of the projection at hand.
    float *x_, *h_, *wide_;
    Index k_, depth_;
    bool last_;
};

std::size_t size_of(const Loops& loops, Kind kind, Index columns, Index depth) {
    return (kind == Kind::float32 ? 4 : 2) * blocks(columns, loops.lanes) * loops.lanes * depth;
}

template <class T>
void pack_panels(const Loops& loops, const void* source, Index columns, Index column_stride, Index depth,
                 Index depth_stride, void* packed, int threads) {
    const Index stretch = stretch_of(depth), panels = blocks(columns, loops.lanes);
    parallel_for(panels, threads, [&](long panel) {
        const Index n = panel * loops.lanes;
        for (Index k = 0; k < depth; k += stretch) {
            const Index rows = std::min(stretch, depth - k);
            pack_panel(static_cast<const T*>(source) + n * column_stride + k * depth_stride, columns - n, column_stride,
                       rows, depth_stride, loops.lanes,
                       static_cast<T*>(packed) + (k * panels + panel * rows) * loops.lanes);
        }
    });
}

void pack_with(const Loops& loops, const void* source, Kind kind, Index columns, Index column_stride, Index depth,
               Index depth_stride, void* packed, int threads) {
    const auto pack = kind == Kind::float32 ? pack_panels<float> : pack_panels<bf16>;
    pack(loops, source, columns, column_stride, depth, depth_stride, packed, threads);
}

void linear_with(const Loops& loops, const void* x, Index rows, Index depth, Index x_stride,
                 const std::vector<Projection>& projections, const Clients& clients, bool accumulate, int threads) {
    Job job{loops, static_cast<const float*>(x), rows, depth, x_stride, projections, clients, accumulate, threads,
            {}, {}, 0, 0};
    std::size_t size = 0;
    for (const Projection& p : projections) {
        if (p.rank > MAX_RANK) throw std::runtime_error("ranks above 128 have no kernels");
        size += clients.count * (job.down_size(p) + job.up_size(p));
    }
    thread_local Scratch adapters;
    float* next = adapters.take<float>(size);
    for (const Projection& p : projections) {
        job.downs.push_back(next), next += clients.count * job.down_size(p);
        job.ups.push_back(next), next += clients.count * job.up_size(p);
    }
    parallel_for(2 * clients.count * projections.size(), threads, [&](long task) {
        const Index i = task / 2 / clients.count, client = task / 2 % clients.count, is_up = task % 2;
        const Projection& p = projections[i];
        if (!p.rank || (is_up && !p.packed) || clients.offsets[client] == clients.offsets[client + 1]) return;
        float* out = is_up ? job.ups[i] + client * job.up_size(p) : job.downs[i] + client * job.down_size(p);
        pack_adapter(job, p, client, is_up, out);
    });
    // 252 rows of a stretch take 400 KB, what many second-level caches can hold beside a panel.
    const Index count = blocks(blocks(rows, 252), threads) * threads;
    job.row_block = blocks(blocks(rows, count), loops.height) * loops.height;
    const Index row_blocks = blocks(rows, job.row_block);
    job.column_groups = row_blocks >= threads ? 1 : blocks(threads, row_blocks);
    parallel_for(row_blocks * job.column_groups, threads, [&](long task) {
        const Index begin = task / job.column_groups * job.row_block;
        Task(job, begin, std::min(begin + job.row_block, rows), task % job.column_groups).run();
    });
}

void gradient_with(const Loops& loops, const float* h, Index h_stride, Index rank, const float* x, Index columns,
                   Index x_stride, const Clients& clients, float scaling, float* gradient, Index client_stride,
                   Index rank_stride, Index column_stride, int threads) {
    constexpr Index ROWS = 32;  // summed from zero
    const Index lanes = loops.lanes, wide = VECTORS * lanes;
    const Index wanted = clients.count >= 4 * threads ? 1 : blocks(threads, clients.count);
    const Index groups = std::min(blocks(columns, wide), wanted);
    const Index slab = blocks(blocks(columns, groups), wide) * wide;
    parallel_for(clients.count * groups, threads, [&](long task) {
        const Index client = task / groups, from = task % groups * slab, width = std::min(slab, columns - from);
        if (width <= 0) return;
        const Index own_rank = std::min<Index>(rank, clients.ranks[client]), stride = blocks(width, lanes) * lanes;
        const Index parts = blocks(own_rank, loops.height), end = clients.offsets[client + 1];
        thread_local Scratch sums_scratch;
        float* sums = sums_scratch.take<float>(own_rank * stride);
        alignas(64) float rest[ROWS * 16] = {};  // the last columns, where they fill no vector
        std::fill(sums, sums + own_rank * stride, 0.0f);
        for (Index row = clients.offsets[client]; row < end; row += ROWS) {
            const Index rows = std::min(ROWS, end - row);
            for (Index k = 0, vectors; k < width; k += vectors * lanes) {
                vectors = width - k >= wide ? VECTORS : 1;
                const float* lines = x + row * x_stride + from + k;
                Index line_stride = x_stride;
                if (width - k < lanes) {
                    for (Index i = 0; i < rows; ++i)
                        std::memcpy(rest + i * lanes, lines + i * x_stride, (width - k) * sizeof(float));
                    lines = rest, line_stride = lanes;
                }
                // The same columns of the next rows: 1.0 ms instead of 2.0 for 2048x1536, R=16, from memory.
                const float* next = x + std::min(row + ROWS, end - 1) * x_stride + from + k;
                for (Index part = 0; part < parts; ++part) {
                    const Index r = part * own_rank / parts, components = (part + 1) * own_rank / parts - r;
                    loops.outer_products(h + row * h_stride + r, h_stride, lines, line_stride, rows,
                                         sums + r * stride + k, stride,
                                         {next + part % 2 * 32, next + part % 2 * 32 + 16, x_stride, x_stride},
                                         components, vectors);
                }
            }
        }
        float* own = gradient + client * client_stride + from * column_stride;
        const float s = scaling * clients.scalings[client];
        for (Index r = 0; r < rank; ++r)
            for (Index k = 0; k < width; ++k)
                own[r * rank_stride + k * column_stride] = r < own_rank ? s * sums[r * stride + k] : 0.0f;
    });
}

bool available(std::initializer_list<const char*> needed) {
    for (const auto& [name, there] : cpu_features())
        for (const char* each : needed)
            if (!std::strcmp(name, each) && !there) return false;
    return true;
}

template <const Loops& loops>
constexpr Engine engine_of(const char* name, bool (*available)()) {
    return {name,
            available,
            false,
            [](Kind kind, Index columns, Index depth) { return size_of(loops, kind, columns, depth); },
            [](const void* source, Kind kind, Index columns, Index column_stride, Index depth, Index depth_stride,
               void* packed, int threads) {
                pack_with(loops, source, kind, columns, column_stride, depth, depth_stride, packed, threads);
            },
            [](const void* x, Kind, Index rows, Index depth, Index x_stride, const std::vector<Projection>& projections,
               const Clients& clients, bool accumulate, int threads) {
                linear_with(loops, x, rows, depth, x_stride, projections, clients, accumulate, threads);
            },
            [](const void* h, Index h_stride, Index rank, const void* x, Kind, Index columns, Index x_stride,
               const Clients& clients, float scaling, float* gradient, Index client_stride, Index rank_stride,
               Index column_stride, int threads) {
                gradient_with(loops, static_cast<const float*>(h), h_stride, rank, static_cast<const float*>(x),
                              columns, x_stride, clients, scaling, gradient, client_stride, rank_stride, column_stride,
                              threads);
            }};
}

}  // namespace

const Engine avx512 = engine_of<avx512_loops::loops>("avx512", [] { return available({"avx512f"}); });
const Engine avx2 = engine_of<avx2_loops::loops>("avx2", [] { return available({"avx2", "fma"}); });

#endif  // FEDERA_FMA

}  // namespace federa
