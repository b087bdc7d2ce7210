#include "cuda/devices.h"

#include <cuda_runtime_api.h>

namespace federa {
namespace {

bool failed(cudaError_t status, std::string& error) {
    if (status == cudaSuccess) return false;
    cudaGetLastError();  // not sticky: the next call starts clean
    error = std::to_string(static_cast<int>(status)) + ": " + cudaGetErrorString(status);
    return true;
}

}  // namespace

std::string cuda_version() {
    return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::vector<CudaDevice> cuda_devices(std::string& error) {
    int count = 0;
    if (failed(cudaGetDeviceCount(&count), error)) return {};
    std::vector<CudaDevice> devices;
    for (int index = 0; index < count; ++index) {
        cudaDeviceProp properties;
        if (failed(cudaGetDeviceProperties(&properties, index), error)) return {};
        devices.push_back({properties.name, properties.major, properties.minor, properties.totalGlobalMem});
    }
    return devices;
}

}  // namespace federa
