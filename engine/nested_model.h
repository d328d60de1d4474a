#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model_spec.h"
#include "engine/tensor_file.h"
#include "kernels/nested_linear.h"
#include "nlohmann/json.hpp"

namespace nestor {

struct FormAndRank {
  Form form = Form::kDense;
  int64_t rank = 0;
  bool operator==(const FormAndRank&) const = default;
};

// True where a layer may be at `low` on one level and at `high` on the next one of its ladder. A
// gar pair is a prefix of its rank; the middle plane follows any rank of a residual.
bool IsNested(const FormAndRank& low, const FormAndRank& high);

// One form and rank for every layer, in the order of LayersOf.
using Profile = std::vector<FormAndRank>;

// Quality as measured at compression; what was not measured is absent.
struct LevelMetrics {
  double quality = 1;
  std::optional<double> quality_vs_source;
  std::optional<double> perplexity;
  std::optional<double> spearman;
  std::optional<double> standard_error;  // of `quality`
  // Not kept in artifacts:
  std::optional<double> accuracy;           // of a classifier, where there are labels
  std::optional<double> agreement;          // of its labels with the full level's
  std::optional<double> seconds_per_token;  // of the steps that measured the level, on this device
};

struct Level {
  std::string ladder;  // "residual", "prefix", "mixed" or "full"
  Profile profile;
  LinearCost cost;  // of one token, the whole model; FLOPs include attention at 128 positions
  double relative_cost = 1;
  double relative_flops = 1;
  LevelMetrics metrics;
  // Made between two levels that are stored (engine/interpolate.h): its quality is an estimate,
  // until it is measured.
  bool is_interpolated = false;
};

// A model in its directory, ready to be loaded into a backend: an artifact with all its levels, or
// a source checkpoint, which has the full level only. Immutable and
// thread-safe once an engine has it.
class NestedModel {
 public:
  // `directory` is told apart by its nested.json. Verifies sizes, nesting and (artifacts)
  // checksums; the error names the file and the tensor.
  static absl::StatusOr<std::unique_ptr<NestedModel>> Open(const std::string& directory);

  const std::string& directory() const { return directory_; }
  const ModelSpec& spec() const { return spec_; }
  const std::vector<LinearSpec>& layers() const { return layers_; }
  const std::vector<Level>& levels() const { return levels_; }  // the full level is the last
  bool is_artifact() const { return is_artifact_; }
  // "int8", "bf16", or the checkpoint's own type.
  const std::string& dtype() const { return dtype_; }
  DenseStorage dense_storage() const { return dense_storage_; }
  // Stored components of a layer; 0 where it has none of that form. REQUIRES: not kGar.
  int64_t StoredRank(size_t layer, Form form) const;
  bool HasMiddlePlane(size_t layer) const { return has_middle_[layer]; }
  // Ranks of a layer's gar pairs, ascending.
  const std::vector<int64_t>& GarRanks(size_t layer) const { return gar_ranks_[layer]; }
  const nlohmann::json& description() const { return description_; }  // nested.json, or null

  // The stored parts of one layer, borrowed from the mapped file. A source checkpoint's weights
  // come as bf16 where all its layers are stored so and none is transposed, else as fp32. `scratch`
  // holds what had to be converted and must live as long as the result.
  absl::StatusOr<LinearWeights> Weights(size_t layer, std::vector<float>* scratch) const;
  // The weight [out, in] of a layer, taken out of its source tensor. REQUIRES: !is_artifact().
  absl::StatusOr<std::vector<float>> SourceWeight(size_t layer) const;
  // The bias [out] of a layer; empty where it has none.
  absl::StatusOr<std::vector<float>> Bias(size_t layer) const;
  const TensorFile& tensors() const { return *tensors_; }

  // Replaces the levels, checking that each profile fits the stored parts. For compression, which
  // writes the parts before it knows the levels.
  // Fills in the costs. INVALID_ARGUMENT names the level and the layer.
  absl::Status SetLevels(std::vector<Level> levels);
  // The same for levels that are only measured, never written: they need not be nested.
  absl::Status SetProbes(std::vector<Level> levels);
  // Replaces, layer by layer, LinearWeights::float_activations; for compression as well. REQUIRES:
  // an entry for every layer.
  void SetFloatActivations(std::vector<bool> float_activations);

 private:
  NestedModel() = default;
  absl::Status ReadArtifact();
  absl::Status ReadStorage();
  absl::Status ReadLayers();
  absl::Status ReadGarRanks(size_t layer, const nlohmann::json& json);
  absl::Status ReadActivations(size_t layer, const nlohmann::json& json);
  absl::Status ReadMiddlePlane(size_t layer, const nlohmann::json& json);
  absl::Status ReadLevels();
  absl::Status VerifyTensors() const;
  absl::Status ReadCheckpoint();
  absl::Status CheckProfile(size_t level, const Profile& profile) const;
  absl::Status CheckLadders(const std::vector<Level>& levels) const;
  absl::Status FillInCosts(std::vector<Level>* levels) const;
  absl::StatusOr<FactorView> Factors(size_t layer, Form form) const;
  absl::StatusOr<GarView> Gar(size_t layer, int64_t rank) const;
  std::string directory_;
  ModelSpec spec_;
  std::vector<LinearSpec> layers_;
  std::vector<Level> levels_;
  bool is_artifact_ = false;
  std::string dtype_;
  DenseStorage dense_storage_ = DenseStorage::kF32;
  bool has_coarse_plane_ = false;
  std::vector<int64_t> residual_ranks_;  // by layer
  std::vector<int64_t> prefix_ranks_;
  std::vector<std::vector<int64_t>> gar_ranks_;
  std::vector<bool> float_activations_;
  std::vector<bool> has_middle_;
  nlohmann::json description_;
  std::unique_ptr<TensorFile> tensors_;
};

// The cost of one token at `profile`: every layer, the head included, and attention at 128
// positions (FLOPs only). `dense` is how each dense form is stored.
LinearCost CostOfProfile(const ModelSpec& spec, const std::vector<LinearSpec>& layers,
                         const Profile& profile, DenseStorage dense);

// `levels` of nested.json (docs/artifact_format.md).
nlohmann::json LevelsToJson(const std::vector<Level>& levels);
// "dense", "residual", "prefix", "gar", "middle".
const char* NameOf(Form form);

}  // namespace nestor
