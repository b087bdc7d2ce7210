// The way into csrc/cuda/lora_linear_sm90.cu for tests.

#include "cuda/lora_linear_sm90.h"

#include "hopper_emulator.h"

EXPORTED const char* lora_linear_sm90(const char* kernel, const void* arguments, std::size_t bytes) {
    return emulator::guarded([&] { federa::sm90_kernels::run(kernel, arguments, bytes, nullptr); });
}

// places (rows * columns, 2): in which order the tiles come.
EXPORTED void places_of(int rows, int columns, int* places) {
    for (int at = 0; at < rows * columns; ++at) {
        const auto [row, column] = federa::sm90_kernels::place_of(at, rows, columns);
        places[2 * at] = row, places[2 * at + 1] = column;
    }
}
