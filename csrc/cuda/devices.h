#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace federa {

struct CudaDevice {
    std::string name;
    int major, minor;    // compute capability
    std::size_t memory;  // bytes
};

// Version of the CUDA runtime that is linked in, as in "13.0".
std::string cuda_version();

// Asks the driver for its devices; creates no context. On failure fills `error` ("35: ...") and returns none.
std::vector<CudaDevice> cuda_devices(std::string& error);

}  // namespace federa
