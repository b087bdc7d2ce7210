// What Hopper does beside its threads, on the CPU: tensor maps and their copies, mbarriers, clusters and wgmma. All of
// it happens as late as it may, when no thread can go on without it, in an order that the test picks. Until then the
// target of a copy, and sums under way, are NaN; so is a stage that is filled while somebody still multiplies it.
// Layouts follow the PTX ISA: "Asynchronous Warpgroup Level Matrix Shared Memory Layout", "Swizzling Modes".
//
// Not seen: what an instruction costs, memory order between threads beyond what the above shows, and what the ISA leaves
// undefined and this header does not name.
#pragma once

#include "cuda_emulator.h"

namespace emulator {

constexpr std::uint32_t window = 1024 + 128;  // where shared memory begins: on no swizzle's boundary

inline std::uint32_t shared_address(const void* pointer) {
    return window + static_cast<std::uint32_t>(static_cast<const unsigned char*>(pointer) - current->block->shared);
}

// The 128-byte swizzle: bits 4 to 6 of an address are exchanged by bits 7 to 9.
inline unsigned char* swizzled(const Block& block, std::uint32_t address) {
    return block.shared + ((address ^ (address >> 7 & 7) << 4) - window);
}

// --- clusters ---

inline unsigned cluster_rank() { return static_cast<unsigned>(current->block - cluster.data()); }
inline unsigned cluster_size() { return static_cast<unsigned>(cluster.size()); }

// The same place in another block of the cluster, which must not have ended.
template <class T>
T* in_block(unsigned rank, T* place) {
    if (rank >= cluster.size()) fail("cluster: no block of this rank");
    for (const auto& thread : threads)
        if (thread->block == &cluster[rank] && thread->state != State::done)
            return reinterpret_cast<T*>(cluster[rank].shared +
                                        (reinterpret_cast<const unsigned char*>(place) - current->block->shared));
    fail("cluster: the block has ended");
}

inline void wait_until(std::function<bool()> condition) {
    current->condition = std::move(condition);
    wait(State::until);
}

// Until nobody else can go on: as late as what is waited for may happen.
inline void wait_long() {
    auto passed = std::make_shared<bool>(false);
    under_way.push_back([passed] { *passed = true; });
    wait_until([passed] { return *passed; });
}

// The same for many, who go on together.
inline std::shared_ptr<bool> together_passed;

inline void wait_long_together() {
    if (!together_passed) {
        together_passed = std::make_shared<bool>(false);
        under_way.push_back([] {
            *together_passed = true;
            together_passed.reset();
        });
    }
    wait_until([passed = together_passed] { return *passed; });
}

// A barrier that counts threads: the cluster's, or a block's named ones.
struct Gathering {
    unsigned arrived = 0, generation = 0;
    bool proxied = true;  // all who came had ordered what they wrote before asynchronous reads
    bool last = true;
};

inline std::map<std::pair<const Block*, int>, Gathering> gatherings;

inline void gather_at(Gathering& at, unsigned count, bool waits = true) {
    at.proxied = at.proxied && current->async.proxied;
    current->async.proxied = false;
    if (++at.arrived == count) {
        at.last = at.proxied, at.arrived = 0, at.proxied = true;
        ++at.generation;
    } else if (waits) {
        wait_until([&at, mine = at.generation] { return at.generation != mine; });
    }
    current->async.others_proxied = at.last;
}

inline void cluster_barrier() {
    const unsigned in_block = blockDim.x * blockDim.y * blockDim.z;
    gather_at(gatherings[{nullptr, 0}], in_block * cluster_size());
}

inline void named_barrier(int name, int count) {
    if (name < 1 || name > 15 || count % 32) fail("bar.sync: name must be 1 to 15 and the count whole warps");
    gather_at(gatherings[{current->block, name}], static_cast<unsigned>(count));
}

// --- mbarriers ---

struct Barrier {
    unsigned count, pending, phase = 0;
    std::int64_t bytes = 0;  // announced and not there yet

    void settle() {
        if (pending == 0 && bytes == 0) phase ^= 1, pending = count;
    }
};

inline std::map<const void*, Barrier> barriers;

inline Barrier& barrier_at(const void* place) {
    const auto found = barriers.find(place);
    if (found == barriers.end()) fail("mbarrier: not initialised");
    return found->second;
}

inline void barrier_init(void* place, unsigned count) {
    if (shared_address(place) % 8 || count == 0) fail("mbarrier.init: on 8 bytes, for one arrival or more");
    if (!barriers.insert({place, {count, count}}).second) fail("mbarrier.init: it is one already");
}

inline void barrier_arrive(void* place, std::int64_t bytes = 0) {
    Barrier& barrier = barrier_at(place);
    if (barrier.pending == 0) fail("mbarrier: more arrivals than its phase counts");
    barrier.bytes += bytes;
    --barrier.pending;
    barrier.settle();
}

inline void barrier_wait(void* place, int parity) {
    const Barrier& barrier = barrier_at(place);
    wait_until([&barrier, parity] { return barrier.phase != static_cast<unsigned>(parity); });
}

// --- tensor maps: blocks of 64 x 64 entries of 2 bytes, in the 128-byte swizzle ---

constexpr int side = 64, block_bytes = 2 * side * side;

struct alignas(64) TensorMap {
    unsigned char* data;
    std::int64_t rows, columns, stride_bytes;

    TensorMap() = default;
    TensorMap(const void* data, std::int64_t rows, std::int64_t columns, std::int64_t stride_bytes)
        : data(static_cast<unsigned char*>(const_cast<void*>(data))), rows(rows), columns(columns),
          stride_bytes(stride_bytes) {
        const std::int64_t most = std::int64_t{1} << 32;
        if (reinterpret_cast<std::uintptr_t>(data) % 16 || stride_bytes % 16 || stride_bytes >= most * 256 ||
            stride_bytes < 2 * columns || rows < 1 || columns < 1 || rows > most || columns > most)
            throw std::runtime_error("tensor map: CUDA error 1");
    }

    // copy(entry of the block in shared memory, entry in global memory or null) for each of the block at (row, column)
    template <class Copy>
    void each(const Block& block, std::uint32_t address, int column, int row, Copy copy) const {
        for (int r = 0; r < side; ++r)
            for (int c = 0; c < side; ++c) {
                const std::int64_t i = std::int64_t{row} + r, j = std::int64_t{column} + c;
                const bool inside = 0 <= i && i < rows && 0 <= j && j < columns;
                const auto offset = static_cast<std::uint32_t>(2 * (r * side + c));
                copy(swizzled(block, address + offset), inside ? data + i * stride_bytes + 2 * j : nullptr);
            }
    }
};

inline void fence_async() {
    current->async.proxied = true;
    ++current->block->fences;
}

// What last came to a place by a copy, and how many fences there had been.
struct Arrived {
    std::vector<unsigned char> bytes;
    unsigned fences;
};

inline std::map<const unsigned char*, Arrived> arrivals;

// Into all blocks of `mask`, each at a time of its own.
inline void copy_in(void* to, const TensorMap& map, void* barrier, int column, int row, unsigned mask) {
    const std::uint32_t address = shared_address(to);
    if (address % 1024) fail("cp.async.bulk.tensor: the block must begin on 1024 bytes");
    if (mask == 0 || mask >> cluster.size()) fail("cp.async.bulk.tensor: no block of this rank");
    for (unsigned rank = 0; rank < cluster.size(); ++rank) {
        if (!(mask >> rank & 1)) continue;
        unsigned char* const there = in_block(rank, static_cast<unsigned char*>(to));
        const auto last = arrivals.find(there);
        if (last != arrivals.end() && last->second.fences == cluster[rank].fences &&
            std::memcmp(there, last->second.bytes.data(), block_bytes))
            fail("cp.async.bulk.tensor: threads wrote to the block without fence.proxy.async");
        std::memset(there, poison, block_bytes);
        Barrier& arrived = barrier_at(in_block(rank, static_cast<unsigned char*>(barrier)));
        under_way.push_back([map, &arrived, &block = cluster[rank], there, address, column, row] {
            map.each(block, address, column, row, [](unsigned char* entry, const unsigned char* from) {
                if (from)
                    std::memcpy(entry, from, 2);
                else
                    std::memset(entry, 0, 2);
            });
            arrivals[there] = {{there, there + block_bytes}, block.fences};
            arrived.bytes -= block_bytes;
            arrived.settle();
        });
    }
}

inline void copy_out(const TensorMap& map, const void* from, int column, int row) {
    const std::uint32_t address = shared_address(from);
    if (address % 1024) fail("cp.async.bulk.tensor: the block must begin on 1024 bytes");
    if (!current->async.others_proxied) fail("cp.async.bulk.tensor: a thread that wrote came without fence.proxy.async");
    current->async.stores.push_back([map, &block = *current->block, address, column, row] {
        map.each(block, address, column, row, [](const unsigned char* entry, unsigned char* to) {
            if (to) std::memcpy(to, entry, 2);
        });
    });
}

inline void store_commit() {
    current->async.store_groups.push_back(std::move(current->async.stores));
    current->async.stores.clear();
}

inline void store_wait(std::size_t pending) {
    auto& groups = current->async.store_groups;
    if (groups.size() <= pending) return;
    wait_long();
    for (; groups.size() > pending; groups.pop_front())
        for (const auto& store : groups.front()) store();
}

// --- wgmma: sums (64, columns) += a (64, 16) b (16, columns), each warp 16 rows ---

inline void multiply_add(std::uint64_t a, std::uint64_t b, bool transposed, int columns, float* sums,
                         float (*entry)(std::uint16_t)) {
    Async& async = current->async;
    const std::size_t mine = static_cast<std::size_t>(columns) / 2;
    if (!async.sums.count(sums)) {
        if (!async.fenced) fail("wgmma: the sums need wgmma.fence first");
        async.sums[sums] = {sums, sums + mine};
        std::memset(sums, poison, 4 * mine);
    }
    async.products.push_back({a, b, transposed, columns, sums, entry});
}

inline void multiply_commit() {
    current->async.product_groups.push_back(std::move(current->async.products));
    current->async.products.clear();
}

// The operand that a descriptor names: entry (i, k) is the i-th row of a left or column of a right one, k the depth.
struct Operand {
    std::uint32_t start, leading, stride;
    bool transposed;

    Operand(std::uint64_t descriptor, bool transposed) : transposed(transposed) {
        const auto decoded = [&](int from) { return static_cast<std::uint32_t>(descriptor >> from & 0x3fff) << 4; };
        start = decoded(0), leading = decoded(16), stride = decoded(32);
        if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
            throw std::runtime_error("wgmma: a descriptor must tell of the 128-byte swizzle from 1024 bytes on");
    }
    std::uint32_t address(std::uint32_t i, std::uint32_t k) const {
        if (transposed) return start + i % 64 * 2 + i / 64 * leading + k % 8 * 128 + k / 8 * stride;
        return start + i % 8 * 128 + i / 8 * stride + k * 2;
    }
    float at(const Block& block, std::uint32_t i, std::uint32_t k, float (*entry)(std::uint16_t)) const {
        std::uint16_t bits;
        const std::uint32_t address = this->address(i, k);
        if (address < window || address >= window + hopper_shared_limit)
            throw std::runtime_error("wgmma: a descriptor leads out of shared memory");
        std::memcpy(&bits, swizzled(block, address), 2);
        return entry(bits);
    }
};

// One product of a warp's 16 rows, by the formulas for d_i of "wgmma.mma_async.m64nNk16".
inline void multiply(const Block& block, unsigned warp, const Product& product, float* const (&sums)[32]) {
    const auto columns = static_cast<std::uint32_t>(product.columns);
    const Operand left(product.a, false), right(product.b, product.transposed);
    float a[16][16];
    std::vector<float> b(16 * columns), total(columns);
    for (std::uint32_t k = 0; k < 16; ++k) {
        for (std::uint32_t i = 0; i < 16; ++i) a[i][k] = left.at(block, 16 * (warp % 4) + i, k, product.entry);
        for (std::uint32_t j = 0; j < columns; ++j) b[k * columns + j] = right.at(block, j, k, product.entry);
    }
    for (std::uint32_t i = 0; i < 16; ++i) {
        std::fill(total.begin(), total.end(), 0.0f);
        for (std::uint32_t k = 0; k < 16; ++k)
            for (std::uint32_t j = 0; j < columns; ++j) total[j] += a[i][k] * b[k * columns + j];
        for (std::uint32_t j = 0; j < columns; ++j)
            sums[i % 8 * 4 + j % 8 / 2][j / 8 * 4 + i / 8 * 2 + j % 2] += total[j];
    }
}

// The lanes of a warp wait together; their groups are multiplied when nobody else can go on.
struct WaitProducts {
    std::size_t pending;
    Thread* thread;
    std::shared_ptr<bool> passed;

    static void run(WaitProducts* const* lanes, unsigned) {
        auto passed = std::make_shared<bool>(false);
        std::vector<Thread*> warp;
        for (int l = 0; l < 32; ++l) {
            lanes[l]->passed = passed;
            warp.push_back(lanes[l]->thread);
        }
        under_way.push_back([warp, passed, pending = lanes[0]->pending] {
            auto& groups = warp[0]->async.product_groups;
            const std::size_t through = groups.size() > pending ? groups.size() - pending : 0;
            for (std::size_t g = 0; g < through; ++g)
                for (std::size_t i = 0; i < groups[g].size(); ++i) multiply_of(warp, g, i);
            for (Thread* lane : warp) finish(lane->async, through);
            *passed = true;
        });
    }

    static void multiply_of(const std::vector<Thread*>& warp, std::size_t group, std::size_t i) {
        const Product& first = warp[0]->async.product_groups[group][i];
        float* sums[32];
        for (std::size_t l = 0; l < 32; ++l) {
            auto& groups = warp[l]->async.product_groups;
            if (groups.size() <= group || groups[group].size() <= i || groups[group][i].a != first.a ||
                groups[group][i].b != first.b)
                throw std::runtime_error("wgmma: lanes of a warp multiply different operands");
            sums[l] = warp[l]->async.sums.at(groups[group][i].sums).data();
        }
        multiply(*warp[0]->block, warp[0]->index.x / 32, first, sums);
    }

    static void finish(Async& async, std::size_t through) {
        for (std::size_t g = 0; g < through; ++g) async.product_groups.pop_front();
        async.fenced = false;
        for (auto at = async.sums.begin(); at != async.sums.end();) {
            bool waits = false;
            for (const auto& group : async.product_groups)
                for (const Product& other : group) waits = waits || other.sums == at->first;
            if (!waits) std::copy(at->second.begin(), at->second.end(), at->first);
            at = waits ? std::next(at) : async.sums.erase(at);
        }
    }
};

inline void multiply_wait(std::size_t pending) {
    if (!current->async.products.empty()) fail("wgmma: waited before the commit");
    WaitProducts mine{pending, current, nullptr};
    together(~0u, mine);
    wait_until([passed = mine.passed] { return *passed; });
}

inline const bool hopper = [] {
    around_a_cluster = [](bool begins) {
        if (!begins)
            for (const auto& thread : threads)
                if (!thread->async.stores.empty() || !thread->async.store_groups.empty() || !thread->async.sums.empty())
                    throw std::runtime_error("a thread ended before what it had started");
        if (!begins && !under_way.empty()) throw std::runtime_error("a block ended before the copies into it");
        barriers.clear();
        gatherings.clear();
        arrivals.clear();
        together_passed.reset();
    };
    return true;
}();

}  // namespace emulator
