#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/file.h"

namespace nestor {

enum class DType : uint8_t { kF32, kF16, kBf16, kI8, kU8, kI32, kI64, kBool };

int64_t BytesOf(DType dtype);
// As safetensors spells it: "F32", "BF16", ...
const char* NameOf(DType dtype);

// A tensor in a mapped file. The bytes live as long as the TensorFile.
struct TensorView {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;
  std::string path;  // of the file, for messages
};

// One or several safetensors files, read as one set of named tensors. Immutable; thread-safe.
class TensorFile {
 public:
  // INVALID_ARGUMENT names the file and what is wrong with it: a header that is no JSON, a type
  // that is unknown, offsets that leave the file or overlap, a tensor that is there twice. Names
  // that begin with `optional_prefix` are known without it.
  static absl::StatusOr<std::unique_ptr<TensorFile>> Open(const std::vector<std::string>& paths,
                                                          const std::string& optional_prefix = "");
  // DIRECTORY/model.safetensors, or the files that DIRECTORY/model.safetensors.index.json names.
  static absl::StatusOr<std::unique_ptr<TensorFile>> OpenCheckpoint(
      const std::string& directory, const std::string& optional_prefix = "");

  bool Has(const std::string& name) const { return tensors_.count(name) != 0; }
  // NOT_FOUND names the files and the tensor; INVALID_ARGUMENT says which shape was expected. An
  // expected size of -1 fits any.
  absl::StatusOr<TensorView> Get(const std::string& name,
                                 const std::vector<int64_t>& expected_shape) const;
  // The same, converted to float from F32, F16 or BF16.
  absl::StatusOr<std::vector<float>> GetFloats(const std::string& name,
                                               const std::vector<int64_t>& expected_shape) const;
  const std::map<std::string, TensorView>& tensors() const { return tensors_; }
  // What `__metadata__` of the files' headers says.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::vector<std::string>& paths() const { return paths_; }
  // Gives the files' pages back to the system, once what is needed of them has been copied.
  void DropPages() const;

 private:
  TensorFile() = default;
  std::vector<std::string> paths_;
  std::vector<MappedFile> files_;
  std::map<std::string, TensorView> tensors_;
  std::map<std::string, std::string> metadata_;
};

// Writes a safetensors file tensor by tensor; only one tensor is in memory at a time.
class TensorFileWriter {
 public:
  // The layout comes first, since the header stands before the data.
  struct Entry {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;
  };
  static absl::StatusOr<std::unique_ptr<TensorFileWriter>> Create(const std::string& path,
                                                                  std::vector<Entry> entries);
  ~TensorFileWriter();

  // Tensors may come in any order, each exactly once. RESOURCE_EXHAUSTED when the disk is full.
  absl::Status Write(const std::string& name, std::span<const std::byte> bytes);
  // Every entry must have been written. Syncs the file.
  absl::Status Finish();
  // SHA-256 of each tensor's bytes, by name.
  const std::map<std::string, std::string>& checksums() const { return checksums_; }

 private:
  struct Slot {
    int64_t offset;
    int64_t size;
  };
  TensorFileWriter(std::string path, int descriptor) : path_(std::move(path)), fd_(descriptor) {}
  absl::Status WriteAt(int64_t offset, std::span<const std::byte> bytes);
  const std::string path_;
  int fd_;
  std::map<std::string, Slot> slots_;
  std::map<std::string, std::string> checksums_;
};

}  // namespace nestor
