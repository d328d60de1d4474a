#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"

namespace nestor {

// Anonymous memory at 2 MB boundaries with huge pages advised, which reads 10-20 % faster than
// 4 KB pages. Not touched before use: what is never written takes no memory. Movable.
class MappedMemory {
 public:
  // RESOURCE_EXHAUSTED says how many bytes were asked for.
  static absl::StatusOr<MappedMemory> Map(int64_t bytes);
  MappedMemory() = default;
  MappedMemory(MappedMemory&& other) noexcept;
  MappedMemory& operator=(MappedMemory&& other) noexcept;
  ~MappedMemory();

  std::byte* data() const { return data_; }  // zeros at first
  int64_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
  void* mapping_ = nullptr;
  size_t mapping_bytes_ = 0;
};

// Hands out zeroed memory that lives as long as the arena. Not thread-safe.
class MemoryArena {
 public:
  // Refuses to hand out more than `limit_bytes` altogether.
  explicit MemoryArena(int64_t limit_bytes) : limit_bytes_(limit_bytes) {}

  // At a cache line's boundary, followed by at least 64 bytes that may be read.
  // RESOURCE_EXHAUSTED says how much was asked for and how much there is.
  template <typename T>
  absl::StatusOr<T*> Allocate(int64_t count) {
    absl::StatusOr<std::byte*> bytes = AllocateBytes(count * static_cast<int64_t>(sizeof(T)));
    if (!bytes.ok()) return bytes.status();
    return reinterpret_cast<T*>(*bytes);
  }

  int64_t allocated_bytes() const { return allocated_bytes_; }
  int64_t limit_bytes() const { return limit_bytes_; }

 private:
  absl::StatusOr<std::byte*> AllocateBytes(int64_t bytes);

  const int64_t limit_bytes_;
  int64_t allocated_bytes_ = 0;
  int64_t used_in_last_ = 0;
  std::vector<MappedMemory> chunks_;
};

}  // namespace nestor
