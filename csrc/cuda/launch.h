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

#ifdef __CUDACC__
inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // not sticky: the next call starts clean
    throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(static_cast<int>(status)) + ": " +
                             cudaGetErrorString(status));
}
#endif

// kernel<<<grid, block, bytes of shared memory, stream>>>(arguments...) on the current device. Throws what the launch
// itself reports; what a kernel does wrong later shows at the next synchronisation.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, cudaStream_t stream,
            const Arguments&... arguments) {
#ifdef __CUDACC__
    if (shared > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
              "shared memory of a kernel");
    kernel<<<grid, block, shared, stream>>>(static_cast<Parameters>(arguments)...);
    check(cudaGetLastError(), "launch of a kernel");
#else
    (void)stream;
    emulator::launch(grid, block, shared, [&] { kernel(static_cast<Parameters>(arguments)...); });
#endif
}

// The same on clusters of blocks in one row: as many as the GPU holds at once and at most `tiles`, which they divide
// among themselves.
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), unsigned tiles, unsigned in_cluster, unsigned block,
                     std::size_t shared, cudaStream_t stream, const Arguments&... arguments) {
#ifdef __CUDACC__
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          "shared memory of a kernel");
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {in_cluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(in_cluster), config.blockDim = dim3(block), config.dynamicSmemBytes = shared;
    config.stream = stream, config.attrs = &attribute, config.numAttrs = 1;
    int fit = 0;
    check(cudaOccupancyMaxActiveClusters(&fit, kernel, &config), "clusters of a kernel");
    config.gridDim = dim3(in_cluster * (fit < 1 ? 1 : tiles < static_cast<unsigned>(fit) ? tiles : fit));
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch of a kernel");
#else
    (void)stream;
    emulator::launch_clusters(tiles, in_cluster, block, shared, [&] { kernel(static_cast<Parameters>(arguments)...); });
#endif
}

}  // namespace federa
