// Launches a kernel: on a GPU where nvcc compiles it, thread by thread on the CPU where g++ does, which is for tests
// (tests/emulator/cuda_emulator.h).
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda_emulator.h"
#endif

namespace federa {

// The block's shared memory, as many bytes as its launch asked for, aligned to 128.
inline __device__ unsigned char* shared_memory() {
#ifdef __CUDACC__
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    return shared_bytes;
#else
    return emulator::shared_memory();
#endif
}

// For kernels launched to follow each other (Stream::follows). The next kernel's blocks may begin, in what room is left,
// once all of this one's have called it or ended.
inline __device__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns when the kernel launched before this one has ended and what it wrote is there. Before that nothing may be read
// that an earlier kernel writes, nor written that an earlier kernel reads or writes. Every block of a kernel that follows
// calls it: so none ends before the one ahead of it has, and to wait for that one is to wait for all.
inline __device__ void wait_for_earlier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#elif !defined(__CUDACC__)
    emulator::wait_for_earlier();
#endif
}

#ifdef __CUDACC__
inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // not sticky: the next call starts clean
    throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(static_cast<int>(status)) + ": " +
                             cudaGetErrorString(status));
}
#endif

// follows: the kernel may begin before the one launched just ahead of it has ended, which must be one that calls
// let_next_begin; it calls wait_for_earlier itself. Without effect where the code that this device runs has no such
// instructions.
struct Stream {
    cudaStream_t handle;
    bool follows;

    Stream(cudaStream_t handle, bool follows = false) : handle(handle), follows(follows) {}
};

#ifdef __CUDACC__
// The attribute of a kernel that follows, if it may: it must not where the device runs code of sm_80, which does not wait.
inline int following(cudaLaunchAttribute& attribute, const void* kernel, const Stream& stream) {
    if (!stream.follows) return 0;
    cudaFuncAttributes of{};
    check(cudaFuncGetAttributes(&of, kernel), "attributes of a kernel");
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    return of.ptxVersion >= 90;
}
#endif

// kernel<<<grid, block, bytes of shared memory, stream>>>(arguments...) on the current device. Throws what the launch
// itself reports; what a kernel does wrong later shows at the next synchronisation.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, Stream stream,
            const Arguments&... arguments) {
#ifdef __CUDACC__
    if (shared > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
              "shared memory of a kernel");
    cudaLaunchAttribute attribute{};
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared;
    config.stream = stream.handle, config.attrs = &attribute;
    config.numAttrs = following(attribute, reinterpret_cast<const void*>(kernel), stream);
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch of a kernel");
#else
    emulator::launch(grid, block, shared, [=] { kernel(static_cast<Parameters>(arguments)...); }, stream.follows);
#endif
}

// The same on clusters of blocks in one row: as many as the GPU holds at once and at most `tiles`, which they divide
// among themselves.
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), unsigned tiles, unsigned in_cluster, unsigned block,
                     std::size_t shared, Stream stream, const Arguments&... arguments) {
#ifdef __CUDACC__
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          "shared memory of a kernel");
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {in_cluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(in_cluster), config.blockDim = dim3(block), config.dynamicSmemBytes = shared;
    config.stream = stream.handle, config.attrs = attributes, config.numAttrs = 1;
    int fit = 0;
    check(cudaOccupancyMaxActiveClusters(&fit, kernel, &config), "clusters of a kernel");
    config.gridDim = dim3(in_cluster * (fit < 1 ? 1 : tiles < static_cast<unsigned>(fit) ? tiles : fit));
    config.numAttrs += following(attributes[1], reinterpret_cast<const void*>(kernel), stream);
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch of a kernel");
#else
    emulator::launch_clusters(
        tiles, in_cluster, block, shared, [=] { kernel(static_cast<Parameters>(arguments)...); }, stream.follows);
#endif
}

}  // namespace federa
