#include "compress/delta.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/bfloat16.h"
#include "base/status_macros.h"
#include "compress/quantise.h"
#include "engine/tensor_file.h"
#include "nlohmann/json.hpp"

namespace nestor {
namespace {

using Json = nlohmann::json;

constexpr const char* kFormat = "nestor-delta";
constexpr const char* kVersion = "3";
constexpr const char* kTokens = "calibration.tokens";
constexpr const char* kLengths = "calibration.lengths";

absl::Status DeltaError(const std::string& path, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", what));
}

// Metadata holds text only; lists are JSON inside it.
absl::StatusOr<Json> ListIn(const TensorFile& file, const std::string& key) {
  const auto found = file.metadata().find(key);
  const Json list = found == file.metadata().end()
                        ? Json()
                        : Json::parse(found->second, nullptr, /*allow_exceptions=*/false);
  if (list.is_array()) return list;
  return DeltaError(file.paths()[0], absl::StrCat("metadata ", key, ": expected a list as JSON"));
}

absl::Status CheckOrigin(const TensorFile& file, const std::string& source_sha256) {
  for (const auto& [key, expected] :
       {std::pair("format", std::string(kFormat)), std::pair("version", std::string(kVersion)),
        std::pair("source_sha256", source_sha256)}) {
    const auto found = file.metadata().find(key);
    const std::string value = found == file.metadata().end() ? "absent" : found->second;
    if (value == expected) continue;
    const std::string origin = key == std::string("source_sha256") ? ", the checkpoint's" : "";
    return DeltaError(file.paths()[0],
                      absl::StrCat("metadata ", key, ": ", value, ", expected ", expected, origin));
  }
  return absl::OkStatus();
}

absl::Status CheckLayers(const TensorFile& file, const std::vector<LinearSpec>& layers) {
  NESTOR_ASSIGN_OR_RETURN(const Json names, ListIn(file, "layers"));
  if (names.size() != layers.size()) {
    return DeltaError(file.paths()[0], absl::StrCat("metadata layers: ", names.size(),
                                                    " of them, the model has ", layers.size()));
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    if (names[i] == layers[i].name) continue;
    return DeltaError(file.paths()[0], absl::StrCat("metadata layers[", i, "]: ", names[i].dump(),
                                                    ", expected ", layers[i].name));
  }
  return absl::OkStatus();
}

// Of its term.
std::vector<std::string> TensorsOf(const LinearSpec& layer) {
  std::vector<std::string> names;
  for (const char* part : {".a", ".a_scales", ".bt", ".bt_scales"}) {
    names.push_back(layer.name + part);
  }
  return names;
}

// As gar pairs, which a level's layers may be.
int64_t LargestPrefixRank(const LinearSpec& layer) {
  const std::vector<int64_t> ranks = PrefixRanks(layer.out, layer.in, /*may_be_gar=*/true);
  return ranks.empty() ? 0 : ranks.back();
}

absl::StatusOr<TensorView> TypedTensor(const TensorFile& file, const std::string& name, DType dtype,
                                       const std::vector<int64_t>& shape) {
  NESTOR_ASSIGN_OR_RETURN(TensorView view, file.Get(name, shape));
  if (view.dtype == dtype) return view;
  return DeltaError(view.path, absl::StrCat("tensor ", name, ": type ", NameOf(view.dtype),
                                            ", expected ", NameOf(dtype)));
}

template <typename Element>
std::vector<Element> Elements(const TensorView& view) {
  std::vector<Element> elements(view.bytes.size() / sizeof(Element));
  std::memcpy(elements.data(), view.bytes.data(), view.bytes.size());
  return elements;
}

// Codes of a byte, or of 4 bits: two in a byte, the first in the low half, plus 8.
std::vector<int8_t> CodesIn(const TensorView& view) {
  if (view.dtype == DType::kI8) return Elements<int8_t>(view);
  std::vector<int8_t> codes;
  for (const std::byte pair : view.bytes) {
    const int value = std::to_integer<int>(pair);
    codes.push_back(static_cast<int8_t>((value & 15) - 8));
    codes.push_back(static_cast<int8_t>((value >> 4) - 8));
  }
  return codes;
}

// One side of a term; `rank` is -1 where any is right.
absl::StatusOr<FactorCodes> ReadFactor(const TensorFile& file, const std::string& name,
                                       int64_t rank, int64_t size) {
  const auto found = file.tensors().find(name);
  const bool has_4_bits = found != file.tensors().end() && found->second.dtype == DType::kU8;
  NESTOR_ASSIGN_OR_RETURN(
      const TensorView codes,
      TypedTensor(file, name, has_4_bits ? DType::kU8 : DType::kI8,
                  {rank, has_4_bits ? PaddedToGroup(size) / 2 : PaddedToGroup(size)}));
  const std::string scales_name = name + "_scales";
  NESTOR_ASSIGN_OR_RETURN(const TensorView scales, TypedTensor(file, scales_name, DType::kBf16,
                                                               {codes.shape[0], NumGroups(size)}));
  FactorCodes factor{.rank = codes.shape[0],
                     .size = size,
                     .codes = CodesIn(codes),
                     .scales = Elements<uint16_t>(scales)};
  const bool is_finite = std::all_of(factor.scales.begin(), factor.scales.end(), [](uint16_t bits) {
    return std::isfinite(FloatFromBfloat16(bits));
  });
  if (is_finite) return factor;
  return DeltaError(scales.path, absl::StrCat("tensor ", scales_name, ": holds a value that is ",
                                              "not finite, expected finite values"));
}

absl::StatusOr<FactorPair> ReadTerm(const TensorFile& file, const LinearSpec& layer) {
  const std::vector<std::string> names = TensorsOf(layer);
  if (std::none_of(names.begin(), names.end(),
                   [&](const std::string& name) { return file.Has(name); })) {
    return FactorPair{QuantiseFactor({}, 0, layer.in), QuantiseFactor({}, 0, layer.out)};
  }
  FactorPair term;
  NESTOR_ASSIGN_OR_RETURN(term.a, ReadFactor(file, layer.name + ".a", -1, layer.in));
  if (term.a.rank < 1 || term.a.rank > LargestPrefixRank(layer)) {
    return DeltaError(
        file.paths()[0],
        absl::StrCat("tensor ", layer.name, ".a: ", term.a.rank, " components, expected 1 to ",
                     LargestPrefixRank(layer), ", the layer's largest prefix rank"));
  }
  NESTOR_ASSIGN_OR_RETURN(term.bt, ReadFactor(file, layer.name + ".bt", term.a.rank, layer.out));
  return term;
}

absl::Status CheckTensorsAreOfLayers(const TensorFile& file,
                                     const std::vector<LinearSpec>& layers) {
  std::set<std::string> known = {kTokens, kLengths};
  for (const LinearSpec& layer : layers) {
    for (std::string& name : TensorsOf(layer)) known.insert(std::move(name));
  }
  for (const auto& [name, view] : file.tensors()) {
    if (known.count(name) == 0) {
      return DeltaError(view.path,
                        absl::StrCat("tensor ", name, ": belongs to no layer of the model"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<TokenSequences> CalibrationIn(const TensorFile& file, const ModelSpec& spec) {
  if (!file.Has(kTokens) && !file.Has(kLengths)) return TokenSequences();
  NESTOR_ASSIGN_OR_RETURN(const TensorView tokens_view,
                          TypedTensor(file, kTokens, DType::kI32, {-1}));
  NESTOR_ASSIGN_OR_RETURN(const TensorView lengths_view,
                          TypedTensor(file, kLengths, DType::kI32, {-1}));
  const std::vector<int32_t> tokens = Elements<int32_t>(tokens_view);
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] >= 0 && tokens[i] < spec.vocabulary) continue;
    return DeltaError(file.paths()[0], absl::StrCat("tensor ", kTokens, "[", i, "]: ", tokens[i],
                                                    ", expected a token of ", spec.vocabulary));
  }
  const int64_t longest = std::min(kWindowTokens, spec.context_length);
  TokenSequences sequences;
  auto next = tokens.begin();
  for (const int32_t length : Elements<int32_t>(lengths_view)) {
    if (length < 1 || length > longest || length > tokens.end() - next) {
      return DeltaError(file.paths()[0],
                        absl::StrCat("tensor ", kLengths, "[", sequences.size(), "]: ", length,
                                     ", expected 1 to ", longest, " of the ", tokens.end() - next,
                                     " tokens that are left"));
    }
    sequences.emplace_back(next, next + length);
    next += length;
  }
  if (next == tokens.end()) return sequences;
  return DeltaError(file.paths()[0], absl::StrCat("tensor ", kTokens, ": ", tokens.end() - next,
                                                  " more than ", kLengths, " add up to"));
}

absl::StatusOr<Profile> ProfileFrom(const Json& json, const std::vector<LinearSpec>& layers) {
  const Json forms = json.is_object() ? json.value("forms", Json()) : Json();
  const Json ranks = json.is_object() ? json.value("ranks", Json()) : Json();
  for (const auto& [key, list] : {std::pair("forms", &forms), std::pair("ranks", &ranks)}) {
    if (list->is_array() && list->size() == layers.size()) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(key, ": expected a list of ", layers.size(), " entries"));
  }
  Profile profile;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (forms[i] == "dense") {
      profile.push_back({Form::kDense, 0});
      continue;
    }
    if (forms[i] != "prefix") {
      return absl::InvalidArgumentError(
          absl::StrCat("forms[", i, "]: ", forms[i].dump(), ", expected dense or prefix"));
    }
    const int64_t most = LargestPrefixRank(layers[i]);
    if (!ranks[i].is_number_integer() || ranks[i] < 1 || ranks[i] > most) {
      return absl::InvalidArgumentError(absl::StrCat("ranks[", i, "]: ", ranks[i].dump(), " of ",
                                                     layers[i].name,
                                                     ", expected a count from 1 to ", most));
    }
    profile.push_back({Form::kPrefix, ranks[i].get<int64_t>()});
  }
  return profile;
}

// The rows of tensor `name` in the spill after those of `term`, as many as there were.
absl::Status PutBefore(const FactorCodes& term, const std::string& name, TensorSpill* spill) {
  const auto put = [&](const std::string& tensor, std::span<const std::byte> first) {
    absl::StatusOr<std::vector<std::byte>> bytes = spill->Read(tensor);
    if (!bytes.ok()) return bytes.status();
    // Fewer rows than the term has, where no level runs them: plain factors stop at break-even.
    const ptrdiff_t kept = std::min(std::ssize(first), std::ssize(*bytes));
    std::copy_backward(bytes->begin(), bytes->end() - kept, bytes->end());
    std::copy_n(first.begin(), kept, bytes->begin());
    return spill->Replace(tensor, *bytes);
  };
  NESTOR_RETURN_IF_ERROR(put(name, std::as_bytes(std::span(term.codes))));
  return put(name + "_scales", std::as_bytes(std::span(term.scales)));
}

}  // namespace

absl::StatusOr<Delta> ReadDelta(const std::string& path, const std::string& source_sha256,
                                const std::vector<LinearSpec>& layers, const ModelSpec& spec) {
  NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<TensorFile> file, TensorFile::Open({path}));
  NESTOR_RETURN_IF_ERROR(CheckOrigin(*file, source_sha256));
  NESTOR_RETURN_IF_ERROR(CheckLayers(*file, layers));
  NESTOR_RETURN_IF_ERROR(CheckTensorsAreOfLayers(*file, layers));
  Delta delta;
  for (const LinearSpec& layer : layers) {
    NESTOR_ASSIGN_OR_RETURN(FactorPair term, ReadTerm(*file, layer));
    delta.terms.push_back(std::move(term));
  }
  NESTOR_ASSIGN_OR_RETURN(const Json levels, ListIn(*file, "levels"));
  if (levels.empty()) return DeltaError(path, "metadata levels: expected at least one");
  for (size_t i = 0; i < levels.size(); ++i) {
    absl::StatusOr<Profile> profile = ProfileFrom(levels[i], layers);
    if (!profile.ok()) {
      return DeltaError(path,
                        absl::StrCat("metadata levels[", i, "].", profile.status().message()));
    }
    for (size_t j = 0; i > 0 && j < layers.size(); ++j) {
      if (IsNested(delta.profiles.back()[j], (*profile)[j])) continue;
      return DeltaError(path, absl::StrCat("metadata levels[", i, "]: ", layers[j].name,
                                           " runs less than one level below"));
    }
    delta.profiles.push_back(*std::move(profile));
  }
  NESTOR_ASSIGN_OR_RETURN(delta.calibration, CalibrationIn(*file, spec));
  return delta;
}

absl::Status WriteCalibrationTokens(const TokenSequences& sequences, const std::string& path) {
  std::vector<int32_t> tokens;
  std::vector<int32_t> lengths;
  for (const std::vector<int32_t>& sequence : sequences) {
    tokens.insert(tokens.end(), sequence.begin(), sequence.end());
    lengths.push_back(static_cast<int32_t>(sequence.size()));
  }
  NESTOR_ASSIGN_OR_RETURN(
      const std::unique_ptr<TensorFileWriter> writer,
      TensorFileWriter::Create(path, {{"tokens", DType::kI32, {std::ssize(tokens)}},
                                      {"lengths", DType::kI32, {std::ssize(lengths)}}}));
  NESTOR_RETURN_IF_ERROR(writer->Write("tokens", std::as_bytes(std::span(tokens))));
  NESTOR_RETURN_IF_ERROR(writer->Write("lengths", std::as_bytes(std::span(lengths))));
  return writer->Finish();
}

absl::Status ApplyDelta(const Delta& delta, const std::vector<LinearSpec>& layers,
                        TensorSpill* spill) {
  for (size_t i = 0; i < layers.size(); ++i) {
    const FactorPair& term = delta.terms[i];
    if (term.a.rank == 0) continue;
    const std::string stem = layers[i].name + ".prefix.";
    NESTOR_RETURN_IF_ERROR(PutBefore(term.a, stem + "a", spill));
    NESTOR_RETURN_IF_ERROR(PutBefore(term.bt, stem + "bt", spill));
  }
  return absl::OkStatus();
}

}  // namespace nestor
