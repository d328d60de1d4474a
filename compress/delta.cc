#include "compress/delta.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "compress/quantise.h"
#include "engine/tensor_file.h"
#include "nlohmann/json.hpp"

namespace nestor {
namespace {

using Json = nlohmann::json;

constexpr const char* kFormat = "nestor-delta";
constexpr const char* kVersion = "1";

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

// `values` [rank, size], each row times its scale.
std::vector<float> Scaled(std::vector<float> values, const std::vector<float>& scales) {
  const size_t size = scales.empty() ? 0 : values.size() / scales.size();
  for (size_t i = 0; i < values.size(); ++i) values[i] *= scales[i / size];
  return values;
}

double Norm(const std::vector<float>& values, int64_t row, int64_t size) {
  double sum = 0;
  for (int64_t i = row * size; i < (row + 1) * size; ++i) {
    const double value = values[static_cast<size_t>(i)];
    sum += value * value;
  }
  return std::sqrt(sum);
}

int64_t LargestPrefixRank(const LinearSpec& layer) {
  const std::vector<int64_t> ranks = PrefixRanks(layer.out, layer.in, /*may_be_gar=*/false);
  return ranks.empty() ? 0 : ranks.back();
}

absl::StatusOr<FactorPair> ReadTerm(const TensorFile& file, const LinearSpec& layer) {
  const std::string a_name = layer.name + ".a";
  const std::string bt_name = layer.name + ".bt";
  if (!file.Has(a_name) && !file.Has(bt_name)) {
    return FactorPair{QuantiseFactor({}, 0, layer.in), QuantiseFactor({}, 0, layer.out)};
  }
  NESTOR_ASSIGN_OR_RETURN(const TensorView view, file.Get(a_name, {-1, layer.in}));
  const int64_t rank = view.shape[0];
  if (rank < 1 || rank > LargestPrefixRank(layer)) {
    return DeltaError(view.path,
                      absl::StrCat("tensor ", a_name, ": ", rank, " components, expected 1 to ",
                                   LargestPrefixRank(layer), ", the layer's largest prefix rank"));
  }
  NESTOR_ASSIGN_OR_RETURN(const std::vector<float> a, file.GetFloats(a_name, {rank, layer.in}));
  NESTOR_ASSIGN_OR_RETURN(const std::vector<float> bt, file.GetFloats(bt_name, {rank, layer.out}));
  for (const auto& [name, values] : {std::pair(&a_name, &a), std::pair(&bt_name, &bt)}) {
    if (std::all_of(values->begin(), values->end(), [](float x) { return std::isfinite(x); })) {
      continue;
    }
    return DeltaError(view.path, absl::StrCat("tensor ", *name, ": holds a value that is not ",
                                              "finite, expected finite values"));
  }
  // Each component gets the same norm on both sides, which changes nothing but that both quantise
  // well.
  std::vector<float> a_scales, bt_scales;
  for (int64_t k = 0; k < rank; ++k) {
    const double a_norm = Norm(a, k, layer.in);
    const double bt_norm = Norm(bt, k, layer.out);
    const double scale = a_norm > 0 && bt_norm > 0 ? std::sqrt(bt_norm / a_norm) : 1;
    a_scales.push_back(static_cast<float>(scale));
    bt_scales.push_back(static_cast<float>(1 / scale));
  }
  return FactorPair{QuantiseFactor(Scaled(a, a_scales), rank, layer.in),
                    QuantiseFactor(Scaled(bt, bt_scales), rank, layer.out)};
}

absl::Status CheckTensorsAreOfLayers(const TensorFile& file,
                                     const std::vector<LinearSpec>& layers) {
  std::set<std::string> known;
  for (const LinearSpec& layer : layers) {
    known.insert(layer.name + ".a");
    known.insert(layer.name + ".bt");
  }
  for (const auto& [name, view] : file.tensors()) {
    if (known.count(name) == 0) {
      return DeltaError(view.path,
                        absl::StrCat("tensor ", name, ": belongs to no layer of the model"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Profile> ProfileFrom(const Json& json, const std::vector<LinearSpec>& layers,
                                    const std::vector<FactorPair>& terms) {
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
    const int64_t least = std::max<int64_t>(1, terms[i].a.rank);
    const int64_t most = LargestPrefixRank(layers[i]);
    if (!ranks[i].is_number_integer() || ranks[i] < least || ranks[i] > most) {
      return absl::InvalidArgumentError(absl::StrCat("ranks[", i, "]: ", ranks[i].dump(), " of ",
                                                     layers[i].name, ", expected a count from ",
                                                     least, ", its term's, to ", most));
    }
    profile.push_back({Form::kPrefix, ranks[i].get<int64_t>()});
  }
  return profile;
}

// The rows of `codes` in the spill after those of `term`, as many as there were.
absl::Status PutBefore(const FactorCodes& term, const std::string& name, TensorSpill* spill) {
  const auto put = [&](const std::string& tensor, std::span<const std::byte> first) {
    absl::StatusOr<std::vector<std::byte>> bytes = spill->Read(tensor);
    if (!bytes.ok()) return bytes.status();
    std::copy_backward(bytes->begin(), bytes->end() - std::ssize(first), bytes->end());
    std::copy(first.begin(), first.end(), bytes->begin());
    return spill->Replace(tensor, *bytes);
  };
  NESTOR_RETURN_IF_ERROR(put(name, std::as_bytes(std::span(term.codes))));
  return put(name + "_scales", std::as_bytes(std::span(term.scales)));
}

}  // namespace

absl::StatusOr<Delta> ReadDelta(const std::string& path, const std::string& source_sha256,
                                const std::vector<LinearSpec>& layers) {
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
    absl::StatusOr<Profile> profile = ProfileFrom(levels[i], layers, delta.terms);
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
  return delta;
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
