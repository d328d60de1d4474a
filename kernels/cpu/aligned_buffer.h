#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "base/check.h"

namespace nestor {

// Scratch memory that grows and never shrinks, at a cache line's boundary: what different threads
// write then shares no line where their parts are multiples of one. Contents are lost by growing.
template <typename T>
class AlignedBuffer {
 public:
  void GrowTo(int64_t size) {
    if (size <= size_) return;
    const int64_t bytes = (size * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine * kLine;
    data_.reset(static_cast<T*>(std::aligned_alloc(kLine, bytes)));
    NESTOR_CHECK(data_ != nullptr);
    size_ = size;
    std::uninitialized_value_construct_n(data_.get(), size);
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }

 private:
  static constexpr int64_t kLine = 64;
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T[], Free> data_;
  int64_t size_ = 0;
};

}  // namespace nestor
