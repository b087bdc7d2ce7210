// Enough of CUDA on the CPU to run kernels' own sources in tests. A block's threads are fibres of one thread of the
// machine: each runs until it waits for its warp or block, in an order that the test picks, so what lacks a barrier
// gives other results in another order. Whatever a block shares is NaN when it starts, and so is the target of an
// asynchronous copy until its thread has waited for it. A barrier or warp operation that not all reach throws.
// The blocks of a cluster run at once. What Hopper adds, which works beside the threads, is in hopper_emulator.h.
#pragma once

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
// The test's library has no other thread-local variables, so this is how their memory is found to poison it.
#define __shared__ static thread_local

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct __attribute__((may_alias, aligned(16))) uint4 {
    unsigned x, y, z, w;
};
using cudaStream_t = void*;

using std::isfinite, std::max, std::min;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

struct __nv_bfloat16 {
    std::uint16_t bits;
};
struct __half {
    _Float16 value;
};

inline float __bfloat162float(__nv_bfloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {  // to nearest, ties to even
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) return {0x7fff};
    return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half value) { return static_cast<float>(value.value); }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }

namespace emulator {

inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
inline float to_float(__half value) { return __half2float(value); }

constexpr std::size_t stack_bytes = 128 * 1024, shared_limit = 166912;  // the latter as on sm_80
constexpr std::size_t hopper_shared_limit = 232448;
constexpr unsigned active_clusters = 2;  // as if no more fitted onto the GPU
constexpr int poison = 0xff;             // all ones are NaN in every float type

enum class State { ready, in_warp, in_block, until, done };  // until: a condition holds

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

// wgmma that a thread has started: the descriptors of its operands, its part of the sums.
struct Product {
    std::uint64_t a, b;
    bool transposed;
    int columns;
    float* sums;
    float (*entry)(std::uint16_t bits);
};

// What a thread has under way beside itself, in groups; sums are NaN to the thread until it has waited, and lie here.
struct Async {
    std::vector<Product> products;
    std::deque<std::vector<Product>> product_groups;
    std::map<float*, std::vector<float>> sums;
    bool fenced = false;
    std::vector<std::function<void()>> stores;
    std::deque<std::vector<std::function<void()>>> store_groups;
    bool proxied = false, others_proxied = false;  // since, and until, its last named barrier
};

struct Block {
    dim3 index;
    unsigned char* shared;
    bool any = false;    // whether a thread voted so at the last barrier
    bool begun = false;  // the next block of a cluster begins when those before it cannot go on
    unsigned fences = 0;  // of its threads, which order what they wrote before what the copy engine does
};

struct Thread {
    dim3 index;
    Block* block;
    State state = State::done;
    bool started = false;
    void* place[5];  // where it goes on
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    void* operand;  // what it brings to an operation of its warp
    unsigned mask;
    bool vote = false;  // at the block's barrier
    void (*operation)(void* const* operands, unsigned mask);
    std::vector<Copy> copies;
    std::deque<std::vector<Copy>> groups;
    std::function<bool()> condition;
    Async async;
    bool waited = false;  // for the kernels before this one
};

inline std::vector<std::unique_ptr<Thread>> threads;  // fibres, kept from one launch to the next
inline Thread* current = nullptr;
inline std::function<void()> body;
inline void* scheduler[5];
inline std::string failure;
inline std::vector<Block> cluster;                        // the blocks that run
inline std::deque<std::function<void()>> under_way;       // what happens once no thread can go on, one at a time
inline std::function<void(bool begins)> around_a_cluster;  // of hopper_emulator.h
inline long seed = 0;       // the order of blocks, warps and lanes: 0 forward, -1 backward, else shuffled
inline long launches = 0;  // so far

// A kernel to run. Those that follow each other may begin early, and begin here as early as they may: the last one's
// first block first, which runs until it waits for the kernel before it; then that one's, and so on.
struct Kernel {
    dim3 grid, block;
    std::size_t bytes;
    std::function<void()> body;
    unsigned in_cluster;
};
inline std::vector<Kernel> waiting;  // to run, each following the one before it
inline bool held = false;            // whether others may still follow them

inline unsigned char* shared_memory() { return current->block->shared; }

#ifdef __SANITIZE_ADDRESS__
inline const void* main_stack;
inline std::size_t main_stack_bytes;
inline void leave_for(const Thread* thread) {
    const void* bottom = thread ? thread->stack.get() : main_stack;
    __sanitizer_start_switch_fiber(nullptr, bottom, thread ? stack_bytes : main_stack_bytes);
}
inline void arrived(bool in_fibre) {
    if (in_fibre) __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);
    else __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
}
#else
inline void leave_for(const Thread*) {}
inline void arrived(bool) {}
#endif

// The compiler's own jumps: no system call, unlike swapcontext, and a warp's every operation takes 64 of them.
[[noreturn]] __attribute__((noinline, no_sanitize("address"))) inline void go(void** place) {
    __builtin_longjmp(place, 1);
}

__attribute__((noinline, no_sanitize("address"))) inline void wait(State state) {
    current->state = state;
    if (__builtin_setjmp(current->place) == 0) {
        leave_for(nullptr);
        go(scheduler);
    }
    arrived(true);
}

[[noreturn]] inline void fail(const std::string& what) {
    const auto place = [](dim3 at) {
        return std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z);
    };
    failure = what + " (thread " + place(threadIdx) + " of block " + place(blockIdx) + ")";
    wait(State::done);
    std::abort();  // nobody resumes it
}

__attribute__((no_sanitize("address"))) inline void fibre() {
    arrived(true);
    for (;;) {
        body();
        wait(State::done);
    }
}

__attribute__((noinline, no_sanitize("address"))) inline void resume(Thread& thread) {
    current = &thread;
    threadIdx = thread.index;
    blockIdx = thread.block->index;
    if (__builtin_setjmp(scheduler) == 0) {
        leave_for(&thread);
        if (thread.started) go(thread.place);
        thread.started = true;
        if (!thread.stack) thread.stack.reset(new char[stack_bytes]);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = stack_bytes;
        makecontext(&thread.context, fibre, 0);
        setcontext(&thread.context);
    }
    arrived(false);
}

// All lanes of `mask` bring their own; Operation::run sees them at once, then all go on.
template <class Operation>
void together(unsigned mask, Operation& mine) {
    current->operand = &mine;
    current->mask = mask;
    current->operation = [](void* const* operands, unsigned mask) {
        Operation::run(reinterpret_cast<Operation* const*>(operands), mask);
    };
    wait(State::in_warp);
}

inline void need_aligned(const void* address, const char* what) {
    if (reinterpret_cast<std::uintptr_t>(address) % 16)
        throw std::runtime_error(std::string(what) + ": address must be a multiple of 16 bytes");
}

inline void copy_async(void* to, const void* from, int bytes) {
    if (bytes < 0 || bytes > 16) fail("cp.async: bytes must be 0 to 16");
    if (reinterpret_cast<std::uintptr_t>(to) % 16 || reinterpret_cast<std::uintptr_t>(from) % 16)
        fail("cp.async: addresses must be multiples of 16 bytes");
    std::memset(to, poison, 16);
    current->copies.push_back({to, from, bytes});
}
inline void copy_commit() {
    current->groups.push_back(std::move(current->copies));
    current->copies.clear();
}
inline void copy_wait(std::size_t pending) {
    for (; current->groups.size() > pending; current->groups.pop_front())
        for (const Copy& copy : current->groups.front()) {
            std::memset(copy.to, 0, 16);
            std::memcpy(copy.to, copy.from, copy.bytes);
        }
}

inline std::vector<unsigned> order(std::size_t count, std::mt19937& random) {
    std::vector<unsigned> places(count);
    for (std::size_t i = 0; i < count; ++i) places[i] = static_cast<unsigned>(i);
    if (seed < 0) std::reverse(places.begin(), places.end());
    if (seed > 0) std::shuffle(places.begin(), places.end(), random);
    return places;
}

// Runs the operations for which all lanes are there.
inline void meet(unsigned first, unsigned count) {
    for (unsigned lane = 0; lane < count; ++lane) {
        const Thread& one = *threads[first + lane];
        if (one.state != State::in_warp) continue;
        void* operands[32] = {};
        bool complete = true;
        for (unsigned other = 0; other < 32; ++other) {
            if (!(one.mask >> other & 1)) continue;
            if (other >= count || threads[first + other]->state == State::done)
                throw std::runtime_error("divergence: a warp operation waits for lane " + std::to_string(other) +
                                         ", which has ended");
            const Thread& two = *threads[first + other];
            complete = complete && two.state == State::in_warp;
            if (two.state == State::in_warp && (two.operation != one.operation || two.mask != one.mask))
                throw std::runtime_error("divergence: lanes of a warp wait at different operations");
            operands[other] = two.operand;
        }
        if (!(one.mask >> lane & 1)) throw std::runtime_error("divergence: a lane is not in its own mask");
        if (!complete) continue;
        one.operation(operands, one.mask);
        for (unsigned other = 0; other < count; ++other)
            if (one.mask >> other & 1) threads[first + other]->state = State::ready;
    }
}

// Lets every thread that can run do so; whether any did.
inline bool run_ready(unsigned count, const std::vector<unsigned>& warps, const std::vector<unsigned>& lanes) {
    bool any_moved = false;
    const unsigned in_block = (count + 31) / 32;
    for (unsigned warp : warps) {
        if (!cluster[warp / in_block].begun) continue;
        const unsigned first = warp / in_block * count + 32 * (warp % in_block);
        const unsigned here = std::min(32u, count - 32 * (warp % in_block));
        for (unsigned lane = 0; lane < here; ++lane) {
            Thread& thread = *threads[first + lane];
            if (thread.state == State::until && thread.condition()) thread.state = State::ready;
        }
        for (bool moved = true; moved;) {
            moved = false;
            for (unsigned lane : lanes) {
                if (lane >= here || threads[first + lane]->state != State::ready) continue;
                resume(*threads[first + lane]);
                if (!failure.empty()) throw std::runtime_error(failure);
                moved = any_moved = true;
            }
            meet(first, here);
        }
    }
    return any_moved;
}

// Lets the threads of each block go on that are all at its barrier; whether there was one.
inline bool pass_barriers(unsigned count) {
    bool passed = false;
    for (std::size_t b = 0; b < cluster.size(); ++b) {
        const auto first = threads.begin() + static_cast<std::ptrdiff_t>(b * count);
        if (!std::all_of(first, first + count, [](auto& t) { return t->state == State::in_block; })) continue;
        cluster[b].any = std::any_of(first, first + count, [](auto& t) { return t->vote; });
        std::for_each(first, first + count, [](auto& t) { t->state = State::ready; });
        passed = true;
    }
    return passed;
}

// In a kernel that follows others: until they have ended.
inline void wait_for_earlier() {
    current->waited = true;
    if (waiting.empty()) return;
    current->condition = [] { return waiting.empty(); };
    wait(State::until);
}

inline void run_waiting();

inline void run_cluster(unsigned count, std::mt19937& random, bool follows) {
    const unsigned all = count * static_cast<unsigned>(cluster.size());
    const std::vector<unsigned> warps = order((count + 31) / 32 * cluster.size(), random), lanes = order(32, random);
    for (unsigned i = 0; i < all; ++i) {
        threads[i]->block = &cluster[i / count];
        threads[i]->state = State::ready;
        threads[i]->copies.clear();
        threads[i]->groups.clear();
        threads[i]->async = {};
        threads[i]->waited = false;
    }
    const auto are = [&](State state) {
        return std::count_if(threads.begin(), threads.begin() + all, [&](auto& t) { return t->state == state; });
    };
    std::vector<unsigned> to_begin = order(cluster.size(), random);
    if (around_a_cluster) around_a_cluster(true);
    while (are(State::done) < all) {
        if (run_ready(count, warps, lanes) || pass_barriers(count)) continue;
        if (!to_begin.empty()) {
            cluster[to_begin.front()].begun = true;
            to_begin.erase(to_begin.begin());
            continue;
        }
        if (!under_way.empty()) {
            const std::size_t last = under_way.size() - 1;
            const auto next = under_way.begin() + static_cast<std::ptrdiff_t>(
                                                      seed == 0 ? 0 : seed < 0 ? last : random() % (last + 1));
            const auto happens = std::move(*next);
            under_way.erase(next);
            happens();
            continue;
        }
        if (!waiting.empty()) {
            run_waiting();
            continue;
        }
        const auto waiting = are(State::in_block), ended = are(State::done);
        if (waiting + ended < all)
            throw std::runtime_error("deadlock: " + std::to_string(all - waiting - ended) + " of " +
                                     std::to_string(all) + " threads wait for what does not come");
        throw std::runtime_error("divergence: " + std::to_string(waiting) + " of " + std::to_string(all) +
                                 " threads are at the barrier, " + std::to_string(ended) + " have ended");
    }
    if (around_a_cluster) around_a_cluster(false);
    if (follows && !std::all_of(threads.begin(), threads.begin() + all, [](auto& t) { return t->waited; }))
        throw std::runtime_error("launch: a thread of a kernel that follows another has not waited for it");
}

inline thread_local char probe;

inline void poison_static() {
    const auto each = [](dl_phdr_info* info, std::size_t, void* mine) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
            char* const start = static_cast<char*>(info->dlpi_tls_data);
            const std::size_t bytes = info->dlpi_phdr[i].p_memsz;
            if (info->dlpi_phdr[i].p_type == PT_TLS && start <= mine && mine < start + bytes)
                std::memset(start, poison, bytes);
        }
        return 0;
    };
    dl_iterate_phdr(each, &probe);
}

inline void run(Kernel kernel, bool follows) {
    const unsigned in_cluster = kernel.in_cluster;
    const std::size_t count = static_cast<std::size_t>(kernel.block.x) * kernel.block.y * kernel.block.z;
    const std::size_t blocks = static_cast<std::size_t>(kernel.grid.x) * kernel.grid.y * kernel.grid.z;
    body = std::move(kernel.body);
    failure.clear();
    blockDim = kernel.block;
    gridDim = kernel.grid;
    under_way.clear();
    cluster.resize(in_cluster);
    while (threads.size() < count * in_cluster) threads.push_back(std::make_unique<Thread>());
    for (unsigned i = 0; i < count * in_cluster; ++i) {
        const unsigned at = i % static_cast<unsigned>(count);
        threads[i]->index = {at % blockDim.x, at / blockDim.x % blockDim.y, at / blockDim.x / blockDim.y};
    }
    std::mt19937 random(static_cast<std::uint32_t>(seed));
    try {
        for (unsigned first : order(blocks / in_cluster, random)) {
            std::vector<std::unique_ptr<void, decltype(&std::free)>> owners;
            for (unsigned rank = 0; rank < in_cluster; ++rank) {
                const unsigned at = first * in_cluster + rank;
                void* memory = nullptr;  // of exactly these bytes, for the address sanitizer
                if (posix_memalign(&memory, 128, std::max<std::size_t>(kernel.bytes, 1))) throw std::bad_alloc();
                owners.emplace_back(memory, &std::free);
                std::memset(memory, poison, kernel.bytes);
                cluster[rank] = {{at % gridDim.x, at / gridDim.x % gridDim.y, at / gridDim.x / gridDim.y},
                                 static_cast<unsigned char*>(memory)};
            }
            poison_static();
            run_cluster(static_cast<unsigned>(count), random, follows);
        }
    } catch (...) {
        threads.clear();  // fibres that are under way have no end
        throw;
    }
}

// Runs the kernels that wait, while a block of the one that follows them may be under way.
inline void run_waiting() {
    if (waiting.empty()) return;
    Kernel last = std::move(waiting.back());
    waiting.pop_back();
    std::vector<std::unique_ptr<Thread>> other_threads;
    std::vector<Block> other_cluster;
    std::function<void()> other_body = std::move(body);
    const dim3 other_block = blockDim, other_grid = gridDim;
    std::swap(threads, other_threads), std::swap(cluster, other_cluster);
    const bool follows = !waiting.empty();
    run(std::move(last), follows);
    run_waiting();  // unless a block of `last` has, as all do that wait
    std::swap(threads, other_threads), std::swap(cluster, other_cluster);
    body = std::move(other_body), blockDim = other_block, gridDim = other_grid;
}

inline void launch(dim3 grid, dim3 block, std::size_t bytes, std::function<void()> kernel, bool follows = false,
                   unsigned in_cluster = 1, std::size_t limit = shared_limit) {
    const std::size_t count = static_cast<std::size_t>(block.x) * block.y * block.z;
    const std::size_t blocks = static_cast<std::size_t>(grid.x) * grid.y * grid.z;
    if (count == 0 || count > 1024 || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
        grid.z > 65535 || bytes > limit || in_cluster == 0 || in_cluster > 8 || grid.x % in_cluster)
        throw std::runtime_error("launch: invalid configuration");
    ++launches;
    if (!follows) run_waiting();
    waiting.push_back({grid, block, bytes, std::move(kernel), in_cluster});
    if (!held) run_waiting();
}

// The same on clusters of blocks: as many as fit and at most `tiles`.
inline void launch_clusters(unsigned tiles, unsigned in_cluster, unsigned block, std::size_t bytes,
                            std::function<void()> kernel, bool follows = false) {
    if (follows && around_a_cluster)
        throw std::runtime_error("launch: what a cluster of Hopper's has under way is not kept for another kernel's");
    launch(dim3(std::min(tiles, active_clusters) * in_cluster), dim3(block), bytes, std::move(kernel), follows,
           in_cluster, hopper_shared_limit);
}

template <class T>
struct Shuffle {
    T value, result;
    int from;

    static void run(Shuffle* const* lanes, unsigned mask) {
        for (int lane = 0; lane < 32; ++lane) {
            if (!(mask >> lane & 1)) continue;
            if (!(mask >> lanes[lane]->from & 1)) throw std::runtime_error("shuffle: source lane is not in the mask");
            lanes[lane]->result = lanes[lanes[lane]->from]->value;
        }
    }
};

struct Vote {
    unsigned mine, all;

    static void run(Vote* const* lanes, unsigned mask) {
        unsigned all = 0;
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) all |= lanes[lane]->mine << lane;
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) lanes[lane]->all = all;
    }
};

inline int lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

template <class T>
T shuffle(unsigned mask, T value, int from, int width) {  // from: counted within the segment; outside it, own value
    const int start = lane() / width * width;
    Shuffle<T> mine{value, value, from < 0 || from >= width ? lane() : start + from};
    together(mask, mine);
    return mine.result;
}

}  // namespace emulator

inline int __syncthreads_or(int predicate) {
    emulator::current->vote = predicate != 0;
    emulator::wait(emulator::State::in_block);
    return emulator::current->block->any;
}
inline void __syncthreads() { __syncthreads_or(0); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    emulator::Vote mine{predicate != 0, 0};
    emulator::together(mask, mine);
    return mine.all;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline void __syncwarp(unsigned mask = ~0u) { __ballot_sync(mask, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    return emulator::shuffle(mask, value, from % width, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32) {
    return emulator::shuffle(mask, value, (emulator::lane() % width) ^ with, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return emulator::shuffle(mask, value, emulator::lane() % width + static_cast<int>(by), width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return emulator::shuffle(mask, value, emulator::lane() % width - static_cast<int>(by), width);
}

// What a test calls through ctypes: EXPORTED functions, which return nothing or, through `guarded`, an error as text.
#define EXPORTED extern "C" __attribute__((used, visibility("default")))

namespace emulator {

template <class Call>
const char* guarded(Call call) {
    static std::string error;
    held = true;
    try {
        call();
        run_waiting();
        held = false;
        return nullptr;
    } catch (const std::exception& problem) {
        waiting.clear();
        held = false;
        error = problem.what();
        return error.c_str();
    }
}

}  // namespace emulator

EXPORTED inline void set_order(long seed) { emulator::seed = seed; }
EXPORTED inline long count_launches() { return emulator::launches; }
