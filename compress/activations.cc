#include "compress/activations.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/progress.h"
#include "base/status_macros.h"
#include "compress/divergence.h"
#include "compress/evaluate.h"
#include "compress/sensitivity.h"

namespace nestor {
namespace {

constexpr int64_t kStepRows = 16;
constexpr int64_t kDepths = 6;
constexpr LinearRole kRoles[] = {LinearRole::kQuery,        LinearRole::kKey,  LinearRole::kValue,
                                 LinearRole::kAttentionOut, LinearRole::kGate, LinearRole::kUp,
                                 LinearRole::kDown,         LinearRole::kHead};

const char* NameOf(LinearRole role) {
  switch (role) {
    case LinearRole::kQuery:
      return "query";
    case LinearRole::kKey:
      return "key";
    case LinearRole::kValue:
      return "value";
    case LinearRole::kAttentionOut:
      return "attention_out";
    case LinearRole::kGate:
      return "gate";
    case LinearRole::kUp:
      return "up";
    case LinearRole::kDown:
      return "down";
    case LinearRole::kHead:
      return "head";
  }
  return "unknown";
}

// Layers that are chosen together.
struct Group {
  LinearRole role = LinearRole::kHead;
  std::vector<size_t> layers;
  double weights = 0;
  double loss = 0;  // with these alone in int8
};

std::vector<Group> GroupsOf(const std::vector<LinearSpec>& layers, int64_t depths) {
  const std::vector<size_t> numbers = SensitivityGroups(layers, depths);
  std::vector<Group> groups(*std::max_element(numbers.begin(), numbers.end()) + 1);
  for (size_t i = 0; i < layers.size(); ++i) {
    Group& group = groups[numbers[i]];
    group.role = layers[i].role;
    group.layers.push_back(i);
    group.weights += static_cast<double>(layers[i].out * layers[i].in);
  }
  return groups;
}

absl::Status MeasureAlone(const ActivationLoss& measure, size_t num_layers,
                          std::vector<Group>* groups) {
  for (Group& group : *groups) {
    std::vector<bool> is_float(num_layers, true);
    for (const size_t layer : group.layers) is_float[layer] = false;
    NESTOR_ASSIGN_OR_RETURN(group.loss, measure(is_float));
  }
  return absl::OkStatus();
}

// Sorts by loss for each weight, the largest first. How many from the front must be floats for the
// losses of the rest, which add up where they are small, to be allowed; at least one.
size_t SortByNeed(std::vector<Group>* groups) {
  std::stable_sort(groups->begin(), groups->end(), [](const Group& a, const Group& b) {
    return a.loss / a.weights > b.loss / b.weights;
  });
  double rest = 0;
  size_t needed = groups->size();
  while (needed > 1 && rest + (*groups)[needed - 1].loss <= kMaxActivationLoss) {
    rest += (*groups)[--needed].loss;
  }
  return needed;
}

// A sentence that fits into a step, with the special tokens at its ends.
std::vector<int32_t> CutToStep(std::vector<int32_t> sentence) {
  constexpr size_t kTokens = kStepRows - 1;  // a splice of two may have one more
  if (sentence.size() <= kTokens) return sentence;
  sentence[kTokens - 1] = sentence.back();
  sentence.resize(kTokens);
  return sentence;
}

}  // namespace

absl::StatusOr<ActivationChoice> ChooseActivations(const std::vector<LinearSpec>& layers,
                                                   const ActivationLoss& measure,
                                                   const ActivationLoss& measure_roughly) {
  ActivationChoice choice{.is_float = std::vector<bool>(layers.size())};
  NESTOR_ASSIGN_OR_RETURN(choice.int8_loss, measure(choice.is_float));
  choice.loss = choice.int8_loss;
  if (choice.loss <= kMaxActivationLoss) return choice;
  std::vector<Group> groups = GroupsOf(layers, 1);
  NESTOR_RETURN_IF_ERROR(MeasureAlone(measure_roughly, layers.size(), &groups));
  const size_t to_blame = SortByNeed(&groups);
  std::vector<Group> parts = GroupsOf(layers, kDepths);
  std::erase_if(parts, [&](const Group& part) {
    return std::none_of(groups.begin(), groups.begin() + static_cast<ptrdiff_t>(to_blame),
                        [&](const Group& group) { return group.role == part.role; });
  });
  NESTOR_RETURN_IF_ERROR(MeasureAlone(measure_roughly, layers.size(), &parts));
  parts.insert(parts.end(), groups.begin() + static_cast<ptrdiff_t>(to_blame), groups.end());
  const size_t needed = SortByNeed(&parts);
  for (size_t i = 0; i < parts.size() && (i < needed || choice.loss > kMaxActivationLoss); ++i) {
    for (const size_t layer : parts[i].layers) choice.is_float[layer] = true;
    if (i + 1 < needed) continue;
    NESTOR_ASSIGN_OR_RETURN(choice.loss, measure(choice.is_float));
  }
  return choice;
}

std::string FloatLayers(const std::vector<LinearSpec>& layers, const std::vector<bool>& is_float) {
  std::vector<std::string> names;
  for (const LinearRole role : kRoles) {
    int64_t count = 0;
    int64_t floats = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
      count += layers[i].role == role ? 1 : 0;
      floats += layers[i].role == role && is_float[i] ? 1 : 0;
    }
    if (floats == 0) continue;
    names.push_back(floats == count
                        ? NameOf(role)
                        : absl::StrCat(NameOf(role), " in ", floats, " of ", count, " blocks"));
  }
  return names.empty() ? "no layer" : absl::StrJoin(names, ", ");
}

ActivationProbe::ActivationProbe(ModelFactory open_model, BackendFactory make_backend,
                                 TokenSequences sequences, bool is_encoder)
    : open_model_(std::move(open_model)),
      make_backend_(std::move(make_backend)),
      is_encoder_(is_encoder),
      sequences_(std::move(sequences)) {
  if (!is_encoder) return;
  for (std::vector<int32_t>& sequence : sequences_) sequence = CutToStep(std::move(sequence));
}

absl::StatusOr<std::vector<double>> ActivationProbe::OutputsOf(
    const std::vector<bool>& is_float) const {
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> model, open_model_());
  model->SetFloatActivations(is_float);
  const int full = static_cast<int>(model->levels().size()) - 1;
  const bool rounds_full = model->dense_storage() == DenseStorage::kPlanes;
  const int level = rounds_full ? full : std::max(0, full - 1);
  NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                          OpenEngine(std::move(model), make_backend_, kWindowTokens, kStepRows));
  if (engine->model().spec().is_classifier()) {
    Progress progress("Measuring activations", CountTokens(sequences_));
    NESTOR_ASSIGN_OR_RETURN(const std::vector<std::vector<float>> logits,
                            EmbedSentences(engine.get(), sequences_, level, &progress));
    std::vector<double> outputs;
    for (const std::vector<float>& of_text : logits) {
      const std::vector<double> values = LabelLogProbabilities(of_text);
      outputs.insert(outputs.end(), values.begin(), values.end());
    }
    return outputs;
  }
  if (is_encoder_) {
    const EvaluationSet set = SplicedPairs(sequences_);
    Progress progress("Measuring activations", MeasuredTokens(set));
    NESTOR_ASSIGN_OR_RETURN(Measurement measured, Measure(engine.get(), level, set, &progress));
    return std::move(measured.similarities);
  }
  Progress progress("Measuring activations", CountTokens(sequences_));
  std::vector<double> outputs;
  for (const std::vector<int32_t>& window : sequences_) {
    NESTOR_ASSIGN_OR_RETURN(const std::vector<double> values,
                            LogProbabilities(engine.get(), window, level));
    outputs.insert(outputs.end(), values.begin(), values.end());
    progress.Advance(static_cast<int64_t>(window.size()));
  }
  return outputs;
}

absl::StatusOr<double> ActivationProbe::Loss(const std::vector<bool>& is_float) {
  if (exact_.empty()) {
    NESTOR_ASSIGN_OR_RETURN(exact_, OutputsOf(std::vector<bool>(is_float.size(), true)));
    if (exact_.size() < kMinOutputs) {
      return absl::InvalidArgumentError(
          absl::StrCat("too little calibration text to measure activations: ", exact_.size(), " ",
                       is_encoder_ ? "pairs of sentences" : "tokens", ", needs at least ",
                       kMinOutputs, "; --activations int8 or float measures nothing"));
    }
  }
  NESTOR_ASSIGN_OR_RETURN(const std::vector<double> outputs, OutputsOf(is_float));
  if (is_encoder_) return 1 - Spearman(outputs, exact_);
  double divergence = 0;
  for (size_t i = 0; i < outputs.size(); ++i) {
    divergence += 0.5 * (outputs[i] - exact_[i]) * (outputs[i] - exact_[i]);
  }
  return 1 - std::exp(-divergence / static_cast<double>(outputs.size()));
}

}  // namespace nestor
