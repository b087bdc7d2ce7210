#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace federa {
namespace {

// GCC's OpenMP interface, which LLVM's and Intel's runtimes offer as well.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Number = int (*)();

struct Runtime {
    Parallel parallel = nullptr;
    Number thread = nullptr, threads = nullptr;

    Runtime() {
#if defined(__unix__) || defined(__APPLE__)
        parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        thread = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
        threads = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
        if (!thread || !threads) parallel = nullptr;
#endif
    }
};

struct Job {
    const Runtime* runtime;
    long tasks;
    void (*body)(void*, long);
    void* context;
    std::atomic<long> taken{0};  // beyond each thread's first
};

}  // namespace

void parallel_for(long tasks, int threads, void (*body)(void*, long), void* context) {
    static const Runtime runtime;
    threads = static_cast<int>(std::min<long>(threads, tasks));
    if (threads <= 1 || !runtime.parallel) {
        for (long task = 0; task < tasks; ++task) body(context, task);
        return;
    }
    Job job{&runtime, tasks, body, context};
    runtime.parallel(
        [](void* argument) {
            Job& job = *static_cast<Job*>(argument);
            const int count = job.runtime->threads();
            for (long task = job.runtime->thread(); task < job.tasks;
                 task = count + job.taken.fetch_add(1, std::memory_order_relaxed))
                job.body(job.context, task);
        },
        &job, static_cast<unsigned>(threads), 0);
}

}  // namespace federa
