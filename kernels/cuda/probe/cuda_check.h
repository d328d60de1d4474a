#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace nestor::probe {

// Prints the message and ends the program with status 1. A measurement that went wrong has no
// sensible continuation: what it would report did not run.
[[noreturn]] void Fail(const std::string& message);

// Fails unless `error` is cudaSuccess, naming the place of the call.
void Check(cudaError_t error, const char* file = __builtin_FILE(), int line = __builtin_LINE());

// Fails if the launch just before it failed.
inline void CheckLaunch(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Check(cudaGetLastError(), file, line);
}

// An owned array in device memory.
template <typename T>
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(int64_t size) : size_(size) {
    Check(cudaMalloc(reinterpret_cast<void**>(&data_), static_cast<size_t>(size) * sizeof(T)));
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~DeviceBuffer() { cudaFree(data_); }

  T* data() const { return data_; }
  int64_t size() const { return size_; }
  size_t bytes() const { return static_cast<size_t>(size_) * sizeof(T); }

  void CopyFromHost(const T* source) {
    Check(cudaMemcpy(data_, source, bytes(), cudaMemcpyHostToDevice));
  }
  void CopyToHost(T* target) const {
    Check(cudaMemcpy(target, data_, bytes(), cudaMemcpyDeviceToHost));
  }
  // Every bit set: NaN in bf16, e4m3, float and double.
  void Poison() { Check(cudaMemset(data_, 0xff, bytes())); }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace nestor::probe
