#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace nestor {

// The status of a failed system call: "PATH: <strerror(error_number)>". ENOENT becomes NOT_FOUND,
// ENOSPC RESOURCE_EXHAUSTED, EACCES PERMISSION_DENIED, anything else INTERNAL.
absl::Status FileError(const std::string& path, int error_number);

absl::StatusOr<std::string> ReadFile(const std::string& path);

// Writes to a temporary file beside `path` and renames it: a reader sees the old content or the
// new, never a part.
absl::Status WriteFileAtomically(const std::string& path, const std::string& content);

// A file mapped read-only. Movable; the bytes live as long as the object.
class MappedFile {
 public:
  static absl::StatusOr<MappedFile> Open(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  // Gives the pages back to the system; a later access reads them from the file again.
  void DropPages() const;

 private:
  MappedFile(const std::byte* data, size_t size) : data_(data), size_(size) {}
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace nestor
