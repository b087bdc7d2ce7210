// What the programs of bounds give to kernels: memory that ends where its tensor does.
#pragma once

#include <cstdint>
#include <memory>

// One value throughout, beginning on 16 bytes as all memory of `new` does.
template <class T>
struct Buffer {
    std::unique_ptr<T[]> data;

    Buffer(std::int64_t count, T value) : data(new T[static_cast<std::size_t>(count)]) {
        for (std::int64_t i = 0; i < count; ++i) data[static_cast<std::size_t>(i)] = value;
    }
    operator T*() const { return data.get(); }
};

constexpr std::uint16_t one = 0x3f80;  // of bfloat16
