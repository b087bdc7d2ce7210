// The way into csrc/cuda/lora_linear_sm90.cu for tests.

#include "cuda/lora_linear_sm90.h"

#include "hopper_emulator.h"

EXPORTED const char* lora_linear_sm90(const char* kernel, const void* arguments, std::size_t bytes) {
    return emulator::guarded([&] { federa::sm90_kernels::run(kernel, arguments, bytes, nullptr); });
}
