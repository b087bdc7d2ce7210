#pragma once

namespace federa {

// Runs body(task) for every task in [0, tasks) on up to `threads` threads: thread t begins with task t, and who is done
// takes the next one.
//
// The threads are those of the OpenMP runtime that PyTorch has loaded, found by name: a second pool would spin against
// the first. Where there is none, the calling thread does it all.
void parallel_for(long tasks, int threads, void (*body)(void* context, long task), void* context);

template <class Body>
void parallel_for(long tasks, int threads, Body&& body) {
    parallel_for(
        tasks, threads, [](void* context, long task) { (*static_cast<Body*>(context))(task); }, &body);
}

}  // namespace federa
