// The way into csrc/cuda/lora_linear_sm90.cu for tests.

#include "cuda/clients.h"
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

// The first and last client with rows in [start, stop).
EXPORTED void clients_of(const int* offsets, int C, int start, int stop, int* first_last) {
    const federa::mma_kernels::ClientRange range({offsets, nullptr, nullptr, C}, start, stop);
    first_last[0] = range.first, first_last[1] = range.last;
}

EXPORTED std::int64_t spread_row(std::int64_t row, std::int64_t client) {
    return federa::sm90_kernels::spread(row, client);
}

EXPORTED int share_begin(int steps, int split, int splits) {
    return federa::sm90_kernels::share_of(steps, split, splits);
}

// places (all columns of tiles, 2): which product each belongs to, and which of its own it is.
EXPORTED void products_of(const int* columns, int all, int* places) {
    for (int at = 0; at < all; ++at) {
        const auto [product, column] = federa::sm90_kernels::column_of(at, columns);
        places[2 * at] = product, places[2 * at + 1] = column;
    }
}
