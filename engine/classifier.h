#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/nested_model.h"

namespace nestor {

// The head of a sequence classifier: logits = C tanh(P x + p) + c of a text's first hidden state x
// (transformers' BertPooler and the classifier behind it). It runs once for a text, not once for a
// token, and has a hundredth of the weights, so it is no nested layer: every level runs it in
// floating point, on the host. Immutable and thread-safe.
class Classifier {
 public:
  // Reads what `model`'s spec names. The error names the file and the tensor.
  static absl::StatusOr<std::unique_ptr<Classifier>> Load(const NestedModel& model);

  // Logits [rows, labels] of hidden states [rows, hidden].
  void Logits(std::span<const float> hidden, int64_t rows, float* logits) const;

 private:
  // y = W x + b.
  struct Dense {
    int64_t out = 0;
    int64_t in = 0;
    std::vector<float> weights;  // [out, in]
    std::vector<float> bias;     // [out]
    std::vector<double> Multiply(std::span<const double> x) const;
  };
  static absl::StatusOr<Dense> LoadDense(const NestedModel& model, const std::string& name,
                                         int64_t out);
  Dense pooler_, output_;
};

}  // namespace nestor
