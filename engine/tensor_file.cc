#include "engine/tensor_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "base/bfloat16.h"
#include "base/checksum.h"
#include "base/status_macros.h"
#include "nlohmann/json.hpp"

namespace nestor {
namespace {

using Json = nlohmann::json;

constexpr std::pair<DType, const char*> kDTypeNames[] = {
    {DType::kF32, "F32"}, {DType::kF16, "F16"}, {DType::kBf16, "BF16"}, {DType::kI8, "I8"},
    {DType::kU8, "U8"},   {DType::kI32, "I32"}, {DType::kI64, "I64"},   {DType::kBool, "BOOL"}};

std::optional<DType> DTypeOf(const std::string& name) {
  for (const auto& [dtype, known] : kDTypeNames) {
    if (name == known) return dtype;
  }
  return std::nullopt;
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

bool Fits(const std::vector<int64_t>& shape, const std::vector<int64_t>& expected) {
  if (shape.size() != expected.size()) return false;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (expected[i] >= 0 && shape[i] != expected[i]) return false;
  }
  return true;
}

struct Header {
  Json json;
  size_t data_begin = 0;
};

// safetensors: 8 bytes of little-endian header length, the header as JSON, the data.
absl::StatusOr<Header> ReadHeader(const std::string& path, std::span<const std::byte> bytes) {
  uint64_t length = 0;
  if (bytes.size() < sizeof(length)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": truncated: ", bytes.size(), " bytes hold no safetensors header"));
  }
  std::memcpy(&length, bytes.data(), sizeof(length));
  if (length > bytes.size() - sizeof(length)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": truncated: the header needs ", length,
                                                   " bytes, the file has ",
                                                   bytes.size() - sizeof(length)));
  }
  const char* text = reinterpret_cast<const char*>(bytes.data()) + sizeof(length);
  Header header;
  header.json = Json::parse(text, text + length, nullptr, /*allow_exceptions=*/false);
  header.data_begin = sizeof(length) + length;
  if (!header.json.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": the safetensors header is no JSON"));
  }
  return header;
}

bool IsListOfCounts(const Json& json) {
  return json.is_array() && std::all_of(json.begin(), json.end(), [](const Json& item) {
           return item.is_number_unsigned() && item.get<uint64_t>() < (uint64_t{1} << 48);
         });
}

absl::StatusOr<TensorView> ReadEntry(const std::string& path, const std::string& name,
                                     const Json& entry, std::span<const std::byte> data) {
  const auto error = [&](const std::string& what) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": tensor ", name, ": ", what));
  };
  if (!entry.is_object() || !entry.contains("dtype") || !entry["dtype"].is_string() ||
      !entry.contains("shape") || !IsListOfCounts(entry["shape"]) ||
      !entry.contains("data_offsets") || !IsListOfCounts(entry["data_offsets"]) ||
      entry["data_offsets"].size() != 2) {
    return error("its header entry lacks dtype, shape or data_offsets");
  }
  const std::string type = entry["dtype"];
  const std::optional<DType> dtype = DTypeOf(type);
  if (!dtype.has_value()) return error(absl::StrCat("type ", type, " is not supported"));
  TensorView view;
  view.dtype = *dtype;
  view.path = path;
  view.shape = entry["shape"].get<std::vector<int64_t>>();
  uint64_t size = static_cast<uint64_t>(BytesOf(*dtype));
  for (const int64_t dimension : view.shape) {
    if (__builtin_mul_overflow(size, static_cast<uint64_t>(dimension), &size)) {
      return error("its size overflows");
    }
  }
  const uint64_t begin = entry["data_offsets"][0];
  const uint64_t end = entry["data_offsets"][1];
  if (begin > end || end - begin != size) {
    return error(absl::StrCat("shape ", ShapeText(view.shape), " of ", type, " needs ", size,
                              " bytes, its offsets give ", begin, " to ", end));
  }
  if (end > data.size()) {
    return error(absl::StrCat("truncated: it ends at byte ", end, " of the data, the file has ",
                              data.size()));
  }
  view.bytes = data.subspan(begin, size);
  return view;
}

absl::Status CheckNoOverlap(const std::string& path,
                            const std::vector<std::pair<std::string, TensorView>>& tensors) {
  std::vector<const std::pair<std::string, TensorView>*> sorted;
  for (const auto& tensor : tensors) {
    if (!tensor.second.bytes.empty()) sorted.push_back(&tensor);
  }
  std::sort(sorted.begin(), sorted.end(), [](const auto* a, const auto* b) {
    return a->second.bytes.data() < b->second.bytes.data();
  });
  for (size_t i = 1; i < sorted.size(); ++i) {
    const std::span<const std::byte> before = sorted[i - 1]->second.bytes;
    if (before.data() + before.size() > sorted[i]->second.bytes.data()) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": tensors ", sorted[i - 1]->first,
                                                     " and ", sorted[i]->first, " overlap"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

int64_t BytesOf(DType dtype) {
  switch (dtype) {
    case DType::kI8:
    case DType::kU8:
    case DType::kBool:
      return 1;
    case DType::kF16:
    case DType::kBf16:
      return 2;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kI64:
      return 8;
  }
  return 0;
}

const char* NameOf(DType dtype) {
  for (const auto& [known, name] : kDTypeNames) {
    if (known == dtype) return name;
  }
  return "unknown";
}

absl::StatusOr<std::unique_ptr<TensorFile>> TensorFile::Open(const std::vector<std::string>& paths,
                                                             const std::string& optional_prefix) {
  std::unique_ptr<TensorFile> result(new TensorFile);
  result->paths_ = paths;
  for (const std::string& path : paths) {
    NESTOR_ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(path));
    NESTOR_ASSIGN_OR_RETURN(const Header header, ReadHeader(path, file.bytes()));
    const std::span<const std::byte> data = file.bytes().subspan(header.data_begin);
    std::vector<std::pair<std::string, TensorView>> of_this_file;
    for (const auto& [name, entry] : header.json.items()) {
      if (name == "__metadata__") {
        for (const auto& [key, value] : entry.items()) {
          if (value.is_string()) result->metadata_[key] = value;
        }
        continue;
      }
      NESTOR_ASSIGN_OR_RETURN(TensorView view, ReadEntry(path, name, entry, data));
      of_this_file.emplace_back(name, std::move(view));
    }
    NESTOR_RETURN_IF_ERROR(CheckNoOverlap(path, of_this_file));
    for (auto& [stored_name, view] : of_this_file) {
      const std::string name(absl::StripPrefix(stored_name, optional_prefix));
      const auto [slot, is_new] = result->tensors_.emplace(name, std::move(view));
      if (!is_new) {
        return absl::InvalidArgumentError(
            absl::StrCat(path, ": tensor ", name, " is also in ", slot->second.path));
      }
    }
    result->files_.push_back(std::move(file));
  }
  return result;
}

absl::StatusOr<std::unique_ptr<TensorFile>> TensorFile::OpenCheckpoint(
    const std::string& directory, const std::string& optional_prefix) {
  const std::string index_path = directory + "/model.safetensors.index.json";
  const absl::StatusOr<std::string> index_text = ReadFile(index_path);
  if (!index_text.ok()) return Open({directory + "/model.safetensors"}, optional_prefix);
  const Json index = Json::parse(*index_text, nullptr, /*allow_exceptions=*/false);
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(index_path, ": weight_map: expected an object"));
  }
  std::vector<std::string> paths;
  for (const auto& [name, file] : index["weight_map"].items()) {
    if (!file.is_string() || file.get<std::string>().find('/') != std::string::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat(index_path, ": weight_map.", name, ": expected a file name"));
    }
    const std::string path = directory + "/" + file.get<std::string>();
    if (std::find(paths.begin(), paths.end(), path) == paths.end()) paths.push_back(path);
  }
  std::sort(paths.begin(), paths.end());
  return Open(paths, optional_prefix);
}

void TensorFile::DropPages() const {
  for (const MappedFile& file : files_) file.DropPages();
}

absl::StatusOr<TensorView> TensorFile::Get(const std::string& name,
                                           const std::vector<int64_t>& expected_shape) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    return absl::NotFoundError(absl::StrCat(absl::StrJoin(paths_, ", "), ": tensor ", name,
                                            " is missing; expected shape ",
                                            ShapeText(expected_shape)));
  }
  const TensorView& view = found->second;
  if (!Fits(view.shape, expected_shape)) {
    return absl::InvalidArgumentError(absl::StrCat(view.path, ": tensor ", name, ": shape ",
                                                   ShapeText(view.shape), ", expected ",
                                                   ShapeText(expected_shape)));
  }
  return view;
}

absl::StatusOr<std::vector<float>> TensorFile::GetFloats(
    const std::string& name, const std::vector<int64_t>& expected_shape) const {
  NESTOR_ASSIGN_OR_RETURN(const TensorView view, Get(name, expected_shape));
  const size_t size = view.bytes.size() / static_cast<size_t>(BytesOf(view.dtype));
  std::vector<float> values(size);
  // Views need not be aligned in the file, so every element is copied out.
  const auto convert = [&](auto element, auto to_float) {
    for (size_t i = 0; i < size; ++i) {
      std::memcpy(&element, view.bytes.data() + i * sizeof(element), sizeof(element));
      values[i] = to_float(element);
    }
  };
  switch (view.dtype) {
    case DType::kF32:
      if (size != 0) std::memcpy(values.data(), view.bytes.data(), view.bytes.size());
      return values;
    case DType::kF16:
      convert(uint16_t{}, FloatFromFloat16);
      return values;
    case DType::kBf16:
      convert(uint16_t{}, FloatFromBfloat16);
      return values;
    default:
      return absl::InvalidArgumentError(absl::StrCat(view.path, ": tensor ", name, ": type ",
                                                     NameOf(view.dtype),
                                                     ", expected F32, F16 or BF16"));
  }
}

absl::StatusOr<std::unique_ptr<TensorFileWriter>> TensorFileWriter::Create(
    const std::string& path, std::vector<Entry> entries) {
  nlohmann::ordered_json header;
  header["__metadata__"] = {{"format", "pt"}};
  std::map<std::string, Slot> slots;
  int64_t offset = 0;
  for (const Entry& entry : entries) {
    int64_t size = BytesOf(entry.dtype);
    for (const int64_t dimension : entry.shape) size *= dimension;
    header[entry.name] = {{"dtype", NameOf(entry.dtype)},
                          {"shape", entry.shape},
                          {"data_offsets", {offset, offset + size}}};
    slots[entry.name] = {offset, size};
    offset += size;
  }
  // Padding the header to 64 bytes keeps tensors aligned in the mapped file.
  std::string text = header.dump();
  text.resize((text.size() + sizeof(uint64_t) + 63) / 64 * 64 - sizeof(uint64_t), ' ');
  const uint64_t length = text.size();
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return FileError(path, errno);
  std::unique_ptr<TensorFileWriter> writer(new TensorFileWriter(path, fd));
  for (auto& [name, slot] : slots) slot.offset += static_cast<int64_t>(sizeof(length) + length);
  writer->slots_ = std::move(slots);
  std::string head(reinterpret_cast<const char*>(&length), sizeof(length));
  head += text;
  NESTOR_RETURN_IF_ERROR(writer->WriteAt(0, std::as_bytes(std::span(head))));
  return writer;
}

TensorFileWriter::~TensorFileWriter() {
  if (fd_ >= 0) ::close(fd_);
}

absl::Status TensorFileWriter::WriteAt(int64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::pwrite(fd_, bytes.data(), bytes.size(), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FileError(path_, errno);
    bytes = bytes.subspan(static_cast<size_t>(n));
    offset += n;
  }
  return absl::OkStatus();
}

absl::Status TensorFileWriter::Write(const std::string& name, std::span<const std::byte> bytes) {
  const auto slot = slots_.find(name);
  if (slot == slots_.end() || checksums_.count(name) != 0) {
    return absl::InternalError(
        absl::StrCat(path_, ": tensor ", name, " was not announced, or is written twice"));
  }
  if (static_cast<int64_t>(bytes.size()) != slot->second.size) {
    return absl::InternalError(absl::StrCat(path_, ": tensor ", name, ": ", bytes.size(),
                                            " bytes, announced ", slot->second.size));
  }
  NESTOR_RETURN_IF_ERROR(WriteAt(slot->second.offset, bytes));
  checksums_[name] = Sha256(bytes);
  return absl::OkStatus();
}

absl::Status TensorFileWriter::Finish() {
  for (const auto& [name, slot] : slots_) {
    if (checksums_.count(name) == 0) {
      return absl::InternalError(absl::StrCat(path_, ": tensor ", name, " was never written"));
    }
  }
  if (::fsync(fd_) != 0) return FileError(path_, errno);
  const int fd = std::exchange(fd_, -1);
  if (::close(fd) != 0) return FileError(path_, errno);
  return absl::OkStatus();
}

}  // namespace nestor
