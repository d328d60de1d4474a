#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "compress/corpus.h"
#include "compress/forward.h"
#include "engine/nested_model.h"

namespace nestor {

// Which layers keep their inputs as floats, and which have them rounded to int8 (nested.json:
// `activations`): decided by what rounding costs on calibration text.

enum class Activations : uint8_t { kAuto, kInt8, kFloat };

// The share of quality that rounding may cost.
inline constexpr double kMaxActivationLoss = 0.005;

// The share of quality lost where the inputs of those layers stay floats and all others are
// rounded, against all as floats.
using ActivationLoss = std::function<absl::StatusOr<double>(const std::vector<bool>& is_float)>;

struct ActivationChoice {
  std::vector<bool> is_float;  // by layer
  double int8_loss = 0;        // with all layers in int8
  double loss = 0;             // as chosen: at most kMaxActivationLoss
};

// All in int8 where `measure` allows that. Else every role is measured alone in int8, those that
// are to blame once more in six parts of the depth, both with `measure_roughly`; the parts with
// the largest loss for each weight become floats, until `measure` of the whole allows the rest.
absl::StatusOr<ActivationChoice> ChooseActivations(const std::vector<LinearSpec>& layers,
                                                   const ActivationLoss& measure,
                                                   const ActivationLoss& measure_roughly);

// Such as "down in 5 of 30 blocks, head"; "no layer".
std::string FloatLayers(const std::vector<LinearSpec>& layers, const std::vector<bool>& is_float);

// Measures an artifact's full level on text in steps of at most 16 rows, which every machine
// rounds alike; the level below where the full one is in bf16, which is never rounded to int8.
//
// The loss of a language model is 1 - exp(-D), D being the second-order Kullback-Leibler
// divergence, half the mean squared difference of log-probabilities: what the ratio of
// perplexities that evaluation calls quality loses on text that the model expects, without the
// noise of either sign that a ratio over as little text would have. Of an encoder it is 1 less
// the Spearman correlation of similarities, of a classifier that of its labels' log-probabilities.
class ActivationProbe {
 public:
  using ModelFactory = std::function<absl::StatusOr<std::unique_ptr<NestedModel>>()>;

  // An encoder's sequences are cut to what a step holds.
  ActivationProbe(ModelFactory open_model, BackendFactory make_backend, TokenSequences sequences,
                  bool is_encoder);

  // See ActivationLoss.
  absl::StatusOr<double> Loss(const std::vector<bool>& is_float);

 private:
  // A log-probability for each token but the first of a window or for each label of a text, or a
  // similarity for each pair.
  absl::StatusOr<std::vector<double>> OutputsOf(const std::vector<bool>& is_float) const;

  const ModelFactory open_model_;
  const BackendFactory make_backend_;
  const bool is_encoder_;
  TokenSequences sequences_;
  std::vector<double> exact_;  // all as floats; empty until needed
};

}  // namespace nestor
