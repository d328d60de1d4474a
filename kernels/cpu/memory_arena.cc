#include "kernels/cpu/memory_arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kLine = 64;
// Address space, not memory: only touched pages count.
constexpr int64_t kChunk = int64_t{64} << 20;

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

absl::StatusOr<MappedMemory> MappedMemory::Map(int64_t bytes) {
  MappedMemory memory;
  memory.bytes_ = bytes;
  memory.mapping_bytes_ = static_cast<size_t>(RoundUp(bytes, kHugePage) + kHugePage);
  void* mapping = mmap(nullptr, memory.mapping_bytes_, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED)
    return absl::ResourceExhaustedError(absl::StrCat("cannot map ", bytes, " bytes of memory"));
  memory.mapping_ = mapping;
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(mapping));
  memory.data_ = static_cast<std::byte*>(mapping) + (RoundUp(address, kHugePage) - address);
  // Advice: where the kernel has no huge pages, small ones work as well.
  if (bytes >= kHugePage) madvise(memory.data_, RoundUp(bytes, kHugePage), MADV_HUGEPAGE);
  return memory;
}

MappedMemory::MappedMemory(MappedMemory&& other) noexcept { *this = std::move(other); }

MappedMemory& MappedMemory::operator=(MappedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(mapping_, other.mapping_);
  std::swap(mapping_bytes_, other.mapping_bytes_);
  return *this;
}

MappedMemory::~MappedMemory() {
  if (mapping_ != nullptr) munmap(mapping_, mapping_bytes_);
}

absl::StatusOr<std::byte*> MemoryArena::AllocateBytes(int64_t bytes) {
  if (bytes > limit_bytes_ - allocated_bytes_)
    return absl::ResourceExhaustedError(absl::StrCat("needs ", bytes, " bytes beside ",
                                                     allocated_bytes_, " in use; the limit is ",
                                                     limit_bytes_));
  const int64_t size = RoundUp(bytes, kLine) + kLine;
  if (chunks_.empty() || used_in_last_ + size > chunks_.back().bytes()) {
    NESTOR_ASSIGN_OR_RETURN(MappedMemory chunk,
                            MappedMemory::Map(std::max(kChunk, RoundUp(size, kHugePage))));
    chunks_.push_back(std::move(chunk));
    used_in_last_ = 0;
  }
  std::byte* result = chunks_.back().data() + used_in_last_;
  used_in_last_ += size;
  allocated_bytes_ += bytes;
  return result;
}

}  // namespace nestor
