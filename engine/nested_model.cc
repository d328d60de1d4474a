#include "engine/nested_model.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/checksum.h"
#include "base/file.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

using Json = nlohmann::json;

constexpr int64_t kAttentionContext = 128;  // positions, by the definition of relative_flops
constexpr int kFormatVersion = 1;
constexpr const char* kLadders[] = {"residual", "prefix", "mixed"};

std::string DescriptionPath(const std::string& directory) { return directory + "/nested.json"; }

absl::Status DescriptionError(const std::string& directory, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(DescriptionPath(directory), ": ", what));
}

std::optional<Form> FormNamed(const std::string& name) {
  for (const Form form :
       {Form::kDense, Form::kResidual, Form::kPrefix, Form::kGar, Form::kMiddle}) {
    if (name == NameOf(form)) return form;
  }
  return std::nullopt;
}

std::optional<double> OptionalNumber(const Json& json, const char* key) {
  if (!json.contains(key) || !json[key].is_number()) return std::nullopt;
  return json[key].get<double>();
}

Json NumberOrNull(const std::optional<double>& value) {
  return value.has_value() ? Json(*value) : Json();
}

LevelMetrics MetricsFromJson(const Json& json) {
  LevelMetrics metrics;
  metrics.quality = OptionalNumber(json, "quality").value_or(1);
  metrics.quality_vs_source = OptionalNumber(json, "quality_vs_source");
  metrics.perplexity = OptionalNumber(json, "perplexity");
  metrics.spearman = OptionalNumber(json, "spearman");
  metrics.standard_error = OptionalNumber(json, "standard_error");
  return metrics;
}

// The level that `json` describes, without its costs. The error says what is wrong, without the
// file and the level.
absl::StatusOr<Level> LevelFromJson(const Json& json) {
  if (!json.is_object()) return absl::InvalidArgumentError("expected an object");
  Level level;
  if (!json.contains("ladder") || !json["ladder"].is_string()) {
    return absl::InvalidArgumentError("ladder: expected a string");
  }
  level.ladder = json["ladder"];
  for (const char* key : {"forms", "ranks"}) {
    if (!json.contains(key) || !json[key].is_array()) {
      return absl::InvalidArgumentError(absl::StrCat(key, ": expected a list"));
    }
  }
  const Json& forms = json["forms"];
  const Json& ranks = json["ranks"];
  if (forms.size() != ranks.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("ranks: ", ranks.size(), " entries for ", forms.size(), " forms"));
  }
  for (size_t i = 0; i < forms.size(); ++i) {
    const std::optional<Form> form =
        forms[i].is_string() ? FormNamed(forms[i].get<std::string>()) : std::nullopt;
    if (!form.has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat("forms[", i, "]: ", forms[i].dump(),
                       ", expected dense, residual, middle, prefix or gar"));
    }
    if (!ranks[i].is_number_integer() || ranks[i].get<int64_t>() < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("ranks[", i, "]: ", ranks[i].dump(), ", expected a count"));
    }
    level.profile.push_back({*form, ranks[i].get<int64_t>()});
  }
  if (json.contains("metrics") && json["metrics"].is_object()) {
    level.metrics = MetricsFromJson(json["metrics"]);
  }
  return level;
}

bool IsAligned(const TensorView& view) {
  return reinterpret_cast<uintptr_t>(view.bytes.data()) %
             static_cast<uintptr_t>(BytesOf(view.dtype)) ==
         0;
}

absl::StatusOr<TensorView> TypedTensor(const TensorFile& tensors, const std::string& name,
                                       DType dtype, const std::vector<int64_t>& shape) {
  NESTOR_ASSIGN_OR_RETURN(const TensorView view, tensors.Get(name, shape));
  if (view.dtype != dtype || !IsAligned(view)) {
    return absl::InvalidArgumentError(absl::StrCat(view.path, ": tensor ", name, ": type ",
                                                   NameOf(view.dtype), ", expected aligned ",
                                                   NameOf(dtype)));
  }
  return view;
}

template <typename Element>
const Element* Pointer(const TensorView& view) {
  return reinterpret_cast<const Element*>(view.bytes.data());
}

// A pair of factors of `out` outputs, stored under `stem`.
absl::StatusOr<FactorView> FactorTensors(const TensorFile& tensors, const std::string& stem,
                                         int64_t rank, int64_t out, int64_t in) {
  NESTOR_ASSIGN_OR_RETURN(const TensorView a,
                          TypedTensor(tensors, stem + "a", DType::kI8, {rank, PaddedToGroup(in)}));
  NESTOR_ASSIGN_OR_RETURN(
      const TensorView a_scales,
      TypedTensor(tensors, stem + "a_scales", DType::kBf16, {rank, NumGroups(in)}));
  NESTOR_ASSIGN_OR_RETURN(const TensorView bt, TypedTensor(tensors, stem + "bt", DType::kI8,
                                                           {rank, PaddedToGroup(out)}));
  NESTOR_ASSIGN_OR_RETURN(
      const TensorView bt_scales,
      TypedTensor(tensors, stem + "bt_scales", DType::kBf16, {rank, NumGroups(out)}));
  return FactorView{.max_rank = rank,
                    .a = Pointer<int8_t>(a),
                    .a_scales = Pointer<uint16_t>(a_scales),
                    .bt = Pointer<int8_t>(bt),
                    .bt_scales = Pointer<uint16_t>(bt_scales)};
}

// Of the whole source tensor that holds a layer's weight.
std::vector<int64_t> SourceShape(const LinearSpec& layer) {
  if (layer.source.is_transposed) return {layer.in, layer.source.num_outputs};
  return {layer.source.num_outputs, layer.in};
}

}  // namespace

const char* NameOf(Form form) {
  switch (form) {
    case Form::kDense:
      return "dense";
    case Form::kResidual:
      return "residual";
    case Form::kPrefix:
      return "prefix";
    case Form::kGar:
      return "gar";
    case Form::kMiddle:
      return "middle";
  }
  return "unknown";
}

bool IsNested(const FormAndRank& low, const FormAndRank& high) {
  if (high.form == Form::kDense) return true;
  if (low.form == Form::kDense) return false;
  const auto has_plane = [](const FormAndRank& layer) {
    return layer.form == Form::kResidual || layer.form == Form::kMiddle;
  };
  if (has_plane(low) != has_plane(high)) return false;
  if (high.form == Form::kMiddle) return true;
  return low.form != Form::kMiddle && low.rank <= high.rank;
}

LinearCost CostOfProfile(const ModelSpec& spec, const std::vector<LinearSpec>& layers,
                         const Profile& profile, DenseStorage dense) {
  LinearCost cost;
  for (size_t i = 0; i < layers.size(); ++i) {
    cost += CostOfLinear(layers[i].out, layers[i].in, layers[i].has_bias, dense, profile[i].form,
                         profile[i].rank);
  }
  cost.flops += AttentionFlops(spec, kAttentionContext);
  return cost;
}

nlohmann::json LevelsToJson(const std::vector<Level>& levels) {
  Json list = Json::array();
  for (const Level& level : levels) {
    Json forms = Json::array();
    Json ranks = Json::array();
    for (const FormAndRank& layer : level.profile) {
      forms.push_back(NameOf(layer.form));
      ranks.push_back(layer.rank);
    }
    list.push_back({{"ladder", level.ladder},
                    {"forms", forms},
                    {"ranks", ranks},
                    {"weight_bytes", level.cost.weight_bytes},
                    {"flops", level.cost.flops},
                    {"relative_cost", level.relative_cost},
                    {"relative_flops", level.relative_flops},
                    {"metrics",
                     {{"quality", level.metrics.quality},
                      {"quality_vs_source", NumberOrNull(level.metrics.quality_vs_source)},
                      {"perplexity", NumberOrNull(level.metrics.perplexity)},
                      {"spearman", NumberOrNull(level.metrics.spearman)},
                      {"standard_error", NumberOrNull(level.metrics.standard_error)}}}});
  }
  return list;
}

absl::StatusOr<std::unique_ptr<NestedModel>> NestedModel::Open(const std::string& directory) {
  std::error_code error;
  if (!std::filesystem::is_directory(directory, error)) {
    return absl::NotFoundError(absl::StrCat(directory, ": no such directory"));
  }
  std::unique_ptr<NestedModel> model(new NestedModel);
  model->directory_ = directory;
  NESTOR_ASSIGN_OR_RETURN(model->spec_, ReadModelSpec(directory));
  model->layers_ = LayersOf(model->spec_);
  model->is_artifact_ = std::filesystem::exists(DescriptionPath(directory));
  NESTOR_RETURN_IF_ERROR(model->is_artifact_ ? model->ReadArtifact() : model->ReadCheckpoint());
  return model;
}

absl::Status NestedModel::ReadCheckpoint() {
  NESTOR_ASSIGN_OR_RETURN(tensors_, TensorFile::OpenCheckpoint(directory_, spec_.optional_prefix));
  bool is_all_bf16 = true;
  for (const LinearSpec& layer : layers_) {
    NESTOR_ASSIGN_OR_RETURN(const TensorView view,
                            tensors_->Get(layer.source.name + ".weight", SourceShape(layer)));
    is_all_bf16 =
        is_all_bf16 && view.dtype == DType::kBf16 && IsAligned(view) && !layer.source.is_transposed;
  }
  dtype_ = is_all_bf16 ? "bf16" : "fp32";
  dense_storage_ = is_all_bf16 ? DenseStorage::kBf16 : DenseStorage::kF32;
  residual_ranks_.assign(layers_.size(), 0);
  prefix_ranks_.assign(layers_.size(), 0);
  gar_ranks_.assign(layers_.size(), {});
  float_activations_.assign(layers_.size(), false);
  has_middle_.assign(layers_.size(), false);
  return SetLevels({Level{.ladder = "full", .profile = Profile(layers_.size())}});
}

absl::Status NestedModel::ReadArtifact() {
  NESTOR_ASSIGN_OR_RETURN(const std::string text, ReadFile(DescriptionPath(directory_)));
  description_ = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!description_.is_object()) return DescriptionError(directory_, "expected a JSON object");
  NESTOR_RETURN_IF_ERROR(ReadStorage());
  NESTOR_RETURN_IF_ERROR(ReadLayers());
  NESTOR_ASSIGN_OR_RETURN(tensors_, TensorFile::Open({directory_ + "/nested.safetensors"}));
  NESTOR_RETURN_IF_ERROR(VerifyTensors());
  return ReadLevels();
}

// What kind of artifact it is, and how its dense form is stored.
absl::Status NestedModel::ReadStorage() {
  const auto expect = [&](const char* key, const Json& expected) {
    const Json value = description_.value(key, Json());
    if (value == expected) return absl::OkStatus();
    return DescriptionError(directory_,
                            absl::StrCat(key, ": ", value.dump(), ", expected ", expected.dump()));
  };
  NESTOR_RETURN_IF_ERROR(expect("format", "nestor-nested"));
  NESTOR_RETURN_IF_ERROR(expect("version", kFormatVersion));
  NESTOR_RETURN_IF_ERROR(expect("group_size", kGroupSize));
  const Json dtype = description_.value("dtype", Json());
  if (dtype != "int8" && dtype != "bf16") {
    return DescriptionError(directory_,
                            absl::StrCat("dtype: ", dtype.dump(), ", expected int8 or bf16"));
  }
  dtype_ = dtype;
  dense_storage_ = dtype_ == "int8" ? DenseStorage::kPlanes : DenseStorage::kBf16;
  const Json planes = description_.value("planes", Json());
  const bool is_known = dtype_ == "int8" ? planes == Json({4, 4})
                                         : planes == Json::array({4}) || planes == Json::array();
  if (!is_known) {
    return DescriptionError(directory_, absl::StrCat("planes: ", planes.dump(),
                                                     " is not supported with dtype ", dtype_));
  }
  has_coarse_plane_ = !planes.empty();
  return absl::OkStatus();
}

absl::Status NestedModel::ReadLayers() {
  const Json layers = description_.value("layers", Json());
  if (!layers.is_array() || layers.size() != layers_.size()) {
    return DescriptionError(directory_,
                            absl::StrCat("layers: expected ", layers_.size(), " entries"));
  }
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Json& layer = layers[i];
    const LinearSpec& expected = layers_[i];
    if (!layer.is_object() || layer.value("name", Json()) != expected.name ||
        layer.value("out", Json()) != expected.out || layer.value("in", Json()) != expected.in) {
      return DescriptionError(directory_, absl::StrCat("layers[", i, "]: expected ", expected.name,
                                                       " [", expected.out, ", ", expected.in, "]"));
    }
    for (const auto& [key, ranks] :
         {std::pair("residual_rank", &residual_ranks_), std::pair("prefix_rank", &prefix_ranks_)}) {
      const Json rank = layer.value(key, Json());
      if (!rank.is_number_unsigned()) {
        return DescriptionError(directory_,
                                absl::StrCat("layers[", i, "].", key, ": expected a count"));
      }
      ranks->push_back(rank.get<int64_t>());
    }
    NESTOR_RETURN_IF_ERROR(ReadGarRanks(i, layer));
    NESTOR_RETURN_IF_ERROR(ReadActivations(i, layer));
    NESTOR_RETURN_IF_ERROR(ReadMiddlePlane(i, layer));
  }
  return absl::OkStatus();
}

absl::Status NestedModel::ReadGarRanks(size_t layer, const Json& json) {
  std::vector<int64_t>& ranks = gar_ranks_.emplace_back();
  if (!json.contains("gar_ranks")) return absl::OkStatus();
  const Json& stated = json["gar_ranks"];
  const auto error = [&] {
    return DescriptionError(directory_,
                            absl::StrCat("layers[", layer, "].gar_ranks: ", stated.dump(),
                                         ", expected ascending counts below ", layers_[layer].out));
  };
  if (!stated.is_array()) return error();
  for (const Json& rank : stated) {
    if (!rank.is_number_unsigned()) return error();
    ranks.push_back(rank.get<int64_t>());
    const int64_t least = ranks.size() > 1 ? ranks[ranks.size() - 2] + 1 : 1;
    if (ranks.back() < least || ranks.back() >= layers_[layer].out) return error();
  }
  return absl::OkStatus();
}

absl::Status NestedModel::ReadActivations(size_t layer, const Json& json) {
  const Json activations = json.value("activations", Json());
  if (json.contains("activations") && activations != "float") {
    return DescriptionError(
        directory_, absl::StrCat("layers[", layer, "].activations: ", activations.dump(),
                                 ", expected \"float\", or ", "no such key where int8 will do"));
  }
  float_activations_.push_back(activations == "float");
  return absl::OkStatus();
}

absl::Status NestedModel::ReadMiddlePlane(size_t layer, const Json& json) {
  const Json stated = json.value("middle_plane", Json(false));
  if (!stated.is_boolean()) {
    return DescriptionError(directory_, absl::StrCat("layers[", layer, "].middle_plane: ",
                                                     stated.dump(), ", expected true or false"));
  }
  has_middle_.push_back(stated.get<bool>());
  if (has_middle_.back() && !has_coarse_plane_) {
    return DescriptionError(directory_, absl::StrCat("layers[", layer,
                                                     "].middle_plane: true, but the artifact has "
                                                     "no coarse plane"));
  }
  return absl::OkStatus();
}

absl::Status NestedModel::ReadLevels() {
  // An artifact that is being written has its parts before its levels.
  if (!description_.contains("levels")) {
    return SetLevels({Level{.ladder = "full", .profile = Profile(layers_.size())}});
  }
  std::vector<Level> levels;
  const Json& stored = description_["levels"];
  if (!stored.is_array() || stored.empty()) {
    return DescriptionError(directory_, "levels: expected a list that is not empty");
  }
  for (size_t i = 0; i < stored.size(); ++i) {
    absl::StatusOr<Level> level = LevelFromJson(stored[i]);
    if (!level.ok()) {
      return DescriptionError(directory_,
                              absl::StrCat("levels[", i, "]: ", level.status().message()));
    }
    levels.push_back(*std::move(level));
  }
  NESTOR_RETURN_IF_ERROR(SetLevels(std::move(levels)));
  for (size_t i = 0; i < levels_.size(); ++i) {
    for (const auto& [key, value] : {std::pair("weight_bytes", levels_[i].cost.weight_bytes),
                                     std::pair("flops", levels_[i].cost.flops)}) {
      const Json stated = stored[i].value(key, Json());
      if (stated != value) {
        return DescriptionError(directory_,
                                absl::StrCat("levels[", i, "].", key, ": ", stated.dump(),
                                             ", but its profile costs ", value));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status NestedModel::VerifyTensors() const {
  for (size_t i = 0; i < layers_.size(); ++i) {
    std::vector<float> scratch;
    NESTOR_RETURN_IF_ERROR(Weights(i, &scratch).status());
  }
  const Json checksums = description_.value("checksums", Json());
  for (const auto& [name, view] : tensors_->tensors()) {
    if (!checksums.is_object() || !checksums.contains(name)) {
      return DescriptionError(directory_, absl::StrCat("checksums: tensor ", name, " is missing"));
    }
    if (checksums[name] != Sha256(view.bytes)) {
      return absl::DataLossError(absl::StrCat(view.path, ": tensor ", name,
                                              ": its bytes do not have the checksum that ",
                                              DescriptionPath(directory_), " states"));
    }
  }
  return absl::OkStatus();
}

int64_t NestedModel::StoredRank(size_t layer, Form form) const {
  NESTOR_CHECK(form != Form::kGar);
  if (form == Form::kResidual) return residual_ranks_[layer];
  return form == Form::kPrefix ? prefix_ranks_[layer] : 0;
}

absl::StatusOr<FactorView> NestedModel::Factors(size_t layer, Form form) const {
  const int64_t rank = StoredRank(layer, form);
  if (rank == 0) return FactorView();
  const LinearSpec& spec = layers_[layer];
  NESTOR_ASSIGN_OR_RETURN(FactorView view,
                          FactorTensors(*tensors_, absl::StrCat(spec.name, ".", NameOf(form), "."),
                                        rank, spec.out, spec.in));
  for (const Level& level : levels_) {
    if (level.profile[layer].form == form) view.level_ranks.push_back(level.profile[layer].rank);
  }
  return view;
}

absl::StatusOr<GarView> NestedModel::Gar(size_t layer, int64_t rank) const {
  const LinearSpec& spec = layers_[layer];
  const std::string stem = absl::StrCat(spec.name, ".gar.", rank, ".");
  GarView view;
  NESTOR_ASSIGN_OR_RETURN(view.factors,
                          FactorTensors(*tensors_, stem, rank, spec.out - rank, spec.in));
  NESTOR_ASSIGN_OR_RETURN(const TensorView rows,
                          TypedTensor(*tensors_, stem + "rows", DType::kI32, {spec.out}));
  view.rows = Pointer<int32_t>(rows);
  std::vector<bool> is_taken(static_cast<size_t>(spec.out));
  for (int64_t i = 0; i < spec.out; ++i) {
    const int32_t row = view.rows[i];
    if (row < 0 || row >= spec.out || is_taken[static_cast<size_t>(row)]) {
      return absl::InvalidArgumentError(absl::StrCat(rows.path, ": tensor ", stem, "rows: element ",
                                                     i, " is ", row, ", expected a permutation of ",
                                                     spec.out, " outputs"));
    }
    is_taken[static_cast<size_t>(row)] = true;
  }
  return view;
}

absl::StatusOr<std::vector<float>> NestedModel::SourceWeight(size_t layer) const {
  NESTOR_CHECK(!is_artifact_);
  const LinearSpec& spec = layers_[layer];
  const SourceTensor& source = spec.source;
  NESTOR_ASSIGN_OR_RETURN(std::vector<float> tensor,
                          tensors_->GetFloats(source.name + ".weight", SourceShape(spec)));
  if (!source.is_transposed && source.num_outputs == spec.out) return tensor;
  // Strides of an output and of an input in the source tensor.
  const int64_t out_stride = source.is_transposed ? 1 : spec.in;
  const int64_t in_stride = source.is_transposed ? source.num_outputs : 1;
  std::vector<float> weight;
  weight.reserve(static_cast<size_t>(spec.out * spec.in));
  for (int64_t i = 0; i < spec.out; ++i) {
    const float* output = tensor.data() + (source.first_output + i) * out_stride;
    for (int64_t j = 0; j < spec.in; ++j) weight.push_back(output[j * in_stride]);
  }
  return weight;
}

absl::StatusOr<std::vector<float>> NestedModel::Bias(size_t layer) const {
  const LinearSpec& spec = layers_[layer];
  if (!spec.has_bias) return std::vector<float>();
  if (is_artifact_) return tensors_->GetFloats(spec.name + ".bias", {spec.out});
  NESTOR_ASSIGN_OR_RETURN(
      const std::vector<float> tensor,
      tensors_->GetFloats(spec.source.name + ".bias", {spec.source.num_outputs}));
  const auto first = tensor.begin() + spec.source.first_output;
  return std::vector<float>(first, first + spec.out);
}

absl::StatusOr<LinearWeights> NestedModel::Weights(size_t layer,
                                                   std::vector<float>* scratch) const {
  const LinearSpec& spec = layers_[layer];
  LinearWeights weights{.name = spec.name,
                        .out = spec.out,
                        .in = spec.in,
                        .float_activations = float_activations_[layer]};
  NESTOR_ASSIGN_OR_RETURN(*scratch, Bias(layer));
  if (!is_artifact_) {
    if (dense_storage_ == DenseStorage::kBf16) {
      NESTOR_ASSIGN_OR_RETURN(
          const TensorView dense,
          TypedTensor(*tensors_, spec.source.name + ".weight", DType::kBf16, SourceShape(spec)));
      weights.dense_bf16 = Pointer<uint16_t>(dense) + spec.source.first_output * spec.in;
    } else {
      NESTOR_ASSIGN_OR_RETURN(const std::vector<float> dense, SourceWeight(layer));
      const size_t bias_size = scratch->size();
      scratch->insert(scratch->end(), dense.begin(), dense.end());
      weights.dense_f32 = scratch->data() + bias_size;
    }
    if (spec.has_bias) weights.bias = scratch->data();
    return weights;
  }
  if (spec.has_bias) weights.bias = scratch->data();
  const std::vector<int64_t> plane_shape = {spec.out, PaddedToGroup(spec.in) / 2};
  if (dense_storage_ == DenseStorage::kBf16) {
    NESTOR_ASSIGN_OR_RETURN(const TensorView dense, TypedTensor(*tensors_, spec.name + ".dense",
                                                                DType::kBf16, {spec.out, spec.in}));
    weights.dense_bf16 = Pointer<uint16_t>(dense);
  } else {
    NESTOR_ASSIGN_OR_RETURN(const TensorView fine,
                            TypedTensor(*tensors_, spec.name + ".fine", DType::kU8, plane_shape));
    weights.fine = Pointer<uint8_t>(fine);
  }
  if (has_coarse_plane_) {
    NESTOR_ASSIGN_OR_RETURN(const TensorView coarse,
                            TypedTensor(*tensors_, spec.name + ".coarse", DType::kU8, plane_shape));
    NESTOR_ASSIGN_OR_RETURN(const TensorView scales,
                            TypedTensor(*tensors_, spec.name + ".scales", DType::kBf16,
                                        {spec.out, NumGroups(spec.in)}));
    weights.coarse = Pointer<uint8_t>(coarse);
    weights.scales = Pointer<uint16_t>(scales);
  }
  if (has_middle_[layer]) {
    NESTOR_ASSIGN_OR_RETURN(const TensorView middle,
                            TypedTensor(*tensors_, spec.name + ".middle", DType::kU8,
                                        {spec.out, PaddedToGroup(spec.in) / 4}));
    weights.middle = Pointer<uint8_t>(middle);
  }
  NESTOR_ASSIGN_OR_RETURN(weights.residual, Factors(layer, Form::kResidual));
  NESTOR_ASSIGN_OR_RETURN(weights.prefix, Factors(layer, Form::kPrefix));
  for (const int64_t rank : gar_ranks_[layer]) {
    NESTOR_ASSIGN_OR_RETURN(weights.gar.emplace_back(), Gar(layer, rank));
  }
  return weights;
}

absl::Status NestedModel::CheckProfile(size_t level, const Profile& profile) const {
  const auto error = [&](const std::string& what) {
    return DescriptionError(directory_, absl::StrCat("levels[", level, "]: ", what));
  };
  if (profile.size() != layers_.size()) {
    return error(absl::StrCat(profile.size(), " layers, expected ", layers_.size()));
  }
  for (size_t i = 0; i < profile.size(); ++i) {
    const auto& [form, rank] = profile[i];
    const std::string where =
        absl::StrCat("layer ", layers_[i].name, ": ", NameOf(form), " rank ", rank);
    if (form == Form::kDense && rank != 0) return error(where + ", expected 0");
    if (form == Form::kResidual && !has_coarse_plane_) {
      return error(where + ", but the artifact has no coarse plane");
    }
    if (form == Form::kMiddle && !has_middle_[i]) {
      return error(where + ", but no middle plane is stored");
    }
    if (form == Form::kGar) {
      if (std::count(gar_ranks_[i].begin(), gar_ranks_[i].end(), rank) == 0) {
        return error(where + ", but no pair of that rank is stored");
      }
      continue;
    }
    if (rank > StoredRank(i, form)) {
      return error(absl::StrCat(where, ", but ", StoredRank(i, form), " are stored"));
    }
    if (form == Form::kPrefix && rank == 0) return error(where + ", expected at least 1");
  }
  return absl::OkStatus();
}

absl::Status NestedModel::FillInCosts(std::vector<Level>* levels) const {
  const Profile full(layers_.size());
  if (levels->empty() || levels->back().ladder != "full" || levels->back().profile != full) {
    return DescriptionError(directory_, "levels: the last must be \"full\", all layers dense");
  }
  const LinearCost full_cost = CostOfProfile(spec_, layers_, full, dense_storage_);
  for (size_t i = 0; i < levels->size(); ++i) {
    Level& level = (*levels)[i];
    NESTOR_RETURN_IF_ERROR(CheckProfile(i, level.profile));
    level.cost = CostOfProfile(spec_, layers_, level.profile, dense_storage_);
    level.relative_cost =
        static_cast<double>(level.cost.weight_bytes) / static_cast<double>(full_cost.weight_bytes);
    level.relative_flops =
        static_cast<double>(level.cost.flops) / static_cast<double>(full_cost.flops);
  }
  return absl::OkStatus();
}

absl::Status NestedModel::CheckLadders(const std::vector<Level>& levels) const {
  for (const char* ladder : kLadders) {
    const Level* below = nullptr;
    for (size_t i = 0; i < levels.size(); ++i) {
      if (levels[i].ladder != ladder) continue;
      for (size_t layer = 0; below != nullptr && layer < layers_.size(); ++layer) {
        if (!IsNested(below->profile[layer], levels[i].profile[layer])) {
          return DescriptionError(
              directory_,
              absl::StrCat("levels[", i, "]: layer ", layers_[layer].name,
                           ": not nested in the level below it on the ", ladder, " ladder"));
        }
      }
      below = &levels[i];
    }
  }
  for (size_t i = 0; i + 1 < levels.size(); ++i) {
    if (std::find(std::begin(kLadders), std::end(kLadders), levels[i].ladder) ==
        std::end(kLadders)) {
      return DescriptionError(directory_,
                              absl::StrCat("levels[", i, "].ladder: \"", levels[i].ladder,
                                           "\", expected residual, prefix or mixed"));
    }
  }
  return absl::OkStatus();
}

absl::Status NestedModel::SetLevels(std::vector<Level> levels) {
  NESTOR_RETURN_IF_ERROR(FillInCosts(&levels));
  NESTOR_RETURN_IF_ERROR(CheckLadders(levels));
  levels_ = std::move(levels);
  return absl::OkStatus();
}

absl::Status NestedModel::SetProbes(std::vector<Level> levels) {
  NESTOR_RETURN_IF_ERROR(FillInCosts(&levels));
  levels_ = std::move(levels);
  return absl::OkStatus();
}

void NestedModel::SetFloatActivations(std::vector<bool> float_activations) {
  NESTOR_CHECK(float_activations.size() == layers_.size());
  float_activations_ = std::move(float_activations);
}

}  // namespace nestor
