// The way into csrc/cuda/lora_linear_mma.cu for tests.

#include "cuda/lora_linear_mma.h"

#include "cuda_emulator.h"

EXPORTED const char* lora_linear_mma(const char* kernel, const void* arguments, std::size_t bytes) {
    return emulator::guarded([&] { federa::mma_kernels::run(kernel, arguments, bytes, nullptr); });
}
