#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/tokenizer_json.h"

namespace nestor {

// The special tokens that stand round a single text.
struct SpecialTokenFrame {
  std::vector<int32_t> before;
  std::vector<int32_t> after;
};

// From the `post_processor` of a tokenizer.json; null stands for none. INVALID_ARGUMENT names the
// field of a type that is not supported.
absl::StatusOr<SpecialTokenFrame> ParsePostProcessor(const JsonField& field);

}  // namespace nestor
