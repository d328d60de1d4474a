#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace nestor {

// Scratch memory that grows and never shrinks, at a cache line's boundary: what different threads
// write then shares no line where their parts are multiples of one. Contents are lost by growing.
template <typename T>
class AlignedBuffer {
 public:
  void GrowTo(int64_t size) {
    if (size <= size_) return;
    data_.reset(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), kLine)));
    size_ = size;
    std::uninitialized_value_construct_n(data_.get(), size);
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<T[], Free> data_;
  int64_t size_ = 0;
};

}  // namespace nestor
