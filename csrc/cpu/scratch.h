#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace federa {

// Memory that grows and is kept by its thread.
class Scratch {
  public:
    template <class T>
    T* take(std::size_t count) {
        if (const std::size_t bytes = count * sizeof(T); bytes > size_) {
            data_.reset(static_cast<unsigned char*>(::operator new(bytes, std::align_val_t{64})));
            size_ = bytes;
        }
        return reinterpret_cast<T*>(data_.get());
    }

  private:
    struct Delete {
        void operator()(unsigned char* data) const { ::operator delete(data, std::align_val_t{64}); }
    };
    std::unique_ptr<unsigned char, Delete> data_;
    std::size_t size_ = 0;
};

}  // namespace federa
