#include "engine/classifier.h"

#include <cmath>
#include <string>

#include "base/status_macros.h"

namespace nestor {

absl::StatusOr<Classifier::Dense> Classifier::LoadDense(const NestedModel& model,
                                                        const std::string& name, int64_t out) {
  Dense dense{.out = out, .in = model.spec().hidden, .weights = {}, .bias = {}};
  NESTOR_ASSIGN_OR_RETURN(dense.weights,
                          model.tensors().GetFloats(name + ".weight", {dense.out, dense.in}));
  NESTOR_ASSIGN_OR_RETURN(dense.bias, model.tensors().GetFloats(name + ".bias", {dense.out}));
  return dense;
}

absl::StatusOr<std::unique_ptr<Classifier>> Classifier::Load(const NestedModel& model) {
  const ModelSpec& spec = model.spec();
  auto classifier = std::make_unique<Classifier>();
  NESTOR_ASSIGN_OR_RETURN(classifier->pooler_,
                          LoadDense(model, spec.classifier.pooler, spec.hidden));
  NESTOR_ASSIGN_OR_RETURN(classifier->output_,
                          LoadDense(model, spec.classifier.output, spec.output_size()));
  return classifier;
}

std::vector<double> Classifier::Dense::Multiply(std::span<const double> x) const {
  std::vector<double> y(bias.begin(), bias.end());
  for (int64_t i = 0; i < out; ++i) {
    const float* row = weights.data() + i * in;
    for (int64_t j = 0; j < in; ++j) {
      y[static_cast<size_t>(i)] += static_cast<double>(row[j]) * x[static_cast<size_t>(j)];
    }
  }
  return y;
}

void Classifier::Logits(std::span<const float> hidden, int64_t rows, float* logits) const {
  for (int64_t row = 0; row < rows; ++row) {
    const std::span<const float> of_text =
        hidden.subspan(static_cast<size_t>(row * pooler_.in), static_cast<size_t>(pooler_.in));
    std::vector<double> pooled =
        pooler_.Multiply(std::vector<double>(of_text.begin(), of_text.end()));
    for (double& value : pooled) value = std::tanh(value);
    for (const double value : output_.Multiply(pooled)) *logits++ = static_cast<float>(value);
  }
}

}  // namespace nestor
