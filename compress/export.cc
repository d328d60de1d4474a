#include "compress/export.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/bfloat16.h"
#include "base/check.h"
#include "base/file.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

namespace fs = std::filesystem;

constexpr const char* kCopiedFiles[] = {
    "config.json",           "generation_config.json",    "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json",   "chat_template.jinja",
    "modules.json",          "sentence_bert_config.json", "1_Pooling/config.json"};

// A tensor that the model reads beside its linear layers, and how an artifact stores it.
struct OtherTensor {
  std::string name;
  DType stored = DType::kF32;
};

std::vector<OtherTensor> OtherTensorsOf(const ModelSpec& spec) {
  std::vector<OtherTensor> tensors;
  const auto add_norm = [&](const std::string& stem) {
    if (stem.empty()) return;
    tensors.push_back({stem + ".weight"});
    if (spec.norm == NormKind::kLayerNorm) tensors.push_back({stem + ".bias"});
  };
  // The largest table; a row of it is all that a token reads.
  if (!spec.tied_head) tensors.push_back({spec.embeddings.token, DType::kBf16});
  for (const std::string& name : {spec.embeddings.position, spec.embeddings.type}) {
    if (!name.empty()) tensors.push_back({name});
  }
  add_norm(spec.embeddings.norm);
  for (int64_t block = 0; block < spec.num_blocks; ++block) {
    for (const std::string& name : {spec.names.attention_norm, spec.names.mlp_norm,
                                    spec.names.query_norm, spec.names.key_norm}) {
      add_norm(NameInBlock(name, block));
    }
  }
  add_norm(spec.final_norm);
  if (spec.is_classifier()) {
    for (const std::string& stem : {spec.classifier.pooler, spec.classifier.output}) {
      tensors.push_back({stem + ".weight"});
      tensors.push_back({stem + ".bias"});
    }
  }
  return tensors;
}

absl::StatusOr<std::vector<int64_t>> ShapeOf(const TensorFile& tensors, const std::string& name) {
  const auto found = tensors.tensors().find(name);
  if (found == tensors.tensors().end()) return tensors.Get(name, {}).status();
  return found->second.shape;
}

absl::Status CheckFinite(const TensorFile& tensors, const std::string& name) {
  NESTOR_ASSIGN_OR_RETURN(const std::vector<int64_t> shape, ShapeOf(tensors, name));
  NESTOR_ASSIGN_OR_RETURN(const std::vector<float> values, tensors.GetFloats(name, shape));
  const auto bad =
      std::find_if(values.begin(), values.end(), [](float value) { return !std::isfinite(value); });
  if (bad == values.end()) return absl::OkStatus();
  NESTOR_ASSIGN_OR_RETURN(const TensorView view, tensors.Get(name, shape));
  return absl::InvalidArgumentError(absl::StrCat(view.path, ": tensor ", name, ": element ",
                                                 bad - values.begin(), " is ", *bad,
                                                 ", expected finite values"));
}

absl::Status AddFactor(const std::string& stem, const std::string& part, const FactorCodes& factor,
                       TensorSpill* spill) {
  NESTOR_RETURN_IF_ERROR(spill->Add(stem + part, DType::kI8,
                                    {factor.rank, PaddedToGroup(factor.size)},
                                    std::as_bytes(std::span(factor.codes))));
  return spill->Add(absl::StrCat(stem, part, "_scales"), DType::kBf16,
                    {factor.rank, NumGroups(factor.size)}, std::as_bytes(std::span(factor.scales)));
}

absl::Status AddPair(const std::string& stem, const FactorPair& pair, TensorSpill* spill) {
  NESTOR_RETURN_IF_ERROR(AddFactor(stem, "a", pair.a, spill));
  return AddFactor(stem, "bt", pair.bt, spill);
}

template <typename Element>
absl::StatusOr<std::vector<Element>> ReadElements(const std::string& name,
                                                  const TensorSpill& spill) {
  NESTOR_ASSIGN_OR_RETURN(const std::vector<std::byte> bytes, spill.Read(name));
  std::vector<Element> elements(bytes.size() / sizeof(Element));
  std::memcpy(elements.data(), bytes.data(), bytes.size());
  return elements;
}

absl::StatusOr<FactorCodes> ReadFactor(const std::string& name, int64_t size,
                                       const TensorSpill& spill) {
  FactorCodes factor{.size = size};
  NESTOR_ASSIGN_OR_RETURN(factor.codes, ReadElements<int8_t>(name, spill));
  NESTOR_ASSIGN_OR_RETURN(factor.scales, ReadElements<uint16_t>(name + "_scales", spill));
  factor.rank = std::ssize(factor.codes) / PaddedToGroup(size);
  return factor;
}

std::string GarStem(const LinearSpec& spec, int64_t rank) {
  return absl::StrCat(spec.name, ".gar.", rank, ".");
}

absl::Status SyncDirectory(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return FileError(path, errno);
  const int error = ::fsync(fd) == 0 ? 0 : errno;
  ::close(fd);
  return error == 0 ? absl::OkStatus() : FileError(path, error);
}

}  // namespace

TensorSpill::TensorSpill(std::string path, int descriptor)
    : path_(std::move(path)), fd_(descriptor) {}

TensorSpill::~TensorSpill() {
  ::close(fd_);
  ::unlink(path_.c_str());
}

absl::StatusOr<std::unique_ptr<TensorSpill>> TensorSpill::Create(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return FileError(path, errno);
  return std::unique_ptr<TensorSpill>(new TensorSpill(path, fd));
}

absl::Status TensorSpill::Add(const std::string& name, DType dtype, std::vector<int64_t> shape,
                              std::span<const std::byte> bytes) {
  int64_t offset = 0;
  {
    const MutexLock lock(&mutex_);
    offset = size_;
    size_ += static_cast<int64_t>(bytes.size());
    NESTOR_CHECK(slots_.emplace(name, Slot{dtype, std::move(shape), offset}).second);
  }
  return WriteAt(offset, bytes);
}

absl::StatusOr<std::vector<std::byte>> TensorSpill::Read(const std::string& name) const {
  Slot slot;
  {
    const MutexLock lock(&mutex_);
    const auto found = slots_.find(name);
    NESTOR_CHECK(found != slots_.end());
    slot = found->second;
  }
  int64_t size = BytesOf(slot.dtype);
  for (const int64_t extent : slot.shape) size *= extent;
  std::vector<std::byte> bytes(static_cast<size_t>(size));
  NESTOR_RETURN_IF_ERROR(ReadAt(slot.offset, bytes));
  return bytes;
}

absl::Status TensorSpill::Replace(const std::string& name, std::span<const std::byte> bytes) {
  int64_t offset = 0;
  {
    const MutexLock lock(&mutex_);
    const auto found = slots_.find(name);
    NESTOR_CHECK(found != slots_.end());
    int64_t size = BytesOf(found->second.dtype);
    for (const int64_t extent : found->second.shape) size *= extent;
    NESTOR_CHECK(size == std::ssize(bytes));
    offset = found->second.offset;
  }
  return WriteAt(offset, bytes);
}

absl::Status TensorSpill::ReadAt(int64_t offset, std::span<std::byte> bytes) const {
  while (!bytes.empty()) {
    const ssize_t n = ::pread(fd_, bytes.data(), bytes.size(), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return FileError(path_, n == 0 ? EIO : errno);
    bytes = bytes.subspan(static_cast<size_t>(n));
    offset += n;
  }
  return absl::OkStatus();
}

absl::Status TensorSpill::WriteAt(int64_t offset, std::span<const std::byte> bytes) const {
  while (!bytes.empty()) {
    const ssize_t n = ::pwrite(fd_, bytes.data(), bytes.size(), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FileError(path_, errno);
    bytes = bytes.subspan(static_cast<size_t>(n));
    offset += n;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::map<std::string, std::string>> TensorSpill::WriteTensors(
    const std::string& path, const std::map<std::string, int64_t>& kept_rows) const {
  std::map<std::string, Slot> slots;
  {
    const MutexLock lock(&mutex_);
    slots = slots_;
  }
  std::vector<TensorFileWriter::Entry> entries;
  // The widest types first, so that each tensor is aligned to its own.
  for (const int64_t width : {4, 2, 1}) {
    for (const auto& [name, slot] : slots) {
      if (BytesOf(slot.dtype) != width) continue;
      TensorFileWriter::Entry entry{name, slot.dtype, slot.shape};
      const auto kept = kept_rows.find(name);
      if (kept != kept_rows.end()) entry.shape[0] = kept->second;
      if (entry.shape[0] > 0) entries.push_back(std::move(entry));
    }
  }
  NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<TensorFileWriter> writer,
                          TensorFileWriter::Create(path, entries));
  std::vector<std::byte> bytes;
  for (const TensorFileWriter::Entry& entry : entries) {
    int64_t size = BytesOf(entry.dtype);
    for (const int64_t dimension : entry.shape) size *= dimension;
    bytes.resize(static_cast<size_t>(size));
    NESTOR_RETURN_IF_ERROR(ReadAt(slots.at(entry.name).offset, bytes));
    NESTOR_RETURN_IF_ERROR(writer->Write(entry.name, bytes));
  }
  NESTOR_RETURN_IF_ERROR(writer->Finish());
  return writer->checksums();
}

absl::Status AddLayer(const LinearSpec& spec, const LayerParts& parts, TensorSpill* spill) {
  const std::string& name = spec.name;
  const bool is_bf16 = !parts.dense_bf16.empty();
  if (is_bf16) {
    NESTOR_RETURN_IF_ERROR(spill->Add(name + ".dense", DType::kBf16, {spec.out, spec.in},
                                      std::as_bytes(std::span(parts.dense_bf16))));
  }
  if (parts.planes.has_value()) {
    const Planes& planes = *parts.planes;
    const std::vector<int64_t> shape = {planes.out, PaddedToGroup(planes.in) / 2};
    NESTOR_RETURN_IF_ERROR(
        spill->Add(name + ".coarse", DType::kU8, shape, std::as_bytes(std::span(planes.coarse))));
    if (!is_bf16) {
      NESTOR_RETURN_IF_ERROR(
          spill->Add(name + ".fine", DType::kU8, shape, std::as_bytes(std::span(planes.fine))));
    }
    if (parts.residual.has_value()) {
      NESTOR_RETURN_IF_ERROR(spill->Add(name + ".middle", DType::kU8,
                                        {planes.out, PaddedToGroup(planes.in) / 4},
                                        std::as_bytes(std::span(planes.middle))));
    }
    NESTOR_RETURN_IF_ERROR(spill->Add(name + ".scales", DType::kBf16,
                                      {planes.out, NumGroups(planes.in)},
                                      std::as_bytes(std::span(planes.scales))));
  }
  if (parts.residual.has_value()) {
    NESTOR_RETURN_IF_ERROR(AddPair(name + ".residual.", *parts.residual, spill));
  }
  if (parts.prefix.has_value()) {
    NESTOR_RETURN_IF_ERROR(AddPair(name + ".prefix.", *parts.prefix, spill));
  }
  return absl::OkStatus();
}

absl::Status ReplacePrefix(const LinearSpec& spec, const FactorPair& factors, TensorSpill* spill) {
  const std::string stem = spec.name + ".prefix.";
  for (const auto& [part, factor] : {std::pair("a", &factors.a), std::pair("bt", &factors.bt)}) {
    NESTOR_RETURN_IF_ERROR(spill->Replace(stem + part, std::as_bytes(std::span(factor->codes))));
    NESTOR_RETURN_IF_ERROR(spill->Replace(absl::StrCat(stem, part, "_scales"),
                                          std::as_bytes(std::span(factor->scales))));
  }
  return absl::OkStatus();
}

absl::StatusOr<FactorPair> ReadPrefix(const LinearSpec& spec, const TensorSpill& spill) {
  const std::string stem = spec.name + ".prefix.";
  FactorPair factors;
  NESTOR_ASSIGN_OR_RETURN(factors.a, ReadFactor(stem + "a", spec.in, spill));
  NESTOR_ASSIGN_OR_RETURN(factors.bt, ReadFactor(stem + "bt", spec.out, spill));
  return factors;
}

absl::Status AddGar(const LinearSpec& spec, const GarPair& pair, TensorSpill* spill) {
  const std::string stem = GarStem(spec, pair.a.rank);
  NESTOR_RETURN_IF_ERROR(AddFactor(stem, "a", pair.a, spill));
  NESTOR_RETURN_IF_ERROR(AddFactor(stem, "bt", pair.bt, spill));
  return spill->Add(stem + "rows", DType::kI32, {spec.out}, std::as_bytes(std::span(pair.rows)));
}

absl::Status AddOtherTensors(const NestedModel& source, TensorSpill* spill) {
  for (size_t i = 0; i < source.layers().size(); ++i) {
    const LinearSpec& layer = source.layers()[i];
    if (!layer.has_bias) continue;
    NESTOR_ASSIGN_OR_RETURN(const std::vector<float> bias, source.Bias(i));
    NESTOR_RETURN_IF_ERROR(
        spill->Add(layer.name + ".bias", DType::kF32, {layer.out}, std::as_bytes(std::span(bias))));
  }
  for (const OtherTensor& tensor : OtherTensorsOf(source.spec())) {
    NESTOR_ASSIGN_OR_RETURN(const std::vector<int64_t> shape,
                            ShapeOf(source.tensors(), tensor.name));
    NESTOR_ASSIGN_OR_RETURN(const std::vector<float> values,
                            source.tensors().GetFloats(tensor.name, shape));
    if (tensor.stored == DType::kF32) {
      NESTOR_RETURN_IF_ERROR(
          spill->Add(tensor.name, DType::kF32, shape, std::as_bytes(std::span(values))));
      continue;
    }
    std::vector<uint16_t> bits;
    std::transform(values.begin(), values.end(), std::back_inserter(bits), Bfloat16FromFloat);
    NESTOR_RETURN_IF_ERROR(
        spill->Add(tensor.name, DType::kBf16, shape, std::as_bytes(std::span(bits))));
  }
  return absl::OkStatus();
}

absl::Status CheckFinite(const NestedModel& source) {
  for (const LinearSpec& layer : source.layers()) {
    // A tensor of several layers is seen whole with the first of them.
    if (layer.source.first_output != 0) continue;
    NESTOR_RETURN_IF_ERROR(CheckFinite(source.tensors(), layer.source.name + ".weight"));
    if (!layer.has_bias) continue;
    NESTOR_RETURN_IF_ERROR(CheckFinite(source.tensors(), layer.source.name + ".bias"));
  }
  for (const OtherTensor& tensor : OtherTensorsOf(source.spec())) {
    NESTOR_RETURN_IF_ERROR(CheckFinite(source.tensors(), tensor.name));
  }
  return absl::OkStatus();
}

StoredRanks StoredRanksOf(const std::vector<Level>& levels, size_t num_layers) {
  StoredRanks ranks{std::vector<int64_t>(num_layers), std::vector<int64_t>(num_layers),
                    std::vector<std::set<int64_t>>(num_layers), std::vector<bool>(num_layers)};
  for (const Level& level : levels) {
    for (size_t i = 0; i < num_layers; ++i) {
      const auto& [form, rank] = level.profile[i];
      if (form == Form::kResidual) ranks.residual[i] = std::max(ranks.residual[i], rank);
      if (form == Form::kPrefix) ranks.prefix[i] = std::max(ranks.prefix[i], rank);
      if (form == Form::kGar) ranks.gar[i].insert(rank);
      if (form == Form::kMiddle) ranks.has_middle[i] = true;
    }
  }
  return ranks;
}

std::map<std::string, int64_t> KeptRows(const std::vector<LinearSpec>& layers,
                                        const StoredRanks& ranks,
                                        const std::vector<std::set<int64_t>>& added) {
  std::map<std::string, int64_t> rows;
  for (size_t i = 0; i < layers.size(); ++i) {
    rows[layers[i].name + ".middle"] = ranks.has_middle[i] ? layers[i].out : 0;
    for (const char* part : {"a", "bt", "a_scales", "bt_scales"}) {
      rows[absl::StrCat(layers[i].name, ".residual.", part)] = ranks.residual[i];
      rows[absl::StrCat(layers[i].name, ".prefix.", part)] = ranks.prefix[i];
    }
    for (const int64_t rank : added[i]) {
      if (ranks.gar[i].contains(rank)) continue;
      for (const char* part : {"a", "bt", "a_scales", "bt_scales", "rows"}) {
        rows[GarStem(layers[i], rank) + part] = 0;
      }
    }
  }
  return rows;
}

absl::Status CopyModelFiles(const std::string& source, const std::string& destination) {
  for (const char* name : kCopiedFiles) {
    const std::string from = absl::StrCat(source, "/", name);
    const std::string to = absl::StrCat(destination, "/", name);
    std::error_code error;
    if (!fs::exists(from, error)) continue;
    fs::create_directories(fs::path(to).parent_path(), error);
    if (error) return FileError(fs::path(to).parent_path().string(), error.value());
    NESTOR_ASSIGN_OR_RETURN(const std::string content, ReadFile(from));
    NESTOR_RETURN_IF_ERROR(WriteFileAtomically(to, content));
  }
  return absl::OkStatus();
}

absl::Status CommitDirectory(const std::string& partial, const std::string& path, bool overwrites) {
  NESTOR_RETURN_IF_ERROR(SyncDirectory(partial));
  std::error_code error;
  if (overwrites) {
    fs::remove_all(path, error);
    if (error) return FileError(path, error.value());
  }
  if (::rename(partial.c_str(), path.c_str()) != 0) return FileError(path, errno);
  const fs::path parent = fs::path(path).parent_path();
  return SyncDirectory(parent.empty() ? "." : parent.string());
}

}  // namespace nestor
